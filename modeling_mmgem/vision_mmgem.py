"""The vision towers: which are supported, how they are built, and where their patch features V are."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel


# A new tower needs its type here, its final norm in `patch_features`, and its options in `_without_pooler`; from
# scratch also its positions in mmgem/training/building.py.
VISION_MODEL_TYPES = ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "vit")


@dataclass
class EncodedImages:
    """
    Images after the vision tower, and the regions of them that are asked for.

    Args:
        features (`torch.FloatTensor` of shape `(B, P, C)`): V, row by row of the grid.
        grid: patches along height and width; their product is P.
        boxes, masks, region_mask: see [`MMGEMModel.get_image_features`].
    """

    features: torch.Tensor
    grid: tuple[int, int]
    boxes: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    region_mask: torch.Tensor | None = None

    @property
    def has_regions(self) -> bool:
        return self.boxes is not None or self.masks is not None


def check_vision_config(config: Any, name: str) -> None:
    """
    Raises:
        ValueError: if the type of a vision tower's configuration is not supported; `name` is the tower's.
    """
    if config.model_type not in VISION_MODEL_TYPES:
        raise ValueError(
            f"Vision tower '{config.model_type}' ({name}) is not supported; choose one of "
            f"{', '.join(VISION_MODEL_TYPES)}."
        )


def build_vision_model(config: Any) -> PreTrainedModel:
    """A vision tower with new weights, and without a pooling head, which would never get a gradient."""
    return AutoModel.from_config(config, **_without_pooler(config))


def patch_features(vision_model: Any, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """V `(B, P, C)` after the ViT's final norm, without CLS and registers, and its grid (height, width)."""
    config = vision_model.config
    features = vision_model(pixel_values=pixel_values).last_hidden_state
    grid = (pixel_values.shape[-2] // config.patch_size, pixel_values.shape[-1] // config.patch_size)
    features = features[:, features.shape[1] - grid[0] * grid[1] :]
    if config.model_type == "clip_vision_model":  # CLIP's own output is before the norm
        features = vision_model.post_layernorm(features)
    return features, grid


def vision_config_of(vision: str) -> Any:
    """
    The configuration of a checkpoint's vision tower, as MM-GEM uses it.

    Args:
        vision: Hub id or folder of a CLIP, SigLIP, DINOv2 or ViT checkpoint.

    Raises:
        ValueError: if the tower is not supported.
    """
    config = AutoConfig.from_pretrained(vision)
    config = getattr(config, "vision_config", config)
    check_vision_config(config, vision)
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False
    return config


def load_vision_model(vision: str, config: Any, image_size: int | None, dtype: torch.dtype) -> PreTrainedModel:
    """
    A checkpoint's vision tower, its position embeddings interpolated if `image_size` is new.

    Raises:
        ValueError: if the checkpoint lacks weights of the tower, or `image_size` is not a multiple of its patch size.
    """
    options = {"dtype": dtype, **_without_pooler(config)}
    model, info = AutoModel.from_pretrained(vision, config=config, output_loading_info=True, **options)
    if missing := info["missing_keys"]:
        raise ValueError(f"{vision} lacks weights of its vision tower: {', '.join(sorted(missing)[:5])}.")
    if image_size is None or image_size == config.image_size:
        return model
    return interpolate_positions(model, image_size)


def interpolate_positions(model: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """
    The same vision tower for images of another size; its position embeddings are resampled as transformers does
    (bicubic).

    Raises:
        ValueError: if `image_size` is not a multiple of the patch size.
    """
    config = model.config
    if image_size % config.patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of the tower's patch_size {config.patch_size}.")
    new_config = copy.deepcopy(config)
    new_config.image_size = image_size
    resized = build_vision_model(new_config)
    state, shapes = model.state_dict(), resized.state_dict()
    for name in [name for name in state if state[name].shape != shapes[name].shape]:
        old, side = state[name], image_size // config.patch_size
        old_side = config.image_size // config.patch_size
        positions = old.reshape(-1, old.shape[-1])
        prefix, grid = positions[: len(positions) - old_side**2], positions[len(positions) - old_side**2 :]
        grid = grid.T.reshape(1, -1, old_side, old_side)
        antialias = config.model_type == "dinov2_with_registers"  # as that tower does it itself
        grid = nn.functional.interpolate(
            grid, size=(side, side), mode="bicubic", align_corners=False, antialias=antialias
        )
        state[name] = torch.cat([prefix, grid.flatten(2)[0].T]).reshape(shapes[name].shape)
    resized.load_state_dict(state)
    return resized.to(model.dtype)  # type: ignore[arg-type]


def _without_pooler(config: Any) -> dict[str, Any]:
    """Options of `AutoModel` that leave out ViT's pooling head; the other towers have no such option."""
    return {"add_pooling_layer": False} if config.model_type == "vit" else {}


__all__ = [
    "EncodedImages",
    "VISION_MODEL_TYPES",
    "build_vision_model",
    "check_vision_config",
    "interpolate_positions",
    "load_vision_model",
    "patch_features",
    "vision_config_of",
]
