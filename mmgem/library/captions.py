"""Captions of all images of a source, or of boxes in them, written as they come."""

import csv
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers.utils import logging

from ..data.json_files import read_json, read_json_lines
from ..data.pairs import digest
from ..evaluation.caption_files import write_caption_results
from ..evaluation.embedding import caption_inputs, evaluating
from ..evaluation.evaluator import draw_captions_of
from ..evaluation.likelihood import LIKELIHOOD_WEIGHT, combined
from ..evaluation.regions import adapters_off, stage_1
from ..modeling_mmgem.adapters_mmgem import active_adapters_of
from ..processing.image_processors_mmgem import least_side_of
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
    """The caption of a whole image, by stage 1."""
    return caption_batch(loaded, [image], options)[0]


@torch.inference_mode()
def caption_batch(loaded: LoadedModel, images: list[Any], options: CaptionOptions) -> list[str]:
    """The captions of whole images, by stage 1."""
    model, processor, generation = loaded.model, loaded.processor, _length(options)
    with evaluating(model), adapters_off(model):
        if not options.draws:
            inputs = processor(images=images, task="caption", return_tensors="pt")
            return caption_inputs(model, processor, inputs, num_beams=options.num_beams, **generation)
        return [_best_of(loaded, image, options.draws, generation) for image in images]


def _best_of(loaded: LoadedModel, image: Any, draws: int, generation: dict[str, Any]) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same captions in every run
        drawn = draw_captions_of(loaded.model, loaded.processor, image, draws, **generation)
    cosines, likelihoods = (torch.tensor([getattr(one, name) for one in drawn]) for name in ("cosine", "likelihood"))
    both = combined(loaded.model, cosines, likelihoods, LIKELIHOOD_WEIGHT)
    return drawn[int(both.argmax())].text


@torch.inference_mode()
def caption_boxes(loaded: LoadedModel, image: Any, boxes: list[list[float]], options: CaptionOptions) -> list[str]:
    """The captions of boxes of one image, by the adapter region-caption; without it by stage 1, by its prompt."""
    model, generation = loaded.model, {"num_beams": options.num_beams, **_length(options)}
    has_adapter = bool(active_adapters_of(model.soft_prompts))
    with evaluating(model), nullcontext(loaded.processor) if has_adapter else stage_1(model, loaded.processor) as own:
        inputs = own(images=[image], boxes=[boxes], task="region-caption", return_tensors="pt")
        return caption_inputs(model, own, inputs, **generation)


def _length(options: CaptionOptions) -> dict[str, Any]:
    return {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}


def read_boxes(path: str) -> dict[str, list[list[float]]]:
    """
    Boxes `[x0, y0, x1, y1]` by the name of their image: COCO's instances_*.json, a JSON object of names with lists of
    boxes, or JSON lines with `boxes` and a name under "id", "path", "file_name" or "image".

    Raises:
        ValueError: for a file of another form.
    """
    if path.endswith(".jsonl"):
        boxes: dict[str, list[list[float]]] = {}
        for number, row in enumerate(read_json_lines(path), 1):
            name = next((str(row[key]) for key in NAMES if key in row), None) if isinstance(row, dict) else None
            if name is None or not isinstance(row.get("boxes"), list):
                raise ValueError(f"Line {number} of {path} needs boxes and one of {', '.join(NAMES)}.")
            boxes.setdefault(name, []).extend(row["boxes"])
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
) -> Iterator[list[dict[str, Any]]]:
    """
    `{"id", "path", "caption"}` of each image in a list, or those of its boxes, with `"box"`.

    Args:
        boxes: by id, or by file name; images without any are left out.
        done: ids to leave out.
        faults: gets the reason of each image that cannot be read, or whose boxes cannot.
    """
    faults = {} if faults is None else faults
    batch: list[tuple[Item, Any]] = []
    side = 0 if boxes is not None else least_side_of(loaded.processor.image_processor)  # boxes are in its pixels
    for item in (item for unit in source.units() for item in source.items(unit)):
        own = None if boxes is None else boxes.get(item.id, boxes.get(os.path.basename(item.path or item.id)))
        if item.id in done or (boxes is not None and not own):
            continue
        try:
            image = item.image(side)
        except Exception as error:  # Pillow's readers raise errors of many types
            faults[item.id] = f"{type(error).__name__}: {error}"
            continue
        if own is not None:
            try:
                captions = caption_boxes(loaded, image, own, options)
            except ValueError as error:  # a box that is none
                faults[item.id] = str(error)
                continue
            yield [_row(item, caption, box=box) for box, caption in zip(own, captions, strict=True)]
            continue
        batch.append((item, image))
        if len(batch) == options.batch_size:
            yield from _captioned(loaded, batch, options)
            batch = []
    if batch:
        yield from _captioned(loaded, batch, options)


