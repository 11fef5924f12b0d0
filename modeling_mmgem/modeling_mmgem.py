"""
PyTorch MM-GEM model: one vision encoder and one language model that embeds sentences and writes captions.

    pixels  -> vision_model -> V -> PoolAggregator -> visual_projection (h1) -> V_Emb (-> region_projection, h4)
    V_Emb   -> caption_projection (h3) -> V_in -> at the `<image>` placeholders of the language model's input
    tokens  -> language_model -> hidden state at [EMB] -> text_projection (h2) -> W_Emb
                              -> hidden states of the caption -> lm_head

Symbols are those of "Multi-Modal Generative Embedding Model" (arXiv 2405.19333), whose authors published no code.
Where the paper leaves something open, this is our reading: V_in comes from V_Emb before it is normalised; V is taken
after the ViT's final norm, without CLS and registers; a prompt is "<bos> <image> [CAP]", with BOS (or EOS) always;
a region gives k x k visual tokens; tau is learned as the logarithm of 1 / tau. With `config.image_pooling` and
`config.image_grid_size` whole images are embedded from other vectors, and give k x k visual tokens too.

Adapters of regions, and of texts with images, are trained beside these weights: see `adapters_mmgem.py`.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import torch_compilable_check
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_mmgem import MMGEMConfig
from .adapters_mmgem import AdapterMixin
from .conversion_mmgem import from_vision_text_pretrained
from .embedding_mmgem import EmbeddingMixin, unit_norm
from .generation_mmgem import CaptionGenerationMixin
from .inputs_mmgem import (
    check_length,
    check_placeholders,
    mask_of_padding,
    place_visual_tokens,
    positions_of_mask,
    soft_prompt_index,
)
from .loading_mmgem import CheckedLoadingMixin
from .losses_mmgem import LogitScale, caption_loss_of_states, contrastive_loss, scale_logits, similarity_logits
from .outputs_mmgem import CACHE_NAME, MMGEMOutput, TrainingInputs
from .pipelines_mmgem import RegionCaptioningPipeline
from .pooling_mmgem import PoolAggregator
from .vision_mmgem import EncodedImages, build_vision_model, check_image_pooling, check_vision_config, encode_images


class MMGEMModel(CheckedLoadingMixin, AdapterMixin, EmbeddingMixin, CaptionGenerationMixin, PreTrainedModel):
    """
    MM-GEM: one language model embeds a text, and captions an image, a box or a mask of it.

    Example:

    ```python
    >>> model = AutoModel.from_pretrained("org/mm-gem").eval()
    >>> processor = AutoProcessor.from_pretrained("org/mm-gem")
    >>> texts = model.get_embedding(**processor(text=["a dog on a beach"], return_tensors="pt"))
    >>> images = model.get_embedding(**processor(images=[image], return_tensors="pt"))
    >>> similarity = texts @ images.T
    >>> ids = model.generate(**processor(images=[image], task="caption", return_tensors="pt"), max_new_tokens=40)
    >>> captions = processor.batch_decode(ids, skip_special_tokens=True)
    ```
    """

    config: MMGEMConfig
    config_class = MMGEMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["logit_scale"]
    has_new_projections = False  # they start from the training data
    # Buffers of adapters in checkpoints of mmgem 0.1.0.
    _keys_to_ignore_on_load_unexpected = [r"\.trained_on$", r"\.grid_size$"]

    def __init__(self, config: MMGEMConfig):
        super().__init__(config)
        vision_config, text_config, dim = config.vision_config, config.text_config, config.projection_dim
        check_vision_config(vision_config, "vision_config")
        check_image_pooling(vision_config, config.image_pooling)
        config.check_image_grid_size()
        self.vision_model = build_vision_model(vision_config)
        self.language_model = AutoModel.from_config(text_config)
        if self.language_model._is_stateful:
            raise ValueError(
                f"Language model '{text_config.model_type}' carries a recurrent state, which would leak between the "
                "sequences of a row; choose one with attention only."
            )
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=config.lm_head_bias)
        self.pool_aggregator = PoolAggregator(vision_config.patch_size)
        pooled_size = vision_config.hidden_size * (2 if config.image_pooling == "cls+mean" else 1)
        self.visual_projection = nn.Linear(pooled_size, dim)  # h1
        self.text_projection = nn.Linear(text_config.hidden_size, dim)  # h2
        self.caption_projection = nn.Linear(dim, text_config.hidden_size)  # h3
        self.region_projection = nn.Linear(dim, dim)  # h4
        # [CAP_i] minus [CAP]: zero is "a copy of [CAP]", whatever [CAP] has become.
        self.soft_prompts = nn.Embedding(config.num_soft_prompts, text_config.hidden_size)
        self.logit_scale = LogitScale(
            config.logit_scale_init_value, config.logit_scale_max_value, config.logit_bias_init_value
        )
        embeddings = self.language_model.get_input_embeddings()
        # Rotary positions have no end; a table of positions has.
        has_table = any(isinstance(m, nn.Embedding) and m is not embeddings for m in self.language_model.modules())
        self._max_positions = getattr(text_config, "max_position_embeddings", None) if has_table else None
        name = next(name for name, module in self.language_model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"language_model.{name}.weight"}
        self.post_init()
        # CLIP's list names its text tower too, which FSDP would look for here.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = [name for name in self._no_split_modules or () if name in present]

    @classmethod
    def from_vision_text_pretrained(cls, vision: str, text: str, **kwargs: Any) -> "MMGEMModel":
        """
        A model whose two towers come from checkpoints; the projections are new. See
        [`mmgem.modeling_mmgem.conversion_mmgem.from_vision_text_pretrained`] for arguments and errors.
        """
        return from_vision_text_pretrained(cls, vision, text, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.region_projection:
            init.eye_(module.weight)
            init.zeros_(module.bias)
        elif module is self.soft_prompts:
            init.zeros_(module.weight)
        elif isinstance(module, LogitScale):
            module.init_weights()
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def enable_input_require_grads(self) -> None:
        """
        Lets gradients through the language model's inputs, as adapters under gradient checkpointing need it.
        transformers' own would send gradients through a frozen vision tower too, for nothing.
        """
        self.language_model.enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        self.language_model.disable_input_require_grads()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_loss: bool | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MMGEMOutput:
        """
        Computes everything that the inputs allow, in one pass of each tower.

        A row may hold any number of sequences, "text [EMB]" and "<image> [CAP] caption" alike: texts come out in
        row-major order of [EMB], images go in, in row-major order of their placeholders. Several sequences in a row
        need `position_ids` that restart at 0 and no `attention_mask`.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*).
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 on padding. Without it and without
                `position_ids`, leading tokens that are `generation_config.pad_token_id` are padding.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*).
            pixel_values, boxes, masks, region_mask: see [`get_image_features`].
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): the caption's tokens in their own places, -100
                elsewhere; the shift by one happens here. While training, the head then runs on these positions alone
                and `logits` is `None`.
            return_loss (`bool`, *optional*): compute L_Emb; text i belongs to image i. `False` leaves out the
                similarities too, which take memory in training.
            cache, past_key_values (`Cache`, *optional*): one cache under its names since and before transformers 5.24.
            logits_to_keep (`int` or `torch.Tensor`): see transformers' causal language models.
            **kwargs: [`TrainingInputs`], and options of the language model such as `output_hidden_states`.

        Returns:
            [`MMGEMOutput`]

        Raises:
            ValueError: for neither texts nor images; for images that do not match the placeholders; with
            `return_loss`, for another number of texts than of images; for rows longer than the language model has
            positions for.
        """
        extra = {name: kwargs.pop(name, None) for name in TrainingInputs.__annotations__}
        text_positions, label_positions = extra["text_positions"], extra["label_positions"]
        cache = past_key_values if cache is None else cache
        images = text_embeds = image_embeds = outputs = None
        pooled, patches = extra["pooled_features"], extra["patch_features"]
        if pixel_values is not None or pooled is not None:
            images = self._encode_images(pixel_values, boxes, masks, region_mask, pooled, patches)
            image_embeds = unit_norm(self._image_embeds(images))
        elif input_ids is None and inputs_embeds is None:
            raise ValueError("Pass input_ids (or inputs_embeds), pixel_values, or both.")
        if inputs_embeds is None and input_ids is not None:
            is_collated = text_positions is not None or label_positions is not None
            is_decoding = cache is not None and input_ids.shape[1] == 1
            # Collated rows without labels hold sentences only, which have no placeholders.
            shown = None if is_collated and labels is None else images
            inputs_embeds = self._build_inputs(input_ids, shown, check=not is_collated and not is_decoding)
            if attention_mask is None and position_ids is None and cache is None:
                attention_mask = mask_of_padding(input_ids, self.generation_config)
        captions: Any = {}
        if inputs_embeds is not None:
            kwargs.update({"use_cache": cache is not None if use_cache is None else use_cache, CACHE_NAME: cache})
            outputs = self._run_language_model(inputs_embeds, attention_mask, position_ids, **kwargs)
            hidden_states = outputs.last_hidden_state
            if input_ids is not None and cache is None:
                text_embeds = self._text_embeds(hidden_states, input_ids, text_positions)
            captions = self._caption_heads(
                hidden_states, labels, logits_to_keep, label_positions, extra["num_items_in_batch"]
            )
        contrast: Any = self._contrast(text_embeds, image_embeds, region_mask, return_loss)
        losses = [
            loss for loss in (contrast.get("contrastive_loss"), captions.get("caption_loss")) if loss is not None
        ]
        return MMGEMOutput(
            loss=torch.stack([loss.to(losses[0].device) for loss in losses]).sum() if losses else None,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            **contrast,
            **captions,
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
            **{CACHE_NAME: getattr(outputs, CACHE_NAME, None)},
        )

    # 1. Images: the vision tower once, then pooled for their embeddings and for their visual tokens.

    def _encode_images(
        self,
        pixel_values: torch.Tensor | None,
        boxes: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        pooled: torch.Tensor | None = None,
        patches: torch.Tensor | None = None,
    ) -> EncodedImages:
        """Images after the ViT, from pixels or from what was kept of an earlier pass: see [`TrainingInputs`]."""
        if pixel_values is not None:
            pooled, patches = encode_images(self.vision_model, pixel_values, self.config.image_pooling)
        assert pooled is not None
        return EncodedImages(pooled, patches, boxes, masks, region_mask)

    def _image_embeds(self, images: EncodedImages) -> torch.Tensor:
        """V_Emb, `(B, D)`, or `(B, R, D)` through h4 for regions (equations 5 and 7)."""
        if not images.has_regions:
            return self.visual_projection(images.pooled)
        embeds = self.region_projection(self._cell_embeds(images, 1))
        return embeds if images.region_mask is None else embeds * images.region_mask[..., None].to(embeds.device)

    def _visual_tokens(self, images: EncodedImages) -> torch.Tensor:
        """V_in `(N, H)`: k x k tokens per image or region, in row-major order (equations 5 and 6)."""
        tokens = self.caption_projection(self._caption_sources(images))
        if images.region_mask is not None:
            tokens = tokens.unflatten(1, (images.region_mask.shape[1], -1))[images.region_mask.to(tokens.device)]
        return tokens.flatten(0, -2)

    # 2. The language model's input.

    def _build_inputs(self, input_ids: torch.Tensor, images: EncodedImages | None, check: bool) -> torch.Tensor:
        """Input vectors `(B, T, H)`: tokens, soft prompts and visual tokens; `check` compares the placeholders."""
        inputs_embeds = self.get_input_embeddings()(input_ids)
        index = soft_prompt_index(input_ids, self.config.cap_token_id, self.config.num_soft_prompts)
        soft_prompts = self.soft_prompts(index.clamp(min=0))
        soft_prompts = soft_prompts * (index >= 0)[..., None].to(soft_prompts.device)
        inputs_embeds = inputs_embeds + soft_prompts.to(inputs_embeds.device)
        if images is not None:
            tokens = self._visual_tokens(images)
            if check:
                check_placeholders(input_ids, len(tokens), self.config.image_token_id, self.config.emb_token_id)
            return place_visual_tokens(inputs_embeds, input_ids, tokens, self.config.image_token_id)
        if check:
            torch_compilable_check(
                ~input_ids.eq(self.config.image_token_id).any(),
                "input_ids hold <image> placeholders, but there are no pixel_values to fill them.",
            )
        return inputs_embeds

    # 3. The language model.

    def _run_language_model(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """
        Hidden states `(B, T, H)` and cache.

        Raises:
            ValueError: for rows longer than a language model with a table of positions has positions for.
        """
        kwargs.setdefault("use_cache", False)
        length, cache = inputs_embeds.shape[1], kwargs.get(CACHE_NAME)
        may_be_too_long = position_ids is None or cache is not None  # those of packed rows restart
        if attention_mask is not None and attention_mask.ndim == 2 and position_ids is None:
            position_ids = positions_of_mask(attention_mask, length)
        if self._max_positions is not None and may_be_too_long and not torch.compiler.is_compiling():
            check_length(length, cache, self.config.text_config.model_type, self._max_positions)
        return self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )

    # 4. The heads: embeddings and L_Emb, next-token scores and L_Gen.

    def _text_embeds(
        self, hidden_states: torch.Tensor, input_ids: torch.Tensor, text_positions: torch.Tensor | None
    ) -> torch.Tensor | None:
        """W_Emb `(N, D)` of the hidden states at [EMB] (equation 1), unit norm; None for prompts, which have none."""
        if text_positions is None:
            at_emb = hidden_states[input_ids.eq(self.config.emb_token_id).to(hidden_states.device)]
        else:
            at_emb = hidden_states.flatten(0, 1)[text_positions.to(hidden_states.device)]
        has_texts = torch.compiler.is_compiling() or len(at_emb) > 0  # a graph cannot branch on their number
        return unit_norm(self.text_projection(at_emb)) if has_texts else None

    def _contrast(
        self,
        text_embeds: torch.Tensor | None,
        image_embeds: torch.Tensor | None,
        region_mask: torch.Tensor | None,
        return_loss: bool | None,
    ) -> dict[str, torch.Tensor]:
        """If there are texts and images: 1 / tau, their similarities, and L_Emb (equation 2)."""
        if text_embeds is None or image_embeds is None:
            return {}
        # By its forward, around which FSDP gathers weights
        origin, one = self.logit_scale(torch.arange(2.0, device=self.logit_scale.weight.device)).to(text_embeds.device)
        output = {"logit_scale": one - origin, **({} if self.logit_scale.bias is None else {"logit_bias": origin})}
        if return_loss is False:
            return output
        if region_mask is not None:
            image_embeds = image_embeds[region_mask.to(image_embeds.device)]
        elif image_embeds.ndim == 3:
            image_embeds = image_embeds.flatten(0, 1)
        embeds = (text_embeds, image_embeds.to(text_embeds.device), output["logit_scale"])
        logits_per_text = similarity_logits(*embeds) + origin
        output |= {"logits_per_text": logits_per_text, "logits_per_image": logits_per_text.T}
        if return_loss:
            texts, images = len(text_embeds), len(image_embeds)
            if texts != images:
                raise ValueError(
                    f"return_loss pairs text i with image i, but there are {texts} texts and {images} images."
                )
            output["contrastive_loss"] = contrastive_loss(*embeds, logit_bias=output.get("logit_bias"))
        return output

    def _caption_heads(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        label_positions: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> dict[str, torch.Tensor]:
        """L_Gen with labels (equation 3), and next-token scores, which training with labels leaves out."""
        output = {}
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            output["caption_loss"] = caption_loss_of_states(
                hidden_states, labels, self._logits, vocab_size, label_positions, num_items_in_batch
            )
        if labels is None or not self.training:
            output["logits"] = self._logits(slice_logits_to_keep(hidden_states, logits_to_keep))
        return output

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return scale_logits(self.lm_head(hidden_states), self.config.text_config)


# The pipeline is imported so that its file is saved with this one: `custom_pipelines` of a Hub folder names it.
__all__ = ["MMGEMModel", "MMGEMOutput", "RegionCaptioningPipeline"]
