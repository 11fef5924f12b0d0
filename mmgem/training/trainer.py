"""The Trainer of stage 1: transformers' own, with the joint loss over all processes."""

import json
import os
import re
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..data.collator import PairCollator
from ..data.pairs import BadDataError, PairDataset
from ..evaluation.evaluator import evaluate_model
from ..modeling_mmgem import MMGEMModel, contrastive_loss
from ..processing import MMGEMProcessor
from .arguments import MMGEMTrainingArguments
from .gathering import GatherWithGradient
from .stages import freeze_parameters, parameter_groups


logger = logging.get_logger(__name__)


class MMGEMTrainer(Trainer):
    """
    Trains stage 1 (paper, equation 4) on a [`PairDataset`].

    The contrastive loss sees the embeddings of all processes, with their gradient; captions are averaged over all
    tokens of a step. Gradients are those of one process that holds the whole batch. Under gradient accumulation each
    micro-batch has its own negatives, and the mean of their losses counts.

    Args:
        processor: saved with every checkpoint.
        max_bad_fraction: share of unreadable examples that ends the run.
        pack_length: see [`PairCollator`].
    """

    args: MMGEMTrainingArguments
    model: MMGEMModel
    train_dataset: PairDataset

    def __init__(
        self,
        model: MMGEMModel,
        args: MMGEMTrainingArguments,
        processor: MMGEMProcessor,
        train_dataset: PairDataset,
        eval_dataset: PairDataset | None = None,
        max_bad_fraction: float = 0.01,
        pack_length: int = 0,
        **kwargs: Any,
    ):
        batch_size = args.train_batch_size * args.world_size
        if len(train_dataset) < batch_size:
            raise ValueError(
                f"{len(train_dataset)} training pairs do not fill one batch of {batch_size}; lower "
                "--per_device_train_batch_size."
            )
        freeze_parameters(model, args.objective, args.freeze)
        super().__init__(
            model=model,
            args=args,
            data_collator=PairCollator(processor, args.objective, pack_length),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            **kwargs,
        )
        check_parallelism(args, sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self.processor = processor
        self.max_bad_fraction = max_bad_fraction
        self.loss_is_scaled_for_ga = True
        self.bad_examples: dict[int, str] = {}
        self.truncated = self.seen = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._steps_since_log = 0
        self._interval = {"start": time.perf_counter(), "data": 0.0, "samples": 0}
        self.add_callback(_Stage1Callback(model, train_dataset))
        if pack_length:
            self._check_packing()

    @torch.no_grad()
    def _check_packing(self) -> None:
        """
        Two sequences in one row must not see each other. Some language models, and flash attention where there are
        several rows, pay no heed to positions that restart.

        Raises:
            ValueError: where they do, with the remedy.
        """
        model = self.model
        was_training = model.training
        model.eval()
        ids = torch.arange(16, device=model.device).view(2, 8) % model.config.text_config.vocab_size
        ids[:, -1] = model.config.emb_token_id
        rows = torch.stack([ids.flatten(), ids.flip(0).flatten()])
        positions = torch.arange(8, device=model.device).repeat(2, 2)
        with self.accelerator.autocast():
            alone: Any = model.get_text_features(ids)
            packed: Any = model.get_text_features(rows, position_ids=positions)
        model.train(was_training)
        expected = alone.last_hidden_state.float()
        error = (packed.last_hidden_state[0].view_as(expected) - expected).abs().max() / expected.abs().max()
        exact = model.dtype == torch.float32 and self.accelerator.mixed_precision == "no"
        if not error < (1e-3 if exact else 0.1):
            raise ValueError(
                f"Language model '{model.config.text_config.model_type}' with "
                f"{model.language_model.config._attn_implementation} attention does not keep the sequences of a "
                "packed row apart; pass --packing false, or choose another attention."
            )

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args = self.args
            groups = parameter_groups(
                self.model if model is None else model,
                args.learning_rate,
                args.projection_lr_multiplier,
                args.weight_decay,
            )
            if args.kept_optimizer:
                import pytorch_optimizer

                options: dict[str, Any] = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
                optimizer_class = getattr(pytorch_optimizer, args.kept_optimizer)
                self.optimizer = optimizer_class(
                    groups, **{"lr": args.learning_rate, **options, **args.optimizer_options}
                )
            else:
                optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, self.model)
                self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The next micro-batches; times the wait for them and counts what was bad or cut."""
        self._steps_since_log += 1
        start = time.perf_counter()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._interval["data"] += time.perf_counter() - start
        for batch in batches:
            self.bad_examples.update(batch.pop("bad"))
            self.truncated += int(batch.pop("truncated"))
            samples = len(batch["pixel_values"])
            self.seen += samples
            self._interval["samples"] += samples * self.args.world_size
        limit = self.max_bad_fraction * len(self.train_dataset) / self.args.world_size
        if len(self.bad_examples) > limit:
            raise BadDataError(
                f"{self._describe_bad_examples()}, more than max_bad_fraction={self.max_bad_fraction} allows; repair "
                "the data or raise --max_bad_fraction."
            )
        return batches, num_items

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """L_Emb + weight L_Gen, such that sums over micro-batches and means over processes are the batch's loss."""
        pair_ids = inputs.pop("pair_ids", None)
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        losses = {}
        if self.args.objective != "caption":
            losses["contrastive_loss"] = (
                self._global_contrastive_loss(outputs, pair_ids) / self.current_gradient_accumulation_steps
            )
        if self.args.objective != "contrastive":
            # num_items_in_batch counts the tokens of all processes, whose gradients will be averaged.
            losses["caption_loss"] = outputs.caption_loss * self.args.world_size
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        weights = {"contrastive_loss": 1.0, "caption_loss": self.args.caption_loss_weight}
        loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        return (loss, outputs) if return_outputs else loss

    def _global_contrastive_loss(self, outputs: Any, pair_ids: torch.Tensor) -> torch.Tensor:
        """Against the pairs of all processes, without those that share the row's caption or picture."""
        texts, images = outputs.text_embeds, outputs.image_embeds
        all_texts, all_images, all_ids, offset = texts, images, pair_ids, 0
        if self.args.world_size > 1:
            all_texts, all_images, all_ids = map(GatherWithGradient.apply, (texts, images, pair_ids))
            offset = dist.get_rank() * len(texts)
        duplicates = (pair_ids[:, None] == all_ids[None]).any(-1)
        duplicates[:, offset : offset + len(texts)].fill_diagonal_(False)
        return contrastive_loss(texts, images, outputs.logit_scale, all_texts, all_images, offset, duplicates)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds both losses, tau, samples/s and the share of time that went into waiting for data."""
        if "loss" in logs and self._sums:
            steps = self._steps_since_log
            self._steps_since_log = 0
            for name, value in self._sums.items():
                total = self.accelerator.reduce(value.clone(), "mean") if self.args.world_size > 1 else value
                logs[name] = float(total) / steps
            self._sums.clear()
            if self.args.objective != "caption":
                model = self.accelerator.unwrap_model(self.model)
                logs["tau"] = (-model.logit_scale.detach().float()).exp().item()
            now = time.perf_counter()
            elapsed = now - self._interval["start"]
            logs["samples_per_second"] = round(self._interval["samples"] / elapsed, 1)
            logs["data_time_fraction"] = round(self._interval["data"] / elapsed, 3)
            self._interval = {"start": now, "data": 0.0, "samples": 0}
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As [`Trainer.train`]; resumes from the last whole checkpoint and reports what was skipped or cut."""
        if resume_from_checkpoint:
            folder = self.args.output_dir if resume_from_checkpoint is True else resume_from_checkpoint
            resume_from_checkpoint = find_checkpoint(str(folder))
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.bad_examples:
            logger.warning(f"{self._describe_bad_examples()}; each was replaced by the next.")
        if self.truncated:
            logger.warning(
                f"{self.truncated} of {self.seen} captions were longer than max_length={self.processor.max_length} "
                "tokens and were cut; [EMB] stayed."
            )
        return result

    def _describe_bad_examples(self) -> str:
        index = min(self.bad_examples)
        return (
            f"{len(self.bad_examples)} training examples could not be read (such as number {index}: "
            f"{self.bad_examples[index]})"
        )

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Retrieval and held-out L_Gen; every process computes all of it."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        model = self.accelerator.unwrap_model(self.model)
        metrics = evaluate_model(model, self.processor, dataset, self.args.per_device_eval_batch_size)[0]
        logs = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        self._interval = {"start": time.perf_counter(), "data": 0.0, "samples": 0}
        return logs

    def leave_process_group(self) -> None:
        """To be called when all is trained and saved: the processes part here."""
        self.accelerator.wait_for_everyone()
        # DistributedDataParallel must go first. Where it holds the last reference to the process group, it waits for
        # gloo's threads while these wait for the interpreter's lock.
        self.model_wrapped = self.callback_handler.model = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()


