"""Several processes evaluate together: each does its part, and all get the whole."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


class OtherProcessFailed(RuntimeError):
    """Another process could not do its part."""


@dataclass
class _Failure:
    message: str


def process() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def own_part(count: int) -> range:
    """Which of `count` items this process does: as many in a row as the others, one more or less."""
    rank, size = process()
    return range(rank * count // size, (rank + 1) * count // size)


def gather_parts(part: Iterable[Any]) -> list[Any]:
    """
    The parts of all processes in one list, in the order of the processes. Every process must call this.

    Raises:
        OtherProcessFailed: where another process called [`report_failure`] instead.
    """
    own = list(part)
    size = process()[1]
    if size == 1:
        return own
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, own)
    for rank, other in enumerate(parts):
        if isinstance(other, _Failure):
            raise OtherProcessFailed(f"process {rank}: {other.message}")
    return [item for items in parts for item in items]


def gather_rows(part: torch.Tensor) -> torch.Tensor:
    """As [`gather_parts`], of tensors `(N, …)` on the CPU."""
    return torch.cat(gather_parts([part]))


def report_failure(error: Exception) -> None:
    """Instead of the next [`gather_parts`], so that the other processes end there too and do not wait for this one."""
    size = process()[1]
    if size > 1 and not isinstance(error, OtherProcessFailed):
        dist.all_gather_object([None] * size, _Failure(f"{type(error).__name__}: {error}"))
