"""Checkpoints that are whole or not there, and which of them to go on from."""

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

from ..data.json_files import parse_json


class CheckpointError(ValueError):
    """There is no checkpoint to go on from, or not in this way; or none could be written."""


class TrainingStopped(ValueError):
    """Training cannot go on, for a reason that the message names with what to do."""


@contextmanager
def writing(checkpoint: str) -> Iterator[None]:
    """
    Around all that writes a checkpoint: until its `trainer_state.json` is there, which Trainer writes last, it is not
    whole for [`find_checkpoint`].

    Raises:
        CheckpointError: where it cannot be written, as on a full disk, with the last that is whole. What was written
            of it is removed.
    """
    _date_earlier_ones(os.path.dirname(checkpoint))
    try:
        with suppress(FileNotFoundError):  # of an earlier run in this folder
            os.remove(os.path.join(checkpoint, TRAINER_STATE_NAME))
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save has RuntimeError for a full disk
        if _is_whole(checkpoint):  # what failed came after
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        folder = os.path.dirname(checkpoint)
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
    The checkpoint at `folder`, or the last whole one in it. Trainer writes `trainer_state.json` last, so a checkpoint
    without it, or with half of it, was cut off.

    Raises:
        CheckpointError: where there is none.
    """
    if _is_whole(folder):
        return folder
    for checkpoint in reversed(_checkpoints(folder)):
        if _is_whole(checkpoint):
            return checkpoint
    raise CheckpointError(
        f"{folder} holds no whole checkpoint (a checkpoint-N folder with {TRAINER_STATE_NAME}) to resume from; leave "
        "out --resume_from_checkpoint to start anew, or name another folder."
    )


def _checkpoints(folder: str) -> list[str]:
    """Paths of the checkpoints in a folder, by their steps."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = [int(match[1]) for name in names if (match := re.fullmatch(r"checkpoint-(\d+)", name))]
    return [os.path.join(folder, f"checkpoint-{step}") for step in sorted(steps)]


def _date_earlier_ones(folder: str) -> None:
    """
    Trainer deletes by the time of modification: where the clock was set back, the newest checkpoint would go, unless
    those from the future are dated to the present.
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
