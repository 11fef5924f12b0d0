"""Embeddings of any list of texts, images and both."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils import logging

from ..evaluation.embedding import embed_averaged, embed_mixed, evaluating
from ..modeling_mmgem import MMGEMModel
from ..processing import MMGEMProcessor
from ..processing.images_mmgem import read_image
from .sources import IMAGE_EXTENSIONS


URLS = ("http://", "https://")


def encode(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    inputs: Sequence[Any],
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> torch.Tensor:
    """
    Embeds texts, images, and texts with images.

    Args:
        inputs: each a text, a PIL image, a path or URL of an image, or a list of an image and a text, which is
            embedded by the adapter fused-retrieval, or as the mean of both where the model has none. A string is a
            path if it ends like one (`.jpg`, `.png`, …) and holds no line break; a `pathlib.Path` always is.

    Returns:
        `(N, D)`, unit norm, float32, on the CPU.

    Raises:
        FileNotFoundError: for a path without a file.
        ValueError: for an empty text, for what is neither a text nor an image, and for an image that cannot be read.
    """
    embeds = torch.empty(len(inputs), model.config.projection_dim)
    starts = range(0, len(inputs), batch_size)
    with evaluating(model), torch.inference_mode():
        for start in logging.tqdm(starts, unit=" batches", disable=not show_progress_bar):
            pairs = [_parts(value, start + i) for i, value in enumerate(inputs[start : start + batch_size])]
            embeds[start : start + batch_size] = embed_any(model, processor, *zip(*pairs))
    return embeds


def embed_any(
    model: MMGEMModel, processor: MMGEMProcessor, images: Sequence[Any], texts: Sequence[str]
) -> torch.Tensor:
    """
    `(N, D)` of images (or None) with texts (or ""): by the adapter of fused queries where both are there, and without
    that adapter as the mean of both.
    """
    embed = embed_averaged if model._fused_adapter is None else embed_mixed
    return embed(model, processor, images, texts)


def _parts(value: Any, place: int) -> tuple[Any, str]:
    """The image, or None, and the text, or "", of one input."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    texts = [part for part in values if isinstance(part, str) and not is_path(part)]
    images = [part for part in values if not (isinstance(part, str) and not is_path(part))]
    if len(texts) > 1 or len(images) > 1 or not values:
        raise ValueError(
            f"inputs[{place}] holds {len(images)} images and {len(texts)} texts; pass one of each at most."
        )
    if texts and not texts[0].strip():
        raise ValueError(f"inputs[{place}] is an empty text.")
    path = images[0] if images and isinstance(images[0], str | os.PathLike) else None
    if path is not None and not str(path).strip().startswith(URLS) and not os.path.isfile(path):
        raise FileNotFoundError(f"inputs[{place}]: there is no image {path}.")
    try:
        return (read_image(images[0]) if images else None), "".join(texts)
    except (ValueError, OSError) as error:
        raise ValueError(f"inputs[{place}] is no image that can be read: {error}") from error


def is_path(text: str) -> bool:
    """Whether a string names an image instead of saying something."""
    text = text.strip()
    return "\n" not in text and (text.lower().endswith(IMAGE_EXTENSIONS) or text.startswith(URLS))
