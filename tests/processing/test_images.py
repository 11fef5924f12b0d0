"""What an image may be, and that the processor and the training data say the same of one that is none."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip import CLIPImageProcessorPil

from mmgem import MMGEMProcessor
from mmgem.data.pairs import BadDataError, PairDataset
from mmgem.data.regions import RegionDataset
from mmgem.processing.images_mmgem import eight_bits, read_image, to_rgb
from tests.conftest import make_picture


PICTURE = make_picture(0)
PIXELS = np.asarray(PICTURE)


def file_of(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def pixel_values(processor, images):
    return processor(images=images, return_tensors="np")["pixel_values"]


FORMS = {
    "array": PIXELS,
    "float array up to 1": PIXELS / 255,
    "float array up to 255": PIXELS.astype(np.float32),
    "int64 array": PIXELS.astype(np.int64),
    "16-bit array": PIXELS.astype(np.uint16) * 257,
    "channels first": PIXELS.transpose(2, 0, 1),
    "tensor": torch.tensor(PIXELS).permute(2, 0, 1),
    "tensor of torchvision": (torch.tensor(PIXELS).permute(2, 0, 1) / 255).requires_grad_(),
    "channels last tensor": torch.tensor(PIXELS),
    "bytes": file_of(PICTURE),
    "bytearray": bytearray(file_of(PICTURE)),
    "memoryview": memoryview(file_of(PICTURE)),
    "open file": io.BytesIO(file_of(PICTURE)),
    "bytes of datasets": {"bytes": file_of(PICTURE), "path": None},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_one_image_give_the_same_pixels(processor, form):
    expected = pixel_values(processor, PICTURE)
    for images in (FORMS[form], [FORMS[form]]):
        if form == "open file":
            FORMS[form].seek(0)
        assert np.array_equal(pixel_values(processor, images), expected)


def test_a_path_of_datasets_and_a_bfloat16_tensor(processor, tmp_path):
    PICTURE.save(tmp_path / "a.png")
    found = pixel_values(processor, [{"bytes": None, "path": str(tmp_path / "a.png")}])
    assert np.array_equal(found, pixel_values(processor, PICTURE))
    rounded = torch.tensor(PIXELS).permute(2, 0, 1).div(255).bfloat16()
    assert np.abs(pixel_values(processor, rounded) - pixel_values(processor, PICTURE)).max() < 0.02


def test_batches_are_their_images(processor):
    images = [make_picture(i) for i in range(3)]
    expected = pixel_values(processor, images)
    arrays = np.stack([np.asarray(image) for image in images])
    tensors = torch.tensor(arrays).permute(0, 3, 1, 2) / 255
    of_objects = np.empty(3, dtype=object)
    of_objects[:] = images
    for batch in (arrays, tensors, list(tensors), tuple(arrays), of_objects, iter(images)):
        assert np.array_equal(pixel_values(processor, batch), expected)


@pytest.mark.parametrize("scale", [1 / 255, 1.0])
def test_float_tiffs_are_not_black(processor, tmp_path, scale):
    grey = np.asarray(PICTURE.convert("L"))
    Image.fromarray((grey * scale).astype(np.float32)).save(tmp_path / "float.tiff")
    expected = pixel_values(processor, Image.fromarray(grey))
    assert np.array_equal(pixel_values(processor, tmp_path / "float.tiff"), expected)
    assert np.array_equal(pixel_values(processor, grey[None] * scale), expected)
    shown = PairDataset([{"image": str(tmp_path / "float.tiff"), "caption": "a"}])[0]["image"]
    assert np.array_equal(np.asarray(shown)[..., 0], grey)


@pytest.mark.parametrize("kind", ["array", "big-endian array", "PIL image", "PNG", "PPM", "TIFF"])
def test_a_dark_image_of_16_bits_is_dark(kind):
    """All values below 256, so that nothing but the dtype or the file says that they reach to 65535."""
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 4
    image = Image.fromarray(values)
    if kind == "PPM":
        content = b"P5 8 8 65535\n" + values.astype(">u2").tobytes()
    elif kind in ("PNG", "TIFF"):
        content = file_of(image, kind)
    shown = {"array": values, "big-endian array": values.astype(">u2"), "PIL image": image}.get(kind)
    shown = read_image(content if shown is None else shown)
    assert np.array_equal(np.asarray(shown)[..., 0], np.round(values / 257))


@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_dim_image_of_a_batch_stays_dim(processor, as_tensor):
    """A batch of floats up to 255, one of them nearly black: its own values alone would look like 0 to 1."""
    arrays = np.stack([PIXELS, PIXELS // 255])
    expected = pixel_values(processor, [Image.fromarray(array) for array in arrays])
    batch = arrays.astype(np.float32)
    if as_tensor:
        batch = torch.tensor(batch).permute(0, 3, 1, 2)
    assert np.array_equal(pixel_values(processor, batch), expected)


def test_transparent_arrays_are_white():
    values = np.zeros((4, 4, 4), dtype=np.uint8)
    assert to_rgb(Image.fromarray(values)).getpixel((0, 0)) == (255, 255, 255)
    assert eight_bits(np.array([[True, False]])).tolist() == [[255, 0]]


NAN = np.full((8, 8, 3), np.nan)
BAD_VALUES = {
    "NaN": (NAN, "values reach from nan to nan"),
    "normalized": (PIXELS / 127.5 - 1, r"values reach from -\d.*floats from 0 to 1.*undo the normalization"),
    "infinite": (np.full((8, 8), np.inf), "values reach from inf"),
    "too large": (np.full((8, 8), 70000), "values reach from 70000"),
    "high dynamic range": (Image.fromarray(np.full((8, 8), 1000, dtype=np.float32)), "from 1000 to 1000"),
    "32 bits": (Image.fromarray(np.full((8, 8), 2**20, dtype=np.int32)), "from 1.04858e"),
    "two channels": (np.zeros((8, 8, 2)), r"shape \(8, 8, 2\).*\(3, height, width\)"),
    "one dimension": (np.zeros((2, 3, 4, 5, 6)), r"shape \(2, 3, 4, 5, 6\)"),
    "empty": (np.zeros((0, 0, 3), dtype=np.uint8), "0 x 0 pixels"),
    "no height": (Image.new("RGB", (5, 0)), "5 x 0 pixels"),
    "strip": (np.zeros((1, 20_000, 3), dtype=np.uint8), "20000 x 1 pixels, longer than 50 times its width"),
    "long strip": (Image.new("1", (1, 200_000)), "1 x 200000 pixels"),
    "huge": (Image.new("1", (13_000, 13_000)), "13000 x 13000 pixels, more than 67108864; reduce it first"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_images_that_would_be_wrong_are_refused_by_processor_and_data(processor, name):
    image, message = BAD_VALUES[name]
    with pytest.raises(ValueError, match=rf"images\[1\] could not be read: .*{message}"):
        processor(images=[PICTURE, image])
    with pytest.raises(BadDataError, match=message):
        PairDataset([{"image": image, "caption": "a"}]).read(0)


def png_header(width, height):
    """A PNG that claims to be this large, in a few bytes."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


