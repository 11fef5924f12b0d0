"""From the options to the datasets of training and evaluation."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import datasets
from transformers.utils import logging

from ..options import load_yaml
from .annotations import read_annotations
from .arguments import DataArguments, TableArguments
from .composed_scenes import ComposedScenesDataset
from .pairs import PairDataset
from .regions import RegionDataset
from .samplers import CLUSTER_COLUMN
from .scenes import ScenesDataset
from .shards import ShardStream, expand_shards
from .table_files import load_named, read_file
from .triplets import TripletDataset, TripletSource, with_triplet_columns


logger = logging.get_logger(__name__)

DatasetT = TypeVar("DatasetT", bound=PairDataset)
# Datasets that are drawn, by `--dataset_name`: see `ScenesDataset` for what such a class provides.
BUILT_IN = {"scenes": ScenesDataset}
# The options of a dataset in a mixture of triplets, with their types.
MIXTURE_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("train_file", "dataset_name", "dataset_config_name", "split", "image_folder"), str),
    **dict.fromkeys(("query_instruction", "target_instruction"), str),
    "weight": (int, float),
    "max_samples": int,
}
HELD_OUT_SPLITS = ("validation", "val", "valid", "dev", "eval", "test")


@dataclass
class Table:
    """
    Rows, the folder of the images that they name by relative paths, and how many images annotations name that are not
    there.
    """

    rows: Any
    root: str = ""
    missing: int = 0


def is_hub_id(name: str | None) -> bool:
    """Whether a dataset's name is one of the Hub: neither a built-in dataset nor a local folder."""
    return name is not None and name not in BUILT_IN and not os.path.exists(name)


def load_pairs(
    arguments: DataArguments, image_size: int, seed: int
) -> tuple[PairDataset | ShardStream, PairDataset | None]:
    """
    The training pairs, and those to evaluate on (None where the data has none, which is logged).

    Raises:
        ValueError: for a missing column, captions that are not text, or a file of unknown format.
        FileNotFoundError: for a missing file or shard.
    """
    if not arguments.train_shards:
        return _train_and_held_out(arguments, image_size, seed, _pairs)
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


def load_regions(arguments: DataArguments, image_size: int, seed: int) -> tuple[RegionDataset, RegionDataset | None]:
    """
    The images with regions to train stage 2 on, and those to evaluate on.

    Raises:
        ValueError, FileNotFoundError: as [`load_pairs`]; for shards, which hold no regions.
    """
    if arguments.train_shards:
        raise ValueError("Shards hold no regions. Train stage 2 on a table, on annotations, or on 'scenes'.")
    return _train_and_held_out(arguments, image_size, seed, _regions)


def load_triplets(
    arguments: DataArguments, image_size: int, seed: int
) -> tuple[TripletDataset, TripletDataset | None]:
    """
    The triplets to train fused-retrieval on, those of a mixture too, and those to evaluate on.

    Raises:
        ValueError, FileNotFoundError: as [`load_pairs`]; for shards and annotations, which hold no triplets; for a
            mixture that is no list of datasets, with the entry.
    """
    if arguments.train_shards or arguments.train_annotations or arguments.validation_annotations:
        raise ValueError(
            "Shards and annotations hold no triplets. Give --train_file, --train_mixture or --dataset_name."
        )
    if arguments.train_mixture is not None:
        held_out = _read_held_out(arguments)
        eval_dataset = None if held_out is None else _triplets(held_out, arguments, seed, held_out=True)
        return _read_mixture(arguments.train_mixture, seed), eval_dataset
    return _train_and_held_out(arguments, image_size, seed, _triplets, {"scenes": ComposedScenesDataset})


def triplets_of(
    tables: Sequence[Table], seed: int, settings: Sequence[dict[str, Any]] | None = None
) -> TripletDataset:
    """One dataset of several tables; `settings` are those of [`TripletSource`]."""
    rows = [with_triplet_columns(table.rows) for table in tables]
    if empty := [i for i, own in enumerate(rows) if not len(own)]:
        raise ValueError(f"Table {empty[0]} of triplets has no rows.")
    sources = [
        TripletSource(len(own), **{"weight": float(len(own)), "root": table.root, **given})
        for own, table, given in zip(rows, tables, settings or [{}] * len(tables), strict=True)
    ]
    return TripletDataset(datasets.concatenate_datasets(rows) if len(rows) > 1 else rows[0], sources, seed)


