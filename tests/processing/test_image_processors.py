"""Image processors of checkpoints that PIL's of transformers does not cover."""

import json

import numpy as np
import pytest
import torch
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from mmgem.modeling_mmgem.towers_mmgem import VISION_TOWERS
from mmgem.processing.image_processors_mmgem import load_image_processor
from tests.conftest import make_picture


def save(folder, **settings):
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def test_siglip2_gets_the_patches_of_its_own_image_processor(tmp_path):
    own = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16, image_mean=[0.5, 0.4, 0.3])
    own.save_pretrained(tmp_path)
    processor = load_image_processor(str(tmp_path))
    picture = make_picture(0, (40, 40))  # of which its own makes a square of patches, too
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    expected = own(picture, return_tensors="pt")
    inputs = VISION_TOWERS["siglip2_vision_model"].inputs(pixels, 8)
    torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=0)
    assert inputs["spatial_shapes"].tolist() == expected["spatial_shapes"].tolist() == [[4, 4]]
    assert load_image_processor(str(tmp_path), 48)(picture, return_tensors="pt")["pixel_values"].shape[-1] == 48


@pytest.mark.parametrize(
    ("kind", "mean", "std"),
    [
        ("DINOv3ViTImageProcessorFast", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("Tipsv2ImageProcessor", [0, 0, 0], [1, 1, 1]),
    ],
)
def test_image_processors_of_torchvision_work_without_it(kind, mean, std, tmp_path):
    folder = save(tmp_path, image_processor_type=kind, size={"height": 32, "width": 32}, do_resize=True)
    picture = make_picture(1, (32, 32))
    pixels = load_image_processor(folder)(picture, return_tensors="np")["pixel_values"][0]
    expected = (np.asarray(picture).transpose(2, 0, 1) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(
        std, (3, 1, 1)
    )
    np.testing.assert_allclose(pixels, expected, atol=1e-5)
