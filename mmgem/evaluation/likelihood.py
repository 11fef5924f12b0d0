"""Likelihood beside cosine: what embeddings found, re-ordered by the language model that read both sides."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..data.pairs import BadDataError, PairDataset
from ..modeling_mmgem import MMGEMModel
from ..processing import MMGEMProcessor
from ..processing.tokenization_mmgem import as_sentence
from .arguments import LIKELIHOOD_WEIGHT
from .embedding import embed_texts, evaluating, readable_batches
from .retrieval import TIE, best_ranks, check_finite
from .sharing import gather_parts


def rerank(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    query: Any,
    candidates: Sequence[Any],
    weight: float = LIKELIHOOD_WEIGHT,
    alpha: float = 0.0,
) -> list[tuple[int, float]]:
    """
    Orders candidates by cosine / tau + `weight` (log P(text | image) - `alpha` log P(text)), each log P per token.

    Args:
        query: a text, if the candidates are images; an image, if they are texts. A string is always a text, so open
            images first.
        candidates: such as the best 50 by cosine.
        weight: of the likelihood; 0 orders by cosine alone.
        alpha: weight of the prior, see [`MMGEMModel.score`].

    Returns:
        the index and score of each candidate, best first.

    Raises:
        ValueError: for no candidates, or what the processor cannot read.
    """
    texts, images = ([query], candidates) if isinstance(query, str) else (candidates, [query])
    with evaluating(model), torch.inference_mode():
        inputs = processor(images=list(images), text=list(texts), task="score", return_tensors="pt")
        likelihoods = model.score(**inputs.to(model.device), alpha=alpha).cpu().flatten()
        pixels = {"pixel_values": inputs["pixel_values"]}
        cosines = model.get_embedding(**pixels).cpu() @ embed_texts(model, processor, texts).T
        scores = combined(model, cosines.flatten(), likelihoods, weight)
    check_finite(scores[:, None], [f"candidate {i}" for i in range(len(scores))], "scores")
    return [(i, float(scores[i])) for i in scores.argsort(descending=True, stable=True).tolist()]


def combined(model: MMGEMModel, cosines: torch.Tensor, likelihoods: torch.Tensor, weight: float) -> torch.Tensor:
    """cosine / tau + `weight` x likelihood, all of one shape, on the CPU, in float64."""
    return logit_scale_of(model) * cosines.double() + weight * likelihoods.double()


@torch.no_grad()
def logit_scale_of(model: MMGEMModel) -> float:
    """1 / tau."""
    return float(model.logit_scale.scale)


@torch.inference_mode()
def pair_likelihoods(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    texts: Sequence[str],
    pairs: torch.Tensor,
    batch_size: int,
    alpha: float = 0.0,
    read: Callable[[int], Any] | None = None,
) -> torch.Tensor:
    """
    `(P,)`: the [`MMGEMModel.score`] of each pair, by all processes together.

    Args:
        dataset: of images that can be read.
        texts: truncated to the processor's `max_length` without a warning.
        pairs (`torch.LongTensor` of shape `(P, 2)`): image and text; each image's prompt runs once for all its texts.
        read: what returns the image of an index; by default that of `dataset.read`, which needs a caption.

    Raises:
        BadDataError: for an image that could be read before and cannot now.
    """
    faults: list[str] = []
    read = read or (lambda index: dataset.read(index)["image"])
    order = pairs[:, 0].argsort(stable=True)
    sorted_images = pairs[order, 0].contiguous()
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in readable_batches(dataset, read, batch_size, faults):
        first, last = batch[0][0], batch[-1][0]
        begin, end = torch.searchsorted(sorted_images, torch.tensor([first, last + 1])).tolist()
        own = order[begin:end]
        if not len(own):
            continue
        needed, columns = pairs[own, 1].unique(return_inverse=True)
        images, own_texts = [image for _, image in batch], [texts[i] for i in needed.tolist()]
        inputs = processor(images=images, text=own_texts, truncation=True, task="score", return_tensors="pt")
        rows = torch.searchsorted(torch.tensor([index for index, _ in batch]), pairs[own, 0])
        wanted = torch.stack([rows, columns], 1)
        scores = model.score(**inputs.to(model.device), pairs=wanted, alpha=alpha).cpu()
        found.append((own, scores))
    if faults := gather_parts(faults):
        raise BadDataError(f"{len(faults)} images can no longer be read, such as {faults[0]}. Evaluate again.")
    scores = torch.full((len(pairs),), torch.nan)
    for own, values in gather_parts(found):
        scores[own] = values
    check_finite(scores[:, None], [texts[i] for i in pairs[:, 1].tolist()], "scores")
    return scores


def evaluate_reranked_retrieval(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    outputs: dict[str, Any],
    count: int,
    batch_size: int,
    weight: float = LIKELIHOOD_WEIGHT,
    alpha: float = 0.0,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """
    R@k both ways after the best `count` items by cosine are re-ordered by cosine and likelihood.

    Args:
        dataset: the images that can be read.
        outputs: of [`evaluate_retrieval`].
        weight, alpha: as of [`rerank`].

    Returns:
        `reranked_text_to_image_R@k` and `reranked_image_to_text_R@k`.
    """
    text_embeds, image_embeds, owners = (outputs[n] for n in ("text_embeds", "image_embeds", "text_to_image"))
    texts = [caption for captions in dataset.captions() for caption in captions]
    ways = {
        "text_to_image": (text_embeds, image_embeds, torch.stack([torch.arange(len(owners)), owners], 1)),
        "image_to_text": (image_embeds, text_embeds, torch.stack([owners, torch.arange(len(owners))], 1)),
    }
    best = {way: _nearest(queries, items, count) for way, (queries, items, _) in ways.items()}
    pairs = torch.cat([_as_pairs(best["text_to_image"]).flip(1), _as_pairs(best["image_to_text"])])
    unique, inverse = pairs.unique(dim=0, return_inverse=True)  # found from both sides
    with evaluating(model):
        likelihoods = pair_likelihoods(model, processor, dataset, texts, unique, batch_size, alpha)[inverse]
    metrics = {}
    for way, of_way in zip(ways, likelihoods.split([best[way].numel() for way in ways])):
        queries, items, right = ways[way]
        candidates = best[way]
        cosines = torch.stack([items[own] @ query for own, query in zip(candidates, queries)])
        scores = combined(model, cosines, of_way.view(cosines.shape), weight)
        tie = TIE * (logit_scale_of(model) + weight)
        ranks = reranked_ranks(scores, candidates, right, best_ranks(queries, items, right), tie)
        metrics.update({f"reranked_{way}_R@{k}": (ranks <= k).double().mean().item() for k in ks if k <= len(items)})
    return metrics


def evaluate_reranked_classification(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: PairDataset,
    outputs: dict[str, Any],
    templates: Sequence[str],
    count: int,
    batch_size: int,
    weight: float = LIKELIHOOD_WEIGHT,
    alpha: float = 0.0,
) -> dict[str, float]:
    """
    Top-1 after the best `count` classes by cosine are re-ordered by the mean likelihood of their sentences.

    Args:
        dataset: the images that were used.
        outputs: of [`evaluate_classification`].
        weight, alpha: as of [`rerank`].

    Returns:
        `likelihood_top1`, by likelihood alone, and `reranked_top1`, by cosine and likelihood.
    """
    names, cosines = outputs["class_names"], outputs["cosines"]
    sentences = [template.replace("{}", as_sentence(name)) for name in names for template in templates]
    candidates = cosines.topk(min(count, len(names))).indices
    pairs = _as_pairs(candidates)
    columns = pairs[:, 1:] * len(templates) + torch.arange(len(templates))
    pairs = torch.stack([pairs[:, :1].expand_as(columns), columns], -1).flatten(0, 1)
    with evaluating(model):
        found = pair_likelihoods(model, processor, dataset, sentences, pairs, batch_size, alpha, read=dataset.image)
    likelihoods = found.view(*candidates.shape, len(templates)).mean(-1)
    right = torch.stack([torch.arange(len(candidates)), outputs["labels"]], 1)
    lost = torch.full((len(candidates),), len(names))
    both = combined(model, cosines.gather(1, candidates), likelihoods, weight)
    ways = {"likelihood_top1": (likelihoods, TIE), "reranked_top1": (both, TIE * (logit_scale_of(model) + weight))}
    ranks = {name: reranked_ranks(of, candidates, right, lost, tie) for name, (of, tie) in ways.items()}
    return {name: (rank == 1).double().mean().item() for name, rank in ranks.items()}


def reranked_ranks(
    scores: torch.Tensor, candidates: torch.Tensor, right: torch.Tensor, ranks: torch.Tensor, tie: float = 0.0
) -> torch.Tensor:
    """
    `(Q,)`: the rank of each query's best right item once its candidates are ordered by `scores`, ties counting against
    it; where no candidate is right, its rank before.

    Args:
        scores (`(Q, K)`), candidates (`torch.LongTensor` of shape `(Q, K)`): the best K items.
        right (`torch.LongTensor` of shape `(M, 2)`): all right pairs of query and item.
        ranks (`torch.LongTensor` of shape `(Q,)`): before.
        tie: scores that differ by no more are equal.
    """
    size = int(candidates.max()) + 1
    right = right[right[:, 1] < size]
    is_right = torch.isin(
        _keys(torch.arange(len(candidates))[:, None], candidates, size), _keys(right[:, 0], right[:, 1], size)
    )
    best = scores.masked_fill(~is_right, -torch.inf).amax(1, keepdim=True)
    behind = 1 + ((scores >= best - tie) & ~is_right).sum(1)
    return torch.where(is_right.any(1), behind, ranks.clamp(min=candidates.shape[1] + 1))


def _keys(queries: torch.Tensor, items: torch.Tensor, size: int) -> torch.Tensor:
    return queries * size + items


def _nearest(queries: torch.Tensor, items: torch.Tensor, count: int, chunk_size: int = 2048) -> torch.Tensor:
    """`(Q, K)`: the items of highest cosine."""
    count = min(count, len(items))
    return torch.cat([(part @ items.T).topk(count).indices for part in queries.split(chunk_size)])


def _as_pairs(candidates: torch.Tensor) -> torch.Tensor:
    """`(Q * K, 2)`: query and item."""
    queries = torch.arange(len(candidates))[:, None].expand_as(candidates)
    return torch.stack([queries, candidates], -1).flatten(0, 1)
