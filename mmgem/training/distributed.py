"""Tensors of all processes, differentiably, and FSDP2."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard

from ..modeling_mmgem import MMGEMModel


class GatherWithGradient(torch.autograd.Function):
    """
    Gathers `(n, …)` of each of W processes as `(W * n, …)` on all of them, in the order of the ranks.

    Every process computes its own loss from the gathered rows; backward sums the gradients that all of them have for
    this process's rows (as `torch.distributed.nn.functional.all_gather` did, which torch has deprecated).
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


def gather_rows(*tensors: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], int]:
    """`(n, …)` of all processes, as [`GatherWithGradient`], and the place of this process's first row."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensors, 0
    return tuple(map(GatherWithGradient.apply, tensors)), dist.get_rank() * len(tensors[0])


def gather_ragged(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Gathers `(n_i, …)` of each of W processes as a list of all W, with gradient; the n_i may differ."""
    size = torch.tensor([len(tensor)], device=tensor.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    longest = max(int(size) for size in sizes)
    padding = tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])
    gathered: Any = GatherWithGradient.apply(torch.cat([tensor, padding]))
    return [part[: int(size)] for part, size in zip(gathered.chunk(len(sizes)), sizes)]


@contextmanager
def on_device(model: MMGEMModel, device: torch.device) -> Iterator[None]:
    """Moves a model that waits on the CPU, as Trainer leaves it until FSDP shards it, to the device and back."""
    waits = model.device.type == "cpu"
    if waits:
        model.to(device)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if waits:
            model.to("cpu")  # type: ignore[arg-type]


def keep_temperature_in_float32(model: MMGEMModel, accelerator: Accelerator) -> None:
    """
    Keeps `logit_scale` and the model's outputs in float32 under FSDP2: in bfloat16 1 / tau = 14.29 is 14.25, and a
    unit norm is off by up to 0.004. Call it before the model is prepared.
    """
    fully_shard(model.logit_scale)  # on its own, with its precision; accelerate leaves sharded modules as they are
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)
