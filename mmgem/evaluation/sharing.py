"""Several processes evaluate together: each does its share, and all get the whole."""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist


class OtherProcessFailed(RuntimeError):
    """Another process could not do its share."""


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first_process() -> bool:
    """Whether this is the process that writes and logs."""
    return rank_and_world_size()[0] == 0


def shard_range(count: int) -> range:
    """This process's share of `count` items: contiguous, and of the same size in each process up to one."""
    rank, world_size = rank_and_world_size()
    return range(rank * count // world_size, (rank + 1) * count // world_size)


def gather_parts(part: Iterable[Any]) -> list[Any]:
    """
    The items of all processes in one list, in the order of the ranks. Every process must call this.

    Raises:
        OtherProcessFailed: if another process called [`report_failure`] instead.
    """
    own = list(part)
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return own
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, own)
    for rank, other in enumerate(parts):
        if isinstance(other, OtherProcessFailed):
            raise OtherProcessFailed(f"process {rank}: {other}")
    return [item for items in parts for item in items]


def report_failure(error: Exception) -> None:
    """Replaces this process's next [`gather_parts`], so that the other processes fail too instead of waiting."""
    world_size = rank_and_world_size()[1]
    if world_size > 1 and not isinstance(error, OtherProcessFailed):
        dist.all_gather_object([None] * world_size, OtherProcessFailed(f"{type(error).__name__}: {error}"))
