"""Examples to the tensors of one training step."""

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..processing import MMGEMProcessor
from .pairs import TEACHER_EMBEDS, BadDataError, digest
from .regions import regions_inside
from .triplets import Item


# What is kept of an image that went through the ViT before.
CACHED_FEATURES = ("pooled_features", "patch_features")
# The tensors of a batch that the model takes; the others are for the losses and the log.
MODEL_INPUTS = (
    *("input_ids", "attention_mask", "position_ids", "text_positions", "labels", "label_positions"),
    *("pixel_values", *CACHED_FEATURES, "boxes", "region_mask"),
)
# What the losses of embeddings see beside these: ids, which tell what is no negative, and a teacher's vectors.
LOSS_INPUTS = ("pair_ids", "negative_ids", "own_ids", TEACHER_EMBEDS)
TokenSequence = tuple[list[int], list[int]]  # token ids and labels


class PairCollator:
    """
    Collates B pairs into B sentences "(BOS) caption [EMB]" and B captions "(BOS) <image> [CAP] caption EOS", of which
    k x k `<image>`, with labels on caption and EOS. Both hold the same words (paper: the same batch). If the examples
    hold features of a frozen ViT, the batch does too, instead of `pixel_values`.

    Args:
        processor: of the model.
        objective: "joint", or "contrastive" (sentences alone), or "caption" (captions alone).
        pack_length: length of the rows that the sequences are packed into without padding between them, positions
            restarting with each; 0 gives every sequence a padded row of its own, sentences first.
        mini_batch_size: splits the batch for the gradient cache; 0 does not.

    Packing puts sequences where they fit. Images come in the order of their captions. `text_positions` `(B,)` are the
    indices of [EMB] in `input_ids.flatten()`, and `label_positions` those of all labels: the model need not search for
    them. `text_index` `(B,)` is the index of each image's sentence in this order. `pair_ids` `(B, 2)`, in the order of
    the images, are hashes of each pair's caption and image, to recognise equal ones. If the examples hold hard
    negatives, K more sentences stand behind the others in `text_positions` and `text_index`, whose hashes are
    `negative_ids` `(K,)`, and `own_ids` `(B, C)` are those of all captions of each image, which are no negatives of
    it. With `mini_batch_size`, the list `mini_batches` holds the parts, in which `sentences` are the inputs that embed
    the texts alone.

    A batch also holds what the Trainer reports: `truncated` (number of captions over `max_length`), `bad` (index and
    reason of unreadable examples), and for a stream the `position` after its last example.

    Raises:
        ValueError: for a `pack_length` shorter than the longest sequence, and for a `max_length` of the processor that
            holds no text.
    """

    def __init__(
        self, processor: MMGEMProcessor, objective: str = "joint", pack_length: int = 0, mini_batch_size: int = 0
    ):
        processor.checked_length(processor.max_length)
        longest = processor.longest_sequence
        if 0 < pack_length < longest:
            raise ValueError(
                f"pack_length {pack_length} does not hold the longest sequence: max_length {processor.max_length} "
                f"needs {longest}, visual tokens included; raise it, or turn packing off."
            )
        self.processor = processor
        self.objective = objective
        self.pack_length = pack_length
        self.mini_batch_size = mini_batch_size

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        captions = [example["caption"] for example in examples]
        ids = self.processor.sentence_ids(captions)
        counts: dict[str, Any] = {
            "truncated": sum(len(row) > self.processor.max_length for row in ids),
            "bad": {index: reason for example in examples for index, reason in example["bad"].items()},
        }
        if "position" in examples[-1]:
            counts["position"] = examples[-1]["position"]
        most = max(len(example.get("captions", ())) for example in examples)
        if not self.mini_batch_size:
            return {**self._batch(examples, ids, most), **counts}
        mini_batches = []
        for start in range(0, len(examples), self.mini_batch_size):
            part = slice(start, start + self.mini_batch_size)
            mini_batches.append(self._batch(examples[part], ids[part], most))
        return {"mini_batches": mini_batches, **counts}

    def _batch(self, examples: Sequence[dict[str, Any]], ids: list[list[int]], most: int) -> dict[str, Any]:
        """Tensors of a part of the batch, in which no image has more than `most` captions."""
        sentences = [] if self.objective == "caption" else self._sentences(ids)
        captions = [] if self.objective == "contrastive" else self._captions(ids, self.processor.image_prompt)
        hard = [example["negative"] for example in examples if example.get("negative")] if sentences else []
        negatives = self._sentences(self.processor.sentence_ids(hard)) if hard else []
        sequences = [*sentences, *captions, *negatives]
        rows = pack([len(tokens) for tokens, _ in sequences], self.pack_length)
        first = len(sentences) if captions else 0  # of the sequences with whose order that of the images goes
        images = [i - first for row in rows for i in row if first <= i < first + len(examples)]
        batch = self._tensors(sequences, rows, self._texts(images, sequences, negatives) if sentences else [])
        batch.update(self.images([examples[i] for i in images]))
        if sentences:
            pair_ids = [[digest(examples[i]["caption"].encode()), examples[i]["image_id"]] for i in images]
            batch["pair_ids"] = torch.tensor(pair_ids)
        if TEACHER_EMBEDS in examples[0] and sentences:
            batch[TEACHER_EMBEDS] = torch.stack([examples[i][TEACHER_EMBEDS] for i in images])
        if "negative" in examples[0] and sentences:
            batch["negative_ids"] = torch.tensor([digest(text.encode()) for text in hard], dtype=torch.long)
            captions_of = [examples[i]["captions"] for i in images]
            own = [[digest(text.encode()) for text in of] for of in captions_of]
            batch["own_ids"] = torch.tensor([[*row, *row[:1] * (most - len(row))] for row in own])
        if sentences and self.mini_batch_size:
            sequences = [*sentences, *negatives]
            rows = pack([len(tokens) for tokens, _ in sequences], self.pack_length)
            batch["sentences"] = self._tensors(sequences, rows, self._texts(images, sequences, negatives))
        return batch

    @staticmethod
    def _texts(images: list[int], sequences: list[TokenSequence], negatives: list[TokenSequence]) -> list[int]:
        """The sequences to embed: the sentences of the images, which are the first ones, and the last ones."""
        return [*images, *range(len(sequences) - len(negatives), len(sequences))]

    def images(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Their pixels, or what is cached of them."""
        cached = [name for name in CACHED_FEATURES if name in examples[0]]
        if not cached:
            return {"pixel_values": self.pixel_values([example["image"] for example in examples])}
        return {name: torch.stack([example[name] for example in examples]) for name in cached}

    def pixel_values(self, images: list[Any]) -> torch.Tensor:
        """As the image processor, but rescales and normalises the whole batch at once, which takes half the time."""
        image_processor: Any = self.processor.image_processor
        pixels = image_processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        factor = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        pixels = pixels.float().mul_(factor)
        if image_processor.do_normalize:
            moments = (image_processor.image_mean, image_processor.image_std)
            mean, std = (torch.as_tensor(moment, dtype=torch.float32).view(-1, 1, 1) for moment in moments)
            pixels.sub_(mean).div_(std)
        return pixels

    def _sentences(self, ids: list[list[int]]) -> list[TokenSequence]:
        max_length = self.processor.max_length
        truncated = [row if len(row) <= max_length else [*row[: max_length - 1], row[-1]] for row in ids]
        return [(row, [-100] * len(row)) for row in truncated]

    def _captions(self, ids: list[list[int]], prompt: Sequence[str]) -> list[TokenSequence]:
        start = int(bool(self.processor.bos))
        opening = [*ids[0][:start], *self.processor.tokenizer.convert_tokens_to_ids(list(prompt))]
        captions = self.processor.caption_ids(ids, self.processor.max_length)
        return [([*opening, *words], [-100] * len(opening) + words) for words in captions]

    def _tensors(self, sequences: list[TokenSequence], rows: list[list[int]], texts: Sequence[int]) -> dict[str, Any]:
        """Tensors of the rows; `texts` are the sequences that end with [EMB], in the order of the images."""
        width = self.pack_length or max(len(ids) for ids, _ in sequences)
        input_ids = torch.full((len(rows), width), self.processor.tokenizer.pad_token_id)
        labels = torch.full_like(input_ids, -100)
        # Padding is sequences of their own: their positions start at 0 too, and end where the longest's do.
        position_ids = torch.zeros_like(input_ids)
        attention_mask = torch.zeros_like(input_ids)
        last = {}  # index of the last token of each sequence
        for r, row in enumerate(rows):
            start = 0
            for i in row:
                ids, targets = sequences[i]
                end = start + len(ids)
                input_ids[r, start:end] = torch.tensor(ids)
                labels[r, start:end] = torch.tensor(targets)
                position_ids[r, start:end] = torch.arange(len(ids))
                attention_mask[r, start:end] = 1
                start = end
                last[i] = r * width + end - 1
            position_ids[r, start:] = torch.arange(width - start) % self.processor.longest_sequence
        positions, order = torch.tensor([last[i] for i in texts], dtype=torch.long).sort()
        tensors = {"input_ids": input_ids, "text_positions": positions, "text_index": order.argsort()}
        # transformers derives the block-diagonal mask from restarting positions, if there is no other mask.
        tensors.update({"position_ids": position_ids} if self.pack_length else {"attention_mask": attention_mask})
        label_positions = labels.flatten().ne(-100).nonzero()[:, 0]
        if len(label_positions):
            tensors.update(labels=labels, label_positions=label_positions)
        return tensors


class RegionCollator(PairCollator):
    """
    Collates examples of a [`RegionDataset`]: `boxes` `(B, R, 4)` in pixels of `pixel_values`, `region_mask` `(B, R)`,
    and for each of the N regions, image by image, a padded row of `input_ids`: its phrase as a sentence to embed, or
    after k x k `<image>` and 64 [CAP] as a caption to learn. `pair_ids` `(N, 1)` are hashes of the phrases, to
    recognise equal ones. If the examples hold `patch_features`, the batch does too, instead of `pixel_values`.

    Regions outside of the image processor's centre crop are left out.

    Args:
        processor: of the model, with the adapter's k.
        objective: "contrastive" (sentences) or "caption".

    Raises:
        BadDataError: if no region of a batch is left.
    """

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        boxes, phrases = [], []
        for example in examples:
            inside = regions_inside(example, self.processor.image_processor)
            phrases += [example["phrases"][i] for i, _ in inside]
            boxes.append(torch.tensor([box for _, box in inside]).view(-1, 4))
        if not phrases:
            raise BadDataError(
                f"The image processor's centre crop cuts away all regions of {len(examples)} images; let it resize "
                "to a square without cropping."
            )
        counts = torch.tensor([len(of_image) for of_image in boxes])
        ids = self.processor.sentence_ids(phrases)
        if self.objective == "caption":
            sequences, texts = self._captions(ids, self.processor.region_prompt), []
        else:
            sequences, texts = self._sentences(ids), list(range(len(ids)))
        return {
            **self._tensors(sequences, [[i] for i in range(len(sequences))], texts),
            "boxes": pad_sequence(boxes, batch_first=True),
            "region_mask": torch.arange(int(counts.max())) < counts[:, None],
            "pair_ids": torch.tensor([[digest(phrase.encode())] for phrase in phrases]),
            "truncated": sum(len(row) > self.processor.max_length for row in ids),
            "left_out": sum(example.get("left_out", 0) for example in examples),
            "bad": {index: reason for example in examples for index, reason in example["bad"].items()},
            **self.images(examples),
        }


class FusedCollator(PairCollator):
    """
    Collates examples of a [`TripletDataset`]. `input_ids`, `attention_mask` and `pixel_values` hold the items with
    both an image and a text; `texts` and `images` the inputs of those with one of them. In their order, `queries`
    `(B,)` are the indices of the queries, and `answers` `(B + K,)` those of the targets and of the K negatives.
    `pair_ids` `(B, 2)` are the hashes of queries and targets, `negative_ids` `(K,)` those of negatives.
    """

    def __init__(self, processor: MMGEMProcessor, mini_batch_size: int = 0):
        super().__init__(processor, "contrastive", mini_batch_size=mini_batch_size)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        size = self.mini_batch_size or len(examples)
        parts = [self._items(examples[start : start + size]) for start in range(0, len(examples), size)]
        counts = {
            "truncated": sum(part.pop("truncated") for part in parts),
            "bad": {index: reason for example in examples for index, reason in example["bad"].items()},
        }
        return {**({"mini_batches": parts} if self.mini_batch_size else parts[0]), **counts}

    def _items(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        queries, targets = ([example[side] for example in examples] for side in ("query", "target"))
        negatives = [example["negative"] for example in examples if example["negative"] is not None]
        items: list[Item] = [*queries, *targets, *negatives]
        ids = self.processor.sentence_ids([item.text for item in items])
        fused = [i for i, item in enumerate(items) if item.is_fused]
        texts = [i for i, item in enumerate(items) if item.image is None]
        images = [i for i, item in enumerate(items) if not item.text]
        places = torch.tensor([*fused, *texts, *images]).argsort()
        sentences = [tokens for tokens, _ in self._sentences(ids)]
        rows = self.processor.with_opening([sentences[i] for i in fused], self.processor.visual_placeholders)
        batch = {
            **self.processor.tokenizer.pad({"input_ids": rows}, return_tensors="pt"),
            "pixel_values": self.pixel_values([items[i].image for i in fused]),
            "queries": places[: len(queries)],
            "answers": places[len(queries) :],
            "pair_ids": torch.tensor([[query.id, target.id] for query, target in zip(queries, targets)]),
            "negative_ids": torch.tensor([item.id for item in negatives], dtype=torch.long),
            "truncated": sum(len(row) > self.processor.max_length for row in ids),
        }
        if texts:
            padded = self.processor.tokenizer.pad({"input_ids": [sentences[i] for i in texts]}, return_tensors="pt")
            batch["texts"] = dict(padded)
        if images:
            batch["images"] = {"pixel_values": self.pixel_values([items[i].image for i in images])}
        return batch


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """
    The indices of the sequences in each row of at most `row_length` tokens; 0 gives each sequence its own row.

    Best-fit decreasing: the longest sequence goes first, each into the fullest row that has room for it.
    """
    if not row_length:
        return [[i] for i in range(len(lengths))]
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # free tokens and index of each row, ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(free, (lengths[i], 0))
        if place == len(free):
            left, row = row_length, len(rows)
            rows.append([])
        else:
            left, row = free.pop(place)
        rows[row].append(i)
        bisect.insort(free, (left - lengths[i], row))
    return rows
