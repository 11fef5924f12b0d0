"""Regions from pixels of the original image to pixels of `pixel_values`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from .images_mmgem import as_array


class CroppedRegionError(ValueError):
    """The image processor's centre crop leaves nothing of a region that lies in its image."""


class MMGEMBatchFeature(BatchFeature):
    """A `BatchFeature` whose boxes stay exact when images are cast to 16 bits: bfloat16 rounds 301 to 300."""

    def to(self, *args: Any, **kwargs: Any) -> "MMGEMBatchFeature":
        """[`BatchFeature.to`]; `boxes` change their device, not their dtype."""
        boxes = self.get("boxes")
        super().to(*args, **kwargs)
        if isinstance(boxes, torch.Tensor):
            self["boxes"] = boxes.to(self["boxes"].device)
        return self


@dataclass(frozen=True)
class Geometry:
    """How the image processor moves the pixels of an image: `(x, y) * scale - offset`, then a window of `window`."""

    scale: tuple[float, float]
    offset: tuple[int, int]
    resized: tuple[int, int]
    window: tuple[int, int]


def geometry_of(image_processor: Any, width: int, height: int) -> Geometry:
    """
    The resize and centre crop that `image_processor` does to an image of `width` x `height`; all as (x, y). None
    leaves the image as it is.
    """
    resized = (width, height)
    if getattr(image_processor, "do_resize", False):
        size = image_processor.size
        if size.get("shortest_edge") and not size.get("longest_edge"):
            short = size["shortest_edge"]
            long = int(short * max(width, height) / min(width, height))
            resized = (short, long) if width <= height else (long, short)
        elif size.get("height") and size.get("width"):
            resized = (size["width"], size["height"])
        else:
            raise ValueError(f"Regions need an image processor with a shortest_edge or height and width, got {size}.")
    window, offset = resized, (0, 0)
    if getattr(image_processor, "do_center_crop", False):
        window = (image_processor.crop_size["width"], image_processor.crop_size["height"])
        offset = ((resized[0] - window[0]) // 2, (resized[1] - window[1]) // 2)
    return Geometry((resized[0] / width, resized[1] / height), offset, resized, window)


def map_box(box: Sequence[float], width: int, height: int, geometry: Geometry, name: str) -> np.ndarray:
    """
    `[x0, y0, x1, y1]` in pixels of the original image to pixels of `pixel_values`, clipped to both.

    Raises:
        ValueError: naming the box (`name`), if it is not four finite numbers, has no area or swapped corners, or lies
            outside the image or its crop.
    """
    try:
        corners = as_array(box).astype(np.float64)
    except (TypeError, ValueError):
        corners = np.empty(0)
    if corners.shape != (4,) or not np.isfinite(corners).all():
        raise ValueError(f"{name} must be four finite numbers [x0, y0, x1, y1], got {box}.")
    x0, y0, x1, y1 = corners
    if x1 <= x0 or y1 <= y0:
        raise ValueError(
            f"{name} = {corners.tolist()} has no area: [x0, y0, x1, y1] needs x0 < x1 and y0 < y1 "
            "(COCO's [x, y, width, height] becomes [x, y, x + width, y + height])."
        )
    limits = np.array([width, height, width, height])
    clipped = corners.clip(0, limits)
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        raise ValueError(f"{name} = {corners.tolist()} lies outside its image of {width} x {height} pixels.")
    mapped = clipped * np.tile(geometry.scale, 2) - np.tile(geometry.offset, 2)
    mapped = mapped.clip(0, np.tile(geometry.window, 2))
    if mapped[2] <= mapped[0] or mapped[3] <= mapped[1]:
        raise CroppedRegionError(
            f"{name} = {corners.tolist()} lies outside the centre crop of its {width} x {height} image; drop it, "
            "or use an image processor that resizes to a square without cropping."
        )
    return mapped.astype(np.float32)


def refuse_normalized(boxes: Sequence[Any]) -> None:
    """Raises ValueError if all boxes lie between 0 and 1, which cannot be pixels."""
    try:
        x0, y0, x1, y1 = np.array([as_array(box) for box in boxes], dtype=np.float64).T
    except (TypeError, ValueError):  # boxes of another form, which `map_box` names
        return
    if ((x0 >= 0) & (x0 < x1) & (x1 <= 1) & (y0 >= 0) & (y0 < y1) & (y1 <= 1)).all():
        first = [x0[0].item(), y0[0].item(), x1[0].item(), y1[0].item()]
        raise ValueError(
            f"All boxes lie between 0 and 1, so they are probably normalized, but boxes are given in pixels: {first}. "
            "Multiply them by [width, height, width, height] of their image."
        )


def map_mask(mask: Any, width: int, height: int, geometry: Geometry, name: str) -> np.ndarray:
    """
    A (height, width) array, 0 outside the region and 1 (or more) inside, to a boolean array in the frame of
    `pixel_values`.

    Raises:
        ValueError: naming the mask (`name`), if its shape is not the image's, it is empty or outside the crop, or its
            values are scores, which need a threshold.
    """
    array = as_array(mask)
    if array.shape != (height, width):
        raise ValueError(f"{name} has shape {array.shape}, its image (height, width) = {(height, width)}.")
    scores = array[~(array == 0) & ~((array >= 1) & (array < np.inf))]
    if scores.size:
        raise ValueError(
            f"{name} holds {scores[0]:g}, but a mask is 0 outside its region and 1 inside. Of probabilities pass "
            "mask > 0.5, of logits mask > 0."
        )
    resized = Image.fromarray((array != 0).astype(np.uint8)).resize(geometry.resized, Image.Resampling.NEAREST)
    left, top = geometry.offset
    window = resized.crop((left, top, left + geometry.window[0], top + geometry.window[1]))
    result = np.asarray(window, dtype=bool)
    if not array.any():
        raise ValueError(f"{name} is empty; drop it.")
    if not result.any():
        raise CroppedRegionError(f"{name} lies outside the centre crop of its image; drop it.")
    return result


def map_regions(
    regions: Sequence[Sequence[Any]], sizes: Sequence[tuple[int, int]], image_processor: Any, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """
    Ragged regions of a batch, padded.

    Args:
        regions: per image a list of boxes or of masks.
        sizes: per image (width, height) of the original.
        kind: "boxes" or "masks".

    Returns:
        the regions, `(B, R, 4)` float32 or `(B, R, height, width)` bool, and the region mask `(B, R)` bool, False on
        padding (which holds the whole window, or an empty mask).

    Raises:
        ValueError: with the index of an invalid image or region; if all boxes lie between 0 and 1.
    """
    for i, of_image in enumerate(regions):
        if not hasattr(of_image, "__len__"):
            raise ValueError(f"{kind}[{i}] must be the list of {kind} of an image, got {of_image!r}.")
    if len(regions) != len(sizes):
        raise ValueError(f"{kind} holds lists for {len(regions)} images, but there are {len(sizes)} images.")
    if not any(len(of_image) for of_image in regions):
        raise ValueError(f"{kind} holds no region at all.")
    map_region = map_box if kind == "boxes" else map_mask
    if kind == "boxes":
        refuse_normalized([box for of_image in regions for box in of_image])
    mapped: list[list[np.ndarray]] = []
    windows = []
    for i, ((width, height), of_image) in enumerate(zip(sizes, regions)):
        geometry = geometry_of(image_processor, width, height)
        windows.append(geometry.window)
        named = [(region, f"{kind}[{i}][{j}]") for j, region in enumerate(of_image)]
        mapped.append([map_region(region, width, height, geometry, name) for region, name in named])
    region_mask = np.zeros((len(mapped), max(map(len, mapped))), dtype=bool)
    if kind == "boxes":
        padded = np.stack([np.array([0, 0, *window], dtype=np.float32) for window in windows])
        padded = np.repeat(padded[:, None], region_mask.shape[1], axis=1)
    else:
        padded = np.zeros((*region_mask.shape, windows[0][1], windows[0][0]), dtype=bool)
    for i, of_image in enumerate(mapped):
        for j, region in enumerate(of_image):
            padded[i, j] = region
            region_mask[i, j] = True
    return padded, region_mask
