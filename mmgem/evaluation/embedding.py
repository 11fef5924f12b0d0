"""Embeddings and captions of whole datasets, each process doing its share."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers.utils import logging

from ..data.pairs import BadDataError, PairDataset
from ..modeling_mmgem import MMGEMModel
from ..modeling_mmgem.inputs_mmgem import batches_by_length
from ..processing import MMGEMProcessor
from .retrieval import check_finite
from .sharing import gather_parts, is_first_process, shard_range


logger = logging.get_logger(__name__)

CPU_TOKENS = 1024  # per batch of texts; with more, activations do not fit into a CPU's caches
CPU_PATCHES = 2048  # the same of images


def progress(items: Sequence[Any], unit: str) -> Any:
    """The items, with a bar in the first process once they have taken three seconds."""
    return logging.tqdm(items, unit=f" {unit}", leave=False, delay=3, disable=None if is_first_process() else True)


@contextlib.contextmanager
def evaluating(model: MMGEMModel) -> Iterator[None]:
    """Switches to eval mode, and afterwards every module back to the mode that it had."""
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
    `(N, D)`, unit norm, float32, on the CPU; by this process alone, truncated to `max_length` without a warning. Texts
    of similar length share a batch, `batch_size` at most.
    """
    embeds = torch.empty(len(texts), model.config.projection_dim)
    if not texts:
        return embeds
    max_length = processor.max_length if max_length is None else max_length
    rows = processor(text=list(texts), padding=False, max_length=max_length, truncation=True)["input_ids"]
    tokens = CPU_TOKENS if model.device.type == "cpu" else None
    for batch in progress(list(batches_by_length([len(row) for row in rows], batch_size, tokens)), "batch of texts"):
        inputs = processor.tokenizer.pad({"input_ids": [rows[i] for i in batch]}, return_tensors="pt")
        embeds[batch] = model.get_embedding(**inputs.to(model.device)).float().cpu()
    return embeds


@torch.inference_mode()
def embed_images(
    model: MMGEMModel, processor: MMGEMProcessor, images: Sequence[Any], whole_image_box: bool = False
) -> torch.Tensor:
    """`(N, D)` of PIL images, unit norm, float32, on the CPU; with `whole_image_box` through h4."""
    boxes = [[[0, 0, *image.size]] for image in images] if whole_image_box else None
    inputs = processor(images=list(images), boxes=boxes, return_tensors="pt").to(model.device)
    if boxes is None:
        return embed_pixels(model, inputs["pixel_values"])
    return model.get_embedding(**inputs).float().cpu().view(len(images), -1)


