"""Examples to the tensors of one stage-1 step."""

from collections.abc import Sequence
from typing import Any

import torch

from ..processing import MMGEMProcessor
from ..processing.tokenization_mmgem import CAP_TOKEN, IMAGE_TOKEN
from .pairs import digest


TokenSequence = tuple[list[int], list[int]]  # token ids and labels


class PairCollator:
    """
    B pairs to one batch: B sequences "(BOS) caption [EMB]", then B sequences "(BOS) <image> [CAP] caption EOS" with
    labels on caption and EOS. Both paths see the same words (paper: the same batch).

    Args:
        processor: of the model.
        objective: "joint", or "contrastive" (the first B sequences alone), or "caption" (the last B alone).
        pack_length: length of the rows that the sequences are packed into without padding between them, positions
            restarting with each; 0 gives every sequence a padded row of its own. The sequences keep their order, and
            with it text i its picture i.

    For the contrastive loss there are `pair_ids` `(B, 2)`, hashes of each pair's caption and picture, by which equal
    ones are known. A batch also counts what the Trainer reports: `truncated` (captions over `max_length`, a scalar
    tensor) and `bad` (index and reason of unreadable examples).

    Raises:
        ValueError: for a `pack_length` that the longest sequence does not fit into.
    """

    def __init__(self, processor: MMGEMProcessor, objective: str = "joint", pack_length: int = 0):
        longest = processor.max_length + 2
        if 0 < pack_length < longest:
            raise ValueError(
                f"pack_length {pack_length} does not hold the longest sequence: max_length {processor.max_length} "
                f"needs {longest}; raise it, or turn packing off."
            )
        self.processor = processor
        self.objective = objective
        self.pack_length = pack_length

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        sentences = self.processor.tokenizer([e["caption"] for e in examples], split_special_tokens=True)["input_ids"]
        sequences = self._sequences(sentences)
        rows = pack(sequences, self.pack_length) if self.pack_length else [[sequence] for sequence in sequences]
        images = self.processor.image_processor([e["image"] for e in examples], return_tensors="pt")
        tensors = self._tensors(rows)
        if self.objective != "caption":
            pair_ids = [[digest(e["caption"].encode()), e["image_id"]] for e in examples]
            tensors["pair_ids"] = torch.tensor(pair_ids)
        return {
            **tensors,
            "pixel_values": images["pixel_values"],
            "truncated": torch.tensor(sum(len(row) > self.processor.max_length for row in sentences)),
            "bad": {index: reason for example in examples for index, reason in example["bad"].items()},
        }

    def _sequences(self, sentences: list[list[int]]) -> list[TokenSequence]:
        tokenizer, max_length = self.processor.tokenizer, self.processor.max_length
        start = int(bool(self.processor.bos))
        opening = [*sentences[0][:start], *tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, CAP_TOKEN])]
        sequences: list[TokenSequence] = []
        if self.objective != "caption":
            for ids in sentences:
                cut = ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]]
                sequences.append((cut, [-100] * len(cut)))
        if self.objective != "contrastive":
            for ids in sentences:
                words = ids[start : min(len(ids), max_length) - 1]
                # A caption that was cut does not end where it was cut: no EOS to learn there.
                words = words if len(ids) > max_length else [*words, tokenizer.eos_token_id]
                sequences.append(([*opening, *words], [-100] * len(opening) + words))
        return sequences

    def _tensors(self, rows: list[list[TokenSequence]]) -> dict[str, torch.Tensor]:
        width = self.pack_length or max(len(ids) for row in rows for ids, _ in row)
        input_ids = torch.full((len(rows), width), self.processor.tokenizer.pad_token_id)
        labels = torch.full_like(input_ids, -100)
        # Padding is a sequence of its own: its positions start at 0 too.
        position_ids = torch.zeros_like(input_ids)
        attention_mask = torch.zeros_like(input_ids)
        for r, row in enumerate(rows):
            start = 0
            for ids, targets in row:
                end = start + len(ids)
                input_ids[r, start:end] = torch.tensor(ids)
                labels[r, start:end] = torch.tensor(targets)
                position_ids[r, start:end] = torch.arange(len(ids))
                attention_mask[r, start:end] = 1
                start = end
            position_ids[r, start:] = torch.arange(width - start)
        tensors = {"input_ids": input_ids}
        # From restarting positions, and no mask, transformers makes the block-diagonal mask itself.
        tensors.update({"position_ids": position_ids} if self.pack_length else {"attention_mask": attention_mask})
        if self.objective != "contrastive":
            tensors["labels"] = labels
        return tensors


def pack(sequences: Sequence[TokenSequence], length: int) -> list[list[TokenSequence]]:
    """Rows of at most `length` tokens, filled in order (next-fit): what comes first stays in front."""
    rows: list[list[TokenSequence]] = []
    free = 0
    for sequence in sequences:
        if not rows or len(sequence[0]) > free:
            rows.append([])
            free = length
        rows[-1].append(sequence)
        free -= len(sequence[0])
    return rows
