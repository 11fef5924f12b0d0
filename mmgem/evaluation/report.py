"""results.json, report.md and its images."""

import json
import os
import subprocess
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw, ImageFont

from .._version import __version__
from ..data.pairs import PairDataset


CELL = 168  # pixels per side of an image on a sheet
LINE = 14
GREEN, GREY, BLACK = (20, 120, 40), (110, 110, 110), (20, 20, 20)


@dataclass
class Section:
    """A part of a report: metrics, lines of Markdown, images by file name, and how many examples were used."""

    heading: str
    metrics: dict[str, float] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    images: dict[str, Image.Image] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def text(self, folder: str = "") -> str:
        """Markdown; the images are in `folder`."""
        shown = [f"![]({os.path.join(folder, name)})" for name in self.images]
        return "\n".join([f"## {self.heading}", "", *self.lines, "", *(line for p in shown for line in (p, ""))])


def write_report(output_dir: str, title: str, sections: Sequence[Section], setting: dict[str, Any]) -> str:
    """
    Writes `results.json` (the metrics of all sections and the setting), `report.md`, and the images; returns the
    report's path.

    Args:
        setting: what reproduces the metrics: dataset, split, model, seed, versions, …

    Raises:
        ValueError: for two metrics of the same name.
    """
    os.makedirs(output_dir, exist_ok=True)
    metrics: dict[str, float] = {}
    for section in sections:
        if twice := metrics.keys() & section.metrics.keys():
            raise ValueError(f"Two sections have the metric {min(twice)}; one would replace the other.")
        metrics.update(section.metrics)
    if sizes := {section.heading: section.sizes for section in sections if section.sizes}:
        setting = {**setting, "sizes": sizes}
    with open(os.path.join(output_dir, "results.json"), "w", encoding="utf-8") as file:
        json.dump({"metrics": metrics, "setting": setting}, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
    for section in sections:
        for name, image in section.images.items():
            image.save(os.path.join(output_dir, name))
    rows = ["## Setting", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in setting.items()), ""]
    path = os.path.join(output_dir, "report.md")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join([f"# {title}", "", *(section.text() for section in sections), *rows]))
    return path


