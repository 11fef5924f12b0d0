"""Images with texts of which one is right, from the files that benchmarks publish."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .annotations import checked_text, paths_by_name
from .json_files import read_json, read_json_lines
from .pairs import PairDataset
from .table_files import read_file


QUESTION = re.compile(r"is there (?:an? |any )?(.+?) in the (?:image|imange|picture|photo)", re.IGNORECASE)


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
        return image if box is None else image.crop(box)


class _Rows(list):
    """A list of mappings that also gives a whole column, as tables do."""

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def read_choices(files: Sequence[str], image_folders: Sequence[str], limit: int | None = None) -> ChoiceDataset:
    """
    The choices and questions in files, recognised by their content, of

    - SugarCrepe (Hsieh et al., 2023): `swap_obj.json` and its kin; an image, its caption, and a negative one;
    - ARO (Yuksekgonul et al., 2023): `visual_genome_relation.json`, `visual_genome_attribution.json`; a part of an
      image, a true and a false caption;
    - Winoground (Thrush et al., 2022): `examples.jsonl`; two images and two captions;
    - BiVLC (Miranda et al., 2024) and tables like it: parquet or jsonl with `image`, `caption`, `negative_caption`
      and, for choices of images too, `negative_image`;
    - tables of multiple choices: `image`, `choices` (a list of texts) and `label`, the number of the right one;
    - POPE (Li et al., 2023): `coco_pope_random.json` and its kin; an object alone is then the text of a choice, and
      its kind the answer, "yes" or "no".

    Args:
        image_folders: where the images are that the files name.
        limit: number of choices of each file, the first ones.

    Raises:
        ValueError: for a file of another kind, or without any image that exists; for texts that are none.
        FileNotFoundError: for a missing file or folder.
    """
    paths = paths_by_name(image_folders)
    stems = {os.path.splitext(name)[0]: path for name, path in paths.items()}
    images: list[dict[str, Any]] = []
    choices: list[Choice] = []
    missing = total = 0
    for file in files:
        rows = _read_rows(file)
        make = next((make for columns, make in _KINDS if columns <= {*rows[0]}), None) if rows else None
        if make is None:
            raise ValueError(
                f"{file} is none of SugarCrepe's, ARO's, Winoground's or BiVLC's, of multiple choices, or POPE's."
            )
        for number, row in enumerate(rows[:limit]):
            try:
                pictures, texts, kind = make(row, os.path.splitext(os.path.basename(file))[0])
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise ValueError(f"Example {number} of {file} is not as its kind is published: {error!r}.") from error
            total += 1
            found = [_located(picture, paths, stems) for picture in pictures]
            if any(picture is None for picture in found):
                missing += 1
                continue
            checked = [checked_text(text, file, f"of example {number}") for text in texts]
            choices.append(Choice([len(images) + i for i in range(len(found))], checked, kind))
            images += [picture for picture in found if picture is not None]
    if not choices:
        folders = ", ".join(image_folders) or "any folder"
        raise ValueError(f"None of the images of {', '.join(files)} is in {folders}; set --image_folders.")
    return ChoiceDataset(images, choices, missing)


def _read_rows(file: str) -> list[dict[str, Any]]:
    if file.endswith((".jsonl", ".jsonlines")) or _has_lines(file):
        rows = read_json_lines(file)
    elif file.endswith(".json"):
        content = read_json(file)
        rows = list(content.values()) if isinstance(content, dict) else content
    else:
        table = read_file(file, "test")
        for column, feature in table.features.items():
            if hasattr(feature, "decode"):  # images stay encoded
                table = table.cast_column(column, type(feature)(decode=False))
        rows = table.to_list()
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file} holds no list of examples.")
    return rows


def _has_lines(file: str) -> bool:
    """Whether a file named .json holds a JSON value in each line, as POPE's do."""
    if not file.endswith(".json"):
        return False
    with open(file, encoding="utf-8-sig") as lines:
        first, second = lines.readline().strip(), lines.readline().strip()
    return first.startswith("{") and first.endswith("}") and second.startswith("{")


def _located(picture: dict[str, Any], paths: dict[str, str], stems: dict[str, str]) -> dict[str, Any] | None:
    """The image with the path of its file, found by name; None where there is none. Bytes stay as they are."""
    value = picture["image"]
    if isinstance(value, dict) and value.get("bytes"):
        return picture
    name = os.path.basename((value.get("path") if isinstance(value, dict) else value) or "")
    path = paths.get(name) or stems.get(name)
    return None if path is None else {**picture, "image": path}


Made = tuple[list[dict[str, Any]], list[Any], str]


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
    texts, label = list(row["choices"]), row["label"]
    if not isinstance(label, int) or not 0 <= label < len(texts) or len(texts) < 2:
        raise ValueError(f"label {label!r} is none of {len(texts)} choices")
    return [{"image": row["image"]}], [texts.pop(label), *texts], row.get("category") or stem


def _pope(row: dict[str, Any], stem: str) -> Made:
    named, label = QUESTION.search(row["text"]), str(row["label"]).lower()
    if named is None or label not in ("yes", "no"):
        raise ValueError(f"{row['text']!r} with the answer {row['label']!r} asks for no object")
    return [{"image": row["image"]}], [named[1]], label


# What reads a row that has these columns.
_KINDS: tuple[tuple[set[str], Callable[[dict[str, Any], str], Made]], ...] = (
    ({"filename", "caption", "negative_caption"}, _sugarcrepe),
    ({"image_path", "true_caption", "false_caption"}, _aro),
    ({"image_0", "image_1", "caption_0", "caption_1"}, _winoground),
    ({"image", "caption", "negative_caption"}, _bivlc),
    ({"image", "choices", "label"}, _multiple_choice),
    ({"image", "text", "label"}, _pope),
)
