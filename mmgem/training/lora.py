"""Training the language model by LoRA (Hu et al., 2021), through PEFT."""

import os
import re

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..modeling_mmgem import MMGEMModel
from .stages import PROJECTIONS


def add_lora(model: MMGEMModel, rank: int, alpha: int | None = None) -> PeftModel:
    """
    The model with an adapter: low-rank matrices beside every linear map of the language model, the new tokens' rows
    ([EMB], [CAP]) of its embedding, and the projections. These train and are saved; all else is frozen.

    Args:
        rank: of the matrices.
        alpha: they count alpha / rank times; twice the rank by default.

    `merge_and_unload` of what comes back gives a plain [`MMGEMModel`].
    """
    modules = dict(model.language_model.named_modules())
    leaves = {name.split(".")[-1] for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    embeddings = next(name for name, module in modules.items() if module is model.get_input_embeddings())
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=rf"language_model\..*\.({'|'.join(map(re.escape, sorted(leaves)))})",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in modules.values()),
        modules_to_save=list(PROJECTIONS),
        trainable_token_indices={embeddings: [model.config.emb_token_id, model.config.cap_token_id]},
    )
    return add_adapter(model, config)


def add_adapter(model: MMGEMModel, config: LoraConfig) -> PeftModel:
    """
    The model with a new adapter, whose configuration names a base that is a folder by its absolute path: from another
    working directory a relative one would be taken for a model on the Hub, which anyone could put there.
    """
    peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    if os.path.isdir(config.base_model_name_or_path or ""):
        config.base_model_name_or_path = os.path.abspath(str(config.base_model_name_or_path))
    return peft_model
