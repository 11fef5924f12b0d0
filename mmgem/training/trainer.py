"""The Trainer of stage 1: transformers' own, with the joint loss over all processes. Stage 2 builds on it."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftModel
from transformers.utils import logging

from ..data.collator import CACHED_FEATURES, LOSS_INPUTS, MODEL_INPUTS, PairCollator
from ..data.pairs import TEACHER_EMBEDS, PairDataset
from ..data.samplers import ClusteredSampler
from ..data.shards import ShardStream
from ..evaluation.arguments import check_dims
from ..modeling_mmgem import MMGEMModel, contrastive_loss
from ..processing import MMGEMProcessor
from .adapters import add_lora, held_in_bfloat16, lora_config
from .arguments import DISTILLATION_TAU, MMGEMTrainingArguments, data_seed, refuse_feature_folder
from .checkpoints import run_settings
from .checks import check_cached_features, check_packing, check_parallelism, check_precision, check_processor
from .distributed import gather_ragged, gather_rows, keep_temperature_in_float32, on_device
from .evaluating_trainer import EvaluatingTrainer
from .feature_cache import cache_features
from .gradient_cache import Embeddings, cached_backward, refuse_dropout
from .stages import check_optimizer, freeze_parameters
from .start import start_projections
from .stream_progress import StreamProgress
from .train_data import ExampleCounts, TrainingCallback, check_dataset, prepared_for


logger = logging.get_logger(__name__)


class MMGEMTrainer(EvaluatingTrainer):
    """
    Trains stage 1 (paper, equation 4).

    The contrastive loss sees the embeddings of all processes, with their gradient; captions are averaged over all
    tokens of a step. Gradients are those of one process that holds the whole batch. Under gradient accumulation each
    micro-batch has its own negatives, and the mean of their losses counts.

    Args:
        model: with float32 weights.
        args: options of the training.
        processing_class: the model's processor; it is saved with every checkpoint.
        train_dataset: a `datasets.Dataset` with a column of images and one of captions (a string, or a list of
            strings), a [`PairDataset`], or a [`ShardStream`].
        eval_dataset: a `datasets.Dataset` or [`PairDataset`].
        peft_config: trains LoRA matrices beside the language model instead of its weights; see
            [`mmgem.training.adapters.add_lora`]. `args.lora_rank` is shorthand for it.
        image_column, caption_column: of a `datasets.Dataset`.
        model_settings: names and values, beside those of `args`, that a resumed run must share with this one.
        **kwargs: of [`Trainer`].

    Example:

    ```python
    >>> args = MMGEMTrainingArguments(output_dir="outputs/mine", max_steps=1000, per_device_train_batch_size=64)
    >>> trainer = MMGEMTrainer(model=model, args=args, train_dataset=dataset, processing_class=processor)
    >>> trainer.train()
    ```
    """

    stages: tuple[str, ...] = ("1",)
    model: MMGEMModel
    train_dataset: PairDataset | ShardStream
    processing_class: MMGEMProcessor

    def __init__(
        self,
        model: MMGEMModel,
        args: MMGEMTrainingArguments,
        processing_class: MMGEMProcessor,
        train_dataset: datasets.Dataset | PairDataset | ShardStream,
        eval_dataset: datasets.Dataset | PairDataset | None = None,
        *,
        peft_config: LoraConfig | None = None,
        image_column: str = "image",
        caption_column: str = "caption",
        model_settings: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        if args.stage not in self.stages:
            raise ValueError(
                f"{type(self).__name__} trains stage {' or '.join(self.stages)}, not {args.stage}. Use MMGEMTrainer "
                "for stage 1, RegionTrainer for those of regions, FusedTrainer for fused-retrieval."
            )
        self.base = model  # without PEFT's, DistributedDataParallel's or the compiler's wrapper
        self.processing_class = processing_class
        self.columns: Any = {"image_column": image_column, "caption_column": caption_column}
        if isinstance(train_dataset, datasets.Dataset):
            train_dataset = self.wrap_table(train_dataset, args, is_training=True)
        if isinstance(eval_dataset, datasets.Dataset):
            eval_dataset = self.wrap_table(eval_dataset, args, is_training=False)
        check_dataset("train_dataset", train_dataset, (PairDataset, ShardStream))
        check_dataset("eval_dataset", eval_dataset, (PairDataset, type(None)))
        train_data = prepared_for(train_dataset, args, processing_class.image_processor)
        if isinstance(train_data, ShardStream):
            args = copy.copy(args)
            args.ignore_data_skip = True  # the stream itself starts where it should
        check_optimizer(args)
        check_processor(model, processing_class)
        check_dims(args.matryoshka_dims, model.config.projection_dim)
        if peft_config is not None and args.lora_rank:
            raise ValueError("peft_config and lora_rank both ask for LoRA. Leave out lora_rank.")
        self.peft_config = peft_config or lora_config(args)
        trained = self.make_trainable(model, args)
        check_precision(trained)
        if args.cache_features:
            check_cached_features(model, train_data.augmentation_scale)
        elif getattr(train_data, "teacher", None) is None:
            refuse_feature_folder(args)
        if args.mini_batch_size and args.stage == "1":  # adapters are trained in eval mode
            refuse_dropout(trained)
        if args.torch_compile:
            # How many rows, caption tokens and [EMB] there are differs from step to step: one graph for all.
            torch._dynamo.config.capture_dynamic_output_shape_ops = True
            torch._dynamo.config.capture_scalar_outputs = True
        super().__init__(
            model=trained,
            args=args,
            data_collator=self.make_collator(args),
            train_dataset=train_data,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            settings=run_settings(args, model_settings or {}, self.peft_config),
            **kwargs,
        )
        fsdp = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        check_parallelism(args, fsdp, self.is_deepspeed_enabled, self.peft_config is not None)
        if fsdp is not None:
            keep_temperature_in_float32(model, self.accelerator)
        if args.batch_sampler == "clustered":
            self._get_train_sampler()  # raises for data without clusters
        if args.stage == "1" and args.packing:
            check_packing(model, self.accelerator)
        self.progress = StreamProgress(train_data, args) if isinstance(train_data, ShardStream) else None
        self.counts = ExampleCounts(train_data, args, processing_class.max_length)
        self.add_callback(TrainingCallback(model, train_data))

    def make_trainable(self, model: MMGEMModel, args: MMGEMTrainingArguments) -> MMGEMModel | PeftModel:
        """Freezes what this stage does not train; returns the model, or PEFT's around it."""
        lora = None if self.peft_config is None else add_lora(model, self.peft_config)
        freeze_parameters(model, args.objective, args.freeze)
        return model if lora is None else lora

    def make_collator(self, args: MMGEMTrainingArguments) -> PairCollator:
        pack_length = args.pack_length if args.packing else 0
        return PairCollator(self.processing_class, args.objective, pack_length, args.mini_batch_size)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        if self.args.batch_sampler == "clustered":
            return ClusteredSampler(self.train_dataset, data_seed(self.args))  # type: ignore[arg-type]
        return super()._get_train_sampler(train_dataset)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Returns a loader that accelerate does not divide among processes if the data is a stream."""
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

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Returns the next micro-batches, and notes what they say of their examples."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            if self.progress is not None:
                self.progress.advance(*batch.pop("position"))
            self._interval["samples"] += self.counts.take_from(batch) * self.args.world_size
        return batches, num_items

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        parts = [part for batch in batch_samples for part in batch.get("mini_batches", [batch])]
        return super()._get_num_items_in_batch(parts, device)

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
            contrastive = self._contrastive_loss(embeddings, loss_inputs_of([inputs]))
            loss = contrastive if loss is None else loss + contrastive
        return (loss, outputs) if return_outputs else loss

    def _forward(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> tuple[Embeddings, Any, torch.Tensor | None]:
        """Returns embeddings, the model's output, and the weighted caption loss (None without labels)."""
        model_inputs = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        outputs = model(**model_inputs, num_items_in_batch=num_items_in_batch, return_loss=False, logits_to_keep=1)
        texts, images, negatives = outputs.text_embeds, outputs.image_embeds, None
        if "region_mask" in inputs:
            images = images[inputs["region_mask"]]
        if texts is not None:
            texts = texts[inputs["text_index"]]
            if "negative_ids" in inputs:
                texts, negatives = texts.split([len(images), len(inputs["negative_ids"])])
        loss = None
        if outputs.caption_loss is not None:
            # num_items_in_batch counts the tokens of all processes, whose gradients will be averaged.
            caption = outputs.caption_loss * self.args.world_size
            self._add_to_log("caption_loss", caption)
            loss = self.args.caption_loss_weight * caption
        return self._embeddings(images, texts, outputs, negatives), outputs, loss

    def _embeddings(
        self, queries: torch.Tensor, keys: torch.Tensor, outputs: Any, negatives: torch.Tensor | None = None
    ) -> Embeddings:
        """With the model's temperature, or that of `--temperature`."""
        scale = outputs.logit_scale
        if self.args.temperature is not None and scale is not None:
            scale = torch.full_like(scale, 1 / self.args.temperature)
        self._logit_scale = scale.detach() if self.args.objective != "caption" else None
        return Embeddings(queries, keys, scale, outputs.logit_bias, negatives)

    def _contrastive_loss(self, embeddings: Embeddings, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Against the pairs of all processes, without those that share one of the row's ids, and all negatives. With
        a teacher's vectors of the keys, which are captions, their distillation comes on top.
        """
        queries, keys, logit_scale, logit_bias, negatives = embeddings
        (all_queries, all_keys, all_ids), offset = gather_rows(queries, keys, inputs["pair_ids"])
        loss = contrastive_loss(
            *(queries, keys, logit_scale, all_queries, all_keys, offset, inputs["pair_ids"], all_ids),
            dims=self.args.matryoshka_dims,
            **self._gathered_negatives(negatives, inputs),
            negatives=self.args.negatives,
            logit_bias=logit_bias,
        )
        loss = loss / self.current_gradient_accumulation_steps
        self._add_to_log("contrastive_loss", loss)
        if TEACHER_EMBEDS in inputs:
            texts = inputs["pair_ids"][:, 0]
            distillation = self._distillation_loss(keys, inputs[TEACHER_EMBEDS], DISTILLATION_TAU, texts)
            loss = loss + self.args.distillation_weight * distillation
        return loss

    def _gathered_negatives(self, negatives: torch.Tensor | None, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The hard negatives of all processes, of which one may have more than another."""
        if negatives is None:
            return {}
        parts = [negatives, inputs["negative_ids"]]
        if self.args.world_size > 1:
            parts = [torch.cat(gather_ragged(part)) for part in parts]
        return {"negative_keys": parts[0], "negative_ids": parts[1], "own_ids": inputs.get("own_ids")}

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Trains on one batch, through the gradient cache if it comes in mini-batches."""
        if "mini_batches" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        self.set_modes(model)
        mini_batches: Any = self._prepare_inputs(inputs)["mini_batches"]
        loss_inputs = loss_inputs_of(mini_batches)
        caption_losses = []

        def embed(mini_batch: dict[str, Any]) -> Embeddings:
            with self.compute_loss_context_manager():
                return self._forward(model, self._without_captions(mini_batch))[0]

        def forward(mini_batch: dict[str, Any]) -> tuple[Embeddings, torch.Tensor | None]:
            with self.compute_loss_context_manager():
                embeddings, _, loss = self._forward(model, mini_batch, num_items_in_batch)
            caption_losses.append(torch.zeros(()) if loss is None else loss.detach())
            return embeddings, loss

        def contrastive(*embeddings: Any) -> torch.Tensor:
            return self._contrastive_loss(Embeddings(*embeddings), loss_inputs)

        backward, no_sync = self.accelerator.backward, self._no_sync(model)
        loss = cached_backward(mini_batches, embed, contrastive, forward, backward, no_sync)
        return loss + torch.stack(caption_losses).sum().to(loss.device)

    def set_modes(self, model: torch.nn.Module) -> None:
        """Training or eval mode of the modules in a step."""
        model.train()

    def _without_captions(self, mini_batch: dict[str, Any]) -> dict[str, Any]:
        """What embeds a mini-batch alone."""
        kept = ("pixel_values", *CACHED_FEATURES, "negative_ids")
        return {**{name: mini_batch[name] for name in kept if name in mini_batch}, **mini_batch["sentences"]}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        [`BaseTrainer.train`], which reports the examples that it did not use.

        Raises:
            BadDataError: for too many unreadable examples.
            FeatureCacheError, DiskFullError: with `cache_features`, see [`FeatureCache.compute`].
        """
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self.counts.report()
        return result

    def _before_resuming(self, checkpoint: str) -> None:
        self.base.has_new_projections = False
        if self.progress is not None:
            self.progress.resume(checkpoint)

    @contextmanager
    def _around_training(self) -> Iterator[None]:
        """Prepares what is computed from the data, and holds a frozen language model in bfloat16."""
        starts = self.args.stage == "1" and self.base.has_new_projections
        if self.args.cache_features or starts:
            with on_device(self.base, self.accelerator.device):
                self._prepare_from_data(starts)
        is_frozen_lm = self.peft_config is not None and self.args.bf16
        with held_in_bfloat16(self.base.language_model) if is_frozen_lm else nullcontext():
            yield

    def _prepare_from_data(self, starts: bool) -> None:
        """Caches features, and starts new projections."""
        if self.args.cache_features:
            collator: Any = self.data_collator
            bad = cache_features(self.base, self.train_dataset, collator, self.args, self.accelerator)
            self.counts.add_all_bad(bad)
        if starts:
            batch_size = self.args.per_device_eval_batch_size
            with self.accelerator.autocast():
                start_projections(self.base, self.processing_class, self.train_dataset, batch_size)
            self.base.has_new_projections = False

    def _save_rng_state(self, output_dir: str) -> None:
        """Saves the position in the stream beside each process's random state."""
        if self.progress is not None:
            self.progress.save(output_dir)
        super()._save_rng_state(output_dir)


def loss_inputs_of(parts: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What L_Emb sees of a batch in parts, beside embeddings."""
    return {name: torch.cat([part[name] for part in parts]) for name in LOSS_INPUTS if name in parts[0]}
