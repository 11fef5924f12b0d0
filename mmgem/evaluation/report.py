"""results.json, report.md and its pictures."""

import json
import os
import subprocess
import textwrap
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from ..data.pairs import PairDataset


CELL = 168  # pixels per side of a picture on a sheet
LINE = 14
GREEN, GREY, BLACK = (20, 120, 40), (110, 110, 110), (20, 20, 20)


def write_report(
    output_dir: str, metrics: dict[str, float], setting: dict[str, Any], outputs: dict[str, Any], dataset: PairDataset
) -> str:
    """
    Writes `results.json`, `report.md`, `captions.png` and `retrieval.png`; returns the report's path.

    Args:
        metrics, outputs: what [`evaluate_model`] returns.
        dataset: what it was given.
        setting: whatever it takes to reproduce the figures: dataset, split, size, model, seed, versions, …
    """
    os.makedirs(output_dir, exist_ok=True)
    setting = {**setting, "size": len(outputs["indices"]), "unreadable": len(dataset) - len(outputs["indices"])}
    dataset = dataset.select(outputs["indices"])
    with open(os.path.join(output_dir, "results.json"), "w", encoding="utf-8") as file:
        json.dump({"metrics": metrics, "setting": setting}, file, indent=2, ensure_ascii=False)
        file.write("\n")
    lines = ["# Evaluation", "", "| metric | value |", "|---|---|"]
    lines += [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
    lines += ["", "| setting | |", "|---|---|", *(f"| {name} | {value} |" for name, value in setting.items()), ""]
    if outputs.get("captions"):
        caption_sheet(dataset, outputs["captions"]).save(os.path.join(output_dir, "captions.png"))
        lines += ["## Captions", "", "Grey: a reference. Black: written by the model.", "", "![](captions.png)", ""]
    retrieval_sheet(dataset, outputs).save(os.path.join(output_dir, "retrieval.png"))
    lines += ["## Search", "", "The five nearest pictures of each sentence; green is the right one.", ""]
    lines += ["![](retrieval.png)", ""]
    path = os.path.join(output_dir, "report.md")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines))
    return path


def current_commit() -> str | None:
    """The commit of the checkout that this code runs from, "-dirty" behind it where files were changed since; None for
    an installed wheel, or without git."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if not os.path.exists(os.path.join(root, ".git")):  # git would look further up, and find somebody else's
        return None
    command = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def caption_sheet(dataset: PairDataset, captions: list[str], count: int = 16, columns: int = 4) -> Image.Image:
    """Pictures with a reference and the caption generated."""
    count = min(count, len(captions))
    rows = -(-count // columns)
    width, height = CELL + 72, CELL + 8 * LINE
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i in range(count):
        left, top = i % columns * width + 8, i // columns * height + 8
        example = dataset[i]
        paste(sheet, example["image"], left, top)
        below = write_text(sheet, example["captions"][0], left, top + CELL + 4, GREY, 36, 3)
        write_text(sheet, captions[i], left, below + 3, BLACK, 36, 4)
    return sheet


def retrieval_sheet(dataset: PairDataset, outputs: dict[str, Any], count: int = 8, nearest: int = 5) -> Image.Image:
    """Sentences, one of every few pictures, with their nearest pictures."""
    texts, images, owners = outputs["text_embeds"], outputs["image_embeds"], outputs["text_to_image"]
    count, nearest = min(count, len(texts)), min(nearest, len(images))
    queries = torch.linspace(0, len(texts) - 1, count).long().tolist()
    captions = [caption for of_image in dataset.captions() for caption in of_image]
    step = CELL + 12
    sheet = Image.new("RGB", (230 + nearest * step, count * step + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for row, query in enumerate(queries):
        top = 8 + row * step
        write_text(sheet, captions[query], 8, top + 20, BLACK, 32, 9)
        best = (images @ texts[query]).topk(nearest).indices.tolist()
        for column, i in enumerate(best):
            left = 230 + column * step
            if i == int(owners[query]):
                draw.rectangle((left - 5, top - 5, left + CELL + 4, top + CELL + 4), fill=GREEN)
            paste(sheet, dataset[i]["image"], left, top)
    return sheet


def paste(sheet: Image.Image, image: Image.Image, left: int, top: int) -> None:
    """The whole picture, scaled to fit a cell and centred in it."""
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
