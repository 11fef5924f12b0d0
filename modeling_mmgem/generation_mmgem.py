"""Captions: `generate` for prompts of pictures and of regions."""

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.utils import logging

from .adapters_mmgem import active_module


logger = logging.get_logger(__name__)

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
        does not grow with the number of regions (but with `return_dict_in_generate`).

        Returns:
            `torch.LongTensor` of shape `(B * num_return_sequences, T)`: prompt and caption, as every decoder of the
            library; `processor.batch_decode(ids, skip_special_tokens=True)` leaves the caption.

        Raises:
            ValueError: for pictures without a placeholder in `input_ids`, or with another number of them; for a
                sentence instead of a prompt; for pictures whose features are not finite.
        """
        parent: Any = super()
        picture = {name: kwargs.pop(name, None) for name in ("boxes", "masks", "region_mask")}
        pixel_values = kwargs.pop("pixel_values", None)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if pixel_values is None:
            if input_ids is not None and bool(input_ids.eq(self.config.image_token_id).any()):
                raise ValueError("input_ids hold <image> placeholders, but there are no pixel_values to fill them.")
            if input_ids is not None and bool(input_ids.eq(self.config.emb_token_id).any()):
                raise ValueError(
                    "input_ids hold a sentence, which ends with [EMB], so that nothing goes on from it. Pass images: "
                    'processor(images=…, task="caption").'
                )
            return parent.generate(input_ids, **kwargs)
        if input_ids is None or not bool(input_ids.eq(self.config.image_token_id).any()):
            raise ValueError(
                "The pictures have no <image> placeholder in input_ids, so no caption would see them; use "
                'processor(images=…, task="caption").'
            )
        if kwargs.get("attention_mask") is not None:
            input_ids, kwargs["attention_mask"] = _pad_left(input_ids, kwargs["attention_mask"])
        self._warn_of_prompts(input_ids, of_regions=picture["boxes"] is not None or picture["masks"] is not None)
        features, grid = self._patch_features(pixel_values)
        if not bool(features.isfinite().all()):
            raise ValueError(
                "The features of pixel_values are NaN or infinite, so no caption could be read from them. Check "
                "pixel_values, the weights, and whether their dtype is too small."
            )
        at_a_time = len(input_ids) if kwargs.get("return_dict_in_generate") else MAX_ROWS
        if len(input_ids) <= at_a_time:
            tokens = self._visual_tokens(features, grid, **picture)
            self._check_placeholders(input_ids, len(tokens))
            embeds = self._place_visual_tokens(self._embed_tokens(input_ids), input_ids, tokens)
            return parent.generate(input_ids, inputs_embeds=embeds, **kwargs)
        owners = self._owners(len(pixel_values), **picture)
        grid_size = 1 if picture["boxes"] is None and picture["masks"] is None else self._active_grid_size()
        self._check_placeholders(input_ids, len(owners) * grid_size**2)
        parts: list[Any] = []
        for start in range(0, len(input_ids), at_a_time):
            rows = slice(start, start + at_a_time)
            ids = input_ids[rows]
            count = int(ids.eq(self.config.image_token_id).sum()) // grid_size**2
            tokens = self._tokens_of(owners[:count], features, grid, picture["boxes"], picture["masks"])
            owners = owners[count:]
            embeds = self._place_visual_tokens(self._embed_tokens(ids), ids, tokens)
            options = {
                name: value[rows] if torch.is_tensor(value) and value.shape[:1] == input_ids.shape[:1] else value
                for name, value in kwargs.items()
            }
            parts.append(parent.generate(ids, inputs_embeds=embeds, **options))
        longest = max(part.shape[1] for part in parts)
        pad = self.generation_config.pad_token_id
        return torch.cat([nn.functional.pad(part, (0, longest - part.shape[1]), value=pad) for part in parts])

    def _warn_of_prompts(self: Any, input_ids: torch.Tensor, of_regions: bool) -> None:
        """Where what is active was not trained for them, captions are worse than they need be."""
        adapter = active_module(self.soft_prompts)
        if not of_regions and adapter is not None:
            logger.warning_once(
                "region-caption is active, but these are whole pictures and stage 1's prompt. Caption them as the "
                'region that covers them (boxes, task="region-caption"), or call model.disable_adapters() first.'
            )
        learned = self.soft_prompts.weight if adapter is None else adapter.weight
        has_soft_prompts = int(input_ids[0].eq(self.config.cap_token_id).sum()) == self.config.num_soft_prompts
        if of_regions and has_soft_prompts and not learned.any():
            logger.warning_once(
                "No adapter for region captions is active, and this model's soft prompts were never trained: expect "
                "nothing of these captions. model.load_adapter(folder) loads one."
            )

    @staticmethod
    def _owners(
        pictures: int, boxes: torch.Tensor | None, masks: torch.Tensor | None, region_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """`(N, 2)`: each prompt's picture and its region there (0 for whole pictures)."""
        regions = boxes if masks is None else masks
        if region_mask is None:
            region_mask = torch.ones(pictures, 1 if regions is None else regions.shape[1], dtype=torch.bool)
        return region_mask.nonzero()

    def _tokens_of(
        self: Any,
        owners: torch.Tensor,
        features: torch.Tensor,
        grid: tuple[int, int],
        boxes: torch.Tensor | None,
        masks: torch.Tensor | None,
    ) -> torch.Tensor:
        """V_in of these pictures or regions alone."""
        tokens = []
        for index in owners[:, 0].unique().tolist():
            regions = owners[owners[:, 0] == index, 1]
            of_boxes, of_masks = (None if r is None else r[index : index + 1, regions] for r in (boxes, masks))
            tokens.append(self._visual_tokens(features[index : index + 1], grid, of_boxes, of_masks, None))
        return torch.cat(tokens)


def _pad_left(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions go on at the right end, where transformers' pipelines have the padding of a batch of prompts."""
    padding = attention_mask.flip(-1).long().argmax(-1, keepdim=True)
    length = input_ids.shape[1]
    places = (torch.arange(length, device=input_ids.device) - padding) % length
    return input_ids.gather(1, places), attention_mask.gather(1, places)


__all__ = ["CaptionGenerationMixin"]
