"""Captions in the form in which COCO's and NoCaps' servers take them, against their reference files."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import logging

from ..data.json_files import no_such_split, read_json
from .captioning import bleu, cider_d, has_cider, rouge_l


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
    The caption of each picture.

    Raises:
        ValueError: for a file of another form, or a picture with two captions.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"image_id", "caption"} <= row.keys() for row in rows
    ):
        raise ValueError(f"{path} is no list of image_id and caption, as COCO's result files are.")
    twice = [image for image, count in Counter(str(row["image_id"]) for row in rows).items() if count > 1]
    if twice:
        raise ValueError(f"{path} has several captions for {len(twice)} pictures, such as image_id {twice[0]}.")
    if wrong := [row["image_id"] for row in rows if not isinstance(row["caption"], str)]:
        raise ValueError(f"{path} has no text as the caption of image_id {wrong[0]}.")
    return {str(row["image_id"]): row["caption"] for row in rows}


def read_caption_references(path: str, split: str = "test") -> tuple[dict[str, list[str]], dict[str, str]]:
    """
    The references of each picture of COCO's `captions_*.json`, NoCaps' file or a `split` of Karpathy's, and the
    domains of NoCaps'.

    Raises:
        ValueError: for a file of another form or without that split, a reference that is no text, or two pictures of
            one id.
    """
    content = read_json(path)
    try:
        images = content["images"]
        if images and "sentences" in images[0]:
            there = {image["split"] for image in images}
            if split not in there:
                raise no_such_split(path, [split], there)
            images = [{**i, "id": i.get("cocoid", i["filename"])} for i in images if i["split"] == split]
            texts = [(image["id"], sentence["raw"]) for image in images for sentence in image["sentences"]]
            content = {"annotations": [{"image_id": image, "caption": text} for image, text in texts]}
        ids = [str(image["id"]) for image in images]
        domains = {str(image["id"]): str(image["domain"]) for image in images if image.get("domain")}
        references: dict[str, list[str]] = {image: [] for image in ids}
        for annotation in content["annotations"]:
            if not isinstance(annotation["caption"], str):
                raise ValueError(f"{path} has no text as a reference of picture {annotation['image_id']}.")
            references[str(annotation["image_id"])].append(annotation["caption"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not as COCO writes references: {error!r}.") from error
    if len(references) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise ValueError(f"{path} has several pictures of the id {twice}.")
    return references, domains


def score_captions(
    results: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    domains: Mapping[str, str | None] | None = None,
    subset: bool = False,
) -> dict[str, float]:
    """
    CIDEr-D, BLEU-1 to 4 and ROUGE-L of all captions, and with `domains` of each domain alone, its document frequencies
    being those of its own references. CIDEr of a single picture is undefined, and left out. An empty caption scores 0,
    and is counted. With `subset` references without a caption are left out.

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
            f"{len(missing)} of {len(references)} pictures have no caption, such as image_id {missing[0]}; COCO's "
            "servers refuse such a file too. With --caption_subset the others alone are scored."
        )
    empty = sum(not caption.strip() for caption in results.values())
    if empty:
        logger.warning(f"{empty} of {len(results)} captions are empty, and score 0.")
    metrics = {
        **_scores("these captions", list(references), results, references),
        "caption_empty": empty / len(results),
    }
    for domain in DOMAINS:
        images = [image for image in references if domains and domains.get(image) == domain]
        if images:
            scores = _scores(domain, images, results, references)
            metrics.update({f"{name}_{domain.replace('-', '_')}": value for name, value in scores.items()})
    return metrics


def _scores(
    name: str, images: list[str], results: Mapping[str, str], references: Mapping[str, Any]
) -> dict[str, float]:
    captions, of_images = [results[image] for image in images], [references[image] for image in images]
    return {
        **({"caption_cider": cider_d(captions, of_images)[0]} if has_cider(of_images, name) else {}),
        **{f"caption_bleu{n}": value for n, value in enumerate(bleu(captions, of_images), 1)},
        "caption_rouge_l": rouge_l(captions, of_images)[0],
    }
