"""What the commands embed, search, caption and serve do, and what they print."""

import json
import os
import sys
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from ..evaluation.report import BLACK, CELL, GREEN, GREY, empty_sheet, paste, write_text
from ..evaluation.sharing import is_first_process
from ..library import Hit, Index, LoadedModel, SourceOptions
from ..library.building import LEFT_OUT, BuildReport, build
from ..library.captions import CaptionOptions, read_boxes, write_captions
from ..library.sources import open_source


SHOWN_FAULTS = 3
PATIENCE = timedelta(days=7)  # of a process that has embedded its share, for the others


def embed_images(
    source: dict[str, Any],
    output: str,
    loading: dict[str, Any],
    building: dict[str, Any],
    engine: str,
    as_json: bool,
) -> None:
    """`mmgem embed`."""
    options = SourceOptions(**source)
    if engine == "ray":
        try:
            from ..library.ray_engine import build_with_ray
        except ImportError as error:
            raise ImportError(f"--engine ray needs Ray ({error}): pip install 'mmgem[ray]'") from error
        report = build_with_ray(options, output, loading, **building)
    else:
        if "RANK" in os.environ:
            state = PartialState(cpu=loading["device"] == "cpu", timeout=PATIENCE)
            loading = {**loading, "device": str(state.device)}
        loaded = LoadedModel.load(**loading)
        logging.enable_progress_bar()
        report = build(options, output, loaded, **building)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    if not is_first_process() or int(os.environ.get("RANK", "0")) > 0:
        return
    if report.embedded + report.present == 0:
        raise ValueError(f"No image can be read; {_faults(report.left_out)}.")
    print_report({"index": output, **vars(report)}, as_json, _lines_of(report, output))


def _lines_of(report: BuildReport, output: str) -> list[str]:
    lines = [f"{report.embedded} images embedded, {report.present} there already, {report.removed} removed: {output}"]
    if report.left_out:
        lines.append(f"{len(report.left_out)} left out ({os.path.join(output, LEFT_OUT)}): {_faults(report.left_out)}")
    return lines


def _faults(left_out: dict[str, str]) -> str:
    shown = [f"{name}: {reason}" for name, reason in list(left_out.items())[:SHOWN_FAULTS]]
    return "; ".join([*shown, "…"] if len(left_out) > SHOWN_FAULTS else shown)


def search_index(
    folder: str,
    asked: dict[str, Any],
    box: str | None,
    loading: dict[str, Any],
    precision: str,
    output: str,
    as_json: bool,
) -> None:
    """`mmgem search`."""
    index = Index(folder, loading.pop("name"), precision, **loading)
    hits = index.search(**asked, boxes=None if box is None else _as_box(box))
    sheet = contact_sheet(index, hits)
    sheet.save(output)
    if as_json:
        print_report({"hits": [vars(hit) for hit in hits], "sheet": output}, True, [])
        return
    table = Table("", "score", "image", box=None, header_style="dim")
    for place, hit in enumerate(hits, 1):
        where = f"  {[round(corner) for corner in hit.box]}" if hit.box else ""
        table.add_row(str(place), f"{hit.score:.3f}", Text((shown_path(hit.path) or hit.id) + where))
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)
    print(f"{len(index)} images searched; contact sheet: {output}")


def _as_box(text: str) -> list[float]:
    try:
        x0, y0, x1, y1 = (float(number) for number in text.split(","))
    except ValueError as error:
        raise ValueError(f"--box must be four numbers x0,y0,x1,y1 in pixels of the image, got {text!r}.") from error
    return [x0, y0, x1, y1]


def contact_sheet(index: Index, hits: list[Hit], columns: int = 5) -> Image.Image:
    """The images that were found, with their places, names and best regions."""
    sheet, corners = empty_sheet(len(hits), min(columns, max(len(hits), 1)), CELL + 12, CELL + 40)
    draw = ImageDraw.Draw(sheet)
    for place, (hit, (left, top)) in enumerate(zip(hits, corners), 1):
        image = index.image(hit, 0 if hit.box else CELL)  # boxes are in pixels of the whole image
        if image is None:
            draw.rectangle((left, top, left + CELL, top + CELL), outline=GREY)
            write_text(sheet, "not there any more", left + 20, top + CELL // 2, GREY, 26, 1)
        else:
            if hit.box is not None:
                ImageDraw.Draw(image).rectangle(hit.box, outline=GREEN, width=max(round(max(image.size) / 60), 1))
            paste(sheet, image, left, top)
        name = os.path.basename(hit.path) or hit.id
        write_text(sheet, f"{place}  {hit.score:.3f}  {name}", left, top + CELL + 4, BLACK, 27, 2)
    return sheet


def caption_images(
    source: dict[str, Any],
    output: str,
    loading: dict[str, Any],
    how: dict[str, Any],
    boxes: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """`mmgem caption`."""
    opened = open_source(SourceOptions(**source))
    own = None if boxes is None else read_boxes(boxes)
    loaded = LoadedModel.load(**loading)
    logging.enable_progress_bar()
    count, left_out = write_captions(loaded, opened, output, CaptionOptions(**how), own, overwrite)
    if not count:
        what = _faults(left_out) or "no box belongs to an image of the source"
        raise ValueError(f"No caption was written; {what}.")
    lines = [f"{count} captions: {'beside their images' if output == 'txt' else output}"]
    if left_out:
        lines.append(f"{len(left_out)} left out: {_faults(left_out)}")
    print_report({"captions": count, "output": output, "left_out": left_out}, as_json, lines)


def serve_page(index: str | None, loading: dict[str, Any], host: str, port: int) -> None:
    """`mmgem serve`."""
    try:
        from ..page.app import serve
    except ImportError as error:
        raise ImportError(f"The page needs Gradio ({error}): pip install 'mmgem[page]'") from error
    serve(index, loading, host, port)


def print_report(report: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """The report as JSON, or the lines for a person."""
    print(json.dumps(report, ensure_ascii=False) if as_json else "\n".join(lines), flush=True)


def shown_path(path: str) -> str:
    """The path from here where that is shorter."""
    return path if not path or "://" in path else min(path, os.path.relpath(path), key=len)
