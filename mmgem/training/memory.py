"""What memory there is, and a first check of what a model needs of it."""

import contextlib
import math
from pathlib import Path

import psutil
import torch
from transformers.initialization import no_init_weights

from ..configuration import MMGEMConfig
from ..modeling_mmgem import MMGEMModel
from .adapters import add_lora, lora_config
from .arguments import MMGEMTrainingArguments
from .checks import PYTORCH_OPTIMIZERS
from .stages import freeze_parameters


GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = (  # limit, used, statistics, and what these call cached files
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def empty_model(config: MMGEMConfig, args: MMGEMTrainingArguments) -> tuple[MMGEMModel, int]:
    """
    Builds the model of a stage-1 run, frozen and with LoRA as the run would have it; under `torch.device("meta")` or
    FakeTensorMode without any memory. The number is that of its parameters without LoRA's.
    """
    with no_init_weights():
        model = MMGEMModel(config).train()
        model.tie_weights()  # which comes with the initialization
        parameters = model.num_parameters()
        if (lora := lora_config(args)) is not None:
            add_lora(model, lora)
    freeze_parameters(model, args.objective, args.freeze)
    return model, parameters


def check_memory(config: MMGEMConfig, args: MMGEMTrainingArguments) -> None:
    """
    Refuses a model that cannot fit into memory, before any of it is allocated. Activations are not counted here; the
    dry run estimates them.

    Raises:
        ValueError: with the bytes that are needed and those that are free.
    """
    with torch.device("meta"):
        model, parameters = empty_model(config, args)
    trained = 0  # in stage 2, whose adapter is small
    if args.stage == "1":
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    needed, free = 4 * parameters, min(psutil.virtual_memory().available, container_memory()[1])
    if args.device.type == "cpu":
        states = 2 if "adam" in args.optim or args.optim in PYTORCH_OPTIMIZERS else 0
        needed += 4 * trained * (1 + states)  # with the gradient
    if needed > free:
        raise ValueError(
            f"A model of {parameters / 1e6:,.0f} M parameters ({trained / 1e6:,.0f} M trained) takes at least "
            f"{needed / GIB:.1f} GiB, but {free / GIB:.1f} GiB are free on this machine. Choose smaller towers, or "
            "train fewer weights (--lora_rank, --freeze); --dry_run tells what a run takes."
        )


def device_memory() -> int:
    """Returns the bytes of this machine's GPU, or of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return int(min(psutil.virtual_memory().total, container_memory()[0]))


def container_memory() -> tuple[float, float]:
    """
    Returns the bytes that the container (cgroup v2 or v1) allows in all, and those that are left; infinite without a
    limit. Cached files do not count, since the kernel drops them when memory is short.
    """
    for limit_name, used_name, stat_name, cached_name in CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError, KeyError):  # no such file, or "max"
            limit, used = (int((CGROUP / name).read_text()) for name in (limit_name, used_name))
            stat = dict(line.split() for line in (CGROUP / stat_name).read_text().splitlines())
            return limit, limit - used + int(stat[cached_name])
    return math.inf, math.inf
