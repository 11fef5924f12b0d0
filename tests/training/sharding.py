"""FSDP2 on CPU processes, for the scripts that test_distributed.py starts."""

from accelerate import PartialState
from accelerate.utils import DistributedType

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
