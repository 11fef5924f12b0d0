"""Captions: `generate` for prompts of pictures and of regions."""

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin


MAX_ROWS = 256  # captions that are written at a time


class CaptionGenerationMixin(GenerationMixin):
    """transformers' `generate`, the pictures being encoded once, before beams and samples multiply the rows."""

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self: Any, inputs: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """
        Captions: [`GenerationMixin.generate`] after `<bos> <image> [CAP]`, as the processor's `task="caption"` writes
        it, or a prompt of its `task="region-caption"`. More than 256 prompts are continued in parts, so that memory
        does not grow with the number of regions (not with `return_dict_in_generate`).

        Returns:
            `torch.LongTensor` of shape `(B * num_return_sequences, T)`: prompt and caption, as every decoder of the
            library; `processor.batch_decode(ids, skip_special_tokens=True)` leaves the caption.

        Raises:
            ValueError: for pictures without a placeholder in `input_ids`.
        """
        picture = {name: kwargs.pop(name, None) for name in ("pixel_values", "boxes", "masks", "region_mask")}
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if picture["pixel_values"] is None:
            return super().generate(input_ids, **kwargs)
        if input_ids is None or not bool(input_ids.eq(self.config.image_token_id).any()):
            raise ValueError(
                "The pictures have no <image> placeholder in input_ids, so no caption would see them; use "
                'processor(images=…, task="caption").'
            )
        features, grid = self._patch_features(picture.pop("pixel_values"))
        tokens = self._visual_tokens(features, grid, **picture)
        self._check_placeholders(input_ids, tokens)
        at_a_time = len(input_ids) if kwargs.get("return_dict_in_generate") else MAX_ROWS
        parts = []
        for start in range(0, len(input_ids), at_a_time):
            rows = slice(start, start + at_a_time)
            ids = input_ids[rows]
            count = int(ids.eq(self.config.image_token_id).sum())
            embeds = self._place_visual_tokens(self._embed_tokens(ids), ids, tokens[:count])
            tokens = tokens[count:]
            options = {
                name: value[rows] if torch.is_tensor(value) and value.shape[:1] == input_ids.shape[:1] else value
                for name, value in kwargs.items()
            }
            parts.append(super().generate(ids, inputs_embeds=embeds, **options))
        if len(parts) == 1:
            return parts[0]
        longest = max(part.shape[1] for part in parts)
        pad = self.generation_config.pad_token_id
        return torch.cat([nn.functional.pad(part, (0, longest - part.shape[1]), value=pad) for part in parts])


__all__ = ["CaptionGenerationMixin"]
