"""From the options to a training and an evaluation dataset."""

import os
from collections.abc import Sequence
from typing import Any

import datasets
from transformers.utils import logging

from .annotations import read_annotations
from .arguments import DataArguments
from .pairs import PairDataset
from .regions import RegionDataset
from .scenes import ScenesDataset
from .shards import ShardStream, expand_shards
from .table_files import load_named, read_file


logger = logging.get_logger(__name__)

Table = tuple[Any, str]  # rows, and the file they were read from
HELD_OUT_SPLITS = ("validation", "val", "valid", "dev", "eval", "test")


def is_hub_id(name: str | None) -> bool:
    """Whether a name stands for something on the Hub: not for a folder here, nor for the built-in scenes."""
    return name is not None and name != "scenes" and not os.path.exists(name)


def load_pairs(
    arguments: DataArguments, image_size: int, seed: int
) -> tuple[PairDataset | ShardStream, PairDataset | None]:
    """
    The training pairs, and those to evaluate on (None where the data has none, which is logged).

    Raises:
        ValueError: for a column that is not there, with those that are; for captions that are no texts; for a file of
            unknown format.
        FileNotFoundError: for a file or shard that is not there.
    """
    if arguments.train_shards:
        held_out = _read_held_out(arguments)
        stream = ShardStream(
            [expand_shards(pattern) for pattern in arguments.train_shards],
            arguments.shard_weights,
            arguments.caption_column,
            arguments.augmentation_scale,
            seed,
            arguments.shuffle_window,
        )
        return stream, None if held_out is None else _pairs(held_out, arguments, seed, held_out=True)
    train, held_out = _load_tables(arguments, image_size, seed)
    eval_pairs = None if held_out is None else _pairs(held_out, arguments, seed, held_out=True)
    return _pairs(train, arguments, seed), eval_pairs


def load_regions(arguments: DataArguments, image_size: int, seed: int) -> tuple[RegionDataset, RegionDataset | None]:
    """
    The pictures with regions to train stage 2 on, and those to evaluate on.

    Raises:
        ValueError, FileNotFoundError: as [`load_pairs`]; for shards, which hold no regions.
    """
    if arguments.train_shards:
        raise ValueError("Shards hold no regions; stage 2 takes a table, annotations, or 'scenes'.")
    train, held_out = _load_tables(arguments, image_size, seed)
    eval_regions = None if held_out is None else _regions(held_out, arguments, seed, held_out=True)
    return _regions(train, arguments, seed), eval_regions


def _load_tables(arguments: DataArguments, image_size: int, seed: int) -> tuple[Table, Table | None]:
    """Tables to train and to evaluate on, each with the file that it was read from."""
    if arguments.dataset_name is not None and arguments.validation_annotations:
        raise ValueError("validation_annotations go with train_annotations, train_file or train_shards.")
    if arguments.dataset_name == "scenes":
        train = ScenesDataset("train", arguments.max_train_samples or 20_000, image_size, seed)
        # The held-out scenes are the same whatever the training seed.
        return (train, ""), (ScenesDataset("test", arguments.max_eval_samples or 500, image_size), "")
    if arguments.dataset_name is not None:
        splits = load_named(arguments.dataset_name, arguments.dataset_config_name)
        if "train" not in splits:
            raise ValueError(f"{arguments.dataset_name} has no train split, only {', '.join(splits)}.")
        held_out = next((splits[name] for name in HELD_OUT_SPLITS if name in splits), None)
        if held_out is None:
            logger.warning(
                f"Nothing will be evaluated: {arguments.dataset_name} has the splits {', '.join(splits)}, and none "
                f"called {', '.join(HELD_OUT_SPLITS)}. python -m mmgem.evaluation takes any, with --split."
            )
        return (splits["train"], ""), None if held_out is None else (held_out, "")
    if arguments.train_annotations:
        train, _ = annotated_table(arguments.train_annotations, arguments, ("train", "restval"))
        return (train, ""), _read_held_out(arguments)
    assert arguments.train_file is not None
    return (read_file(arguments.train_file, "train"), arguments.train_file), _read_held_out(arguments)


