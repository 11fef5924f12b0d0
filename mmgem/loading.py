"""MM-GEM checkpoints, loaded whole or refused."""

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig
from safetensors import SafetensorError
from transformers.utils.peft_utils import find_adapter_config_file

from .modeling_mmgem import MMGEMModel
from .modeling_mmgem.adapters_mmgem import adapter_stage
from .processing import MMGEMProcessor


def load_checkpoint(name: str, **options: Any) -> MMGEMModel:
    """
    [`MMGEMModel.from_pretrained`], for checkpoints that hold the model's weights and no others.

    Args:
        name: folder or Hub id.
        **options: of `from_pretrained`.

    Raises:
        ValueError: naming the first weight that is missing, is not the model's, has another shape, or holds NaN or
            infinity; for a file that is damaged.
        OSError: for a checkpoint that is not there.
    """
    try:
        loaded: Any = MMGEMModel.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (
        SafetensorError,
        HFValidationError,
        RuntimeError,
        KeyError,
        TypeError,
    ) as error:  # what damaged files raise
        raise ValueError(f"{name} could not be loaded ({type(error).__name__}): {error}") from error
    model, info = loaded
    faults = {
        "has another shape than its config.json says": [str(key[0]) for key in info["mismatched_keys"]],
        "is no weight of the model that its config.json describes": info["unexpected_keys"],
    }
    for fault, keys in faults.items():
        if keys:
            raise ValueError(f"{name} is damaged: {min(keys)} {fault} ({len(keys)} such weights). Take another copy.")
    return model


def load_with_adapters(
    name: str, adapters: Sequence[str] = (), dtype: str = "float32"
) -> tuple[MMGEMModel, MMGEMProcessor]:
    """
    A checkpoint with its adapters, all of them active, in eval mode, and its processor.

    Args:
        name: folder or Hub id.
        adapters: folders or Hub ids.
        dtype: of the weights.

    Raises:
        OSError: for a checkpoint or adapter that cannot be loaded.
        ValueError: for a checkpoint with missing or NaN weights, an adapter of no stage, or two of the same stage.
    """
    if find_adapter_config_file(name) is not None:
        raise ValueError(f"{name} is an adapter; give it to --adapters, and its base to --model.")
    try:
        model = load_checkpoint(name, dtype=getattr(torch, dtype)).eval()
        processor = MMGEMProcessor.from_pretrained(name)
    except OSError as error:
        raise OSError(f"{name} is no checkpoint that can be loaded: {error}") from error
    stages: list[str] = []
    for adapter in adapters:
        config = PeftConfig.from_pretrained(adapter)
        stage = adapter_stage(getattr(config, "modules_to_save", None), config.auto_mapping)
        if stage is None or stage in stages:
            raise ValueError(f"{adapter} is {'no adapter of this model' if stage is None else f'a second {stage}'}.")
        model.load_adapter(adapter, adapter_name=stage)
        stages.append(stage)
    if stages:
        model.set_adapter(stages)
    processor.region_grid_size = model.region_grid_size
    return model, processor
