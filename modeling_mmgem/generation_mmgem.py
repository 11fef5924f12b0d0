"""Captions: `generate` for prompts of images and of regions, and `score` for given ones."""

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.utils import logging

from .adapters_mmgem import active_adapters_of
from .inputs_mmgem import check_placeholders, place_visual_tokens
from .likelihood_mmgem import LikelihoodMixin
from .vision_mmgem import EncodedImages


logger = logging.get_logger(__name__)

MAX_ROWS = 256  # captions that are generated at a time


class CaptionGenerationMixin(LikelihoodMixin, GenerationMixin):
    """transformers' `generate`, which encodes images once, before beams and samples multiply the rows."""

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self: Any, inputs: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """
        Captions: [`GenerationMixin.generate`] after `<bos> <image> [CAP]`, as the processor's `task="caption"` writes
        it, or a prompt of its `task="region-caption"`. More than 256 prompts are continued in parts, so that memory
        does not grow with the number of regions (except with `return_dict_in_generate`).

        Args:
            inputs, **kwargs: as [`GenerationMixin.generate`], with the inputs of `forward`.
            image_embeds (`torch.FloatTensor` of shape `(B, D)`, *optional*): instead of `pixel_values`, the embeddings
                that CLIP or SigLIP computed of the images, of any norm, such as vectors of an index. For models with
                `image_pooling="tower"` and one visual token per image.

        Returns:
            `torch.LongTensor` of shape `(B * num_return_sequences, T)`: prompt and caption, as every decoder of the
            library; `processor.batch_decode(ids, skip_special_tokens=True)` leaves the caption.

        Raises:
            ValueError: for images without a placeholder in `input_ids`, or with another number of them; for a
                sentence instead of a prompt; for images whose features are not finite; for `image_embeds` of another
                tower.
        """
        regions = {name: kwargs.pop(name, None) for name in ("boxes", "masks", "region_mask")}
        pixel_values, image_embeds = kwargs.pop("pixel_values", None), kwargs.pop("image_embeds", None)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        others = [name for name, value in {"pixel_values": pixel_values, **regions}.items() if value is not None]
        if image_embeds is not None and others:
            raise ValueError(f"image_embeds stand for whole images, without {others[0]}. Pass one of the two.")
        self._check_prompts(input_ids, pixel_values if image_embeds is None else image_embeds)
        if pixel_values is None and image_embeds is None:
            return super().generate(input_ids, **kwargs)
        if kwargs.get("attention_mask") is not None:
            input_ids, kwargs["attention_mask"] = _pad_left(input_ids, kwargs["attention_mask"])
        if image_embeds is None:
            images = self._encode_images(pixel_values, **regions)
            self._check_images(input_ids, images)
            owners = _owners(images)
            grid_size = self.region_grid_size if images.has_regions else self.config.image_grid_size
        else:
            images, owners, grid_size = None, self._tokens_of_embeds(image_embeds), 1
        tokens = len(owners) * grid_size**2
        check_placeholders(input_ids, tokens, self.config.image_token_id, self.config.emb_token_id)
        rows_at_a_time = len(input_ids) if kwargs.get("return_dict_in_generate") else MAX_ROWS
        generated: list[Any] = []
        for start in range(0, len(input_ids), rows_at_a_time):
            rows = slice(start, start + rows_at_a_time)
            ids = input_ids[rows]
            count = int(ids.eq(self.config.image_token_id).sum()) // grid_size**2
            inputs_embeds = self._build_inputs(ids, None, check=False)
            if images is None:
                visual_tokens = owners[:count]
            elif len(ids) == len(input_ids):
                visual_tokens = self._visual_tokens(images)
            else:
                visual_tokens = self._visual_tokens_of(images, owners[:count])
            inputs_embeds = place_visual_tokens(inputs_embeds, ids, visual_tokens, self.config.image_token_id)
            owners = owners[count:]
            options = {
                name: value[rows] if torch.is_tensor(value) and value.shape[:1] == input_ids.shape[:1] else value
                for name, value in kwargs.items()
            }
            generated.append(super().generate(ids, inputs_embeds=inputs_embeds, **options))
        if len(generated) == 1:
            return generated[0]
        longest = max(part.shape[1] for part in generated)
        pad = self.generation_config.pad_token_id
        return torch.cat([nn.functional.pad(part, (0, longest - part.shape[1]), value=pad) for part in generated])

    def _tokens_of_embeds(self: Any, image_embeds: torch.Tensor) -> torch.Tensor:
        """
        V_in of image embeddings that are normalised already.

        Raises:
            ValueError: for a model that captions patches, or vectors that this tower did not compute.
        """
        config = self.config
        if config.image_pooling != "tower" or config.image_grid_size > 1:
            raise ValueError(
                "Captions of image_embeds need a model with image_pooling 'tower' and image_grid_size 1, not "
                f"{config.image_pooling!r} and {config.image_grid_size}: pass the images."
            )
        if image_embeds.ndim != 2 or image_embeds.shape[1] != config.projection_dim:
            shape, expected = tuple(image_embeds.shape), f"(images, {config.projection_dim})"
            raise ValueError(f"image_embeds have the shape {shape}, but must be {expected}: embeddings of this tower.")
        if not bool(image_embeds.isfinite().all() and image_embeds.any(1).all()):
            raise ValueError("image_embeds hold NaN, infinity, or a vector of zeros. Embed these images again.")
        return self.caption_projection(self._rescaled(image_embeds.to(self.device)))

    def _check_prompts(self: Any, input_ids: torch.Tensor | None, images: torch.Tensor | None) -> None:
        """Raises ValueError for images without placeholders, and placeholders or a sentence without images."""
        has_placeholders = input_ids is not None and bool(input_ids.eq(self.config.image_token_id).any())
        if images is not None and not has_placeholders:
            raise ValueError(
                "The images have no <image> placeholder in input_ids, so no caption would see them; use "
                'processor(images=…, task="caption").'
            )
        if images is None and has_placeholders:
            raise ValueError("input_ids hold <image> placeholders, but there are no pixel_values to fill them.")
        if images is None and input_ids is not None and bool(input_ids.eq(self.config.emb_token_id).any()):
            raise ValueError(
                "input_ids hold a sentence, which ends with [EMB], so that nothing goes on from it. Pass images: "
                'processor(images=…, task="caption").'
            )

    def _check_images(self: Any, input_ids: torch.Tensor, images: EncodedImages) -> None:
        """
        Warns if the active modules were not trained for these prompts, so that captions will be worse.

        Raises:
            ValueError: for features that are not finite.
        """
        if not bool(images.features.isfinite().all() & images.pooled.isfinite().all()):
            raise ValueError(
                "The features of pixel_values are NaN or infinite, so no caption could be read from them. Check "
                "pixel_values, the weights, and whether their dtype is too small."
            )
        is_adapted = bool(active_adapters_of(self.soft_prompts))
        if is_adapted and not images.has_regions:
            logger.warning_once(
                "region-caption is active, but these are whole images and stage 1's prompt. Caption them as the "
                'region that covers them (boxes, task="region-caption"), or call model.disable_adapters() first.'
            )
        has_soft_prompts = int(input_ids[0].eq(self.config.cap_token_id).sum()) == self.config.num_soft_prompts
        if images.has_regions and has_soft_prompts and not self.soft_prompts.weight.any():
            logger.warning_once(
                "No adapter for region captions is active, and this model's soft prompts were never trained: its "
                "captions will be meaningless. Load an adapter: model.load_adapter(folder)."
            )

    def _visual_tokens_of(self: Any, images: EncodedImages, owners: torch.Tensor) -> torch.Tensor:
        """V_in of some images or regions: `owners` `(N, 2)` holds the image of each, and its region there."""
        tokens = []
        for index in owners[:, 0].unique().tolist():
            chosen = owners[owners[:, 0] == index, 1]
            boxes, masks = (
                None if regions is None else regions[index : index + 1, chosen]
                for regions in (images.boxes, images.masks)
            )
            own = slice(index, index + 1)
            pooled, patches = images.pooled[own], None if images.patches is None else images.patches[own]
            tokens.append(self._visual_tokens(EncodedImages(pooled, patches, boxes, masks)))
        return torch.cat(tokens)


def _owners(images: EncodedImages) -> torch.Tensor:
    """`(N, 2)`: the image of each prompt and its region there (0 for whole images), in the order of the prompts."""
    region_mask = images.region_mask
    if region_mask is None:
        regions = images.boxes if images.masks is None else images.masks
        region_mask = torch.ones(len(images.pooled), 1 if regions is None else regions.shape[1], dtype=torch.bool)
    return region_mask.nonzero()


def _pad_left(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves padding to the left: captions continue at the right end, where transformers' pipelines have padding."""
    padding = attention_mask.flip(-1).long().argmax(-1, keepdim=True)
    length = input_ids.shape[1]
    places = (torch.arange(length, device=input_ids.device) - padding) % length
    return input_ids.gather(1, places), attention_mask.gather(1, places)


__all__ = ["CaptionGenerationMixin"]
