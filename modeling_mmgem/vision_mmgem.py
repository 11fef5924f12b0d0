"""Vision towers built, loaded and run: whole images and patch features V, by the rows of `towers_mmgem.py`."""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..configuration.configuration_mmgem import set_fixed_image_size
from .towers_mmgem import VISION_TOWERS


# AIMv2 and AltCLIP's vision classes do not know their prefix in a checkpoint of both towers, and transformers saves
# AltCLIP's layers by a name that it does not read.
NAMES_OF_WHOLE_CHECKPOINTS = {r"^vision_model\.encoder\.layer\.": "encoder.layers.", r"^vision_model\.": ""}


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
    if config.model_type not in VISION_TOWERS:
        raise ValueError(
            f"Vision tower '{config.model_type}' ({name}) is not supported; choose one of {', '.join(VISION_TOWERS)}."
        )


def check_image_pooling(config: Any, image_pooling: str) -> None:
    """
    Raises:
        ValueError: if a vision tower has no class token to pool, or no embedding of its own.
    """
    kind, tower = config.model_type, VISION_TOWERS[config.model_type]
    others = "mean, cls or cls+mean" if tower.has_class_token else "mean"
    if image_pooling == "tower" and tower.embedding is None:
        raise ValueError(f"image_pooling 'tower': '{kind}' has no image embedding of its own; choose {others}.")
    if image_pooling == "tower" and tower.head_option and not getattr(config, tower.head_option):
        raise ValueError(
            f"image_pooling 'tower': this '{kind}' has no attention head; set {tower.head_option} in vision_config."
        )
    if "cls" in image_pooling and not tower.has_class_token:
        hint = "mean or tower" if tower.embedding else "mean"
        raise ValueError(f"image_pooling '{image_pooling}': '{kind}' has no class token. Choose {hint}.")


