"""Training of all stages on transformers' Trainer."""

from .arguments import MMGEMTrainingArguments
from .fused_trainer import FusedTrainer
from .region_trainer import RegionTrainer
from .trainer import MMGEMTrainer


__all__ = ["FusedTrainer", "MMGEMTrainer", "MMGEMTrainingArguments", "RegionTrainer"]
