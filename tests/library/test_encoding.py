"""`encode` of texts, images and both, beside get_embedding."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from mmgem.library import encode


def embedded(loaded, **inputs):
    with torch.no_grad():
        return loaded.model.get_embedding(**loaded.processor(**inputs, return_tensors="pt"))


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_anything_is_encoded_as_get_embedding_does(batch_size, loaded, photos):
    picture = Image.open(photos / "0.jpg")
    path = str(photos / "1.jpg")
    inputs = ["a dog", picture, path, Path(path), [picture, "but red"], ("but red", path), "about 1.jpg and more"]
    found = encode(loaded.model, loaded.processor, inputs, batch_size=batch_size)
    expected = [
        embedded(loaded, text=["a dog"]),
        embedded(loaded, images=[picture]),
        *[embedded(loaded, images=[Image.open(path)])] * 2,
        embedded(loaded, images=[picture], text=["but red"], task="embed"),
        embedded(loaded, images=[Image.open(path)], text=["but red"], task="embed"),
        embedded(loaded, text=["about 1.jpg and more"]),
    ]
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)


def test_nothing_and_a_bar(loaded, capsys):
    assert encode(loaded.model, loaded.processor, []).shape == (0, 16)
    encode(loaded.model, loaded.processor, ["a", "b", "c"], batch_size=1, show_progress_bar=True)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("missing.jpg", FileNotFoundError, r"inputs\[1\]: there is no image missing\.jpg"),
        ("", ValueError, r"inputs\[1\] is an empty text"),
        (["a", "b"], ValueError, r"inputs\[1\] holds 0 images and 2 texts"),
        ([], ValueError, r"inputs\[1\] holds 0 images and 0 texts"),
        (b"no image", ValueError, r"inputs\[1\] is no image that can be read"),
        (None, ValueError, r"inputs\[1\] is no image"),
    ],
)
def test_what_cannot_be_encoded_is_named(value, error, message, loaded):
    with pytest.raises(error, match=message):
        encode(loaded.model, loaded.processor, ["fine", value])