def build_vision_model(config: Any) -> PreTrainedModel:
    """A vision tower with new weights, and without a pooling head, which would never get a gradient."""
    return _model_class(config)._from_config(config, **_without_pooler(config))


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
    tower = VISION_TOWERS[config.model_type]
    outputs = vision_model(**tower.inputs(pixel_values, config.patch_size))
    features = outputs.last_hidden_state
    if tower.final_norm is not None and getattr(config, "use_mean_pooling", True):  # BEiT norms itself otherwise
        features = vision_model.get_submodule(tower.final_norm)(features)
    grid = (pixel_values.shape[-2] // config.patch_size, pixel_values.shape[-1] // config.patch_size)
    patches = features[:, features.shape[1] - grid[0] * grid[1] :]
    if image_pooling == "tower":
        pooled = outputs.pooler_output
    elif image_pooling == "mean":
        pooled = patches.mean(1)
    else:
        pooled = features[:, : getattr(config, "n_cls_tokens", 1)].mean(1)  # Pixio has several
    if image_pooling == "cls+mean":
        pooled = torch.cat([pooled, patches.mean(1)], -1)
    return pooled, patches.unflatten(1, grid)


def vision_config_of(vision: str, image_pooling: str = "mean", **options: Any) -> Any:
    """
    The configuration of a checkpoint's vision tower, as MM-GEM uses it.

    Args:
        vision: Hub id or folder of a checkpoint with one of `VISION_TOWERS`.
        image_pooling: see [`MMGEMConfig`].
        **options: where the files are, such as `revision`.

    Raises:
        ValueError: if the tower is not supported, or cannot be pooled in this way.
    """
    config = AutoConfig.from_pretrained(vision, **options)
    config = getattr(config, "vision_config", config)
    check_vision_config(config, vision)
    set_fixed_image_size(config)
    if head_option := VISION_TOWERS[config.model_type].head_option:
        setattr(config, head_option, image_pooling == "tower")
    check_image_pooling(config, image_pooling)
    return config


def tower_projection_dim(vision: str, **options: Any) -> int:
    """The size of the image embeddings that a checkpoint computes itself; `options` as in [`vision_config_of`]."""
    config = AutoConfig.from_pretrained(vision, **options)
    vision_config = getattr(config, "vision_config", config)
    return getattr(config, "projection_dim", vision_config.hidden_size)


class _TowerProjection(PreTrainedModel):
    """The one matrix of a CLIP-like checkpoint that maps pooled features to embeddings."""

    config_class = PreTrainedConfig
    _keys_to_ignore_on_load_unexpected = [""]  # the towers

    def __init__(self, config: Any):
        super().__init__(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()


def load_tower_projection(vision: str, config: Any, **options: Any) -> torch.Tensor:
    """
    The map `(D, C)` from what a checkpoint pools to its image embeddings: that of CLIP and its kin, or the identity
    where the pooled vector is the embedding already (SigLIP).

    Args:
        config: of the vision tower.
        **options: as in [`vision_config_of`].

    Raises:
        ValueError: if the checkpoint has no projection.
    """
    if VISION_TOWERS[config.model_type].embedding == "pooled":
        return torch.eye(config.hidden_size)
    sizes = PreTrainedConfig(
        hidden_size=config.hidden_size,
        projection_dim=tower_projection_dim(vision, **options),  # type: ignore[call-arg]
    )
    loader: Any = _TowerProjection
    model, info = loader.from_pretrained(
        vision, config=sizes, dtype=torch.float32, output_loading_info=True, **options
    )
    if missing := info["missing_keys"]:
        raise ValueError(
            f"image_pooling 'tower': {vision} lacks {', '.join(sorted(missing))}, so its images have no embedding of "
            "its own. Name the whole checkpoint of both towers, or choose another image_pooling."
        )
    return model.visual_projection.weight.detach()


def load_vision_model(
    vision: str, config: Any, image_size: int | None, dtype: torch.dtype, **options: Any
) -> PreTrainedModel:
    """
    A checkpoint's vision tower, its position embeddings interpolated if `image_size` is new; `options` as in
    [`vision_config_of`].

    Raises:
        ValueError: if the checkpoint lacks weights of the tower, or `image_size` is not a multiple of its patch size.
    """
    reports, of_this_tower = logging.getLogger("transformers.modeling_utils"), _ReportsOfThisTower()
    reports.addFilter(of_this_tower)
    try:
        model, info = _model_class(config).from_pretrained(
            vision,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            key_mapping=NAMES_OF_WHOLE_CHECKPOINTS,
            **_without_pooler(config),
            **options,
        )
    finally:
        reports.removeFilter(of_this_tower)
    if missing := info["missing_keys"]:
        raise ValueError(f"{vision} lacks weights of its vision tower: {', '.join(sorted(missing)[:5])}.")
    if image_size is None or image_size == config.image_size:
        return model
    return interpolate_positions(model, image_size)


class _ReportsOfThisTower(logging.Filter):
    """Drops reports that only say that the checkpoint has weights of another tower too, a line for each."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "UNEXPECTED" not in text or "MISSING" in text or "MISMATCH" in text


def interpolate_positions(model: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """
    The same vision tower for images of another size; its position embeddings are resampled as transformers does.
    Rotary positions and those that the tower resamples itself (SigLIP 2) stay as they are.

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
    old_side, side = config.image_size // config.patch_size, image_size // config.patch_size
    interpolation = VISION_TOWERS[config.model_type].interpolation
    for name in [name for name in state if state[name].shape != shapes[name].shape]:
        table = state[name].reshape(-1, state[name].shape[-1])
        if name.endswith("relative_position_bias_table"):  # of BEiT: offsets between patches, then those of its class
            resampled = _resample(table[:-3], 2 * old_side - 1, 2 * side - 1, {"mode": "bilinear"})
            table = torch.cat([resampled, table[-3:]])
        else:  # class token, then patches
            resampled = _resample(table[-(old_side**2) :], old_side, side, interpolation)
            table = torch.cat([table[: -(old_side**2)], resampled])
        state[name] = table.reshape(shapes[name].shape)
    resized.load_state_dict(state)
    return resized.to(model.dtype)  # type: ignore[arg-type]


def _resample(grid: torch.Tensor, old_side: int, side: int, interpolation: dict[str, Any]) -> torch.Tensor:
    """From `(old_side**2, C)` to `(side**2, C)`."""
    grid = grid.T.reshape(1, -1, old_side, old_side)
    return nn.functional.interpolate(grid, size=(side, side), align_corners=False, **interpolation).flatten(2)[0].T


def _model_class(config: Any) -> Any:
    return getattr(transformers, VISION_TOWERS[config.model_type].model_class)


def _without_pooler(config: Any) -> dict[str, Any]:
    """Options of a tower's class that leave out its pooling head, unless it holds the final norm, as BEiT's may."""
    if not VISION_TOWERS[config.model_type].has_pooling_layer:
        return {}
    return {"add_pooling_layer": getattr(config, "use_mean_pooling", False)}


__all__ = [
    "EncodedImages",
    "build_vision_model",
    "check_image_pooling",
    "check_vision_config",
    "encode_images",
    "interpolate_positions",
    "load_tower_projection",
    "load_vision_model",
    "tower_projection_dim",
    "vision_config_of",
]