def _captioned(
    loaded: LoadedModel, batch: list[tuple[Item, Any]], options: CaptionOptions
) -> Iterator[list[dict[str, Any]]]:
    captions = caption_batch(loaded, [image for _, image in batch], options)
    for (item, _), caption in zip(batch, captions, strict=True):
        yield [_row(item, caption)]


def _row(item: Item, caption: str, **more: Any) -> dict[str, Any]:
    return {"id": item.id, "path": item.path, **more, "caption": caption}


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
    _check_output(source, output, options, boxes is not None, overwrite)
    is_sidecar = output == SIDECAR
    folder = source.folder if isinstance(source, FolderSource) and is_sidecar else os.path.dirname(output) or "."
    os.makedirs(folder, exist_ok=True)
    partial = os.path.join(folder, ".captions.unfinished" if is_sidecar else f"{os.path.basename(output)}.unfinished")
    setting = {
        "source": getattr(source, "folder", source.state),
        "model": os.path.abspath(loaded.name) if os.path.isdir(loaded.name) else loaded.name,
        "dtype": str(loaded.model.dtype),
        "do_center_crop": loaded.do_center_crop,
        "boxes": None if boxes is None else digest(json.dumps(boxes).encode()),
        **asdict(options),
    }
    del setting["batch_size"]
    with _alone(f"{partial}.lock", output):
        rows = _rows_of(partial, setting)
        faults: dict[str, str] = {}
        done = frozenset(row["id"] for row in rows)
        found = caption_source(loaded, source, options, boxes, done, faults)
        total = sum(1 for _ in source.units()) if source.is_counted and boxes is None else None
        with open(partial, "a", encoding="utf-8") as file:
            if not file.tell():
                file.write(json.dumps(setting) + "\n")
                file.flush()
            for of_image in logging.tqdm(found, unit=" images", initial=len(done), total=total):
                rows += of_image
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of_image))
                file.flush()
        if is_sidecar:
            faults.update(_write_sidecars(rows, overwrite))
        elif rows:
            _finish(rows, output)
        os.remove(partial)
    return len(rows), faults


def _check_output(source: Source, output: str, options: CaptionOptions, has_boxes: bool, overwrite: bool) -> None:
    """Raises ValueError for an output that cannot hold the captions, or is there already."""
    is_sidecar = output == SIDECAR
    if not is_sidecar and not output.endswith(OUTPUTS):
        raise ValueError(f"{output} must end in {', '.join(OUTPUTS)}, or be 'txt' for a file beside each image.")
    if output.endswith(".json") and has_boxes:
        raise ValueError("COCO's caption results hold no boxes. Write .jsonl or .csv.")
    if options.draws and (has_boxes or options.num_beams > 1):
        raise ValueError("Captions are drawn of whole images, without beams: leave out --rerank, or the others.")
    if is_sidecar and (has_boxes or not isinstance(source, FolderSource)):
        raise ValueError("'txt' is for whole images in a folder. Write .jsonl or .csv.")
    if not is_sidecar and os.path.exists(output) and not overwrite:
        raise ValueError(f"{output} exists. Give another --output, or --overwrite.")


@contextmanager
def _alone(lock: str, output: str) -> Iterator[None]:
    """Raises ValueError if another run writes the same captions."""
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"Another run writes {output}. Wait for it, or give another --output.") from error
    finally:
        with suppress(FileNotFoundError):
            os.remove(lock)


def _rows_of(partial: str, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an interrupted run. Its last line may be torn, and the boxes of its last image incomplete."""
    if not os.path.exists(partial):
        return []
    with open(partial, "rb") as file:
        lines = file.read().split(b"\n")[:-1]
    try:
        first, *rows = [json.loads(line) for line in lines] or [setting]
    except ValueError as error:
        raise ValueError(f"{partial}, of an interrupted run, is damaged. Delete it.") from error
    if first != setting:
        changed = ", ".join(name for name in setting if first.get(name) != setting[name])
        raise ValueError(f"{partial} is of an interrupted run with another {changed}. Repeat that run, or delete it.")
    if setting["boxes"] is not None and rows:
        last = rows[-1]["id"]
        rows = [row for row in rows if row["id"] != last]
    with open(f"{partial}.whole", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in (setting, *rows))
    os.replace(f"{partial}.whole", partial)
    return rows


def _finish(rows: list[dict[str, Any]], output: str) -> None:
    temporary = f"{output}.temporary"
    if output.endswith(".json"):
        # 000000122745.jpg and COCO_val2014_000000122745.jpg are image 122745.
        numbers = [re.fullmatch(r"(?:.*[/_])?0*(\d{1,12})\.\w+", row["id"]) for row in rows]
        is_coco = all(re.fullmatch(r"(?:.*[/_])?\d{12}\.\w+", row["id"]) for row in rows)
        names = [match[1] if is_coco and match else row["id"] for match, row in zip(numbers, rows)]
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
