"""The files in which COCO and Visual Genome describe their pictures."""

import json
import os
from collections.abc import Sequence
from typing import Any

import datasets
from transformers.utils import logging


logger = logging.get_logger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
REGION = {"box": datasets.List(datasets.Value("float64"), length=4), "phrase": datasets.Value("string")}
FEATURES = datasets.Features(
    {
        "image": datasets.Value("string"),
        "caption": datasets.List(datasets.Value("string")),
        "regions": datasets.List(REGION),
        "width": datasets.Value("int64"),
        "height": datasets.Value("int64"),
    }
)


def read_annotations(files: Sequence[str], image_folders: Sequence[str]) -> datasets.Dataset:
    """
    Joins, by the pictures' files, any of

    - COCO's `captions_*.json`: captions of whole pictures;
    - COCO's `instances_*.json`: boxes, described by the names of their categories; those of crowds are left out;
    - Visual Genome's `region_descriptions.json`: boxes with phrases.

    Args:
        files: such files, told apart by what they hold.
        image_folders: where the pictures lie: COCO's under the names that it gives, Visual Genome's under their ids
            (`VG_100K/107899.jpg`; under ids with leading zeros only where none is named otherwise).

    Returns:
        columns `image` (path), `caption` (list of texts), `regions` (list of `{"box": [x0, y0, x1, y1], "phrase"}`),
        `width` and `height` (pixels, null where the file does not say), a row for each picture that something is said
        about and that is there. How many are not there is logged.

    Raises:
        ValueError: for a file of another kind, for two pictures of one name, or where no picture is there.
        FileNotFoundError: for a file or folder that is not there.
    """
    paths = _pictures(image_folders)
    rows: dict[str, dict[str, Any]] = {}
    missing: list[str] = []
    for file in files:
        with open(file, encoding="utf-8") as stream:
            try:
                content = json.load(stream)
            except ValueError as error:
                raise ValueError(f"{file} is no JSON: {error}.") from error
        try:
            if isinstance(content, dict) and "annotations" in content:
                missing += _add_coco(content, paths, rows)
            elif isinstance(content, list) and content and "regions" in content[0]:
                missing += _add_visual_genome(content, paths, rows)
            else:
                raise ValueError(
                    f"{file} is none of COCO's captions_*.json and instances_*.json, nor Visual Genome's "
                    "region_descriptions.json."
                )
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{file} is not as COCO or Visual Genome write it: {error!r}.") from error
    folders = ", ".join(image_folders)
    found = [row for _, row in sorted(rows.items()) if row["caption"] or row["regions"]]
    if not found:
        raise ValueError(
            f"None of the pictures that {', '.join(files)} speak of is in {folders}; set --image_folders."
        )
    if missing:
        logger.warning(f"{len(missing)} pictures, such as {missing[0]}, are not in {folders}, and were left out.")
    return datasets.Dataset.from_list(found, features=FEATURES)


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


def _row(rows: dict[str, dict[str, Any]], path: str, size: dict[str, Any]) -> dict[str, Any]:
    row = rows.setdefault(path, {"image": path, "caption": [], "regions": [], "width": None, "height": None})
    row.update({name: value for name, value in size.items() if value is not None})
    return row


def _add_coco(content: dict[str, Any], paths: dict[str, str], rows: dict[str, dict[str, Any]]) -> list[str]:
    """The names of pictures that are not there are returned."""
    names = {category["id"]: category["name"] for category in content.get("categories", [])}
    pictures, missing = {}, []
    for image in content["images"]:
        name = os.path.basename(image["file_name"])
        if name in paths:
            size = {"width": image.get("width"), "height": image.get("height")}
            pictures[image["id"]] = _row(rows, paths[name], size)
        else:
            missing.append(name)
    for annotation in content["annotations"]:
        row = pictures.get(annotation["image_id"])
        if row is None:
            continue
        if "caption" in annotation:
            row["caption"].append(annotation["caption"])
        elif not annotation.get("iscrowd"):
            x, y, width, height = annotation["bbox"]
            box = [x, y, x + width, y + height]
            row["regions"].append({"box": box, "phrase": names[annotation["category_id"]]})
    return missing


def _add_visual_genome(
    content: list[dict[str, Any]], paths: dict[str, str], rows: dict[str, dict[str, Any]]
) -> list[str]:
    """The ids of pictures that are not there are returned."""
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
            x, y = region["x"], region["y"]
            box = [x, y, x + region["width"], y + region["height"]]
            row["regions"].append({"box": box, "phrase": region["phrase"]})
    return missing
