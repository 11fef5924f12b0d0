"""Captions in the form in which COCO's and NoCaps' servers take them, against their reference files."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import logging

from ..data.annotations import checked_text, read_records
from ..data.json_files import read_json
from .captioning import caption_scores


logger = logging.get_logger(__name__)

DOMAINS = ("in-domain", "near-domain", "out-domain")


def write_caption_results(path: str, image_ids: Sequence[str], captions: Sequence[str]) -> None:
    """`[{"image_id", "caption"}, …]`, ids that are numbers as numbers."""
    rows = [{"image_id": _number(i), "caption": text} for i, text in zip(image_ids, captions, strict=True)]
    with open(path, "w", encoding="utf-8") as file:
        json.dump(rows, file, indent=0, ensure_ascii=False)


def _number(image_id: str) -> int | str:
    is_number = image_id.isdecimal() and str(int(image_id)) == image_id  # "0001" is a name
    return int(image_id) if is_number else image_id


def read_caption_results(path: str) -> dict[str, str]:
    """
    The caption of each image.

    Raises:
        ValueError: for a file of another form, or an image with two captions.
    """
    rows = read_json(path)
    names = {"image_id", "caption"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and names <= row.keys() for row in rows):
        raise ValueError(f"{path} is no list of image_id and caption, as COCO's result files are.")
    several = [image for image, count in Counter(str(row["image_id"]) for row in rows).items() if count > 1]
    if several:
        raise ValueError(f"{path} has several captions for {len(several)} images, such as image_id {several[0]}.")
    if wrong := [row["image_id"] for row in rows if not isinstance(row["caption"], str)]:
        raise ValueError(f"{path} has no text as the caption of image_id {wrong[0]}.")
    return {str(row["image_id"]): row["caption"] for row in rows}


def read_caption_references(path: str, split: str = "test") -> tuple[dict[str, list[str]], dict[str, str]]:
    """
    The references of each image of COCO's `captions_*.json`, NoCaps' file or a `split` of Karpathy's, and the domains
    of NoCaps'.

    Raises:
        ValueError: as [`read_records`]; for a file without image ids, or a reference that is no text.
    """
    references, domains = {}, {}
    for record in read_records(path, (split,)):
        if "image_id" not in record.known:
            raise ValueError(f"{path} has no image ids. Give COCO's captions_*.json, NoCaps' or Karpathy's file.")
        image_id = record.known["image_id"]
        references[image_id] = [checked_text(caption, path, image_id) for caption in record.captions]
        if record.known.get("domain"):
            domains[image_id] = str(record.known["domain"])
    return references, domains


def score_captions(
    results: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    domains: Mapping[str, str | None] | None = None,
    subset: bool = False,
) -> dict[str, float]:
    """
    [`caption_scores`] of all captions, and with `domains` of each domain alone, its document frequencies being those
    of its own references. An empty caption scores 0, and is counted. With `subset` references without a caption are
    left out.

    Raises:
        ValueError: for captions without references, and references without a caption.
    """
    if subset:
        references = {image: of_image for image, of_image in references.items() if image in results}
    without = [image for image in results if not references.get(image)]
    if without:
        raise ValueError(f"{len(without)} captions have no references, such as that of image_id {without[0]}.")
    missing = [image for image in references if image not in results]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(references)} images have no caption, such as image_id {missing[0]}; COCO's "
            "servers refuse such a file too. Score only the others with --caption_subset."
        )
    empty = sum(not caption.strip() for caption in results.values())
    if empty:
        logger.warning(f"{empty} of {len(results)} captions are empty, and score 0.")

    def scores(images: list[str], of: str) -> dict[str, Any]:
        return caption_scores([results[image] for image in images], [references[image] for image in images], of)

    metrics = {**scores(list(references), "these captions"), "caption_empty": empty / len(results)}
    for domain in DOMAINS:
        images = [image for image in references if domains and domains.get(image) == domain]
        if images:
            suffix = domain.replace("-", "_")
            metrics.update({f"{name}_{suffix}": value for name, value in scores(images, domain).items()})
    return metrics
