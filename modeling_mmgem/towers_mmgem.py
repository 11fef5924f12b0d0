"""The vision towers that MM-GEM can use: ViTs of transformers whose patches lie on a grid, one row each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch


def _pixels(pixel_values: torch.Tensor, patch_size: int) -> dict[str, Any]:
    return {"pixel_values": pixel_values}


def _patches_in_rows(pixel_values: torch.Tensor, patch_size: int) -> dict[str, Any]:
    """
    The inputs of SigLIP 2, whose image processor makes patches: `pixel_values` `(B, patches, P * P * 3)`, each patch
    row by row with its colours last. Every image has the same size, so no patch is padding.
    """
    rows, columns = (side // patch_size for side in pixel_values.shape[-2:])
    patches = pixel_values[..., : rows * patch_size, : columns * patch_size]
    patches = patches.unflatten(-1, (columns, patch_size)).unflatten(-3, (rows, patch_size))
    spatial_shapes = torch.tensor([[rows, columns]], device=pixel_values.device).expand(len(pixel_values), 2)
    return {
        "pixel_values": patches.permute(0, 2, 4, 3, 5, 1).reshape(len(pixel_values), rows * columns, -1),
        "pixel_attention_mask": None,
        "spatial_shapes": spatial_shapes,
    }


@dataclass(frozen=True)
class VisionTower:
    """
    What sets a ViT of transformers apart from the others. All give their patches last, in row-major order.

    Args:
        model_class: transformers' class of the tower alone.
        has_class_token: whether the first token stands for the whole image.
        final_norm: name of the norm that the tower applies in its head only; None where `last_hidden_state` is normed.
        embedding: what the tower embeds images into itself: its `pooler_output` ("pooled"), or that behind the
            checkpoint's `visual_projection` ("projected"); None where it has no such space.
        head_option: name of the configuration's switch for an attention head, which only `embedding` needs.
        has_pooling_layer: whether the class takes `add_pooling_layer`.
        interpolation: how the tower resamples its own position embeddings.
        inputs: from `pixel_values` `(B, 3, height, width)` and the patch size to what the tower takes.
    """

    model_class: str
    has_class_token: bool = True
    final_norm: str | None = None
    embedding: Literal["pooled", "projected"] | None = None
    head_option: str | None = None
    has_pooling_layer: bool = False
    interpolation: dict[str, Any] = field(default_factory=lambda: {"mode": "bicubic"})
    inputs: Callable[[torch.Tensor, int], dict[str, Any]] = _pixels


def _clip(model_class: str) -> VisionTower:
    return VisionTower(model_class, final_norm="post_layernorm", embedding="projected")


def _siglip(model_class: str, **changes: Any) -> VisionTower:
    return VisionTower(
        model_class, has_class_token=False, embedding="pooled", head_option="vision_use_head", **changes
    )


ANTIALIASED = {"mode": "bicubic", "antialias": True}

VISION_TOWERS = {
    "clip_vision_model": _clip("CLIPVisionModel"),
    "metaclip_2_vision_model": _clip("MetaClip2VisionModel"),
    "altclip_vision_model": _clip("AltCLIPVisionModel"),
    "chinese_clip_vision_model": _clip("ChineseCLIPVisionModel"),
    "clipseg_vision_model": _clip("CLIPSegVisionModel"),
    "siglip_vision_model": _siglip("SiglipVisionModel"),
    "siglip2_vision_model": _siglip("Siglip2VisionModel", inputs=_patches_in_rows),
    "aimv2_vision_model": VisionTower(
        "Aimv2VisionModel", has_class_token=False, embedding="projected", head_option="use_head"
    ),
    "tipsv2_vision_model": VisionTower(
        "Tipsv2VisionModel", embedding="pooled", interpolation={"mode": "bilinear", "antialias": True}
    ),
    "mlcd_vision_model": VisionTower("MLCDVisionModel", final_norm="post_layernorm"),
    "dinov2": VisionTower("Dinov2Model"),
    "dinov2_with_registers": VisionTower("Dinov2WithRegistersModel", interpolation=ANTIALIASED),
    "dinov3_vit": VisionTower("DINOv3ViTModel"),
    "ijepa": VisionTower("IJepaModel", has_class_token=False, has_pooling_layer=True),
    "pixio": VisionTower("PixioModel"),
    "radio": VisionTower("RadioModel", has_class_token=False),  # its summary is of several tokens
    "vit": VisionTower("ViTModel", has_pooling_layer=True),
    "vit_msn": VisionTower("ViTMSNModel"),
    "deit": VisionTower("DeiTModel", has_pooling_layer=True),
    "beit": VisionTower("BeitModel", final_norm="pooler.layernorm", has_pooling_layer=True),
    "data2vec-vision": VisionTower("Data2VecVisionModel", final_norm="pooler.layernorm", has_pooling_layer=True),
}

__all__ = ["VISION_TOWERS", "VisionTower"]
