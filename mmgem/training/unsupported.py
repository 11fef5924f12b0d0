"""Options of transformers' TrainingArguments that would have no effect here, or another than they say."""

from dataclasses import fields
from typing import Any


_EVALUATION = "each evaluation goes through the whole held-out set and computes retrieval and L_Gen"
_BATCHES = "equal batches keep the number of negatives equal"

# Any other value than the default of MMGEMTrainingArguments is refused, for this reason.
UNSUPPORTED = {
    "label_smoothing_factor": "L_Gen has no label smoothing",
    "optim_target_modules": "optimizers that treat some modules otherwise (GaLore, APOLLO) are not supported",
    "bf16_full_eval": "evaluation runs in the precision of training; python -m mmgem.evaluation has --dtype",
    "fp16_full_eval": "evaluation runs in the precision of training; python -m mmgem.evaluation has --dtype",
    "use_liger_kernel": "Liger has no kernels for MM-GEM",
    "liger_kernel_config": "Liger has no kernels for MM-GEM",
    "use_cache": "training does not use a key-value cache",
    "auto_find_batch_size": f"{_BATCHES}; --mini_batch_size lowers the memory instead",
    "include_num_input_tokens_seen": "padding of packed rows would count; the log has samples_per_second",
    "prediction_loss_only": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "label_names": _EVALUATION,
    "enable_jit_checkpoint": "train.py would evaluate the interrupted run as if it were finished; use --save_steps",
    "hub_strategy": "train.py pushes the finished run once, with its evaluation",
    "hub_always_push": "train.py pushes the finished run once, with its evaluation",
    "parallelism_config": "several devices train by DistributedDataParallel or FSDP2",
    "deepspeed": "several devices train by DistributedDataParallel or FSDP2",
    "do_train": "train.py always trains; python -m mmgem.evaluation evaluates without training",
    "do_eval": "train.py trains, and evaluates where there is held-out data; python -m mmgem.evaluation evaluates",
    "do_predict": "train.py trains, and evaluates where there is held-out data; python -m mmgem.evaluation evaluates",
    "dataloader_drop_last": _BATCHES,
    "dataloader_persistent_workers": "workers learn of the next epoch, which chooses captions, when they start",
    "dataloader_in_order": "a resumed run would skip other batches than those it was trained on",
    "remove_unused_columns": "the collator chooses the columns",
    "length_column_name": "packing makes rows of equal length",
}


def refuse_unsupported(args: Any) -> None:
    """
    Of arguments as they were given, before transformers derives others from them.

    Raises:
        ValueError: naming the first option that is not supported, and why.
    """
    defaults = {field.name: field.default for field in fields(args)}
    for name, reason in UNSUPPORTED.items():
        off: list[Any] = [defaults[name], None, []]
        if defaults[name] == "no":
            off.append(False)  # as the command line's parser reads it
        if getattr(args, name) not in off:
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
    Of arguments once transformers has read `accelerator_config`.

    Raises:
        ValueError: for batches that accelerate would divide among processes.
    """
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name):
            raise ValueError(
                f"accelerator_config's {name} is not supported: per_device_train_batch_size is the batch of each "
                "process, which reads its own examples. Leave it out."
            )