def read_table(path: str, split: str) -> Table:
    """A table file, whose relative image paths start at its own folder."""
    return Table(read_file(path, split), os.path.dirname(path))


def read_annotated_table(files: list[str], arguments: TableArguments, splits: Sequence[str]) -> Table:
    """[`read_annotations`], with the names of columns and the image folders that the options set."""
    rows, missing = read_annotations(files, arguments.image_folders, splits)
    if arguments.caption_column == "long_caption" and "long_caption" not in rows.column_names:
        raise ValueError(f"{', '.join(files)} hold no long captions; leave out --caption_column long_caption.")
    names = {"image": arguments.image_column, "caption": arguments.caption_column, "regions": arguments.regions_column}
    renamed = {old: new for old, new in names.items() if new not in rows.column_names}
    return Table(rows.rename_columns(renamed), missing=missing)


def checked_table(table: Table, arguments: Any, needed: Sequence[str], limit: int | None = None) -> Table:
    """
    The first `limit` rows, with images still encoded.

    Args:
        arguments: has the names of the columns, as [`TableArguments`].
        needed: the options whose columns must exist.

    Raises:
        ValueError: for a missing column, with those that exist; for captions that are not text.
    """
    rows = table.rows
    for option in needed:
        column = getattr(arguments, option)
        if column not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise ValueError(f"The dataset has no column {column!r}; its columns are {columns}. Set --{option}.")
    caption_type = rows.features.get(arguments.caption_column, datasets.Value("string"))
    if getattr(getattr(caption_type, "feature", caption_type), "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"Column {arguments.caption_column!r} must hold texts, or lists of texts, but is {caption_type}; set "
            "--caption_column."
        )
    if limit is not None and limit < len(rows):
        rows = rows.select(range(limit))
    # PairDataset decodes, so that one corrupt image does not end the run; images of other columns nobody looks at.
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return replace(table, rows=rows)


def _train_and_held_out(
    arguments: DataArguments,
    image_size: int,
    seed: int,
    make: Callable[..., DatasetT],
    built_in: dict[str, Any] = BUILT_IN,
) -> tuple[DatasetT, DatasetT | None]:
    train, held_out = load_tables(arguments, image_size, seed, built_in)
    eval_dataset = None if held_out is None else make(held_out, arguments, seed, held_out=True)
    return make(train, arguments, seed), eval_dataset


def load_tables(
    arguments: DataArguments, image_size: int, seed: int, built_in: dict[str, Any] = BUILT_IN
) -> tuple[Table, Table | None]:
    """The table to train on, and the one to evaluate on (None where the data has none, which is logged)."""
    if arguments.dataset_name in built_in:
        draw = built_in[arguments.dataset_name]
        train = Table(draw("train", arguments.max_train_samples or 20_000, image_size, seed))
        # The held-out images are the same whatever the training seed.
        return train, Table(draw("test", arguments.max_eval_samples or 500, image_size))
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
        return Table(splits["train"]), None if held_out is None else Table(held_out)
    if arguments.train_annotations:
        train = read_annotated_table(arguments.train_annotations, arguments, ("train", "restval"))
        return train, _read_held_out(arguments)
    assert arguments.train_file is not None
    return read_table(arguments.train_file, "train"), _read_held_out(arguments)


def _read_held_out(arguments: DataArguments) -> Table | None:
    if arguments.validation_annotations:
        # The names of this split in Karpathy's and in DOCCI's files.
        return read_annotated_table(arguments.validation_annotations, arguments, ("val", "qual_dev"))
    if arguments.validation_file:
        return read_table(arguments.validation_file, "validation")
    logger.warning("Nothing will be evaluated. Set --validation_file or --validation_annotations.")
    return None


def _pairs(table: Table, arguments: DataArguments, seed: int, held_out: bool = False) -> PairDataset:
    limit = arguments.max_eval_samples if held_out else arguments.max_train_samples
    negatives = None if held_out else arguments.negative_caption_column
    names = ["image_column", "caption_column", *([] if negatives is None else ["negative_caption_column"])]
    rows = checked_table(table, arguments, names, limit).rows
    columns = {getattr(arguments, name) for name in names} | ({CLUSTER_COLUMN} & {*rows.column_names})
    rows = rows.select_columns(sorted(columns))  # others would be read in vain
    if arguments.validation_annotations if held_out else arguments.train_annotations:
        # Annotations also list images that have regions only.
        captioned = [i for i, captions in enumerate(rows[arguments.caption_column]) if captions]
        if not captioned:
            raise ValueError("These annotations hold no captions of whole images; add COCO's captions_*.json.")
        rows = rows.select(captioned)
    scale = 1.0 if held_out else arguments.augmentation_scale
    return PairDataset(rows, arguments.image_column, arguments.caption_column, scale, seed, table.root, negatives)


