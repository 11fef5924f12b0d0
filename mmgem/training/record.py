"""training.json: what a run was, for the model card."""

import json
import os
import platform
from typing import Any

import torch

from ..data.json_files import parse_json
from ..data.loading import is_hub_id
from ..evaluation.report import environment
from .arguments import DataArguments, MMGEMTrainingArguments, ModelArguments
from .trainer import MMGEMTrainer


RECORD_NAME = "training.json"


def write_record(trainer: MMGEMTrainer, model_args: ModelArguments, data_args: DataArguments, seconds: float) -> None:
    """
    Writes `training.json` beside the model: stage, data, towers, settings, time and hardware.

    Args:
        seconds: that the run took; where it was resumed, since then.
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
        # An adapter's base has a record, and a column of the card, of its own.
        "data": list(dict.fromkeys((origin["data"] if args.stage == "1" else []) + _data(data_args))),
        "steps": trainer.state.global_step,
        "batch_size": batch_size,
        "examples": batch_size * trainer.state.global_step,
        "settings": _settings(args, data_args),
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
    What the weights come from: Hub ids of models, whether nothing else, and the data that they had seen before; of a
    folder, as its own run recorded it.
    """
    unknown: dict[str, Any] = {"base_models": [], "from_scratch": False, "dataset_ids": [], "data": []}
    if model_args.init_from is None:
        towers = [model_args.vision_model_name_or_path, model_args.text_model_name_or_path]
        return {**unknown, "base_models": [t for t in towers if is_hub_id(t)], "from_scratch": not any(towers)}
    if is_hub_id(model_args.init_from):
        return {**unknown, "base_models": [model_args.init_from]}
    earlier = os.path.join(model_args.init_from, RECORD_NAME)
    if not os.path.isfile(earlier):
        return unknown
    with open(earlier, encoding="utf-8") as file:
        record = parse_json(file.read())
    return {name: record.get(name, value) for name, value in unknown.items()}


def _data(data_args: DataArguments) -> list[str]:
    """Names, without the folders that they lie in."""
    if data_args.dataset_name is not None:
        return [
            data_args.dataset_name if is_hub_id(data_args.dataset_name) else os.path.basename(data_args.dataset_name)
        ]
    files = data_args.train_shards or data_args.train_annotations or [str(data_args.train_file)]
    return [os.path.basename(file) for file in files]


def _settings(args: MMGEMTrainingArguments, data_args: DataArguments) -> dict[str, Any]:
    """What it takes to repeat the run, as far as it differs from run to run."""
    settings: dict[str, Any] = {
        "optimizer": args.kept_optimizer or getattr(args.optim, "value", args.optim),
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
        "warmup_steps": args.warmup_steps,
        "weight_decay": args.weight_decay,
        "max_length": data_args.max_length,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "seed": args.seed,
    }
    if args.stage == "1":
        settings["caption_loss_weight"] = args.caption_loss_weight
        settings["projection_lr_multiplier"] = args.projection_lr_multiplier
        settings["lora_rank"] = args.lora_rank
        settings["augmentation_scale"] = data_args.augmentation_scale
    else:
        settings["max_regions"] = data_args.max_regions
        settings["whole_image_weight"] = data_args.whole_image_weight
    return settings


def _hardware(args: MMGEMTrainingArguments) -> str:
    if args.device.type == "cuda":
        return f"{args.world_size} x {torch.cuda.get_device_name(args.device)}"
    return f"{args.world_size} x {torch.get_num_threads()} threads of a CPU ({platform.machine()})"
