"""Pictures with regions to the tensors of one stage-2 step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..processing import MMGEMProcessor
from ..processing.tokenization_mmgem import CAP_TOKEN, IMAGE_TOKEN
from .collator import PairCollator
from .pairs import BadDataError, digest
from .regions import regions_inside


class RegionCollator(PairCollator):
    """
    Examples of a [`RegionDataset`] to one batch: `boxes` `(B, R, 4)` in pixels of `pixel_values`, `region_mask` `(B,
    R)`, and for each of the N regions, row by row, a padded row of `input_ids`: its phrase as a sentence to embed, or
    behind k x k `<image>` and 64 [CAP] as a caption to learn. `pair_ids` `(N, 1)` are hashes of the phrases, by which
    equal ones are known. Examples with `patch_features` instead of a picture come as `patch_features`.

    Regions that the image processor's centre crop cuts away are left out.

    Args:
        processor: of the model, with the adapter's k.
        objective: "contrastive" (sentences) or "caption".

    Raises:
        BadDataError: where nothing of a batch is left.
    """

    def __init__(self, processor: MMGEMProcessor, objective: str):
        super().__init__(processor, objective)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        boxes, phrases = [], []
        for example in examples:
            inside = regions_inside(example, self.processor.image_processor)
            phrases += [example["phrases"][i] for i, _ in inside]
            boxes.append(torch.tensor([box for _, box in inside]).view(-1, 4))
        if not phrases:
            raise BadDataError(
                f"The image processor's centre crop cuts away all regions of {len(examples)} pictures; let it resize "
                "to a square without cropping."
            )
        counts = torch.tensor([len(of_image) for of_image in boxes])
        ids = self.processor.sentence_ids(phrases)
        if self.objective == "caption":
            prompt = [IMAGE_TOKEN] * self.processor.region_grid_size**2
            sequences, texts = self._captions(ids, prompt + [CAP_TOKEN] * self.processor.num_soft_prompts), []
        else:
            sequences, texts = self._sentences(ids), list(range(len(ids)))
        batch = {
            **self._tensors(sequences, [[i] for i in range(len(sequences))], texts),
            "boxes": pad_sequence(boxes, batch_first=True),
            "region_mask": torch.arange(int(counts.max())) < counts[:, None],
            "pair_ids": torch.tensor([[digest(phrase.encode())] for phrase in phrases]),
            "truncated": sum(len(row) > self.processor.max_length for row in ids),
            "left_out": sum(example.get("left_out", 0) for example in examples),
            "bad": {index: reason for example in examples for index, reason in example["bad"].items()},
        }
        if "patch_features" in examples[0]:
            batch["patch_features"] = torch.stack([example["patch_features"] for example in examples])
        else:
            batch["pixel_values"] = self.pixel_values([example["image"] for example in examples])
        return batch
