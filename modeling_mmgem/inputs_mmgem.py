"""The language model's input: soft prompts, visual tokens, and masks and positions where none were passed."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import torch_compilable_check


def soft_prompt_index(input_ids: torch.Tensor, cap_token_id: int, num_soft_prompts: int) -> torch.Tensor:
    """
    Where [CAP_1..64] stand (equation 6): a run of exactly 64 [CAP] tokens is a region's prompt, one is stage 1's.

    Returns:
        `torch.LongTensor` of shape `(B, T)`: the index i - 1 of [CAP_i], -1 elsewhere.
    """
    is_cap = input_ids.eq(cap_token_id)
    length = input_ids.shape[1]
    index = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    before = torch.where(is_cap, -1, index).cummax(-1).values
    behind = torch.where(is_cap, length, index).flip(-1).cummin(-1).values.flip(-1)
    is_soft = is_cap & (behind - before - 1 == num_soft_prompts)
    return torch.where(is_soft, index - before - 1, -1)


def place_visual_tokens(
    inputs_embeds: torch.Tensor, input_ids: torch.Tensor, visual_tokens: torch.Tensor, image_token_id: int
) -> torch.Tensor:
    """V_in `(N, H)` at the `<image>` placeholders of `(B, T, H)`, in row-major order."""
    is_image = input_ids.eq(image_token_id).to(inputs_embeds.device)
    visual_tokens = visual_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(is_image[..., None], visual_tokens)


def check_placeholders(input_ids: torch.Tensor, visual_tokens: int, image_token_id: int, emb_token_id: int) -> None:
    """
    Raises:
        ValueError: if there is another number of placeholders than of visual tokens; sentences may have none.
    """
    placeholders = input_ids.eq(image_token_id).sum()
    torch_compilable_check(
        placeholders.eq(visual_tokens) | (placeholders.eq(0) & input_ids.eq(emb_token_id).any()),
        f"The images or regions give {visual_tokens} visual tokens, but input_ids hold another number of <image> "
        f"placeholders (id {image_token_id}). Let the processor write the prompt; for regions, with the k of the "
        "active adapter: processor.region_grid_size = model.region_grid_size.",
    )


def mask_of_padding(input_ids: torch.Tensor, generation_config: Any) -> torch.Tensor | None:
    """
    The attention mask of rows that came without one: 0 on the run of pad tokens that a row begins with. Padding behind
    a text changes nothing, because attention is causal.
    """
    pad_token_id = generation_config.pad_token_id
    if pad_token_id is None:
        return None
    is_text = input_ids.ne(pad_token_id)
    if pad_token_id == generation_config.bos_token_id:  # the last token of the run is BOS
        is_text = nn.functional.pad(is_text[:, 1:], (0, 1), value=True)
    return is_text.long().cumsum(-1).clamp(max=1)


def positions_of_mask(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """Position ids `(B, length)` of the last tokens; tables of positions (GPT-2, OPT) would count left padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def check_length(length: int, cache: Any, model_type: str, max_positions: int) -> None:
    """
    Raises:
        ValueError: if `length` new tokens behind those in the cache go beyond a table of `max_positions` positions.
    """
    past = 0 if cache is None else cache.get_seq_length()
    # A static cache keeps its length on the device; its maximum length is checked instead.
    length = cache.get_max_cache_shape() if torch.is_tensor(past) else length + past
    if length > max_positions:
        raise ValueError(
            f"A row has {length} tokens, but '{model_type}' has positions for {max_positions} only. Truncate the text "
            "(max_length), or generate less."
        )


def batches_by_length(lengths: Sequence[int], batch_size: int, max_tokens: int | None) -> Iterator[list[int]]:
    """Indices in batches, shortest first, of up to `max_tokens` with padding (but never none)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == batch_size or (max_tokens and (len(batch) + 1) * lengths[i] > max_tokens)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


__all__ = [
    "batches_by_length",
    "check_length",
    "check_placeholders",
    "mask_of_padding",
    "place_visual_tokens",
    "positions_of_mask",
    "soft_prompt_index",
]
