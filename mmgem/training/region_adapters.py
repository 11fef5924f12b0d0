"""The adapters of stage 2, to be trained."""

import torch
from peft import LoraConfig, PeftModel

from ..modeling_mmgem import MMGEMModel
from ..modeling_mmgem.adapters_mmgem import REGION_ADAPTERS
from .lora import add_adapter


def add_region_adapter(model: MMGEMModel, stage: str, grid_size: int) -> PeftModel:
    """
    The model with the new adapter of a stage, which alone trains and is saved: h3 and [CAP_i] start as those of stage
    1, h4 as the identity.

    Args:
        stage: "region-caption" or "region-retrieval".
        grid_size: k, of the prompts that the adapter is trained with.
    """
    modules = list(REGION_ADAPTERS[stage])
    # PEFT requires `target_modules`; "dummy-target-modules" is its sentinel for none.
    peft_model = add_adapter(model, LoraConfig(target_modules="dummy-target-modules", modules_to_save=modules))
    signature = model.base_signature()
    with torch.no_grad():
        for name in modules:
            buffers = dict(getattr(model, name).modules_to_save["default"].named_buffers())
            if "trained_on" in buffers and signature is not None:
                buffers["trained_on"].copy_(signature)
            if "grid_size" in buffers:
                buffers["grid_size"].fill_(grid_size)
    return peft_model
