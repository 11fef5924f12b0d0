"""
Trains stage 1 of MM-GEM (L = L_Emb + L_Gen), evaluates it, and saves a checkpoint.

    accelerate launch train.py --config configs/scenes.yaml [--any_option value]
    python train.py --train_file pairs.parquet --caption_column captions --output_dir outputs/mine --max_steps 1000
"""

import os
import sys

import torch
import transformers
from safetensors import SafetensorError

import mmgem
from mmgem import MMGEMModel
from mmgem.data.loading import load_pairs
from mmgem.data.pairs import BadDataError, PairDataset
from mmgem.evaluation.evaluator import evaluate_model
from mmgem.evaluation.report import current_commit, write_report
from mmgem.training.arguments import DataArguments, parse_arguments
from mmgem.training.building import build_model_and_processor, initial_image_size, planned_config
from mmgem.training.checkpoints import CheckpointError
from mmgem.training.dry_run import dry_run_report
from mmgem.training.trainer import MMGEMTrainer


def prepare() -> tuple[DataArguments, MMGEMTrainer]:
    """From the command line to a Trainer; with --dry_run, to an estimate and the end."""
    model_args, data_args, args, dry_run_args = parse_arguments()
    if dry_run_args.dry_run:
        print(dry_run_report(planned_config(model_args), args, data_args, dry_run_args))
        sys.exit()
    transformers.set_seed(args.seed)
    train_dataset, eval_dataset = load_pairs(data_args, initial_image_size(model_args), args.seed)
    if eval_dataset is not None:
        eval_dataset[0]  # where nothing of it can be read, better now than after training
    model, processor = build_model_and_processor(model_args, train_dataset, data_args.max_length)
    parameters = model.num_parameters()
    trainer = MMGEMTrainer(
        model,
        args,
        processor,
        train_dataset,
        eval_dataset,
        max_bad_fraction=data_args.max_bad_fraction,
        pack_length=data_args.pack_length if data_args.packing else 0,
    )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    size = f"{len(train_dataset)} pairs" if isinstance(train_dataset, PairDataset) else "streamed pairs"
    print(f"{parameters / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained; {size}")
    return data_args, trainer


def main() -> None:
    """Train, save, evaluate. What the user can put right ends with a line; a traceback is a fault of ours."""
    try:
        data_args, trainer = prepare()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    args, eval_dataset = trainer.args, trainer.eval_dataset
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except (BadDataError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    trainer.merge_lora()
    try:
        trainer.save_model()
    except (OSError, SafetensorError) as error:
        sys.exit(f"error: the trained model could not be written to {args.output_dir}: {error}")
    is_first = trainer.is_world_process_zero()  # outside of the group everyone is
    trainer.leave_process_group()
    if eval_dataset is None or not is_first:
        return
    model = MMGEMModel.from_pretrained(args.output_dir).to(args.device)  # what others will load
    metrics, outputs = evaluate_model(
        model, trainer.processor, eval_dataset, args.per_device_eval_batch_size, args.caption_samples
    )
    setting = {
        "dataset": data_args.dataset_name or data_args.validation_file,
        "split": str(eval_dataset.table.split),
        "prompt": "<image>[CAP]",
        "max_length": data_args.max_length,
        "dtype": str(model.dtype),
        "device": str(model.device),
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "objective": args.objective,
        "caption_loss_weight": args.caption_loss_weight,
        "model": args.output_dir,
        "commit": current_commit(),
        "versions": {"mmgem": mmgem.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }
    for name, value in metrics.items():
        print(f"{name:28} {value:.4f}")
    report = write_report(args.output_dir, metrics, setting, outputs, eval_dataset)
    print(f"Report: {os.path.relpath(report)}")


if __name__ == "__main__":
    main()
