"""The data that the options of an evaluation name."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets

from ..data.loading import annotated_table, checked_table
from ..data.pairs import PairDataset
from ..data.regions import RegionDataset
from ..data.scenes import CLASSES, ScenesDataset
from ..data.table_files import load_named, read_file
from ..options import load_yaml
from .arguments import LONG_CAPTION_COLUMN, EvaluationArguments
from .classification import DEFAULT_TEMPLATES


SOURCES = ("dataset_name", "dataset_config_name", "data_file", "annotations")
# Of an entry of a suite.
ENTRY = {
    **dict.fromkeys(("name", "metric", "dataset_name", "dataset_config_name", "data_file", "split"), str),
    **dict.fromkeys(("image_column", "label_column"), str),
    **dict.fromkeys(("class_names", "templates"), list),
    "max_samples": int,
}
SCENE_TEMPLATES = ("a small {}", "a large {}")


@dataclass
class LabelledPictures:
    """Images with the numbers of their classes."""

    name: str
    dataset: PairDataset
    labels: Sequence[int]
    class_names: Sequence[str]
    templates: Sequence[str]
    metric: str = "top1"


def load_pairs(
    arguments: EvaluationArguments, image_size: int, long: bool = False, max_captions: int | None = None
) -> PairDataset:
    """
    Images with their captions (of each the first `max_captions`), the long ones where there are such and they are
    asked for.

    Raises:
        ValueError: for a column that is not there, with those that are.
        FileNotFoundError: for a file that is not there.
    """
    rows, root, missing = _load_table(arguments, image_size)
    column = arguments.caption_column
    is_there = isinstance(rows, ScenesDataset) or arguments.long_caption_column in rows.column_names
    if long and (is_there or arguments.long_caption_column != LONG_CAPTION_COLUMN):
        column = arguments.long_caption_column
    if isinstance(rows, datasets.Dataset):
        option = "caption_column" if column == arguments.caption_column else "long_caption_column"
        named = replace(arguments, caption_column=column)
        rows = checked_table(rows, named, ("image_column", option), arguments.max_samples)
    dataset = PairDataset(rows, arguments.image_column, column, root=root)
    dataset.max_captions, dataset.missing = max_captions, missing
    return dataset


def load_regions(arguments: EvaluationArguments, image_size: int) -> RegionDataset:
    """Images with all their regions. Raises as [`load_pairs`]."""
    rows, root, missing = _load_table(arguments, image_size)
    if isinstance(rows, datasets.Dataset):
        rows = checked_table(rows, arguments, ("image_column", "regions_column"), arguments.max_samples)
    columns = (arguments.image_column, arguments.caption_column, arguments.regions_column)
    dataset = RegionDataset(rows, *columns, max_regions=0, root=root)
    dataset.max_captions, dataset.missing = arguments.captions_per_image, missing
    return dataset


def load_labelled(arguments: EvaluationArguments, image_size: int) -> list[LabelledPictures]:
    """
    Images to classify: those of the dataset, or of each dataset of `classification_suite`.

    Raises:
        ValueError: as [`load_pairs`], with the place of the entry in the suite.
    """
    if arguments.classification_suite is None:
        return [_labelled("", arguments, image_size)]
    path = arguments.classification_suite
    loaded: list[LabelledPictures] = []
    for i, entry in enumerate(read_suite(path)):
        try:
            own = _entry_options(entry, [data.name for data in loaded])
            alone = {"classification_suite": None, **dict.fromkeys(SOURCES)}
            data = _labelled(entry["name"], replace(arguments, **{**alone, **own}), image_size)
        except (ValueError, OSError) as error:
            raise ValueError(f"Entry {i} of {path}: {error}") from error
        loaded.append(replace(data, metric=entry.get("metric", "top1")))
    return loaded


def read_suite(path: str) -> list[Any]:
    """The entries of a suite of datasets to classify, a YAML file."""
    with open(path, "rb") as file:
        entries = load_yaml(file, path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a list of datasets.")
    return entries


def _entry_options(entry: Any, taken: list[str]) -> dict[str, Any]:
    """The options of an entry of a suite, of the right types."""
    if not isinstance(entry, dict):
        raise ValueError("it is no mapping of options.")
    for name, value in entry.items():
        if name not in ENTRY:
            raise ValueError(f"unknown option {name!r}; it has {', '.join(ENTRY)}.")
        if not isinstance(value, ENTRY[name]):
            raise ValueError(f"{name} must be of type {ENTRY[name].__name__}, got {value!r}.")
        if isinstance(value, list) and (wrong := [item for item in value if not isinstance(item, str)]):
            raise ValueError(f"{name} must be a list of texts, but one is {wrong[0]!r}; quote it.")
    if "name" not in entry or entry["name"] in taken:
        raise ValueError("it needs a name that no other has.")
    if entry.get("metric", "top1") not in ("top1", "mean_per_class"):
        raise ValueError(f"metric is top1 or mean_per_class, got {entry['metric']!r}.")
    return {name: value for name, value in entry.items() if name not in ("name", "metric")}


def _labelled(name: str, arguments: EvaluationArguments, image_size: int) -> LabelledPictures:
    if arguments.dataset_name == "scenes":
        rows: Any = ScenesDataset("single", arguments.max_samples or 500, image_size)
        templates = arguments.templates or SCENE_TEMPLATES
        return LabelledPictures(name, PairDataset(rows), rows["label"], arguments.class_names or CLASSES, templates)
    rows, root, missing = _load_table(arguments, image_size)
    rows = checked_table(rows, arguments, ("image_column", "label_column"), arguments.max_samples)
    feature = rows.features[arguments.label_column]
    class_names = arguments.class_names or getattr(feature, "names", None)
    if not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        raise ValueError(
            f"Column {arguments.label_column!r} must hold the numbers of classes, from 0 on, but is {feature}; turn "
            "it into numbers with datasets' class_encode_column, or set --label_column."
        )
    if class_names is None:
        raise ValueError(
            f"Column {arguments.label_column!r} does not name its classes, being {feature}; give class_names, one for "
            "each label from 0 on."
        )
    dataset = PairDataset(rows, arguments.image_column, root=root)
    dataset.missing = missing
    return LabelledPictures(
        name,
        dataset,
        list(rows[arguments.label_column]),
        [class_name.replace("_", " ") for class_name in class_names],
        arguments.templates or DEFAULT_TEMPLATES,
    )


def _load_table(arguments: EvaluationArguments, image_size: int) -> tuple[Any, str, int]:
    """Rows, the folder of the images that they name by relative paths, and how many images are not there."""
    if arguments.dataset_name == "scenes":
        return ScenesDataset(arguments.split, arguments.max_samples or 500, image_size), "", 0
    if arguments.dataset_name is not None:
        return load_named(arguments.dataset_name, arguments.dataset_config_name, arguments.split), "", 0
    if arguments.data_file is not None:
        return read_file(arguments.data_file, arguments.split), os.path.dirname(arguments.data_file), 0
    assert arguments.annotations is not None
    rows, missing = annotated_table(arguments.annotations, arguments, (arguments.split,))
    return rows, "", 0 if arguments.max_samples else missing
