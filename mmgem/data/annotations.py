"""The files in which image datasets publish captions and regions, joined into one table by image."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
from transformers.utils import logging

from ..processing.tokenization_mmgem import as_sentence
from .json_files import read_json, read_json_lines


logger = logging.get_logger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
TEXTS = datasets.List(datasets.Value("string"))
REGION = {"box": datasets.List(datasets.Value("float64"), length=4), "phrase": datasets.Value("string")}
FEATURES = datasets.Features(
    {
        "image": datasets.Value("string"),
        "caption": TEXTS,
        "long_caption": TEXTS,
        "regions": datasets.List(REGION),
        "width": datasets.Value("int64"),
        "height": datasets.Value("int64"),
        "image_id": datasets.Value("string"),
        "domain": datasets.Value("string"),
    }
)


@dataclass
class Record:
    """
    What one file says about one image, unchecked.

    Args:
        name: the name of the image's file, with or without its extension.
        known: values of the columns `width`, `height`, `image_id` and `domain`.
        regions: pairs of `[x, y, width, height]` and phrase.
    """

    name: str
    known: dict[str, Any] = field(default_factory=dict)
    captions: list[Any] = field(default_factory=list)
    long_captions: list[Any] = field(default_factory=list)
    regions: list[tuple[Any, Any]] = field(default_factory=list)


def read_annotations(
    files: Sequence[str], image_folders: Sequence[str], splits: Sequence[str] | None = None
) -> tuple[datasets.Dataset, int]:
    """
    Joins the files and folders that [`read_records`] reads, by the names of the image files.

    Args:
        image_folders: where the images are: COCO's under the names that it gives, Visual Genome's under their ids
            (`VG_100K/107899.jpg`; under ids with leading zeros only where none is named otherwise).

    Returns:
        a table with the columns `image` (path), `caption` (list of texts), `long_caption` (the same; where there is
        any), `regions` (list of `{"box": [x0, y0, x1, y1], "phrase"}`), `width` and `height` (pixels), `image_id`
        (COCO's) and `domain` (NoCaps'), null where the file does not say; a row for each image that exists and has
        text, in the files' order. And the number of images that do not exist, which is logged.

    Raises:
        ValueError: as [`read_records`]; for invalid captions and boxes, for a file given twice, for two images of one
            name, or where no image exists.
        FileNotFoundError: for a missing file or folder.
    """
    if len({os.path.realpath(file) for file in files}) < len(files):
        raise ValueError(f"One of {', '.join(files)} is given twice.")
    paths = paths_by_name(image_folders)
    stems = {os.path.splitext(name)[0]: path for name, path in paths.items()}
    numbers = {stem.lstrip("0"): path for stem, path in stems.items() if stem.isdigit()}
    rows: dict[str, dict[str, Any]] = {}
    missing: dict[str, None] = {}
    for file in files:
        records = read_records(file, splits)
        _refuse_duplicates("name", [record.name for record in records], file)
        by_name = {**stems, **paths}
        if not any(record.name in by_name for record in records):
            by_name = numbers  # never both: 9.jpg may be missing, and 000000000009.jpg is COCO's
        for record in records:
            if record.name in by_name:
                _add(record, by_name[record.name], rows, file)
            else:
                missing[record.name] = None
    folders = ", ".join(image_folders)
    found = [row for row in rows.values() if row["caption"] or row["long_caption"] or row["regions"]]
    if not found:
        raise ValueError(f"None of the images that {', '.join(files)} describe is in {folders}; set --image_folders.")
    if missing:
        logger.warning(f"{len(missing)} images, such as {next(iter(missing))}, are not in {folders} and are left out.")
    table = datasets.Dataset.from_list(found, features=FEATURES)
    has_long = any(row["long_caption"] for row in found)
    return table if has_long else table.remove_columns("long_caption"), len(missing)


def read_categories(files: Sequence[str]) -> list[str]:
    """The names of all categories of COCO's and LVIS' instances among these files; empty without such a file."""
    names: dict[str, None] = {}
    for file in files:
        content = read_json(file) if file.endswith(".json") else None
        if isinstance(content, dict) and not any("caption" in image for image in content.get("images", [])[:1]):
            names.update(dict.fromkeys(str(category["name"]) for category in content.get("categories", [])))
    return list(names)


def checked_text(value: Any, file: str, image: Any) -> str:
    """A text about an image, as a sentence. Raises ValueError with the names of both for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"{file} has {value!r} as a text about image {image}, but a text must be a string.")
    try:
        return as_sentence(value)
    except ValueError as error:
        raise ValueError(f"{file} has no text about image {image}: {error}") from error


