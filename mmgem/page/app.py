"""The page of `mmgem serve`, and of a Space."""

import os
import tempfile
from typing import Any

import gradio as gr
import torch
from PIL import Image, ImageDraw

from ..evaluation.embedding import evaluating
from ..evaluation.regions import heat_map
from ..library import Hit, Index, LoadedModel
from ..library.captions import CaptionOptions, caption_boxes, caption_image
from ..processing.regions_mmgem import geometry_of
from .box_input import EMPTY, box_input, shown


DEMO = "outputs/scenes"
SHOWN = 24
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}  # its adapters are switched
THUMBNAIL = 384
FONT = ["system-ui", "sans-serif"]


def serve(index: str | None, loading: dict[str, Any], host: str, port: int) -> None:
    """
    Serves the page until it is interrupted.

    Args:
        index: folder; without one the demo's scenes, which are embedded if they have not been.
        loading: arguments of [`LoadedModel.load`]; without a name the model that the index names.
        host, port: where.
    """
    page = build_page(open_for_page(index, loading))
    page.launch(server_name=host, server_port=port or None, quiet=True, max_file_size="50mb", **APPEARANCE)


def open_for_page(index: str | None, loading: dict[str, Any]) -> Index:
    """
    The index, or the demo's.

    Raises:
        FileNotFoundError: if nothing is named and there is no demo.
    """
    loading = dict(loading)
    name = loading.pop("name", None)
    if index is not None:
        return Index(index, name, **loading)
    if name is None and not os.path.isdir(DEMO):
        raise FileNotFoundError(f"There is no {DEMO}: run make demo, or give --index.")
    loaded = LoadedModel.load(name or DEMO, **loading)
    folder = os.path.join(loaded.name, "index") if os.path.isdir(loaded.name) else tempfile.mkdtemp(prefix="mmgem-")
    return Index.build("scenes", folder, loaded)


APPEARANCE: dict[str, Any] = {
    "theme": gr.themes.Soft(primary_hue="green", font=FONT, font_mono=["ui-monospace", "monospace"]),
    "css": "footer { display: none !important } #title h1 { margin-bottom: 0 }",
}


