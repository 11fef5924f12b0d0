"""Options and models that would train on something else than they say, refused before a run starts."""

import os
from dataclasses import fields
from typing import Any

import torch
from accelerate import Accelerator
from transformers.utils import logging

from ..modeling_mmgem import MMGEMModel
from ..processing import MMGEMProcessor


logger = logging.get_logger(__name__)

BFLOAT16_CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16")  # of x86-64, the last of ARM64

# Optimizers that transformers does not have: names of classes of pytorch-optimizer.
PYTORCH_OPTIMIZERS = {"lamb": "Lamb", "soap": "SOAP"}

# Options of transformers' TrainingArguments that would have no effect here, or another than they say, by the reason.
# Any other value than the default of MMGEMTrainingArguments is refused.
_UNSUPPORTED_BY_REASON = {
    "L_Gen has no label smoothing": ["label_smoothing_factor"],
    "optimizers that treat some modules otherwise (GaLore, APOLLO) are not supported": ["optim_target_modules"],
    "Liger has no kernels for MM-GEM": ["use_liger_kernel", "liger_kernel_config"],
    "training does not use a key-value cache": ["use_cache"],
    "equal batches keep the number of negatives equal": ["dataloader_drop_last"],
    "equal batches keep the number of negatives equal; --mini_batch_size lowers the memory": ["auto_find_batch_size"],
    "padding of packed rows would count; the log has samples_per_second": ["include_num_input_tokens_seen"],
    "packing makes rows of equal length": ["length_column_name"],
    "the collator chooses the columns": ["remove_unused_columns"],
    "workers learn of the next epoch, which chooses captions, when they start": ["dataloader_persistent_workers"],
    "a resumed run would skip other batches than those it was trained on": ["dataloader_in_order"],
    "several devices train by DistributedDataParallel or FSDP2": ["parallelism_config", "deepspeed"],
    "train.py always trains; python -m mmgem.evaluation evaluates without training": ["do_train"],
    "train.py evaluates where there is held-out data, and so does python -m mmgem.evaluation": [
        *("do_eval", "do_predict"),
    ],
    "train.py would evaluate the interrupted run as if it were finished; use --save_steps": ["enable_jit_checkpoint"],
    "train.py pushes the finished run once, with its evaluation": ["hub_strategy", "hub_always_push"],
    "evaluation runs in the precision of training; python -m mmgem.evaluation has --dtype": [
        *("bf16_full_eval", "fp16_full_eval"),
    ],
    "each evaluation goes through the whole held-out set and computes retrieval and L_Gen": [
        *("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        *("include_for_metrics", "batch_eval_metrics", "label_names"),
    ],
}
UNSUPPORTED = {name: reason for reason, names in _UNSUPPORTED_BY_REASON.items() for name in names}


def refuse_unsupported(args: Any) -> None:
    """
    Checks training arguments as they were given, before transformers derives others from them.

    Raises:
        ValueError: naming the first option that is not supported, and why.
    """
    defaults = {field.name: field.default for field in fields(args)}
    for name, reason in UNSUPPORTED.items():
        also_off = False if defaults[name] == "no" else None  # the command line's parser reads "no" as False
        if getattr(args, name) not in (defaults[name], also_off, None, []):
            raise ValueError(f"{name} is not supported: {reason}. Leave out --{name}.")
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy {args.train_sampling_strategy!r} is not supported: packing makes rows of equal "
            "length. Choose random or sequential."
        )
    for name in ("neftune_noise_alpha", "torch_empty_cache_steps"):
        if getattr(args, name) is not None and args.mini_batch_size:
            raise ValueError(f"{name} is not supported beside mini_batch_size. Leave out one of the two.")
    if args.neftune_noise_alpha is not None and args.stage != "1":
        raise ValueError("neftune_noise_alpha is for stage 1: stage 2 keeps the language model in eval mode.")


