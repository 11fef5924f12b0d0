"""The vision towers: which are supported, how they are built, and where their patch features V are."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection, PreTrainedModel


# A new tower needs its type here, its final norm in `encode_images`, and its options in `_without_pooler`; from
# scratch also its positions in mmgem/training/building.py.
VISION_MODEL_TYPES = ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "vit")


@dataclass
class EncodedImages:
    """
    Images after the vision tower, and the regions of them that are asked for.

    Args:
        pooled (`torch.FloatTensor` of shape `(B, C)`, or `(B, 2 C)` for "cls+mean"): what whole images are embedded
            from.
        patches (`torch.FloatTensor` of shape `(B, rows, columns, C)`): V; `None` where `pooled` is all that was kept
            of an image.
        boxes, masks, region_mask: see [`MMGEMModel.get_image_features`].
    """

    pooled: torch.Tensor
    patches: torch.Tensor | None
    boxes: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    region_mask: torch.Tensor | None = None

    @property
    def features(self) -> torch.Tensor:
        """V `(B, P, C)`, row by row of the grid."""
        assert self.patches is not None
        return self.patches.flatten(1, 2)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width; their product is P."""
        assert self.patches is not None
        return self.patches.shape[1], self.patches.shape[2]

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


def check_image_pooling(config: Any, image_pooling: str) -> None:
    """
    Raises:
        ValueError: if a vision tower has no class token to pool, or no embedding of its own.
    """
    kind = config.model_type
    if image_pooling == "tower" and not (
        kind == "clip_vision_model" or (kind == "siglip_vision_model" and config.vision_use_head)
    ):
        hint = "set vision_use_head in vision_config" if kind == "siglip_vision_model" else "choose cls or cls+mean"
        raise ValueError(f"image_pooling 'tower': '{kind}' has no image embedding of its own; {hint}.")
    if image_pooling in ("cls", "cls+mean") and kind == "siglip_vision_model":
        raise ValueError(f"image_pooling '{image_pooling}': '{kind}' has no class token. Choose mean or tower.")


def build_vision_model(config: Any) -> PreTrainedModel:
    """A vision tower with new weights, and without a pooling head, which would never get a gradient."""
    return AutoModel.from_config(config, **_without_pooler(config))


def encode_images(
    vision_model: Any, pixel_values: torch.Tensor, image_pooling: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Runs the ViT.

    Args:
        image_pooling: see [`MMGEMConfig`].

    Returns:
        what whole images are embedded from, `(B, C)` (`(B, 2 C)` for "cls+mean"), and V `(B, rows, columns, C)` after
        the ViT's final norm, without class token and registers.
    """
    config = vision_model.config
    outputs = vision_model(pixel_values=pixel_values)
    features = outputs.last_hidden_state
    if config.model_type == "clip_vision_model":  # CLIP's own output is before the norm
        features = vision_model.post_layernorm(features)
    grid = (pixel_values.shape[-2] // config.patch_size, pixel_values.shape[-1] // config.patch_size)
    patches = features[:, features.shape[1] - grid[0] * grid[1] :]
    if image_pooling == "tower":
        pooled = outputs.pooler_output
    elif image_pooling == "mean":
        pooled = patches.mean(1)
    else:
        pooled = features[:, 0]
    if image_pooling == "cls+mean":
        pooled = torch.cat([pooled, patches.mean(1)], -1)
    return pooled, patches.unflatten(1, grid)


def vision_config_of(vision: str, image_pooling: str = "mean") -> Any:
    """
    The configuration of a checkpoint's vision tower, as MM-GEM uses it.

    Args:
        vision: Hub id or folder of a CLIP, SigLIP, DINOv2 or ViT checkpoint.
        image_pooling: see [`MMGEMConfig`].

    Raises:
        ValueError: if the tower is not supported, or cannot be pooled in this way.
    """
    config = AutoConfig.from_pretrained(vision)
    config = getattr(config, "vision_config", config)
    check_vision_config(config, vision)
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = image_pooling == "tower"
    check_image_pooling(config, image_pooling)
    return config


def tower_projection_dim(vision: str) -> int:
    """The size of the image embeddings that a CLIP or SigLIP checkpoint computes itself."""
    config = AutoConfig.from_pretrained(vision)
    vision_config = getattr(config, "vision_config", config)
    return getattr(config, "projection_dim", vision_config.hidden_size)


def load_tower_projection(vision: str, config: Any) -> torch.Tensor:
    """
    The map `(D, C)` from what a checkpoint pools to its image embeddings: CLIP's projection; SigLIP's pooled vector is
    its embedding already.

    Raises:
        ValueError: if the checkpoint has no projection.
    """
    if config.model_type == "siglip_vision_model":
        return torch.eye(config.hidden_size)
    config = copy.deepcopy(config)
    config.projection_dim = tower_projection_dim(vision)  # the whole model's goes before the tower's own
    loader: Any = CLIPVisionModelWithProjection
    model, info = loader.from_pretrained(vision, config=config, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"image_pooling 'tower': {vision} lacks {', '.join(sorted(info['missing_keys'])[:5])}, so its images have "
            'no embedding of its own. Name the whole CLIP checkpoint, or choose "cls".'
        )
    return model.visual_projection.weight.detach()


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
    "check_image_pooling",
    "check_vision_config",
    "encode_images",
    "interpolate_positions",
    "load_tower_projection",
    "tower_projection_dim",
    "load_vision_model",
    "vision_config_of",
]
