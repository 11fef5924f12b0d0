"""What the Trainer does with its training data: prepares it, counts unusable examples, and tells it the epoch."""

import copy
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.utils import logging

from ..data.pairs import BadDataError, PairDataset
from ..data.regions import RegionDataset
from ..data.shards import ShardStream
from ..data.texts import as_tensors, load_teacher, with_teacher
from ..modeling_mmgem import MMGEMModel
from ..processing.image_processors_mmgem import least_side_of
from .arguments import MMGEMTrainingArguments


logger = logging.get_logger(__name__)

MAX_DESCRIBED = 100  # unreadable examples of a stream that are kept with their reasons; there may be millions


def check_dataset(name: str, dataset: Any, types: tuple[type, ...]) -> None:
    """Raises ValueError for anything but a `datasets.Dataset`, which is wrapped already, or one of `types`."""
    if not isinstance(dataset, types):
        hint = f": take one of its splits, such as {min(dataset)!r}" if isinstance(dataset, dict) and dataset else ""
        raise ValueError(f"{name} must be a datasets.Dataset, got {type(dataset).__name__}{hint}.")


def prepared_for(
    dataset: PairDataset | ShardStream, args: MMGEMTrainingArguments, image_processor: Any
) -> PairDataset | ShardStream:
    """
    Returns a copy of the training data that knows which process reads it, and how large images must be decoded.

    Raises:
        ValueError: for a table that is smaller than a batch, or a stream without a number of steps.
    """
    dataset = copy.copy(dataset)
    if isinstance(dataset, PairDataset):
        dataset._epoch = dataset._epoch.clone().share_memory_()
    dataset.least_side = least_side_of(image_processor)
    if isinstance(dataset, RegionDataset):
        dataset.image_processor = image_processor
    batch_size = args.train_batch_size * args.world_size
    if isinstance(dataset, ShardStream):
        dataset.rank, dataset.world_size = args.process_index, args.world_size
        if args.max_steps <= 0:
            raise ValueError("A stream of shards has no end: set --max_steps.")
    elif len(dataset) < batch_size:
        raise ValueError(
            f"{len(dataset)} training examples do not fill one batch of {batch_size}; lower "
            "--per_device_train_batch_size."
        )
    return dataset


def embedded_by_teacher(
    tables: Sequence[datasets.Dataset], teacher: str, args: MMGEMTrainingArguments
) -> list[datasets.Dataset]:
    """
    [`with_teacher`], for which the first process of each machine alone loads the teacher; the others read what it has
    written.
    """
    folder, files = args.feature_cache_dir or os.path.join(str(args.output_dir), "features"), [""] * len(tables)
    with args.main_process_first(desc="the teacher"):
        if args.local_process_index == 0:
            files = [rows.cache_files[0]["filename"] for rows in with_teacher(tables, load_teacher(teacher), folder)]
    files = broadcast_object_list(files)  # whose names depend on the teacher
    return [as_tensors(datasets.Dataset.from_file(file)) for file in files]


class ExampleCounts:
    """
    Counts unreadable, truncated and left out examples while a process trains, and reports them at the end.

    Args:
        dataset: of a table, each unreadable example is counted once, and `args.max_bad_fraction` of them is tolerated;
            those of a stream are counted only.
        max_length: tokens of the longest text.
    """

    def __init__(self, dataset: PairDataset | ShardStream, args: MMGEMTrainingArguments, max_length: int):
        self.max_bad_fraction = args.max_bad_fraction
        self.limit: float | None = None
        self.whole_limit: float | None = None  # of all processes
        if not isinstance(dataset, ShardStream):
            self.whole_limit = args.max_bad_fraction * len(dataset)
            self.limit = self.whole_limit / args.world_size
        self.max_length = max_length
        self.bad: dict[int | str, str] = {}
        self.bad_kinds: Counter[str] = Counter()
        self.truncated = self.left_out = self.seen = 0

    def take_from(self, batch: dict[str, Any]) -> int:
        """Removes the counts from a batch and adds them; returns the number of its images."""
        self.add_bad(batch.pop("bad"))
        self.truncated += batch.pop("truncated")
        self.left_out += batch.pop("left_out", 0)
        parts = batch.get("mini_batches", [batch])
        if "queries" in parts[0]:
            images = sum(len(part["images"]["pixel_values"]) for part in parts if "images" in part)
            queries = sum(len(part["queries"]) for part in parts)
            self.seen += queries + sum(len(part["answers"]) for part in parts) - images
            return queries
        images = sum(len(part["pooled_features" if "pooled_features" in part else "pixel_values"]) for part in parts)
        self.seen += len(batch["pair_ids"]) if "boxes" in batch else images
        return images

    def add_bad(self, bad: dict[int | str, str]) -> None:
        """
        Adds unreadable examples, by index or key, with their reasons. What stands before the colon is their kind.

        Raises:
            BadDataError: for more of them than the limit.
        """
        if self.limit is not None:
            bad = {index: reason for index, reason in bad.items() if index not in self.bad}
        self.bad_kinds.update(reason.partition(":")[0] for reason in bad.values())
        if self.limit is not None or len(self.bad) < MAX_DESCRIBED:
            self.bad.update(bad)
        if self.limit is not None and len(self.bad) > self.limit:
            raise BadDataError(
                f"{self._describe_bad()}, more than max_bad_fraction={self.max_bad_fraction} allows; repair the data "
                "or raise --max_bad_fraction."
            )

    def add_all_bad(self, bad: dict[int | str, str]) -> None:
        """As [`add_bad`], where every process knows those of all: they count against the whole limit."""
        self.limit = self.whole_limit
        self.add_bad(bad)

    def report(self) -> None:
        """Logs what was not used as it is."""
        if self.bad:
            logger.warning(f"{self._describe_bad()}; the next readable one replaced each.")
        if self.truncated:
            logger.warning(
                f"{self.truncated} of {self.seen} captions were longer than max_length={self.max_length} tokens and "
                "were truncated; [EMB] stayed."
            )
        if self.left_out:
            logger.warning(
                f"{self.left_out} regions, beside {self.seen} seen, were left out: they have no area, or lie outside "
                "their image or what the image processor's centre crop leaves of it."
            )

    def _describe_bad(self) -> str:
        index, reason = min(self.bad.items(), key=lambda item: str(item[0]).zfill(12))
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.bad_kinds.most_common())
        total = self.bad_kinds.total()
        return f"{total} training examples could not be read ({kinds}; such as {index}: {reason})"


class TrainingCallback(TrainerCallback):
    """Tells the data which epoch it is, and clamps the temperature after each step."""

    def __init__(self, model: MMGEMModel, train_dataset: PairDataset | ShardStream):
        self.model = model
        self.train_dataset = train_dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.train_dataset, PairDataset):
            self.train_dataset.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.train_dataset, ShardStream):  # Trainer counts from where it was resumed
            state.epoch = state.global_step / args.max_steps

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.logit_scale.clamp_()
