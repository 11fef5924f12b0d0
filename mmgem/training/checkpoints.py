"""Which checkpoint to go on from."""

import json
import os
import re

from transformers.trainer import TRAINER_STATE_NAME


class CheckpointError(ValueError):
    """There is no checkpoint to go on from, or not in this way."""


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
