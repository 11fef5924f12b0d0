"""The steps of train.py of the stage text-distillation, beside those of run.py."""

import os
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..data.arguments import DataArguments
from ..data.texts import load_texts
from ..evaluation.report import Section, environment, table, write_report
from .arguments import MMGEMTrainingArguments, data_seed
from .model_arguments import ModelArguments
from .text_trainer import TextDistillationTrainer
from .train_data import embedded_by_teacher


def build_text_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: MMGEMTrainingArguments
) -> TextDistillationTrainer:
    """
    Loads the texts, has the teacher embed them unless an earlier run did, loads the language model, and prints the
    size of both.
    """
    transformers.set_seed(args.seed)
    if args.disable_tqdm:
        transformers.utils.logging.disable_progress_bar()
    train_dataset, eval_dataset = load_texts(data_args, data_seed(args))
    if data_args.teacher is not None:
        tables = [train_dataset] if eval_dataset is None else [train_dataset, eval_dataset]
        train_dataset, *held_out = embedded_by_teacher(tables, data_args.teacher, args)
        eval_dataset = held_out[0] if held_out else None
    name: Any = model_args.text_model_name_or_path
    text_kwargs: Any = model_args.text_kwargs
    causal_lm = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **text_kwargs)
    if model_args.attn_implementation is not None:
        causal_lm.set_attn_implementation(model_args.attn_implementation)
    trainer = TextDistillationTrainer(
        causal_lm,
        args,
        AutoTokenizer.from_pretrained(name, **text_kwargs),
        train_dataset,
        eval_dataset,
        max_length=data_args.max_length,
        model_settings={
            **{key: getattr(model_args, key) for key in ("text_model_name_or_path", "text_kwargs")},
            **{key: getattr(data_args, key) for key in ("teacher", "teacher_column", "max_length")},
        },
    )
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    size = f"{causal_lm.num_parameters() / 1e6:.2f} M parameters, {trained / 1e6:.3g} M trained"
    print(f"{size}; {len(train_dataset)} texts")
    if eval_dataset is not None:
        trainer.untrained_metrics = trainer.evaluate(metric_key_prefix="untrained")
    return trainer


def evaluate_text(trainer: TextDistillationTrainer, data_args: DataArguments) -> None:
    """Evaluates the trained model on the held-out texts, beside what it was before; the first process reports."""
    metrics = trainer.evaluate(metric_key_prefix="distilled") | trainer.untrained_metrics
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    setting = {
        "dataset": data_args.dataset_name or data_args.validation_file,
        "texts": len(trainer.eval_dataset),  # type: ignore[arg-type]
        "teacher": data_args.teacher,
        "prompt": args.distillation_prompt,
        "max_length": data_args.max_length,
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "stage": args.stage,
        **environment(),
    }
    section = Section("Agreement with the teacher", metrics, table(metrics))
    report = write_report(str(args.output_dir), "Evaluation", [section], setting)
    for key, value in metrics.items():
        print(f"{key:28} {value:.4f}")
    print(f"Report: {os.path.relpath(report)}")
