"""Training of both stages on transformers' Trainer."""

from .arguments import MMGEMTrainingArguments
from .region_trainer import RegionTrainer
from .trainer import MMGEMTrainer


__all__ = ["MMGEMTrainer", "MMGEMTrainingArguments", "RegionTrainer"]