def _read_held_out(arguments: DataArguments) -> Table | None:
    if arguments.validation_annotations and arguments.validation_file:
        raise ValueError("Give validation_file or validation_annotations, not both.")
    if arguments.validation_annotations:
        # Karpathy's and DOCCI's names for it.
        table, _ = annotated_table(arguments.validation_annotations, arguments, ("val", "qual_dev"))
        return table, ""
    if arguments.validation_file:
        return read_file(arguments.validation_file, "validation"), arguments.validation_file
    logger.warning(
        "Nothing will be evaluated: name what to evaluate on with --validation_file or --validation_annotations."
    )
    return None


def annotated_table(files: list[str], arguments: Any, splits: Sequence[str]) -> tuple[datasets.Dataset, int]:
    """[`read_annotations`] with the columns, and the folders of the pictures, that options name."""
    names = {"image": arguments.image_column, "caption": arguments.caption_column, "regions": arguments.regions_column}
    table, missing = read_annotations(files, arguments.image_folders, splits)
    if arguments.caption_column == "long_caption" and "long_caption" not in table.column_names:
        raise ValueError(f"{', '.join(files)} hold no long captions; leave out --caption_column long_caption.")
    return table.rename_columns({old: new for old, new in names.items() if new not in table.column_names}), missing


def _pairs(table: Table, arguments: DataArguments, seed: int, held_out: bool = False) -> PairDataset:
    """A table with its columns checked; pictures that it names by relative paths lie beside its file."""
    rows, file = table
    scale = 1.0 if held_out else arguments.augmentation_scale
    if isinstance(rows, datasets.Dataset):
        limit = arguments.max_eval_samples if held_out else arguments.max_train_samples
        rows = checked_table(rows, arguments, ("image_column", "caption_column"), limit)
    if arguments.validation_annotations if held_out else arguments.train_annotations:
        rows = _with_captions(rows, arguments)
    return PairDataset(rows, arguments.image_column, arguments.caption_column, scale, seed, root=os.path.dirname(file))


def _with_captions(rows: datasets.Dataset, arguments: DataArguments) -> datasets.Dataset:
    """The pictures of annotations that have a caption of the whole."""
    kept = [i for i, captions in enumerate(rows[arguments.caption_column]) if captions]
    if not kept:
        raise ValueError("These annotations hold no captions of whole pictures; add COCO's captions_*.json.")
    return rows.select(kept)


def _regions(table: Table, arguments: DataArguments, seed: int, held_out: bool = False) -> RegionDataset:
    rows, file = table
    if isinstance(rows, datasets.Dataset):
        limit = arguments.max_eval_samples if held_out else arguments.max_train_samples
        rows = checked_table(rows, arguments, ("image_column", "regions_column"), limit)
    return RegionDataset(
        rows,
        arguments.image_column,
        arguments.caption_column,
        arguments.regions_column,
        0 if held_out else arguments.max_regions,
        arguments.whole_image_weight,
        seed,
        root=os.path.dirname(file),
    )


def checked_table(
    table: datasets.Dataset, arguments: Any, needed: Sequence[str], limit: int | None
) -> datasets.Dataset:
    """
    Its first `limit` rows, pictures not decoded yet.

    Args:
        arguments: whose options name the columns.
        needed: the options whose columns must be there.

    Raises:
        ValueError: for a column that is not there, with those that are; for captions that are no texts.
    """
    for option in needed:
        column = getattr(arguments, option)
        if column not in table.column_names:
            raise ValueError(
                f"The dataset has no column {column!r}; its columns are {', '.join(table.column_names)}. Set "
                f"--{option}."
            )
    caption_type = table.features.get(arguments.caption_column, datasets.Value("string"))
    if getattr(getattr(caption_type, "feature", caption_type), "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"Column {arguments.caption_column!r} must hold texts, or lists of texts, but is {caption_type}; set "
            "--caption_column."
        )
    table = table.select(range(min(limit, len(table)))) if limit else table
    if isinstance(table.features[arguments.image_column], datasets.Image):
        # Decoded by us, so that one corrupt picture does not end the run.
        table = table.cast_column(arguments.image_column, datasets.Image(decode=False))
    return table
