"""Examples to the tensors of one stage-1 step."""

from collections.abc import Sequence
from typing import Any

import torch

from ..processing import MMGEMProcessor
from ..processing.tokenization_mmgem import CAP_TOKEN, IMAGE_TOKEN


class PairCollator:
    """
    B pairs to one padded batch: B rows "(BOS) caption [EMB]", then B rows "(BOS) <image> [CAP] caption EOS" with labels
    on caption and EOS. Both paths see the same words (paper: the same batch).

    Args:
        processor: of the model.
        objective: "joint", or "contrastive" (the first B rows alone), or "caption" (the last B rows alone).

    A batch also counts what the Trainer reports: `truncated` (captions over `max_length`, a scalar tensor) and `bad`
    (indices of unreadable examples).
    """

    def __init__(self, processor: MMGEMProcessor, objective: str = "joint"):
        self.processor = processor
        self.objective = objective

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokenizer, max_length = self.processor.tokenizer, self.processor.max_length
        texts = [example["caption"] for example in examples]
        sentences = tokenizer(texts, split_special_tokens=True)["input_ids"]
        truncated = sum(len(row) > max_length for row in sentences)
        start = int(bool(self.processor.bos))
        opening = [*sentences[0][:start], *tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, CAP_TOKEN])]
        rows: list[list[int]] = []
        labels: list[list[int]] = []
        if self.objective != "caption":
            for row in sentences:
                rows.append(row if len(row) <= max_length else [*row[: max_length - 1], row[-1]])
                labels.append([-100] * len(rows[-1]))
        if self.objective != "contrastive":
            for row in sentences:
                words = row[start : min(len(row), max_length) - 1]
                # A caption that was cut does not end where it was cut: no EOS to learn there.
                words = words if len(row) > max_length else [*words, tokenizer.eos_token_id]
                rows.append([*opening, *words])
                labels.append([-100] * len(opening) + words)
        width = max(map(len, rows))
        batch = {
            "input_ids": _pad(rows, width, tokenizer.pad_token_id),
            "attention_mask": _pad([[1] * len(row) for row in rows], width, 0),
            "pixel_values": self.processor.image_processor(
                [example["image"] for example in examples], return_tensors="pt"
            )["pixel_values"],
            "truncated": torch.tensor(truncated),
            "bad": torch.tensor([i for example in examples for i in example["bad"]], dtype=torch.int64),
        }
        if self.objective != "contrastive":
            batch["labels"] = _pad(labels, width, -100)
        return batch


def _pad(rows: list[list[int]], width: int, value: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
