"""Captions of all images of a source, or of boxes in them, written as they come."""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers.utils import logging

from ..data.json_files import read_json, read_json_lines
from ..evaluation.caption_files import write_caption_results
from ..evaluation.embedding import caption_inputs, evaluating
from ..evaluation.evaluator import draw_captions_of
from ..evaluation.likelihood import LIKELIHOOD_WEIGHT, combined
from ..evaluation.regions import adapters_off
from .loaded import LoadedModel
from .sources import FolderSource, Item, Source


OUTPUTS = (".jsonl", ".csv", ".json")
SIDECAR = "txt"
NAMES = ("id", "path", "file_name", "image")  # of an image, in a file of boxes


@dataclass
class CaptionOptions:
    """
    How captions are written: images at a time, tokens of a caption (the processor's own by default), beams, and how
    many captions are drawn of an image, of which the one with the best cosine and likelihood is taken; 0 draws none.
    """

    batch_size: int = 16
    max_new_tokens: int | None = None
    num_beams: int = 1
    draws: int = 0


def caption_image(loaded: LoadedModel, image: Any, options: CaptionOptions) -> str:
    """The caption of a whole image; options as of [`write_captions`]."""
    return caption_batch(loaded, [image], options)[0]


@torch.inference_mode()
def caption_batch(loaded: LoadedModel, images: list[Any], options: CaptionOptions) -> list[str]:
    """The captions of whole images, by stage 1."""
    model, processor = loaded.model, loaded.processor
    generation = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    with evaluating(model), adapters_off(model):
        if not options.draws:
            inputs = processor(images=images, task="caption", return_tensors="pt")
            return caption_inputs(model, processor, inputs, num_beams=options.num_beams, **generation)
        return [_best_of(loaded, image, options.draws, generation) for image in images]


def _best_of(loaded: LoadedModel, image: Any, draws: int, generation: dict[str, Any]) -> str:
    drawn = draw_captions_of(loaded.model, loaded.processor, image, draws, **generation)
    cosines, likelihoods = (torch.tensor([getattr(one, name) for one in drawn]) for name in ("cosine", "likelihood"))
    both = combined(loaded.model, cosines, likelihoods, LIKELIHOOD_WEIGHT)
    return drawn[int(both.argmax())].text


@torch.inference_mode()
def caption_boxes(loaded: LoadedModel, image: Any, boxes: list[list[float]], options: CaptionOptions) -> list[str]:
    """The captions of boxes of one image, by the adapter region-caption, without which stage 1 does what it can."""
    generation = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    with evaluating(loaded.model):
        inputs = loaded.processor(images=[image], boxes=[boxes], task="region-caption", return_tensors="pt")
        return caption_inputs(loaded.model, loaded.processor, inputs, num_beams=options.num_beams, **generation)


def read_boxes(path: str) -> dict[str, list[list[float]]]:
    """
    Boxes `[x0, y0, x1, y1]` by the name of their image: COCO's instances_*.json, a JSON object of names with lists of
    boxes, or JSON lines with `boxes` and a name under "id", "path", "file_name" or "image".

    Raises:
        ValueError: for a file of another form.
    """
    if path.endswith(".jsonl"):
        boxes = {}
        for number, row in enumerate(read_json_lines(path), 1):
            name = next((str(row[key]) for key in NAMES if key in row), None) if isinstance(row, dict) else None
            if name is None or not isinstance(row.get("boxes"), list):
                raise ValueError(f"Line {number} of {path} needs boxes and one of {', '.join(NAMES)}.")
            boxes[name] = row["boxes"]
        return boxes
    found = read_json(path)
    if isinstance(found, dict) and isinstance(found.get("annotations"), list):
        return _coco_boxes(found, path)
    if not isinstance(found, dict) or not all(isinstance(boxes, list) for boxes in found.values()):
        raise ValueError(f"{path} is neither COCO's instances_*.json nor an object of names with lists of boxes.")
    return found


def _coco_boxes(content: dict[str, Any], path: str) -> dict[str, list[list[float]]]:
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        boxes: dict[str, list[list[float]]] = {}
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            boxes.setdefault(names[annotation["image_id"]], []).append([x, y, x + width, y + height])
        return boxes
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not as COCO's instances_*.json: {type(error).__name__} {error}.") from error


