"""Images with captions from tar shards in img2dataset's layout (LAION, COYO), as an endless stream."""

import copy
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import fsspec
import numpy as np
import torch
from PIL import Image

from .features import CachedFeatures, UnreadableImageError
from .pairs import BadDataError, as_captions, augmented_image, digest


MAX_MEMBER_BYTES = 64 * 2**20
MAX_TEXT_BYTES = 2**20
MAX_BAD_IN_A_ROW = 10_000
PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTION_COLUMN = "caption"


class BadSampleError(ValueError):
    """A sample is skipped. The message starts with the kind of fault, which the Trainer counts."""


@dataclass
class RawSample:
    """The files of one sample by extension, or its fault."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    fault: str | None = None
    place: tuple[int, int] | None = None  # number of its shard among those of all sources, and its own in the shard


class ShardStream(torch.utils.data.IterableDataset):
    """
    Endless examples from tar shards: `{"image", "image_id", "caption", "captions", "bad", "position"}`, as of
    [`PairDataset`].

    Each worker of each process reads its own shards. An epoch takes the shards in a random order, and shuffles the
    samples of a shard within windows. The orders, the choice among several sources and the augmentation depend only on
    the seed and on `position`, which every example carries: a stream that starts from a position continues exactly as
    the first one would have, without decoding earlier samples. A sample that cannot be read is skipped; `bad` of the
    next example names it. With `features` an example holds those instead of `"image"`.

    Args:
        sources: the shards of each source: paths, or URLs that fsspec opens (`hf://datasets/org/name/00000.tar`).
        weights: how often each source is drawn from; equally often by default.
        caption_column: key of the caption, or list of captions, in a sample's json. By default the txt goes first.
        augmentation_scale, seed: as [`PairDataset`].
        window: number of samples that are shuffled among each other; memory holds that many encoded images.
        rank, world_size: of this process.

    Raises:
        ValueError: for a source without shards, or weights that do not match the sources.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[str]],
        weights: Sequence[float] | None = None,
        caption_column: str = CAPTION_COLUMN,
        augmentation_scale: float = 1.0,
        seed: int = 0,
        window: int = 1000,
        rank: int = 0,
        world_size: int = 1,
    ):
        weights = [1.0] * len(sources) if weights is None else list(weights)
        if not sources or not all(sources) or len(weights) != len(sources) or min(weights) <= 0:
            raise ValueError(f"{len(sources)} sources, each with shards, need as many weights above 0, got {weights}.")
        self.sources = [list(shards) for shards in sources]
        self.weights = np.array(weights) / sum(weights)
        self.caption_column = caption_column
        self.augmentation_scale = augmentation_scale
        self.seed = seed
        self.window = window
        self.rank, self.world_size = rank, world_size
        self.least_side = 0  # as of PairDataset
        self.features: CachedFeatures | None = None  # by shard and sample
        self.batches = 0
        self.positions: dict[int, dict[str, Any]] = {}

    def start_from(self, batches: int, positions: dict[int, dict[str, Any]]) -> None:
        """Continues after `batches` batches of this process, each worker after its last position."""
        self.batches, self.positions = batches, positions

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        workers = info.num_workers if info else 1
        # Batches come from the workers in turn, and a resumed loader starts with its worker 0.
        worker = ((info.id if info else 0) + self.batches) % workers
        part, parts = self.rank * workers + worker, self.world_size * workers
        fewest = min(map(len, self.sources))
        if parts > fewest:
            raise ValueError(
                f"{parts} readers ({self.world_size} processes x {workers} workers) share {fewest} shards; lower "
                "--dataloader_num_workers, or cut the data into more shards."
            )
        start = {"drawn": 0, "places": [[0, 0, 0] for _ in self.sources]}
        position = copy.deepcopy(self.positions.get(worker, start))
        streams = [self._samples(k, place, part, parts) for k, place in enumerate(position["places"])]
        bad: dict[str, str] = {}
        in_a_row = 0
        while True:
            rng = np.random.default_rng([self.seed, 0, part, position["drawn"]])
            source = int(rng.choice(len(streams), p=self.weights))
            sample, position["places"][source] = next(streams[source])
            position["drawn"] += 1
            try:
                example = self._example(sample, rng)
            except BadSampleError as error:
                bad[sample.key] = str(error)
                in_a_row += 1
                if in_a_row >= MAX_BAD_IN_A_ROW:
                    last = f"the last, {sample.key}: {error}"
                    raise BadDataError(f"{in_a_row} samples in a row could not be read; {last}") from error
                continue
            yield {**example, "bad": bad, "position": (worker, copy.deepcopy(position))}
            bad, in_a_row = {}, 0

    def _samples(self, source: int, place: list[int], part: int, parts: int) -> Iterator[tuple[RawSample, list[int]]]:
        """This reader's samples from a place (epoch, shard, sample) on, each with the place after it."""
        epoch, shard, sample = place
        found = sample > 0
        shards_before = sum(map(len, self.sources[:source]))
        while True:
            order = np.random.default_rng([self.seed, 1, source, epoch]).permutation(len(self.sources[source]))
            mine = order[part::parts].tolist()
            for number in range(shard, len(mine)):
                begin = sample - sample % self.window
                raw = read_samples(self.sources[source][mine[number]], begin)
                while window := list(itertools.islice(raw, self.window)):
                    rng = np.random.default_rng([self.seed, 2, source, epoch, mine[number], begin])
                    shuffled = rng.permutation(len(window))
                    found = True
                    for k in range(max(sample - begin, 0), len(window)):
                        chosen = window[shuffled[k]]
                        chosen.place = (shards_before + mine[number], begin + int(shuffled[k]))
                        yield chosen, [epoch, number, begin + k + 1]
                    begin += len(window)
                sample = 0
            if not found and shard == 0:
                raise BadDataError(f"{len(mine)} shards hold no sample, such as {self.sources[source][mine[0]]}.")
            epoch, shard, found = epoch + 1, 0, False

    def _example(self, sample: RawSample, rng: np.random.Generator) -> dict[str, Any]:
        if sample.fault is not None:
            raise BadSampleError(sample.fault)
        captions = captions_of(sample, self.caption_column)
        content = content_of(sample)
        if self.features is None:
            image = {"image": self._image(content, rng), "image_id": digest(content)}
        else:
            assert sample.place is not None
            try:
                image = self.features.of_sample(*sample.place, digest(content), sample.key)
            except UnreadableImageError as error:
                raise BadSampleError(str(error)) from error
        caption = captions[rng.integers(len(captions))]
        return {**image, "caption": caption, "captions": captions}

    def _image(self, content: bytes, rng: np.random.Generator) -> Image.Image:
        try:
            return augmented_image(content, self.augmentation_scale, self.least_side, rng)
        except Image.DecompressionBombError as error:
            raise BadSampleError(f"too many pixels: {error}") from error
        except Exception as error:  # Pillow's readers raise errors of many types
            raise BadSampleError(f"unreadable image: {type(error).__name__}: {error}") from error

    def image_with_id(self, sample: RawSample) -> dict[str, Any]:
        """[`PairDataset.image_with_id`] of a sample."""
        found: dict[str, Any] = {"image_id": 0}
        try:
            if sample.fault is not None:
                raise BadSampleError(sample.fault)
            content = content_of(sample)
            found["image_id"] = digest(content)
            return {**found, "image": self._image(content, np.random.default_rng(self.seed))}
        except BadSampleError as error:
            return {**found, "reason": str(error)}

    def captions(self, limit: int = 10_000) -> list[list[str]]:
        """The captions of the first samples, without decoding an image."""
        captions = []
        for sample in itertools.islice(self._first_samples(), limit):
            try:
                captions.append(captions_of(sample, self.caption_column))
            except BadSampleError:
                continue
        return captions

    def some_examples(self, number: int) -> Iterator[dict[str, Any]]:
        """The first examples that can be read."""
        rng = np.random.default_rng(self.seed)
        for sample in self._first_samples():
            try:
                yield self._example(sample, rng)
            except BadSampleError:
                continue
            number -= 1
            if number == 0:
                return

    def _first_samples(self) -> Iterator[RawSample]:
        for number, shard in enumerate(itertools.chain(*self.sources)):
            for k, sample in enumerate(read_samples(shard)):
                sample.place = (number, k)
                yield sample


