"""Images with captions, from any table that `datasets` reads, as examples for training and evaluation."""

import contextlib
import copy
import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..processing.images_mmgem import encoded_image, image_of_array, open_image, to_rgb
from ..processing.tokenization_mmgem import as_sentence
from .features import CachedFeatures, UnreadableImageError


TEACHER_EMBEDS = "teacher_embeds"  # of a text, by a teacher
MAX_STRETCH = 4 / 3  # of random crops
# A list or tuple of texts as Python, JSON or NumPy (without commas) write it. One element in parentheses is no tuple.
ITEM = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|None|null)"""
WRITTEN_LIST = re.compile(rf"\[\s*(?:{ITEM}[\s,]*)*\]|\(\s*(?:{ITEM}\s*,[\s,]*(?:{ITEM}[\s,]*)*)?\)", re.DOTALL)


class BadDataError(ValueError):
    """An example cannot be read, or too many of them."""


class PairDataset(torch.utils.data.Dataset):
    """
    Map-style pairs. Example i is `{"image": RGB image, "image_id": hash of its file or pixels, "caption": str,
    "captions": [str, …], "bad": {index: reason}}`.

    If an image has several captions, `caption` is one of them, drawn anew each epoch. The draw and the augmentation
    depend on (seed, epoch, index) alone, so a resumed run sees the examples of the uninterrupted one. An example that
    cannot be read is replaced by the next that can; `bad` says which were skipped, for the Trainer to count.

    With `features`, examples hold `pooled_features` (and `patch_features`) of the cache instead of `"image"`, and no
    image is read. With a `teacher`, such as [`TeacherVectors`], they hold `teacher_embeds` `(E,)` of the caption.

    Args:
        table: rows with the two columns; anything with `len` and indexing by row number and by column name, such as
            `datasets.Dataset`. It may bring metrics of its own: see [`ScenesDataset`].
        image_column: PIL images, `{"bytes", "path"}`, bytes, or paths (relative ones from `root`).
        caption_column: a string, or a list of strings.
        augmentation_scale: smallest fraction of the image's area that a random crop keeps; 1 takes the whole image.
        seed: of the draws and the augmentation.
        root: folder of relative image paths.
        negative_column: texts that do not belong to the image, as `caption_column`; each example has one of them too,
            `"negative"`, or None where there is none.
    """

    def __init__(
        self,
        table: Any,
        image_column: str = "image",
        caption_column: str = "caption",
        augmentation_scale: float = 1.0,
        seed: int = 0,
        root: str = "",
        negative_column: str | None = None,
    ):
        self.table = table
        self.rows: Sequence[int] = range(len(table))
        self.image_column = image_column
        self.caption_column = caption_column
        self.augmentation_scale = augmentation_scale
        self.seed = seed
        self.root = root
        self.negative_column = negative_column
        self.max_captions: int | None = None  # of each image, the first ones
        self.missing = 0  # number of images that annotations name but that do not exist
        self.least_side = 0  # pixels per side that the image processor needs; 0 decodes at full size
        self.features: CachedFeatures | None = None  # of the examples in their order
        self.teacher: Mapping[str, torch.Tensor] | None = None  # the vectors of captions
        # Shared with the loader's worker processes, which start before the epoch is known.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> "PairDataset":
        """A dataset of these examples alone: its example i is `indices[i]` of this one."""
        chosen = copy.copy(self)
        chosen.rows = [self.rows[i] for i in indices]
        chosen.features = None  # its rows are those of this dataset
        return chosen

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that captions and crops are drawn for."""
        self._epoch.fill_(epoch)

    def captions(self) -> list[list[str]]:
        """The captions of every example, without decoding images; an empty list if they cannot be read."""
        values = list(self.table[self.caption_column])
        captions = []
        for row in self.rows:
            try:
                captions.append(as_captions(values[row])[: self.max_captions])
            except ValueError:
                captions.append([])
        return captions

    def some_examples(self, number: int) -> Iterator[dict[str, Any]]:
        """Examples spread evenly over the dataset, one at a time."""
        for index in np.linspace(0, len(self) - 1, min(number, len(self))).astype(int):
            yield self[int(index)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        bad: dict[int, str] = {}
        for candidate in self._candidates(index):
            try:
                return {**self.read(candidate), "bad": bad}
            except BadDataError as error:
                bad[candidate] = str(error)
        reason = next(iter(bad.values()), "there is none")
        raise BadDataError(f"None of the {len(self)} examples could be read: {reason}")

    def _candidates(self, index: int) -> Iterator[int]:
        """The example itself, and those that may take its place, in their order."""
        for candidate in range(index, index + len(self)):
            yield candidate % len(self)

    def read(self, index: int) -> dict[str, Any]:
        """
        Example `index` itself, without `bad`.

        Raises:
            BadDataError: if it cannot be read, with the reason.
        """
        with self._as_bad_data(self.rows[index]):
            return self._read(self.rows[index], None if self.features is None else self.features.of_row(index))

    def image(self, index: int) -> Image.Image:
        """
        The whole image of example `index`, which needs no caption.

        Raises:
            BadDataError: as [`read`].
        """
        with self._as_bad_data(self.rows[index]):
            return self._decoded(self._encoded(index))["image"]

    def image_id(self, index: int) -> int:
        """The hash of example `index`'s image, which need not be decoded; 0 if there is none to hash."""
        try:
            return image_id_of(self._encoded(index))
        except Exception:  # as in `_as_bad_data`
            return 0

    def image_with_id(self, index: int) -> dict[str, Any]:
        """
        What a cache of features needs of example `index`: `"image_id"`, and the whole `"image"`, or the `"reason"` why
        it cannot be read.
        """
        found: dict[str, Any] = {"image_id": 0}
        try:
            with self._as_bad_data(self.rows[index]):
                content = self._encoded(index)
                found["image_id"] = image_id_of(content)
                return {**found, **self._decoded(content)}
        except BadDataError as error:
            return {**found, "reason": str(error)}

    def _encoded(self, index: int) -> bytes | Image.Image:
        return encoded(self.table[self.rows[index]][self.image_column], self.root)

    def _decoded(self, content: bytes | Image.Image) -> dict[str, Any]:
        """What an example holds of its image, beside the id."""
        return {"image": to_rgb(decoded(content, self.least_side))}

    @contextlib.contextmanager
    def _as_bad_data(self, row: int) -> Iterator[None]:
        try:
            yield
        except UnreadableImageError as error:  # whose message names the image already
            raise BadDataError(str(error)) from error
        except Exception as error:  # Pillow's readers raise errors of many types
            reason, name = f"{type(error).__name__}: {error}", self._path(row)
            raise BadDataError(reason if name in reason else f"{reason} ({name})") from error

    def _path(self, row: int) -> str:
        """The path of a row's image, or an empty string."""
        value = self.table[row].get(self.image_column)
        path = value.get("path") if isinstance(value, dict) else value
        return os.fspath(path) if isinstance(path, str | os.PathLike) else ""

    def name_of(self, index: int) -> str:
        """The file of example `index` in parentheses, where it has one."""
        path = self._path(self.rows[index])
        return f" ({os.path.basename(path)})" if path else ""

    def _read(self, row: int, cached: dict[str, Any] | None) -> dict[str, Any]:
        """The example of a row of the table; `cached` takes the place of its image."""
        columns = self.table[row]
        captions = as_captions(columns[self.caption_column])[: self.max_captions]
        if not captions:
            raise ValueError("it has no caption")
        rng = np.random.default_rng([self.seed, int(self._epoch), row])
        if cached is None:
            content = encoded(columns[self.image_column], self.root)
            image = augmented_image(content, self.augmentation_scale, self.least_side, rng)
            cached = {"image": image, "image_id": image_id_of(content)}
        example = {**cached, "caption": captions[rng.integers(len(captions))], "captions": captions}
        if self.teacher is not None:
            try:
                example[TEACHER_EMBEDS] = self.teacher[example["caption"]]
            except KeyError as error:
                raise ValueError(f"the teacher has no vector of its caption {example['caption']!r}") from error
        if self.negative_column is not None:
            negatives = as_captions(columns[self.negative_column])
            example["negative"] = negatives[rng.integers(len(negatives))] if negatives else None
        return example


def digest(content: bytes) -> int:
    """A signed 64-bit hash, the same in every process."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


def image_id_of(content: bytes | Image.Image) -> int:
    """The hash of a file's bytes, or of the size and pixels of an image that was never a file."""
    pixels = content if isinstance(content, bytes) else repr(content.size).encode() + to_rgb(content).tobytes()
    return digest(pixels)


def as_captions(value: Any) -> list[str]:
    """
    Returns one caption or a list of captions as sentences, without empty ones.

    Raises:
        ValueError: for a value that is not text, and for a list written as text.
    """
    values = value if isinstance(value, list | tuple) else [value]
    if wrong := [item for item in values if not isinstance(item, str | None)]:
        raise ValueError(f"captions must be text, got {wrong[0]!r}")
    captions = [caption for item in values if item and (caption := as_sentence(item))]
    if isinstance(value, str) and WRITTEN_LIST.fullmatch(value.strip()):
        raise ValueError(f"the caption is a list written as text: {value[:40]!r}. Keep lists in parquet or jsonl")
    return captions


def encoded(value: Any, root: str = "") -> bytes | Image.Image:
    """The file's bytes, from bytes, a path, or `datasets`' `{"bytes", "path"}`; a PIL image or array as an image."""
    if isinstance(value, dict):
        value = encoded_image(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Image.Image):
        return open_image(value)
    if value is None:
        raise ValueError("it has no image")
    if not isinstance(value, str | os.PathLike):
        return image_of_array(value)
    with open(os.path.join(root, value), "rb") as file:
        return file.read()


def augmented_image(
    content: bytes | Image.Image, augmentation_scale: float, least_side: int, rng: np.random.Generator
) -> Image.Image:
    """
    The decoded image, or a random crop of at least `augmentation_scale` of its area. A JPEG is decoded at a half, a
    quarter or an eighth of its size if that leaves the smallest crop `least_side` pixels per side.
    """
    smallest = math.sqrt(augmentation_scale / MAX_STRETCH) if augmentation_scale < 1 else 1.0
    image = to_rgb(decoded(content, math.ceil(least_side / smallest)))
    return random_crop(image, augmentation_scale, rng) if augmentation_scale < 1 else image


def decoded(content: bytes | Image.Image, least_side: int = 0) -> Image.Image:
    """[`open_image`], decoded; with `least_side`, a JPEG at the smallest size that has that many pixels per side."""
    image = open_image(content)
    if least_side and image is not content:  # a PIL image of the caller keeps its size
        image.draft(None, (least_side, least_side))  # type: ignore[arg-type]
    image.load()
    return image


def random_crop(image: Image.Image, scale: float, rng: np.random.Generator) -> Image.Image:
    """A random part of the image: at least `scale` of its area, stretched by 4:3 at most against the whole."""
    area, ratio = rng.uniform(scale, 1), np.exp(rng.uniform(-1, 1) * np.log(MAX_STRETCH))
    width = min(1.0, float(np.sqrt(area * ratio))) * image.width
    height = min(1.0, float(np.sqrt(area / ratio))) * image.height
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    x, y = min(round(left), image.width - 1), min(round(top), image.height - 1)
    return image.crop((x, y, max(round(left + width), x + 1), max(round(top + height), y + 1)))
