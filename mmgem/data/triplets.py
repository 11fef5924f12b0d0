"""Queries, targets and hard negatives, each an image, a text, or both, for the stage fused-retrieval."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from ..processing.tokenization_mmgem import as_sentence
from .pairs import PairDataset, digest, encoded, image_id_of


SIDES = ("query", "target", "negative")
COLUMNS = tuple(f"{side}_{kind}" for side in SIDES for kind in ("image", "text"))
# Of MMEB's training files (Jiang et al., 2024), and the placeholder that their texts hold for an image.
MMEB_COLUMNS = ("qry_image_path", "qry", "pos_image_path", "pos_text", "neg_image_path", "neg_text")
MMEB_PLACEHOLDER = "<|image_1|>"


class Item(NamedTuple):
    """
    An image, a text, or a text with its image. `id` is a hash of both, `image_id` of the image alone (0 without one),
    and `has_words` says whether there is a text beside the instruction.
    """

    image: Image.Image | None
    text: str
    id: int
    image_id: int
    has_words: bool

    @property
    def is_fused(self) -> bool:
        """Whether it has both."""
        return self.image is not None and bool(self.text)


class TripletSource(NamedTuple):
    """
    One dataset of a mixture: its number of rows, how often a batch comes from it, the instructions in front of its
    texts, and the folder of relative image paths. An image without a text gets the instruction as its text.
    """

    size: int
    weight: float
    query_instruction: str = ""
    target_instruction: str = ""  # of negatives too
    root: str = ""


class TripletDataset(PairDataset):
    """
    Map-style triplets. Example i is `{"query": Item, "target": Item, "negative": Item or None, "bad": {index:
    reason}}`. At least one of query and target must have both an image and a text: nothing else is learned from. The
    next example of the same source that can be used takes the place of one that cannot.

    Args:
        table: rows with the columns of `COLUMNS`, or some of them; see [`with_triplet_columns`].
        sources: the datasets that the table is made of, in their order; one by default.
        seed: as of [`PairDataset`].
    """

    def __init__(self, table: Any, sources: Sequence[TripletSource] | None = None, seed: int = 0):
        super().__init__(table, image_column="", seed=seed)  # there are several
        self.sources = list(sources or [TripletSource(len(table), 1.0)])
        self.ends = np.cumsum([source.size for source in self.sources])

    def members(self) -> list[np.ndarray]:
        """The indices of the examples of each source."""
        owners = np.searchsorted(self.ends, np.asarray(self.rows), side="right")
        return [np.flatnonzero(owners == i) for i in range(len(self.sources))]

    def _candidates(self, index: int) -> Iterator[int]:
        """The example itself, and those of its source behind it."""
        source = int(np.searchsorted(self.ends, self.rows[index], side="right"))
        own = self.members()[source]
        place = int(np.searchsorted(own, index))
        yield from np.roll(own, -place).tolist()

    def _read(self, row: int, cached: dict[str, Any] | None) -> dict[str, Any]:
        columns = self.table[row]
        source = self.sources[int(np.searchsorted(self.ends, row, side="right"))]
        query, target, negative = (self._item(columns, side, source) for side in SIDES)
        for side, item in (("query", query), ("target", target)):
            if item is None:
                raise ValueError(f"its {side} is empty; it needs an image, a text, or both")
        assert query is not None and target is not None
        if not query.is_fused and not target.is_fused:
            raise ValueError("neither its query nor its target has both an image and a text, which is what is learned")
        if negative is not None and negative.id == target.id:
            raise ValueError("its negative is its target")
        return {"query": query, "target": target, "negative": negative}

    def _item(self, columns: dict[str, Any], side: str, source: TripletSource) -> Item | None:
        text, value = columns.get(f"{side}_text"), columns.get(f"{side}_image")
        if not isinstance(text, str | None):
            raise ValueError(f"its {side}_text must be text, got {text!r}")
        words = as_sentence((text or "").replace(MMEB_PLACEHOLDER, " "))
        image, image_id = None, 0
        if _has_image(value):
            try:
                content = encoded(value, source.root)
                image, image_id = self._decoded(content)["image"], image_id_of(content)
            except Exception as error:  # Pillow's readers raise errors of many types
                path = (value.get("path") if isinstance(value, dict) else value) or ""
                name = f" ({path})" if isinstance(path, str) and path and path not in str(error) else ""
                raise ValueError(f"its {side}_image{name}: {error}") from error
        if image is None and not words:
            return None
        instruction = source.query_instruction if side == "query" else source.target_instruction
        sentence = as_sentence(f"{instruction} {words}")
        return Item(image, sentence, digest(f"{image_id} {sentence}".encode()), image_id, bool(words))


def _has_image(value: Any) -> bool:
    """Whether the value of a column of images holds one: not None, "", or `datasets`' mapping of these."""
    if isinstance(value, dict):
        return any(value.get(name) for name in ("bytes", "path"))
    return value is not None and not (isinstance(value, str) and not value)


def with_triplet_columns(rows: datasets.Dataset) -> datasets.Dataset:
    """
    The columns of `COLUMNS`, found under these names or those of MMEB, with images still encoded; None for the others.

    Raises:
        ValueError: for a table without queries or without targets, and for a column of another type.
    """
    renamed = {old: new for old, new in zip(MMEB_COLUMNS, COLUMNS) if old in rows.column_names}
    rows = rows.rename_columns({old: new for old, new in renamed.items() if new not in rows.column_names})
    for side in SIDES[:2]:
        if not {f"{side}_image", f"{side}_text"} & {*rows.column_names}:
            raise ValueError(
                f"The dataset has neither {side}_image nor {side}_text; its columns are "
                f"{', '.join(rows.column_names)}. Rename those of your queries and targets, or use MMEB's names."
            )
    features = datasets.Features(
        {
            name: datasets.Image(decode=False) if name.endswith("_image") else datasets.Value("string")
            for name in COLUMNS
        }
    )
    if rows.features == features:
        return rows
    # A column of CSV or JSON that is empty throughout is no text for pyarrow.
    present = [name for name in COLUMNS if name in rows.column_names and rows.data.column(name).null_count < len(rows)]
    rows = rows.select_columns(present)
    missing = {name: feature for name, feature in features.items() if name not in rows.column_names}
    empty = datasets.Dataset.from_dict({name: [None] * len(rows) for name in missing}, datasets.Features(missing))
    for name in rows.column_names:
        try:
            rows = rows.cast_column(name, features[name])
        except (TypeError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"Column {name!r} is {rows.features[name]}, not {features[name]}: {error}") from error
    whole = datasets.concatenate_datasets([rows, empty], axis=1, split=rows.split) if missing else rows
    return whole.select_columns(list(COLUMNS))
