"""Retrieval between texts and images: R@k and the median rank, both ways."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

NORM_TOLERANCE = 1e-2  # half precision included
TIE = 1e-6  # cosines that differ by less are equal, whatever order their products were summed in


def retrieval_metrics(
    text_embeds: torch.Tensor,
    image_embeds: torch.Tensor,
    text_to_image: torch.Tensor,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 2048,
) -> dict[str, float]:
    """
    The protocol of COCO and Flickr30k: a query's rank is that of its best right item among all wrong items. A wrong
    item as near as the right one counts as nearer, so that a constant embedding does not score.

    Args:
        text_embeds (`torch.Tensor` of shape `(T, D)`), image_embeds (`torch.Tensor` of shape `(N, D)`): unit norm.
        text_to_image (`torch.LongTensor` of shape `(T,)` or `(M, 2)`): the image that each text describes; or, if a
            text describes several, all right pairs of text and image.
        ks: ranks to report recall at; those larger than the number of items are left out.
        chunk_size: queries and items at a time. The similarities take its square of memory.

    Returns:
        `text_to_image_R@k` and `image_to_text_R@k` as fractions, `…_median_rank` from 1 on, rounded down.

    Raises:
        ValueError: for embeddings that are not finite (a NaN would rank first) or not of unit norm, or a text or image
            without a right partner.
    """
    texts, images = text_embeds.float(), image_embeds.to(text_embeds.device).float()
    for side, embeds in (("text", texts), ("image", images)):
        check_finite(embeds, [f"{side} {i}" for i in range(len(embeds))])
        norms = embeds.norm(dim=-1)
        wrong = ((norms - 1).abs() > NORM_TOLERANCE).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(embeds)} {side} embeddings are not of unit norm: number {wrong[0]} has "
                f"{norms[wrong[0]]:.4g}; divide each by its norm."
            )
    pairs = text_to_image.to(texts.device)
    if pairs.ndim == 1:
        if len(pairs) != len(texts):
            raise ValueError(f"text_to_image names an image for {len(pairs)} of {len(texts)} texts.")
        pairs = torch.stack([torch.arange(len(pairs), device=pairs.device), pairs], 1)
    for side, column, embeds in (("text", 0, texts), ("image", 1, images)):
        _check_named(side, pairs[:, column], len(embeds))
    metrics = {}
    ways = (("text_to_image", texts, images, pairs), ("image_to_text", images, texts, pairs.flip(1)))
    for direction, queries, items, right in ways:
        ranks = best_ranks(queries, items, right, chunk_size)
        for k in ks:
            if k > len(items):
                logger.warning_once(f"{direction}_R@{k} is left out: there are {len(items)} items to find.")
            else:
                metrics[f"{direction}_R@{k}"] = (ranks <= k).double().mean().item()
        metrics[f"{direction}_median_rank"] = float(np.floor(np.median(ranks.cpu().numpy())))
    return metrics


def best_ranks(
    queries: torch.Tensor,
    items: torch.Tensor,
    right: torch.Tensor,
    chunk_size: int = 2048,
    left_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    `(Q,)`: the rank, from 1 on, of each query's best right item among its wrong items.

    Args:
        queries (`(Q, D)`), items (`(N, D)`): unit norm, finite.
        right (`torch.LongTensor` of shape `(M, 2)`): all right pairs of query and item; each query has one.
        left_out (`torch.LongTensor` of shape `(L, 2)`, *optional*): pairs that are neither right nor wrong.
    """
    right = right[right[:, 0].argsort(stable=True)]
    ignored = right if left_out is None else torch.cat([right, left_out])
    ignored = ignored[ignored[:, 0].argsort(stable=True)]
    own = torch.cat([(queries[q] * items[i]).sum(-1) for q, i in (part.T for part in right.split(chunk_size))])
    best = own.new_full((len(queries),), -torch.inf).scatter_reduce(0, right[:, 0], own, "amax")
    ranks = torch.ones(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(queries), chunk_size):
        end = min(start + chunk_size, len(queries))
        first, last = torch.searchsorted(ignored[:, 0].contiguous(), torch.tensor([start, end], device=right.device))
        own_pairs = ignored[first:last]
        for begin in range(0, len(items), chunk_size):
            similarity = queries[start:end] @ items[begin : begin + chunk_size].T
            nearer = similarity >= best[start:end, None] - TIE
            here = own_pairs[(own_pairs[:, 1] >= begin) & (own_pairs[:, 1] < begin + chunk_size)]
            nearer[here[:, 0] - start, here[:, 1] - begin] = False
            ranks[start:end] += nearer.sum(1)
    return ranks


def check_finite(values: torch.Tensor, names: Sequence[str], kind: str = "embeddings") -> None:
    """Raises ValueError for rows of `values` `(N, …)` that hold NaN or infinity, with the name of the first."""
    bad = (~values.isfinite()).any(-1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(values)} {kind} hold NaN or infinity, the first that of {names[bad[0]]!r}; the model "
            "diverged, or its dtype is too small for it."
        )


def _check_named(side: str, numbers: torch.Tensor, size: int) -> None:
    unknown = numbers[(numbers < 0) | (numbers >= size)].tolist()
    counts = torch.bincount(numbers.clamp(0, size), minlength=size)
    if wrong := unknown or (counts == 0).nonzero().flatten().tolist():
        rule = f"text_to_image must name each of the {size} {side}s at least once and no other"
        raise ValueError(f"{rule}; {side} {wrong[0]} is wrong.")
