"""Pictures with regions that are described, as examples for stage 2 and its evaluation."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from ..processing.regions_mmgem import to_rgb
from .pairs import PairDataset, as_captions, digest, encoded, open_image


class RegionDataset(PairDataset):
    """
    Map-style pictures with regions. Example i is that of a [`PairDataset`], with `"boxes"`, `[x0, y0, x1, y1]` in
    pixels of the original picture, its `"size"` (width, height), and `"phrases"`, one per box, beside it. `captions`
    may be empty.

    In training it holds what one step sees: at most `max_regions` regions, drawn anew each epoch, and with probability
    `whole_image_weight` one of the captions, for the region that covers the picture (that is our reading of how the
    paper mixes both). A picture without regions always comes with a caption. Regions without area, or wholly outside
    their picture, are left out.

    Args:
        table, image_column, caption_column, seed, root: as of [`PairDataset`]; the column of captions may be missing.
        regions_column: a list of `{"box", "phrase"}` per picture, `[x0, y0, x1, y1]` in pixels of the picture as its
            file has it, upright; or what `datasets` makes of that, a mapping of two lists. Columns `width` and
            `height`, where there are any, say for which size the boxes are meant.
        max_regions: of a picture in a step; 0 gives all, in their order and without captions, for evaluation.
        whole_image_weight: see above.
    """

    def __init__(
        self,
        table: Any,
        image_column: str = "image",
        caption_column: str = "caption",
        regions_column: str = "regions",
        max_regions: int = 0,
        whole_image_weight: float = 0.0,
        seed: int = 0,
        root: str = "",
    ):
        super().__init__(table, image_column, caption_column, seed=seed, root=root)
        self.regions_column = regions_column
        self.max_regions = max_regions
        self.whole_image_weight = whole_image_weight

    def _read(self, row: int) -> dict[str, Any]:
        example = self.describe(row)
        if self.max_regions:
            return self.draw(example, row)
        if not example["boxes"]:
            raise ValueError("it has no region with a phrase")
        return example

    def describe(self, row: int) -> dict[str, Any]:
        """The example of a row of the table with all its regions, and captions where there are any."""
        columns = self.table[row]
        regions = as_regions(columns.get(self.regions_column))
        captions = as_captions(columns.get(self.caption_column))
        content = encoded(columns[self.image_column], self.root)
        width, height = upright_size(content)
        stated = (columns.get("width") or width, columns.get("height") or height)
        if stated != (width, height):
            raise ValueError(
                f"its regions are given for a picture of {stated[0]} x {stated[1]} pixels, but the file has "
                f"{width} x {height}"
            )
        regions = [(box, phrase) for box, phrase in regions if _overlap(box, width, height)]
        if not regions and not captions:
            raise ValueError("it has neither a region with a phrase nor a caption")
        image = to_rgb(open_image(content, self.least_side))
        return {
            "image": image,
            "image_id": digest(content if isinstance(content, bytes) else image.tobytes()),
            "size": (width, height),
            "caption": captions[0] if captions else "",
            "captions": captions,
            "boxes": [box for box, _ in regions],
            "phrases": [phrase for _, phrase in regions],
        }

    def draw(self, example: dict[str, Any], row: int) -> dict[str, Any]:
        """Of an example with all its regions, what one step of training sees."""
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
    Boxes and phrases, without those that have no phrase, from a list of mappings or a mapping of lists.

    Raises:
        ValueError: for a region that has no box of four numbers, or no text; naming it.
    """
    if isinstance(value, dict):
        value = [dict(zip(value, items)) for items in zip(*value.values(), strict=True)]
    regions = []
    for i, region in enumerate(value or []):
        box, phrase = region.get("box"), region.get("phrase")
        if not isinstance(phrase, str | None):
            raise ValueError(f"regions[{i}] has the phrase {phrase!r}, which is no text")
        corners = np.asarray(box if box is not None else [], dtype=np.float64)
        if corners.shape != (4,) or not np.isfinite(corners).all():
            raise ValueError(f"regions[{i}] has the box {box!r}; it must be four numbers [x0, y0, x1, y1]")
        if phrase and phrase.strip():
            regions.append((corners.tolist(), phrase.strip()))
    return regions


def upright_size(content: bytes | Image.Image) -> tuple[int, int]:
    """Width and height as a viewer shows the picture, without decoding it."""
    image = content if isinstance(content, Image.Image) else Image.open(io.BytesIO(content))
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


def _overlap(box: Sequence[float], width: int, height: int) -> bool:
    """Whether something of the box lies inside its picture."""
    x0, y0, x1, y1 = box
    return min(x1, width) > max(x0, 0) and min(y1, height) > max(y0, 0)
