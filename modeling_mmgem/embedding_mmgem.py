"""Embeddings: `get_embedding` of texts, images and regions."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import torch_compilable_check

from .inputs_mmgem import mask_of_padding
from .vision_mmgem import EncodedImages


class EmbeddingMixin:
    """Embeddings of [`MMGEMModel`], normalised or as transformers' `get_image_features` and `get_text_features`."""

    def get_image_features(
        self: Any,
        pixel_values: torch.Tensor,
        boxes: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """
        V_Emb, not normalised.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, height, width)`).
            boxes (`torch.FloatTensor` of shape `(B, R, 4)`, *optional*): `[x0, y0, x1, y1]` in pixels of
                `pixel_values`; the processor makes them from boxes of the original image.
            masks (`torch.Tensor` of shape `(B, R, height, width)`, *optional*): instead of boxes.
            region_mask (`torch.BoolTensor` of shape `(B, R)`, *optional*): False where a region is padding; its
                embedding is zero.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` of shape `(B, D)`, or `(B, R, D)` with regions;
            `last_hidden_state` holds the patch features V `(B, P, C)`.
        """
        images = self._encode_images(pixel_values, boxes, masks, region_mask)
        return BaseModelOutputWithPooling(last_hidden_state=images.features, pooler_output=self._image_embeds(images))

    def get_patch_embedding(self: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Every patch as a region of its own, as heat maps need it.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, height, width)`).

        Returns:
            `torch.FloatTensor` of shape `(B, P, D)`: unit norm, float32, row by row of the grid.
        """
        return self._patch_embeds(self._encode_images(pixel_values))

    def _patch_embeds(self: Any, images: EncodedImages) -> torch.Tensor:
        return unit_norm(self.region_projection(self._cell_embeds(images)))

    def compact_features(self: Any, pixel_values: torch.Tensor, grid_size: int | None) -> dict[str, torch.Tensor]:
        """
        What `forward` takes of images instead of `pixel_values`: see [`TrainingInputs`].

        Args:
            grid_size (`int`, *optional*): k of the cells to keep of V; 1 keeps none, None keeps V itself.

        Returns:
            `pooled_features` `(B, C)` or `(B, 2 C)`, and unless k is 1 `patch_features` `(B, k, k, C)`.
        """
        images = self._encode_images(pixel_values)
        features = {"pooled_features": images.pooled}
        if grid_size is None:
            features["patch_features"] = images.patches
        elif grid_size > 1:
            _check_grid(images, grid_size)
            cells = self.pool_aggregator(images.features, images.grid, grid_size=grid_size)
            features["patch_features"] = cells.unflatten(1, (grid_size, grid_size))
        return features

    def _caption_sources(self: Any, images: EncodedImages) -> torch.Tensor:
        """
        What h3 makes visual tokens of: h1 of each cell of an image or region, `(B, R * k * k, D)`, or with one token
        per image its own embedding. Only that of "tower" is normalised, so that a vector of an index gives its token.

        Raises:
            ValueError: for whole images with fewer patches per side than visual tokens.
        """
        if images.has_regions:
            return self._cell_embeds(images, self.region_grid_size)
        if (grid_size := self.config.image_grid_size) > 1:
            _check_grid(images, grid_size)
            return self._cell_embeds(images, grid_size)
        embeds = self.visual_projection(images.pooled)[:, None]
        return self._rescaled(embeds) if self.config.image_pooling == "tower" else embeds

    def _rescaled(self: Any, embeds: torch.Tensor) -> torch.Tensor:
        """Embeddings of any norm `(…, D)` with the norm sqrt(D), which gives their numbers unit variance."""
        return (unit_norm(embeds) * self.config.projection_dim**0.5).to(self.caption_projection.weight.dtype)

    def _cell_embeds(self: Any, images: EncodedImages, grid_size: int | None = None) -> torch.Tensor:
        """
        h1 of the patches pooled in the k x k cells of each region, or of the whole image: `(B, R * k * k, D)`. Without
        `grid_size` each patch is a cell.
        """
        vectors = images.features
        if grid_size is not None:
            vectors = self.pool_aggregator(vectors, images.grid, images.boxes, images.masks, grid_size)
        if self.config.image_pooling == "cls+mean":
            class_token = images.pooled[:, None, : vectors.shape[-1]]
            vectors = torch.cat([class_token.expand_as(vectors), vectors], -1)
        return self.visual_projection(vectors)

    def get_text_features(
        self: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """
        W_Emb, not normalised: h2 of the hidden state at [EMB] (equation 1).

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): one text per row, padded left or right.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*).

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` of shape `(B, D)`, `last_hidden_state` `(B, T, H)`.

        Raises:
            ValueError: if a row has no [EMB].
        """
        return self._features_at_emb(self.get_input_embeddings()(input_ids), input_ids, attention_mask, position_ids)

    def get_fused_features(
        self: Any,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """
        W_Emb of texts with images, not normalised: h2 of the hidden state at [EMB] of "<image> text [EMB]", by the
        active adapter of fused queries.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): of `processor(images=…, text=…, task="embed")`; without
                placeholders, as other libraries call the processor, they are put behind BOS here.
            pixel_values (`torch.FloatTensor` of shape `(B, 3, height, width)`): one image per text.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*).

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` of shape `(B, D)`, `last_hidden_state` `(B, T, H)`.

        Raises:
            ValueError: for another number of images than of texts, or another k of the placeholders; if no adapter of
                fused queries is active.
        """
        if len(input_ids) != len(pixel_values):
            raise ValueError(f"{len(input_ids)} texts came with {len(pixel_values)} images; each text needs one.")
        if attention_mask is None:
            attention_mask = mask_of_padding(input_ids, self.generation_config)
        if not torch.compiler.is_compiling() and not input_ids.eq(self.config.image_token_id).any():
            input_ids, attention_mask = self._with_placeholders(input_ids, attention_mask)
        images = self._encode_images(pixel_values)
        with self.in_fused_call():
            inputs_embeds = self._build_inputs(input_ids, images, check=True)
            return self._features_at_emb(inputs_embeds, input_ids, attention_mask)

    def _with_placeholders(
        self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows "(BOS) text [EMB]" with k x k `<image>` before the text, and their mask."""
        count = self.config.image_grid_size**2
        is_text = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        start = is_text.argmax(-1, keepdim=True)  # left padding ends here
        start = start + input_ids.gather(1, start).eq(self.generation_config.bos_token_id)
        index = torch.arange(input_ids.shape[1] + count, device=input_ids.device)
        source = torch.where(index < start, index, (index - count).clamp(min=0))
        is_image = (index >= start) & (index < start + count)
        ids = input_ids.gather(1, source).masked_fill(is_image, self.config.image_token_id)
        return ids, None if attention_mask is None else is_text.gather(1, source).masked_fill(is_image, 1)

    def _features_at_emb(
        self: Any,
        inputs_embeds: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """h2 of the hidden state at the last [EMB] of each row."""
        is_emb = input_ids.eq(self.config.emb_token_id)
        torch_compilable_check(
            is_emb.any(-1).all(),
            f"A text has no [EMB] token (id {self.config.emb_token_id}) at its end; tokenize it with the processor.",
        )
        if attention_mask is None and position_ids is None:
            attention_mask = mask_of_padding(input_ids, self.generation_config)
        hidden = self._run_language_model(inputs_embeds, attention_mask, position_ids).last_hidden_state
        last = input_ids.shape[1] - 1 - is_emb.flip(-1).int().argmax(-1)
        at_emb = hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)]
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=self.text_projection(at_emb))

    def get_embedding(
        self: Any,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        dim: int | None = None,
    ) -> torch.Tensor:
        """
        Embeddings of texts, of images, of regions of images, or of texts with images, in one space.

        Args: as [`get_text_features`], [`get_image_features`] or [`get_fused_features`], and
            dim (`int`, *optional*): the first `dim` numbers alone, for models trained with `matryoshka_dims`.

        Returns:
            `torch.FloatTensor`: unit norm, `(B, D)`; `(B, R, D)` with boxes or masks (zero where `region_mask` is
            False). float32 whatever the weights' precision: in 16 bits a norm of 1 is off by up to 0.004.

        Raises:
            ValueError: for neither texts nor images; for texts beside images that are not fused; for a `dim` that is
                not between 1 and D.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("Pass texts (input_ids), images (pixel_values), or texts with images (task='embed').")
        if dim is not None and not 1 <= dim <= self.config.projection_dim:
            raise ValueError(
                f"dim is {dim}, but embeddings have {self.config.projection_dim} numbers; pass at most that."
            )
        if input_ids is None:
            features = self.get_image_features(pixel_values, boxes, masks, region_mask)
        elif pixel_values is None:
            features = self.get_text_features(input_ids, attention_mask)
        else:
            if boxes is not None or masks is not None:
                raise ValueError("A text is embedded with a whole image. Leave out boxes and masks.")
            self._check_fused(input_ids)
            features = self.get_fused_features(input_ids, pixel_values, attention_mask)
        embeds: torch.Tensor = features.pooler_output  # type: ignore[assignment]
        return unit_norm(embeds[..., :dim])

    def _check_fused(self: Any, input_ids: torch.Tensor) -> None:
        """Raises ValueError for texts that are not written around an image."""
        torch_compilable_check(
            input_ids.eq(self.config.image_token_id).any(-1).all(),
            "A text holds no <image>. processor(images=…, text=…, task='embed') embeds each text with its image; to "
            "embed both by themselves, call get_embedding twice.",
        )


def unit_norm(embeds: torch.Tensor) -> torch.Tensor:
    """Rows of norm 1, `(…, D)`, in float32 at least; a row of zeros (a region that is padding) stays zero."""
    return nn.functional.normalize(embeds.to(torch.promote_types(embeds.dtype, torch.float32)), dim=-1)


def _check_grid(images: EncodedImages, grid_size: int) -> None:
    """Raises ValueError for images with fewer patches per side than k: processors may give smaller ones than usual."""
    if grid_size > min(images.grid):
        patches = " x ".join(map(str, images.grid))
        raise ValueError(
            f"image_grid_size is {grid_size}, but these images have {patches} patches only. Lower it, or raise the "
            "image processor's size."
        )


__all__ = ["EmbeddingMixin", "unit_norm"]
