"""Checkpoints that are whole or not there, and which of them to go on from."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME


class CheckpointError(ValueError):
    """There is no checkpoint to go on from, or not in this way; or none could be written."""


@contextmanager
def writing(checkpoint: str) -> Iterator[None]:
    """
    Around all that writes a checkpoint: until its `trainer_state.json` is there, which Trainer writes last, it is not
    whole for [`find_checkpoint`].

    Raises:
        CheckpointError: where it cannot be written, as on a full disk, with the last that is whole. What was written
            of it is removed.
    """
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
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = [int(match[1]) for name in names if (match := re.fullmatch(r"checkpoint-(\d+)", name))]
    for step in sorted(steps, reverse=True):
        checkpoint = os.path.join(folder, f"checkpoint-{step}")
        if _is_whole(checkpoint):
            return checkpoint
    raise CheckpointError(
        f"{folder} holds no whole checkpoint (a checkpoint-N folder with {TRAINER_STATE_NAME}) to resume from; leave "
        "out --resume_from_checkpoint to start anew, or name another folder."
    )


def _is_whole(checkpoint: str) -> bool:
    try:
        with open(os.path.join(checkpoint, TRAINER_STATE_NAME), encoding="utf-8") as file:
            return isinstance(json.load(file), dict)
    except (OSError, ValueError):
        return False