def check_parallelism(args: MMGEMTrainingArguments, sharded: bool) -> None:
    """
    Refuses what would not train on the gradients of the whole batch.

    Raises:
        ValueError: naming it, with the remedy.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"This one process sees {args.n_gpu} GPUs, and would split each batch without its negatives; start one "
            "process per GPU (accelerate launch), or set CUDA_VISIBLE_DEVICES."
        )
    if sharded:
        raise ValueError("Stage 1 is made for DistributedDataParallel; FSDP and DeepSpeed are not supported yet.")
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise ValueError("Captions are averaged over the tokens of all processes: keep average_tokens_across_devices.")


class _Stage1Callback(TrainerCallback):
    """Tells the data which epoch it is, and holds tau at its lower bound of 0.01."""

    def __init__(self, model: MMGEMModel, train_dataset: PairDataset):
        self.model = model
        self.train_dataset = train_dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.train_dataset.set_epoch(int(state.epoch or 0))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Beyond the bound forward clamps, and its gradient is zero: the parameter could not come back by itself.
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=self.model.config.logit_scale_max_value)


def find_checkpoint(folder: str) -> str:
    """
    The checkpoint at `folder`, or the last whole one in it. Trainer writes `trainer_state.json` last, so a checkpoint
    without it, or with half of it, was cut off.

    Raises:
        FileNotFoundError: where there is none.
    """
    if _is_whole(folder):
        return folder
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = [int(match[1]) for name in names if (match := re.fullmatch(r"checkpoint-(\d+)", name))]
    for step in sorted(steps, reverse=True):
        checkpoint = os.path.join(folder, f"checkpoint-{step}")
        if _is_whole(checkpoint):
            return checkpoint
    raise FileNotFoundError(
        f"{folder} holds no whole checkpoint (a checkpoint-N folder with {TRAINER_STATE_NAME}) to resume from; leave "
        "out --resume_from_checkpoint to start anew, or name another folder."
    )


def _is_whole(checkpoint: str) -> bool:
    try:
        with open(os.path.join(checkpoint, TRAINER_STATE_NAME), encoding="utf-8") as file:
            return isinstance(json.load(file), dict)
    except (OSError, ValueError):
        return False
