"""Embeds, captions and scores a dataset of pairs with one model."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..data.collator import PairCollator
from ..data.pairs import BadDataError, PairDataset
from ..data.scenes import ScenesDataset, parse_objects
from ..modeling_mmgem import MMGEMModel
from ..processing import MMGEMProcessor
from .captioning import best_constant_caption, bleu, cider_d
from .retrieval import retrieval_metrics


def evaluate_model(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    batch_size: int = 64,
    caption_samples: int = 0,
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    Retrieval over the whole dataset, held-out L_Gen over all captions, and metrics of generated captions. Pictures
    that cannot be read, or have no caption, are left out.

    Args:
        caption_samples: how many pictures to caption (greedily), from the first on; 0 for none.

    Returns:
        the metrics, fractions except CIDEr and losses, and the outputs they were computed from: `image_embeds`
        `(N, D)`, `text_embeds` `(T, D)`, `text_to_image` `(T,)`, `indices` (the N examples that count) and `captions`
        (list of str).

    Raises:
        BadDataError: where no example can be read.
    """
    was_training = model.training
    model.eval()
    try:
        outputs: dict[str, Any] = embed_pairs(model, processor, dataset, batch_size)
        dataset = dataset.select(outputs["indices"])
        metrics = retrieval_metrics(outputs["text_embeds"], outputs["image_embeds"], outputs["text_to_image"])
        metrics["caption_loss"] = held_out_caption_loss(model, processor, dataset, batch_size)
        if caption_samples:
            count = min(caption_samples, len(dataset))
            outputs["captions"] = generate_captions(model, processor, dataset, count, batch_size)
            metrics.update(caption_metrics(outputs["captions"], dataset))
    finally:
        model.train(was_training)
    return metrics, outputs


@torch.inference_mode()
def embed_pairs(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    batch_size: int,
    whole_image_box: bool = False,
) -> dict[str, Any]:
    """
    Unit-norm embeddings of every picture that can be read (`indices`) and of its captions, on the CPU; `text_to_image`
    says which belong together. With `whole_image_box` a picture is the region that covers it, through h4.
    """
    indices: list[int] = []
    images = []
    for start in range(0, len(dataset), batch_size):
        pictures = []
        for i in range(start, min(start + batch_size, len(dataset))):
            with contextlib.suppress(BadDataError):
                pictures.append(dataset.read(i)["image"])
                indices.append(i)
        if pictures:
            boxes = [[[0, 0, *picture.size]] for picture in pictures] if whole_image_box else None
            inputs = processor(images=pictures, boxes=boxes, return_tensors="pt").to(model.device)
            images.append(model.get_embedding(**inputs).float().cpu().view(len(pictures), -1))
    if not indices:
        raise BadDataError(f"None of the {len(dataset)} examples to evaluate on could be read.")
    readable = dataset.select(indices).captions()
    captions = [(i, caption) for i, of_image in enumerate(readable) for caption in of_image]
    texts = []
    for start in range(0, len(captions), batch_size):
        batch = [caption for _, caption in captions[start : start + batch_size]]
        inputs = processor(text=batch, return_tensors="pt").to(model.device)
        texts.append(model.get_embedding(**inputs).float().cpu())
    return {
        "indices": indices,
        "text_embeds": torch.cat(texts),
        "image_embeds": torch.cat(images),
        "text_to_image": torch.tensor([i for i, _ in captions]),
    }


@torch.inference_mode()
def held_out_caption_loss(
    model: MMGEMModel, processor: MMGEMProcessor, dataset: PairDataset, batch_size: int
) -> float:
    """L_Gen in nats per token, EOS included, over all captions of the dataset."""
    collate = PairCollator(processor, "caption")
    total, tokens = 0.0, 0
    for examples in _batches(dataset, len(dataset), batch_size):
        pairs = [{**example, "caption": caption} for example in examples for caption in example["captions"]]
        for start in range(0, len(pairs), batch_size):
            batch = collate(pairs[start : start + batch_size])
            inputs = {name: batch[name].to(model.device) for name in batch if name not in ("bad", "truncated")}
            total += float(model(**inputs, num_items_in_batch=1).caption_loss)
            tokens += int((batch["labels"] != -100).sum())
    return total / tokens


def generate_captions(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    count: int,
    batch_size: int,
    **generation: Any,
) -> list[str]:
    """Captions of the first `count` pictures; greedy unless `generation` says otherwise."""
    options = {"do_sample": False, "max_new_tokens": processor.max_length, **generation}
    captions: list[str] = []
    for examples in _batches(dataset, count, batch_size):
        inputs = processor(images=[e["image"] for e in examples], task="caption", return_tensors="pt")
        ids = model.generate(**inputs.to(model.device), **options)
        captions += [caption.strip() for caption in processor.batch_decode(ids, skip_special_tokens=True)]
    return captions


def caption_metrics(captions: list[str], dataset: PairDataset) -> dict[str, float]:
    """
    CIDEr-D, BLEU-4, how many captions are distinct, and object F1 on scenes. `caption_cider_shuffled`, these captions
    given to other pictures, and `caption_cider_constant`, the best caption for all, say what CIDEr is worth here.
    """
    references = dataset.captions()[: len(captions)]
    order = np.random.default_rng(0).permutation(len(captions))
    metrics = {
        "caption_cider": cider_d(captions, references)[0],
        "caption_cider_shuffled": cider_d([captions[i] for i in order], references)[0],
        "caption_cider_constant": best_constant_caption(references)[1],
        "caption_bleu4": bleu(captions, references)[3],
        "caption_distinct": len(set(captions)) / len(captions),
    }
    if isinstance(dataset.table, ScenesDataset):
        metrics["caption_object_f1"] = object_f1(captions, [of_image[0] for of_image in references])
        exact = sum(caption == of_image[0] for caption, of_image in zip(captions, references))
        metrics["caption_exact"] = exact / len(captions)
    return metrics


def object_f1(captions: list[str], references: list[str]) -> float:
    """F1 of the (colour, shape) pairs named, counted over the whole set."""
    hits = named = present = 0
    for caption, reference in zip(captions, references):
        found, expected = parse_objects(caption), parse_objects(reference)
        hits += (found & expected).total()
        named += found.total()
        present += expected.total()
    return 2 * hits / max(named + present, 1)


def _batches(dataset: PairDataset, count: int, batch_size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, count, batch_size):
        yield [dataset[i] for i in range(start, min(start + batch_size, count))]
