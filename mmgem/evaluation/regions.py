"""Regions: retrieval of phrases and boxes, captions of boxes, heat maps; an adapter beside its stage 1."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ..data.pairs import PairDataset
from ..data.regions import RegionDataset
from ..modeling_mmgem import MMGEMModel
from ..modeling_mmgem.embedding_mmgem import unit_norm
from ..processing import MMGEMProcessor
from .captioning import cider_d, has_cider
from .classification import DEFAULT_TEMPLATES, class_embeddings, classification_metrics
from .dense_captioning import dense_captioning_map
from .embedding import (
    caption_cosines,
    caption_inputs,
    embed_pairs,
    embed_texts,
    evaluating,
    gather_readable,
    readable_batches,
)
from .retrieval import TIE, check_finite, retrieval_metrics
from .sharing import gather_parts


def evaluate_regions(
    model: MMGEMModel, processor: MMGEMProcessor, dataset: RegionDataset, stage: str, batch_size: int = 64
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    Evaluates what a stage is for, with whichever adapters are active. Images that cannot be read, and regions that the
    centre crop cuts away, are left out, which is logged.

    - "region-retrieval": R@k of each region's phrase among all distinct phrases and the other way round, where any
      region with that phrase is right (an item as near as the right one counts as nearer); and the pointing game
      (Zhang et al., 2016, but without their tolerance of 15 pixels, and over all regions, not by category): how often
      the patch most similar to a phrase (each of those within 1e-6 of it) lies, with its centre, in a box that it
      describes (is the one nearest to the box's centre, where it holds none), beside `pointing_game_chance`, the share
      of the image that they cover.
    - "region-caption": CIDEr-D of greedy captions, the share that equals the phrase exactly, and dense captioning's
      mean average precision for these boxes ([`dense_captioning_map`]; the boxes being given, only language counts),
      ranked by how near the model embeds its caption to the region; and the metrics that the dataset brings.

    If there are several processes, all must call it.

    Returns:
        the metrics, fractions except CIDEr, and what they come from, per region in the order of the dataset: `index`
        of the example and `box`, `phrase`, and `caption` with its `score`, or `hit`.
    """
    with evaluating(model):
        if stage == "region-caption":
            regions = caption_regions(model, processor, dataset, batch_size)
            metrics = region_caption_metrics(regions, dataset)
        else:
            metrics, regions = _retrieve_regions(model, processor, dataset, batch_size)
    return metrics, {"regions": regions}


