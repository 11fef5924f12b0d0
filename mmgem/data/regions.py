"""Images with described regions, as examples for stage 2 and its evaluation."""

import copy
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from ..processing.images_mmgem import open_image, to_rgb
from ..processing.regions_mmgem import geometry_of, map_box, refuse_normalized
from ..processing.tokenization_mmgem import as_sentence
from .pairs import PairDataset, as_captions, decoded, encoded, image_id_of


class RegionDataset(PairDataset):
    """
    Map-style images with regions. Example i is that of a [`PairDataset`] with `"boxes"`, `[x0, y0, x1, y1]` in pixels
    of the original image, `"phrases"`, one per box, and the image's `"size"` (width, height). `captions` may be empty.

    In training an example has at most `max_regions` regions, drawn anew each epoch, and with probability
    `whole_image_weight` one of the captions, for the region that covers the image (our reading of how the paper mixes
    both). An image without regions always comes with a caption. Regions without area or outside of the image are left
    out; `left_out` is their number.

    Args:
        table: as of [`PairDataset`]; the column of captions may be missing.
        regions_column: a list of `{"box", "phrase"}` per image, `[x0, y0, x1, y1]` in pixels of the upright image; or
            a mapping of two lists, as `datasets` returns it. Columns `width` and `height`, if they exist, say which
            image size the boxes refer to.
        max_regions: of an image in a step; 0 returns all, in their order and without captions, for evaluation.
        whole_image_weight: see above.
        **options: `image_column`, `caption_column`, `seed` and `root` of [`PairDataset`].
    """

    def __init__(
        self,
        table: Any,
        regions_column: str = "regions",
        max_regions: int = 0,
        whole_image_weight: float = 0.0,
        **options: Any,
    ):
        super().__init__(table, **options)
        self.regions_column = regions_column
        self.image_processor: Any = None  # its centre crop may cut regions away; set by the Trainer
        self.max_regions = max_regions
        self.whole_image_weight = whole_image_weight

    def captions(self) -> list[list[str]]:
        """The captions of every image; empty lists if there is no such column."""
        if self.caption_column not in getattr(self.table, "column_names", [self.caption_column]):
            return [[] for _ in self.rows]
        return super().captions()

    def whole(self, image_processor: Any) -> "RegionDataset":
        """The same images at full size with all their regions, as an evaluation sees them."""
        chosen = copy.copy(self)
        chosen.least_side, chosen.max_regions, chosen.image_processor = 0, 0, image_processor
        return chosen

    def _decoded(self, content: bytes | Image.Image) -> dict[str, Any]:
        width, height = open_image(content).size
        image = decoded(content, self.least_side)
        if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):  # lies on its side
            width, height = height, width
        return {"image": to_rgb(image), "size": (width, height)}

    def _read(self, row: int, cached: dict[str, Any] | None) -> dict[str, Any]:
        example = self.describe(row, cached)
        if self.max_regions:
            return self.draw(example, row)
        if not example["boxes"]:
            raise ValueError("it has no region with a phrase")
        return example

    def describe(self, row: int, cached: dict[str, Any] | None) -> dict[str, Any]:
        """The example of a row of the table with all its regions and captions; `cached` as of [`PairDataset`]."""
        columns = self.table[row]
        regions = as_regions(columns.get(self.regions_column))
        refuse_normalized([box for box, _ in regions])
        captions = as_captions(columns.get(self.caption_column))
        if cached is None:
            content = encoded(columns[self.image_column], self.root)
            cached = {"image_id": image_id_of(content), **self._decoded(content)}
        width, height = cached["size"]
        stated = (int(columns.get("width") or width), int(columns.get("height") or height))
        if stated != (width, height):
            raise ValueError(
                f"its regions are given for an image of {stated[0]} x {stated[1]} pixels, but the file has "
                f"{width} x {height}"
            )
        example: dict[str, Any] = {
            **cached,
            "caption": captions[0] if captions else "",
            "captions": captions,
            "boxes": [box for box, _ in regions],
            "phrases": [phrase for _, phrase in regions],
        }
        kept = [i for i, _ in regions_inside(example, self.image_processor)]
        if not kept and not captions:
            if regions_inside(example):
                count = f"all {len(regions)} of its regions"
                raise ValueError(f"the centre crop cuts {count} away (--do_center_crop false keeps them)")
            raise ValueError("it has neither a caption nor a visible region with a phrase")
        boxes, phrases = ([example[name][i] for i in kept] for name in ("boxes", "phrases"))
        return {**example, "boxes": boxes, "phrases": phrases, "left_out": len(regions) - len(kept)}

    def draw(self, example: dict[str, Any], row: int) -> dict[str, Any]:
        """Draws the regions and the caption of one training step from an example with all of them."""
        rng = np.random.default_rng([self.seed, int(self._epoch), row])
        boxes, phrases, captions = example["boxes"], example["phrases"], example["captions"]
        drawn = rng.permutation(len(boxes))[: self.max_regions].tolist()
        whole = bool(captions) and (not boxes or rng.random() < self.whole_image_weight)
        drawn = drawn[: self.max_regions - whole]
        boxes, phrases = [boxes[i] for i in drawn], [phrases[i] for i in drawn]
        if whole:
            boxes.append([0.0, 0.0, *map(float, example["size"])])
            phrases.append(captions[rng.integers(len(captions))])
        return {**example, "boxes": boxes, "phrases": phrases}


def as_regions(value: Any) -> list[tuple[list[float], str]]:
    """
    Boxes with their phrases, from a list of mappings or a mapping of lists. Regions without a phrase are left out.

    Raises:
        ValueError: for a region whose box is not four numbers, or whose phrase is not text, with its index.
    """
    if isinstance(value, dict) and all(isinstance(items, list) for items in value.values()):
        if len({len(items) for items in value.values()}) > 1:
            raise ValueError("its regions are lists of different lengths; each needs a box and a phrase")
        value = [dict(zip(value, items)) for items in zip(*value.values())]
    if not isinstance(value or [], list):
        raise ValueError(f"its regions must be a list of {{box, phrase}}, but are {value!r}")
    regions = []
    for i, region in enumerate(value or []):
        if not isinstance(region, dict):
            raise ValueError(f"regions[{i}] is {region!r}; it must be {{box, phrase}}")
        box, phrase = region.get("box"), region.get("phrase")
        if not isinstance(phrase, str | None):
            raise ValueError(f"regions[{i}] has the phrase {phrase!r}, which is no text")
        corners = np.asarray(box if box is not None else [], dtype=np.float64)
        if corners.shape != (4,) or not np.isfinite(corners).all():
            raise ValueError(f"regions[{i}] has the box {box!r}; it must be four numbers [x0, y0, x1, y1]")
        if phrase and (sentence := as_sentence(phrase)):
            regions.append((corners.tolist(), sentence))
    return regions


def regions_inside(example: dict[str, Any], image_processor: Any = None) -> list[tuple[int, list[float]]]:
    """
    The boxes of an example that have an area inside the image and inside the image processor's centre crop: their
    indices, and their corners in pixels of `pixel_values` (of the image, without an image processor).
    """
    width, height = example["size"]
    geometry = geometry_of(image_processor, width, height)
    inside = []
    for i, box in enumerate(example["boxes"]):
        with suppress(ValueError):
            inside.append((i, map_box(box, width, height, geometry, "box").tolist()))
    return inside