FILES = {
    "avif": (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1", "is an AVIF file; convert it to one of JPEG, PNG"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is an HEIC file"),
    "ico": (file_of(Image.new("RGB", (16, 16)), "ICO"), "is an ICO file"),
    "svg": (b'\xef\xbb\xbf\n<svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG file"),
    "html": (b"<!DOCTYPE HTML><html>not found</html>", "is an HTML page; download the image itself"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is a PostScript file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a pointer of Git LFS; fetch"),
    "empty": (b"", "is an empty file; write or download it again"),
    "text": (b"no picture at all", "is not an image, or a damaged one"),
    "huge": (png_header(13_000, 13_000), "13000 x 13000 pixels, more than 67108864"),
    "strip": (png_header(200_000, 1), "200000 x 1 pixels, longer than 50 times"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_none_are_named_alike(processor, tmp_path, name):
    content, message = FILES[name]
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    for image in (path, str(path), content, {"bytes": content, "path": "photo.jpg"}):
        with pytest.raises(ValueError, match=rf"images\[0\] could not be read: .*{message}"):
            processor(images=[image])
        with pytest.raises(BadDataError, match=message):
            PairDataset([{"image": image, "caption": "a"}]).read(0)
    for image in (str(path), {"bytes": content, "path": str(path)}):
        with pytest.raises(BadDataError, match=r"photo\.jpg"):
            PairDataset([{"image": image, "caption": "a"}]).read(0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "NoneType is not an image; pass a PIL image"),
        ({"a": 1}, "the dict has neither bytes nor a path, but a"),
        ({"bytes": None, "path": None}, "the dict has neither bytes nor a path"),
        (3, "int is not an image"),
        (np.array(["a"]), "ndarray is not an image"),
    ],
)
def test_what_is_no_image_is_named(processor, image, message):
    with pytest.raises(ValueError, match=rf"images\[0\] could not be read: {message}"):
        processor(images=[image])
    with pytest.raises(BadDataError):
        PairDataset([{"image": image, "caption": "a"}]).read(0)


@pytest.mark.parametrize("change", [{"image_std": [0.0, 1, 1]}, {"image_mean": [float("nan")] * 3}])
def test_an_image_processor_that_makes_nan_is_refused(processor, tmp_path, change):
    image_processor = CLIPImageProcessorPil(**{**processor.image_processor.to_dict(), **change})
    with pytest.raises(ValueError, match=f"{next(iter(change))} would make pixels NaN or infinite"):
        MMGEMProcessor(image_processor, processor.tokenizer)
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    content = json.loads(path.read_text())
    content["image_processor"].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="would make pixels NaN or infinite"):
        MMGEMProcessor.from_pretrained(tmp_path)


MASK = np.zeros((40, 48))
MASK[5:30, 10:40] = 1


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.where(MASK > 0, np.nan, 0), "holds nan"),
        (MASK * 2 - 1, r"holds -1.*mask > 0"),
        (MASK * 0.9 + 0.01, r"holds 0\.01.*mask > 0\.5"),
        (np.where(MASK > 0, np.inf, 0), "holds inf"),
    ],
)
def test_scores_are_no_masks(processor, mask, message):
    with pytest.raises(ValueError, match=rf"masks\[0\]\[0\] {message}"):
        processor(images=[PICTURE], masks=[[mask]])


