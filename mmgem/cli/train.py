"""Training from the command line: `train.py` and `mmgem train`."""

import sys
from contextlib import ExitStack
from typing import Any

from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

from ..data.features import FeatureCacheError
from ..data.pairs import BadDataError
from ..hub.upload import PublishError, publish
from ..output_lock import output_lock
from ..training.arguments import parse_arguments
from ..training.building import planned_config
from ..training.checkpoints import CheckpointError, TrainingStopped, checkpoint_to_resume
from ..training.dry_run import dry_run_report
from ..training.feature_cache import DiskFullError
from ..training.memory import check_memory
from ..training.run import build_trainer, evaluate_saved, save_trained
from ..training.text_run import build_text_trainer, evaluate_text


def main(arguments: list[str] | None = None, script: str = "train.py") -> None:
    """
    Builds, trains, saves, evaluates and publishes. Errors that the user can put right end the run with one line.

    Args:
        arguments: the command line without the script; `sys.argv` by default.
        script: its name in the help.
    """
    with ExitStack() as stack:
        _main(arguments, script, stack)


def _main(arguments: list[str] | None, script: str, stack: ExitStack) -> None:
    """`stack` holds the lock of `output_dir` against other runs."""
    try:
        model_args, data_args, args, dry_run_args = parse_arguments(arguments, script)
        checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
        is_of_texts = args.stage == "text-distillation"
        config = None if is_of_texts else planned_config(model_args, checkpoint)
        if config is not None and args.dry_run:
            print(dry_run_report(config, args, data_args, dry_run_args))
            return
        if config is not None:
            check_memory(config, args)
        if args.process_index == 0:
            stack.enter_context(output_lock(str(args.output_dir)))
        trainer: Any
        if config is None:
            trainer = build_text_trainer(model_args, data_args, args)
        else:
            trainer = build_trainer(model_args, data_args, args, config, checkpoint)
    except (ValueError, OSError, HTTPError) as error:
        sys.exit(f"error: {error}")
    try:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except (BadDataError, CheckpointError, DiskFullError, FeatureCacheError, TrainingStopped) as error:
        sys.exit(f"error: {error}")
    try:
        save_trained(trainer, model_args, data_args, result.metrics.get("train_runtime"))
    except (OSError, SafetensorError) as error:
        sys.exit(f"error: the trained model could not be written to {args.output_dir}: {error}")
    if trainer.eval_dataset is not None:
        try:
            if is_of_texts:
                evaluate_text(trainer, data_args)
            else:
                evaluate_saved(trainer, model_args, data_args)
        except (ValueError, OSError, RuntimeError) as error:
            sys.exit(f"error: {args.output_dir} is saved, but could not be evaluated: {error}")
    is_first = trainer.is_world_process_zero()  # outside of the process group every process is
    trainer.leave_process_group()
    if is_first and args.push_to_hub:
        try:
            print(publish(args, str(trainer.hub_model_id), model_args.init_from))
        except PublishError as error:
            sys.exit(f"error: {error}")