@torch.inference_mode()
def embed_pixels(model: MMGEMModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """`(N, D)` of a processor's pixels, float32, on the CPU; computed there in batches that fit into its caches."""
    size, (height, width) = model.pool_aggregator.patch_size, pixel_values.shape[-2:]
    fitting = max(CPU_PATCHES * size**2 // (height * width), 1) if model.device.type == "cpu" else len(pixel_values)
    parts = [model.get_embedding(pixel_values=part.to(model.device)) for part in pixel_values.split(fitting)]
    return torch.cat(parts).float().cpu()


@torch.inference_mode()
def embed_fused(
    model: MMGEMModel, processor: MMGEMProcessor, images: Sequence[Any], texts: Sequence[str]
) -> torch.Tensor:
    """`(N, D)` of texts, each with its image, by the active adapter of fused queries; as [`embed_images`]."""
    inputs = processor(images=list(images), text=list(texts), task="embed", truncation=True, return_tensors="pt")
    return model.get_embedding(**inputs.to(model.device)).float().cpu()


def embed_mixed(
    model: MMGEMModel, processor: MMGEMProcessor, images: Sequence[Any], texts: Sequence[str]
) -> torch.Tensor:
    """`(N, D)`: of each image (or None) and text (or ""), the embedding of both together, or of the one there is."""
    embeds = torch.empty(len(texts), model.config.projection_dim)
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        kinds.setdefault((image is not None, bool(text)), []).append(i)
    for (has_image, has_text), own in kinds.items():
        own_images, own_texts = [images[i] for i in own], [texts[i] for i in own]
        if not has_image:
            embeds[own] = embed_texts(model, processor, own_texts)
        elif not has_text:
            embeds[own] = embed_images(model, processor, own_images)
        else:
            embeds[own] = embed_fused(model, processor, own_images, own_texts)
    return embeds


def embed_averaged(
    model: MMGEMModel, processor: MMGEMProcessor, images: Sequence[Any], texts: Sequence[str]
) -> torch.Tensor:
    """
    `(N, D)`: the normalised mean of the plain embeddings of images and texts. Where the image is None or the text
    empty, the embedding of the other.
    """
    embeds = torch.zeros(len(texts), model.config.projection_dim)
    with_text = [i for i, text in enumerate(texts) if text]
    with_image = [i for i, image in enumerate(images) if image is not None]
    embeds[with_text] += embed_texts(model, processor, [texts[i] for i in with_text])
    if with_image:
        embeds[with_image] += embed_images(model, processor, [images[i] for i in with_image])
    return normalize(embeds, dim=-1)


def caption_inputs(model: MMGEMModel, processor: MMGEMProcessor, inputs: Any, **generation: Any) -> list[str]:
    """
    The captions of the processor's inputs; greedy unless `generation` says otherwise. Beams look for the most probable
    caption: transformers' own `length_penalty`, 1, is for the most probable per token, which prefers long ones.
    """
    beams = {"length_penalty": 0.0} if generation.get("num_beams", 1) > 1 else {}
    options = {"do_sample": False, "max_new_tokens": processor.max_length, **beams, **generation}
    ids = model.generate(**inputs.to(model.device), **options)
    return [caption.strip() for caption in processor.batch_decode(ids, skip_special_tokens=True)]


def caption_cosines(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    captions: Sequence[str],
    embeds: Sequence[torch.Tensor],
    batch_size: int,
) -> list[float]:
    """The cosine of each caption's embedding with the embedding beside it; -1 for an empty caption."""
    written = sorted({caption for caption in captions if caption})
    texts = dict(zip(written, embed_texts(model, processor, written, batch_size)))
    return [
        float(texts[caption] @ embed) if caption else -1.0 for caption, embed in zip(captions, embeds, strict=True)
    ]


def readable_batches(
    dataset: PairDataset, read: Callable[[int], Any], batch_size: int, faults: list[str]
) -> Iterator[list[tuple[int, Any]]]:
    """
    Batches of this process's share of the dataset: each index, and what `read` returns for it. The reasons of those
    that cannot be read are added to `faults`.
    """
    batch: list[tuple[int, Any]] = []
    for index in progress(shard_range(len(dataset)), "image"):
        try:
            batch.append((index, read(index)))
        except BadDataError as error:
            faults.append(f"{index}: {error}")
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def gather_readable(found: list[Any], faults: list[str], dataset: PairDataset, kind: str = "examples") -> list[Any]:
    """
    What all processes found; a warning says what is left out.

    Raises:
        BadDataError: if none found anything.
    """
    found, faults = gather_parts(found), gather_parts(faults)
    if not found:
        raise BadDataError(f"None of the {len(dataset)} {kind} to evaluate on can be used; {faults[0]}.")
    if faults and is_first_process():
        shown = "; ".join(faults[:3])
        logger.warning(f"{len(faults)} of {len(dataset)} {kind} are left out, such as {shown}.")
    return found


def readable_examples(dataset: PairDataset) -> list[int]:
    """
    The indices of the examples that can be read and have a caption, found by all processes together.

    Raises:
        BadDataError: if there is none.
    """
    faults: list[str] = []
    found = [index for batch in readable_batches(dataset, dataset.read, 1, faults) for index, _ in batch]
    return gather_readable(found, faults, dataset)


def embed_dataset(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    batch_size: int,
    whole_image_box: bool = False,
    read: Callable[[int], Any] | None = None,
) -> tuple[list[int], torch.Tensor]:
    """
    The indices of the images that can be read and have a caption, and their embeddings `(N, D)`, by all processes
    together.

    Args:
        whole_image_box: embed every image as the region that covers it, through h4.
        read: what returns the image of an index; by default that of `dataset.read`, which needs a caption.

    Raises:
        BadDataError: if none can be read.
    """
    read = read or (lambda index: dataset.read(index)["image"])
    found: list[int] = []
    embeds = [torch.zeros(0, model.config.projection_dim)]
    faults: list[str] = []
    for batch in readable_batches(dataset, read, batch_size, faults):
        found += [index for index, _ in batch]
        embeds.append(embed_images(model, processor, [image for _, image in batch], whole_image_box))
    found, rows = gather_readable(found, faults, dataset), torch.cat(gather_parts(embeds))
    check_finite(rows, [f"image {i}" for i in found])
    return found, rows


def embed_all_texts(
    model: MMGEMModel, processor: MMGEMProcessor, texts: Sequence[str], batch_size: int, max_length: int | None = None
) -> torch.Tensor:
    """As [`embed_texts`], by all processes together."""
    share = shard_range(len(texts))
    own = embed_texts(model, processor, texts[share.start : share.stop], batch_size, max_length)
    embeds = torch.cat(gather_parts([own]))
    check_finite(embeds, texts)
    return embeds


def embed_pairs(
    model: MMGEMModel, processor: MMGEMProcessor, dataset: PairDataset, batch_size: int, whole_image_box: bool = False
) -> dict[str, Any]:
    """
    `image_embeds` of the images that can be read (`indices`), `text_embeds` of their captions, and `text_to_image`,
    the index of each text's image among them.
    """
    indices, images = embed_dataset(model, processor, dataset, batch_size, whole_image_box)
    readable = dataset.select(indices).captions()
    texts = [caption for captions in readable for caption in captions]
    truncated = sum(len(row) > processor.max_length for row in processor.sentence_ids(texts))
    if truncated and is_first_process():
        logger.warning(f"{truncated} of {len(texts)} captions are truncated to max_length={processor.max_length}.")
    return {
        "indices": indices,
        "image_embeds": images,
        "text_embeds": embed_all_texts(model, processor, texts, batch_size),
        "text_to_image": torch.tensor([i for i, captions in enumerate(readable) for _ in captions]),
    }
