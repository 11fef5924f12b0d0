"""Retrieval and captions of one model over a dataset of pairs."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..data.collator import MODEL_INPUTS, PairCollator
from ..data.pairs import PairDataset
from ..data.scenes import ScenesDataset, parse_objects
from ..modeling_mmgem import MMGEMModel
from ..processing import MMGEMProcessor
from .captioning import best_constant_caption, bleu, cider_d, has_cider, rouge_l
from .embedding import embed_pairs, evaluating
from .retrieval import retrieval_metrics
from .sharing import gather_parts, own_part


def evaluate_model(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    batch_size: int = 64,
    caption_samples: int = 0,
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    [`evaluate_retrieval`] and [`evaluate_captions`] in one. Images that cannot be read, or have no caption, are left
    out. Where there are several processes, all must call it; each does its part, and gets the whole.

    Returns:
        the metrics and the outputs of both.

    Raises:
        BadDataError: where no example can be read.
    """
    metrics, outputs = evaluate_retrieval(model, processor, dataset, batch_size)
    readable = dataset.select(outputs["indices"])
    of_captions, captions = evaluate_captions(model, processor, readable, batch_size, caption_samples)
    return {**metrics, **of_captions}, {**outputs, **captions}


def evaluate_retrieval(
    model: MMGEMModel, processor: MMGEMProcessor, dataset: PairDataset, batch_size: int = 64
) -> tuple[dict[str, float], dict[str, Any]]:
    """[`retrieval_metrics`] of all images and all their captions, and what [`embed_pairs`] gives."""
    with evaluating(model):
        outputs = embed_pairs(model, processor, dataset, batch_size)
    return retrieval_metrics(outputs["text_embeds"], outputs["image_embeds"], outputs["text_to_image"]), outputs


def evaluate_captions(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    batch_size: int = 64,
    caption_samples: int = 0,
    **generation: Any,
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    Held-out L_Gen over all captions, and the metrics of captions of the first `caption_samples` images (0: none),
    greedy unless `generation` says otherwise, which are among the outputs as `captions`. Every image must be
    readable: select those that are.
    """
    with evaluating(model):
        metrics = {"caption_loss": held_out_caption_loss(model, processor, dataset, batch_size)}
        if not caption_samples:
            return metrics, {}
        count = min(caption_samples, len(dataset))
        captions = generate_captions(model, processor, dataset, count, batch_size, **generation)
    return {**metrics, **caption_metrics(captions, dataset)}, {"captions": captions}


@torch.inference_mode()
def held_out_caption_loss(
    model: MMGEMModel, processor: MMGEMProcessor, dataset: PairDataset, batch_size: int
) -> float:
    """L_Gen in nats per token, EOS included, over all captions of the dataset."""
    collate = PairCollator(processor, "caption")
    sums = []
    for examples in _batches(dataset, own_part(len(dataset)), batch_size):
        pairs = [{**example, "caption": caption} for example in examples for caption in example["captions"]]
        for start in range(0, len(pairs), batch_size):
            batch = collate(pairs[start : start + batch_size])
            inputs = {name: batch[name].to(model.device) for name in MODEL_INPUTS if name in batch}
            loss = float(model(**inputs, num_items_in_batch=1, logits_to_keep=1).caption_loss)
            sums.append((loss, len(batch["label_positions"])))
    losses, tokens = zip(*gather_parts(sums))
    loss = sum(losses) / sum(tokens)
    if not math.isfinite(loss):
        raise ValueError(f"The held-out caption loss is {loss}: the model diverged, or its dtype is too small for it.")
    return loss


def generate_captions(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    count: int,
    batch_size: int,
    **generation: Any,
) -> list[str]:
    """Captions of the first `count` images; greedy unless `generation` says otherwise."""
    options = {"do_sample": False, "max_new_tokens": processor.max_length, **generation}
    captions: list[str] = []
    for examples in _batches(dataset, own_part(count), batch_size):
        inputs = processor(images=[e["image"] for e in examples], task="caption", return_tensors="pt")
        ids = model.generate(**inputs.to(model.device), **options)
        captions += [caption.strip() for caption in processor.batch_decode(ids, skip_special_tokens=True)]
    return gather_parts(captions)


def caption_metrics(captions: list[str], dataset: PairDataset) -> dict[str, float]:
    """
    CIDEr-D, BLEU-1 to 4, ROUGE-L, how many captions are distinct, how many empty, and object F1 on scenes.
    `caption_cider_shuffled`, these captions given to other images, and `caption_cider_constant`, the best caption
    for all, say what CIDEr is worth here; of a single image all three are left out.
    """
    references = dataset.captions()[: len(captions)]
    order, other = np.random.default_rng(0).permutation(len(captions)), np.empty(len(captions), dtype=int)
    other[order] = np.roll(order, 1)  # one ring, so that no image keeps its own
    metrics: dict[str, float] = {}
    if has_cider(references):
        metrics = {
            "caption_cider": cider_d(captions, references)[0],
            "caption_cider_shuffled": cider_d([captions[i] for i in other], references)[0],
            "caption_cider_constant": best_constant_caption(references)[1],
        }
    metrics |= {
        **{f"caption_bleu{n}": value for n, value in enumerate(bleu(captions, references), 1)},
        "caption_rouge_l": rouge_l(captions, references)[0],
        "caption_distinct": len(set(captions)) / len(captions),
        "caption_empty": sum(not caption for caption in captions) / len(captions),
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


def _batches(dataset: PairDataset, part: range, batch_size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(part), batch_size):
        yield [dataset[i] for i in part[start : start + batch_size]]
