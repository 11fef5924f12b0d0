"""Embeddings of whole datasets, each process doing its part."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.utils import logging

from ..data.pairs import BadDataError, PairDataset
from ..modeling_mmgem import MMGEMModel
from ..processing import MMGEMProcessor
from .sharing import gather_parts, gather_rows, own_part, process


logger = logging.get_logger(__name__)

CPU_TOKENS = 1024  # of a batch of texts: with more, what layers hand on to each other falls out of the caches


@contextlib.contextmanager
def evaluating(model: MMGEMModel) -> Iterator[None]:
    """In eval mode for a while, and then as it was, part by part."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.inference_mode()
def embed_texts(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    texts: Sequence[str],
    batch_size: int = 64,
    max_length: int | None = None,
) -> torch.Tensor:
    """
    `(N, D)`, unit norm, float32, on the CPU; by this process alone, and cut to `max_length` without a word. Texts of
    like length go together, `batch_size` at most.
    """
    embeds = torch.empty(len(texts), model.config.projection_dim)
    if not texts:
        return embeds
    max_length = processor.max_length if max_length is None else max_length
    rows = processor(text=list(texts), padding=False, max_length=max_length, truncation=True)["input_ids"]
    tokens = CPU_TOKENS if model.device.type == "cpu" else None
    for batch in batches_by_length([len(row) for row in rows], batch_size, tokens):
        inputs = processor.tokenizer.pad({"input_ids": [rows[i] for i in batch]}, return_tensors="pt")
        embeds[batch] = model.get_embedding(**inputs.to(model.device)).float().cpu()
    return embeds


def batches_by_length(lengths: Sequence[int], batch_size: int, max_tokens: int | None) -> Iterator[list[int]]:
    """Indices in batches, shortest first, of up to `max_tokens` with padding (but never none)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == batch_size or (max_tokens and (len(batch) + 1) * lengths[i] > max_tokens)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def embed_pictures(
    model: MMGEMModel, processor: MMGEMProcessor, pictures: Sequence[Any], whole_image_box: bool = False
) -> torch.Tensor:
    """`(N, D)` of opened images, unit norm, float32, on the CPU; with `whole_image_box` through h4."""
    boxes = [[[0, 0, *picture.size]] for picture in pictures] if whole_image_box else None
    inputs = processor(images=list(pictures), boxes=boxes, return_tensors="pt").to(model.device)
    return model.get_embedding(**inputs).float().cpu().view(len(pictures), -1)


def readable_examples(dataset: PairDataset) -> list[int]:
    """
    The examples that can be read and have a caption, by their indices, found by all processes together.

    Raises:
        BadDataError: where there is none.
    """
    found, reasons = [], []
    for i in own_part(len(dataset)):
        try:
            dataset.read(i)
            found.append(i)
        except BadDataError as error:
            reasons.append(f"{i}: {error}")
    return _usable(found, reasons, dataset)


def _usable(indices: list[int], reasons: list[str], dataset: PairDataset) -> list[int]:
    indices, reasons = gather_parts(indices), gather_parts(reasons)
    if not indices:
        raise BadDataError(f"None of the {len(dataset)} examples to evaluate on can be used; {reasons[0]}.")
    if reasons and process()[0] == 0:
        logger.warning(f"{len(reasons)} of {len(dataset)} examples are left out, such as {reasons[0]}.")
    return indices


def embed_dataset(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    batch_size: int,
    whole_image_box: bool = False,
) -> tuple[list[int], torch.Tensor]:
    """
    The images that can be read and have a caption, by their indices, and their embeddings `(N, D)`, by all processes
    together. With `whole_image_box` an image is the region that covers it, through h4.

    Raises:
        BadDataError: where none can be read.
    """
    return embed_each(
        model, processor, dataset, batch_size, lambda i: dataset.read(i)["image"], whole_image_box=whole_image_box
    )


def embed_each(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    batch_size: int,
    read: Callable[[int], Any],
    whole_image_box: bool = False,
) -> tuple[list[int], torch.Tensor]:
    """As [`embed_dataset`], of the images that `read` gives for their indices."""
    indices: list[int] = []
    embeds = [torch.zeros(0, model.config.projection_dim)]
    reasons: list[str] = []
    part = own_part(len(dataset))
    for start in range(0, len(part), batch_size):
        pictures = []
        for i in part[start : start + batch_size]:
            try:
                pictures.append(read(i))
                indices.append(i)
            except BadDataError as error:
                reasons.append(f"{i}: {error}")
        if pictures:
            embeds.append(embed_pictures(model, processor, pictures, whole_image_box))
    indices, images = _usable(indices, reasons, dataset), gather_rows(torch.cat(embeds))
    check_finite(images, [f"image {i}" for i in indices])
    return indices, images


def embed_all_texts(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    texts: Sequence[str],
    batch_size: int,
    max_length: int | None = None,
) -> torch.Tensor:
    """As [`embed_texts`], by all processes together."""
    part = own_part(len(texts))
    embeds = gather_rows(embed_texts(model, processor, texts[part.start : part.stop], batch_size, max_length))
    check_finite(embeds, texts)
    return embeds


def check_finite(embeds: torch.Tensor, names: Sequence[str]) -> None:
    bad = (~embeds.isfinite()).any(-1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(embeds)} embeddings hold NaN or infinity, the first that of {names[bad[0]]!r}; the "
            "model diverged, or its dtype is too small for it."
        )


def embed_pairs(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    batch_size: int,
    whole_image_box: bool = False,
) -> dict[str, Any]:
    """
    `image_embeds` of the images that can be read (`indices`), `text_embeds` of their captions, and `text_to_image`,
    which says which belong together.
    """
    indices, images = embed_dataset(model, processor, dataset, batch_size, whole_image_box)
    readable = dataset.select(indices).captions()
    texts = [caption for captions in readable for caption in captions]
    cut = sum(len(row) > processor.max_length for row in processor.sentence_ids(texts))
    if cut and process()[0] == 0:
        logger.warning(
            f"{cut} of {len(texts)} captions are longer than max_length={processor.max_length}, and are cut."
        )
    return {
        "indices": indices,
        "image_embeds": images,
        "text_embeds": embed_all_texts(model, processor, texts, batch_size),
        "text_to_image": torch.tensor([i for i, captions in enumerate(readable) for _ in captions]),
    }
