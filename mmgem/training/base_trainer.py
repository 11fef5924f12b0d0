"""What every stage's Trainer does: its log, whole checkpoints to resume from, the end of a run that diverged."""

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from ..modeling_mmgem import relational_distillation
from .arguments import MMGEMTrainingArguments
from .checkpoints import RunSettings, TrainingStopped, atomic_checkpoint, check_settings, checkpoint_to_resume
from .distributed import gather_rows
from .stages import make_optimizer


logger = logging.get_logger(__name__)

DATA_BOUND = 1 / 3  # share of the time spent waiting for data, above which the log says so


class BaseTrainer(Trainer):
    """
    A Trainer that logs the mean of each loss, tau, samples per second and the share of time spent waiting for data.
    A resumed run must have the settings of its checkpoint, and logs what the uninterrupted run would have. A run whose
    losses or weights are not finite stops.

    Args:
        settings: names and values that a resumed run must share with this one.
        others: of [`Trainer`].
    """

    args: MMGEMTrainingArguments
    model: torch.nn.Module

    def __init__(self, *args: Any, settings: dict[str, Any], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = True
        self._settings = settings
        self.add_callback(RunSettings(settings))
        self.add_callback(_OnTrainBegin(self._resume_log))
        self._sums: dict[str, torch.Tensor] = {}
        self._logit_scale: torch.Tensor | None = None
        self._steps_since_log = 0
        self._resumed_from: str | None = None
        self._started = time.perf_counter()  # of training
        self._start_interval()

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.args, self.model if model is None else model)
        return self.optimizer

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's formula counts neither images nor packed rows

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        [`Trainer.train`], which resumes from the last whole checkpoint.

        Raises:
            CheckpointError: for a checkpoint of a run with other settings.
            TrainingStopped: where training diverged, or an evaluation failed.
        """
        checkpoint = self._resumed_from = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            check_settings(checkpoint, self._settings)
            self._before_resuming(checkpoint)
            state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
            if state.global_step >= self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]:
                return self._load_finished(state, checkpoint)
        with self._around_training():
            self._started = time.perf_counter()
            self._start_interval()
            result = super().train(checkpoint, *args, **kwargs)
        self._refuse_diverged()
        return result

    def _before_resuming(self, checkpoint: str) -> None:
        """What a stage does with the checkpoint that it resumes from, beside loading it."""

    def _around_training(self) -> AbstractContextManager:
        """What a stage does before the first step, and undoes after the last."""
        return nullcontext()

    def _load_finished(self, state: TrainerState, checkpoint: str) -> TrainOutput:
        """Loads the weights that a finished run ended with. Trainer would train one more step."""
        logger.warning(f"{checkpoint} has all steps of this run: nothing is left to train.")
        self.state = state
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        self._refuse_diverged()
        return TrainOutput(state.global_step, 0.0, {})

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._refuse_diverged()
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with atomic_checkpoint(os.path.join(str(self.args.output_dir), name)):
            super()._save_checkpoint(model, trial)

    def _no_sync(self, model: torch.nn.Module) -> Callable[[], AbstractContextManager]:
        """What prevents the exchange of gradients between processes."""
        # Accelerate's own does nothing for a single process, which torchrun wraps all the same.
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            return model.no_sync
        return lambda: self.accelerator.no_sync(model)

    def merge_lora(self) -> None:
        """Merges LoRA's matrices into the weights beside which they were trained, which leaves one plain model."""
        if isinstance(self.model, PeftModel):
            self.model = self.model.merge_and_unload()  # type: ignore[assignment,operator]

    def leave_process_group(self) -> None:
        """Ends the process group. Call it when all is trained and saved."""
        self.accelerator.wait_for_everyone()
        # DistributedDataParallel must go first. Where it holds the last reference to the process group, it waits for
        # gloo's threads while these wait for the interpreter's lock.
        self.model_wrapped = self.callback_handler.model = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def _start_interval(self) -> None:
        self._interval = {"start": time.perf_counter(), "data": 0.0, "samples": 0}

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Returns the next micro-batches, and measures how long they took to come."""
        self._steps_since_log += 1
        start = time.perf_counter()
        result = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._interval["data"] += time.perf_counter() - start
        return result

    def _distillation_loss(
        self, embeds: torch.Tensor, goals: torch.Tensor, tau: float, ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        [`relational_distillation`] of this process's texts from their teacher's vectors, against those of all
        processes, without those that have the row's id.
        """
        goals, scale = goals.to(embeds.dtype), torch.tensor(1 / tau, device=embeds.device)
        (all_embeds, all_goals), offset = gather_rows(embeds, goals)
        all_ids = None if ids is None else gather_rows(ids)[0][0]
        loss = relational_distillation(embeds, goals, scale, all_embeds, all_goals, offset, ids, all_ids)
        loss = loss / self.current_gradient_accumulation_steps
        self._add_to_log("distillation_loss", loss)
        return loss

    def _add_to_log(self, name: str, loss: torch.Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + loss.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds both losses, tau, samples per second and the share of time spent waiting for data."""
        if "train_runtime" in logs:
            self._time_by_steady_clock(logs)
        if "loss" in logs and self._sums:
            logs.update({name: total / self._steps_since_log for name, total in self._mean_sums().items()})
            self._steps_since_log = 0
            self._sums.clear()
            if self._logit_scale is not None:
                logs["tau"] = 1 / self._logit_scale.item()
            elapsed = time.perf_counter() - self._interval["start"]
            logs["samples_per_second"] = round(self._interval["samples"] / elapsed, 1)
            logs["data_time_fraction"] = round(self._interval["data"] / elapsed, 3)
            if logs["data_time_fraction"] > DATA_BOUND and self.state.global_step > self.args.logging_steps:
                logger.warning_once(
                    "Data is the bottleneck: more than a third of the time went into waiting for it. Raise "
                    f"--dataloader_num_workers ({self.args.dataloader_num_workers} now), or store smaller images."
                )
            self._start_interval()
        super().log(logs, start_time)

    def _time_by_steady_clock(self, logs: dict[str, float]) -> None:
        """Replaces Trainer's times, which are wrong if the system's clock is set while it trains."""
        seconds = time.perf_counter() - self._started
        for name in ("train_samples_per_second", "train_steps_per_second"):
            if name in logs:
                logs[name] = round(logs[name] * logs["train_runtime"] / seconds, 3)
        logs["train_runtime"] = round(seconds, 4)

    def _mean_sums(self) -> dict[str, float]:
        """
        Returns the sums of the losses since the last log, averaged over processes.

        Raises:
            TrainingStopped: if a loss is NaN or infinite, or 1 / tau is not a positive finite number.
        """
        totals = {}
        for name, value in self._sums.items():
            totals[name] = float(self.accelerator.reduce(value.clone(), "mean") if self.args.world_size > 1 else value)
        wrong = []
        if self.accelerator.scaler is None:  # in float16 GradScaler skips a step that is out of range
            wrong = [f"{name} is {total}" for name, total in totals.items() if not math.isfinite(total)]
        if self._logit_scale is not None and not (0 < (scale := self._logit_scale.item()) < math.inf):
            wrong.append(f"1 / tau is {scale}")
        self._stop_if(wrong)
        return totals

    def _refuse_diverged(self) -> None:
        """
        Checks the losses and the trained weights before the model is saved: a gradient that was NaN shows in the
        weights at once, but in the losses only a step later.

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

    def _save_rng_state(self, output_dir: str) -> None:
        """Saves the log's interval beside each process's random state."""
        super()._save_rng_state(output_dir)
        interval = {"loss": self._tr_loss.item(), "logged_at": self._globalstep_last_logged}
        sums = {name: value.item() for name, value in self._sums.items()}
        with open(self._log_state(output_dir), "w", encoding="utf-8") as file:
            json.dump({**interval, "steps": self._steps_since_log, "sums": sums}, file)
        # trainer_state.json, which makes a checkpoint whole, is written next: all processes must be done.
        self.accelerator.wait_for_everyone()

    def _resume_log(self) -> None:
        """Goes on with the checkpoint's interval, so that the next log is the mean over all of it."""
        if self._resumed_from is None or not os.path.isfile(self._log_state(self._resumed_from)):
            return
        with open(self._log_state(self._resumed_from), encoding="utf-8") as file:
            state = json.load(file)
        self._tr_loss += state["loss"]
        self._globalstep_last_logged, self._steps_since_log = state["logged_at"], state["steps"]
        self._sums = {name: torch.tensor(value, device=self.args.device) for name, value in state["sums"].items()}

    def _log_state(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"log_{self.args.process_index}.json")


class _OnTrainBegin(TrainerCallback):
    """Calls a function when Trainer has set up its loop, which is when its log can be resumed."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.function()