def table(metrics: dict[str, float]) -> list[str]:
    """Markdown; metrics named `stage_1_…` get a column of their own."""
    before = {name.removeprefix("stage_1_"): v for name, v in metrics.items() if name.startswith("stage_1_")}
    after = {name: value for name, value in metrics.items() if not name.startswith("stage_1_")}
    if not before:
        return ["| metric | value |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in after.items())]
    lines = ["| metric | stage 1 | with the adapter |", "|---|---|---|"]
    return lines + [
        f"| {name} | {f'{before[name]:.4g}' if name in before else ''} | {value:.4g} |"
        for name, value in after.items()
    ]


def pair_sections(metrics: dict[str, float], outputs: dict[str, Any], dataset: PairDataset) -> list[Section]:
    """Retrieval and captions, as [`evaluate_model`] found them in `dataset`."""
    readable = dataset.select(outputs["indices"])
    of_captions = {name: value for name, value in metrics.items() if name.startswith("caption_")}
    of_search = {name: value for name, value in metrics.items() if name not in of_captions}
    search = retrieval_section("Search", of_search, outputs, readable)
    captions = Section("Captions", of_captions, table(of_captions))
    if outputs.get("captions"):
        captions.lines += ["", "Grey: a reference. Black: written by the model."]
        captions.images["captions.png"] = caption_sheet(readable, outputs["captions"])
    return [search, captions]


def retrieval_section(heading: str, metrics: dict[str, float], outputs: dict[str, Any], used: PairDataset) -> Section:
    """A table of the metrics, and `retrieval.png`."""
    lines = [*table(metrics), "", "The five nearest images of each sentence; green is the right one."]
    return Section(heading, metrics, lines, {"retrieval.png": retrieval_sheet(used, outputs)})


def environment() -> dict[str, Any]:
    """The commit and the versions that produce the metrics."""
    versions = {"mmgem": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
    return {"commit": current_commit(), "versions": versions}


def current_commit() -> str | None:
    """
    The commit of the checkout that this code runs from, followed by "-dirty" if files have changed since. None for an
    installed wheel, or without git.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if not os.path.exists(os.path.join(root, ".git")):  # git would search the parent folders for another repository
        return None
    command = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def caption_sheet(dataset: PairDataset, captions: list[str], count: int = 16) -> Image.Image:
    """Images with a reference and the caption generated."""
    sheet, corners = empty_sheet(min(count, len(captions)), 4, CELL + 72, CELL + 8 * LINE)
    for i, (left, top) in enumerate(corners):
        example = dataset[i]
        paste(sheet, example["image"], left, top)
        below = write_text(sheet, example["captions"][0], left, top + CELL + 4, GREY, 36, 3)
        write_text(sheet, captions[i], left, below + 3, BLACK, 36, 4)
    return sheet


def retrieval_sheet(dataset: PairDataset, outputs: dict[str, Any], count: int = 8, nearest: int = 5) -> Image.Image:
    """Sentences with their nearest images, the right one in green."""
    texts, images, owners = outputs["text_embeds"], outputs["image_embeds"], outputs["text_to_image"]
    captions = [caption for of_image in dataset.captions() for caption in of_image]
    queries, nearest = evenly_spaced(count, len(texts)), min(nearest, len(images))
    step = CELL + 12
    sheet, corners = empty_sheet(len(queries), 1, 230 + nearest * step, step)
    draw = ImageDraw.Draw(sheet)
    for query, (left, top) in zip(queries, corners):
        write_text(sheet, captions[query], left, top + 20, BLACK, 32, 9)
        for i in (images @ texts[query]).topk(nearest).indices.tolist():
            left += 222 if left < 222 else step
            if i == int(owners[query]):
                draw.rectangle((left - 5, top - 5, left + CELL + 4, top + CELL + 4), fill=GREEN)
            paste(sheet, dataset[i]["image"], left, top)
    return sheet


def class_sheet(
    dataset: PairDataset, outputs: dict[str, Any], class_names: Sequence[str], count: int = 18
) -> Image.Image:
    """Images with the class that each was taken for (green where right) and its own."""
    chosen = evenly_spaced(count, len(dataset))
    sheet, corners = empty_sheet(len(chosen), 6, CELL + 12, CELL + 3 * LINE + 8)
    for i, (left, top) in zip(chosen, corners):
        found, right = (class_names[int(outputs[name][i])] for name in ("predicted", "labels"))
        paste(sheet, dataset.image(i), left, top)
        below = write_text(sheet, found, left, top + CELL + 2, GREEN if found == right else BLACK, 26, 1)
        if found != right:
            write_text(sheet, right, left, below, GREY, 26, 1)
    return sheet


def evenly_spaced(count: int, size: int) -> list[int]:
    """At most `count` indices spread over `size` items."""
    return torch.linspace(0, size - 1, min(count, size)).long().tolist()


def empty_sheet(count: int, columns: int, width: int, height: int) -> tuple[Image.Image, list[tuple[int, int]]]:
    """A white sheet for `count` cells of `width` x `height`, and the top left corner of each, inside its margin."""
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * width + 8, rows * height + 8), "white")
    return sheet, [(i % columns * width + 8, i // columns * height + 8) for i in range(count)]


def paste(sheet: Image.Image, image: Image.Image, left: int, top: int) -> None:
    """The whole image, scaled to fit a cell and centred in it."""
    scale = CELL / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    resized = image.resize(size, Image.Resampling.BICUBIC)
    sheet.paste(resized, (left + (CELL - size[0]) // 2, top + (CELL - size[1]) // 2))


def write_text(sheet: Image.Image, text: str, left: int, top: int, colour: Any, columns: int, max_lines: int) -> int:
    """Wrapped text; returns the y below it."""
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for line in textwrap.wrap(text, columns, max_lines=max_lines, placeholder=" …") or ["(empty)"]:
        draw.text((left, top), line, fill=colour, font=font)
        top += LINE
    return top
