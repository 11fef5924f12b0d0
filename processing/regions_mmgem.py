"""Pictures to RGB, and regions from pixels of the original picture to pixels of `pixel_values`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps


class CroppedRegionError(ValueError):
    """The image processor's centre crop leaves nothing of a region that lies in its image."""


def to_rgb(image: Image.Image) -> Image.Image:
    """
    The picture as a viewer shows it: EXIF orientation applied, transparency over white, 16-bit scaled to 8.

    Grey, palette, RGBA, CMYK and 16-bit pictures all become RGB.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        # Pillow opens 16-bit PNGs as I;16 or I; its own conversion clips them at 255.
        values = values / 257 if values.size and values.max() > 255 else values
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class Geometry:
    """How the image processor moves a picture's pixels: `(x, y) * scale - offset`, then a window of `window`."""

    scale: tuple[float, float]
    offset: tuple[int, int]
    resized: tuple[int, int]
    window: tuple[int, int]

    @classmethod
    def identity(cls, width: int, height: int) -> "Geometry":
        """That of a picture left as it is."""
        return cls((1.0, 1.0), (0, 0), (width, height), (width, height))


def geometry_of(image_processor: Any, width: int, height: int) -> Geometry:
    """The resize and centre crop that `image_processor` does to a picture of `width` x `height`; all as (x, y)."""
    resized = (width, height)
    size = image_processor.size
    if image_processor.do_resize:
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
    `[x0, y0, x1, y1]` in pixels of the original picture to pixels of `pixel_values`, clipped to both.

    Raises:
        ValueError: naming the box (`name`), where it has not four finite numbers, no area, its corners in the wrong
            order, or nothing inside the picture or its crop.
    """
    try:
        corners = np.asarray(box, dtype=np.float64)
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
        raise ValueError(f"{name} = {corners.tolist()} lies outside its picture of {width} x {height} pixels.")
    mapped = clipped * np.tile(geometry.scale, 2) - np.tile(geometry.offset, 2)
    mapped = mapped.clip(0, np.tile(geometry.window, 2))
    if mapped[2] <= mapped[0] or mapped[3] <= mapped[1]:
        raise CroppedRegionError(
            f"{name} = {corners.tolist()} is cut away by the centre crop of its {width} x {height} picture; drop it, "
            "or use an image processor that resizes to a square without cropping."
        )
    return mapped.astype(np.float32)


def map_mask(mask: Any, width: int, height: int, geometry: Geometry, name: str) -> np.ndarray:
    """
    A (height, width) array, non-zero inside the region, to a boolean array in the frame of `pixel_values`.

    Raises:
        ValueError: naming the mask (`name`), where its shape is not the picture's or nothing of it is left.
    """
    array = np.asarray(mask)
    if array.shape != (height, width):
        raise ValueError(f"{name} has shape {array.shape}, its picture (height, width) = {(height, width)}.")
    resized = Image.fromarray((array != 0).astype(np.uint8)).resize(geometry.resized, Image.Resampling.NEAREST)
    left, top = geometry.offset
    window = resized.crop((left, top, left + geometry.window[0], top + geometry.window[1]))
    result = np.asarray(window, dtype=bool)
    if not array.any():
        raise ValueError(f"{name} is empty; drop it.")
    if not result.any():
        raise CroppedRegionError(f"{name} is cut away by the centre crop of its image; drop it.")
    return result


def map_regions(
    regions: Sequence[Sequence[Any]], sizes: Sequence[tuple[int, int]], image_processor: Any, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """
    Ragged regions of a batch, padded.

    Args:
        regions: per picture a list of boxes or of masks.
        sizes: per picture (width, height) of the original.
        kind: "boxes" or "masks".

    Returns:
        the regions, `(B, R, 4)` float32 or `(B, R, height, width)` bool, and the region mask `(B, R)` bool, False on
        padding (which holds the whole window, or an empty mask).

    Raises:
        ValueError: with the index of the picture and region that is wrong.
    """
    if len(regions) != len(sizes):
        raise ValueError(f"{kind} holds lists for {len(regions)} pictures, but there are {len(sizes)} pictures.")
    if not any(len(of_image) for of_image in regions):
        raise ValueError(f"{kind} holds no region at all.")
    map_region = map_box if kind == "boxes" else map_mask
    mapped: list[list[np.ndarray]] = []
    windows = []
    for i, ((width, height), of_image) in enumerate(zip(sizes, regions)):
        geometry = geometry_of(image_processor, width, height)
        windows.append(geometry.window)
        mapped.append(
            [map_region(region, width, height, geometry, f"{kind}[{i}][{j}]") for j, region in enumerate(of_image)]
        )
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


__all__ = ["CroppedRegionError", "Geometry", "geometry_of", "map_regions", "to_rgb"]
