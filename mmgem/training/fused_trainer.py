"""The Trainer of the stage fused-retrieval: an adapter that embeds a text with an image."""

from typing import Any

import datasets
import torch
from peft import PeftModel

from ..data.collator import FusedCollator
from ..data.loading import Table, triplets_of
from ..data.samplers import OneSourceSampler
from ..data.triplets import TripletDataset
from ..evaluation.fused import evaluate_fused
from ..modeling_mmgem import MMGEMModel
from .adapter_trainer import AdapterTrainer
from .adapters import add_fused_adapter
from .arguments import MMGEMTrainingArguments, data_seed
from .gradient_cache import Embeddings, refuse_dropout
from .train_data import check_dataset


class FusedTrainer(AdapterTrainer):
    """
    Trains LoRA matrices beside the language model with L_Emb between queries and targets, against all targets and
    negatives of the global batch. They are active where a text has an image; plain texts and images are embedded by
    the frozen model, without a gradient.

    Args:
        train_dataset, eval_dataset: a [`TripletDataset`], or a `datasets.Dataset` with its columns.
        peft_config: of the matrices; by default `args.lora_rank` of them beside every linear map.
        others: see [`MMGEMTrainer`].
    """

    stages = ("fused-retrieval",)

    def __init__(self, model: MMGEMModel, args: MMGEMTrainingArguments, *arguments: Any, **kwargs: Any):
        super().__init__(model, args, *arguments, **kwargs)
        for name in ("train_dataset", "eval_dataset"):
            if getattr(self, name) is not None:
                check_dataset(name, getattr(self, name), (TripletDataset,))
        self._get_train_sampler()  # raises for datasets that are too small

    def wrap_table(self, table: datasets.Dataset, args: MMGEMTrainingArguments, is_training: bool) -> TripletDataset:
        return triplets_of([Table(table)], data_seed(args))

    def make_trainable(self, model: MMGEMModel, args: MMGEMTrainingArguments) -> PeftModel:
        if args.activation_checkpointing:
            refuse_dropout(model)
        assert self.peft_config is not None
        return add_fused_adapter(model, self.peft_config)

    def make_collator(self, args: MMGEMTrainingArguments) -> FusedCollator:
        return FusedCollator(self.processing_class, args.mini_batch_size)

    def _get_train_sampler(self, train_dataset: Any = None) -> OneSourceSampler:
        data: Any = self.train_dataset
        batch_size = self.args.train_batch_size * self.args.world_size
        return OneSourceSampler(data, batch_size, data_seed(self.args))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.base.hold_back(self.base._fused_adapter)  # PEFT activates what it has loaded

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.base.hold_back(self.base._fused_adapter)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Embeds what is plain; then the adapter is active until the backward pass, which may compute layers anew."""
        inputs = self._prepare_inputs(inputs)
        self.base.eval()
        with torch.no_grad(), self.accelerator.autocast():
            for part in inputs.get("mini_batches", [inputs]):
                plain = [part[name] for name in ("texts", "images") if name in part]
                part["plain_embeds"] = [self.base.get_embedding(**items) for items in plain]
        with self.base.in_fused_call():
            return super().training_step(model, inputs, num_items_in_batch)

    def _forward(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> tuple[Embeddings, Any, torch.Tensor | None]:
        """Embeddings of queries, targets and negatives; the model's output; no caption loss."""
        fused = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        outputs = model(**fused, return_loss=False, logits_to_keep=1)
        embeds = torch.cat([outputs.text_embeds, *inputs["plain_embeds"]])
        queries, answers = embeds[inputs["queries"]], embeds[inputs["answers"]]
        targets, negatives = answers.split([len(queries), len(answers) - len(queries)])
        return self._embeddings(queries, targets, outputs, negatives), outputs, None

    def _without_captions(self, mini_batch: dict[str, Any]) -> dict[str, Any]:
        return mini_batch

    def _metrics(self, dataset: Any) -> dict[str, float]:
        """Of fused queries, beside the mean of their two plain embeddings."""
        return evaluate_fused(self.base, self.processing_class, dataset, self.args.per_device_eval_batch_size)[0]
