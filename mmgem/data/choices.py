"""Images with texts of which one is right, from the files that benchmarks publish."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from transformers.utils import logging

from .annotations import checked_text, paths_by_name
from .json_files import read_json, read_json_lines
from .pairs import BadDataError, PairDataset
from .table_files import read_file


logger = logging.get_logger(__name__)

QUESTION = re.compile(r"is there (?:an? |any )?(.+?) in the (?:image|imange|picture|photo)", re.IGNORECASE)
Made = tuple[list[dict[str, Any]], list[Any], str]  # images, texts, kind
Maker = Callable[[dict[str, Any], str], Made]


@dataclass
class Choice:
    """
    One image and texts of which the first is right; or as many texts as images, of which text i is right for image i.

    Args:
        images: indices into the images of a [`ChoiceDataset`].
        kind: what the choice tests, such as "swap_obj".
    """

    images: list[int]
    texts: list[str]
    kind: str = ""


class ChoiceDataset(PairDataset):
    """
    The images of choices, each a path or PIL image under "image", and, if a part of it is meant, "box": `[x0, y0, x1,
    y1]` in pixels.

    Args:
        images: rows of a table.
        choices: of these images.
        missing: number of choices that are left out, because an image of theirs does not exist.
    """

    def __init__(self, images: Sequence[dict[str, Any]], choices: list[Choice], missing: int = 0):
        super().__init__(_Rows(images))
        self.choices = choices
        self.missing = missing

    def image(self, index: int) -> Image.Image:
        image, box = super().image(index), self.table[self.rows[index]].get("box")
        if box is None:
            return image
        x0, y0, x1, y1 = (round(corner) for corner in box)
        part = (max(x0, 0), max(y0, 0), min(x1, image.width), min(y1, image.height))
        if part[2] <= part[0] or part[3] <= part[1]:
            raise BadDataError(f"its box {box} has no area in an image of {image.width} x {image.height} pixels")
        return image.crop(part)


class _Rows(list):
    """A list of mappings that also gives a whole column, as tables do."""

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def read_choices(
    files: Sequence[str], image_folders: Sequence[str], limit: int | None = None, questions: bool = False
) -> ChoiceDataset:
    """
    The choices in files, recognised by their content, of

    - SugarCrepe (Hsieh et al., 2023): `swap_obj.json` and its kin; an image, its caption, and a negative one;
    - ARO (Yuksekgonul et al., 2023): `visual_genome_relation.json`, `visual_genome_attribution.json`; a part of an
      image, a true and a false caption;
    - Winoground (Thrush et al., 2022): `examples.jsonl`; two images and two captions;
    - BiVLC (Miranda et al., 2024) and tables like it: parquet or jsonl with `image`, `caption`, `negative_caption`
      and, for choices of images too, `negative_image`;
    - tables of multiple choices: `image`, `choices` (a list of texts) and `label`, the number of the right one;

    or with `questions` those of POPE (Li et al., 2023), `coco_pope_random.json` and its kin: an object alone is then
    the text of a choice, and its kind the answer, "yes" or "no".

    Args:
        image_folders: where the images are that the files name. A choice of which one is missing is left out; a
            warning says how many.
        limit: number of choices of each file, the first ones.

    Raises:
        ValueError: for a file of another kind, given twice, or without any image that exists; for texts that are none.
        FileNotFoundError: for a missing file or folder.
    """
    if len({os.path.realpath(file) for file in files}) < len(files):
        raise ValueError(f"One of {', '.join(files)} is given twice.")
    paths = paths_by_name(image_folders)
    stems = {os.path.splitext(name)[0]: path for name, path in paths.items()}
    images: list[dict[str, Any]] = []
    places: dict[Any, int] = {}  # of images that several choices are about
    choices: list[Choice] = []
    missing: list[str] = []
    for file in files:
        for number, row, make in _examples(file, questions, limit):
            try:
                pictures, texts, kind = make(row, os.path.splitext(os.path.basename(file))[0])
                found = [_located(picture, paths, stems) for picture in pictures]
                sentences = [checked_text(text, file, f"of example {number}") for text in texts]
                if empty := [i for i, text in enumerate(sentences) if not text]:
                    raise ValueError(f"text {empty[0]} is empty")
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise ValueError(f"Example {number} of {file} is not as its kind is published: {error}.") from error
            if absent := [picture["image"] for picture, path in zip(pictures, found) if path is None]:
                missing += absent[:1]
                continue
            own = []
            for picture in found:
                assert picture is not None
                image, box = picture["image"], picture.get("box")
                key = (image, *(box or ())) if isinstance(image, str) else len(images)
                if key not in places:
                    places[key] = len(images)
                    images.append(picture)
                own.append(places[key])
            choices.append(Choice(own, sentences, kind))
    folders = ", ".join(image_folders) or "any folder"
    if not choices:
        raise ValueError(f"None of the images of {', '.join(files)} is in {folders}; set --image_folders.")
    if missing:
        logger.warning(f"{len(missing)} choices are left out: images such as {missing[0]} are not in {folders}.")
    return ChoiceDataset(images, choices, len(missing))


def _examples(file: str, questions: bool, limit: int | None) -> Iterator[tuple[int, dict[str, Any], Maker]]:
    """Number and row of each example of a file, and what reads it."""
    rows = _read_rows(file, limit)
    kinds = _QUESTIONS if questions else _KINDS
    make = next((make for columns, make in kinds if columns <= {*rows[0]}), None) if rows else None
    if make is None:
        known = "POPE's" if questions else "SugarCrepe's, ARO's, Winoground's or BiVLC's, nor of multiple choices"
        raise ValueError(f"{file} is none of {known}.")
    for number, row in enumerate(rows):
        yield number, row, make


def _read_rows(file: str, limit: int | None) -> list[dict[str, Any]]:
    if file.endswith((".jsonl", ".jsonlines")) or _has_lines(file):
        rows = read_json_lines(file)[:limit]
    elif file.endswith(".json"):
        content = read_json(file)
        rows = list(content.values()) if isinstance(content, dict) else content
    else:
        table = read_file(file, "test")
        for column, feature in table.features.items():
            if hasattr(feature, "decode"):  # images stay encoded
                table = table.cast_column(column, type(feature)(decode=False))
        rows = table.select(range(min(limit or len(table), len(table)))).to_list()
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file} holds no list of examples.")
    return rows[:limit]


def _has_lines(file: str) -> bool:
    """Whether a file named .json holds a question in each line, as POPE's do."""
    if not file.endswith(".json"):
        return False
    with open(file, encoding="utf-8-sig") as lines:
        first, second = lines.readline().strip(), lines.readline().strip()
    return first.startswith("{") and first.endswith("}") and (second.startswith("{") or '"question_id"' in first)


