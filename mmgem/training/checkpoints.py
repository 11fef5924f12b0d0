"""Checkpoints: written atomically, found, and resumed with the settings that they were trained with."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..data.json_files import parse_json
from .arguments import MMGEMTrainingArguments


logger = logging.get_logger(__name__)

# The loss, the optimizer's state and the data order depend on these: with another value the run would be another one.
SETTINGS = (
    *("stage", "objective", "caption_loss_weight", "matryoshka_dims", "freeze", "lora_rank", "lora_alpha"),
    *("false_negative_margin", "hardest_negatives", "hardness_weight", "temperature"),
    *("distillation_prompt", "distillation_weight"),
    *("optim", "optim_args", "seed", "data_seed", "batch_sampler"),
    *("learning_rate", "projection_lr_multiplier", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
)
PATHS = ("init_from", "vision_model_name_or_path", "text_model_name_or_path", "teacher")


class CheckpointError(ValueError):
    """A checkpoint could not be found, resumed or written."""


class TrainingStopped(ValueError):
    """Training cannot go on; the message says why, and what to do."""


@contextmanager
def atomic_checkpoint(checkpoint: str) -> Iterator[None]:
    """
    Surrounds the writing of a checkpoint. Trainer writes `trainer_state.json` last, and [`find_checkpoint`] ignores a
    checkpoint without it.

    Raises:
        CheckpointError: where it cannot be written, as on a full disk, with the last complete one. What was written of
            it is removed.
    """
    folder = os.path.dirname(checkpoint)
    _date_to_the_present(folder)
    try:
        with suppress(FileNotFoundError):  # an earlier run may have left one in this folder
            os.remove(os.path.join(checkpoint, TRAINER_STATE_NAME))
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save has RuntimeError for a full disk
        if _is_whole(checkpoint):  # the failure came after writing
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        free = shutil.disk_usage(folder if os.path.isdir(folder) else ".").free / 2**20
        try:
            rest = f"{find_checkpoint(folder)} is whole: go on from there with --resume_from_checkpoint true"
        except CheckpointError:
            rest = "there is no earlier one"
        raise CheckpointError(
            f"{checkpoint} could not be written ({type(error).__name__}: {error}), with {free:.0f} MiB free on that "
            f"disk; {rest}. --save_total_limit keeps the last few only."
        ) from error


def find_checkpoint(folder: str) -> str:
    """
    Returns `folder` if it is a whole checkpoint, or the last whole one in it. One whose `trainer_state.json` is
    missing or incomplete was interrupted while it was written.

    Raises:
        CheckpointError: where there is none.
    """
    for checkpoint in (folder, *reversed(_checkpoints(folder))):
        if _is_whole(checkpoint):
            return checkpoint
    raise CheckpointError(
        f"{folder} holds no whole checkpoint (a checkpoint-N folder with {TRAINER_STATE_NAME}) to resume from; leave "
        "out --resume_from_checkpoint to start anew, or name another folder."
    )


def checkpoint_to_resume(resume_from_checkpoint: str | bool | None, output_dir: Any) -> str | None:
    """
    Returns the checkpoint that `--resume_from_checkpoint` means: a folder, or with True the last one of the run.

    Raises:
        CheckpointError: where there is none.
    """
    if not resume_from_checkpoint:
        return None
    return find_checkpoint(str(output_dir if resume_from_checkpoint is True else resume_from_checkpoint))


def _checkpoints(folder: str) -> list[str]:
    """Paths of the checkpoints in a folder, by their steps."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = [int(match[1]) for name in names if (match := re.fullmatch(r"checkpoint-(\d+)", name))]
    return [os.path.join(folder, f"checkpoint-{step}") for step in sorted(steps)]


def _date_to_the_present(folder: str) -> None:
    """
    Dates checkpoints from the future to the present. Trainer deletes the oldest by the time of modification: after the
    clock was set back, that would be the newest.
    """
    now = time.time()
    for checkpoint in _checkpoints(folder):
        if os.path.getmtime(checkpoint) > now:
            os.utime(checkpoint, (now, now))


def _is_whole(checkpoint: str) -> bool:
    try:
        with open(os.path.join(checkpoint, TRAINER_STATE_NAME), encoding="utf-8") as file:
            return isinstance(parse_json(file.read()), dict)
    except (OSError, ValueError):
        return False


class RunSettings(TrainerCallback, ExportableState):
    """Has Trainer write the settings of a run into the `trainer_state.json` of every checkpoint."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings

    def state(self) -> dict[str, Any]:
        return {"args": {"settings": self.settings}, "attributes": {}}


def run_settings(
    args: MMGEMTrainingArguments, model_settings: dict[str, Any], peft_config: LoraConfig | None
) -> dict[str, Any]:
    """
    Returns the settings that a resumed run must share with the run that wrote its checkpoint, as JSON holds them.

    Args:
        model_settings: names and values of what else shapes the model, such as [`ModelArguments`]. The attention is
            left out, since it may change.
        peft_config: of LoRA, which `args.lora_rank` and `args.lora_alpha` are shorthand for.
    """
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["optim"] = args.optim.lower()
    if peft_config is not None:
        settings |= {"lora_rank": peft_config.r, "lora_alpha": peft_config.lora_alpha}
        for name in ("target_modules", "modules_to_save"):
            value = getattr(peft_config, name)
            settings[name] = sorted(value) if isinstance(value, set | list) else value
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    settings["per_device_train_batch_size x gradient_accumulation_steps x processes"] = batch_size
    settings |= {name: _real_path(name, value) for name, value in model_settings.items()}
    settings.pop("attn_implementation", None)
    return json.loads(json.dumps(settings))


def _real_path(name: str, value: Any) -> Any:
    """Resolves a folder, however its path was written; Hub ids and other settings stay as they are."""
    return os.path.realpath(value) if name in PATHS and value is not None and os.path.isdir(value) else value


def check_settings(checkpoint: str, settings: dict[str, Any]) -> None:
    """
    Compares the settings of a run with those of the run that wrote the checkpoint. Warns if the checkpoint has none,
    as those of the first versions of mmgem.

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
