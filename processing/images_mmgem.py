"""Files, arrays and PIL images to PIL images in RGB; format and size are checked before anything is decoded."""

import io
import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_utils import load_image


MAX_PIXELS = 2**26  # 67 megapixels, 200 MB decoded
MAX_ASPECT_RATIO = 50
# Fewer than Pillow reads, because some of its readers start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
CONVERT = f"convert it to one of {', '.join(FORMATS)}"
# The first bytes, in lower case, of other files that are often called .jpg, and what to do about each. "ftyp" follows
# four bytes for the length of the box.
OTHER_FORMATS = {
    b"\0\0\1\0": f"an ICO file; {CONVERT}",
    b"%pdf": f"a PDF file; {CONVERT}",
    b"%!ps": f"a PostScript file; {CONVERT}",
    b"8bps": f"a PSD file; {CONVERT}",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file with git lfs pull",
    b"<svg": f"an SVG file; {CONVERT}",
    b"<?xml": f"an SVG or XML file; {CONVERT}",
    b"<!doctype html": "an HTML page; download the image itself",
    b"<html": "an HTML page; download the image itself",
    **dict.fromkeys((b"ftypavif", b"ftypavis"), f"an AVIF file; {CONVERT}"),
    **dict.fromkeys((b"ftypheic", b"ftypmif1"), f"an HEIC file; {CONVERT}"),
    b"ftyp": f"a video, or an image in its container; {CONVERT}",
}
CHANNELS = (1, 3, 4)


def read_image(value: Any) -> Image.Image:
    """
    An image in RGB.

    Args:
        value: a PIL image, a path, URL or base64 text, an open file or its bytes, `datasets`' `{"bytes", "path"}`, or
            an array or tensor as [`image_of_array`] takes it. A URL is read by transformers, which makes transparency
            black; it is white everywhere else.

    Raises:
        ValueError, OSError: for everything else, saying what it is and how to convert it.
    """
    if isinstance(value, dict):
        value = encoded_image(value)
    if hasattr(value, "read"):
        value = value.read()
    if isinstance(value, str) and not os.path.isfile(value):
        value = load_image(value)
    if isinstance(value, bytearray | memoryview):
        value = bytes(value)
    if not isinstance(value, str | bytes | os.PathLike | Image.Image):
        value = image_of_array(value)
    return to_rgb(open_image(value))


def is_one_image(value: Any) -> bool:
    """Whether a value is one image: a file, dict or PIL image, an array of 2 or 3 dimensions, or not iterable."""
    encoded = str | bytes | bytearray | memoryview | dict | os.PathLike
    is_image = isinstance(value, encoded | Image.Image) or hasattr(value, "read") or not hasattr(value, "__iter__")
    return is_image or getattr(value, "ndim", 1) in (2, 3)


def with_one_scale(images: Any) -> Any:
    """A batch `(B, …)` in one array or tensor, scaled as a whole by [`eight_bits`], so that a dim image stays dim."""
    if getattr(images, "ndim", 1) != 4:
        return images
    values = eight_bits(as_array(images))
    return torch.from_numpy(values) if isinstance(images, torch.Tensor) else values


def encoded_image(value: dict[str, Any]) -> bytes | str:
    """The bytes of `datasets`' `{"bytes", "path"}`, or else its path. Raises ValueError if it has neither."""
    content = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if content is None:
        raise ValueError(f"the dict has neither bytes nor a path, but {', '.join(map(str, value)) or 'nothing'}")
    return content


def open_image(content: bytes | str | os.PathLike | Image.Image) -> Image.Image:
    """
    An image, not decoded yet, of one of `FORMATS`, with at most `MAX_PIXELS` and no side more than `MAX_ASPECT_RATIO`
    times the other: a longer strip, resized to the model's input, would fill the memory.

    Raises:
        ValueError, OSError, Image.DecompressionBombError: for any other file, naming its format or size.
    """
    if isinstance(content, Image.Image):
        image = content
    else:
        try:
            image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS)
        except UnidentifiedImageError:
            name = "the file" if isinstance(content, bytes) else str(os.fspath(content))
            raise UnidentifiedImageError(f"{name} is {_format_of(content)}") from None
    check_size(*image.size)
    return image


