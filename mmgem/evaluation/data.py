"""The data that the options of an evaluation name."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data.choices import ChoiceDataset, read_choices
from ..data.composed_scenes import ComposedScenesDataset
from ..data.loading import BUILT_IN, Table, checked_table, read_annotated_table, read_table, triplets_of_table
from ..data.pairs import PairDataset
from ..data.regions import RegionDataset
from ..data.swapped_scenes import swapped_scenes
from ..data.table_files import load_named
from ..data.triplets import TripletDataset
from ..options import load_yaml
from .arguments import LONG_CAPTION_COLUMN, EvaluationArguments
from .classification import DEFAULT_TEMPLATES


SOURCES = ("dataset_name", "dataset_config_name", "data_file", "annotations")
# The options of a dataset in a suite, with their types.
SUITE_OPTIONS = {
    **dict.fromkeys(("name", "metric", "dataset_name", "dataset_config_name", "data_file", "split"), str),
    **dict.fromkeys(("image_column", "label_column"), str),
    **dict.fromkeys(("class_names", "templates"), list),
    "max_samples": int,
}


@dataclass
class LabelledImages:
    """Images with the numbers of their classes."""

    name: str
    dataset: PairDataset
    labels: Sequence[int]
    class_names: Sequence[str]
    templates: Sequence[str]
    metric: str


def load_pairs(
    arguments: EvaluationArguments, image_size: int, long: bool = False, max_captions: int | None = None
) -> PairDataset:
    """
    Images with their captions, of each the first `max_captions`; with `long` its long captions, if it has any.

    Raises:
        ValueError: for a missing column, with those that exist.
        FileNotFoundError: for a missing file.
    """
    table = _load_table(arguments, image_size)
    option, is_default = "caption_column", arguments.long_caption_column == LONG_CAPTION_COLUMN
    if long and (not is_default or LONG_CAPTION_COLUMN in table.rows.column_names):
        option = "long_caption_column"
    column = getattr(arguments, option)
    named = replace(arguments, caption_column=column)
    table = checked_table(table, named, ("image_column", option), arguments.max_samples)
    dataset = PairDataset(table.rows, arguments.image_column, column, root=table.root)
    dataset.max_captions, dataset.missing = max_captions, table.missing
    return dataset


def load_regions(arguments: EvaluationArguments, image_size: int) -> RegionDataset:
    """Images with all their regions. Raises as [`load_pairs`]."""
    needed = ("image_column", "regions_column")
    table = checked_table(_load_table(arguments, image_size), arguments, needed, arguments.max_samples)
    columns = {name: getattr(arguments, name) for name in (*needed, "caption_column")}
    dataset = RegionDataset(table.rows, **columns, root=table.root)
    dataset.max_captions, dataset.missing = arguments.captions_per_image, table.missing
    return dataset


def load_fused(arguments: EvaluationArguments, image_size: int) -> TripletDataset:
    """
    Queries with their targets and near misses, of a table with the columns of triplets, or composed scenes.

    Raises:
        ValueError: for annotations, which hold none; as [`load_pairs`].
    """
    if arguments.annotations is not None:
        raise ValueError("Annotations hold no queries of an image with a text. Give data_file or dataset_name.")
    if arguments.dataset_name == "scenes":
        table = Table(ComposedScenesDataset(arguments.split, arguments.max_samples or 500, image_size))
    else:
        table = _load_table(arguments, image_size)
    return triplets_of_table(table, arguments, arguments.max_samples)


def load_choices(arguments: EvaluationArguments, image_size: int, questions: bool = False) -> ChoiceDataset:
    """
    Images with texts to choose from: of the files that [`read_choices`] reads, or swapped scenes; or POPE's questions.

    Raises:
        ValueError, FileNotFoundError: as [`read_choices`]; for other datasets.
    """
    if arguments.dataset_name == "scenes" and not questions:
        return swapped_scenes(arguments.split, arguments.max_samples or 500, image_size)
    files = arguments.annotations or [file for file in [arguments.data_file] if file is not None]
    if not files:
        raise ValueError("Choices and questions come from published files: set annotations, or data_file.")
    return read_choices(files, arguments.image_folders, arguments.max_samples, questions)


def load_labelled(arguments: EvaluationArguments, image_size: int) -> list[LabelledImages]:
    """
    Images to classify: those of the dataset, or of each dataset of `classification_suite`.

    Raises:
        ValueError: as [`load_pairs`], with the place of the entry in the suite.
    """
    path = arguments.classification_suite
    if path is None:
        return [_labelled(arguments, image_size)]
    loaded: list[LabelledImages] = []
    for i, entry in enumerate(read_suite(path)):
        try:
            _check_entry(entry, [data.name for data in loaded])
            options = {**dict.fromkeys(("classification_suite", *SOURCES)), **entry}
            named = {name: options.pop(name) for name in ("name", "metric") if name in options}
            loaded.append(_labelled(replace(arguments, **options), image_size, **named))
        except (ValueError, OSError) as error:
            raise ValueError(f"Entry {i} of {path}: {error}") from error
    return loaded


def read_suite(path: str) -> list[Any]:
    """The entries of a suite of datasets to classify, a YAML file."""
    with open(path, "rb") as file:
        entries = load_yaml(file, path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a list of datasets.")
    return entries


def _check_entry(entry: Any, taken: list[str]) -> None:
    if not isinstance(entry, dict):
        raise ValueError("it is no mapping of options.")
    for name, value in entry.items():
        if name not in SUITE_OPTIONS:
            raise ValueError(f"unknown option {name!r}; it has {', '.join(SUITE_OPTIONS)}.")
        if not isinstance(value, SUITE_OPTIONS[name]):
            raise ValueError(f"{name} must be of type {SUITE_OPTIONS[name].__name__}, got {value!r}.")
        if isinstance(value, list) and (wrong := [item for item in value if not isinstance(item, str)]):
            raise ValueError(f"{name} must be a list of texts, but one is {wrong[0]!r}; quote it.")
    if "name" not in entry or entry["name"] in taken:
        raise ValueError("it needs a name that no other has.")
    if entry.get("metric", "top1") not in ("top1", "mean_per_class"):
        raise ValueError(f"metric is top1 or mean_per_class, got {entry['metric']!r}.")


def _labelled(arguments: EvaluationArguments, image_size: int, name: str = "", metric: str = "top1") -> LabelledImages:
    if arguments.dataset_name in BUILT_IN:
        arguments = replace(arguments, split=BUILT_IN[arguments.dataset_name].labelled_split)
    needed = ("image_column", "label_column")
    table = checked_table(_load_table(arguments, image_size), arguments, needed, arguments.max_samples)
    rows, feature = table.rows, table.rows.features[arguments.label_column]
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
    dataset = PairDataset(rows, arguments.image_column, root=table.root)
    dataset.missing = table.missing
    class_names = [class_name.replace("_", " ") for class_name in class_names]
    own_templates: Any = getattr(rows, "class_templates", DEFAULT_TEMPLATES)
    templates = arguments.templates or own_templates
    return LabelledImages(name, dataset, list(rows[arguments.label_column]), class_names, templates, metric)


def _load_table(arguments: EvaluationArguments, image_size: int) -> Table:
    if arguments.dataset_name in BUILT_IN:
        return Table(BUILT_IN[arguments.dataset_name](arguments.split, arguments.max_samples or 500, image_size))
    if arguments.dataset_name is not None:
        return Table(load_named(arguments.dataset_name, arguments.dataset_config_name, arguments.split))
    if arguments.data_file is not None:
        return read_table(arguments.data_file, arguments.split)
    assert arguments.annotations is not None
    table = read_annotated_table(arguments.annotations, arguments, (arguments.split,))
    # Of the first `max_samples` images nobody can say how many more would be there.
    return replace(table, missing=0) if arguments.max_samples else table
