"""The Trainer of the stage text-distillation: a language model learns how alike a teacher finds texts."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import datasets
import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.texts import TEACHER_EMBEDS, TEXT, as_tensors
from ..modeling_mmgem.conversion_mmgem import check_language_model
from ..modeling_mmgem.embedding_mmgem import unit_norm
from ..modeling_mmgem.inputs_mmgem import batches_by_length
from ..processing.tokenization_mmgem import opening_token
from .adapters import held_in_bfloat16, lora_config
from .arguments import MMGEMTrainingArguments
from .base_trainer import BaseTrainer
from .checkpoints import run_settings
from .checks import check_parallelism, check_precision
from .gradient_cache import cached_backward, refuse_dropout
from .stages import check_optimizer


PART_SIZE = 32  # texts of a forward pass, without a gradient cache


class TextCollator:
    """
    Collates B texts into `mini_batches` of texts that are about as long, each with `input_ids`, `attention_mask` and
    `teacher_embeds`: the token that opens every text in MM-GEM ([`opening_token`]), those of a text, cut if it is too
    long, those of the prompt, and padding on the right.

    Raises:
        ValueError: for a `max_length` that the prompt fills.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str, max_length: int, part_size: int = 0):
        self.tokenizer = tokenizer
        # Tokenized behind a word, since some tokenizers, such as Llama 2's, put a space before every text.
        texts = ("a", f"a {prompt}".rstrip())
        word, word_and_prompt = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        self.prompt_ids = word_and_prompt[len(word) :]
        opening = opening_token(tokenizer)
        self.opening_ids = [] if opening is None else [tokenizer.convert_tokens_to_ids(opening)]
        self.text_length = max_length - len(self.opening_ids) - len(self.prompt_ids)
        if self.text_length < 1:
            raise ValueError(
                f"max_length {max_length} leaves no room for texts: the prompt {prompt!r} has {len(self.prompt_ids)} "
                "tokens. Raise --max_length."
            )
        self.part_size = part_size or PART_SIZE

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        goals = torch.stack([example[TEACHER_EMBEDS] for example in examples])
        parts = self.parts([example[TEXT] for example in examples])
        return {"mini_batches": [{**part, TEACHER_EMBEDS: goals[part.pop("order")]} for part in parts]}

    def parts(self, texts: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Tensors of part after part, the shortest texts first; `order` `(n,)` are their indices."""
        options = {"truncation": True, "max_length": self.text_length, "add_special_tokens": False}
        rows = self.tokenizer(list(texts), **options)["input_ids"]
        for order in batches_by_length([len(row) for row in rows], self.part_size, None):
            tokens = [torch.tensor([*self.opening_ids, *rows[i], *self.prompt_ids]) for i in order]
            masks = [torch.ones_like(own) for own in tokens]
            padded = (pad_sequence(part, batch_first=True) for part in (tokens, masks))
            yield {**dict(zip(("input_ids", "attention_mask"), padded)), "order": torch.tensor(order)}


class TextDistillationTrainer(BaseTrainer):
    """
    Trains a language model alone, without images (stage 1 of UniME, arXiv 2504.17432): the last token's hidden state
    of "text prompt" is the text's embedding, and the similarities of a batch's texts become those of a teacher, by
    [`relational_distillation`]. Each text is compared with those of all processes.

    Args:
        model: a causal language model, with float32 weights. Its head is kept as it is, unless it is tied to the input
            embeddings, which are trained.
        processing_class: its tokenizer.
        train_dataset, eval_dataset: columns `text` and `teacher_embeds`, of unit norm.
        max_length: tokens of a text, the prompt included.
        peft_config: trains LoRA matrices instead of all weights.
        model_settings: names and values, beside those of `args`, that a resumed run must share with this one.
    """

    base: Any  # without the head, and without PEFT's or DistributedDataParallel's wrapper
    data_collator: TextCollator
    processing_class: PreTrainedTokenizerBase
    untrained_metrics: dict[str, float] = {}

    def __init__(
        self,
        model: PreTrainedModel,
        args: MMGEMTrainingArguments,
        processing_class: PreTrainedTokenizerBase,
        train_dataset: datasets.Dataset,
        eval_dataset: datasets.Dataset | None = None,
        *,
        max_length: int = 50,
        peft_config: LoraConfig | None = None,
        model_settings: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        if args.stage != "text-distillation":
            raise ValueError(f"TextDistillationTrainer trains stage text-distillation, not {args.stage}.")
        if peft_config is not None and args.lora_rank:
            raise ValueError("peft_config and lora_rank both ask for LoRA. Leave out lora_rank.")
        check_optimizer(args)
        batch_size = args.train_batch_size * args.world_size
        if batch_size < 2:
            raise ValueError("A text alone is like no other. Raise --per_device_train_batch_size.")
        if len(train_dataset) < batch_size:
            raise ValueError(
                f"{len(train_dataset)} distinct texts do not fill one batch of {batch_size}; lower "
                "--per_device_train_batch_size."
            )
        check_language_model(model)
        self.causal_lm, self.base = model, model.base_model
        self.peft_config = lora_config(args) if peft_config is None else peft_config
        trained: Any = self.base if self.peft_config is None else self._with_lora(self.peft_config)
        check_precision(trained)
        if args.mini_batch_size:
            refuse_dropout(trained)
        super().__init__(
            model=trained,
            args=args,
            data_collator=TextCollator(processing_class, args.distillation_prompt, max_length, args.mini_batch_size),
            train_dataset=as_tensors(train_dataset),
            eval_dataset=None if eval_dataset is None else as_tensors(eval_dataset),
            processing_class=processing_class,
            settings=run_settings(args, model_settings or {}, self.peft_config),
            **kwargs,
        )
        if self.is_fsdp_enabled:
            raise ValueError("text-distillation saves a language model whole: train it without FSDP.")
        check_parallelism(args, deepspeed=self.is_deepspeed_enabled)

    def _with_lora(self, config: LoraConfig) -> PeftModel:
        """Matrices beside every linear map, unless the configuration names others."""
        config = copy.copy(config)
        config.target_modules = config.target_modules or "all-linear"
        return get_peft_model(self.base, config)  # type: ignore[return-value,arg-type]

    def _around_training(self) -> AbstractContextManager:
        return held_in_bfloat16(self.base) if self.peft_config is not None and self.args.bf16 else nullcontext()

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Trains on one batch, with `args.mini_batch_size` through the gradient cache."""
        if not self.args.mini_batch_size:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        parts: Any = self._prepare_inputs(inputs)["mini_batches"]
        goals = torch.cat([part[TEACHER_EMBEDS] for part in parts])

        def embed(part: dict[str, Any]) -> tuple[torch.Tensor]:
            with self.compute_loss_context_manager():
                return (embeds_of_last_tokens(model, part),)

        return cached_backward(
            parts,
            embed,
            lambda embeds: self._loss(embeds, goals),
            lambda part: (embed(part), None),
            self.accelerator.backward,
            self._no_sync(model),
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """KL divergence of the rows of this process, against the texts of all."""
        parts = inputs["mini_batches"]
        embeds = torch.cat([embeds_of_last_tokens(model, part) for part in parts])
        loss = self._loss(embeds, torch.cat([part[TEACHER_EMBEDS] for part in parts]))
        return (loss, {}) if return_outputs else loss

    def _loss(self, embeds: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
        self._interval["samples"] += len(embeds) * self.args.world_size
        return self._distillation_loss(embeds, goals, self.args.temperature)  # type: ignore[arg-type]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Computes and logs how well student and teacher agree on held-out texts, of all their pairs."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        agreement = spearman(self.embed(dataset[TEXT]), torch.stack(list(dataset[TEACHER_EMBEDS])))
        logs = {f"{metric_key_prefix}_teacher_spearman": agreement}
        self.log({**logs})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        self._start_interval()
        return logs

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """The embeddings `(N, H)` of texts, float32 on the CPU."""
        model: Any = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        embeds = torch.empty(len(texts), self.base.config.hidden_size)
        for part in self.data_collator.parts(texts):
            order, inputs = part.pop("order"), self._prepare_inputs(part)
            with self.accelerator.autocast():
                embeds[order] = embeds_of_last_tokens(model, inputs).float().cpu()
        model.train(was_training)
        return embeds

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves what is trained for a checkpoint; without `output_dir`, the whole language model with its head."""
        if output_dir is not None:
            super().save_model(output_dir, _internal_call)
        elif self.is_world_process_zero():
            self.causal_lm.save_pretrained(str(self.args.output_dir))
            self.processing_class.save_pretrained(str(self.args.output_dir))


def embeds_of_last_tokens(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The hidden states `(B, H)` at the last token of each row, which is padded on the right, with unit norm."""
    mask = inputs["attention_mask"]
    states = model(input_ids=inputs["input_ids"], attention_mask=mask, use_cache=False).last_hidden_state
    last = states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    return unit_norm(last)


def spearman(embeds: torch.Tensor, other: torch.Tensor) -> float:
    """Spearman's rank correlation of the cosines of all pairs of N texts, in two spaces of unit vectors."""
    pairs = torch.triu_indices(len(embeds), len(embeds), 1).unbind()
    cosines = [(vectors @ vectors.T)[pairs].numpy() for vectors in (embeds, other)]
    return float(pd.DataFrame(cosines).T.corr(method="spearman").iloc[0, 1])