def check_size(width: int, height: int) -> None:
    """Raises ValueError or Image.DecompressionBombError for an image too large or too narrow to decode and resize."""
    size = f"{width} x {height} pixels"
    if min(width, height) < 1:
        raise ValueError(f"{size}, so there is nothing to see")
    if width * height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{size}, more than {MAX_PIXELS}; reduce it first (Image.thumbnail)")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"{size}, longer than {MAX_ASPECT_RATIO} times its width; cut it into parts")


def _format_of(content: bytes | str | os.PathLike) -> str:
    if isinstance(content, bytes):
        start = content[:64]
    else:
        with open(content, "rb") as file:
            start = file.read(64)
    if not start:
        return "an empty file; write or download it again"
    start = start[4:] if start[4:8] == b"ftyp" else start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    known = (name for signature, name in OTHER_FORMATS.items() if start.startswith(signature))
    return next(known, f"not an image, or a damaged one; write it again, or {CONVERT}")


def image_of_array(value: Any) -> Image.Image:
    """
    The image of an array or tensor, `(height, width)`, `(height, width, channels)` or `(channels, height, width)`,
    with 1, 3 or 4 channels; if both ends could be the channels, a tensor has them first and an array last.

    Raises:
        ValueError: for anything else, and for values that [`eight_bits`] refuses.
    """
    is_tensor = hasattr(value, "detach")
    array = as_array(value) if hasattr(value, "__array__") else np.empty(0, dtype=object)
    if array.dtype.kind not in "biuf":
        kind = type(value).__name__
        raise ValueError(f"{kind} is not an image; pass a PIL image, a path, a URL, bytes, an array or a tensor")
    if array.ndim == 3 and array.shape[0] in CHANNELS and (is_tensor or array.shape[2] not in CHANNELS):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in CHANNELS):
        raise ValueError(
            f"an array of shape {array.shape} is not an image: it needs the shape (height, width), (height, width, 3) "
            "or (3, height, width)"
        )
    check_size(array.shape[1], array.shape[0])
    return Image.fromarray(eight_bits(array))


def as_array(value: Any) -> np.ndarray:
    """A NumPy array of numbers, or of a tensor on any device, of any dtype, with or without a gradient."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value  # which NumPy does not know
    return np.asarray(value)


def eight_bits(values: np.ndarray) -> np.ndarray:
    """
    Values as uint8: booleans and floats up to 1 times 255, integers of 16 bits divided by 257, others unchanged.
    Integers have 16 bits if their dtype is uint16, or a wider one with values above 255.

    Raises:
        ValueError: for NaN, negative and too large values.
    """
    if values.dtype == np.uint8:
        return values
    low, high = float(values.min()), float(values.max())
    is_float = values.dtype.kind == "f"
    if not (low >= 0 and high <= (255 if is_float else 65535)):
        raise ValueError(
            f"its values reach from {low:g} to {high:g}, but an image has floats from 0 to 1 (or to 255), or integers "
            "of 8 or 16 bits; undo the normalization, or scale and clip them first"
        )
    is_16_bit = high > 255 or (values.dtype.kind == "u" and values.dtype.itemsize == 2)
    scale = 255.0 if values.dtype == bool or (is_float and high <= 1) else 1 / 257 if is_16_bit else 1.0
    return (values.astype(np.float64) * scale).round().astype(np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """
    The image as a viewer shows it: EXIF orientation applied, transparency over white, 16-bit and float scaled to 8.

    Grey, palette, RGBA, CMYK, 16-bit and float images all become RGB.

    Raises:
        ValueError: for 32-bit and float images whose values [`eight_bits`] refuses.
    """
    is_16_bit = image.mode.startswith("I") and image.format in ("PNG", "PPM")
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow opens PNG and PPM of 16 bits as I;16 or I; its own conversion clips them at 255.
        values = np.asarray(image, dtype=np.uint16 if is_16_bit else None)
        return Image.fromarray(eight_bits(values)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
