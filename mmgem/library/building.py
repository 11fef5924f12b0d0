"""Embeds the images of a source into the parts of an index; what is there already is not embedded again."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers.utils import logging

from ..data.loading import BUILT_IN, is_hub_id
from ..evaluation.sharing import gather_parts, is_first_process, rank_and_world_size, report_failure
from ..output_lock import output_lock
from ..processing import MMGEMProcessor
from .loaded import LoadedModel
from .sources import Item, Source, SourceOptions, open_source
from .tables import FORMATS, INDEX_FILE, Identity, part_files, read_index_file, write_part


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
        self.is_met = np.zeros(len(self.sorted), dtype=bool)

    def meet(self, fingerprint: int) -> bool:
        """Whether it is known; [`Known.is_met`] keeps it."""
        place = int(np.searchsorted(self.sorted, fingerprint))
        if place == len(self.sorted) or self.sorted[place] != fingerprint:
            return False
        self.is_met[place] = True
        return True


def prepare(folder: str, identity: Identity, form: str, source: SourceOptions) -> None:
    """
    Writes index.json, or compares it with that of an earlier run.

    Raises:
        ValueError: for an index of another model or format, or a folder that holds other vectors.
    """
    found = read_index_file(folder)
    if not found and part_files(folder):
        raise ValueError(f"{folder} holds vectors of another program. Give another --output.")
    for name, value in {**asdict(identity), "format": form}.items():
        if found and name != "model" and found.get(name) != value:
            raise ValueError(
                f"{folder} is an index of {found['model']}, whose {name} is {found.get(name)}, not {value}. Give "
                "another --output, or delete the index."
            )
    name = source.name if is_hub_id(source.name) or source.name in BUILT_IN else os.path.abspath(source.name)
    about = {**asdict(identity), "format": form, "source": asdict(replace(source, name=name))}
    path = os.path.join(folder, INDEX_FILE)
    with open(f"{path}.unfinished", "w", encoding="utf-8") as file:
        json.dump(about, file, indent=2, ensure_ascii=False)
    os.replace(f"{path}.unfinished", path)


def plan(source: Source, folder: str) -> tuple[Known, int | None, int]:
    """
    What the index already holds, how many images are missing (None where only reading them tells), and how many
    rows were removed because their images are no longer there or have changed.
    """
    known = known_in(folder)
    if not source.is_counted:
        return known, None, 0
    missing = sum(not known.meet(source.fingerprint(unit)) for unit in source.units())
    stale = np.unique(known.sorted[~known.is_met])
    if len(stale) and missing + known.is_met.sum() == 0:
        raise ValueError("The source holds no images any more, but the index does. Delete it if they are gone.")
    removed = sum(_remove(rows, vectors, stale) for rows, vectors in part_files(folder)) if len(stale) else 0
    return known, missing, removed


def known_in(folder: str) -> Known:
    """The fingerprints of an index."""
    return Known(_fingerprints(rows) for rows, _ in part_files(folder))


def _fingerprints(path: str) -> np.ndarray:
    try:
        return pq.read_table(path, columns=["fingerprint"]).column(0).to_numpy()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is no part of an index, or damaged: {error}. Delete it.") from error


def _remove(rows: str, vectors: str, stale: np.ndarray) -> int:
    """Rewrites a part without some rows."""
    table = pq.read_table(rows)
    kept = ~np.isin(table["fingerprint"].to_numpy(), stale)
    if kept.all():
        return 0
    number = int(os.path.basename(rows)[5:11])
    folder = os.path.dirname(os.path.dirname(rows))
    form = FORMATS[rows != vectors]
    matrix = np.load(vectors) if form == "npy" else np.stack(table["vector"].to_numpy())
    columns = {name: table[name].filter(pa.array(kept)) for name in table.column_names if name != "vector"}
    write_part(folder, number, columns, matrix[kept], form)
    return int((~kept).sum())


class _Batches(torch.utils.data.IterableDataset):
    """The images of a share that are not known, in batches: without their content, and their pixels."""

    def __init__(self, units: Any, source: Source, known: Known, processor: MMGEMProcessor, batch_size: int):
        self.units, self.source, self.known = units, source, known
        self.processor, self.batch_size = processor, batch_size
        size = getattr(processor.image_processor, "crop_size", None) or processor.image_processor.size or {}
        resizes = getattr(processor.image_processor, "do_resize", False)
        self.least_side = max([value for value in dict(size).values() if value] or [0]) if resizes else 0

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
            if self.source.is_counted and self.known.meet(self.source.fingerprint(unit)):
                continue
            for item in self.source.items(unit):
                if self.source.is_counted or not self.known.meet(item.fingerprint):
                    yield item

    def _pixels(self, images: list[Any]) -> torch.Tensor:
        return self.processor(images=images, return_tensors="pt")["pixel_values"]


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
            embeds = model.get_embedding(pixel_values=pixels.to(model.device)).float().cpu()
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


def next_number(folder: str) -> int:
    """Of a part that does not exist yet."""
    return max((int(os.path.basename(rows)[5:11]) + 1 for rows, _ in part_files(folder)), default=0)


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
    with output_lock(folder, "--output") if is_first_process() else nullcontext():
        if is_first_process():
            prepare(folder, loaded.identity(), form, options)
        return _build(source, folder, loaded, form, batch_size, workers)


def _build(source: Source, folder: str, loaded: LoadedModel, form: str, batch_size: int, workers: int) -> BuildReport:
    rank, world_size = rank_and_world_size()
    (known, missing, removed), *_ = gather_parts([plan(source, folder)] if is_first_process() else [])
    report = BuildReport(present=len(known.sorted) if missing is None else int(known.is_met.sum()), removed=removed)

    def units(part: int, parts: int) -> Iterator[Any]:
        return source.units(rank * parts + part, world_size * parts)

    total = None if missing is None else -(-missing // world_size)
    bar = logging.tqdm(total=total, unit=" images", disable=None if is_first_process() else True)
    try:
        with PartWriter(folder, loaded.identity(), form, next_number(folder) + rank, world_size) as writer, bar:
            for items, vectors, faults in embed_units(units, source, known, loaded, batch_size, workers):
                writer.add(items, vectors)
                report.embedded += len(items)
                report.left_out.update(faults)
                bar.update(len(items) + len(faults))
    except Exception as error:
        report_failure(error)
        raise
    report.embedded = sum(gather_parts([report.embedded]))
    report.left_out = dict(gather_parts(report.left_out.items()))
    if is_first_process():
        write_left_out(folder, report.left_out)
    return report