def evaluate_adapter(
    model: MMGEMModel, processor: MMGEMProcessor, dataset: RegionDataset, stage: str, batch_size: int = 64
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    The metrics of [`evaluate_regions`] for stage 1, under names that begin with `stage_1_`, and with the adapter. For
    "region-retrieval", also retrieval between whole images and their captions (with regions or without), once without
    a box (`whole_image_…`, which no adapter changes) and once with the box that covers the image, through h4
    (`whole_box_…`; the paper's path for long captions).

    Args:
        model: with this adapter loaded and active, and no other.

    Returns:
        the metrics, and per region what [`evaluate_regions`] returns: `stage_1` and `stage_2`.
    """
    metrics: dict[str, float] = {}
    outputs: dict[str, Any] = {}
    captioned = PairDataset(dataset.table, dataset.image_column, dataset.caption_column, root=dataset.root)
    captioned.max_captions = dataset.max_captions
    captioned.rows = [row for row, captions in zip(dataset.rows, dataset.captions()) if captions]
    for name, prefix in (("stage_1", "stage_1_"), ("stage_2", "")):
        with stage_1(model, processor) if name == "stage_1" else nullcontext(processor) as own_processor:
            of_regions, found = evaluate_regions(model, own_processor, dataset, stage, batch_size)
            metrics.update({prefix + key: value for key, value in of_regions.items()})
            outputs[name] = found["regions"]
            if stage != "region-retrieval" or not len(captioned):
                continue
            for kind in ("whole_image_", "whole_box_"):
                with evaluating(model):
                    pairs = embed_pairs(model, processor, captioned, batch_size, kind == "whole_box_")
                ranks = retrieval_metrics(pairs["text_embeds"], pairs["image_embeds"], pairs["text_to_image"])
                metrics.update({f"{prefix}{kind}{key}": value for key, value in ranks.items() if "R@" in key})
    return metrics, outputs


@contextmanager
def stage_1(model: MMGEMModel, processor: MMGEMProcessor) -> Iterator[MMGEMProcessor]:
    """
    Switches off the adapters, if there are any, and yields a processor whose region prompts are stage 1's: as many
    visual tokens as a whole image has, and one [CAP]. Stage 1 was never trained on 64 [CAP] tokens.
    """
    own_processor = copy.copy(processor)
    own_processor.num_soft_prompts = 1
    grid_size, model.config.region_grid_size = model.config.region_grid_size, model.config.image_grid_size
    try:
        with adapters_off(model):
            yield own_processor
    finally:
        model.config.region_grid_size = grid_size


@contextmanager
def adapters_off(model: MMGEMModel) -> Iterator[None]:
    """Disables the adapters, if there are any."""
    loaded = getattr(model, "_hf_peft_config_loaded", False)
    if loaded:
        model.disable_adapters()
    try:
        yield
    finally:
        if loaded:
            model.enable_adapters()


@torch.inference_mode()
def caption_regions(
    model: MMGEMModel, processor: MMGEMProcessor, dataset: RegionDataset, batch_size: int = 64, **generation: Any
) -> list[dict[str, Any]]:
    """
    `{"index", "box", "phrase", "caption", "score"}` of every region; greedy unless `generation` says otherwise. The
    score is the cosine of the caption's embedding with the region's (-1 for an empty caption).
    """
    processor = copy.copy(processor)
    processor.region_grid_size = model.region_grid_size
    regions: list[dict[str, Any]] = []
    faults: list[str] = []
    for examples in _batches(dataset, processor, batch_size, faults):
        images, boxes = [e["image"] for e in examples], [e["boxes"] for e in examples]
        inputs = processor(images=images, boxes=boxes, task="region-caption", return_tensors="pt")
        captions = caption_inputs(model, processor, inputs, **generation)
        inputs = processor(images=images, boxes=boxes, return_tensors="pt").to(model.device)
        embeds = model.get_embedding(**inputs)[inputs["region_mask"]].float().cpu()
        scores = caption_cosines(model, processor, captions, list(embeds), batch_size)
        regions += [
            {**region, "caption": caption, "score": score}
            for region, caption, score in zip(_regions(examples), captions, scores, strict=True)
        ]
    regions = gather_readable(regions, faults, dataset, "images or regions of them")
    check_finite(torch.tensor([[region["score"]] for region in regions]), _names(regions))
    return regions


def region_caption_metrics(regions: list[dict[str, Any]], dataset: RegionDataset) -> dict[str, float]:
    """See [`evaluate_regions`]; `regions` as [`caption_regions`] returns them."""
    captions, phrases = [region["caption"] for region in regions], [region["phrase"] for region in regions]
    exact = sum(caption == phrase for caption, phrase in zip(captions, phrases))
    metrics = {"region_caption_exact": exact / len(regions)}
    references = [[phrase] for phrase in phrases]
    if has_cider(references, "a single region"):
        metrics["region_caption_cider"] = cider_d(captions, references)[0]
    if own_metrics := getattr(dataset.table, "region_caption_metrics", None):
        metrics.update(own_metrics(captions, phrases))
    by_image: dict[int, list[dict[str, Any]]] = {}
    for region in regions:
        by_image.setdefault(region["index"], []).append(region)
    dense = dense_captioning_map(list(by_image.values()), list(by_image.values()))
    return {**metrics, "dense_captioning_map": dense["dense_captioning_map"]}


@torch.inference_mode()
def classify_boxes(
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: RegionDataset,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch_size: int = 64,
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    Zero-shot classification of given boxes, with whichever adapters are active: `box_` and the figures of
    [`classification_metrics`], top-1 and the mean over classes among them. If there are several processes, all must
    call it.

    Args:
        dataset: whose phrases are names of classes, as those of COCO's and LVIS' instances.
        class_names: all classes; by default those of the dataset's boxes.
        templates: sentences with `{}` for the name, in which "_" becomes a space.

    Returns:
        the metrics, and the `class_names`.

    Raises:
        ValueError: for a phrase that is none of `class_names`.
    """
    regions: list[dict[str, Any]] = []
    embeds = [torch.zeros(0, model.config.projection_dim)]
    faults: list[str] = []
    with evaluating(model):
        for examples in _batches(dataset, processor, batch_size, faults):
            images, boxes = [e["image"] for e in examples], [e["boxes"] for e in examples]
            inputs = processor(images=images, boxes=boxes, return_tensors="pt").to(model.device)
            embeds.append(model.get_embedding(**inputs)[inputs["region_mask"]].float().cpu())
            regions += _regions(examples)
        regions = gather_readable(regions, faults, dataset, "images or regions of them")
        of_regions = torch.cat(gather_parts(embeds))
        check_finite(of_regions, _names(regions))
        names = list(dict.fromkeys(class_names or sorted({region["phrase"] for region in regions})))
        number = {name: i for i, name in enumerate(names)}
        if unknown := next((region["phrase"] for region in regions if region["phrase"] not in number), None):
            raise ValueError(f"A box is a {unknown!r}, which is none of the {len(names)} class_names.")
        spoken = [name.replace("_", " ") for name in names]
        classes = class_embeddings(model, processor, spoken, templates, batch_size)
    labels = torch.tensor([number[region["phrase"]] for region in regions])
    metrics = classification_metrics(of_regions @ classes.T, labels, tie=TIE)
    return {f"box_{name}": value for name, value in metrics.items()}, {"class_names": names, "regions": regions}


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
        encoded = model._encode_images(**inputs)
        embeds.append(unit_norm(model._image_embeds(encoded)[inputs["region_mask"]]).cpu())
        batch = _regions(examples)
        new = sorted({region["phrase"] for region in batch} - texts.keys())
        texts.update(zip(new, embed_texts(model, processor, new, batch_size)))
        queries = torch.stack([texts[region["phrase"]] for region in batch])
        owners = inputs["region_mask"].nonzero()[:, 0].cpu()
        patches = model._patch_embeds(encoded).cpu()
        similarity = torch.stack([patches[owner] @ query for owner, query in zip(owners, queries)])
        right = _same_phrase(batch, patches_inside(model, inputs)[inputs["region_mask"]].cpu())
        is_highest = similarity >= similarity.amax(1, keepdim=True) - TIE
        hits = (right | ~is_highest).all(1)
        shares = right.float().mean(1).tolist()
        regions += [{**region, "hit": bool(hit), "share": share} for region, hit, share in zip(batch, hits, shares)]
    regions = gather_readable(regions, faults, dataset, "images or regions of them")
    texts = dict(gather_parts(texts.items()))
    phrases = sorted(texts)
    region_embeds, phrase_embeds = torch.cat(gather_parts(embeds)), torch.stack([texts[p] for p in phrases])
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
    metrics["pointing_game"] = sum(region["hit"] for region in regions) / len(regions)
    metrics["pointing_game_chance"] = sum(region.pop("share") for region in regions) / len(regions)
    return metrics, regions


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
    text = embed_texts(model, processor, [sentence])[0]
    similarity = model.get_patch_embedding(pixels)[0].cpu() @ text
    return similarity.view(-1, pixels.shape[-1] // model.pool_aggregator.patch_size)


def _batches(
    dataset: RegionDataset, processor: MMGEMProcessor, batch_size: int, faults: list[str]
) -> Iterator[list[dict[str, Any]]]:
    """
    This process's examples that can be read, with their `index` and the regions that the centre crop keeps; what is
    left out is added to `faults`.
    """
    dataset = dataset.whole(processor.image_processor)

    def read(index: int) -> dict[str, Any]:
        example = dataset.read(index)
        if example["left_out"]:
            faults.append(
                f"{example['left_out']} regions of image {index}{dataset.name_of(index)}, outside of it or of the "
                "centre crop (--do_center_crop false keeps those)"
            )
        return {**example, "index": index}

    for batch in readable_batches(dataset, read, batch_size, faults):
        yield [example for _, example in batch]


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
