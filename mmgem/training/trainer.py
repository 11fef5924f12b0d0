"""The Trainer of stage 1: transformers' own, with the joint loss over all processes. Stage 2 builds on it."""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from ..data.collator import MODEL_INPUTS, PairCollator
from ..data.pairs import BadDataError, PairDataset
from ..data.shards import ShardStream
from ..evaluation.evaluator import evaluate_model
from ..evaluation.sharing import gather_parts, report_failure
from ..evaluation.tasks import run_tasks
from ..modeling_mmgem import MMGEMModel, contrastive_loss
from ..processing import MMGEMProcessor
from .arguments import MMGEMTrainingArguments
from .checkpoints import TrainingStopped, find_checkpoint, writing
from .checks import check_packing, check_parallelism, check_positions, check_precision
from .fsdp import keep_temperature_in_float32
from .gathering import GatherWithGradient
from .gradient_cache import Embeddings, cached_backward, refuse_dropout
from .lora import add_lora
from .resuming import RunSettings, check_settings, run_settings
from .stages import check_optimizer, freeze_parameters, make_optimizer
from .stream_progress import StreamProgress


logger = logging.get_logger(__name__)

DATA_BOUND = 1 / 3  # share of the time spent waiting for data from which on the log says so


class MMGEMTrainer(Trainer):
    """
    Trains stage 1 (paper, equation 4) on a [`PairDataset`] or a [`ShardStream`].

    The contrastive loss sees the embeddings of all processes, with their gradient; captions are averaged over all
    tokens of a step. Gradients are those of one process that holds the whole batch. Under gradient accumulation each
    micro-batch has its own negatives, and the mean of their losses counts.

    Args:
        processor: saved with every checkpoint.
        max_bad_fraction: share of unreadable examples that ends the run; a stream's are counted only.
        pack_length: see [`PairCollator`].
        model_settings: names and values, beside those of `args`, that a resumed run must have in common with this one.
    """

    args: MMGEMTrainingArguments
    model: MMGEMModel
    train_dataset: PairDataset | ShardStream

    def __init__(
        self,
        model: MMGEMModel,
        args: MMGEMTrainingArguments,
        processor: MMGEMProcessor,
        train_dataset: PairDataset | ShardStream,
        eval_dataset: PairDataset | None = None,
        max_bad_fraction: float = 0.01,
        pack_length: int = 0,
        model_settings: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        batch_size = args.train_batch_size * args.world_size
        if isinstance(train_dataset, ShardStream):
            train_dataset.rank, train_dataset.world_size = args.process_index, args.world_size
            args.ignore_data_skip = True  # it starts where it should by itself
            if args.max_steps <= 0:
                raise ValueError("A stream of shards has no end: set --max_steps.")
        elif len(train_dataset) < batch_size:
            raise ValueError(
                f"{len(train_dataset)} training examples do not fill one batch of {batch_size}; lower "
                "--per_device_train_batch_size."
            )
        if args.mini_batch_size:
            refuse_dropout(model)
        check_optimizer(args)
        if args.torch_compile:
            # How many rows, captions' tokens and [EMB] there are differs from step to step: one graph for all.
            torch._dynamo.config.capture_dynamic_output_shape_ops = True
            torch._dynamo.config.capture_scalar_outputs = True
        sizes = (processor.image_processor.size, getattr(processor.image_processor, "crop_size", None) or {})
        sides = [size.get(name) or 0 for size in sizes for name in ("shortest_edge", "height", "width")]
        train_dataset.least_side = max(sides) if processor.image_processor.do_resize else 0
        trained = self.make_trainable(model, args, processor)
        check_precision(trained)
        check_positions(model, processor.max_length + 2)  # <image> and [CAP] come on top
        super().__init__(
            model=trained,  # type: ignore[arg-type]
            args=args,
            data_collator=self.make_collator(processor, args, pack_length),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            **kwargs,
        )
        fsdp = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        check_parallelism(args, fsdp, self.is_deepspeed_enabled)
        if fsdp is not None:
            keep_temperature_in_float32(model, self.accelerator)
        self.processor = processor
        self.max_bad_fraction = max_bad_fraction
        self.loss_is_scaled_for_ga = True
        self.bad_examples: dict[int | str, str] = {}
        self.bad_kinds: Counter[str] = Counter()
        self.progress = StreamProgress(train_dataset, args) if isinstance(train_dataset, ShardStream) else None
        self.truncated = self.left_out = self.seen = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._logit_scale: torch.Tensor | None = None
        self._resumed_from: str | None = None
        self._steps_since_log = 0
        self._interval = {"start": time.perf_counter(), "data": 0.0, "samples": 0}
        self._settings = run_settings(args, model_settings or {})
        self.add_callback(_TrainingCallback(model, train_dataset, self._resume_log))
        self.add_callback(RunSettings(self._settings))
        if pack_length:
            check_packing(model, self.accelerator)

    def make_trainable(
        self, model: MMGEMModel, args: MMGEMTrainingArguments, processor: MMGEMProcessor
    ) -> MMGEMModel | PeftModel:
        """Freezes what this stage does not train; returns the model, or PEFT's around it."""
        lora = add_lora(model, args.lora_rank, args.lora_alpha) if args.lora_rank else None
        freeze_parameters(model, args.objective, args.freeze)
        return model if lora is None else lora

    def make_collator(self, processor: MMGEMProcessor, args: MMGEMTrainingArguments, pack_length: int) -> PairCollator:
        return PairCollator(processor, args.objective, pack_length, args.mini_batch_size)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.args, self.model if model is None else model)
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
            self._count_bad(batch.pop("bad"))
            if "position" in batch:
                assert self.progress is not None
                self.progress.advance(*batch.pop("position"))
            self.truncated += batch.pop("truncated")
            self.left_out += batch.pop("left_out", 0)
            pictures = "patch_features" if "patch_features" in batch else "pixel_values"
            samples = sum(len(part[pictures]) for part in batch.get("mini_batches", [batch]))
            self.seen += len(batch["pair_ids"]) if "boxes" in batch else samples
            self._interval["samples"] += samples * self.args.world_size
        return batches, num_items

    def _count_bad(self, bad: dict[int | str, str]) -> None:
        """By kind, which is what stands before the colon; a table's examples once, however often they come up."""
        if isinstance(self.train_dataset, ShardStream):
            self.bad_kinds.update(reason.partition(":")[0] for reason in bad.values())
            if len(self.bad_examples) < 100:  # there may be millions
                self.bad_examples.update(bad)
            return
        new = {index: reason for index, reason in bad.items() if index not in self.bad_examples}
        self.bad_kinds.update(reason.partition(":")[0] for reason in new.values())
        self.bad_examples.update(new)
        limit = self.max_bad_fraction * len(self.train_dataset) / self.args.world_size
        if len(self.bad_examples) > limit:
            raise BadDataError(
                f"{self._describe_bad_examples()}, more than max_bad_fraction={self.max_bad_fraction} allows; repair "
                "the data or raise --max_bad_fraction."
            )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """L_Emb + weight L_Gen, such that sums over micro-batches and means over processes are the batch's loss."""
        embeddings, outputs, loss = self._forward(model, inputs, num_items_in_batch)
        if self.args.objective != "caption":
            contrastive = self._contrastive_loss(*embeddings, inputs["pair_ids"])
            loss = contrastive if loss is None else loss + contrastive
        return (loss, outputs) if return_outputs else loss

    def _forward(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> tuple[Embeddings, Any, torch.Tensor | None]:
        """Embeddings in pairs, the model's output, and the weighted caption loss (None without labels)."""
        model_inputs = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        outputs = model(**model_inputs, num_items_in_batch=num_items_in_batch, return_loss=False, logits_to_keep=1)
        texts, images = outputs.text_embeds, outputs.image_embeds
        if texts is not None:
            texts = texts[inputs["text_index"]]
        if "region_mask" in inputs:
            images = images[inputs["region_mask"]]
        self._logit_scale = outputs.logit_scale.detach() if self.args.objective != "caption" else None
        loss = None
        if outputs.caption_loss is not None:
            # num_items_in_batch counts the tokens of all processes, whose gradients will be averaged.
            caption = outputs.caption_loss * self.args.world_size
            self._add_to_log("caption_loss", caption)
            loss = self.args.caption_loss_weight * caption
        return (texts, images, outputs.logit_scale), outputs, loss

    def _contrastive_loss(
        self, texts: torch.Tensor, images: torch.Tensor, logit_scale: torch.Tensor, pair_ids: torch.Tensor
    ) -> torch.Tensor:
        """Against the pairs of all processes, without those that share the row's caption or picture."""
        all_texts, all_images, all_ids, offset = texts, images, pair_ids, 0
        if self.args.world_size > 1:
            all_texts, all_images, all_ids = map(GatherWithGradient.apply, (texts, images, pair_ids))
            offset = dist.get_rank() * len(texts)
        loss = contrastive_loss(texts, images, logit_scale, all_texts, all_images, offset, pair_ids, all_ids)
        loss = loss / self.current_gradient_accumulation_steps
        self._add_to_log("contrastive_loss", loss)
        return loss

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One batch; through the gradient cache where it comes in mini-batches."""
        if "mini_batches" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        optimizer: Any = self.optimizer
        if hasattr(optimizer, "train"):  # schedule-free ones
            optimizer.train()
        mini_batches: Any = self._prepare_inputs(inputs)["mini_batches"]
        pair_ids = torch.cat([mini_batch["pair_ids"] for mini_batch in mini_batches])
        own_losses = []

        def embed(mini_batch: dict[str, Any]) -> Embeddings:
            sentences = {"pixel_values": mini_batch["pixel_values"], **mini_batch["sentences"]}
            with self.compute_loss_context_manager():
                return self._forward(model, sentences)[0]

        def forward(mini_batch: dict[str, Any]) -> tuple[Embeddings, torch.Tensor | None]:
            with self.compute_loss_context_manager():
                embeddings, _, loss = self._forward(model, mini_batch, num_items_in_batch)
            own_losses.append(torch.zeros(()) if loss is None else loss.detach())
            return embeddings, loss

        # Accelerate's own does nothing for a single process, which torchrun wraps all the same.
        is_ddp = isinstance(model, torch.nn.parallel.DistributedDataParallel)
        contrastive = cached_backward(
            mini_batches,
            embed,
            lambda texts, images, scale: self._contrastive_loss(texts, images, scale, pair_ids),
            forward,
            self.accelerator.backward,
            model.no_sync if is_ddp else lambda: self.accelerator.no_sync(model),  # type: ignore[arg-type]
        )
        return contrastive + torch.stack(own_losses).sum().to(contrastive.device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        parts = [part for batch in batch_samples for part in batch.get("mini_batches", [batch])]
        return super()._get_num_items_in_batch(parts, device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's formula counts neither pictures nor packed rows

    def _add_to_log(self, name: str, loss: torch.Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + loss.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds both losses, tau, samples/s and the share of time that went into waiting for data."""
        if "train_runtime" in logs:
            self._time_by_steady_clock(logs)
        if "loss" in logs and self._sums:
            steps = self._steps_since_log
            self._steps_since_log = 0
            logs.update({name: total / steps for name, total in self._mean_sums().items()})
            self._sums.clear()
            if self._logit_scale is not None:
                logs["tau"] = 1 / self._logit_scale.item()
            now = time.perf_counter()
            elapsed = now - self._interval["start"]
            logs["samples_per_second"] = round(self._interval["samples"] / elapsed, 1)
            logs["data_time_fraction"] = round(self._interval["data"] / elapsed, 3)
            if logs["data_time_fraction"] > DATA_BOUND and self.state.global_step > self.args.logging_steps:
                logger.warning_once(
                    "Data is the bottleneck: more than a third of the time went into waiting for it. Raise "
                    f"--dataloader_num_workers ({self.args.dataloader_num_workers} now), or store smaller pictures."
                )
            self._interval = {"start": now, "data": 0.0, "samples": 0}
        super().log(logs, start_time)

    def _mean_sums(self) -> dict[str, float]:
        """
        The sums of the losses since the last log, averaged over processes.

        Raises:
            TrainingStopped: if a loss is NaN or infinite, or 1 / tau is not a positive finite number.
        """
        totals = {}
        for name, value in self._sums.items():
            totals[name] = float(self.accelerator.reduce(value.clone(), "mean") if self.args.world_size > 1 else value)
        # In 16-bit floats GradScaler passes over a step that is out of range.
        wrong = [f"{name} is {total}" for name, total in totals.items() if not math.isfinite(total)]
        if self.accelerator.scaler is not None:
            wrong = []
        if self._logit_scale is not None and not (0 < (scale := self._logit_scale.item()) < math.inf):
            wrong.append(f"1 / tau is {scale}")
        self._stop_if(wrong)
        return totals

    def _refuse_diverged(self) -> None:
        """
        Called before the model is saved. A gradient that was NaN shows in the weights at once, but in the losses only
        a step later.

        Raises:
            TrainingStopped: in all processes, if a loss since the last log or a trained weight is not finite.
        """
        self._mean_sums()
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        # Under FSDP each process holds a part of every weight.
        parts = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in trained.values()]
        finite = torch.stack([part.detach().isfinite().all() for part in parts]).float()
        if self.args.world_size > 1:
            finite = self.accelerator.reduce(finite, "mean")
        self._stop_if([f"{name} holds NaN or infinity" for name, x in zip(trained, finite.tolist()) if x < 1])

    def _stop_if(self, wrong: list[str]) -> None:
        if wrong:
            raise TrainingStopped(
                f"Training diverged at step {self.state.global_step}, or since the last log: {wrong[0]}. Start again "
                f"with a lower --learning_rate ({self.args.learning_rate:g} now) or more --warmup_steps; from an "
                "earlier checkpoint's weights, with --init_from."
            )

    def _time_by_steady_clock(self, logs: dict[str, float]) -> None:
        """Trainer reads the clock on the wall, which may be set while it trains."""
        seconds = time.perf_counter() - self._started
        for name in ("train_samples_per_second", "train_steps_per_second"):
            if name in logs:
                logs[name] = round(logs[name] * logs["train_runtime"] / seconds, 3)
        logs["train_runtime"] = round(seconds, 4)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As [`Trainer.train`]; resumes from the last whole checkpoint and reports what was skipped or cut.

        Raises:
            CheckpointError: for a checkpoint of a run with other settings.
            TrainingStopped: where training diverged, or an evaluation failed.
            BadDataError: for too many unreadable examples.
        """
        self._started = time.perf_counter()
        if resume_from_checkpoint:
            folder = self.args.output_dir if resume_from_checkpoint is True else resume_from_checkpoint
            resume_from_checkpoint = self._resumed_from = find_checkpoint(str(folder))
            check_settings(resume_from_checkpoint, self._settings)
            if self.progress is not None:
                self.progress.resume(resume_from_checkpoint)
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
            if state.global_step >= self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]:
                return self._load_finished(state, resume_from_checkpoint)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self._refuse_diverged()
        if self.bad_examples:
            logger.warning(f"{self._describe_bad_examples()}; the next stood in for each.")
        if self.truncated:
            logger.warning(
                f"{self.truncated} of {self.seen} captions were longer than max_length={self.processor.max_length} "
                "tokens and were cut; [EMB] stayed."
            )
        if self.left_out:
            logger.warning(
                f"{self.left_out} regions, beside {self.seen} seen, were left out: they have no area, or lie outside "
                "their picture or what the image processor's centre crop leaves of it."
            )
        return result

    def _load_finished(self, state: TrainerState, checkpoint: str) -> TrainOutput:
        """The weights that a finished run ended with. Trainer would train one more step."""
        logger.warning(f"{checkpoint} has all steps of this run: nothing is left to train.")
        self.state = state
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        self._refuse_diverged()
        return TrainOutput(state.global_step, 0.0, {})

    def _describe_bad_examples(self) -> str:
        index, reason = min(self.bad_examples.items(), key=lambda item: str(item[0]).zfill(12))
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.bad_kinds.most_common())
        total = self.bad_kinds.total()
        return f"{total} training examples could not be read ({kinds}; such as {index}: {reason})"

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """A stream's loader as it is: each process has its own part already."""
        if not isinstance(self.train_dataset, ShardStream):
            return super().get_train_dataloader()
        return torch.utils.data.DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._refuse_diverged()
        with writing(os.path.join(str(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Beside each process's random state, how far it is in its stream, and in the interval of the log."""
        super()._save_rng_state(output_dir)
        interval = {"loss": self._tr_loss.item(), "logged_at": self._globalstep_last_logged}
        sums = {name: value.item() for name, value in self._sums.items()}
        with open(self._log_state(output_dir), "w", encoding="utf-8") as file:
            json.dump({**interval, "steps": self._steps_since_log, "sums": sums}, file)
        if self.progress is not None:
            self.progress.save(output_dir)
        # What makes a checkpoint whole, trainer_state.json, comes after this: nobody may lag behind.
        self.accelerator.wait_for_everyone()

    def _log_state(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"log_{self.args.process_index}.json")

    def _resume_log(self) -> None:
        """So that what is logged next is the mean over its whole interval, as of the uninterrupted run."""
        if self._resumed_from is None or not os.path.isfile(self._log_state(self._resumed_from)):
            return
        with open(self._log_state(self._resumed_from), encoding="utf-8") as file:
            state = json.load(file)
        self._tr_loss += state["loss"]
        self._globalstep_last_logged, self._steps_since_log = state["logged_at"], state["steps"]
        self._sums = {name: torch.tensor(value, device=self.args.device) for name, value in state["sums"].items()}

    def merge_lora(self) -> None:
        """Makes one plain model of LoRA's adapter and what it was trained beside."""
        if self.args.lora_rank and isinstance(self.model, PeftModel):
            self.model = self.model.merge_and_unload()  # type: ignore[assignment,operator]

    def _evaluate(self, trial: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        """
        As Trainer's, which runs it while training.

        Raises:
            TrainingStopped: where the evaluation of any process fails, once the run is saved.
        """
        self._mean_sums()
        try:
            metrics = super()._evaluate(trial, *args, **kwargs)
            best, names = self.args.metric_for_best_model, [name[5:] for name in metrics if name.startswith("eval_")]
            if best is not None and best.removeprefix("eval_") not in names:
                raise ValueError(f"metric_for_best_model {best!r} is none of {', '.join(names)}")
            gather_parts([])  # the last place at which another process can report its failure
            return metrics
        except Exception as error:
            report_failure(error)
            step, saved = self.state.global_step, "nothing was trained yet"
            if step > 0:
                self._save_checkpoint(self.model, trial)
                saved = f"{PREFIX_CHECKPOINT_DIR}-{step} is saved, to go on from with --resume_from_checkpoint true"
                if self.args.save_only_model:
                    remedy = "without its optimizer: start a new run from it with --init_from"
                    saved = f"{PREFIX_CHECKPOINT_DIR}-{step} is saved, {remedy}"
            raise TrainingStopped(
                f"The evaluation at step {step} failed ({type(error).__name__}: {error}). Repair what it names, or "
                f"pass --eval_strategy no; {saved}."
            ) from error

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Retrieval and held-out L_Gen, and what `--evaluation_config` asks for; every process does its part."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        model = self.accelerator.unwrap_model(self.model)
        # Trainer's autocast covers forward alone; get_embedding and generate are to compute as training does.
        with self.accelerator.autocast():
            metrics = evaluate_model(model, self.processor, dataset, self.args.per_device_eval_batch_size)[0]
            if self.args.evaluation_config:
                for section in run_tasks(model, self.processor, self.args.evaluation):
                    metrics.update({f"suite_{name}": value for name, value in section.metrics.items()})
        return self._log_metrics(metrics, metric_key_prefix)

    def _log_metrics(self, metrics: dict[str, float], metric_key_prefix: str) -> dict[str, float]:
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


class _TrainingCallback(TrainerCallback):
    """Tells the data which epoch it is, and holds tau at its lower bound of 0.01."""

    def __init__(self, model: MMGEMModel, train_dataset: PairDataset | ShardStream, resume_log: Callable[[], None]):
        self.model = model
        self.train_dataset = train_dataset
        self.resume_log = resume_log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.resume_log()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.train_dataset, PairDataset):
            self.train_dataset.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.train_dataset, ShardStream):  # Trainer counts from where it was resumed
            state.epoch = state.global_step / args.max_steps

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Beyond the bound forward clamps, and its gradient is zero: the parameter could not come back by itself.
        with torch.no_grad():
            self.model.logit_scale.weight.clamp_(max=self.model.config.logit_scale_max_value)
