"""MM-GEM configuration: the architecture, and nothing about training."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


TOKEN_IDS = ("image_token_id", "cap_token_id", "emb_token_id")


@strict
class MMGEMConfig(PreTrainedConfig):
    r"""
    Configuration of [`MMGEMModel`]: a vision encoder, one language model, and the maps h1 to h4 between them.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*, defaults to `CLIPVisionConfig`):
            The ViT: any of `mmgem.modeling_mmgem.towers_mmgem.VISION_TOWERS`, such as `clip_vision_model`,
            `siglip_vision_model`, `siglip2_vision_model`, `dinov2` or `dinov3_vit`.
        text_config (`dict` or `PreTrainedConfig`, *optional*, defaults to `LlamaConfig`):
            The language model: any causal LM of transformers with attention only (no recurrent state).
        projection_dim (`int`, *optional*, defaults to 512):
            D, the size of the shared embedding space.
        image_token_id, cap_token_id, emb_token_id (`int`, *optional*, default to -3, -2, -1):
            Ids of `<image>` (a visual token's place), `[CAP]` (a caption starts) and `[EMB]` (the sentence
            embedding is read here); negative ones count from the end of the vocabulary.
        image_pooling (`str`, *optional*, defaults to `"mean"`):
            What a whole image is embedded from: `"mean"` of its patches (the paper), `"cls"` (the class token),
            `"cls+mean"` (both, side by side), or `"tower"` (what CLIP or SigLIP and their like embed themselves: the
            class token, or the attention head's vector). Regions are pooled from patches.
        image_grid_size (`int`, *optional*, defaults to 1):
            k: a whole image becomes k x k visual tokens in front of its caption. 1 is the paper's: the token comes
            from the image's own embedding; otherwise from the patches in each cell of a k x k grid over the image.
        region_grid_size (`int`, *optional*, defaults to 7):
            k: a region becomes k x k visual tokens in front of its caption, unless an adapter has a k of its own. The
            default is measured (`benchmarks/region_grid_size.py`).
        num_soft_prompts (`int`, *optional*, defaults to 64):
            Length of a run of [CAP] that stands for the learned [CAP_i] of stage 2.
        lm_head_bias (`bool`, *optional*, defaults to `False`):
            Whether the language model's head has a bias (Phi's has).
        logit_scale_init_value (`float`, *optional*, defaults to ln(1 / 0.07)):
            Start of the learned log of 1/tau.
        logit_scale_max_value (`float`, *optional*, defaults to ln(1 / 0.01)):
            Upper bound of it: tau never falls below 0.01.
        logit_bias_init_value (`float`, *optional*):
            Start of the learned bias of SigLIP's loss (there -10), which then is L_Emb; without it, InfoNCE is.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of what the two towers do not initialise themselves.

    Example:

    ```python
    >>> from mmgem import MMGEMConfig, MMGEMModel

    >>> config = MMGEMConfig(
    ...     vision_config={"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128,
    ...                    "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
    ...     text_config={"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    ...                  "num_attention_heads": 2, "vocab_size": 500},
    ...     projection_dim=64,
    ... )
    >>> model = MMGEMModel(config)
    ```
    """

    model_type = "mmgem"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: Any = None
    text_config: Any = None
    projection_dim: int = 512
    image_token_id: int = -3
    cap_token_id: int = -2
    emb_token_id: int = -1
    image_pooling: Literal["mean", "cls", "cls+mean", "tower"] = "mean"
    image_grid_size: int = 1
    region_grid_size: int = 7
    num_soft_prompts: int = 64
    lm_head_bias: bool = False
    logit_scale_init_value: float | int = math.log(1 / 0.07)
    logit_scale_max_value: float | int = math.log(1 / 0.01)
    logit_bias_init_value: float | int | None = None
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        set_fixed_image_size(self.vision_config)
        vocab_size = self.text_config.vocab_size
        for name in TOKEN_IDS:
            setattr(self, name, getattr(self, name) % vocab_size if getattr(self, name) < 0 else getattr(self, name))
        # The library ties by the top config, checkpoints of language models say it in their own.
        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True

    def check_image_grid_size(self) -> None:
        """Raises ValueError unless 1 <= k <= patches per side."""
        vision = self.vision_config
        if self.image_grid_size == 1:
            return
        side = vision.image_size // vision.patch_size
        if not 1 <= self.image_grid_size <= side:
            raise ValueError(
                f"image_grid_size must lie in [1, {side}], got {self.image_grid_size}: '{vision.model_type}' sees an "
                f"image as {side} x {side} patches."
            )

    def validate_token_ids(self) -> None:
        """Raises ValueError unless the three special tokens are distinct ids of the vocabulary."""
        ids = {name: getattr(self, name) for name in TOKEN_IDS}
        outside = {name: i for name, i in ids.items() if not 0 <= i < self.text_config.vocab_size}
        if outside or len(set(ids.values())) < len(ids):
            raise ValueError(
                f"image_token_id, cap_token_id and emb_token_id must be three distinct ids below the vocabulary's "
                f"{self.text_config.vocab_size}, got {ids}."
            )


def set_fixed_image_size(vision_config: Any) -> None:
    """
    Gives SigLIP 2, whose configuration names a number of patches only, the `image_size` (pixels per side) that its
    position embeddings are for. MM-GEM shows a tower square images of one size.
    """
    if not hasattr(vision_config, "image_size") and hasattr(vision_config, "num_patches"):
        vision_config.image_size = math.isqrt(vision_config.num_patches) * vision_config.patch_size


__all__ = ["MMGEMConfig", "set_fixed_image_size"]
