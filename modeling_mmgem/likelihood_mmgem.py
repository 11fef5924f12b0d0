"""How probable texts are as captions of images: `score`."""

import copy
import math
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from .inputs_mmgem import batches_by_length
from .losses_mmgem import MAX_LOGITS
from .outputs_mmgem import CACHE_NAME


MAX_PROMPTS = 256  # at a time
MAX_TOKENS = {"cpu": 2048}  # of prompts and texts at a time; with more, activations do not fit into a CPU's caches
MAX_TOKENS_ELSEWHERE = 16_384


class LikelihoodMixin:
    """The likelihood of captions under the language model that writes them."""

    @torch.no_grad()
    def score(
        self: Any,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pairs: torch.Tensor | None = None,
        alpha: float = 0.0,
    ) -> torch.Tensor:
        """
        log P(text | image) - alpha log P(text), each the mean over the text's tokens and EOS.

        The same model computes P(text) after the prompt without its image. Subtracting it removes the preference for
        common texts ([Lin et al., 2024](https://arxiv.org/abs/2306.01879)); it changes nothing where one text is
        compared with several images. `processor(images=…, text=…, task="score")` writes the inputs.

        The language model reads every prompt once; all texts of a prompt share its keys and values.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): prompts, one per image or region, without padding.
            labels (`torch.LongTensor` of shape `(N, L)`): the texts with EOS, -100 behind their ends.
            pixel_values, boxes, masks, region_mask: as of `generate`.
            attention_mask (*optional*): of the prompts, 1 everywhere.
            pairs (`torch.LongTensor` of shape `(P, 2)`, *optional*): prompt and text of the scores that are wanted;
                all by default.
            alpha (`float`, *optional*, defaults to 0): weight of the prior.

        Returns:
            `torch.FloatTensor` of shape `(B, N)`, or with `pairs` `(P,)`: in nats per token, float32.

        Raises:
            ValueError: for prompts without images, or padded; for images whose features are not finite; for a text
                without tokens, or -100 within one; for pairs that do not exist; for an alpha that is not finite.
        """
        if pixel_values is None:
            raise ValueError("There are no pixel_values. Score texts of images: processor(images=…, task='score').")
        self._check_prompts(input_ids, pixel_values)
        lengths = _lengths(labels)
        if not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}; it weighs the prior and must be a finite number, such as 0.5.")
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("The prompts are padded. Leave out padding='max_length' and text around <image>.")
        everything = torch.cartesian_prod(torch.arange(len(input_ids)), torch.arange(len(labels))).view(-1, 2)
        wanted = everything if pairs is None else _checked_pairs(pairs.cpu(), len(input_ids), len(labels))
        images = self._encode_images(pixel_values, boxes, masks, region_mask)
        self._check_images(input_ids, images)
        prompts = self._build_inputs(input_ids, images, check=True)
        scores = self._log_likelihood(prompts, labels, lengths, wanted)
        if alpha:
            without_image = input_ids[:1, input_ids[0].ne(self.config.image_token_id)]
            of_texts = torch.stack([torch.zeros(len(labels), dtype=torch.long), torch.arange(len(labels))], 1)
            prompt = self._build_inputs(without_image, None, check=False)
            scores -= alpha * self._log_likelihood(prompt, labels, lengths, of_texts)[wanted[:, 1]]
        return scores.view(len(input_ids), len(labels)) if pairs is None else scores

    def _log_likelihood(
        self: Any, prompts: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor, pairs: torch.Tensor
    ) -> torch.Tensor:
        """`(P,)`: log P per token of the texts of `pairs` after their prompts, whose inputs are `(B, T, H)`."""
        parts, order = [], []
        for start in range(0, len(prompts), MAX_PROMPTS):
            own = ((pairs[:, 0] >= start) & (pairs[:, 0] < start + MAX_PROMPTS)).nonzero()[:, 0]
            if len(own):
                part = prompts[start : start + MAX_PROMPTS]
                moved = pairs[own] - torch.tensor([start, 0])
                parts.append(self._log_likelihood_of_part(part, labels, lengths, moved))
                order.append(own)
        scores = torch.cat(parts) if parts else torch.zeros(0)
        return scores[torch.cat(order).argsort()] if order else scores

    def _log_likelihood_of_part(
        self: Any, prompts: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor, pairs: torch.Tensor
    ) -> torch.Tensor:
        outputs = self._run_language_model(prompts, None, None, use_cache=True)
        cache, last = getattr(outputs, CACHE_NAME), outputs.last_hidden_state[:, -1:]
        # Indices stay on the CPU, because the layers of the language model may be on several devices.
        ids, labels = labels.clamp(min=0).to(prompts.device), labels.to(last.device)
        scores = torch.empty(len(pairs), device=last.device)
        max_tokens = MAX_TOKENS.get(prompts.device.type, MAX_TOKENS_ELSEWHERE)
        # Every pair has a copy of its prompt's keys and values beside its own.
        tokens = lengths[pairs[:, 1]] + prompts.shape[1]
        for batch in batches_by_length(tokens.tolist(), len(pairs), max_tokens):
            rows, texts = pairs[batch].T
            length = int(lengths[texts].max())
            states = last[rows]
            if length > 1:
                inputs = self.get_input_embeddings()(ids[texts, : length - 1])
                past = {CACHE_NAME: _selected(cache, rows), "use_cache": True}
                hidden = self._run_language_model(inputs, None, None, **past).last_hidden_state
                states = torch.cat([states, hidden], 1)
            targets = labels[texts, :length]
            losses = self._token_losses(states.flatten(0, 1), targets.flatten()).view(targets.shape)
            scores[batch] = -losses.sum(1) / targets.ne(-100).sum(1)
        return scores

    def _token_losses(self: Any, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`(N,)` in float32, 0 where the target is -100; many logits are computed in parts."""
        size = max(1, MAX_LOGITS // self.config.text_config.vocab_size)
        parts = zip(states.split(size), targets.split(size))
        return torch.cat([cross_entropy(self._logits(s).float(), t, reduction="none") for s, t in parts])


def _lengths(labels: torch.Tensor) -> torch.Tensor:
    """
    Tokens of each text, `(N,)`, on the CPU.

    Raises:
        ValueError: for a text without tokens, or with -100 before its end.
    """
    is_token = labels.cpu().ne(-100)
    lengths = is_token.sum(1)
    for fault, rows in (
        ("has no token to score", lengths.eq(0)),
        ("has -100 before its end", is_token.int().diff(dim=1).gt(0).any(1)),
    ):
        if rows.any():
            raise ValueError(f"labels[{int(rows.int().argmax())}] {fault}; let the processor write it (task='score').")
    return lengths


def _checked_pairs(pairs: torch.Tensor, prompts: int, texts: int) -> torch.Tensor:
    """Returns `pairs`. Raises ValueError for a prompt or text that does not exist."""
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs have the shape {tuple(pairs.shape)}, but must be (P, 2): prompt and text.")
    unknown = ((pairs < 0) | (pairs >= torch.tensor([prompts, texts]))).any(1)
    if unknown.any():
        row = int(unknown.int().argmax())
        raise ValueError(f"pairs[{row}] is {pairs[row].tolist()}, but there are {prompts} prompts and {texts} texts.")
    return pairs


def _selected(cache: Any, rows: torch.Tensor) -> Any:
    """A cache of some rows, some of them several times; `cache` itself stays as it is."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected


__all__ = ["LikelihoodMixin"]
