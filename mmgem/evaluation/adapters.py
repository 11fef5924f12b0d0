"""An adapter beside the stage 1 that it was trained on, judged."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from ..data.pairs import PairDataset
from ..data.regions import RegionDataset
from ..modeling_mmgem import MMGEMModel
from ..processing import MMGEMProcessor
from .embedding import embed_pairs, evaluating
from .regions import evaluate_regions
from .retrieval import retrieval_metrics


def evaluate_adapter(
    model: MMGEMModel, processor: MMGEMProcessor, dataset: RegionDataset, stage: str, batch_size: int = 64
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    The metrics of [`evaluate_regions`] for stage 1, under names that begin with `stage_1_`, and with the adapter. For
    "region-retrieval", also retrieval of the whole images that have captions by these (with regions or without),
    once without a box (`whole_picture_…`, which no adapter changes) and once with the box that covers the image,
    through h4 (`whole_box_…`; the paper's path for long captions).

    Args:
        model: with the adapter loaded, active, and no other.

    Returns:
        the metrics, and per region what [`evaluate_regions`] gives: `stage_1` and `stage_2`.
    """
    metrics: dict[str, float] = {}
    outputs: dict[str, Any] = {}
    whole = _captioned_pictures(dataset)
    for name in ("stage_1", "stage_2"):
        prefix = "stage_1_" if name == "stage_1" else ""
        with stage_1(model, processor) if prefix else nullcontext(processor) as own_processor:
            of_regions, found = evaluate_regions(model, own_processor, dataset, stage, batch_size)
            metrics.update({prefix + key: value for key, value in of_regions.items()})
            outputs[name] = found["regions"]
            if stage == "region-retrieval" and len(whole):
                for kind in ("whole_picture_", "whole_box_"):
                    with evaluating(model):
                        pairs = embed_pairs(model, processor, whole, batch_size, kind == "whole_box_")
                    ranks = retrieval_metrics(pairs["text_embeds"], pairs["image_embeds"], pairs["text_to_image"])
                    metrics.update({f"{prefix}{kind}{key}": value for key, value in ranks.items() if "R@" in key})
    return metrics, outputs


def _captioned_pictures(dataset: RegionDataset) -> PairDataset:
    whole = PairDataset(dataset.table, dataset.image_column, dataset.caption_column, root=dataset.root)
    whole.max_captions = dataset.max_captions
    whole.rows = [row for row, captions in zip(dataset.rows, dataset.captions()) if captions]
    return whole


@contextmanager
def stage_1(model: MMGEMModel, processor: MMGEMProcessor) -> Iterator[MMGEMProcessor]:
    """
    Switches adapters off for a while, where there are any, and gives a processor whose region prompts are stage 1's:
    one visual token and one [CAP], as of a whole image. It has never seen 64 of them, and would be worse than it is.
    """
    own_processor = copy.copy(processor)
    own_processor.num_soft_prompts = 1
    grid_size, model.config.region_grid_size = model.config.region_grid_size, 1
    try:
        with adapters_off(model):
            yield own_processor
    finally:
        model.config.region_grid_size = grid_size


@contextmanager
def adapters_off(model: MMGEMModel) -> Iterator[None]:
    """For a while, where there are any."""
    loaded = getattr(model, "_hf_peft_config_loaded", False)
    if loaded:
        model.disable_adapters()
    try:
        yield
    finally:
        if loaded:
            model.enable_adapters()


@contextmanager
def adapter_alone(model: MMGEMModel, stage: str, stages: list[str]) -> Iterator[None]:
    """For a while: of `stages`, which are active, another would have a say in the score of a caption."""
    model.set_adapter(stage)
    try:
        yield
    finally:
        model.set_adapter(stages)