def caption_source(
    loaded: LoadedModel,
    source: Source,
    options: CaptionOptions,
    boxes: dict[str, list[list[float]]] | None = None,
    done: frozenset[str] = frozenset(),
    faults: dict[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """
    `{"id", "path", "caption"}` of each image, or of each of its boxes with `"box"`.

    Args:
        boxes: by id, or by file name; images without any are left out.
        done: ids to leave out.
        faults: gets the reason of each image that cannot be read.
    """
    faults = {} if faults is None else faults
    batch: list[tuple[Item, Any]] = []
    for item in (item for unit in source.units() for item in source.items(unit)):
        own = None if boxes is None else boxes.get(item.id, boxes.get(os.path.basename(item.path or item.id)))
        if item.id in done or (boxes is not None and not own):
            continue
        try:
            image = item.image()
            if own is not None:
                captions = caption_boxes(loaded, image, own, options)
        except Exception as error:  # Pillow's readers raise errors of many types
            faults[item.id] = f"{type(error).__name__}: {error}"
            continue
        if own is not None:
            for box, caption in zip(own, captions, strict=True):
                yield {"id": item.id, "path": item.path, "box": box, "caption": caption}
            continue
        batch.append((item, image))
        if len(batch) == options.batch_size:
            yield from _captioned(loaded, batch, options)
            batch = []
    if batch:
        yield from _captioned(loaded, batch, options)


def _captioned(
    loaded: LoadedModel, batch: list[tuple[Item, Any]], options: CaptionOptions
) -> Iterator[dict[str, Any]]:
    captions = caption_batch(loaded, [image for _, image in batch], options)
    for (item, _), caption in zip(batch, captions, strict=True):
        yield {"id": item.id, "path": item.path, "caption": caption}


def write_captions(
    loaded: LoadedModel,
    source: Source,
    output: str,
    options: CaptionOptions,
    boxes: dict[str, list[list[float]]] | None = None,
    overwrite: bool = False,
) -> tuple[int, dict[str, str]]:
    """
    Captions a source into a file. The rows go to `<output>.unfinished` as they come; a run that was interrupted goes
    on behind them.

    Args:
        output: `.jsonl`, `.csv`, `.json` (COCO's results), or "txt": a file beside each image of a folder.
        overwrite: replace an output that is there.

    Returns:
        the number of rows, and the reasons of images that cannot be read, by id.

    Raises:
        ValueError: for another kind of output, one that exists, or an interrupted run of other settings.
    """
    is_sidecar = output == SIDECAR
    if not is_sidecar and not output.endswith(OUTPUTS):
        raise ValueError(f"{output} must end in {', '.join(OUTPUTS)}, or be 'txt' for a file beside each image.")
    if output.endswith(".json") and boxes is not None:
        raise ValueError("COCO's caption results hold no boxes. Write .jsonl or .csv.")
    if is_sidecar and (boxes is not None or not isinstance(source, FolderSource)):
        raise ValueError("'txt' is for whole images in a folder. Write .jsonl or .csv.")
    if not is_sidecar and os.path.exists(output) and not overwrite:
        raise ValueError(f"{output} exists. Give another --output, or --overwrite.")
    folder = source.folder if isinstance(source, FolderSource) and is_sidecar else os.path.dirname(output) or "."
    os.makedirs(folder, exist_ok=True)
    partial = os.path.join(folder, ".captions.unfinished" if is_sidecar else f"{os.path.basename(output)}.unfinished")
    setting = {"model": loaded.name, **asdict(options), "boxes": boxes is not None}
    del setting["batch_size"]
    rows = _rows_of(partial, setting)
    faults: dict[str, str] = {}
    done = frozenset(row["id"] for row in rows)
    found = caption_source(loaded, source, options, boxes, done, faults)
    with open(partial, "a", encoding="utf-8") as file:
        if not file.tell():
            file.write(json.dumps(setting) + "\n")
        for row in logging.tqdm(found, unit=" captions", initial=len(rows)):
            rows.append(row)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    if is_sidecar:
        faults.update(_write_sidecars(rows, overwrite))
    elif rows:
        _finish(rows, output)
    os.remove(partial)
    return len(rows), faults


def _rows_of(partial: str, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an interrupted run, whose last line may be torn."""
    if not os.path.exists(partial):
        return []
    with open(partial, encoding="utf-8") as file:
        lines = file.read().split("\n")
    try:
        first, *rows = [json.loads(line) for line in lines[:-1]]
    except ValueError as error:
        raise ValueError(f"{partial}, of an interrupted run, is damaged. Delete it.") from error
    if first != setting:
        raise ValueError(
            f"{partial} is of an interrupted run with other settings: {first}. Repeat those, or delete it."
        )
    if lines[-1]:
        with open(partial, "w", encoding="utf-8") as file:
            file.write("\n".join(lines[:-1]) + "\n")
    return rows


def _finish(rows: list[dict[str, Any]], output: str) -> None:
    temporary = f"{output}.temporary"
    if output.endswith(".json"):
        stems = [os.path.splitext(os.path.basename(row["id"]))[0] for row in rows]
        is_coco = all(len(stem) == 12 and stem.isdecimal() for stem in stems)  # 000000122745.jpg is image 122745
        names = [str(int(stem)) for stem in stems] if is_coco else [row["id"] for row in rows]
        write_caption_results(temporary, names, [row["caption"] for row in rows])
    else:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            if output.endswith(".csv"):
                table = csv.DictWriter(file, rows[0].keys())
                table.writeheader()
                table.writerows(rows)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(temporary, output)


def _write_sidecars(rows: list[dict[str, Any]], overwrite: bool) -> dict[str, str]:
    """Writes `photo.txt` beside `photo.jpg`; returns what is left as it was."""
    left = {}
    for row in rows:
        path = os.path.splitext(row["path"])[0] + ".txt"
        try:
            with open(path, "w" if overwrite else "x", encoding="utf-8") as file:
                file.write(row["caption"] + "\n")
        except FileExistsError:
            left[row["id"]] = f"{path} exists, and is left as it is"
    return left
