"""What the scripts that test_distributed.py starts have in common: a step, and FSDP2 on CPU processes."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from mmgem.training.arguments import MMGEMTrainingArguments


FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}


def training_arguments(strategy: str, **options) -> MMGEMTrainingArguments:
    """`strategy`: "ddp", "fsdp", or "fsdp-bf16"."""
    if strategy == "ddp":
        return MMGEMTrainingArguments(**options)
    args = MMGEMTrainingArguments(**options, **FSDP, bf16=strategy == "fsdp-bf16")
    # Accelerate shards among accelerators alone; gloo can do it too.
    assert args.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def whole(tensor):
    """Of a sharded tensor all parts, on every process."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def take_step(trainer: Any, folder: Path, **more: Any) -> None:
    """Trains one step; the first process writes its gradients, its loss, the number of processes, and `more`."""
    gradients, model = {}, trainer.base

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients.update({n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None})

    trainer.add_callback(Keep())
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    more = {name: value() if callable(value) else value for name, value in more.items()}
    if int(os.environ["RANK"]) == 0:
        log = next(entry for entry in trainer.state.log_history if "loss" in entry)
        found = {name: torch.tensor(log[name]) for name in ("loss", "tau", "distillation_loss") if name in log}
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        torch.save({"gradients": gradients, "world_size": world_size, **found, **more}, folder / "gradients.pt")
    trainer.leave_process_group()
