"""Tensors of all processes, differentiably."""

from typing import Any

import torch
import torch.distributed as dist


class GatherWithGradient(torch.autograd.Function):
    """
    `(n, …)` on each of W processes to `(W * n, …)` on all of them, in the order of the ranks.

    Every process computes its own loss from the gathered rows; backward sums what all of them say about this
    process's rows (as `torch.distributed.nn.functional.all_gather` did, which torch has deprecated).
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, tensor.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        total = gradient.clone(memory_format=torch.contiguous_format)  # autograd's own buffer must stay
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather_ragged(tensor: torch.Tensor) -> list[torch.Tensor]:
    """`(n_i, …)` on each of W processes to the list of all W of them, with gradient; the n_i may differ."""
    size = torch.tensor([len(tensor)], device=tensor.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    longest = max(int(size) for size in sizes)
    padding = tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])
    gathered: Any = GatherWithGradient.apply(torch.cat([tensor, padding]))
    return [part[: int(size)] for part, size in zip(gathered.chunk(len(sizes)), sizes)]
