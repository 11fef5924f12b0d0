"""Where in an image a query is."""

from itertools import product

import torch
from PIL import Image

from ..modeling_mmgem import MMGEMModel
from ..processing import MMGEMProcessor
from ..processing.regions_mmgem import geometry_of


SIDES = (1.0, 0.6, 0.4, 0.25)  # of the windows, as a share of what the model sees of the image


def windows(width: int, height: int, processor: MMGEMProcessor) -> list[list[float]]:
    """Boxes of several sizes and shapes, half overlapping, over the part of an image that a centre crop keeps."""
    geometry = geometry_of(processor.image_processor, width, height)
    left, top = (offset / scale for offset, scale in zip(geometry.offset, geometry.scale))
    across, down = (window / scale for window, scale in zip(geometry.window, geometry.scale))
    boxes = []
    for wide, high in product(SIDES, SIDES):
        if max(wide, high) > 2.5 * min(wide, high):
            continue
        xs, ys = (_starts(side) for side in (wide, high))
        boxes += [
            [left + x * across, top + y * down, left + (x + wide) * across, top + (y + high) * down]
            for x, y in product(xs, ys)
        ]
    return [[max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height)] for x0, y0, x1, y1 in boxes]


def _starts(side: float) -> list[float]:
    count = round((1 - side) / (side / 2)) + 1
    return torch.linspace(0, 1 - side, count).tolist()


@torch.inference_mode()
def best_region(
    model: MMGEMModel, processor: MMGEMProcessor, image: Image.Image, query: torch.Tensor
) -> tuple[list[float], float]:
    """
    The window of an image that is nearest to a query, in pixels of the image, and its cosine.

    Args:
        query (`(D,)`): of unit norm, on the CPU.
    """
    boxes = windows(*image.size, processor)
    inputs = processor(images=[image], boxes=[boxes], return_tensors="pt").to(model.device)
    cosines = model.get_embedding(**inputs)[0].float().cpu() @ query
    best = int(cosines.argmax())
    return [round(corner, 1) for corner in boxes[best]], float(cosines[best])
