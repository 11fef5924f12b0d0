"""Retrieval by captions of a hundred words and more (the paper's L-DCI)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from ..data.pairs import PairDataset
from ..modeling_mmgem import MMGEMModel
from ..processing import MMGEMProcessor
from .arguments import MAX_LENGTHS
from .captioning import tokenize
from .embedding import embed_all_texts, embed_dataset, evaluating
from .retrieval import best_ranks, retrieval_metrics


BUCKETS = (0, 50, 100, 150, 200, 300, 10**9)  # words, from one to below the next


def evaluate_long_text(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    batch_size: int = 64,
    max_lengths: Sequence[int] = MAX_LENGTHS,
    whole_image_box: bool = False,
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    Retrieval with the captions of `dataset` truncated to each of `max_lengths` tokens.

    Args:
        whole_image_box: also evaluate every image as the region that covers it, through h4: the paper's path for long
            captions once "region-retrieval" is loaded.

    Returns:
        the metrics: `long_text_{max_length}_…` as of [`retrieval_metrics`], with `_whole_box` after the length for
        that path; `long_text_{max_length}_R@1_{words}_words`, text to image among all images, by the captions' number
        of words; `long_text_{max_length}_cut`, the share of captions that were truncated. And outputs: `indices` of
        the images that were used, and the number of `words` of each caption.
    """
    with evaluating(model):
        indices, plain = embed_dataset(model, processor, dataset, batch_size)
        dataset = dataset.select(indices)
        images = {"": plain}
        if whole_image_box:
            images["_whole_box"] = embed_dataset(model, processor, dataset, batch_size, whole_image_box=True)[1]
        of_images = dataset.captions()
        texts = [caption for captions in of_images for caption in captions]
        owners = torch.tensor([i for i, captions in enumerate(of_images) for _ in captions])
        words = torch.tensor([len(tokenize(text)) for text in texts])
        tokens = [len(row) for row in processor.sentence_ids(texts)]
        metrics: dict[str, float] = {}
        for length in max_lengths:
            embeds = embed_all_texts(model, processor, texts, batch_size, max_length=length)
            for path, image_embeds in images.items():
                ranks = retrieval_metrics(embeds, image_embeds, owners)
                metrics.update({f"long_text_{length}{path}_{name}": value for name, value in ranks.items()})
            metrics.update(_by_words(f"long_text_{length}_R@1", embeds, plain, owners, words))
            metrics[f"long_text_{length}_cut"] = sum(count > length for count in tokens) / len(tokens)
    return metrics, {"indices": indices, "words": words.tolist()}


def _by_words(
    name: str, texts: torch.Tensor, images: torch.Tensor, owners: torch.Tensor, words: torch.Tensor
) -> dict[str, float]:
    found = best_ranks(texts, images, torch.stack([torch.arange(len(owners)), owners], 1)) == 1
    metrics = {}
    for low, high in pairwise(BUCKETS):
        here = (words >= low) & (words < high)
        if here.any():
            label = f"{low}_to_{high - 1}" if high < BUCKETS[-1] else f"{low}_and_more"
            metrics[f"{name}_{label}_words"] = found[here].double().mean().item()
    return metrics
