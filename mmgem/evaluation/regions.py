"""Regions: which phrase belongs to which box, what the model writes about a box, and where it sees a sentence."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers.utils import logging

from ..data.pairs import BadDataError
from ..data.regions import RegionDataset
from ..data.scenes import COLOURS, SHAPES, SIZES, ScenesDataset
from ..modeling_mmgem import MMGEMModel
from ..processing import MMGEMProcessor
from .captioning import cider_d, has_cider
from .dense_captioning import dense_captioning_map
from .embedding import check_finite, embed_texts, evaluating
from .retrieval import TIE, retrieval_metrics
from .sharing import gather_parts, gather_rows, own_part, process


logger = logging.get_logger(__name__)


def evaluate_regions(
    model: MMGEMModel, processor: MMGEMProcessor, dataset: RegionDataset, stage: str, batch_size: int = 64
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    What a stage is for, with whichever adapters are active. Images that cannot be read, and regions that the centre
    crop cuts away, are left out, which is logged.

    - "region-retrieval": R@k of each region's phrase among all distinct phrases and the other way round, where any
      region with that phrase is right (an item as near as the right one counts as nearer); and the pointing game
      (Zhang et al., 2016, but without their tolerance of 15 pixels, and over all regions, not by category): how often
      the patch most similar to a phrase (each of those within 1e-6 of it) lies, with its centre, in a box that it
      describes (is the one nearest to the box's centre, where it holds none), beside `pointing_game_chance`, the share
      of the image that they cover.
    - "region-caption": CIDEr-D of greedy captions, the share that equals the phrase exactly, and dense captioning's
      mean average precision for these boxes ([`dense_captioning_map`]; the boxes being given, only language counts),
      ranked by how near the model embeds its caption to the region; on scenes also how often size, colour and shape
      are named right.

    Where there are several processes, all must call it.

    Returns:
        the metrics, fractions except CIDEr, and what they come from, per region in the order of the dataset: `index`
        of the example and `box`, `phrase`, and `caption` with its `score`, or `hit`.
    """
    with evaluating(model):
        if stage == "region-caption":
            regions = caption_regions(model, processor, dataset, batch_size)
            metrics = region_caption_metrics(regions, isinstance(dataset.table, ScenesDataset))
        else:
            metrics, regions = _retrieve_regions(model, processor, dataset, batch_size)
    return metrics, {"regions": regions}


@torch.inference_mode()
def caption_regions(
    model: MMGEMModel, processor: MMGEMProcessor, dataset: RegionDataset, batch_size: int = 64, **generation: Any
) -> list[dict[str, Any]]:
    """
    `{"index", "box", "phrase", "caption", "score"}` of every region; greedy unless `generation` says otherwise. The
    score is the cosine of the caption's embedding with the region's (-1 for an empty caption).
    """
    options = {"do_sample": False, "max_new_tokens": processor.max_length, **generation}
    processor = copy.copy(processor)
    processor.region_grid_size = model.region_grid_size
    regions: list[dict[str, Any]] = []
    faults: list[str] = []
    for examples in _batches(dataset, processor, batch_size, faults):
        images, boxes = [e["image"] for e in examples], [e["boxes"] for e in examples]
        inputs = processor(images=images, boxes=boxes, task="region-caption", return_tensors="pt").to(model.device)
        ids = model.generate(**inputs, **options)
        captions = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
        embeds = embed_regions(model, processor, images, boxes)
        written = sorted({caption for caption in captions if caption})
        texts = dict(zip(written, embed_texts(model, processor, written, batch_size)))
        regions += [
            {**region, "caption": caption, "score": float(texts[caption] @ embed) if caption else -1.0}
            for region, caption, embed in zip(_regions(examples), captions, embeds, strict=True)
        ]
    regions = _gathered(regions, faults, dataset)
    check_finite(torch.tensor([[region["score"]] for region in regions]), _names(regions))
    return regions


@torch.inference_mode()
def embed_regions(
    model: MMGEMModel, processor: MMGEMProcessor, images: list[Any], boxes: list[list[list[float]]]
) -> torch.Tensor:
    """`(N, D)` of all boxes of all images, unit norm, float32, on the CPU."""
    inputs = processor(images=images, boxes=boxes, return_tensors="pt").to(model.device)
    return model.get_embedding(**inputs)[inputs["region_mask"]].float().cpu()


