"""The report of an adapter beside its stage 1: figures, captioned regions, heat maps."""

import os
import re
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageOps

from ..data.regions import RegionDataset
from ..modeling_mmgem import MMGEMModel
from ..processing import MMGEMProcessor
from ..processing.regions_mmgem import geometry_of
from .regions import heat_map, stage_1
from .report import BLACK, CELL, GREEN, GREY, LINE, Section, empty_sheet, evenly_spaced, paste, table, write_text


BOX_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")
HEADINGS = {"region-caption": "Region captions", "region-retrieval": "Region retrieval"}


def region_section(
    stage: str,
    metrics: dict[str, float],
    outputs: dict[str, Any],
    model: MMGEMModel,
    processor: MMGEMProcessor,
    dataset: RegionDataset,
) -> Section:
    """
    A table of the metrics, and `regions.png` (region-caption) or `heat_maps.png` (region-retrieval).

    Args:
        metrics, outputs: what [`evaluate_adapter`] returns.
    """
    if stage == "region-caption":
        legend = "Grey: the reference. Then what stage 1 wrote, and what the adapter wrote (green: as the reference)."
        images = {"regions.png": region_sheet(dataset, outputs)}
    else:
        legend = "A sentence, the image with its box, and where stage 1 and the adapter see what it says."
        images = {"heat_maps.png": heat_sheet(dataset, outputs, model, processor)}
    return Section(HEADINGS[stage], metrics, [*table(metrics), "", legend], images)


def add_to_report_of_base(base: str, output_dir: str, section: Section) -> None:
    """
    Adds the section to the report of the base if the adapter's folder is inside the base's, replacing that of an
    earlier run.
    """
    report, folder = os.path.join(base, "report.md"), os.path.relpath(output_dir, base)
    if not os.path.isfile(report) or folder.startswith(os.pardir):
        return
    with open(report, encoding="utf-8") as file:
        old = file.read()
    kept = re.sub(rf"^## {section.heading}\n.*?(?=^## |\Z)", "", old, flags=re.MULTILINE | re.DOTALL)
    with open(report, "w", encoding="utf-8") as file:
        file.write(kept.rstrip("\n") + "\n\n" + section.text(folder))


def region_sheet(dataset: RegionDataset, outputs: dict[str, Any], count: int = 10) -> Image.Image:
    """Images with their boxes, and beside them what was written about each."""
    by_image: dict[int, list[int]] = {}
    for i, region in enumerate(outputs["stage_2"]):
        by_image.setdefault(region["index"], []).append(i)
    sheet, corners = empty_sheet(min(count, len(by_image)), 2, CELL + 320, CELL + 16)
    draw = ImageDraw.Draw(sheet)
    for (left, top), (index, regions) in zip(corners, by_image.items()):
        regions = regions[: len(BOX_COLOURS) // 2]
        boxes = [outputs["stage_2"][i]["box"] for i in regions]
        paste(sheet, with_boxes(dataset.read(index)["image"], boxes), left, top)
        below = top
        for colour, i in zip(BOX_COLOURS, regions):
            before, after = outputs["stage_1"][i]["caption"], outputs["stage_2"][i]
            draw.rectangle((left + CELL + 8, below + 2, left + CELL + 14, below + 3 * LINE - 4), fill=colour)
            right = GREEN if after["caption"] == after["phrase"] else BLACK
            texts = ((after["phrase"], GREY), (before or "(nothing)", BLACK), (after["caption"] or "(nothing)", right))
            for text, text_colour in texts:
                below = write_text(sheet, text, left + CELL + 20, below, text_colour, 44, 1)
    return sheet


def heat_sheet(
    dataset: RegionDataset, outputs: dict[str, Any], model: MMGEMModel, processor: MMGEMProcessor, count: int = 10
) -> Image.Image:
    """Sentences with their image and box, and the heat maps of stage 1 and of the adapter."""
    regions = outputs["stage_2"]
    chosen = [regions[i] for i in evenly_spaced(count, len(regions))]
    sheet, corners = empty_sheet(len(chosen), 2, 3 * (CELL + 8) + 16, CELL + 2 * LINE + 8)
    for region, (left, top) in zip(chosen, corners):
        image, phrase, box = dataset.read(region["index"])["image"], region["phrase"], region["box"]
        write_text(sheet, f"{phrase}   (box, stage 1, with the adapter)", left, top, BLACK, 80, 1)
        with stage_1(model, processor):
            before = heat_map(model, processor, image, phrase)
        heats = (before, heat_map(model, processor, image, phrase))
        for column, shown in enumerate((image, *(draw_heat_map(image, heat, processor) for heat in heats))):
            paste(sheet, with_boxes(shown, [box]), left + column * (CELL + 8), top + LINE + 4)
    return sheet


def with_boxes(image: Image.Image, boxes: list[list[float]]) -> Image.Image:
    """The image with coloured boxes, enlarged if it is small."""
    scale = max(1.0, CELL / max(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    drawn = image.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(drawn)
    for colour, box in zip(BOX_COLOURS, boxes):
        x0, y0, x1, y1 = (corner * scale for corner in box)
        draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour, width=max(1, max(size) // CELL + 1))
    return drawn


def draw_heat_map(image: Image.Image, heat: torch.Tensor, processor: MMGEMProcessor) -> Image.Image:
    """
    Draws a heat map of [`heat_map`] over the image, from blue (its minimum) to yellow (its maximum). The part that the
    image processor crops away stays grey.
    """
    geometry = geometry_of(processor.image_processor, *image.size)
    heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-6)
    small = Image.fromarray((255 * heat).round().to(torch.uint8).numpy())
    window = [round(side / scale) for side, scale in zip(geometry.window, geometry.scale)]
    corner = [round(offset / scale) for offset, scale in zip(geometry.offset, geometry.scale)]
    size = (max(window[0], 1), max(window[1], 1))
    colours = ImageOps.colorize(
        small.resize(size, Image.Resampling.BICUBIC), black="#10106a", mid="#d8452f", white="#ffec66"
    )
    grey = image.convert("L").convert("RGB")
    heated = grey.copy()
    heated.paste(colours, (corner[0], corner[1]))
    return Image.blend(grey, heated, 0.6)
