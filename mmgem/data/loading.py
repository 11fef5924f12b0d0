"""From the options to a training and an evaluation dataset."""

import os
from typing import Any

import datasets

from ..training.arguments import DataArguments
from .pairs import PairDataset
from .scenes import ScenesDataset
from .shards import ShardStream, expand_shards


FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def load_pairs(
    arguments: DataArguments, image_size: int, seed: int
) -> tuple[PairDataset | ShardStream, PairDataset | None]:
    """
    The training pairs, and those to evaluate on (None where the data has no validation or test split).

    Raises:
        ValueError: for a column that is not there, with those that are; for captions that are no texts; for a file of
            unknown format.
        FileNotFoundError: for a file or shard that is not there.
    """
    if arguments.dataset_name == "scenes":
        train: Any = ScenesDataset("train", arguments.max_train_samples or 20_000, image_size, seed)
        # The held-out scenes are the same whatever the training seed.
        held_out: Any = ScenesDataset("test", arguments.max_eval_samples or 500, image_size)
        scale = arguments.augmentation_scale
        return PairDataset(train, augmentation_scale=scale, seed=seed), PairDataset(held_out)
    if arguments.dataset_name is not None:
        splits = datasets.load_dataset(arguments.dataset_name, arguments.dataset_config_name)
        if "train" not in splits:
            raise ValueError(f"{arguments.dataset_name} has no train split, only {', '.join(splits)}.")
        held_out = splits.get("validation", splits.get("test"))
        eval_pairs = None if held_out is None else _pairs(held_out, arguments, seed, held_out=True)
        return _pairs(splits["train"], arguments, seed), eval_pairs
    eval_pairs = None
    if arguments.validation_file:
        held_out = _read_file(arguments.validation_file, "validation")
        eval_pairs = _pairs(held_out, arguments, seed, arguments.validation_file, held_out=True)
    if arguments.train_shards:
        stream = ShardStream(
            [expand_shards(pattern) for pattern in arguments.train_shards],
            arguments.shard_weights,
            arguments.caption_column,
            arguments.augmentation_scale,
            seed,
            arguments.shuffle_window,
        )
        return stream, eval_pairs
    assert arguments.train_file is not None
    table = _read_file(arguments.train_file, "train")
    return _pairs(table, arguments, seed, arguments.train_file), eval_pairs


def _pairs(
    table: datasets.Dataset, arguments: DataArguments, seed: int, file: str | None = None, held_out: bool = False
) -> PairDataset:
    """A table with its columns checked; pictures that it names by relative paths lie beside its file."""
    for column in (arguments.image_column, arguments.caption_column):
        if column not in table.column_names:
            raise ValueError(
                f"The dataset has no column {column!r}; its columns are {', '.join(table.column_names)}. Set "
                "--image_column and --caption_column."
            )
    caption_type = table.features[arguments.caption_column]
    if getattr(getattr(caption_type, "feature", caption_type), "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"Column {arguments.caption_column!r} must hold texts, or lists of texts, but is {caption_type}; set "
            "--caption_column."
        )
    limit = arguments.max_eval_samples if held_out else arguments.max_train_samples
    table = table.select(range(min(limit, len(table)))) if limit else table
    if isinstance(table.features[arguments.image_column], datasets.Image):
        # Decoded by us, so that one corrupt picture does not end the run.
        table = table.cast_column(arguments.image_column, datasets.Image(decode=False))
    scale = 1.0 if held_out else arguments.augmentation_scale
    root = os.path.dirname(file) if file else ""
    return PairDataset(table, arguments.image_column, arguments.caption_column, scale, seed, root)


def _read_file(path: str, split: str) -> datasets.Dataset:
    extension = os.path.splitext(path)[1]
    if extension not in FORMATS:
        raise ValueError(f"{path}: unknown format {extension!r}; use one of {', '.join(FORMATS)}.")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {path}.")
    return datasets.load_dataset(FORMATS[extension], data_files={split: path}, split=split)
