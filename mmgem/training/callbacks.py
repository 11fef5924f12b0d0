"""What happens in a training beside its steps."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from ..data.pairs import PairDataset
from ..data.shards import ShardStream
from ..modeling_mmgem import MMGEMModel


class TrainingCallback(TrainerCallback):
    """Resumes the log, tells the data which epoch it is, and holds tau at its lower bound of 0.01."""

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
