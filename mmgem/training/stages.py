"""Which parameters a stage trains, at which rate, and by which optimizer."""

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler

from ..options import load_yaml
from .arguments import MMGEMTrainingArguments
from .checks import PYTORCH_OPTIMIZERS


PROJECTIONS = ("visual_projection", "text_projection", "caption_projection", "logit_scale")

# Frozen, because the loss gives them no gradient, which DistributedDataParallel takes for an error.
FROZEN_BY_OBJECTIVE = {
    "joint": ("region_projection", "soft_prompts"),
    "contrastive": ("region_projection", "soft_prompts", "caption_projection", "lm_head"),
    "caption": ("region_projection", "soft_prompts", "text_projection", "logit_scale"),
}


def freeze_parameters(model: nn.Module, objective: str, names: Sequence[str] = ()) -> None:
    """
    Freezes the parameters that the objective's loss does not reach, and those whose names begin with one of `names`.

    Raises:
        ValueError: for a name that no parameter begins with, with the nearest one.
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
        frozen = (*names, *FROZEN_BY_OBJECTIVE[objective])
        # A ViT uses its mask token in its own pretraining only.
        if any(_begins(parameter_name, name) for name in frozen) or parameter_name.endswith("mask_token"):
            parameter.requires_grad_(False)


def parameter_groups(
    model: nn.Module, learning_rate: float, projection_lr_multiplier: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Gives projections a multiple of the backbones' rate (paper: 10 x), and vectors no weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own_name = name.removeprefix("module.").removeprefix("base_model.model.")  # without DDP's and PEFT's
            factor = projection_lr_multiplier if any(_begins(own_name, p) for p in PROJECTIONS) else 1.0
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((learning_rate * factor, decay), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def make_optimizer(args: MMGEMTrainingArguments, model: nn.Module) -> torch.optim.Optimizer:
    """Makes the optimizer that `--optim` names, from transformers or pytorch-optimizer, of the trained parameters."""
    groups = parameter_groups(model, args.learning_rate, args.projection_lr_multiplier, args.weight_decay)
    optimizer_class, options = _optimizer_class(args)
    return optimizer_class(groups, **options)


def check_optimizer(args: MMGEMTrainingArguments) -> None:
    """
    Tries the optimizer and its schedule on a parameter that belongs to no model.

    Raises:
        ValueError: for an optimizer that is not installed or not supported, and for an option of it or of the schedule
            that does not exist or has no effect.
    """
    schedule: Any = args.lr_scheduler_type
    try:
        optimizer_class, options = _optimizer_class(args)
        optimizer = optimizer_class([nn.Parameter(torch.zeros(1, 1))], **options)
        steps = {"num_warmup_steps": args.get_warmup_steps(1), "num_training_steps": 1}
        kwargs = dict(args.lr_scheduler_kwargs or {})  # type: ignore[arg-type]
        get_scheduler(schedule, optimizer, **steps, scheduler_specific_kwargs=kwargs)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(
            f"--optim {option_value(args.optim)} with --lr_scheduler_type {option_value(schedule)} cannot be set up: "
            f"{error}"
        ) from error


def option_value(option: Any) -> Any:
    """Returns what the command line calls the value of an option: the value of an enum, or the option itself."""
    return getattr(option, "value", option)


def _optimizer_class(args: MMGEMTrainingArguments) -> tuple[Any, dict[str, Any]]:
    """Returns the class and its options; each of `--optim_args` must be one of them."""
    if args.optim.startswith(("galore", "apollo", "lomo", "adalomo", "schedule_free")):
        raise ValueError(
            "it makes parameter groups of its own, or averages weights that would not be saved. Choose another"
        )
    optim_args = _parse_optim_args(args.optim_args)
    if args.optim in PYTORCH_OPTIMIZERS:
        import pytorch_optimizer

        optimizer_class = getattr(pytorch_optimizer, PYTORCH_OPTIMIZERS[args.optim])
        options = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        options.update(optim_args)
        known = {name: options.get(name) for name in inspect.signature(optimizer_class).parameters}
    else:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
        known = options
    for name, value in optim_args.items():
        is_ignored = name not in known or (known[name] != value and isinstance(known[name], int | float))
        if is_ignored or name in ("params", "lr", "weight_decay"):  # parameter groups set these
            raise ValueError(f"{name!r} of --optim_args has no effect on it.")
    return optimizer_class, options


def _parse_optim_args(options: str | None) -> dict[str, Any]:
    """Parses `a=1,b=true`."""
    parsed = {}
    for option in filter(None, (options or "").split(",")):
        name, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"optim_args are name=value, separated by commas; {option!r} is not.")
        parsed[name.strip()] = load_yaml(value, "optim_args")
    return parsed


def _begins(parameter: str, name: str) -> bool:
    return parameter == name or parameter.startswith(f"{name}.")