@pytest.mark.parametrize("mask", [MASK > 0, MASK.astype(np.uint8) * 255, torch.tensor(MASK), MASK.astype(np.float32)])
def test_forms_of_one_mask(processor, mask):
    expected = processor(images=[PICTURE], masks=[[MASK]], return_tensors="np")["masks"]
    assert np.array_equal(processor(images=[PICTURE], masks=[[mask]], return_tensors="np")["masks"], expected)


def test_normalized_boxes_are_refused_by_processor_and_data(processor):
    message = r"All boxes lie between 0 and 1, so they are probably normalized.*\[0.1, 0.2, 0.5, 1.0\].*Multiply"
    boxes = [[0.1, 0.2, 0.5, 1.0], [0, 0, 1, 1]]
    for given in (boxes, torch.tensor(boxes, dtype=torch.float64)):
        with pytest.raises(ValueError, match=message):
            processor(images=[PICTURE], boxes=[given])
    row = {"image": PICTURE, "regions": [{"box": box, "phrase": "a"} for box in boxes]}
    with pytest.raises(BadDataError, match=message):
        RegionDataset([row]).read(0)
    assert processor(images=[PICTURE], boxes=[[[4, 0, 4.5, 1], [0, 0, 30, 30]]])["boxes"].shape == (1, 2, 4)
