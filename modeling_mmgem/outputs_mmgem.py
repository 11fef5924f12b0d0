"""What [`MMGEMModel`] returns, and what a trainer passes to it."""

from dataclasses import dataclass, fields
from typing import TypedDict

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast


# transformers 5.24 renamed `past_key_values` to `cache`.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


@dataclass
class MMGEMOutput(CausalLMOutputWithPast):
    """
    Output of [`MMGEMModel`] for N texts and M images (or regions, those of `region_mask` alone).

    Args:
        loss (`torch.FloatTensor`, scalar): sum of the two losses below that were computed (equation 4).
        logits (`torch.FloatTensor` of shape `(B, T, vocab_size)`): next-token scores.
        cache, or past_key_values before transformers 5.24 (`Cache`): with `use_cache=True`.
        hidden_states, attentions (`tuple` of `torch.FloatTensor`): of the language model, with
            `output_hidden_states=True` and `output_attentions=True`.
        contrastive_loss (`torch.FloatTensor`, scalar): L_Emb, with `return_loss=True`.
        caption_loss (`torch.FloatTensor`, scalar): L_Gen in nats per caption token, with `labels`.
        logits_per_image (`torch.FloatTensor` of shape `(M, N)`): scaled cosine similarities (plus the bias).
        logits_per_text (`torch.FloatTensor` of shape `(N, M)`): the same, transposed.
        image_embeds (`torch.FloatTensor` of shape `(M, D)`): unit norm, float32 or wider; `(B, R, D)` with boxes or
            masks.
        text_embeds (`torch.FloatTensor` of shape `(N, D)`): unit norm, float32 or wider, in row-major order of [EMB].
        logit_scale (`torch.FloatTensor`, scalar): 1 / tau, if there are texts and images.
        logit_bias (`torch.FloatTensor`, scalar): that of SigLIP's loss, of a model that has one.
    """

    contrastive_loss: torch.Tensor | None = None
    caption_loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None
    logit_bias: torch.Tensor | None = None


class TrainingInputs(TypedDict, total=False):
    """
    What a trainer passes to `forward` beside its arguments.

    Args:
        num_items_in_batch (`int` or scalar tensor): see [`caption_loss`].
        pooled_features (`torch.FloatTensor` of shape `(B, C)` or `(B, 2 C)`): what images are embedded from, of images
            that went through the vision tower before; instead of `pixel_values`.
        patch_features (`torch.FloatTensor` of shape `(B, rows, columns, C)`): their V for regions, or its means in
            k x k cells; not needed for whole images with one visual token.
        text_positions, label_positions (`torch.LongTensor` of shapes `(N,)` and `(L,)`): indices into
            `input_ids.flatten()` of the [EMB] to read, in the order of the texts wanted, and of all labels that are
            not -100. A collator that passes them spares the host from waiting for the device to find them; its prompts
            are then trusted to match the images.
    """

    num_items_in_batch: torch.Tensor | int | None
    pooled_features: torch.Tensor | None
    patch_features: torch.Tensor | None
    text_positions: torch.Tensor | None
    label_positions: torch.Tensor | None


__all__ = ["CACHE_NAME", "MMGEMOutput", "TrainingInputs"]
