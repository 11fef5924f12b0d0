"""Retrieval by a text with an image, beside the mean of the two plain embeddings."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw

from ..data.triplets import Item, TripletDataset
from ..modeling_mmgem import MMGEMModel
from ..processing import MMGEMProcessor
from .embedding import (
    embed_averaged,
    embed_mixed,
    evaluating,
    gather_readable,
    readable_batches,
)
from .report import BLACK, CELL, GREEN, Section, empty_sheet, evenly_spaced, paste, table, write_text
from .retrieval import best_ranks, check_finite
from .sharing import gather_parts


SHOWN, NEAREST = 8, 5  # queries in the report, and candidates of each


def evaluate_fused(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: TripletDataset,
    batch_size: int = 64,
    ks: Sequence[int] = (1, 5, 10),
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    R@k of each query among all distinct targets and negatives, without the query's own image alone (the protocol of
    CIRR, Liu et al., 2021). Every target of a query that occurs several times is right. If there are several
    processes, all must call it; each does its share, and gets the whole.

    Args:
        model: with the adapter of fused queries active.

    Returns:
        the metrics: `fused_R@k`, and `stage_1_fused_R@k` of the normalised mean of the plain embeddings of both parts;
        and outputs: `indices` of the examples that were used, example and side of each of the `candidates`, and of
        some queries, by their place in `indices`, the `nearest` candidates.

    Raises:
        BadDataError: if no example can be used.
    """
    with evaluating(model):
        found = embed_triplets(model, processor, dataset, batch_size)
    queries = [record for record in found.records if record.side == "query"]
    candidates = list({r.id: r for r in reversed(found.records) if r.side != "query"}.values())[::-1]
    items = found.embeds[[record.row for record in candidates]]
    column = {record.id: place for place, record in enumerate(candidates)}
    targets = {record.example: column[record.id] for record in found.records if record.side == "target"}
    answers: dict[int, set[int]] = {}  # columns, by the id of the query
    for query in queries:
        answers.setdefault(query.id, set()).add(targets[query.example])
    right = torch.tensor([(i, place) for i, query in enumerate(queries) for place in sorted(answers[query.id])])
    alone = {r.image_id: place for place, r in enumerate(candidates) if r.image_id and not r.has_words}
    own_images = [(i, alone[query.image_id]) for i, query in enumerate(queries) if query.image_id in alone]
    left_out = torch.tensor(own_images, dtype=torch.long).view(-1, 2)
    ways = {"stage_1_fused": found.averaged, "fused": found.embeds[[query.row for query in queries]]}
    metrics = {}
    for way, embeds in ways.items():
        ranks = best_ranks(embeds, items, right, left_out=left_out)
        metrics.update({f"{way}_R@{k}": (ranks <= k).double().mean().item() for k in ks if k <= len(items)})
    shown = {}
    for row in evenly_spaced(SHOWN, len(queries)):
        similarities = items @ ways["fused"][row]
        similarities[left_out[left_out[:, 0] == row, 1]] = -torch.inf
        shown[row] = similarities.topk(min(NEAREST, len(items))).indices.tolist()
    places = [(record.example, record.side) for record in candidates]
    return metrics, {"indices": [query.example for query in queries], "candidates": places, "nearest": shown}


class _Record(NamedTuple):
    """An item of the data: its example and side, what [`Item`] says of it, and the row of its embedding."""

    example: int
    side: str
    id: int
    image_id: int
    has_words: bool
    row: int


class _Embedded(NamedTuple):
    records: list[_Record]
    embeds: torch.Tensor
    averaged: torch.Tensor  # of the queries alone


def embed_triplets(
    model: MMGEMModel, processor: MMGEMProcessor, dataset: TripletDataset, batch_size: int
) -> _Embedded:
    """All items of the examples that can be used, by all processes together."""
    faults: list[str] = []
    found: list[tuple[int, str, Item]] = []
    rows, averaged = [], []
    for batch in readable_batches(dataset, dataset.read, batch_size, faults):
        named = [(index, side, item) for index, items in batch for side, item in items.items() if item is not None]
        items = [item for _, _, item in named]
        rows.append(embed_mixed(model, processor, [item.image for item in items], [item.text for item in items]))
        queries = [item for _, side, item in named if side == "query"]
        averaged.append(embed_averaged(model, processor, [q.image for q in queries], [q.text for q in queries]))
        found += [(index, side, item._replace(image=None)) for index, side, item in named]
    found = gather_readable(found, faults, dataset)
    embeds = torch.cat(gather_parts(rows))
    check_finite(embeds, [f"the {side} of example {index}" for index, side, _ in found])
    records = [_Record(i, side, *item[2:], row) for row, (i, side, item) in enumerate(found)]
    return _Embedded(records, embeds, torch.cat(gather_parts(averaged)))


def fused_section(metrics: dict[str, float], outputs: dict[str, Any], dataset: TripletDataset) -> Section:
    """A table of the metrics, and `fused.png`; metrics and outputs are those of [`evaluate_fused`]."""
    legend = "A query, and the five nearest candidates; green is its target. Stage 1: the mean of its two embeddings."
    images = {"fused.png": fused_sheet(dataset, outputs)}
    return Section("Fused retrieval", metrics, [*table(metrics), "", legend], images)


def fused_sheet(dataset: TripletDataset, outputs: dict[str, Any]) -> Image.Image:
    """Queries with their nearest candidates, the target in green; candidates without an image show their text."""
    step = CELL + 12
    sheet, corners = empty_sheet(len(outputs["nearest"]), 1, step * (NEAREST + 2), step)
    draw = ImageDraw.Draw(sheet)
    for (row, nearest), (left, top) in zip(outputs["nearest"].items(), corners):
        example = dataset.read(outputs["indices"][row])
        places = [outputs["candidates"][place] for place in nearest]
        shown = [example["query"], *(dataset.read(index)[side] for index, side in places)]
        write_text(sheet, example["query"].text, left, top + 20, BLACK, 26, 9)
        for item in shown:
            left += step
            if item.id == example["target"].id:
                draw.rectangle((left - 5, top - 5, left + CELL + 4, top + CELL + 4), fill=GREEN)
            if item.image is None:
                write_text(sheet, item.text, left, top + 20, BLACK, 26, 9)
            else:
                paste(sheet, item.image, left, top)
    return sheet
