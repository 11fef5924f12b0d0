"""The adapters that are trained through PEFT: LoRA on the language model (Hu et al., 2021), and those of stage 2."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..modeling_mmgem import MMGEMModel
from ..modeling_mmgem.adapters_mmgem import FUSED_ADAPTER, REGION_ADAPTERS
from ..modeling_mmgem.loading_mmgem import weights_revision
from .arguments import MMGEMTrainingArguments
from .stages import PROJECTIONS


FUSED_RANK = 16  # of fused-retrieval's matrices by default


def lora_config(args: MMGEMTrainingArguments) -> LoraConfig | None:
    """Returns the configuration that `--lora_rank` and `--lora_alpha` are shorthand for; None without LoRA."""
    rank = args.lora_rank or (FUSED_RANK if args.stage == FUSED_ADAPTER else 0)
    return LoraConfig(r=rank, lora_alpha=2 * rank if args.lora_alpha is None else args.lora_alpha) if rank else None


def add_lora(model: MMGEMModel, config: LoraConfig) -> PeftModel:
    """
    Adds an adapter, which alone is trained and saved. Unless the configuration names others, it has low-rank matrices
    beside every linear map of the language model (`target_modules`), the projections (`modules_to_save`), and the rows
    of the new tokens [EMB] and [CAP] in the embedding (`trainable_token_indices`).

    `merge_and_unload` of the result gives a plain [`MMGEMModel`].
    """
    config = _beside_linear_maps(config, model)
    if config.modules_to_save is None:
        config.modules_to_save = list(PROJECTIONS)
    if config.trainable_token_indices is None:
        modules = model.language_model.named_modules()
        embeddings = next(name for name, module in modules if module is model.get_input_embeddings())
        config.trainable_token_indices = {embeddings: [model.config.emb_token_id, model.config.cap_token_id]}
    return get_peft_model(model, config)  # type: ignore[return-value]


def _beside_linear_maps(config: LoraConfig, model: MMGEMModel) -> LoraConfig:
    """A copy with matrices beside every linear map of the language model, unless `target_modules` says which."""
    config = copy.copy(config)
    if config.target_modules is None:
        modules = dict(model.language_model.named_modules())
        leaves = {name.split(".")[-1] for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
        config.target_modules = rf"language_model\..*\.({'|'.join(map(re.escape, sorted(leaves)))})"
        config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in modules.values())
    return config


@contextmanager
def held_in_bfloat16(model: nn.Module) -> Iterator[None]:
    """
    Stores frozen float32 weights in bfloat16 meanwhile, if they are numbers of bfloat16, as those of most published
    language models are. Autocast would convert them in every step.
    """
    held = []
    for parameter in model.parameters():
        if parameter.requires_grad or parameter.dtype != torch.float32:
            continue
        rounded = parameter.data.to(torch.bfloat16)
        if torch.equal(rounded.float(), parameter.data):
            parameter.data = rounded
            held.append(parameter)
    try:
        yield
    finally:
        for parameter in held:
            parameter.data = parameter.data.float()


def add_region_adapter(model: MMGEMModel, stage: str, grid_size: int) -> PeftModel:
    """
    Adds the adapter of a stage, which alone is trained and saved: h3 and [CAP_i] start as those of stage 1, h4 as the
    identity.

    Args:
        stage: "region-caption" or "region-retrieval".
        grid_size: k, of the prompts that the adapter is trained with.
    """
    config = LoraConfig(
        # PEFT requires `target_modules`; "dummy-target-modules" is its sentinel for none.
        target_modules="dummy-target-modules",
        modules_to_save=list(REGION_ADAPTERS[stage]),
        # With a task_type, PeftModel.save_pretrained keeps `auto_mapping` instead of writing its own.
        task_type="FEATURE_EXTRACTION",
        revision=base_revision(model),
        auto_mapping=_mapping(model, **({"region_grid_size": grid_size} if stage == "region-caption" else {})),
    )
    return get_peft_model(model, config)  # type: ignore[return-value]


def add_fused_adapter(model: MMGEMModel, config: LoraConfig) -> PeftModel:
    """
    Adds the adapter of fused queries, which alone is trained and saved, and is active in fused calls alone. Unless the
    configuration names others, its low-rank matrices stand beside every linear map of the language model.
    """
    config = _beside_linear_maps(config, model)
    config.task_type, config.revision = "FEATURE_EXTRACTION", base_revision(model)
    config.auto_mapping = _mapping(model, stage=FUSED_ADAPTER)
    adapted = get_peft_model(model, config)
    model.hold_back(adapted.active_adapter)
    return adapted  # type: ignore[return-value]


def _mapping(model: MMGEMModel, **entries: Any) -> dict[str, Any]:
    """PEFT's record of the base's class, and what the adapter says of itself."""
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__, **entries}


def base_revision(model: MMGEMModel) -> str | None:
    """Returns a digest of the weights of a base in a folder, or the commit of one on the Hub."""
    return weights_revision(model.name_or_path) or getattr(model.config, "_commit_hash", None)
