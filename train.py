"""
Trains a stage of MM-GEM, evaluates it, and saves a checkpoint or an adapter.

    accelerate launch train.py --config configs/scenes.yaml [--any_option value]
    python train.py --train_file pairs.parquet --caption_column captions --output_dir outputs/mine --max_steps 1000
    python train.py --config configs/scenes-region-caption.yaml --init_from outputs/scenes
"""

import os
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

from mmgem.data.loading import is_hub_id, load_pairs, load_regions
from mmgem.data.pairs import BadDataError, PairDataset
from mmgem.evaluation.evaluator import evaluate_model
from mmgem.evaluation.region_report import add_to_report_of_base, region_section
from mmgem.evaluation.regions import evaluate_adapter
from mmgem.evaluation.report import environment, pair_sections, write_report
from mmgem.hub.export import export, find_adapters
from mmgem.hub.upload import upload
from mmgem.loading import load_checkpoint
from mmgem.output_lock import output_lock
from mmgem.training.arguments import DataArguments, ModelArguments, parse_arguments
from mmgem.training.building import build_model_and_processor, planned_config
from mmgem.training.checkpoints import CheckpointError, TrainingStopped, find_checkpoint
from mmgem.training.dry_run import check_memory, dry_run_report
from mmgem.training.feature_cache import DiskFullError
from mmgem.training.record import write_record
from mmgem.training.region_trainer import RegionTrainer
from mmgem.training.trainer import MMGEMTrainer


PROMPTS = {
    "1": "<image>[CAP]",
    "region-caption": "<image> x k x k, [CAP] x 64 (stage 1: <image>[CAP])",
    "region-retrieval": "none: regions and phrases are embedded",
}


def prepare(held: ExitStack) -> tuple[ModelArguments, DataArguments, MMGEMTrainer]:
    """Builds the Trainer that the command line describes, and locks `output_dir`; --dry_run prints its estimate."""
    model_args, data_args, args, dry_run_args = parse_arguments()
    checkpoint = None
    if args.resume_from_checkpoint:
        is_switch = args.resume_from_checkpoint is True  # type: ignore[comparison-overlap]
        checkpoint = find_checkpoint(str(args.output_dir if is_switch else args.resume_from_checkpoint))
    config = planned_config(model_args, checkpoint)
    if dry_run_args.dry_run:
        print(dry_run_report(config, args, data_args, dry_run_args))
        sys.exit()
    check_memory(config, args)
    if args.process_index == 0:
        held.enter_context(output_lock(str(args.output_dir)))
    transformers.set_seed(args.seed)
    load = load_pairs if args.stage == "1" else load_regions
    data_seed = args.seed if args.data_seed is None else args.data_seed
    train_dataset, eval_dataset = load(data_args, config.vision_config.image_size, data_seed)
    if eval_dataset is not None:
        eval_dataset[0]  # raises before training if none of its examples can be read
    model, processor = build_model_and_processor(model_args, train_dataset, data_args.max_length, checkpoint)
    parameters = model.num_parameters()
    options: dict[str, Any] = {"max_bad_fraction": data_args.max_bad_fraction}
    options["model_settings"] = vars(model_args).copy()
    if args.stage == "1":
        options["pack_length"] = data_args.pack_length if data_args.packing else 0
    else:
        del options["model_settings"]["init_from"]  # the adapter recognises its base, which may have been moved
    trainer_class = MMGEMTrainer if args.stage == "1" else RegionTrainer
    trainer = trainer_class(model, args, processor, train_dataset, eval_dataset, **options)  # type: ignore[arg-type]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    kind = "pairs" if args.stage == "1" else "pictures"
    size = f"{len(train_dataset)} {kind}" if isinstance(train_dataset, PairDataset) else "streamed pairs"
    print(f"{parameters / 1e6:.2f} M parameters, {trained / 1e6:.3g} M trained; {size}")
    return model_args, data_args, trainer


def main() -> None:
    """Runs train.py with `output_dir` locked against other runs."""
    with ExitStack() as held:
        run(held)


