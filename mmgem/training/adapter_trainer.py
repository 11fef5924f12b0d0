"""The Trainer of an adapter beside a frozen model, in eval mode."""

import os
from contextlib import suppress
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modeling_mmgem import MMGEMModel
from .adapters import base_revision
from .trainer import MMGEMTrainer


class AdapterTrainer(MMGEMTrainer):
    """What [`RegionTrainer`] and [`FusedTrainer`] share; see [`MMGEMTrainer`] for the arguments."""

    def __init__(self, model: MMGEMModel, *args: Any, model_settings: dict[str, Any] | None = None, **kwargs: Any):
        # A checkpoint holds the adapter only, so a run resumes on the weights that the adapter was trained on.
        settings = {**(model_settings or {}), "base_revision": base_revision(model)}
        super().__init__(model, *args, model_settings=settings, **kwargs)

    def compute_loss(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The loss, with the frozen base in eval mode."""
        self.set_modes(model)
        return super().compute_loss(model, *args, **kwargs)

    def set_modes(self, model: torch.nn.Module) -> None:
        """Eval mode: dropout applies to trained modules only."""
        model.eval()
        if self.args.activation_checkpointing:
            # transformers' layers checkpoint in training mode only; `refuse_dropout` made sure that nothing drops out.
            for module in model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True

    def merge_lora(self) -> None:
        """An adapter stays one."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        with suppress(FileNotFoundError):  # PEFT writes a model card that is an empty template
            os.remove(os.path.join(output_dir or str(self.args.output_dir), "README.md"))
