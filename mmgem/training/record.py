"""training.json: what a run trained, on what and how, for the model card."""

import json
import os
import platform
from typing import Any

import torch

from ..data.arguments import DataArguments
from ..data.json_files import parse_json
from ..data.loading import is_hub_id
from ..evaluation.report import environment
from .adapters import lora_config
from .arguments import MMGEMTrainingArguments
from .base_trainer import BaseTrainer
from .checks import PYTORCH_OPTIMIZERS
from .model_arguments import ModelArguments
from .stages import option_value


RECORD_NAME = "training.json"


def write_record(trainer: BaseTrainer, model_args: ModelArguments, data_args: DataArguments, seconds: float) -> None:
    """
    Writes `training.json` beside the model: stage, data, towers, settings, time and hardware.

    Args:
        seconds: that training took; of a resumed run, since it was resumed.
    """
    args = trainer.args
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    origin = _origin(model_args)
    own_id = [data_args.dataset_name] if is_hub_id(data_args.dataset_name) else []
    record = {
        "stage": args.stage,
        "objective": args.objective,
        "base_models": origin["base_models"],
        "from_scratch": origin["from_scratch"],
        "dataset_ids": list(dict.fromkeys(origin["dataset_ids"] + own_id)),
        # The base of an adapter has its own record, and its own column in the card.
        "data": list(dict.fromkeys((origin["data"] if args.stage == "1" else []) + _data(data_args))),
        "steps": trainer.state.global_step,
        "batch_size": batch_size,
        "examples": batch_size * trainer.state.global_step,
        "settings": _settings(args, data_args, model_args),
        "seconds": round(seconds, 1),
        "resumed": bool(args.resume_from_checkpoint),
        "hardware": _hardware(args),
        **environment(),
    }
    with open(os.path.join(str(args.output_dir), RECORD_NAME), "w", encoding="utf-8") as file:
        json.dump(record, file, indent=2, ensure_ascii=False)
        file.write("\n")


def _origin(model_args: ModelArguments) -> dict[str, Any]:
    """
    Returns where the weights come from: Hub ids of models, whether they started from scratch, and the data that they
    were trained on before. A folder is described by the record of its own run.
    """
    if model_args.init_from is not None:
        return _origin_of(model_args.init_from)
    towers = [model_args.vision_model_name_or_path, model_args.text_model_name_or_path]
    origins = [_origin_of(tower) for tower in towers if tower]
    names = ("base_models", "dataset_ids", "data")
    lists = {name: [item for origin in origins for item in origin[name]] for name in names}
    return {**lists, "from_scratch": not origins}


def _origin_of(name: str) -> dict[str, Any]:
    unknown: dict[str, Any] = {"base_models": [], "from_scratch": False, "dataset_ids": [], "data": []}
    if is_hub_id(name):
        return {**unknown, "base_models": [name]}
    earlier = os.path.join(name, RECORD_NAME)
    if not os.path.isfile(earlier):
        return unknown
    with open(earlier, encoding="utf-8") as file:
        record = parse_json(file.read())
    return {key: record.get(key, value) for key, value in unknown.items()}


def changed_settings(model_args: ModelArguments, data_args: DataArguments, args: MMGEMTrainingArguments) -> str:
    """What a run changes against the training of the checkpoint that it goes on from, and how to keep it."""
    path = os.path.join(model_args.init_from or "", RECORD_NAME)
    if model_args.init_from is None or not os.path.isfile(path):
        return ""
    with open(path, encoding="utf-8") as file:
        earlier = parse_json(file.read()).get("settings", {})
    now = {"max_length": data_args.max_length, "caption_loss_weight": args.caption_loss_weight}
    other = {name: earlier[name] for name, value in now.items() if name in earlier and earlier[name] != value}
    if not other:
        return ""
    keep = " ".join(f"--{name} {value}" for name, value in other.items())
    used = " and ".join(f"{name} {now[name]}" for name in other)
    return f"{model_args.init_from} was trained with {keep}; this run has {used}."


def _data(data_args: DataArguments) -> list[str]:
    """Returns the names of the training data, without the folders of local files."""
    if is_hub_id(data_args.dataset_name):
        return [str(data_args.dataset_name)]
    if data_args.dataset_name is not None:
        return [os.path.basename(data_args.dataset_name)]
    files = data_args.train_shards or data_args.train_annotations
    files = files or [str(data_args.train_file or data_args.train_mixture)]
    return [os.path.basename(file) for file in files]


def _settings(args: MMGEMTrainingArguments, data_args: DataArguments, model_args: ModelArguments) -> dict[str, Any]:
    """Returns the options that are most often changed, for the card's reader to repeat the run."""
    settings: dict[str, Any] = {
        "optimizer": PYTORCH_OPTIMIZERS.get(args.optim, option_value(args.optim)),
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": option_value(args.lr_scheduler_type),
        "warmup_steps": args.warmup_steps,
        "weight_decay": args.weight_decay,
        "max_length": data_args.max_length,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "seed": args.seed,
    }
    if args.negatives:
        for name in ("false_negative_margin", "hardest_negatives", "hardness_weight"):
            settings[name] = getattr(args, name)
    if args.temperature is not None:
        settings["temperature"] = args.temperature
    if args.stage == "text-distillation":
        settings["distillation_prompt"] = args.distillation_prompt
    if (teacher := data_args.teacher) is not None:
        settings["teacher"] = teacher if is_hub_id(teacher) else os.path.basename(os.path.normpath(teacher))
        settings |= {"distillation_weight": args.distillation_weight} if args.stage == "1" else {}
    if model_args.contrastive_loss is not None:
        settings["contrastive_loss"] = model_args.contrastive_loss
    if args.batch_sampler != "random":
        settings["batch_sampler"] = args.batch_sampler
    if data_args.negative_caption_column is not None:
        settings["negative_caption_column"] = data_args.negative_caption_column
    if args.matryoshka_dims:
        settings["matryoshka_dims"] = args.matryoshka_dims
    if args.stage == "1":
        settings["caption_loss_weight"] = args.caption_loss_weight
        settings["projection_lr_multiplier"] = args.projection_lr_multiplier
        settings["lora_rank"] = args.lora_rank
        settings["augmentation_scale"] = data_args.augmentation_scale
    elif args.stage in ("fused-retrieval", "text-distillation"):
        settings |= {"lora_rank": lora.r, "lora_alpha": lora.lora_alpha} if (lora := lora_config(args)) else {}
    else:
        settings["max_regions"] = data_args.max_regions
        settings["whole_image_weight"] = data_args.whole_image_weight
    return settings


def _hardware(args: MMGEMTrainingArguments) -> str:
    if args.device.type == "cuda":
        return f"{args.world_size} x {torch.cuda.get_device_name(args.device)}"
    return f"{args.world_size} x {torch.get_num_threads()} threads of a CPU ({platform.machine()})"
