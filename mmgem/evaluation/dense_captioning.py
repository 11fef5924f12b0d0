"""Dense captioning: boxes and their captions found together (Johnson et al., 2016)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .captioning import meteor_exact
from .retrieval import TIE


IOU_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
LANGUAGE_THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)
MERGE_IOU = 0.7  # boxes of the reference that overlap this much are one, with several phrases


def dense_captioning_map(
    predictions: Sequence[Sequence[dict[str, Any]]], references: Sequence[Sequence[dict[str, Any]]]
) -> dict[str, float]:
    """
    Mean average precision over 5 thresholds of IoU and 6 of language, as DenseCap measures it. A prediction is matched
    to the reference box that it overlaps most; if several are, the one with the highest score takes the box. It is
    right if its IoU reaches one threshold and its language score exceeds the other (at 0, something must match).
    Predictions with equal scores (within 1e-6) are ranked together, and the worst of them takes the box.

    The language score is METEOR's exact part ([`meteor_exact`]), as METEOR needs Java and a thesaurus. It is lower,
    because synonyms do not count: compare the results with each other, not with published ones.

    Args:
        predictions: per image `{"box": [x0, y0, x1, y1], "caption", "score"}`, the score being the confidence.
        references: per image `{"box", "phrase"}`.

    Returns:
        `dense_captioning_map`, and `dense_captioning_ap_iou_{threshold}`, the mean over the thresholds of language.

    Raises:
        ValueError: for lists of different length, no reference at all, a score that is not finite, or a box without
            area.
    """
    if len(predictions) != len(references):
        raise ValueError(f"There are predictions for {len(predictions)} images, references for {len(references)}.")
    for kind, images in {"prediction": predictions, "reference": references}.items():
        for image, regions in enumerate(images):
            for box in (region["box"] for region in regions):
                if not np.isfinite(box).all() or box[2] <= box[0] or box[3] <= box[1]:
                    raise ValueError(f"A {kind} for image {image} has the box {list(box)}, which has no area.")
    merged = [_merged(regions) for regions in references]
    total = sum(map(len, merged))
    if not total:
        raise ValueError("There is no reference. Give at least one image a reference box.")
    candidates: list[tuple[int, float, float, tuple[int, int]]] = []
    for image, (found, targets) in enumerate(zip(predictions, merged)):
        for prediction in found:
            if not np.isfinite(prediction["score"]):
                raise ValueError(f"A prediction for image {image} has the score {prediction['score']}.")
            overlaps = [box_iou(prediction["box"], box) for box, _ in targets]
            overlap, language, target = max(overlaps, default=0.0), 0.0, -1
            if overlap > 0:
                target = overlaps.index(overlap)
                language = meteor_exact(prediction["caption"], targets[target][1])
            candidates.append((prediction["score"], overlap, language, (image, target)))
    ranks = _ranks([score for score, *_ in candidates])
    ranked = [(rank, *candidate[1:]) for rank, candidate in zip(ranks, candidates)]
    ranked.sort(key=lambda item: (item[0], item[2], item[1]))
    metrics = {}
    for iou in IOU_THRESHOLDS:
        precisions = [_average_precision(ranked, iou, language, total) for language in LANGUAGE_THRESHOLDS]
        metrics[f"dense_captioning_ap_iou_{iou}"] = float(np.mean(precisions))
    return {"dense_captioning_map": float(np.mean(list(metrics.values()))), **metrics}


def _ranks(scores: Sequence[float]) -> list[int]:
    """Ranks by descending score, from 0; scores within 1e-6 of the next share a rank."""
    order = np.argsort(scores)[::-1]
    falls = -np.diff(np.asarray(scores, dtype=np.float64)[order]) > TIE
    ranks = np.zeros(len(scores), dtype=int)
    ranks[order] = np.concatenate([[0], np.cumsum(falls)])[: len(scores)]
    return ranks.tolist()


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two `[x0, y0, x1, y1]`."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)


def _merged(references: Sequence[dict[str, Any]]) -> list[tuple[list[float], list[str]]]:
    """Merges overlapping boxes into their mean, those around the box with the most neighbours first."""
    boxes = [list(map(float, reference["box"])) for reference in references]
    near = [[i == j or box_iou(a, b) >= MERGE_IOU for j, b in enumerate(boxes)] for i, a in enumerate(boxes)]
    left = list(range(len(boxes)))
    merged = []
    while left:
        group = max(([j for j in left if near[i][j]] for i in left), key=len)
        merged.append((np.mean([boxes[j] for j in group], 0).tolist(), [references[j]["phrase"] for j in group]))
        left = [i for i in left if i not in group]
    return merged


def _average_precision(
    ranked: Sequence[tuple[int, float, float, tuple[int, int]]], iou: float, language: float, total: int
) -> float:
    """Mean of the highest precision at each of 101 recalls; candidates are `(rank, overlap, language, target)`."""
    if not ranked:
        return 0.0
    taken = set()
    right = []
    for _, overlap, score, target in ranked:
        right.append(overlap >= iou and score > language and target not in taken)
        if overlap > 0:
            taken.add(target)
    is_last = np.append(np.diff([rank for rank, *_ in ranked]) != 0, True)
    hits = np.cumsum(right)[is_last]
    recall, precision = hits / total, hits / (np.flatnonzero(is_last) + 1)
    best_from = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
    return float(np.append(best_from, 0.0)[np.minimum(places, len(best_from))].mean())