def paths_by_name(folders: Sequence[str]) -> dict[str, str]:
    """The images of folders; files outside of them are never opened."""
    paths: dict[str, str] = {}
    for folder in folders:
        for entry in os.scandir(folder):
            if entry.is_file() and entry.name.lower().endswith(EXTENSIONS):
                if entry.name in paths:
                    raise ValueError(f"{paths[entry.name]} and {entry.path} have the same name. Leave out one folder.")
                paths[entry.name] = entry.path
    return paths


def _add(record: Record, path: str, rows: dict[str, dict[str, Any]], file: str) -> None:
    empty: dict[str, Any] = {**dict.fromkeys(FEATURES), "image": path}
    row = rows.setdefault(path, {**empty, "caption": [], "long_caption": [], "regions": []})
    row.update({name: value for name, value in record.known.items() if value is not None})
    image = record.known.get("image_id", record.name)
    row["caption"] += [checked_text(caption, file, image) for caption in record.captions]
    row["long_caption"] += [checked_text(caption, file, image) for caption in record.long_captions]
    for box, phrase in record.regions:
        numbers = box if isinstance(box, list) else []
        if len(numbers) != 4 or not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"{file} has {box!r} as a box of image {image}, but a box must be [x, y, width, height].")
        x, y, width, height = map(float, numbers)
        corners = [x, y, x + width, y + height]
        row["regions"].append({"box": corners, "phrase": checked_text(phrase, file, image)})


def read_records(path: str, splits: Sequence[str] | None = None) -> list[Record]:
    """
    Reads a file or folder, recognised by its content, of

    - COCO's `captions_*.json`: captions of whole images; NoCaps' file, which has their domains too;
    - Karpathy's `dataset_coco.json`, `dataset_flickr30k.json`, `dataset_flickr8k.json`: the images of `splits`;
    - COCO's `instances_*.json` and LVIS' file: boxes, described by the names of their categories; those of crowds are
      left out;
    - RefCOCO, RefCOCO+ and RefCOCOg as MDETR published them (`finetune_refcoco_val.json`, Kamath et al., 2021): boxes
      with referring expressions;
    - Visual Genome's `region_descriptions.json`: boxes with phrases;
    - DCI (Urbanek et al., 2023): the folder of annotations, a JSON file for each image (`short_caption` and
      `extra_caption`, which together are the long caption);
    - DOCCI (Onoe et al., 2024): `docci_descriptions.jsonlines`, the long captions of `splits`;
    - ShareGPT4V (Chen et al., 2023): the list of conversations, of which the first answer is the long caption;
    - Urban1k (Zhang et al., 2024): the folder of long captions, a text file for each image.

    Args:
        splits: of Karpathy's and DOCCI's files; all by default.

    Raises:
        ValueError: for a file of another kind, invalid JSON or text, several images of one id, or a file without
            any of `splits`.
    """
    try:
        records = _read_folder(path) if os.path.isdir(path) else _read_file(path, splits)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is not as its kind is published: {error!r}.") from error
    if records is None:
        raise ValueError(
            f"{path} is none of COCO's captions_*.json and instances_*.json, LVIS', NoCaps', Karpathy's "
            "dataset_*.json, RefCOCO's finetune_*.json, Visual Genome's region_descriptions.json, nor the long "
            "captions of DCI, DOCCI, ShareGPT4V or Urban1k."
        )
    _refuse_duplicates("id", [record.known["image_id"] for record in records if "image_id" in record.known], path)
    return records


def _refuse_duplicates(kind: str, values: list[str], path: str) -> None:
    for value, count in Counter(values).most_common(1):
        if count > 1:
            raise ValueError(f"{path} has several images of the {kind} {value}.")


