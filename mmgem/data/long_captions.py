"""The files in which pictures with captions of a hundred words and more are published."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

from ..processing.tokenization_mmgem import as_sentence
from .json_files import no_such_split, read_json, read_json_lines


def read_long_captions(path: str, splits: Sequence[str] | None = None) -> dict[str, list[str]] | None:
    """
    Captions by the names of their pictures, from any of

    - DCI (Urbanek et al., 2023): the folder of annotations, a JSON file for each picture (`short_caption` and
      `extra_caption`, which together are the caption of the whole);
    - DOCCI (Onoe et al., 2024): `docci_descriptions.jsonlines`, of which `splits` are read (all by default);
    - ShareGPT4V (Chen et al., 2023): the list of conversations, of which the first answer is the caption;
    - Urban1k (Zhang et al., 2024): the folder of captions, a text file for each picture.

    Names end in the extension of the picture, but for Urban1k, whose captions do not say it.

    Returns:
        None where the file or folder is of another kind.

    Raises:
        ValueError: for anything that is not valid JSON or text, where DOCCI's file has none of `splits`, and for two
            pictures of one name.
    """
    if os.path.isdir(path):
        return _read_folder(path)
    if path.endswith((".jsonl", ".jsonlines")):
        return _read_docci(path, splits)
    with open(path, "rb") as stream:
        if b'"conversations"' not in stream.read(1 << 16):
            return None
    return _by_picture((row["image"], _answer(row)) for row in read_json(path) if "image" in row)


def _read_folder(path: str) -> dict[str, list[str]] | None:
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
    texts, files = ([n for n in names if n.endswith(end)] for end in (".txt", ".json"))
    if texts:
        captions = {}
        for name in texts:
            with open(os.path.join(path, name), encoding="utf-8-sig") as stream:
                try:
                    captions[os.path.splitext(name)[0]] = [as_sentence(stream.read())]
                except UnicodeDecodeError as error:
                    raise ValueError(f"{stream.name} is no text: {error}.") from error
        return captions
    if not files:
        return None
    return _by_picture(_read_dci(os.path.join(path, name)) for name in files)


def _read_dci(path: str) -> tuple[str, str]:
    row = read_json(path)
    return row["image"], f"{row.get('short_caption') or ''} {row.get('extra_caption') or ''}"


def _read_docci(path: str, splits: Sequence[str] | None) -> dict[str, list[str]] | None:
    rows = read_json_lines(path)
    if not rows or "image_file" not in rows[0]:
        return None
    chosen = [row for row in rows if splits is None or row["split"] in splits]
    if not chosen:
        raise no_such_split(path, splits, {row["split"] for row in rows})
    return _by_picture((row["image_file"], row["description"]) for row in chosen)


def _answer(row: dict[str, Any]) -> str:
    answers = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
    if not answers:
        raise KeyError(f"an answer about {row['image']}")
    return answers[0]


def _by_picture(rows: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    paths: dict[str, str] = {}
    for image, caption in rows:
        name = os.path.basename(image)
        if paths.setdefault(name, image) != image:
            raise ValueError(f"{paths[name]} and {image} have one name, by which their captions are told apart.")
        captions.setdefault(name, []).append(as_sentence(caption))
    return captions