def content_of(sample: RawSample) -> bytes:
    """
    The image file of a sample.

    Raises:
        BadSampleError: if there is none.
    """
    for name in PICTURES:
        if name in sample.members:
            return sample.members[name]
    raise BadSampleError(f"no image: only {', '.join(sample.members)}")


def captions_of(sample: RawSample, column: str) -> list[str]:
    """
    The captions in the txt, or in the json under `column`; with a column other than "caption", in the json alone.

    Raises:
        BadSampleError: if there is none.
    """
    extension = "txt" if column == CAPTION_COLUMN and "txt" in sample.members else "json"
    content = sample.members.get(extension)
    if content is None:
        wanted = "" if column == CAPTION_COLUMN else f", and no json with {column!r}"
        raise BadSampleError(f"no caption: only {', '.join(sample.members)}{wanted}")
    if len(content) > MAX_TEXT_BYTES:
        raise BadSampleError(f"too large: a text of {len(content)} bytes")
    try:
        text = content.decode("utf-8-sig")
        value: Any = json.loads(text) if extension == "json" else text
    except UnicodeError as error:
        raise BadSampleError(f"invalid UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"invalid JSON: {error}") from error
    if extension == "json":
        if not isinstance(value, dict):
            raise BadSampleError(f"invalid JSON: a {type(value).__name__}, not an object with {column!r}")
        if column not in value:
            raise BadSampleError(f"no caption: its json has no {column!r}, only {', '.join(value)}")
        value = value[column]
    try:
        captions = as_captions(value)
    except ValueError as error:
        raise BadSampleError(f"invalid caption: {error}") from error
    if not captions:
        raise BadSampleError("empty caption")
    return captions


def read_samples(path: str, start: int = 0) -> Iterator[RawSample]:
    """
    The samples of a tar in their order, from number `start` on. A sample is a run of files whose names agree up to the
    first dot. A fault counts as a sample, so that numbers do not shift; faults of the tar itself come last.
    """
    faults: dict[str, str] = {}
    seen: set[str] = set()
    number = -1
    try:
        with fsspec.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for number, (key, members) in enumerate(itertools.groupby(_members(tar, file, faults), key=_key)):
                if number >= start:
                    again = " (again)" if key in seen else ""
                    sample = _read(tar, os.path.join(path, key) + again, members)
                    if again:
                        sample.fault = f"key twice: {key} lies apart from its other files; sort the members by name"
                    yield sample
                seen.add(key)
    except Exception as error:  # remote file systems raise errors of many types
        faults.setdefault("broken shard", f"{type(error).__name__}: {error}")
    for kind, fault in faults.items():
        number += 1
        if number >= start:
            yield RawSample(path if kind == "broken shard" else f"{path}: {kind}", fault=f"{kind}: {fault}")


def image_places(path: str) -> dict[str, tuple[int, int]]:
    """Offset and size in bytes of each sample's image in a tar, by its key, from the headers alone."""
    places: dict[str, tuple[int, int]] = {}
    with fsspec.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in _members(tar, file, {}):
            extension = PurePosixPath(member.name).name.partition(".")[2].lower()
            if member.isreg() and member.size <= MAX_MEMBER_BYTES and extension in PICTURES:
                places.setdefault(os.path.join(path, _key(member)), (member.offset_data, member.size))
    return places


def _members(tar: tarfile.TarFile, file: Any, faults: dict[str, str]) -> Iterator[tarfile.TarInfo]:
    """The members in order, up to the end or a fault, without the metadata files that macOS adds."""
    metadata = 0
    try:
        for member in tar:
            name = PurePosixPath(member.name).name
            if name.startswith("._") or name == ".DS_Store":
                metadata += 1
                faults["macOS metadata"] = f"{metadata} members without a sample, the last {member.name}"
                continue
            if member.isdir():  # as tar writes for `-C folder .`
                continue
            if member.size < 0:  # tarfile would seek back and loop forever
                raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
            yield member
        # tarfile also stops at a header that it cannot read; the true end is a block of zeros.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"neither a header nor the end at byte {tar.offset}")
    except Exception as error:  # corrupt headers raise errors of many types
        faults["broken shard"] = f"{type(error).__name__}: {error}"


def _read(tar: tarfile.TarFile, key: str, members: Iterator[tarfile.TarInfo]) -> RawSample:
    sample = RawSample(key)
    for member in members:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            sample.fault = f"unsafe path: {member.name}"
        elif not member.isreg():
            sample.fault = f"no plain file: {member.name}"
        elif member.size > MAX_MEMBER_BYTES:
            sample.fault = f"too large: {member.name} has {member.size} bytes"
        else:
            content = tar.extractfile(member)
            assert content is not None
            extension = path.name.partition(".")[2].lower()
            if extension in sample.members:
                sample.fault = f"file twice: {member.name}"
            try:
                sample.members[extension] = content.read()
            except tarfile.ReadError as error:
                sample.fault = f"incomplete file: {member.name}: {error}"
    return sample


def _key(member: tarfile.TarInfo) -> str:
    folder, _, name = member.name.rpartition("/")
    return os.path.join(folder, name.partition(".")[0])


def expand_shards(pattern: str) -> list[str]:
    """
    The shards that a pattern names, sorted: `{000000..000999}` counts, `*` globs; local, or on any file system that
    fsspec supports.

    Raises:
        ValueError: if the first number is larger than the last.
        FileNotFoundError: if a glob matches nothing, or a local shard does not exist.
        OSError: if the file system cannot be listed.
    """
    if match := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = match.groups()
        if int(first) > int(last):
            raise ValueError(f"{pattern} counts down, so it names no shard: write {{{last}..{first}}}.")
        numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        return [p for n in numbers for p in expand_shards(pattern[: match.start()] + n + pattern[match.end() :])]
    if "*" in pattern:
        try:
            files, path = fsspec.core.url_to_fs(pattern)
            names = files.glob(path)
        except Exception as error:  # remote file systems raise errors of many types
            raise OSError(f"{pattern} could not be listed: {type(error).__name__}: {error}") from error
        found = sorted(files.unstrip_protocol(name) if "://" in pattern else name for name in names)
        if not found:
            raise FileNotFoundError(f"No shard matches {pattern}.")
        return found
    if "://" not in pattern and not os.path.isfile(pattern):
        raise FileNotFoundError(f"There is no shard {pattern}.")
    return [pattern]
