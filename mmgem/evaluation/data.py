"""The data that the options of an evaluation name."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import datasets

from ..data.annotations import read_annotations
from ..data.loading import checked_table, read_file
from ..data.pairs import PairDataset
from ..data.regions import RegionDataset
from ..data.scenes import CLASSES, ScenesDataset
from ..options import load_yaml
from .arguments import EvaluationArguments
from .classification import DEFAULT_TEMPLATES


SCENE_TEMPLATES = ("a small {}", "a large {}")


@dataclass
class LabelledPictures:
    """Pictures with the numbers of their classes."""

    name: str
    dataset: PairDataset
    labels: Sequence[int]
    class_names: Sequence[str]
    templates: Sequence[str]


def load_pairs(arguments: EvaluationArguments, image_size: int, long: bool = False) -> PairDataset:
    """
    Pictures with their captions, the long ones where there are such and they are asked for.

    Raises:
        ValueError: for a column that is not there, with those that are.
        FileNotFoundError: for a file that is not there.
    """
    rows, file = _load_table(arguments, arguments.split, image_size)
    column = arguments.caption_column
    if long and (isinstance(rows, ScenesDataset) or arguments.long_caption_column in rows.column_names):
        column = arguments.long_caption_column
    if isinstance(rows, datasets.Dataset):
        named = replace(arguments, caption_column=column)
        rows = checked_table(rows, named, ("image_column", "caption_column"), arguments.max_samples)
    dataset = PairDataset(rows, arguments.image_column, column, root=os.path.dirname(file))
    dataset.max_captions = arguments.captions_per_image
    return dataset


def load_regions(arguments: EvaluationArguments, image_size: int) -> RegionDataset:
    """Pictures with all their regions. Raises as [`load_pairs`]."""
    rows, file = _load_table(arguments, arguments.split, image_size)
    if isinstance(rows, datasets.Dataset):
        rows = checked_table(rows, arguments, ("image_column", "regions_column"), arguments.max_samples)
    columns = (arguments.image_column, arguments.caption_column, arguments.regions_column)
    return RegionDataset(rows, *columns, max_regions=0, root=os.path.dirname(file))


def load_labelled(arguments: EvaluationArguments, image_size: int) -> list[LabelledPictures]:
    """
    Pictures to classify: those of the dataset, or of each dataset of `classification_suite`.

    Raises:
        ValueError: as [`load_pairs`]; for an entry of the suite that is no dataset, by its place in the list.
    """
    if arguments.classification_suite is None:
        return [_labelled("", arguments, image_size)]
    path = arguments.classification_suite
    with open(path, encoding="utf-8") as file:
        entries = load_yaml(file, path)
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list of datasets.")
    known = {f.name for f in fields(EvaluationArguments)}
    nothing = {"dataset_name": None, "data_file": None, "annotations": None, "dataset_config_name": None}
    loaded = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or not entry.get("name") or (wrong := entry.keys() - known - {"name"}):
            what = (
                f"has the unknown option {min(wrong)!r}"
                if isinstance(entry, dict) and entry.get("name")
                else "has no name"
            )
            raise ValueError(
                f"Entry {i} of {path} {what}; it is a mapping of a name and options such as dataset_name."
            )
        options = {name: value for name, value in entry.items() if name != "name"}
        own = replace(arguments, classification_suite=None, **{**nothing, **options})
        loaded.append(_labelled(entry["name"], own, image_size))
    return loaded


def _labelled(name: str, arguments: EvaluationArguments, image_size: int) -> LabelledPictures:
    if arguments.dataset_name == "scenes":
        rows: Any = ScenesDataset("single", arguments.max_samples or 500, image_size)
        templates = arguments.templates or SCENE_TEMPLATES
        return LabelledPictures(name, PairDataset(rows), rows["label"], arguments.class_names or CLASSES, templates)
    rows, file = _load_table(arguments, arguments.split, image_size)
    rows = checked_table(rows, arguments, ("image_column", "label_column"), arguments.max_samples)
    feature = rows.features[arguments.label_column]
    class_names = arguments.class_names or getattr(feature, "names", None)
    if class_names is None:
        raise ValueError(
            f"Column {arguments.label_column!r} does not name its classes, being {feature}; give class_names, one for "
            "each label from 0 on."
        )
    labels = rows[arguments.label_column]
    return LabelledPictures(
        name,
        PairDataset(rows, arguments.image_column, root=os.path.dirname(file)),
        list(labels),
        [str(class_name).replace("_", " ") for class_name in class_names],
        arguments.templates or DEFAULT_TEMPLATES,
    )


def _load_table(arguments: EvaluationArguments, split: str, image_size: int) -> tuple[Any, str]:
    """Rows, and the file that they were read from."""
    if arguments.dataset_name == "scenes":
        return ScenesDataset(split, arguments.max_samples or 500, image_size), ""
    if arguments.dataset_name is not None:
        rows = datasets.load_dataset(arguments.dataset_name, arguments.dataset_config_name, split=split)
        return rows, ""
    if arguments.data_file is not None:
        return read_file(arguments.data_file, split), arguments.data_file
    assert arguments.annotations is not None
    rows = read_annotations(arguments.annotations, arguments.image_folders, (split,))
    names = {"image": arguments.image_column, "caption": arguments.caption_column, "regions": arguments.regions_column}
    return rows.rename_columns({old: new for old, new in names.items() if old != new}), ""