def _regions(table: Table, arguments: DataArguments, seed: int, held_out: bool = False) -> RegionDataset:
    limit = arguments.max_eval_samples if held_out else arguments.max_train_samples
    return RegionDataset(
        checked_table(table, arguments, ("image_column", "regions_column"), limit).rows,
        arguments.regions_column,
        0 if held_out else arguments.max_regions,
        arguments.whole_image_weight,
        image_column=arguments.image_column,
        caption_column=arguments.caption_column,
        seed=seed,
        root=table.root,
    )


def _triplets(table: Table, arguments: DataArguments, seed: int, held_out: bool = False) -> TripletDataset:
    limit = arguments.max_eval_samples if held_out else arguments.max_train_samples
    return triplets_of_table(table, arguments, limit, seed)


def triplets_of_table(table: Table, arguments: TableArguments, limit: int | None, seed: int = 0) -> TripletDataset:
    """The first `limit` triplets of a table, with the instructions and the image folder of the options."""
    instructions = {name: getattr(arguments, name) for name in ("query_instruction", "target_instruction")}
    if not isinstance(table.rows, datasets.Dataset):  # drawn, as many as were asked for
        if any(instructions.values()):
            raise ValueError("Composed scenes take no instructions. Leave out query_instruction, target_instruction.")
        return TripletDataset(table.rows, seed=seed)
    if len(arguments.image_folders) > 1:
        raise ValueError("Triplets name their images by paths from one folder. Give one of --image_folders.")
    rows = table.rows.select(range(min(limit or len(table.rows), len(table.rows))))
    return triplets_of([Table(rows, (arguments.image_folders or [table.root])[0])], seed, [instructions])


def _read_mixture(path: str, seed: int) -> TripletDataset:
    """A YAML list of datasets: each a mapping of the options in `MIXTURE_OPTIONS`, `train_file` or `dataset_name`."""
    with open(path, "rb") as file:
        entries = load_yaml(file, path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a list of datasets.")
    tables, settings = [], []
    for i, entry in enumerate(entries):
        try:
            table, given = _read_entry(entry)
            tables.append(replace(table, rows=with_triplet_columns(table.rows)))
        except (ValueError, OSError) as error:
            raise ValueError(f"Entry {i} of {path}: {error}") from error
        settings.append(given)
    return triplets_of(tables, seed, settings)


def _read_entry(entry: Any) -> tuple[Table, dict[str, Any]]:
    if not isinstance(entry, dict):
        raise ValueError("it is no mapping of options.")
    for name, value in entry.items():
        if name not in MIXTURE_OPTIONS:
            raise ValueError(f"unknown option {name!r}; it has {', '.join(MIXTURE_OPTIONS)}.")
        if not isinstance(value, MIXTURE_OPTIONS[name]) or isinstance(value, bool):
            raise ValueError(f"{name} must not be {value!r}.")
    if entry.get("dataset_name") in BUILT_IN:
        raise ValueError(f"{entry['dataset_name']} are drawn, and go into no mixture; give --dataset_name.")
    if ("train_file" in entry) == ("dataset_name" in entry):
        raise ValueError("it needs train_file or dataset_name, one of the two.")
    if "train_file" in entry:
        table = read_table(entry["train_file"], "train")
    else:
        table = Table(load_named(entry["dataset_name"], entry.get("dataset_config_name"), entry.get("split", "train")))
    if (limit := entry.get("max_samples", len(table.rows))) < 1:
        raise ValueError(f"max_samples must be 1 or more, got {limit}.")
    rows = table.rows.select(range(min(limit, len(table.rows))))
    given = {name: entry[name] for name in ("weight", "query_instruction", "target_instruction") if name in entry}
    if not 0 < given.get("weight", 1) < float("inf"):
        raise ValueError(f"weight must be a number above 0, got {given['weight']}.")
    return Table(rows, entry.get("image_folder", table.root)), given