def run(held: ExitStack) -> None:
    """Trains, saves, evaluates and publishes. Errors that the user can put right end the run with one line."""
    try:
        model_args, data_args, trainer = prepare(held)
    except (ValueError, OSError, HTTPError) as error:
        sys.exit(f"error: {error}")
    args = trainer.args
    try:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except (BadDataError, CheckpointError, DiskFullError, TrainingStopped) as error:
        sys.exit(f"error: {error}")
    trainer.merge_lora()
    is_first = trainer.is_world_process_zero()  # outside of the group everyone is
    try:
        trainer.save_model(_internal_call=True)  # does not push: publish() does, once the evaluation is there
        if is_first:
            Path(args.output_dir, "results.json").unlink(missing_ok=True)  # stale: belongs to the previous weights
        if is_first and "train_runtime" in result.metrics:
            write_record(trainer, model_args, data_args, result.metrics["train_runtime"])
    except (OSError, SafetensorError) as error:
        sys.exit(f"error: the trained model could not be written to {args.output_dir}: {error}")
    trainer.accelerator.wait_for_everyone()  # every process loads what the first one saved
    if trainer.eval_dataset is not None:
        try:
            evaluate(trainer, model_args, data_args)
        except (ValueError, OSError, RuntimeError) as error:
            sys.exit(f"error: {args.output_dir} is saved, but could not be evaluated: {error}")
    trainer.leave_process_group()
    if is_first and args.push_to_hub:
        publish(trainer, model_args)


def evaluate(trainer: MMGEMTrainer, model_args: ModelArguments, data_args: DataArguments) -> None:
    """Evaluates the saved model in all processes; the first one writes and prints the report."""
    args, eval_dataset, is_first = trainer.args, trainer.eval_dataset, trainer.is_world_process_zero()
    setting = {
        "dataset_id": data_args.dataset_name if is_hub_id(data_args.dataset_name) else None,
        "dataset": data_args.dataset_name or data_args.validation_file or data_args.validation_annotations,
        "split": str(eval_dataset.table.split),
        "prompt": PROMPTS[args.stage],
        "max_length": data_args.max_length,
        "dtype": str(trainer.model.dtype),
        "device": str(args.device),
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "stage": args.stage,
        "objective": args.objective,
        "caption_loss_weight": args.caption_loss_weight,
        "model": args.output_dir,
        **environment(),
    }
    # The saved files, as others will load them, not the model in memory.
    base = args.output_dir if args.stage == "1" else model_args.init_from
    model = load_checkpoint(base).to(args.device)
    if args.stage == "1":
        metrics, outputs = evaluate_model(
            model, trainer.processor, eval_dataset, args.per_device_eval_batch_size, args.caption_samples
        )
        size = len(outputs["indices"])
        setting.update(size=size, unreadable=len(eval_dataset) - size)
        sections = pair_sections(metrics, outputs, eval_dataset) if is_first else []
    else:
        model.load_adapter(args.output_dir, adapter_name=args.stage)
        shown = (model, trainer.processor, eval_dataset)
        metrics, outputs = evaluate_adapter(*shown, args.stage, args.per_device_eval_batch_size)
        size = len({region["index"] for region in outputs["stage_2"]})
        setting.update(size=size, unreadable=len(eval_dataset) - size, regions=len(outputs["stage_2"]))
        setting.update(k=model.region_grid_size, base=base)
        sections = [region_section(args.stage, metrics, outputs, *shown)] if is_first else []
    if not is_first:
        return
    report = write_report(args.output_dir, "Evaluation", sections, setting)
    if args.stage != "1":
        add_to_report_of_base(model_args.init_from, args.output_dir, sections[0])
    for name, value in metrics.items():
        print(f"{name:28} {value:.4f}")
    print(f"Report: {os.path.relpath(report)}")


def publish(trainer: MMGEMTrainer, model_args: ModelArguments) -> None:
    """Pushes the trained model, or the base with the trained adapter, as push_to_hub.py does."""
    args, repo_id, folder = trainer.args, trainer.hub_model_id, os.path.join(trainer.args.output_dir, "hub")
    model, adapters = args.output_dir, None
    if args.stage != "1":
        model = model_args.init_from
        beside = {**find_adapters(Path(model)), args.stage: Path(args.output_dir)}
        adapters = [str(path) for path in beside.values()]
    try:
        export(model, repo_id, folder, adapters)
        print(upload(folder, repo_id, args.hub_private_repo, args.hub_revision, token=args.hub_token))
    except (ValueError, OSError) as error:
        words = ["python", "push_to_hub.py", "--model", model, "--repo_id", repo_id, "--output_dir", folder]
        words += ["--adapters", *adapters] if adapters else []
        words += ["--revision", args.hub_revision] if args.hub_revision else []
        words += ["--private"] if args.hub_private_repo else []
        problem = f"error: {args.output_dir} is saved, but could not be pushed: {error}"
        sys.exit(f"{problem}\nOnce more: {shlex.join(words)}")


if __name__ == "__main__":
    main()
