"""The steps of train.py after its options are parsed: build the Trainer, save, evaluate what was saved."""

import os
from pathlib import Path
from typing import Any

import transformers

from ..configuration import MMGEMConfig
from ..data.arguments import DataArguments
from ..data.loading import is_hub_id, load_pairs, load_regions, load_triplets
from ..data.pairs import PairDataset
from ..data.texts import TeacherVectors, distinct_texts
from ..evaluation.evaluator import evaluate_model
from ..evaluation.fused import evaluate_fused, fused_section
from ..evaluation.region_report import add_to_report_of_base, region_section
from ..evaluation.regions import evaluate_adapter
from ..evaluation.report import environment, pair_sections, write_report
from ..loading import load_checkpoint
from .arguments import MMGEMTrainingArguments, data_seed
from .base_trainer import BaseTrainer
from .building import build_model_and_processor
from .fused_trainer import FusedTrainer
from .model_arguments import ModelArguments
from .record import changed_settings, write_record
from .region_trainer import RegionTrainer
from .train_data import embedded_by_teacher
from .trainer import MMGEMTrainer


PROMPTS = {
    "region-caption": "<image> x k x k, [CAP] x 64 (stage 1: <image>[CAP])",
    "region-retrieval": "none: regions and phrases are embedded",
    "fused-retrieval": "<image> x k x k, text, [EMB]",
}
# What loads the data of a stage, its trainer, and what its examples are called.
STAGES: dict[str, tuple[Any, type[MMGEMTrainer], str]] = {
    "1": (load_pairs, MMGEMTrainer, "pairs"),
    "region-caption": (load_regions, RegionTrainer, "images"),
    "region-retrieval": (load_regions, RegionTrainer, "images"),
    "fused-retrieval": (load_triplets, FusedTrainer, "triplets"),
}


def build_trainer(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: MMGEMTrainingArguments,
    config: MMGEMConfig,
    checkpoint: str | None,
) -> MMGEMTrainer:
    """
    Loads the data, builds the model, and prints the size of both.

    Args:
        config: the planned architecture.
        checkpoint: that the run resumes from.
    """
    transformers.set_seed(args.seed)
    if args.stage == "1" and args.process_index == 0 and (changed := changed_settings(model_args, data_args, args)):
        print(changed)
    if args.disable_tqdm:
        transformers.utils.logging.disable_progress_bar()
    load, trainer_class, kind = STAGES[args.stage]
    train_dataset, eval_dataset = load(data_args, config.vision_config.image_size, data_seed(args))
    if eval_dataset is not None:
        eval_dataset[0]  # raises before training if none of its examples can be read
    if args.stage == "1" and data_args.teacher is not None:
        captions = distinct_texts(caption for of_image in train_dataset.captions() for caption in of_image)
        (embedded,) = embedded_by_teacher([captions], data_args.teacher, args)
        train_dataset.teacher = TeacherVectors(embedded)
    model, processor = build_model_and_processor(model_args, train_dataset, data_args.max_length, checkpoint)
    parameters = model.num_parameters()
    of_the_loss = ("teacher", "negative_caption_column")
    model_settings = {**vars(model_args), **{name: getattr(data_args, name) for name in of_the_loss}}
    if args.stage != "1":
        del model_settings["init_from"]  # the adapter recognizes its base, which may have been moved
    trainer = trainer_class(
        model,
        args,
        processor,
        train_dataset,
        eval_dataset,
        model_settings=model_settings,  # type: ignore[arg-type]
    )
    trainer.evaluates_saved = eval_dataset is not None
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    size = f"{len(train_dataset)} {kind}" if isinstance(train_dataset, PairDataset) else "streamed pairs"
    print(f"{parameters / 1e6:.2f} M parameters, {trained / 1e6:.3g} M trained; {size}")
    return trainer


