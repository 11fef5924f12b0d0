"""What a resumed run must have in common with the run that wrote its checkpoint."""

import json
import os
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .arguments import MMGEMTrainingArguments
from .checkpoints import CheckpointError


logger = logging.get_logger(__name__)

# The optimizer's state and the data order fix these: another value would have no effect, or skip other examples.
SETTINGS = (
    *("stage", "objective", "freeze", "lora_rank", "lora_alpha", "optim", "optim_args", "seed", "data_seed"),
    *("learning_rate", "projection_lr_multiplier", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
)


PATHS = ("init_from", "vision_model_name_or_path", "text_model_name_or_path")


class RunSettings(TrainerCallback, ExportableState):
    """Has Trainer write the settings of a run into the `trainer_state.json` of every checkpoint."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings

    def state(self) -> dict[str, Any]:
        return {"args": {"settings": self.settings}, "attributes": {}}


def run_settings(args: MMGEMTrainingArguments, model_settings: dict[str, Any]) -> dict[str, Any]:
    """
    What may not change between a checkpoint and the run that resumes from it, as JSON holds it.

    Args:
        model_settings: names and values of what else shapes the model, such as [`ModelArguments`]. How attention is
            computed is left out, since it may change.
    """
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["optim"] = (args.kept_optimizer or args.optim).lower()
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    settings["per_device_train_batch_size x gradient_accumulation_steps x processes"] = batch_size
    settings |= {name: _real_path(name, value) for name, value in model_settings.items()}
    settings.pop("attn_implementation", None)
    return json.loads(json.dumps(settings))


def _real_path(name: str, value: Any) -> Any:
    """A folder by one path, however it was written; Hub ids and other settings as they are."""
    return os.path.realpath(value) if name in PATHS and value is not None and os.path.isdir(value) else value


def check_settings(checkpoint: str, settings: dict[str, Any]) -> None:
    """
    Compares the settings of a run with those of the run that wrote the checkpoint. Warns if the checkpoint, of an
    earlier version of mmgem, has none.

    Raises:
        CheckpointError: naming the first setting that differs, with both values; for a checkpoint without an
            optimizer.
    """
    if not any("optimizer" in name for name in os.listdir(checkpoint)):
        raise CheckpointError(
            f"{checkpoint} holds no optimizer (--save_only_model): it cannot be resumed. Start a new run from its "
            "weights with --init_from."
        )
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    saved = state.stateful_callbacks.get(RunSettings.__name__)  # type: ignore[union-attr]
    if saved is None:
        logger.warning(
            f"{checkpoint} does not say which settings it was trained with. Make sure that this run has the same."
        )
        return
    saved = saved["args"]["settings"]
    for name, value in settings.items():
        if name in saved and _real_path(name, saved[name]) != value:
            raise CheckpointError(
                f"{checkpoint} was trained with {name} {saved[name]!r}, not {value!r}. Resume it with the "
                "same value, or start a new run without --resume_from_checkpoint."
            )
