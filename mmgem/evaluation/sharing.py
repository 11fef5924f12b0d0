"""Several processes evaluate together: each does its part, and all get the whole."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist


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
    """The parts of all processes in one list, in the order of the processes. Every process must call this."""
    own = list(part)
    size = process()[1]
    if size == 1:
        return own
    parts: list[list[Any]] = [[] for _ in range(size)]
    dist.all_gather_object(parts, own)
    return [item for items in parts for item in items]


def gather_rows(part: torch.Tensor) -> torch.Tensor:
    """As [`gather_parts`], of tensors `(N, …)` on the CPU."""
    return torch.cat(gather_parts([part]))
