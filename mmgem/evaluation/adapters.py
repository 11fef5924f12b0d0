"""An adapter beside the stage 1 that it was trained on, evaluated."""

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
    "region-retrieval", also retrieval between whole images and their captions (with regions or without), once without
    a box (`whole_picture_…`, which no adapter changes) and once with the box that covers the image, through h4
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
            for kind in ("whole_picture_", "whole_box_"):
                with evaluating(model):
                    pairs = embed_pairs(model, processor, captioned, batch_size, kind == "whole_box_")
                ranks = retrieval_metrics(pairs["text_embeds"], pairs["image_embeds"], pairs["text_to_image"])
                metrics.update({f"{prefix}{kind}{key}": value for key, value in ranks.items() if "R@" in key})
    return metrics, outputs


@contextmanager
def stage_1(model: MMGEMModel, processor: MMGEMProcessor) -> Iterator[MMGEMProcessor]:
    """
    Switches off the adapters, if there are any, and yields a processor whose region prompts are stage 1's: one visual
    token and one [CAP], as for a whole image. Stage 1 was never trained on 64 [CAP] tokens.
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
    """Disables the adapters, if there are any."""
    loaded = getattr(model, "_hf_peft_config_loaded", False)
    if loaded:
        model.disable_adapters()
    try:
        yield
    finally:
        if loaded:
            model.enable_adapters()
