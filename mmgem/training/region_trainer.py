"""The Trainer of stage 2: one adapter beside a frozen model."""

from typing import Any

import datasets
import torch
import torch.distributed as dist
from peft import PeftModel

from ..data.arguments import DataArguments, TableArguments
from ..data.collator import RegionCollator
from ..data.loading import Table, checked_table
from ..data.regions import RegionDataset
from ..evaluation.regions import evaluate_regions
from ..modeling_mmgem import MMGEMModel, contrastive_loss
from .adapter_trainer import AdapterTrainer
from .adapters import add_region_adapter
from .arguments import MMGEMTrainingArguments, data_seed
from .distributed import gather_ragged
from .gradient_cache import Embeddings, refuse_dropout


class RegionTrainer(AdapterTrainer):
    """
    Trains an adapter of stage 2: with `args.stage` "region-caption" h3 and the soft prompts by L_Gen of the regions'
    phrases (paper, equation 6), with "region-retrieval" h4 by L_Emb between all regions of the global batch and their
    phrases (equation 7), in which equal phrases are no negatives of each other.

    All else is frozen and in eval mode.

    Args:
        processing_class: its `region_grid_size` is the k that the adapter is trained with.
        train_dataset, eval_dataset: a [`RegionDataset`], or a `datasets.Dataset` with a column of regions, a list of
            `{"box", "phrase"}` per image.
        regions_column: of a `datasets.Dataset`.
        others: see [`MMGEMTrainer`].
    """

    stages = ("region-caption", "region-retrieval")

    def __init__(
        self,
        model: MMGEMModel,
        *args: Any,
        regions_column: str = "regions",
        **kwargs: Any,
    ):
        if kwargs.get("peft_config") is not None:
            raise ValueError("RegionTrainer makes the adapter of its stage itself. Leave out peft_config.")
        self.regions_column = regions_column
        super().__init__(model, *args, **kwargs)

    def wrap_table(self, table: datasets.Dataset, args: MMGEMTrainingArguments, is_training: bool) -> RegionDataset:
        columns: Any = {**self.columns, "regions_column": self.regions_column}
        rows = checked_table(Table(table), TableArguments(**columns), ("image_column", "regions_column")).rows
        names = ("max_regions", "whole_image_weight") if is_training else ()
        drawn: Any = {name: DataArguments.__dataclass_fields__[name].default for name in names}
        return RegionDataset(rows, **columns, **drawn, seed=data_seed(args))

    def make_trainable(self, model: MMGEMModel, args: MMGEMTrainingArguments) -> PeftModel:
        if args.activation_checkpointing:
            refuse_dropout(model)
        return add_region_adapter(model, args.stage, self.processing_class.region_grid_size)

    def make_collator(self, args: MMGEMTrainingArguments) -> RegionCollator:
        return RegionCollator(self.processing_class, args.objective)

    def _contrastive_loss(self, embeddings: Embeddings, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Against the regions of all processes, whose numbers differ: every region counts the same."""
        if self.args.world_size == 1:
            return super()._contrastive_loss(embeddings, inputs)
        regions, phrases, logit_scale, logit_bias, _ = embeddings
        gathered = [gather_ragged(tensor) for tensor in (regions, phrases, inputs["pair_ids"])]
        sizes = [len(part) for part in gathered[0]]
        offset, total = sum(sizes[: dist.get_rank()]), sum(sizes)
        all_regions, all_phrases, all_ids = map(torch.cat, gathered)
        loss = contrastive_loss(
            *(regions, phrases, logit_scale, all_regions, all_phrases, offset, inputs["pair_ids"], all_ids),
            dims=self.args.matryoshka_dims,
            negatives=self.args.negatives,
            logit_bias=logit_bias,
        )
        loss = loss * (len(regions) * self.args.world_size / total) / self.current_gradient_accumulation_steps
        self._add_to_log("contrastive_loss", loss)
        return loss

    def _metrics(self, dataset: Any) -> dict[str, float]:
        """The metrics of this adapter's regions."""
        batch_size = self.args.per_device_eval_batch_size
        return evaluate_regions(self.base, self.processing_class, dataset, self.args.stage, batch_size)[0]