def region_caption_metrics(regions: list[dict[str, Any]], are_scenes: bool) -> dict[str, float]:
    """See [`evaluate_regions`]; `regions` as [`caption_regions`] returns them."""
    pairs = [(region["caption"], region["phrase"]) for region in regions]
    metrics = {
        "region_caption_exact": _share(caption == phrase for caption, phrase in pairs),
    }
    captions, phrases = [caption for caption, _ in pairs], [[phrase] for _, phrase in pairs]
    if has_cider(phrases, "a single region"):
        metrics["region_caption_cider"] = cider_d(captions, phrases)[0]
    if are_scenes:
        vocabulary = {"size": {*SIZES}, "colour": {*COLOURS}, "shape": {*SHAPES}}
        for name, words in vocabulary.items():
            named = ([set(text.split()) & words for text in pair] for pair in pairs)
            metrics[f"region_caption_{name}"] = _share(caption == phrase for caption, phrase in named)
    by_picture: dict[int, list[dict[str, Any]]] = {}
    for region in regions:
        by_picture.setdefault(region["index"], []).append(region)
    dense = dense_captioning_map(list(by_picture.values()), list(by_picture.values()))
    return {**metrics, "dense_captioning_map": dense["dense_captioning_map"]}


@torch.inference_mode()
def _retrieve_regions(
    model: MMGEMModel, processor: MMGEMProcessor, dataset: RegionDataset, batch_size: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    regions: list[dict[str, Any]] = []
    embeds = [torch.zeros(0, model.config.projection_dim)]
    texts: dict[str, torch.Tensor] = {}
    faults: list[str] = []
    for examples in _batches(dataset, processor, batch_size, faults):
        images, boxes = [e["image"] for e in examples], [e["boxes"] for e in examples]
        inputs = processor(images=images, boxes=boxes, return_tensors="pt").to(model.device)
        features: Any = model.get_image_features(**inputs)
        embeds.append(normalize(features.pooler_output[inputs["region_mask"]].float(), dim=-1).cpu())
        batch = _regions(examples)
        new = sorted({region["phrase"] for region in batch} - texts.keys())
        texts.update(zip(new, embed_texts(model, processor, new, batch_size)))
        queries = torch.stack([texts[region["phrase"]] for region in batch])
        owners = inputs["region_mask"].nonzero()[:, 0].cpu()
        patches = patch_embeddings(model, features.last_hidden_state).cpu()
        similarity = torch.stack([patches[owner] @ query for owner, query in zip(owners, queries)])
        right = _same_phrase(batch, patches_inside(model, inputs)[inputs["region_mask"]].cpu())
        is_highest = similarity >= similarity.amax(1, keepdim=True) - TIE
        hits = (right | ~is_highest).all(1)
        shares = right.float().mean(1).tolist()
        regions += [{**region, "hit": bool(hit), "share": share} for region, hit, share in zip(batch, hits, shares)]
    regions = _gathered(regions, faults, dataset)
    texts = dict(gather_parts(texts.items()))
    phrases = sorted(texts)
    region_embeds, phrase_embeds = gather_rows(torch.cat(embeds)), torch.stack([texts[p] for p in phrases])
    check_finite(region_embeds, _names(regions))
    check_finite(phrase_embeds, phrases)
    number = {phrase: i for i, phrase in enumerate(phrases)}
    of_region = torch.tensor([number[region["phrase"]] for region in regions])
    # A region has one right phrase, a phrase any number of right regions: as texts and images elsewhere.
    ranks = retrieval_metrics(region_embeds, phrase_embeds, of_region, ks=(1, 5))
    metrics = {
        name.replace("text_to_image", "region_to_phrase").replace("image_to_text", "phrase_to_region"): value
        for name, value in ranks.items()
    }
    metrics["pointing_game"] = _share(region["hit"] for region in regions)
    metrics["pointing_game_chance"] = sum(region.pop("share") for region in regions) / len(regions)
    return metrics, regions


def patch_embeddings(model: MMGEMModel, patch_features: torch.Tensor) -> torch.Tensor:
    """V `(B, P, C)` through h1 and h4, each patch a region of its own: unit norm, `(B, P, D)`, float32."""
    model.check_base_of(model.region_projection)
    return normalize(model.region_projection(model.visual_projection(patch_features)).float(), dim=-1)


def patches_inside(model: MMGEMModel, inputs: Any) -> torch.Tensor:
    """`(B, R, P)`: whether the centre of each patch lies in each box; a box that holds none has the nearest one."""
    size, (height, width) = model.pool_aggregator.patch_size, inputs["pixel_values"].shape[-2:]
    device = inputs["pixel_values"].device
    x, y = (size * (torch.arange(side // size, device=device) + 0.5) for side in (width, height))
    x0, y0, x1, y1 = inputs["boxes"][..., None].unbind(-2)

    def within(centres: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        # Behind the last whole patch there is none: the one before it is the nearest.
        index = (((start + end) / 2)[..., 0] / size).long().clamp(max=len(centres) - 1)
        nearest = torch.nn.functional.one_hot(index, len(centres)).bool()
        contained = (centres >= start) & (centres <= end)
        return torch.where(contained.any(-1, keepdim=True), contained, nearest)

    return (within(y, y0, y1)[..., None] & within(x, x0, x1)[..., None, :]).flatten(-2)


@torch.inference_mode()
def heat_map(model: MMGEMModel, processor: MMGEMProcessor, image: Any, sentence: str) -> torch.Tensor:
    """
    Where the model sees what a sentence says: its cosine similarity with every patch through h1 and h4, `(rows,
    columns)` float32, of the part of the image that the image processor keeps. Stage 1 has learned no more than the
    mean over all patches; "region-retrieval" has learned parts.
    """
    pixels = processor(images=[image], return_tensors="pt").to(model.device)["pixel_values"]
    features: Any = model.get_image_features(pixels)
    text = embed_texts(model, processor, [sentence])[0]
    similarity = patch_embeddings(model, features.last_hidden_state)[0].cpu() @ text
    return similarity.view(-1, pixels.shape[-1] // model.pool_aggregator.patch_size)


def _batches(
    dataset: RegionDataset, processor: MMGEMProcessor, batch_size: int, faults: list[str]
) -> Iterator[list[dict[str, Any]]]:
    """
    This process's examples that can be read, with their `index` and the regions that the centre crop keeps; what is
    left out is added to `faults`.
    """
    dataset = dataset.whole(processor.image_processor)
    batch = []
    for index in own_part(len(dataset)):
        try:
            example = {**dataset.read(index), "index": index}
        except BadDataError as error:
            faults.append(f"image {index} ({error})")
            continue
        if example["left_out"]:
            faults.append(f"{example['left_out']} regions of image {index}, of which nothing is to be seen")
        batch.append(example)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _gathered(regions: list[dict[str, Any]], faults: list[str], dataset: RegionDataset) -> list[dict[str, Any]]:
    """Those of all processes."""
    regions, faults = gather_parts(regions), gather_parts(faults)
    if not regions:
        raise BadDataError(f"None of the {len(dataset)} images to evaluate on has a region to be seen: {faults[0]}.")
    if faults and process()[0] == 0:
        logger.warning_once(f"{len(faults)} of {len(dataset)} images are left out, or regions of them: {faults[0]}.")
    return regions


def _regions(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"index": example["index"], "box": box, "phrase": phrase}
        for example in examples
        for box, phrase in zip(example["boxes"], example["phrases"])
    ]


def _names(regions: list[dict[str, Any]]) -> list[str]:
    return [f"region {region['box']} of image {region['index']}" for region in regions]


def _same_phrase(regions: list[dict[str, Any]], inside: torch.Tensor) -> torch.Tensor:
    """`(N, P)`: the union of the boxes of one image that share a phrase."""
    union: dict[tuple[int, str], torch.Tensor] = {}
    keys = [(region["index"], region["phrase"]) for region in regions]
    for key, patches in zip(keys, inside):
        union[key] = union[key] | patches if key in union else patches
    return torch.stack([union[key] for key in keys])


def _share(truths: Any) -> float:
    values = list(truths)
    return sum(values) / len(values)