def build_page(index: Index) -> gr.Blocks:
    """The page of one index."""
    functions = PageFunctions(index)
    with gr.Blocks(title="mmgem", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as page:
        name = index.loaded.name
        name = os.path.basename(name) if os.path.isabs(name) else name  # a visitor need not know the server's folders
        gr.Markdown(
            f"# mmgem\n{len(index):,} images, searched and described by one model: `{name}`",
            elem_id="title",
        )
        found, chosen = gr.State([]), gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                text = gr.Textbox(label="Sentence", placeholder="what the images show", elem_id="sentence")
                image = gr.Image(label="Image, alone or with the sentence", type="pil", height=180)
                by_region = gr.Checkbox(label="By the best region", elem_id="by-region")
                rerank = gr.Slider(0, 50, 0, step=10, label="Re-ordered by likelihood")
                search = gr.Button("Search", variant="primary", elem_id="search")
                status = gr.Markdown(elem_id="status")
            with gr.Column(scale=3):
                gallery = gr.Gallery(
                    label="Found", columns=6, height=420, allow_preview=False, object_fit="contain", elem_id="found"
                )
        with gr.Row():
            with gr.Column(scale=4):
                stage = box_input()
            with gr.Column(scale=3, min_width=280):
                map_image = gr.Image(
                    label="Heat map", height=440, interactive=False, buttons=["download"], elem_id="map"
                )
            with gr.Column(scale=3, min_width=280):
                caption = gr.Textbox(label="Description", lines=3, interactive=False, elem_id="caption")
                gr.Markdown("Draw a box on the image to ask for a part of it.")
                with gr.Row():
                    describe = gr.Button("Describe it", elem_id="describe")
                    search_box = gr.Button("Search with it", elem_id="search-box")
                sentence = gr.Textbox(label="Where is …?", placeholder="a sentence", elem_id="where")
                point = gr.Button("Show a heat map", elem_id="point")
        asked = [text, image, by_region, rerank]
        for trigger in (search.click, text.submit):
            trigger(functions.search, asked, [gallery, found, status], **ONE_AT_A_TIME)
        gallery.select(functions.choose, [found], [chosen, stage, caption, map_image], **ONE_AT_A_TIME)
        describe.click(functions.describe_box, [chosen, stage], caption, **ONE_AT_A_TIME)
        search_box.click(functions.search_with_box, [chosen, stage], [gallery, found, status], **ONE_AT_A_TIME)
        for trigger in (point.click, sentence.submit):
            trigger(functions.point, [chosen, sentence], map_image, **ONE_AT_A_TIME)
    return page


class PageFunctions:
    """What the page's buttons do with one index. A hit that was chosen is passed as its id and path."""

    def __init__(self, index: Index):
        self.index = index

    def search(self, text: str, image: Image.Image | None, by_region: bool, rerank: int) -> tuple[Any, ...]:
        text = (text or "").strip()
        alone = bool(text) and image is None
        return self._found(
            text=text or None,
            image=image,
            regions=by_region and alone,
            rerank=int(rerank) if alone else 0,
        )

    def search_with_box(self, chosen: Any, stage: dict[str, Any]) -> tuple[Any, ...]:
        return self._found(image=self._image(chosen), boxes=_box_of(stage))

    def _found(self, **query: Any) -> tuple[Any, ...]:
        try:
            hits = self.index.search(**query, top=SHOWN)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        shown_hits = [(image, hit) for hit in hits if (image := self._thumbnail(hit)) is not None]
        cells = [(image, f"{hit.score:.3f}  {os.path.basename(hit.path) or hit.id}") for image, hit in shown_hits]
        gone = len(hits) - len(shown_hits)
        status = f"{len(shown_hits)} of {len(self.index):,} images" + (
            f"; {gone} are not there any more" if gone else ""
        )
        return cells, [(hit.id, hit.path) for _, hit in shown_hits], status

    def _thumbnail(self, hit: Hit) -> Image.Image | None:
        """The image, or its best region in a green frame, small enough for the gallery."""
        image = self.index.image(hit, 0 if hit.box else THUMBNAIL)  # boxes are in pixels of the whole image
        if image is not None:
            if hit.box is not None:
                width = max(max(image.size) // 60, 1)
                ImageDraw.Draw(image).rectangle(tuple(hit.box), outline=(24, 160, 88), width=width)  # type: ignore[arg-type]
            image.thumbnail((THUMBNAIL, THUMBNAIL))
        return image

    def choose(self, found: list[Any], event: gr.SelectData) -> tuple[Any, ...]:
        """Opens a result and describes it."""
        chosen = found[event.index]
        image = self._image(chosen)
        return chosen, shown(image), caption_image(self.index.loaded, image, CaptionOptions()), None

    def describe_box(self, chosen: Any, stage: dict[str, Any]) -> str:
        image = self._image(chosen)
        try:
            return caption_boxes(self.index.loaded, image, [_box_of(stage)], CaptionOptions())[0]
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def point(self, chosen: Any, sentence: str) -> Image.Image:
        if not (sentence or "").strip():
            raise gr.Error("Write a sentence to look for.", print_exception=False)
        image = self._image(chosen)
        with evaluating(self.index.loaded.model):
            heat = heat_map(self.index.loaded.model, self.index.loaded.processor, image, sentence)
        return overlay(image, heat, self.index.loaded.processor.image_processor)

    def _image(self, chosen: Any) -> Image.Image:
        if not chosen:
            raise gr.Error("Click a result first.", print_exception=False)
        image = self.index.image(Hit(id=chosen[0], path=chosen[1], score=0.0))
        if image is None:
            raise gr.Error("This image is not there any more.", print_exception=False)
        return image


def _box_of(stage: dict[str, Any]) -> list[float]:
    box = (stage or EMPTY).get("box")
    if not box:
        raise gr.Error("Draw a box on the image first.", print_exception=False)
    return [float(corner) for corner in box]


def overlay(image: Image.Image, heat: torch.Tensor, image_processor: Any) -> Image.Image:
    """
    The image with a heat map over the part of it that the model sees: red where it is highest, none below its median.

    Args:
        heat (`(rows, columns)`): of that part.
    """
    geometry = geometry_of(image_processor, *image.size)
    low, high = heat.median(), heat.max()
    strength = ((heat - low).clamp(min=0) / (high - low).clamp(min=1e-6) * 255).to(torch.uint8)
    left, top = (round(offset / scale) for offset, scale in zip(geometry.offset, geometry.scale))
    width, height = (max(round(window / scale), 1) for window, scale in zip(geometry.window, geometry.scale))
    mask = Image.fromarray(strength.numpy()).resize((width, height), Image.Resampling.BICUBIC)
    shaded = Image.blend(image, Image.new("RGB", image.size, "black"), 0.45)
    shaded.paste(image.crop((left, top, left + width, top + height)), (left, top), mask)
    red = Image.new("RGB", (width, height), (220, 40, 30))
    shaded.paste(red, (left, top), mask.point([round(value * 0.45) for value in range(256)]))
    shaded.thumbnail((640, 640))
    if max(shaded.size) < 320:
        scale = 320 / max(shaded.size)
        shaded = shaded.resize((round(shaded.width * scale), round(shaded.height * scale)))
    return shaded
