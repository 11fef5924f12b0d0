"""MM-GEM checkpoints, loaded whole or refused."""

from typing import Any

from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

from .modeling_mmgem import MMGEMModel


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
