"""The files in which COCO and Visual Genome describe their pictures."""

import json
import os
from collections.abc import Sequence
from typing import Any


class AnnotationTable:
    """Rows `{"image": path, "captions", "regions", "width", "height"}`, one per picture, by integer index."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows
        self.split = None

    def first(self, number: int | None) -> "AnnotationTable":
        """The first `number` rows; all without one."""
        return AnnotationTable(self.rows[:number])

    def with_captions(self) -> "AnnotationTable":
        """
        The pictures that have a caption of the whole.

        Raises:
            ValueError: where there is none.
        """
        rows = [row for row in self.rows if row["captions"]]
        if not rows:
            raise ValueError("These annotations hold no captions of whole pictures; add COCO's captions_*.json.")
        return AnnotationTable(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str) -> Any:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


def read_annotations(files: Sequence[str], image_folders: Sequence[str]) -> AnnotationTable:
    """
    Joins, by the pictures' ids, any of

    - COCO's `captions_*.json`: captions of whole pictures;
    - COCO's `instances_*.json`: boxes, described by the names of their categories; those of crowds are left out;
    - Visual Genome's `region_descriptions.json`: boxes with phrases.

    Args:
        files: such files, told apart by what they hold.
        image_folders: where the pictures lie, under the names that COCO gives, or under their ids
            (Visual Genome's `VG_100K` and `VG_100K_2`).

    Returns:
        a row for each picture that something is said about and that is there, in the order of their ids.

    Raises:
        ValueError: for a file of another kind, or where none of the pictures is there.
        FileNotFoundError: for a file or folder that is not there.
    """
    paths = _pictures(image_folders)
    rows: dict[int, dict[str, Any]] = {}
    for file in files:
        with open(file, encoding="utf-8") as stream:
            try:
                content = json.load(stream)
            except ValueError as error:
                raise ValueError(f"{file} is no JSON: {error}.") from error
        try:
            if isinstance(content, dict) and "annotations" in content:
                _add_coco(content, rows)
            elif isinstance(content, list) and content and "regions" in content[0]:
                _add_visual_genome(content, rows)
            else:
                raise ValueError(
                    f"{file} is none of COCO's captions_*.json and instances_*.json, nor Visual Genome's "
                    "region_descriptions.json."
                )
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{file} is not as COCO or Visual Genome write it: {error!r}.") from error
    found = []
    for image_id, row in sorted(rows.items()):
        path = paths.get(row.pop("file_name", None)) or paths.get(image_id)
        if path is not None and (row["captions"] or row["regions"]):
            found.append({"image": path, **row})
    if not found:
        raise ValueError(
            f"None of the {len(rows)} pictures that {', '.join(files)} speak of is in {', '.join(image_folders)}; set "
            "--image_folders."
        )
    return AnnotationTable(found)


def _pictures(folders: Sequence[str]) -> dict[Any, str]:
    """Paths by file name, and by the number that the name ends in. What is not in these folders is never opened."""
    paths: dict[Any, str] = {}
    for folder in folders:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_file():
                digits = os.path.splitext(entry.name)[0].rpartition("_")[2]
                paths[entry.name] = entry.path
                if digits.isdigit():
                    paths[int(digits)] = entry.path
    return paths


def _row(rows: dict[int, dict[str, Any]], image_id: int) -> dict[str, Any]:
    return rows.setdefault(image_id, {"captions": [], "regions": [], "width": None, "height": None})


def _add_coco(content: dict[str, Any], rows: dict[int, dict[str, Any]]) -> None:
    names = {category["id"]: category["name"] for category in content.get("categories", [])}
    for image in content["images"]:
        size = {"width": image.get("width"), "height": image.get("height")}
        _row(rows, image["id"]).update(file_name=os.path.basename(image["file_name"]), **size)
    for annotation in content["annotations"]:
        row = _row(rows, annotation["image_id"])
        if "caption" in annotation:
            row["captions"].append(annotation["caption"])
        elif not annotation.get("iscrowd"):
            x, y, width, height = annotation["bbox"]
            box = [x, y, x + width, y + height]
            row["regions"].append({"box": box, "phrase": names[annotation["category_id"]]})


def _add_visual_genome(content: list[dict[str, Any]], rows: dict[int, dict[str, Any]]) -> None:
    for image in content:
        row = _row(rows, image["id"])
        for region in image["regions"]:
            x, y = region["x"], region["y"]
            box = [x, y, x + region["width"], y + region["height"]]
            row["regions"].append({"box": box, "phrase": region["phrase"]})