def refuse_unsupported_loaders(args: Any) -> None:
    """
    Checks `accelerator_config` once transformers has read it.

    Raises:
        ValueError: for batches that accelerate would divide among processes.
    """
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name):
            raise ValueError(
                f"accelerator_config's {name} is not supported: per_device_train_batch_size is the batch of each "
                "process, which reads its own examples. Leave it out."
            )


def warn_of_slow_bfloat16(args: Any) -> None:
    """Warns if bfloat16 would be emulated."""
    if args.bf16 and args.device.type == "cpu" and not args.dry_run and not has_bfloat16_instructions():
        logger.warning(
            "This CPU has no instructions for bfloat16: --bf16 true can be a hundred times slower than --bf16 false. "
            "torch.cpu.get_capabilities() lists what a CPU has."
        )


def has_bfloat16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 (AVX512-BF16, AMX, ARM's BF16); torch before 2.13 cannot say, so True."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in BFLOAT16_CAPABILITIES)


@torch.no_grad()
def check_packing(model: MMGEMModel, accelerator: Accelerator) -> None:
    """
    Checks that two sequences in one row do not see each other. Some language models, and flash attention with several
    rows, ignore positions that restart.

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


def check_cached_features(model: MMGEMModel, augmentation_scale: float) -> None:
    """
    Raises:
        ValueError: for a vision tower that is trained, and for random crops: features differ from step to step.
    """
    for name, parameter in model.vision_model.named_parameters():
        if parameter.requires_grad:
            raise ValueError(
                f"cache_features keeps what a frozen vision tower computes, but vision_model.{name} is trained. Pass "
                "--freeze vision_model (--lora_rank freezes it too), or leave out --cache_features."
            )
    if augmentation_scale < 1:
        raise ValueError(
            f"cache_features keeps the features of whole images, but augmentation_scale {augmentation_scale} takes "
            "another crop in each step. Leave out one of the two."
        )


def check_processor(model: MMGEMModel, processor: MMGEMProcessor) -> None:
    """
    Raises:
        ValueError: where prompts hold another number of visual tokens than images give; where the language model has a
            table of positions that ends before the longest sequence does.
    """
    k = model.config.image_grid_size
    if processor.image_grid_size != k:
        raise ValueError(
            f"The processor writes prompts for image_grid_size {processor.image_grid_size}, but the model's is {k}: "
            f"set processor.image_grid_size = {k}."
        )
    longest = processor.longest_sequence
    if model._max_positions is not None and longest > model._max_positions:
        raise ValueError(
            f"Sequences may have {longest} tokens, but '{model.config.text_config.model_type}' has positions for "
            f"{model._max_positions} only; lower --max_length to "
            f"{model._max_positions - longest + processor.max_length} or less."
        )


def check_parallelism(args: Any, fsdp: Any = None, deepspeed: bool = False, lora: bool = False) -> None:
    """
    Checks that the processes of a run train on the gradients of the whole batch. `fsdp` is Accelerate's plugin.

    Raises:
        ValueError: naming what prevents it, with the remedy.
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
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise ValueError("Captions are averaged over the tokens of all processes: keep average_tokens_across_devices.")
    if deepspeed:
        raise ValueError("DeepSpeed is not supported; several GPUs train by DistributedDataParallel or FSDP2.")
    if not fsdp:
        return
    if fsdp.fsdp_version == 1:
        raise ValueError(
            "FSDP 1 makes one vector of all parameters; set fsdp_version: 2 (configs/accelerate/fsdp.yaml)."
        )
    if args.optim in PYTORCH_OPTIMIZERS:
        raise ValueError(
            f"{args.optim} looks at whole matrices, of which each process has a part under FSDP; choose "
            "--optim adamw_torch, or DistributedDataParallel."
        )
    if args.eval_strategy != "no":
        raise ValueError("Under FSDP there is no evaluation while training; pass --eval_strategy no.")
    if "FULL" not in str(fsdp.state_dict_type):
        raise ValueError(
            f"fsdp_state_dict_type {fsdp.state_dict_type} would write no model that can be loaded; choose "
            "FULL_STATE_DICT."
        )
    if lora:
        raise ValueError("LoRA's weights are merged where they are whole: train it without FSDP.")