def _read_file(path: str, splits: Sequence[str] | None) -> list[Record] | None:
    if path.endswith((".jsonl", ".jsonlines")):
        rows = read_json_lines(path)
        if not rows or "image_file" not in rows[0]:
            return None
        chosen = _of_splits(path, rows, splits)
        return _long_records((row["image_file"], row["description"]) for row in chosen)
    content = read_json(path)
    if isinstance(content, dict) and "annotations" in content:
        is_referring = any("caption" in image for image in content["images"][:1])
        return _referring_records(content) if is_referring else _coco_records(content)
    if isinstance(content, dict) and "sentences" in next(iter(content.get("images", [])), {}):
        return [_karpathy_record(image) for image in _of_splits(path, content["images"], splits)]
    if isinstance(content, list) and content and "regions" in content[0]:
        return [_visual_genome_record(image) for image in content]
    if isinstance(content, list) and any("conversations" in row for row in content):
        return _long_records((row["image"], _answer(row)) for row in content if "image" in row)
    return None


def _read_folder(path: str) -> list[Record] | None:
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
    texts, files = ([os.path.join(path, name) for name in names if name.endswith(end)] for end in (".txt", ".json"))
    if texts:
        return [_urban_record(file) for file in texts]
    dci = map(read_json, files)
    records = _long_records(
        (row["image"], f"{row.get('short_caption') or ''} {row.get('extra_caption') or ''}") for row in dci
    )
    return records or None


def _coco_records(content: dict[str, Any]) -> list[Record]:
    categories = {category["id"]: category["name"] for category in content.get("categories", [])}
    records = []
    for image in content["images"]:
        image_id = str(image["id"])
        known = {name: image.get(name) for name in ("width", "height", "domain")}
        name = os.path.basename(image.get("file_name", image_id))  # references need no images
        records.append(Record(name, {**known, "image_id": image_id}))
    by_id = {record.known["image_id"]: record for record in records}
    for annotation in content["annotations"]:
        record = by_id.get(str(annotation["image_id"]))
        if record is not None and "caption" in annotation:
            record.captions.append(annotation["caption"])
        elif record is not None and not annotation.get("iscrowd"):
            record.regions.append((annotation["bbox"], categories[annotation["category_id"]]))
    return records


def _referring_records(content: dict[str, Any]) -> list[Record]:
    """An image is listed once for each of its expressions, each of which has one box."""
    boxes = {annotation["image_id"]: annotation["bbox"] for annotation in content["annotations"]}
    records: dict[str, Record] = {}
    for image in content["images"]:
        name = os.path.basename(image["file_name"])
        known = {side: image.get(side) for side in ("width", "height")}
        records.setdefault(name, Record(name, known)).regions.append((boxes[image["id"]], image["caption"]))
    return list(records.values())


def _karpathy_record(image: dict[str, Any]) -> Record:
    known = {"image_id": str(image.get("cocoid", image["filename"]))}
    return Record(image["filename"], known, captions=[sentence["raw"] for sentence in image["sentences"]])


def _visual_genome_record(image: dict[str, Any]) -> Record:
    sides = ("x", "y", "width", "height")
    regions = [([region[side] for side in sides], region["phrase"]) for region in image["regions"]]
    return Record(str(image["id"]), regions=regions)


def _urban_record(path: str) -> Record:
    with open(path, encoding="utf-8-sig") as file:
        try:
            return Record(os.path.splitext(os.path.basename(path))[0], long_captions=[file.read()])
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text: {error}.") from error


def _answer(row: dict[str, Any]) -> str:
    answers = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
    if not answers:
        raise KeyError(f"an answer about {row['image']}")
    return answers[0]


def _long_records(pairs: Iterable[tuple[str, Any]]) -> list[Record]:
    """Records of the images' paths and long captions, of which an image may have several."""
    records: dict[str, Record] = {}
    paths: dict[str, str] = {}
    for path, caption in pairs:
        name = os.path.basename(path)
        if paths.setdefault(name, path) != path:
            raise ValueError(f"{paths[name]} and {path} have the same name, so their captions cannot be told apart.")
        records.setdefault(name, Record(name)).long_captions.append(caption)
    return list(records.values())


def _of_splits(path: str, rows: list[dict[str, Any]], splits: Sequence[str] | None) -> list[dict[str, Any]]:
    chosen = [row for row in rows if splits is None or row["split"] in splits]
    if splits is not None and not chosen:
        existing = ", ".join(sorted({row["split"] for row in rows}))
        raise ValueError(f"{path} has no split {' or '.join(splits)}; it has {existing}.")
    return chosen
