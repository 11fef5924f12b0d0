"""Which parameters a stage trains, at which rate, and by which optimiser."""

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler

from .arguments import MMGEMTrainingArguments


PROJECTIONS = ("visual_projection", "text_projection", "caption_projection", "logit_scale")

# What a loss does not reach gets no gradient, which DistributedDataParallel takes for an error: it is frozen.
UNREACHED = {
    "joint": ("region_projection", "soft_prompts"),
    "contrastive": ("region_projection", "soft_prompts", "caption_projection", "lm_head"),
    "caption": ("region_projection", "soft_prompts", "text_projection", "logit_scale"),
}


def freeze_parameters(model: nn.Module, objective: str, names: Sequence[str] = ()) -> None:
    """
    Freezes what the objective does not reach, and whatever begins with one of `names`.

    Raises:
        ValueError: for a name that no parameter begins with, with the nearest that there is.
    """
    parameters = dict(model.named_parameters())
    for name in names:
        if not any(_begins(parameter, name) for parameter in parameters):
            prefixes = {".".join(p.split(".")[: i + 1]) for p in parameters for i in range(p.count(".") + 1)}
            nearest = difflib.get_close_matches(name, prefixes, n=1, cutoff=0)
            raise ValueError(
                f"No parameter begins with {name!r}, so it cannot be frozen; the nearest is {nearest[0]!r}."
            )
    for parameter_name, parameter in parameters.items():
        frozen = (*names, *UNREACHED[objective])
        # DINOv2's mask token is for its own pretraining.
        if any(_begins(parameter_name, name) for name in frozen) or parameter_name.endswith("mask_token"):
            parameter.requires_grad_(False)


def parameter_groups(
    model: nn.Module, learning_rate: float, projection_lr_multiplier: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Projections at a multiple of the backbones' rate (paper: 10 x); vectors without weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own_name = name.removeprefix("module.").removeprefix("base_model.model.")  # of DDP, of PEFT
            factor = projection_lr_multiplier if any(_begins(own_name, p) for p in PROJECTIONS) else 1.0
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((learning_rate * factor, decay), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def make_optimizer(args: MMGEMTrainingArguments, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `--optim` names, from transformers or pytorch-optimizer, over what is not frozen."""
    groups = parameter_groups(model, args.learning_rate, args.projection_lr_multiplier, args.weight_decay)
    optimizer_class, options = _optimizer_class(args)
    return optimizer_class(groups, **options)


def check_optimizer(args: MMGEMTrainingArguments) -> None:
    """
    Makes the optimizer and its schedule for a parameter of no model.

    Raises:
        ValueError: for an optimizer, or an option of it or of the schedule, that is not there or has no effect.
    """
    try:
        optimizer_class, options = _optimizer_class(args)
        optimizer = optimizer_class([nn.Parameter(torch.zeros(1, 1))], **options)
        schedule = {"num_warmup_steps": args.get_warmup_steps(1), "num_training_steps": 1}
        kwargs = dict(args.lr_scheduler_kwargs or {})  # type: ignore[arg-type]
        get_scheduler(args.lr_scheduler_type, optimizer, **schedule, scheduler_specific_kwargs=kwargs)
    except (ImportError, TypeError, ValueError) as error:
        name: Any = args.kept_optimizer or args.optim
        schedule_name: Any = args.lr_scheduler_type
        raise ValueError(
            f"--optim {getattr(name, 'value', name)} with --lr_scheduler_type {schedule_name.value} cannot be set up: "
            f"{error}"
        ) from error


def _optimizer_class(args: MMGEMTrainingArguments) -> tuple[Any, dict[str, Any]]:
    """The class and its options, of which every one of `--optim_args` must be one."""
    if args.optim.startswith(("galore", "apollo", "lomo", "adalomo", "schedule_free")):
        raise ValueError(
            "it makes parameter groups of its own, or averages weights that would not be saved. Choose another"
        )
    if args.kept_optimizer:
        import pytorch_optimizer

        optimizer_class = getattr(pytorch_optimizer, args.kept_optimizer)
        options = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        options.update(args.optimizer_options)
        known = {name: options.get(name) for name in inspect.signature(optimizer_class).parameters}
    else:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
        known = options
    for name, value in args.optimizer_options.items():
        is_ignored = name not in known or (known[name] != value and isinstance(known[name], int | float))
        if is_ignored or name in ("params", "lr", "weight_decay"):  # those are set by group
            raise ValueError(f"{name!r} of --optim_args has no effect on it.")
    return optimizer_class, options


def _begins(parameter: str, name: str) -> bool:
    return parameter == name or parameter.startswith(f"{name}.")
