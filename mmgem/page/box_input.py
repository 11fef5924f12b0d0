"""An image on which a box can be drawn with the mouse or a finger."""

import base64
import io
from typing import Any

import gradio as gr
from PIL import Image


TEMPLATE = """
<div class="stage" style="display: ${value.image ? 'inline-block' : 'none'}">
  <img src="${value.image || ''}" draggable="false" alt="the chosen image">
  <div class="box" style="display: ${value.box ? 'block' : 'none'};
    left: ${value.box ? value.box[0] / value.width * 100 : 0}%;
    top: ${value.box ? value.box[1] / value.height * 100 : 0}%;
    width: ${value.box ? (value.box[2] - value.box[0]) / value.width * 100 : 0}%;
    height: ${value.box ? (value.box[3] - value.box[1]) / value.height * 100 : 0}%"></div>
</div>
<p style="display: ${value.image ? 'none' : 'block'}; padding: 2em; opacity: 0.6">Click a result to open it here.</p>
"""
STYLE = """
.stage { position: relative; line-height: 0; touch-action: none; cursor: crosshair; user-select: none; }
.stage img { max-width: 100%; height: 420px; object-fit: contain; border-radius: 6px; }
.box { position: absolute; border: 3px solid #18a058; background: rgba(24, 160, 88, 0.15); pointer-events: none; }
"""
# While the pointer moves, the box is drawn here; when it is lifted, the value changes, and the template renders anew.
SCRIPT = """
let start = null;
const place = (event) => {
  const area = element.querySelector('.stage').getBoundingClientRect();
  return [Math.min(Math.max((event.clientX - area.left) / area.width, 0), 1),
          Math.min(Math.max((event.clientY - area.top) / area.height, 0), 1)];
};
const corners = (end) => [Math.min(start[0], end[0]), Math.min(start[1], end[1]),
                          Math.max(start[0], end[0]), Math.max(start[1], end[1])];
element.addEventListener('pointerdown', (event) => {
  if (!event.target.closest('.stage')) return;
  event.preventDefault();
  start = place(event);
});
element.addEventListener('pointermove', (event) => {
  if (!start) return;
  const [x0, y0, x1, y1] = corners(place(event));
  const box = element.querySelector('.box');
  Object.assign(box.style, {display: 'block', left: x0 * 100 + '%', top: y0 * 100 + '%',
                            width: (x1 - x0) * 100 + '%', height: (y1 - y0) * 100 + '%'});
});
window.addEventListener('pointerup', (event) => {
  if (!start) return;
  const [x0, y0, x1, y1] = corners(place(event));
  start = null;
  const {width, height} = props.value;
  const isBox = (x1 - x0) * width >= 2 && (y1 - y0) * height >= 2;
  props.value = {...props.value, box: isBox ? [x0 * width, y0 * height, x1 * width, y1 * height] : null};
  trigger('select');
});
"""
EMPTY: dict[str, Any] = {"image": "", "width": 1, "height": 1, "box": None}


def box_input() -> gr.HTML:
    """The component. Its value holds the image as a data URL, width and height in pixels, and the box or None."""
    return gr.HTML(EMPTY, html_template=TEMPLATE, css_template=STYLE, js_on_load=SCRIPT, elem_id="stage")


def shown(image: Image.Image) -> dict[str, Any]:
    """The component's value for an image without a box, whose pixels are those of the original."""
    small = image.copy()
    small.thumbnail((1024, 1024))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=90)
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {**EMPTY, "image": url, "width": image.width, "height": image.height}
