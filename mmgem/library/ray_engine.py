"""The same index by Ray Data: many machines that share a file system, each worker writing parts of its own."""

import itertools
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch
from tqdm import tqdm

from ..output_lock import output_lock
from .building import (
    PART_ROWS,
    BuildReport,
    Known,
    PartWriter,
    embed_units,
    known_in,
    plan,
    prepare,
    write_left_out,
)
from .loaded import LoadedModel
from .sources import Source, SourceOptions, open_source
from .tables import Identity


PARTS_PER_SHARD = 1000  # numbers of parts that a shard may use: a million images


@dataclass
class Work:
    """What every worker needs: how to load the model, what to read, and where to write."""

    model: dict[str, Any]  # arguments of `LoadedModel.load`
    source: Source
    folder: str
    identity: Identity
    form: str
    batch_size: int


class PartEmbedder:
    """A worker: embeds the units of a part, and writes them."""

    def __init__(self, work: Work, threads: int):
        torch.set_num_threads(threads)
        self.work = work
        self.loaded = LoadedModel.load(**work.model)
        self.known = known_in(work.folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Takes rows of `part` (its number) and `units`; returns a report of each, as JSON."""
        reports = []
        for number, units in zip(batch["part"].tolist(), batch["units"]):
            try:
                embedded, left_out = self._embed(number, units)
                reports.append({"embedded": embedded, "left_out": left_out, "error": None})
            except (ValueError, OSError) as error:  # Ray would wrap it in pages of its own
                reports.append({"embedded": 0, "left_out": {}, "error": str(error)})
        return {"report": [json.dumps(report) for report in reports]}

    def _embed(self, number: int, units: Any) -> tuple[int, dict[str, str]]:
        work, count, left_out = self.work, 0, {}

        def own(part: int, parts: int) -> Iterator[Any]:
            return itertools.islice(iter(units), part, None, parts)

        with PartWriter(work.folder, work.identity, work.form, number) as writer:
            for items, vectors, faults in embed_units(own, work.source, self.known, self.loaded, work.batch_size):
                writer.add(items, vectors)
                count += len(items)
                left_out.update(faults)
        return count, left_out


def build_with_ray(
    options: SourceOptions,
    folder: str,
    model: dict[str, Any],
    form: str = "parquet",
    batch_size: int = 32,
    workers: int = 1,
) -> BuildReport:
    """
    [`build`] by a cluster of Ray, or by processes of this machine where there is none.

    Args:
        folder: of the index, on a file system that all machines share.
        model: arguments of [`LoadedModel.load`].
        workers: processes that embed.

    Raises:
        ValueError, OSError: as [`build`].
    """
    if workers < 1:
        raise ValueError(f"--engine ray needs one worker or more (--num_workers), got {workers}.")
    # Workers of a cluster start in folders of their own.
    source, name = open_source(options.absolute(), os.path.abspath(folder)), model["name"]
    model = {**model, "name": os.path.abspath(name) if os.path.isdir(name) else name}
    with output_lock(folder, "--output"):
        identity = LoadedModel.load(**model).identity()
        prepare(folder, identity, form, options, source)
        planned = plan(source, folder)
        known = planned.known
        present = len(known.sorted) if planned.missing is None else int(known.is_found.sum())
        report = BuildReport(present=present, removed=planned.removed)
        work = Work(model, source, os.path.abspath(folder), identity, form, batch_size)
        parts = list(_parts(source, known, planned.number, workers))
        if parts:
            if not ray.is_initialized():
                for name, level in {"RAY_DATA_LOG_LEVEL": "ERROR", "RAY_BACKEND_LOG_LEVEL": "fatal"}.items():
                    os.environ.setdefault(name, level)
                ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = context.print_on_execution_start = False
            # Ray counts whole cores; each worker computes with its share of them.
            cores = max(int(ray.cluster_resources().get("CPU", 1)) // workers, 1)
            gpus = 1 if torch.cuda.is_available() and model.get("device") != "cpu" else 0
            found = ray.data.from_items(parts).map_batches(
                PartEmbedder,
                fn_constructor_kwargs={"work": work, "threads": cores},
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(workers, len(parts))),
                num_cpus=cores if not gpus else 1,
                num_gpus=gpus,
            )
            for row in tqdm(found.iter_rows(), total=len(parts), unit=" parts"):
                of_part = json.loads(row["report"])
                if of_part["error"] is not None:
                    raise ValueError(f"A worker failed: {of_part['error']} Whole parts stay in {folder}.")
                report.embedded += of_part["embedded"]
                report.left_out.update(of_part["left_out"])
        write_left_out(folder, report.left_out)
    return report


def _parts(source: Source, known: Known, number: int, workers: int) -> Iterator[dict[str, Any]]:
    """The missing units in parts of one size, as many for each worker; each shard is a part, of several files."""
    if not source.is_counted:
        for shard in source.units():
            yield {"part": number, "units": [shard]}
            number += PARTS_PER_SHARD
        return
    missing = [unit for unit in source.units() if not known.contains(source.fingerprint(unit))]
    rounds = max(-(-len(missing) // (PART_ROWS * workers)), 1)
    size = max(-(-len(missing) // (rounds * workers)), 1)
    for start in range(0, len(missing), size):
        yield {"part": number, "units": missing[start : start + size]}
        number += 1
