"""What is refused before a run starts, because it would train on something else than it says."""

import os
from typing import Any

import torch
from accelerate import Accelerator

from ..modeling_mmgem import MMGEMModel
from .arguments import MMGEMTrainingArguments


@torch.no_grad()
def check_packing(model: MMGEMModel, accelerator: Accelerator) -> None:
    """
    Two sequences in one row must not see each other. Some language models, and flash attention where there are
    several rows, pay no heed to positions that restart.

    Raises:
        ValueError: where they do, with the remedy.
    """
    was_training = model.training
    model.eval()
    ids = torch.arange(16, device=model.device).view(2, 8) % model.config.text_config.vocab_size
    ids[:, -1] = model.config.emb_token_id
    rows = torch.stack([ids.flatten(), ids.flip(0).flatten()])
    positions = torch.arange(8, device=model.device).repeat(2, 2)
    with accelerator.autocast():
        alone: Any = model.get_text_features(ids, torch.ones_like(ids))
        packed: Any = model.get_text_features(rows, position_ids=positions)
    model.train(was_training)
    expected = alone.last_hidden_state.float()
    error = (packed.last_hidden_state[0].view_as(expected) - expected).abs().max() / expected.abs().max()
    exact = model.dtype == torch.float32 and accelerator.mixed_precision == "no"
    if not error < (1e-3 if exact else 0.1):
        raise ValueError(
            f"Language model '{model.config.text_config.model_type}' with "
            f"{model.language_model.config._attn_implementation} attention does not keep the sequences of a "
            "packed row apart; pass --packing false, or choose another attention."
        )


def check_precision(model: torch.nn.Module) -> None:
    """
    Raises:
        ValueError: for trained weights in 16 bits, in which most steps of an optimizer are rounded away.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} is to be trained, but it is {parameter.dtype}, in which small steps of the optimizer are "
                "rounded away. Load the model with dtype=torch.float32, and pass bf16=True to compute in 16 bits."
            )


def check_positions(model: MMGEMModel, longest: int) -> None:
    """
    Raises:
        ValueError: where the language model has a table of positions that ends before the longest sequence does.
    """
    if model._max_positions is not None and longest > model._max_positions:
        raise ValueError(
            f"Sequences may have {longest} tokens, but '{model.config.text_config.model_type}' has positions for "
            f"{model._max_positions} only; lower --max_length to {model._max_positions - 2} or less."
        )


def check_parallelism(args: MMGEMTrainingArguments, fsdp: Any = None, deepspeed: bool = False) -> None:
    """
    Refuses what would not train on the gradients of the whole batch, or not at all. `fsdp` is Accelerate's plugin.

    Raises:
        ValueError: naming it, with the remedy.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > args.world_size:
        raise ValueError(
            f"{started} processes were started, but each would train as one of {args.world_size}; on CPU pass "
            "--use_cpu true."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"This one process sees {args.n_gpu} GPUs, and would split each batch without its negatives; start one "
            "process per GPU (accelerate launch), or set CUDA_VISIBLE_DEVICES."
        )
    if deepspeed:
        raise ValueError("DeepSpeed is not supported; several GPUs train by DistributedDataParallel or FSDP2.")
    if fsdp and fsdp.fsdp_version == 1:
        raise ValueError(
            "FSDP 1 makes one vector of all parameters; set fsdp_version: 2 (configs/accelerate/fsdp.yaml)."
        )
    if fsdp and args.kept_optimizer:
        raise ValueError(
            f"{args.kept_optimizer} looks at whole matrices, of which each process has a part under FSDP; choose "
            "--optim adamw_torch, or DistributedDataParallel."
        )
    if fsdp and args.eval_strategy != "no":
        raise ValueError("Under FSDP there is no evaluation while training; pass --eval_strategy no.")
    if fsdp and "FULL" not in str(fsdp.state_dict_type):
        raise ValueError(
            f"fsdp_state_dict_type {fsdp.state_dict_type} would write no model that can be loaded; choose "
            "FULL_STATE_DICT."
        )
    if fsdp and args.lora_rank:
        raise ValueError("LoRA's weights are merged where they are whole: train it without FSDP.")
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise ValueError("Captions are averaged over the tokens of all processes: keep average_tokens_across_devices.")
