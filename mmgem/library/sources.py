"""Where the images of a library come from: a folder, a table or dataset, tar shards, or drawn scenes."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import fsspec
from PIL import Image

from ..data.arguments import TableArguments
from ..data.loading import BUILT_IN, Table, checked_table, is_hub_id, read_table
from ..data.pairs import decoded, digest, encoded
from ..data.shards import BadSampleError, content_of, expand_shards, image_places, read_samples
from ..data.table_files import FORMATS, load_named
from ..processing.images_mmgem import to_rgb


# Those that only other programs open (AVIF, HEIC, SVG) are found too, and reported as left out.
IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm", ".pgm"),
    *(".avif", ".heic", ".heif", ".svg"),
)


@dataclass
class Item:
    """
    An image, not decoded yet.

    Args:
        id: the path from the folder; the number of the row; shard and key.
        path: of the file, where there is one.
        fingerprint: a hash that changes with the image.
        value: path, bytes or image, or the error in its place.
    """

    id: str
    path: str
    fingerprint: int
    value: Any

    def image(self, least_side: int = 0) -> Image.Image:
        """
        The image in RGB; a JPEG at the smallest size that has `least_side` pixels per side.

        Raises:
            Exception: of many types, from Pillow's readers.
        """
        if isinstance(self.value, Exception):
            raise self.value
        return to_rgb(decoded(encoded(self.value), least_side))


class Source(Protocol):
    """
    Images in units, which are cheap to list and to pickle.

    Args:
        is_counted: whether a unit is one image, whose fingerprint is known without reading it.
        state: changes with a table, whose rows are then others; empty for other sources.
    """

    is_counted: bool
    state: str

    def units(self, part: int = 0, parts: int = 1) -> Iterator[Any]:
        """All units, or one of so many disjoint parts of them."""

    def fingerprint(self, unit: Any) -> int: ...

    def items(self, unit: Any) -> Iterator[Item]: ...

    def item(self, name: str) -> Item:
        """The item of an id."""


class FolderSource:
    """
    The images in a folder and its subfolders, without hidden ones. A unit is a path from the folder; an image has
    changed if its size or time of change has.

    Args:
        without: a folder to leave out, such as that of the index.
    """

    is_counted = True
    state = ""

    def __init__(self, folder: str, without: str = ""):
        self.folder, self.without = folder, os.path.realpath(without) if without else None

    def units(self, part: int = 0, parts: int = 1) -> Iterator[str]:
        for parent, folders, files in os.walk(self.folder, onerror=_raise):
            shown = [f for f in folders if f[0] != "." and os.path.realpath(os.path.join(parent, f)) != self.without]
            folders[:] = sorted(shown)
            for file in sorted(files):
                if file[0] != "." and file.lower().endswith(IMAGE_EXTENSIONS):
                    name = os.path.relpath(os.path.join(parent, file), self.folder)
                    # By hash, because another process may list a folder that has changed meanwhile.
                    if digest(os.fsencode(name)) % parts == part:
                        yield name

    def fingerprint(self, unit: str) -> int:
        try:
            status = os.stat(os.path.join(self.folder, unit))
        except OSError:  # deleted since it was listed, or a link to nothing
            return 0
        return digest(os.fsencode(unit) + f"\0{status.st_size} {status.st_mtime_ns}".encode())

    def items(self, unit: str) -> Iterator[Item]:
        path, fingerprint = os.path.join(self.folder, unit), self.fingerprint(unit)
        try:
            path.encode()
        except UnicodeEncodeError:
            name = os.fsencode(unit).decode("utf-8", "backslashreplace")
            yield Item(name, "", fingerprint, ValueError("its name is not UTF-8; rename the file"))
            return
        yield Item(unit, path, fingerprint, path)

    def item(self, name: str) -> Item:
        """The item of an id."""
        return next(self.items(name))


def _raise(error: OSError) -> None:
    """Ends a walk, which would pass over a folder that cannot be listed as if it were empty."""
    raise error


class TableSource:
    """
    The images of a table's column; a unit is the number of a row. An image that the table names has changed if its
    file's size or time of change has.

    Args:
        state: changes with the table.
    """

    is_counted = True

    def __init__(self, table: Table, image_column: str, state: str):
        self.rows, self.root, self.image_column, self.state = table.rows, table.root, image_column, state
        features = getattr(table.rows, "features", {})
        self.holds_paths = getattr(features.get(image_column), "dtype", None) in ("string", "large_string")

    def units(self, part: int = 0, parts: int = 1) -> Iterator[int]:
        return iter(range(part, len(self.rows), parts))

    def fingerprint(self, unit: int) -> int:
        if self.holds_paths:
            return FolderSource(self.root).fingerprint(self.rows[unit][self.image_column] or "")
        return digest(f"{self.state}\0{unit}".encode())

    def items(self, unit: int) -> Iterator[Item]:
        value = self.rows[unit][self.image_column]
        if isinstance(value, dict) and value.get("bytes") is None:
            value = value.get("path")
        path = value.get("path") if isinstance(value, dict) else value
        path = os.path.join(self.root, path) if isinstance(path, str) else ""
        yield Item(str(unit), path, self.fingerprint(unit), path if isinstance(value, str) else value)

    def item(self, name: str) -> Item:
        return next(self.items(int(name)))


class ShardSource:
    """The images of tar shards, known once they are read; a unit is a shard."""

    is_counted = False
    state = ""

    def __init__(self, shards: list[str]):
        self.places: dict[str, dict[str, tuple[int, int]]] = {}  # of the images in the shards that were asked for
        self.shards = [shard if "://" in shard else os.path.abspath(shard) for shard in shards]

    def units(self, part: int = 0, parts: int = 1) -> Iterator[str]:
        return iter(self.shards[part::parts])

    def fingerprint(self, unit: str) -> int:
        return 0

    def items(self, unit: str) -> Iterator[Item]:
        for sample in read_samples(unit):
            value: Any = BadSampleError(sample.fault)
            if sample.fault is None:
                try:
                    value = content_of(sample)
                except BadSampleError as error:
                    value = error
            yield Item(sample.key, "", digest(sample.key.encode()), value)

    def item(self, name: str) -> Item:
        shard = name[: name.rindex(".tar/") + len(".tar")]
        if shard not in self.places:
            self.places[shard] = image_places(shard)
        offset, size = self.places[shard][name]
        with fsspec.open(shard, "rb") as file:
            file.seek(offset)
            return Item(name, "", digest(name.encode()), file.read(size))


@dataclass
class SourceOptions:
    """
    What to open.

    Args:
        name: a folder of images; a table (parquet, jsonl, json, csv); tar shards, with `{00..99}` or `*`, or a folder
            of them; 'scenes'; a Hub id or folder of `datasets`.
        image_column, split, config: of a table or dataset.
    """

    name: str
    image_column: str = "image"
    split: str = "train"
    config: str | None = None

    def absolute(self) -> "SourceOptions":
        """The same from every folder."""
        is_local = self.name not in BUILT_IN and "://" not in self.name
        is_local = is_local and (".tar" in self.name or not is_hub_id(self.name))
        return replace(self, name=os.path.abspath(self.name) if is_local else self.name)


def open_source(options: SourceOptions, without: str = "") -> Source:
    """
    Args:
        without: a subfolder to leave out.

    Raises:
        ValueError: for a folder without images, an unknown column or split, or a file of unknown format.
        FileNotFoundError: for what is not there.
    """
    name, split, image_column = options.name, options.split, options.image_column
    if name in BUILT_IN:
        return TableSource(Table(BUILT_IN[name]("test", 500)), "image", name)
    if os.path.isdir(name):
        folder = FolderSource(name, without)
        if next(folder.units(), None) is not None:
            return folder
        if any(file.endswith(".tar") for file in os.listdir(name)):
            return ShardSource(expand_shards(os.path.join(name, "*.tar")))
        if not any(os.path.splitext(file)[1].lower() in FORMATS for _, _, files in os.walk(name) for file in files):
            raise ValueError(f"{name} holds no images: none of its files ends in .jpg, .png, .webp or the like.")
    elif ".tar" in name:
        return ShardSource(expand_shards(name))
    elif os.path.splitext(name)[1].lower() in FORMATS:
        status = os.stat(name) if os.path.exists(name) else None
        state = f"{os.path.abspath(name)} {status and (status.st_size, status.st_mtime_ns)}"
        return _checked(read_table(name, split), image_column, state)
    elif not is_hub_id(name) or name.count("/") != 1:
        raise FileNotFoundError(f"There is no {name}: neither a folder nor a file, and no name of a Hub dataset.")
    rows = load_named(name, options.config, split)
    return _checked(Table(rows), image_column, rows._fingerprint)


def _checked(table: Table, image_column: str, state: str) -> TableSource:
    table = checked_table(table, TableArguments(image_column=image_column, caption_column=""), ("image_column",))
    return TableSource(table, image_column, f"{state} {image_column}")
