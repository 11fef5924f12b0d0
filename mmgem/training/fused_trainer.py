"""The Trainer of the stage fused-retrieval: an adapter that embeds a text with an image."""

from typing import Any

import datasets
import torch
from peft import PeftModel

from ..data.collator import FusedCollator
from ..data.loading import Table, triplets_of
from ..data.triplets import OneSourceSampler, TripletDataset
from ..evaluation.fused import evaluate_fused
from ..modeling_mmgem import MMGEMModel, contrastive_loss
from .adapter_trainer import AdapterTrainer
from .adapters import add_fused_adapter
from .arguments import MMGEMTrainingArguments, data_seed
from .distributed import gather_ragged
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
        return FusedCollator(self.processing_class)

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
            plain = [self.base.get_embedding(**inputs[name]) for name in ("texts", "images") if name in inputs]
        with self.base.in_fused_call():
            return super().training_step(model, {**inputs, "plain_embeds": plain}, num_items_in_batch)

    def _forward(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> tuple[Embeddings, Any, torch.Tensor | None]:
        """Embeddings of queries and targets, negatives behind them; the model's output; no caption loss."""
        fused = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        outputs = model(**fused, return_loss=False, logits_to_keep=1)
        embeds = torch.cat([outputs.text_embeds, *inputs["plain_embeds"]])
        self._logit_scale = outputs.logit_scale.detach()
        return (embeds[inputs["queries"]], embeds[inputs["answers"]], outputs.logit_scale), outputs, None

    def _contrastive_loss(
        self, queries: torch.Tensor, answers: torch.Tensor, logit_scale: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Against the queries, targets and negatives of all processes, whose numbers of negatives differ."""
        count, offset = len(queries), 0
        pair_ids = torch.stack([ids[:count], ids[count : 2 * count]], 1)
        parts = [queries, answers[:count], pair_ids, answers[count:], ids[2 * count :]]
        gathered = parts
        if self.args.world_size > 1:
            gathered = [torch.cat(gather_ragged(part)) for part in parts]
            offset = self.args.process_index * count
        all_queries, all_targets, all_ids, negatives, negative_ids = gathered
        loss = contrastive_loss(
            *(queries, answers[:count], logit_scale, all_queries, all_targets, offset, pair_ids, all_ids),
            dims=self.args.matryoshka_dims,
            negative_embeds=negatives,
            negative_ids=negative_ids,
            negatives=self.args.negatives,
        )
        loss = loss / self.current_gradient_accumulation_steps
        self._add_to_log("contrastive_loss", loss)
        return loss

    def _metrics(self, dataset: Any) -> dict[str, float]:
        """Of fused queries, beside the mean of their two plain embeddings."""
        return evaluate_fused(self.base, self.processing_class, dataset, self.args.per_device_eval_batch_size)[0]