def save_trained(
    trainer: BaseTrainer, model_args: ModelArguments, data_args: DataArguments, seconds: float | None
) -> None:
    """
    Saves the model or adapter with a record of the run; every process returns once it is there.

    Args:
        seconds: that training took; None where nothing was trained.
    """
    trainer.merge_lora()
    trainer.save_model(_internal_call=True)  # does not push: train.py does, after the evaluation
    if trainer.is_world_process_zero():
        # Stale: belongs to the previous weights.
        Path(str(trainer.args.output_dir), "results.json").unlink(missing_ok=True)
        if seconds is not None:
            write_record(trainer, model_args, data_args, seconds)
    trainer.accelerator.wait_for_everyone()


def evaluate_saved(trainer: MMGEMTrainer, model_args: ModelArguments, data_args: DataArguments) -> None:
    """
    Evaluates the saved files, as others will load them, in all processes; the first one reports. Computes in the
    precision of the training.
    """
    args, processor, output_dir = trainer.args, trainer.processing_class, str(trainer.args.output_dir)
    eval_dataset: Any = trainer.eval_dataset
    is_first, batch_size = trainer.is_world_process_zero(), args.per_device_eval_batch_size
    base = output_dir if args.stage == "1" else str(model_args.init_from)
    model: Any = load_checkpoint(base).to(args.device)  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    if args.stage == "1":
        with trainer.accelerator.autocast():
            metrics, outputs = evaluate_model(
                model, processor, eval_dataset, batch_size, args.caption_samples, num_beams=args.generation_num_beams
            )
        found.update(size=len(outputs["indices"]), num_beams=args.generation_num_beams)
        sections = pair_sections(metrics, outputs, eval_dataset) if is_first else []
    else:
        model.load_adapter(output_dir, adapter_name=args.stage)
        found["base"] = base
        if args.stage == "fused-retrieval":
            with trainer.accelerator.autocast():
                metrics, outputs = evaluate_fused(model, processor, eval_dataset, batch_size)
            found["size"] = len(outputs["indices"])
            sections = [fused_section(metrics, outputs, eval_dataset)] if is_first else []
        else:
            with trainer.accelerator.autocast():
                metrics, outputs = evaluate_adapter(model, processor, eval_dataset, args.stage, batch_size)
            regions = outputs["stage_2"]
            found.update(size=len({region["index"] for region in regions}), regions=len(regions))
            found["k"] = model.region_grid_size
            section = (args.stage, metrics, outputs, model, processor, eval_dataset)
            sections = [region_section(*section)] if is_first else []
    if args.eval_strategy != "no":  # the curves' last point
        trainer.log({f"eval_{name}": value for name, value in metrics.items()})
    if not is_first:
        return
    setting = {**_setting(trainer, data_args), **found, "unreadable": len(eval_dataset) - found["size"]}
    report = write_report(output_dir, "Evaluation", sections, setting)
    if args.stage != "1":
        add_to_report_of_base(base, output_dir, sections[0])
    for name, value in metrics.items():
        print(f"{name:28} {value:.4f}")
    print(f"Report: {os.path.relpath(report)}")


def _setting(trainer: MMGEMTrainer, data_args: DataArguments) -> dict[str, Any]:
    """What was evaluated, on what, and how."""
    args, mixed = trainer.args, trainer.accelerator.mixed_precision
    eval_dataset: Any = trainer.eval_dataset
    return {
        "dataset_id": data_args.dataset_name if is_hub_id(data_args.dataset_name) else None,
        "dataset": data_args.dataset_name or data_args.validation_file or data_args.validation_annotations,
        **({} if eval_dataset.table.split is None else {"split": str(eval_dataset.table.split)}),
        "prompt": PROMPTS.get(args.stage, "".join(trainer.processing_class.image_prompt)),
        "max_length": data_args.max_length,
        "dtype": str(trainer.model.dtype) + ("" if mixed == "no" else f" under {mixed} autocast"),
        "device": str(args.device),
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "stage": args.stage,
        "objective": args.objective,
        "caption_loss_weight": args.caption_loss_weight,
        "model": args.output_dir,
        **environment(),
    }
