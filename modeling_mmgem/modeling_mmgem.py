"""
PyTorch MM-GEM model: one vision encoder and one language model that embeds sentences and writes captions.

    pixels  -> vision_model -> V -> PoolAggregator -> visual_projection (h1) -> V_Emb (-> region_projection, h4)
    V_Emb   -> caption_projection (h3) -> V_in -> at the `<image>` placeholders of the language model's input
    tokens  -> language_model -> hidden state at [EMB] -> text_projection (h2) -> W_Emb
                              -> hidden states of the caption -> lm_head

Symbols are those of "Multi-Modal Generative Embedding Model" (arXiv 2405.19333). Its authors published no code. Where
the summaries at hand leave something open, this is our reading: V_in comes from V_Emb before it is normalised; V is
taken after the ViT's final norm, without CLS and registers; a prompt is "<bos> <image> [CAP]", with BOS where the
tokenizer has one; a region gives k x k visual tokens; tau is learned as the logarithm of 1 / tau.

Stage 2 trains caption_projection and soft_prompts, or region_projection, as adapters beside all other weights: see
`adapters_mmgem.py`.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import torch_compilable_check
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_mmgem import MMGEMConfig
from .adapters_mmgem import RegionAdapterMixin
from .generation_mmgem import CaptionGenerationMixin
from .losses_mmgem import caption_loss, contrastive_loss, similarity_logits
from .pipelines_mmgem import RegionCaptioningPipeline
from .pooling_mmgem import PoolAggregator


MAX_LOGITS = 2**27  # next-token scores that a loss computes at a time: 512 MiB in float32
# transformers 5.24 renamed `past_key_values` to `cache`.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
# Stage 1 does not train these: where a checkpoint has none, they start as the identity, and as copies of [CAP].
OPTIONAL_MODULES = ("region_projection", "soft_prompts")
VISION_MODEL_TYPES = ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "vit")


@dataclass
class MMGEMOutput(CausalLMOutputWithPast):
    """
    Output of [`MMGEMModel`]. N texts, M images (or regions, those of `region_mask` alone).

    Args:
        loss (`torch.FloatTensor`, scalar): sum of the two losses below that were computed (equation 4).
        logits (`torch.FloatTensor` of shape `(B, T, vocab_size)`): next-token scores.
        cache, or past_key_values before transformers 5.24 (`Cache`): with `use_cache=True`.
        hidden_states, attentions (`tuple` of `torch.FloatTensor`): of the language model, with
            `output_hidden_states=True` and `output_attentions=True`.
        contrastive_loss (`torch.FloatTensor`, scalar): L_Emb, with `return_loss=True`.
        caption_loss (`torch.FloatTensor`, scalar): L_Gen in nats per caption token, with `labels`.
        logits_per_image (`torch.FloatTensor` of shape `(M, N)`): scaled cosine similarities.
        logits_per_text (`torch.FloatTensor` of shape `(N, M)`): the same, transposed.
        image_embeds (`torch.FloatTensor` of shape `(M, D)`): unit norm, float32 or wider; `(B, R, D)` with boxes or
            masks.
        text_embeds (`torch.FloatTensor` of shape `(N, D)`): unit norm, float32 or wider, in row-major order of [EMB].
        logit_scale (`torch.FloatTensor`, scalar): 1 / tau, beside texts and images.
    """

    contrastive_loss: torch.Tensor | None = None
    caption_loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None


class LogitScale(nn.Module):
    """
    Times 1 / tau, which is learned as its logarithm and bounded. A module with a weight of one element, not a scalar
    of the model: PEFT trains and saves modules, FSDP shards vectors.
    """

    def __init__(self, init_value: float, max_value: float):
        super().__init__()
        self.init_value, self.max_value = init_value, max_value
        self.weight = nn.Parameter(torch.tensor([init_value]))

    def _apply(self, fn: Any, recurse: bool = True) -> "LogitScale":
        """Moves to a device; `.to(torch.bfloat16)` leaves the weight float32, or 1 / tau = 14.29 would be 14.24."""
        exact = self.weight.detach()
        super()._apply(fn, recurse)
        if exact.dtype == torch.float32 and self.weight.dtype in (torch.bfloat16, torch.float16):
            self.weight.data = exact.to(self.weight.device)
        return self

    def forward(self, similarities: torch.Tensor) -> torch.Tensor:
        """Of any shape; float32 out."""
        return similarities * self.weight[0].float().clamp(max=self.max_value).exp()


class MMGEMModel(RegionAdapterMixin, CaptionGenerationMixin, PreTrainedModel):
    """
    MM-GEM: the same language model embeds a text and captions a picture, an image's box or a mask of it.

    Example:

    ```python
    >>> model = AutoModel.from_pretrained("org/mm-gem").eval()
    >>> processor = AutoProcessor.from_pretrained("org/mm-gem")
    >>> texts = model.get_embedding(**processor(text=["a dog on a beach"], return_tensors="pt"))
    >>> pictures = model.get_embedding(**processor(images=[image], return_tensors="pt"))
    >>> similarity = texts @ pictures.T
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

    def __init__(self, config: MMGEMConfig):
        super().__init__(config)
        vision_config, text_config, dim = config.vision_config, config.text_config, config.projection_dim
        if vision_config.model_type not in VISION_MODEL_TYPES:
            raise ValueError(
                f"Vision tower '{vision_config.model_type}' is not supported; choose one of "
                f"{', '.join(VISION_MODEL_TYPES)}."
            )
        # ViT's pooling head would never get a gradient: we pool the patches.
        options = {"add_pooling_layer": False} if vision_config.model_type == "vit" else {}
        self.vision_model = AutoModel.from_config(vision_config, **options)
        self.language_model = AutoModel.from_config(text_config)
        if self.language_model._is_stateful:
            raise ValueError(
                f"Language model '{text_config.model_type}' carries a recurrent state, which would leak between the "
                "sequences of a row; choose one with attention only."
            )
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=config.lm_head_bias)
        self.pool_aggregator = PoolAggregator(vision_config.patch_size)
        self.visual_projection = nn.Linear(vision_config.hidden_size, dim)  # h1
        self.text_projection = nn.Linear(text_config.hidden_size, dim)  # h2
        self.caption_projection = nn.Linear(dim, text_config.hidden_size)  # h3
        self.region_projection = nn.Linear(dim, dim)  # h4
        # [CAP_i] minus [CAP]: zero is "a copy of [CAP]", whatever [CAP] has become.
        self.soft_prompts = nn.Embedding(config.num_soft_prompts, text_config.hidden_size)
        self.register_adapter_buffers()
        self.logit_scale = LogitScale(float(config.logit_scale_init_value), config.logit_scale_max_value)
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
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """
        [`PreTrainedModel.from_pretrained`], which would start missing weights at random with a line in the log.

        Raises:
            ValueError: naming the first weight that the checkpoint lacks, or that holds NaN or infinity.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        name = str(pretrained_model_name_or_path)
        missing = [key for key in info["missing_keys"] if key.split(".")[0] not in OPTIONAL_MODULES]
        if missing:
            raise ValueError(
                f"{name} is damaged: {min(missing)} is missing ({len(missing)} such weights). Take another copy."
            )
        refuse_not_finite(model, name)
        return (model, info) if output_loading_info else model

    @classmethod
    def from_vision_text_pretrained(cls, vision: str, text: str, **kwargs: Any) -> "MMGEMModel":
        """
        A model whose two towers come from checkpoints; the projections are new. See
        [`mmgem.modeling_mmgem.conversion_mmgem.from_vision_text_pretrained`] for arguments and errors.
        """
        from .conversion_mmgem import from_vision_text_pretrained

        return from_vision_text_pretrained(cls, vision, text, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.region_projection:
            init.eye_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.trained_on)  # type: ignore[arg-type]
        elif module is self.soft_prompts:
            init.zeros_(module.weight)
            init.zeros_(module.trained_on)  # type: ignore[arg-type]
            init.constant_(module.grid_size, self.config.region_grid_size)  # type: ignore[arg-type]
        elif isinstance(module, LogitScale):
            init.constant_(module.weight, module.init_value)
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
        Of the language model alone, as adapters under gradient checkpointing need it. The library's own would send
        gradients through a frozen vision tower, for nothing.
        """
        self.language_model.enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        self.language_model.disable_input_require_grads()

    # ---------------------------------------------------------------- pictures

    def _patch_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """V `(B, P, C)` after the ViT's final norm and without CLS and registers, and its grid (height, width)."""
        features = self.vision_model(pixel_values=pixel_values).last_hidden_state
        patch_size = self.pool_aggregator.patch_size
        grid = (pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size)
        features = features[:, features.shape[1] - grid[0] * grid[1] :]
        if self.config.vision_config.model_type == "clip_vision_model":  # CLIP's own output is before the norm
            features = self.vision_model.post_layernorm(features)
        return features, grid

    def _image_features(
        self,
        features: torch.Tensor,
        grid: tuple[int, int],
        boxes: torch.Tensor | None,
        masks: torch.Tensor | None,
    ) -> torch.Tensor:
        """V_Emb, `(B, D)`, or `(B, R, D)` through h4 for regions (equations 5 and 7)."""
        embeds = self.visual_projection(self.pool_aggregator(features, grid, boxes, masks))
        if boxes is None and masks is None:
            return embeds[:, 0]
        self.check_base_of(self.region_projection)
        return self.region_projection(embeds)

    def _visual_tokens(
        self,
        features: torch.Tensor,
        grid: tuple[int, int],
        boxes: torch.Tensor | None,
        masks: torch.Tensor | None,
        region_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """V_in `(N, H)`: one token per picture, k x k per region, in row-major order (equations 5 and 6)."""
        grid_size = 1
        if boxes is not None or masks is not None:
            self.check_base_of(self.soft_prompts)
            grid_size = self._active_grid_size()
        pooled = self.pool_aggregator(features, grid, boxes, masks, grid_size)
        tokens = self.caption_projection(self.visual_projection(pooled))
        if region_mask is not None:
            tokens = tokens.unflatten(1, (region_mask.shape[1], -1))[region_mask.to(tokens.device)]
        return tokens.flatten(0, -2)

    def get_image_features(
        self,
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
                `pixel_values`; the processor makes them from boxes of the original picture.
            masks (`torch.Tensor` of shape `(B, R, height, width)`, *optional*): instead of boxes.
            region_mask (`torch.BoolTensor` of shape `(B, R)`, *optional*): False where a region is padding; its
                embedding is zero.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` of shape `(B, D)`, or `(B, R, D)` with regions;
            `last_hidden_state` holds the patch features V `(B, P, C)`.
        """
        features, grid = self._patch_features(pixel_values)
        embeds = self._image_features(features, grid, boxes, masks)
        if region_mask is not None:
            embeds = embeds * region_mask[..., None].to(embeds.device)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=embeds)

    # ------------------------------------------------------------------- texts

    def get_text_features(
        self,
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
            ValueError: where a row has no [EMB].
        """
        is_emb = input_ids.eq(self.config.emb_token_id)
        torch_compilable_check(
            is_emb.any(-1).all(),
            f"A text has no [EMB] token (id {self.config.emb_token_id}) at its end; tokenize it with the processor.",
        )
        if attention_mask is None and position_ids is None:
            attention_mask = self._mask_of_padding(input_ids)
        hidden = self._language_hidden_states(
            self.get_input_embeddings()(input_ids), attention_mask, position_ids
        ).last_hidden_state
        last = input_ids.shape[1] - 1 - is_emb.flip(-1).int().argmax(-1)
        at_emb = hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)]
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=self.text_projection(at_emb))

    def get_embedding(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Embeddings of texts, of pictures, or of regions of pictures, in one space.

        Args: as [`get_text_features`] or [`get_image_features`].

        Returns:
            `torch.FloatTensor`: unit norm, `(B, D)`; `(B, R, D)` with boxes or masks (zero where `region_mask` is
            False). float32 whatever the weights' precision: in 16 bits a norm of 1 is off by up to 0.004.

        Raises:
            ValueError: for texts and pictures in one call, or neither.
        """
        if (input_ids is None) == (pixel_values is None):
            raise ValueError(
                "get_embedding takes texts (input_ids) or pictures (pixel_values), one of the two; call it twice to "
                "embed both."
            )
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, boxes, masks, region_mask)
        else:
            assert input_ids is not None
            features = self.get_text_features(input_ids, attention_mask)
        embeds: torch.Tensor = features.pooler_output  # type: ignore[assignment]
        return unit_norm(embeds)

    # ---------------------------------------------------------- language model

    def _language_hidden_states(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        kwargs.setdefault("use_cache", False)
        length, cache = inputs_embeds.shape[1], kwargs.get(CACHE_NAME)
        may_be_too_long = position_ids is None or cache is not None  # those of packed rows restart
        if attention_mask is not None and attention_mask.ndim == 2 and position_ids is None:
            # Tables of positions (GPT-2, OPT) would count padding on the left.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        if self._max_positions is not None and may_be_too_long and not torch.compiler.is_compiling():
            past = 0 if cache is None else cache.get_seq_length()
            # A static cache has its length on the device, and one that was planned for all tokens.
            length = cache.get_max_cache_shape() if torch.is_tensor(past) else length + past  # type: ignore[union-attr]
            if length > self._max_positions:
                raise ValueError(
                    f"A row has {length} tokens, but '{self.config.text_config.model_type}' has positions for "
                    f"{self._max_positions} only. Truncate the text (max_length), or generate less."
                )
        return self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )

    def _mask_of_padding(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """
        The attention mask of rows that came without one: the run of pad tokens that a row begins with. What stands
        behind a text changes nothing of it.
        """
        pad = self.generation_config.pad_token_id
        if pad is None:
            return None
        is_text = input_ids.ne(pad)
        if pad == self.generation_config.bos_token_id:  # the last one of the run is BOS
            is_text = nn.functional.pad(is_text[:, 1:], (0, 1), value=True)
        return is_text.long().cumsum(-1).clamp(max=1)

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The head, with what Granite (division), Cohere (factor) and Gemma2 (soft cap) do behind it."""
        config = self.config.text_config
        logits = self.lm_head(hidden_states)
        if getattr(config, "logits_scaling", None) is not None:
            logits = logits / config.logits_scaling
        if getattr(config, "logit_scale", None) is not None:
            logits = logits * config.logit_scale
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def _caption_loss(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        label_positions: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """L_Gen. The head runs only where there is something to predict; many logits are computed in parts."""
        if label_positions is None:
            is_target = nn.functional.pad(labels[:, 1:].ne(-100), (1, 0))  # nothing predicts the first token
            label_positions = is_target.flatten().nonzero()[:, 0]
        targets = labels.flatten()[label_positions].to(hidden_states.device)
        hidden_states = hidden_states.flatten(0, 1)[label_positions.to(hidden_states.device) - 1]
        count = max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch

        def loss(hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return caption_loss(self._logits(hidden_states), targets, count)

        if torch.compiler.is_compiling():  # each number of parts would be another graph
            return loss(hidden_states, targets)
        tokens = max(1, MAX_LOGITS // self.config.text_config.vocab_size)
        if len(targets) <= tokens:
            return loss(hidden_states, targets)
        # In training each part's logits are computed again in the backward pass, instead of being kept.
        parts = zip(hidden_states.split(tokens), targets.split(tokens))
        return torch.stack([checkpoint(loss, *part, use_reentrant=False) for part in parts]).sum()

    def _embed_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Input vectors `(B, T, H)`; every run of exactly 64 [CAP] becomes [CAP_1..64] (equation 6)."""
        inputs_embeds = self.get_input_embeddings()(input_ids)
        is_cap = input_ids.eq(self.config.cap_token_id)
        length = input_ids.shape[1]
        index = torch.arange(length, device=input_ids.device).expand_as(input_ids)
        before = torch.where(is_cap, -1, index).cummax(-1).values
        behind = torch.where(is_cap, length, index).flip(-1).cummin(-1).values.flip(-1)
        is_soft = is_cap & (behind - before - 1 == self.config.num_soft_prompts)
        soft = self.soft_prompts((index - before - 1).clamp(0, self.config.num_soft_prompts - 1))
        return inputs_embeds + (soft * is_soft[..., None].to(soft.device)).to(inputs_embeds.device)

    def _place_visual_tokens(
        self, inputs_embeds: torch.Tensor, input_ids: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """V_in at the `<image>` placeholders."""
        is_image = input_ids.eq(self.config.image_token_id).to(inputs_embeds.device)
        return inputs_embeds.masked_scatter(is_image[..., None], tokens.to(inputs_embeds.device, inputs_embeds.dtype))

    def _may_be_prompts(self, input_ids: torch.Tensor) -> bool:
        """False for CLIP's use of the model: [EMB] and no placeholder. A graph cannot branch on that."""
        if torch.compiler.is_compiling():
            return True
        is_sentence = input_ids.eq(self.config.emb_token_id).any() & ~input_ids.eq(self.config.image_token_id).any()
        return not bool(is_sentence)

    def _check_placeholders(self, input_ids: torch.Tensor, tokens: int) -> None:
        placeholders = input_ids.eq(self.config.image_token_id).sum()
        torch_compilable_check(
            placeholders.eq(tokens) | (placeholders.eq(0) & input_ids.eq(self.config.emb_token_id).any()),
            f"The pictures or regions give {tokens} visual tokens, but input_ids hold another number of <image> "
            f"placeholders (id {self.config.image_token_id}); let the processor write the prompt. Of regions it must "
            "be for the k of the active adapter: processor.region_grid_size = model.region_grid_size.",
        )

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
        patch_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_loss: bool | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        text_positions: torch.Tensor | None = None,
        label_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MMGEMOutput:
        """
        Everything that the inputs allow, in one pass of each tower.

        A row may hold any number of sequences, "text [EMB]" and "<image> [CAP] caption" alike: texts come out in
        row-major order of [EMB], images go in, in row-major order of their placeholders. Several sequences in a row
        need `position_ids` that restart at 0 and no `attention_mask`.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*).
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 on padding. Without it and without
                `position_ids`, padding is known by the pad token of `generation_config`.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*).
            pixel_values, boxes, masks, region_mask: see [`get_image_features`].
            patch_features (`torch.FloatTensor` of shape `(B, rows, columns, C)`, *optional*): V of images that went
                through the ViT before, instead of `pixel_values`.
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): the caption's tokens in their own places, -100
                elsewhere; the shift by one happens here. While training, the head then runs on these positions alone
                and `logits` is `None`.
            return_loss (`bool`, *optional*): compute L_Emb; text i belongs to image i. `False` leaves out the
                similarities too, which take memory in training.
            cache, past_key_values (`Cache`, *optional*): one cache under its names from and before transformers 5.24.
            logits_to_keep (`int` or `torch.Tensor`): see transformers' causal language models.
            num_items_in_batch (`int` or scalar tensor, *optional*): see [`caption_loss`].
            text_positions, label_positions (`torch.LongTensor` of shapes `(N,)` and `(L,)`, *optional*): indices into
                `input_ids.flatten()` of the [EMB] to read, in the order of the texts wanted, and of all labels that
                are not -100. A collator that hands them over spares the host from waiting for the device to find
                them; its prompts are then trusted to match the images.

        Returns:
            [`MMGEMOutput`]

        Raises:
            ValueError: neither texts nor images; images that do not match the placeholders; `return_loss` where
            texts and images differ in number; rows longer than the language model has positions for.
        """
        if input_ids is None and inputs_embeds is None and pixel_values is None and patch_features is None:
            raise ValueError("Pass input_ids (or inputs_embeds), pixel_values, or both.")
        cache = past_key_values if cache is None else cache
        logit_scale = self.logit_scale(torch.ones((), device=self.logit_scale.weight.device))
        image_embeds = text_embeds = logits = logits_per_text = contrastive = caption = outputs = None
        if patch_features is not None:
            features, grid = patch_features.flatten(1, 2), (patch_features.shape[1], patch_features.shape[2])
        elif pixel_values is not None:
            features, grid = self._patch_features(pixel_values)
        has_images = pixel_values is not None or patch_features is not None
        if has_images:
            image_embeds = self._image_features(features, grid, boxes, masks)
            if region_mask is not None:
                image_embeds = image_embeds * region_mask[..., None].to(image_embeds.device)
            image_embeds = unit_norm(image_embeds)

        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self._embed_tokens(input_ids)
            if has_images and (labels is not None or (text_positions is None and self._may_be_prompts(input_ids))):
                tokens = self._visual_tokens(features, grid, boxes, masks, region_mask)
                if label_positions is None:
                    self._check_placeholders(input_ids, len(tokens))
                inputs_embeds = self._place_visual_tokens(inputs_embeds, input_ids, tokens)
            elif not has_images and text_positions is None and (cache is None or input_ids.shape[1] > 1):
                torch_compilable_check(
                    ~input_ids.eq(self.config.image_token_id).any(),
                    "input_ids hold <image> placeholders, but there are no pixel_values to fill them.",
                )
            if attention_mask is None and position_ids is None and cache is None:
                attention_mask = self._mask_of_padding(input_ids)
        if inputs_embeds is not None:
            use_cache = cache is not None if use_cache is None else use_cache
            kwargs.update({"use_cache": use_cache, CACHE_NAME: cache})
            outputs = self._language_hidden_states(inputs_embeds, attention_mask, position_ids, **kwargs)
            hidden_states = outputs.last_hidden_state
            if input_ids is not None and cache is None:
                if text_positions is None:
                    at_emb = hidden_states[input_ids.eq(self.config.emb_token_id).to(hidden_states.device)]
                else:
                    at_emb = hidden_states.flatten(0, 1)[text_positions.to(hidden_states.device)]
                if torch.compiler.is_compiling() or len(at_emb) > 0:
                    text_embeds = unit_norm(self.text_projection(at_emb))
            if labels is not None:
                caption = self._caption_loss(hidden_states, labels, label_positions, num_items_in_batch)
            if labels is None or not self.training:
                logits = self._logits(slice_logits_to_keep(hidden_states, logits_to_keep))

        if text_embeds is not None and image_embeds is not None and return_loss is not False:
            images = image_embeds
            if images.ndim == 3:
                images = images.flatten(0, 1) if region_mask is None else images[region_mask.to(images.device)]
            images = images.to(text_embeds.device)
            logits_per_text = similarity_logits(text_embeds, images, logit_scale.to(text_embeds.device))
            if return_loss:
                if len(images) != len(text_embeds):
                    raise ValueError(
                        f"return_loss pairs text i with image i, but there are {len(text_embeds)} texts and "
                        f"{len(images)} images."
                    )
                contrastive = contrastive_loss(text_embeds, images, logit_scale.to(text_embeds.device))
        losses = [loss for loss in (contrastive, caption) if loss is not None]
        return MMGEMOutput(
            loss=torch.stack([loss.to(losses[0].device) for loss in losses]).sum() if losses else None,
            contrastive_loss=contrastive,
            caption_loss=caption,
            logits_per_image=None if logits_per_text is None else logits_per_text.T,
            logits_per_text=logits_per_text,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            logits=logits,
            logit_scale=None if text_embeds is None or image_embeds is None else logit_scale,
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
            **{CACHE_NAME: getattr(outputs, CACHE_NAME, None)},
        )


@torch.no_grad()
def refuse_not_finite(module: nn.Module, name: str) -> None:
    """
    Raises:
        ValueError: naming the first weight of `module` that holds NaN or infinity; `name` is the checkpoint's.
    """
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(
                f"{name} is damaged: {key} holds NaN or infinity, as after a training that diverged. Take an earlier "
                "checkpoint."
            )


def unit_norm(embeds: torch.Tensor) -> torch.Tensor:
    """Rows of norm 1, `(…, D)`, in float32 at least; a row of zeros (a region that is padding) stays zero."""
    return nn.functional.normalize(embeds.to(torch.promote_types(embeds.dtype, torch.float32)), dim=-1)


# The pipeline is imported so that its file is saved with this one: `custom_pipelines` of a Hub folder names it.
__all__ = ["MMGEMModel", "MMGEMOutput", "RegionCaptioningPipeline"]
