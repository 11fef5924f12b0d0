"""What FSDP2 needs of us."""

import dataclasses

from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard

from ..modeling_mmgem import MMGEMModel


def keep_temperature_in_float32(model: MMGEMModel, accelerator: Accelerator) -> None:
    """
    Excepts `logit_scale` from 16-bit parameters and the outputs from being rounded: in bfloat16 1 / tau = 14.29 is
    14.25, and a unit norm is off by up to 0.004. To be called before the model is prepared.
    """
    fully_shard(model.logit_scale)  # on its own, with its precision; accelerate leaves what is sharded as it is
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)
