"""MM-GEM checkpoints, loaded whole or refused."""

from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import nn

from .modeling_mmgem import MMGEMModel


# Stage 1 does not train these: where a checkpoint has none, they start as the identity, and as copies of [CAP].
OPTIONAL_MODULES = ("region_projection", "soft_prompts")


def load_checkpoint(name: str, **options: Any) -> MMGEMModel:
    """
    [`MMGEMModel.from_pretrained`], for checkpoints that hold every weight of the model, each of them finite.

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
        "is missing": [key for key in info["missing_keys"] if key.split(".")[0] not in OPTIONAL_MODULES],
        "has another shape than its config.json says": [str(key[0]) for key in info["mismatched_keys"]],
        "is no weight of the model that its config.json describes": info["unexpected_keys"],
    }
    for fault, keys in faults.items():
        if keys:
            raise ValueError(f"{name} is damaged: {min(keys)} {fault} ({len(keys)} such weights). Take another copy.")
    refuse_not_finite(model, name)
    return model


@torch.no_grad()
def refuse_not_finite(module: nn.Module, name: str) -> None:
    """
    Raises:
        ValueError: naming the first weight of `module` that holds NaN or infinity; `name` is the checkpoint's.
    """
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(
                f"{name} is damaged: {key} holds NaN or infinity, as after a training that diverged. Take an earlier "
                "checkpoint."
            )
