"""The files in which datasets of pictures describe them, joined into one table."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
from transformers.utils import logging

from ..processing.tokenization_mmgem import as_sentence
from .json_files import no_such_split, read_json
from .long_captions import read_long_captions


logger = logging.get_logger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
REGION = {"box": datasets.List(datasets.Value("float64"), length=4), "phrase": datasets.Value("string")}
FEATURES = datasets.Features(
    {
        "image": datasets.Value("string"),
        "caption": datasets.List(datasets.Value("string")),
        "long_caption": datasets.List(datasets.Value("string")),
        "regions": datasets.List(REGION),
        "width": datasets.Value("int64"),
        "height": datasets.Value("int64"),
        "image_id": datasets.Value("string"),
        "domain": datasets.Value("string"),
    }
)


def read_annotations(
    files: Sequence[str], image_folders: Sequence[str], splits: Sequence[str] | None = None
) -> tuple[datasets.Dataset, int]:
    """
    Joins, by the pictures' files, any of

    - COCO's `captions_*.json`: captions of whole pictures; NoCaps' file, which has their domains too;
    - Karpathy's `dataset_coco.json`, `dataset_flickr30k.json`, `dataset_flickr8k.json`: the pictures of `splits`;
    - COCO's `instances_*.json`: boxes, described by the names of their categories; those of crowds are left out;
    - Visual Genome's `region_descriptions.json`: boxes with phrases;
    - long captions (DCI, DOCCI, ShareGPT4V, Urban1k): see [`read_long_captions`]; in a column of their own.

    Args:
        files: such files and folders, told apart by what they hold.
        image_folders: where the pictures lie: COCO's under the names that it gives, Visual Genome's under their ids
            (`VG_100K/107899.jpg`; under ids with leading zeros only where none is named otherwise).
        splits: which of Karpathy's and DOCCI's splits to read; all by default.

    Returns:
        a table with the columns `image` (path), `caption` (list of texts), `long_caption` (the same; where there is
        any), `regions` (list of `{"box": [x0, y0, x1, y1], "phrase"}`), `width` and `height` (pixels), `image_id`
        (COCO's) and `domain` (NoCaps'), null where the file does not say; a row for each picture that something is
        said about and that is there, in the files' order. And how many are not there, which is logged.

    Raises:
        ValueError: for a file of another kind, for two pictures of one name or id, for a caption that is no text, for
            a file given twice, or where no picture is there; for a file that has none of `splits`.
        FileNotFoundError: for a file or folder that is not there.
    """
    if len({os.path.realpath(file) for file in files}) < len(files):
        raise ValueError(f"One of {', '.join(files)} is given twice.")
    paths = _pictures(image_folders)
    rows: dict[str, dict[str, Any]] = {}
    missing: dict[str, None] = {}  # by their names, in the files' order
    for file in files:
        try:
            missing.update(dict.fromkeys(_add(file, paths, rows, splits)))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{file} is not as its kind is published: {error!r}.") from error
    folders = ", ".join(image_folders)
    found = [row for row in rows.values() if row["caption"] or row["long_caption"] or row["regions"]]
    if not found:
        raise ValueError(
            f"None of the pictures that {', '.join(files)} speak of is in {folders}; set --image_folders."
        )
    if missing:
        logger.warning(
            f"{len(missing)} pictures, such as {next(iter(missing))}, are not in {folders}, and were left out."
        )
    table = datasets.Dataset.from_list(found, features=FEATURES)
    has_long = any(row["long_caption"] for row in found)
    return table if has_long else table.remove_columns("long_caption"), len(missing)


def _add(file: str, paths: dict[str, str], rows: dict[str, dict[str, Any]], splits: Sequence[str] | None) -> list[str]:
    """The names of pictures that are not there are returned."""
    if (long_captions := read_long_captions(file, splits)) is not None:
        return _add_long_captions(long_captions, paths, rows)
    if not os.path.isdir(file) and not file.endswith((".jsonl", ".jsonlines")):
        content = read_json(file)
        if isinstance(content, dict) and "annotations" in content:
            return _add_coco(file, content, paths, rows)
        if isinstance(content, dict) and "sentences" in next(iter(content.get("images", [])), {}):
            return _add_karpathy(file, content, paths, rows, splits)
        if isinstance(content, list) and content and "regions" in content[0]:
            return _add_visual_genome(file, content, paths, rows)
    raise ValueError(
        f"{file} is none of COCO's captions_*.json and instances_*.json, NoCaps', Karpathy's dataset_*.json, Visual "
        "Genome's region_descriptions.json, nor the long captions of DCI, DOCCI, ShareGPT4V or Urban1k."
    )


def _pictures(folders: Sequence[str]) -> dict[str, str]:
    """Paths by file name. What is not in these folders is never opened."""
    paths: dict[str, str] = {}
    for folder in folders:
        for entry in os.scandir(folder):
            if entry.is_file() and entry.name.lower().endswith(EXTENSIONS):
                if entry.name in paths:
                    raise ValueError(f"{paths[entry.name]} and {entry.path} have one name; give folders without such.")
                paths[entry.name] = entry.path
    return paths


def _row(rows: dict[str, dict[str, Any]], path: str, known: dict[str, Any]) -> dict[str, Any]:
    row = rows.setdefault(
        path, {**dict.fromkeys(FEATURES), "image": path, "caption": [], "long_caption": [], "regions": []}
    )
    row.update({name: value for name, value in known.items() if value is not None})
    return row


def _add_coco(file: str, content: dict[str, Any], paths: dict[str, str], rows: dict[str, dict[str, Any]]) -> list[str]:
    names = {category["id"]: category["name"] for category in content.get("categories", [])}
    pictures, missing = {}, []
    _refuse_twice(file, "id", [image["id"] for image in content["images"]])
    _refuse_twice(file, "name", [os.path.basename(image["file_name"]) for image in content["images"]])
    for image in content["images"]:
        name = os.path.basename(image["file_name"])
        if name in paths:
            known = {key: image.get(key) for key in ("width", "height", "domain")}
            pictures[image["id"]] = _row(rows, paths[name], {**known, "image_id": str(image["id"])})
        else:
            missing.append(name)
    for annotation in content["annotations"]:
        row = pictures.get(annotation["image_id"])
        if row is None:
            continue
        if "caption" in annotation:
            row["caption"].append(_text(annotation["caption"], file, annotation["image_id"]))
        elif not annotation.get("iscrowd"):
            phrase = _text(names[annotation["category_id"]], file, annotation["image_id"])
            row["regions"].append({"box": _box(annotation["bbox"], file, annotation["image_id"]), "phrase": phrase})
    return missing


def _add_karpathy(
    file: str,
    content: dict[str, Any],
    paths: dict[str, str],
    rows: dict[str, dict[str, Any]],
    splits: Sequence[str] | None,
) -> list[str]:
    images = [image for image in content["images"] if splits is None or image["split"] in splits]
    if not images:
        raise no_such_split(file, splits, {image["split"] for image in content["images"]})
    _refuse_twice(file, "name", [image["filename"] for image in images])
    missing = []
    for image in images:
        if image["filename"] not in paths:
            missing.append(image["filename"])
            continue
        known = {"image_id": str(image.get("cocoid", image["filename"]))}
        row = _row(rows, paths[image["filename"]], known)
        row["caption"] += [_text(sentence["raw"], file, image["filename"]) for sentence in image["sentences"]]
    return missing


def _refuse_twice(file: str, kind: str, values: list[Any]) -> None:
    for value, count in Counter(values).most_common(1):
        if count > 1:
            raise ValueError(f"{file} has several pictures of the {kind} {value}.")


def _text(value: Any, file: str, image: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{file} has {value!r} as a text about picture {image}, but a text must be a string.")
    try:
        return as_sentence(value)
    except ValueError as error:
        raise ValueError(f"{file} has no text about picture {image}: {error}") from error


def _box(corner_and_size: Any, file: str, image: Any) -> list[float]:
    """`[x0, y0, x1, y1]` of `[x, y, width, height]`."""
    numbers = corner_and_size if isinstance(corner_and_size, list) else []
    if len(numbers) != 4 or not all(isinstance(number, int | float) for number in numbers):
        raise ValueError(
            f"{file} has {corner_and_size!r} as a box of picture {image}, which is not [x, y, width, height]."
        )
    x, y, width, height = map(float, numbers)
    return [x, y, x + width, y + height]


def _add_long_captions(
    captions: dict[str, list[str]], paths: dict[str, str], rows: dict[str, dict[str, Any]]
) -> list[str]:
    by_stem = {os.path.splitext(name)[0]: path for name, path in paths.items()}
    missing = []
    for name, texts in captions.items():
        path = paths.get(name) or by_stem.get(name)
        if path is None:
            missing.append(name)
        else:
            _row(rows, path, {})["long_caption"] += texts
    return missing


def _add_visual_genome(
    file: str, content: list[dict[str, Any]], paths: dict[str, str], rows: dict[str, dict[str, Any]]
) -> list[str]:
    _refuse_twice(file, "id", [image["id"] for image in content])
    by_stem = {os.path.splitext(name)[0]: path for name, path in paths.items()}
    if not any(str(image["id"]) in by_stem for image in content):
        # Never both: 9.jpg may be missing, and 000000000009.jpg is COCO's.
        by_stem = {stem.lstrip("0"): path for stem, path in by_stem.items() if stem.isdigit()}
    missing = []
    for image in content:
        if str(image["id"]) not in by_stem:
            missing.append(str(image["id"]))
            continue
        row = _row(rows, by_stem[str(image["id"])], {})
        for region in image["regions"]:
            box = _box([region[side] for side in ("x", "y", "width", "height")], file, image["id"])
            row["regions"].append({"box": box, "phrase": _text(region["phrase"], file, image["id"])})
    return missing