def _located(picture: dict[str, Any], paths: dict[str, str], stems: dict[str, str]) -> dict[str, Any] | None:
    """The image with the path of its file, found by name; None where there is none. Bytes stay as they are."""
    value = picture["image"]
    if isinstance(value, dict) and value.get("bytes"):
        return picture
    named = value.get("path") if isinstance(value, dict) else value
    if not isinstance(named, str | None):
        raise ValueError(f"the image {named!r} is no name of a file")
    name = os.path.basename(named or "")
    path = paths.get(name) or stems.get(name)
    return None if path is None else {**picture, "image": path}


def _sugarcrepe(row: dict[str, Any], stem: str) -> Made:
    return [{"image": row["filename"]}], [row["caption"], row["negative_caption"]], stem


def _aro(row: dict[str, Any], stem: str) -> Made:
    x, y, width, height = (float(row[f"bbox_{side}"]) for side in "xywh")
    kind = row.get("relation_name") or "_".join(map(str, row.get("attributes", ()))) or stem
    picture = {"image": row["image_path"], "box": [x, y, x + width, y + height]}
    return [picture], [row["true_caption"], row["false_caption"]], kind


def _winoground(row: dict[str, Any], stem: str) -> Made:
    pictures = [{"image": row["image_0"]}, {"image": row["image_1"]}]
    return pictures, [row["caption_0"], row["caption_1"]], row.get("collapsed_tag") or row.get("tag") or stem


def _bivlc(row: dict[str, Any], stem: str) -> Made:
    kind = "_".join(filter(None, (row.get("type"), row.get("subtype")))) or stem
    pictures = [{"image": row[name]} for name in ("image", "negative_image") if row.get(name) is not None]
    return pictures, [row["caption"], row["negative_caption"]], kind


def _multiple_choice(row: dict[str, Any], stem: str) -> Made:
    texts, label = row["choices"], row["label"]
    if not isinstance(texts, list) or len(texts) < 2:
        raise ValueError(f"choices must be a list of two texts at least, got {texts!r}")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(texts):
        raise ValueError(f"label {label!r} is none of {len(texts)} choices")
    texts = list(texts)
    return [{"image": row["image"]}], [texts.pop(label), *texts], row.get("category") or stem


def _pope(row: dict[str, Any], stem: str) -> Made:
    named, label = QUESTION.search(row["text"]), str(row["label"]).lower()
    if named is None or label not in ("yes", "no"):
        raise ValueError(f"{row['text']!r} with the answer {row['label']!r} asks for no object")
    return [{"image": row["image"]}], [named[1]], label


# What reads a row that has these columns.
_KINDS: tuple[tuple[set[str], Maker], ...] = (
    ({"filename", "caption", "negative_caption"}, _sugarcrepe),
    ({"image_path", "true_caption", "false_caption"}, _aro),
    ({"image_0", "image_1", "caption_0", "caption_1"}, _winoground),
    ({"image", "caption", "negative_caption"}, _bivlc),
    ({"image", "choices", "label"}, _multiple_choice),
)
_QUESTIONS: tuple[tuple[set[str], Maker], ...] = (({"image", "text", "label"}, _pope),)
