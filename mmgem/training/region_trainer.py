"""The Trainer of stage 2: one adapter beside a frozen model."""

import os
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..data.collator import RegionCollator
from ..data.regions import RegionDataset
from ..evaluation.regions import evaluate_regions
from ..modeling_mmgem import MMGEMModel, contrastive_loss
from ..processing import MMGEMProcessor
from .arguments import MMGEMTrainingArguments
from .feature_cache import cache_features
from .gathering import gather_ragged
from .gradient_cache import refuse_dropout
from .region_adapters import add_region_adapter
from .trainer import MMGEMTrainer


class RegionTrainer(MMGEMTrainer):
    """
    Trains an adapter of stage 2 on a [`RegionDataset`]: with `args.stage` "region-caption" h3 and the soft prompts by
    L_Gen of the regions' phrases (paper, equation 6), with "region-retrieval" h4 by L_Emb between all regions of the
    global batch and their phrases (equation 7), in which equal phrases are no negatives of each other.

    All else is frozen and in eval mode. With `args.cache_features` the ViT encodes every image once, before the first
    step.

    Args:
        processor: its `region_grid_size` is the k that the adapter is trained with.
    """

    def __init__(
        self,
        model: MMGEMModel,
        args: MMGEMTrainingArguments,
        processor: MMGEMProcessor,
        train_dataset: RegionDataset,
        eval_dataset: RegionDataset | None = None,
        **kwargs: Any,
    ):
        train_dataset.image_processor = processor.image_processor
        if args.activation_checkpointing:
            refuse_dropout(model)
        super().__init__(model, args, processor, train_dataset, eval_dataset, **kwargs)
        # A checkpoint holds the adapter alone, so it is resumed on the weights that it was trained on.
        self._settings["base_revision"] = self._base().peft_config["default"].revision

    def make_trainable(self, model: MMGEMModel, args: MMGEMTrainingArguments, processor: MMGEMProcessor) -> PeftModel:
        return add_region_adapter(model, args.stage, processor.region_grid_size)

    def make_collator(
        self, processor: MMGEMProcessor, args: MMGEMTrainingArguments, pack_length: int
    ) -> RegionCollator:
        return RegionCollator(processor, args.objective)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As [`MMGEMTrainer.train`], with the patch features in a file until it ends."""
        if not self.args.cache_features:
            return super().train(*args, **kwargs)
        os.makedirs(str(self.args.output_dir), exist_ok=True)
        path = os.path.join(str(self.args.output_dir), "patch_features.bin")
        dataset: Any = self.train_dataset
        collator: Any = self.data_collator
        try:
            self.train_dataset, bad = cache_features(  # type: ignore[assignment]
                self._base(),
                dataset,
                collator,
                self.accelerator,
                path,
                bool(self.args.disable_tqdm),
                batch_size=self.args.per_device_eval_batch_size,
                num_workers=self.args.dataloader_num_workers,
            )
            self._count_bad(bad)
            return super().train(*args, **kwargs)
        finally:
            self.train_dataset = dataset
            with suppress(FileNotFoundError):
                os.remove(path)

    def compute_loss(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The loss, with the frozen base in eval mode: dropout applies to trained modules only."""
        model.eval()
        if self.args.activation_checkpointing:
            # transformers' layers checkpoint in training mode only; `refuse_dropout` made sure that nothing drops out.
            for module in model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True
        return super().compute_loss(model, *args, **kwargs)

    def _contrastive_loss(
        self, texts: torch.Tensor, images: torch.Tensor, logit_scale: torch.Tensor, pair_ids: torch.Tensor
    ) -> torch.Tensor:
        """Against the regions of all processes, of which each has another number: every region counts the same."""
        if self.args.world_size == 1:
            return super()._contrastive_loss(texts, images, logit_scale, pair_ids)
        gathered = [gather_ragged(tensor) for tensor in (texts, images, pair_ids)]
        sizes = [len(part) for part in gathered[0]]
        offset, total = sum(sizes[: dist.get_rank()]), sum(sizes)
        all_texts, all_images, all_ids = map(torch.cat, gathered)
        loss = contrastive_loss(texts, images, logit_scale, all_texts, all_images, offset, pair_ids, all_ids)
        loss = loss * (len(texts) * self.args.world_size / total) / self.current_gradient_accumulation_steps
        self._add_to_log("contrastive_loss", loss)
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What [`evaluate_regions`] computes for this adapter; every process does its part."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        batch_size = self.args.per_device_eval_batch_size
        with self.accelerator.autocast():  # as training computes, outside of forward too
            metrics = evaluate_regions(self._base(), self.processor, dataset, self.args.stage, batch_size)[0]
        return self._log_metrics(metrics, metric_key_prefix)

    def _base(self) -> Any:
        return self.accelerator.unwrap_model(self.model).get_base_model()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        with suppress(FileNotFoundError):  # PEFT writes a model card that is an empty template
            os.remove(os.path.join(output_dir or str(self.args.output_dir), "README.md"))
