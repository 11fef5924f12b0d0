"""Embeds the images of a source into the parts of an index; what is there already is not embedded again."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers.utils import logging

from ..evaluation.embedding import embed_pixels, evaluating
from ..evaluation.sharing import gather_parts, is_first_process, rank_and_world_size, report_failure
from ..output_lock import output_lock
from ..processing import MMGEMProcessor
from ..processing.image_processors_mmgem import least_side_of, normalized_pixels
from .loaded import LoadedModel
from .sources import Item, Source, SourceOptions, open_source
from .tables import INDEX_FILE, Identity, part_files, part_number, read_index_file, write_part


logger = logging.get_logger(__name__)

PART_ROWS = 1024
LEFT_OUT = "left_out.jsonl"


@dataclass
class BuildReport:
    """
    What a run did: how many images it embedded, how many it found in the index, how many rows it removed because
    their images have changed or are gone; and the images that cannot be read, by id, with the reason.
    """

    embedded: int = 0
    present: int = 0
    removed: int = 0
    left_out: dict[str, str] = field(default_factory=dict)


class Known:
    """Fingerprints, 8 bytes each, to ask whether one is among them."""

    def __init__(self, fingerprints: Iterable[np.ndarray]):
        self.sorted = np.sort(np.concatenate([np.zeros(0, np.int64), *fingerprints]))
        self.is_found = np.zeros(len(self.sorted), dtype=bool)

    def contains(self, fingerprint: int) -> bool:
        """Whether a fingerprint is known; `is_found` notes that it was asked for."""
        place = int(np.searchsorted(self.sorted, fingerprint))
        if place == len(self.sorted) or self.sorted[place] != fingerprint:
            return False
        self.is_found[place] = True
        return True


def prepare(folder: str, identity: Identity, form: str, options: SourceOptions, source: Source) -> None:
    """
    Writes index.json, or compares it with that of an earlier run.

    Raises:
        ValueError: for an index of another model, format or source, or a folder that holds other vectors.
    """
    found = read_index_file(folder)
    if not found and part_files(folder):
        raise ValueError(f"{folder} holds vectors of another program. Give another --output.")
    about = {**asdict(identity), "format": form, "source": asdict(options.absolute()), "state": source.state}
    # A checkpoint may have moved, and a table may have changed; the vectors of other models cannot be mixed.
    changed = [name for name in about if name not in ("model", "state") and found.get(name) != about[name]]
    if found and "source" in changed:
        raise ValueError(
            f"{folder} is an index of {found['source']['name']}, and would lose its images. Give another --output; if "
            f"the images have moved, write their new place into {INDEX_FILE}."
        )
    if found and changed:
        raise ValueError(
            f"{folder} was made by {found['model']} with another value of {changed[0]}. Give another --output, or "
            "delete the index."
        )
    path = os.path.join(folder, INDEX_FILE)
    with open(f"{path}.unfinished", "w", encoding="utf-8") as file:
        json.dump(about, file, indent=2, ensure_ascii=False)
    os.replace(f"{path}.unfinished", path)


@dataclass
class Plan:
    """
    What the index holds already, how many images are missing (None where only reading them tells), how many rows were
    removed because their images are gone or have changed, and the number of the next part.
    """

    known: Known
    missing: int | None
    removed: int
    number: int


def plan(source: Source, folder: str) -> Plan:
    """Compares the index with the source, and removes rows whose images are gone or have changed."""
    _remove_torn_parts(folder)
    known, missing, removed = known_in(folder), None, 0
    if source.is_counted:
        missing = sum(not known.contains(source.fingerprint(unit)) for unit in source.units())
        stale = np.unique(known.sorted[~known.is_found])
        removed = sum(_remove(rows, vectors, stale) for rows, vectors in part_files(folder)) if len(stale) else 0
    number = max((part_number(rows) + 1 for rows, _ in part_files(folder)), default=0)
    return Plan(known, missing, removed, number)


def _remove_torn_parts(folder: str) -> None:
    """Removes npy parts with other rows than vectors, which a killed process left; they are embedded again."""
    for rows, vectors in part_files(folder):
        is_torn = rows != vectors and (
            not os.path.exists(rows) or pq.ParquetFile(rows).metadata.num_rows != len(np.load(vectors, mmap_mode="r"))
        )
        if is_torn:
            os.remove(vectors)


def known_in(folder: str) -> Known:
    """The fingerprints of an index."""
    return Known(_fingerprints(rows) for rows, _ in part_files(folder))


def _fingerprints(path: str) -> np.ndarray:
    try:
        return pq.read_table(path, columns=["fingerprint"]).column(0).to_numpy()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as a part of an index: {error}. Delete it.") from error


def _remove(rows: str, vectors: str, stale: np.ndarray) -> int:
    """Rewrites a part without some rows."""
    table = pq.read_table(rows)
    kept = ~np.isin(table["fingerprint"].to_numpy(), stale)
    if kept.all():
        return 0
    if not kept.any():
        for file in dict.fromkeys((vectors, rows)):
            os.remove(file)
        return len(kept)
    folder, form = os.path.dirname(os.path.dirname(rows)), "parquet" if rows == vectors else "npy"
    matrix = np.load(vectors) if form == "npy" else np.stack(table["vector"].to_numpy())
    columns = {name: table[name].filter(pa.array(kept)) for name in table.column_names if name != "vector"}
    write_part(folder, part_number(rows), columns, matrix[kept], form)
    return int((~kept).sum())


class _Batches(torch.utils.data.IterableDataset):
    """The images of a share that are not known, in batches: without their content, and their pixels."""

    def __init__(self, units: Any, source: Source, known: Known, processor: MMGEMProcessor, batch_size: int):
        self.units, self.source, self.known = units, source, known
        self.processor, self.batch_size = processor, batch_size
        self.least_side = least_side_of(processor.image_processor)

    def __iter__(self) -> Iterator[tuple[list[Item], Any, dict[str, str]]]:
        items: list[Item] = []
        images: list[Any] = []
        faults: dict[str, str] = {}
        for item in self._missing():
            try:
                images.append(item.image(self.least_side))
            except Exception as error:  # Pillow's readers raise errors of many types
                faults[item.id] = f"{type(error).__name__}: {error}"
                continue
            item.value = None
            items.append(item)
            if len(items) == self.batch_size:
                yield items, self._pixels(images), faults
                items, images, faults = [], [], {}
        yield items, self._pixels(images) if images else None, faults

    def _missing(self) -> Iterator[Item]:
        info = torch.utils.data.get_worker_info()
        for unit in self.units(info.id, info.num_workers) if info else self.units(0, 1):
            if self.source.is_counted and self.known.contains(self.source.fingerprint(unit)):
                continue
            for item in self.source.items(unit):
                if self.source.is_counted or not self.known.contains(item.fingerprint):
                    yield item

    def _pixels(self, images: list[Any]) -> torch.Tensor:
        """`(n, 3, height, width)` uint8, a quarter of the bytes that go from a reading process to this one."""
        resized: Any = {"do_rescale": False, "do_normalize": False}
        return self.processor(images=images, return_tensors="pt", **resized)["pixel_values"]


@torch.inference_mode()
def embed_units(
    units: Any,
    source: Source,
    known: Known,
    loaded: LoadedModel,
    batch_size: int,
    workers: int = 0,
) -> Iterator[tuple[list[Item], np.ndarray, dict[str, str]]]:
    """
    Batches of images with their embeddings `(n, D)`, float32, and the reasons of those that cannot be read.

    Args:
        units: called with the number of a part and of all parts, gives that part's units of the source.
        known: what is left out.
    """
    model = loaded.model
    dataset = _Batches(units, source, known, loaded.processor, batch_size)
    for items, pixels, faults in torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers):
        embeds = torch.zeros(0, model.config.projection_dim)
        if items:
            embeds = embed_pixels(model, normalized_pixels(pixels, loaded.processor.image_processor))
        finite = embeds.isfinite().all(-1)
        if not finite.all():
            name = items[int(finite.int().argmin())].id
            raise ValueError(f"The embedding of {name} holds NaN or infinity. Embed with --dtype float32.")
        yield items, embeds.numpy(), faults


class PartWriter:
    """Collects rows, and writes every 1,024 as one part; used as a context, it writes the rest however that ends."""

    def __init__(self, folder: str, identity: Identity, form: str, number: int, step: int = 1):
        self.folder, self.identity, self.form = folder, identity, form
        self.number, self.step = number, step
        self.items: list[Item] = []
        self.vectors: list[np.ndarray] = []

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self.flush()

    def add(self, items: list[Item], vectors: np.ndarray) -> None:
        if items:
            self.items += items
            self.vectors.append(vectors)
        if len(self.items) >= PART_ROWS:
            self.flush()

    def flush(self) -> None:
        """
        Raises:
            OSError: where the part cannot be written; earlier parts stay.
        """
        items, self.items = self.items, []
        vectors, self.vectors = self.vectors, []
        if not items:
            return
        taken = {part_number(rows) for rows, _ in part_files(self.folder)}
        while self.number in taken:  # by a worker that was started anew
            self.number += self.step
        size = len(items)
        rows: dict[str, Any] = {
            "id": pa.array([item.id for item in items]),
            "path": pa.array([item.path for item in items]),
            "fingerprint": pa.array([item.fingerprint for item in items], pa.int64()),
            "model": pa.array([self.identity.model] * size).dictionary_encode(),
            "dimension": pa.array([self.identity.dimension] * size, pa.int32()),
        }
        try:
            write_part(self.folder, self.number, rows, np.concatenate(vectors), self.form)
        except OSError as error:
            free = shutil.disk_usage(self.folder).free / 2**20
            raise OSError(
                f"{self.folder} cannot be written ({error}; {free:.0f} MiB are free). Make room, and run the same "
                "command again: it goes on behind the parts that are there."
            ) from error
        self.number += self.step


def write_left_out(folder: str, left_out: dict[str, str]) -> None:
    """Lists the images that cannot be read, a JSON object each; removes the list of an earlier run."""
    path = os.path.join(folder, LEFT_OUT)
    if not left_out:
        if os.path.exists(path):
            os.remove(path)
        return
    with open(path, "w", encoding="utf-8") as file:
        for name, reason in left_out.items():
            file.write(json.dumps({"id": name, "reason": reason}, ensure_ascii=False) + "\n")


def build(
    options: SourceOptions,
    folder: str,
    loaded: LoadedModel,
    form: str = "parquet",
    batch_size: int = 32,
    workers: int = 0,
) -> BuildReport:
    """
    Brings an index up to date, by all processes of a launch together; each writes parts of its own.

    Args:
        options: where the images are.
        folder: of the index; a new one is made.
        form: "parquet", or "npy" for clip-retrieval's folders.
        batch_size: images at a time.
        workers: processes that read images, beside each process that embeds.

    Raises:
        ValueError: as [`prepare`] and [`open_source`]; for an index that another process writes; for embeddings that
            are not finite.
        OSError: where a part cannot be written; earlier parts stay.
    """
    source = open_source(options, folder)
    with output_lock(folder, "--output") if is_first_process() else nullcontext(), evaluating(loaded.model):
        try:
            return _build(options, source, folder, loaded, form, batch_size, workers)
        except Exception as error:
            report_failure(error)
            raise


def _build(
    options: SourceOptions,
    source: Source,
    folder: str,
    loaded: LoadedModel,
    form: str,
    batch_size: int,
    workers: int,
) -> BuildReport:
    rank, world_size = rank_and_world_size()
    identity, plans = loaded.identity(), []
    if is_first_process():
        prepare(folder, identity, form, options, source)
        plans = [plan(source, folder)]
    (planned,) = gather_parts(plans)
    known, missing = planned.known, planned.missing
    present = len(known.sorted) if missing is None else int(known.is_found.sum())
    report = BuildReport(present=present, removed=planned.removed)

    def units(part: int, parts: int) -> Iterator[Any]:
        return source.units(rank * parts + part, world_size * parts)

    total = None if missing is None else -(-missing // world_size)
    bar = logging.tqdm(total=total, unit=" images", disable=None if is_first_process() else True)
    with PartWriter(folder, identity, form, planned.number + rank, world_size) as writer, bar:
        for items, vectors, faults in embed_units(units, source, known, loaded, batch_size, workers):
            writer.add(items, vectors)
            report.embedded += len(items)
            report.left_out.update(faults)
            bar.update(len(items) + len(faults))
    report.embedded = sum(gather_parts([report.embedded]))
    report.left_out = dict(gather_parts(report.left_out.items()))
    if is_first_process():
        write_left_out(folder, report.left_out)
    return report
