"""How a model from scratch starts."""

import numpy as np
import pytest
import torch

from mmgem.data.pairs import PairDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.training.building import build_model_and_processor
from mmgem.training.model_arguments import ModelArguments
from tests.conftest import make_model


TOWERS = {
    "clip_vision_model": ("embeddings.position_embedding.weight", 1),
    "siglip_vision_model": ("embeddings.position_embedding.weight", 0),
    "vit": ("embeddings.position_embeddings", 1),
    "dinov2": ("embeddings.position_embeddings", 1),
}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def build(model_type, **vision):
    dataset = PairDataset(ScenesDataset("train", 300))
    settings = {"model_type": model_type, "image_size": 64, "patch_size": 16, **TINY, **vision}
    arguments = ModelArguments(vision_config=settings, text_config=TINY, vocab_size=300, projection_dim=16)
    return (*build_model_and_processor(arguments, dataset, max_length=30), dataset)


@pytest.mark.parametrize("model_type", TOWERS)
def test_patch_embeddings_start_uncorrelated_with_unit_variance(model_type):
    model, processor, dataset = build(model_type)
    patches = next(m for m in model.vision_model.modules() if isinstance(m, torch.nn.Conv2d))
    pictures = [dataset[i]["image"] for i in range(1, 300, 2)]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    features = torch.nn.functional.conv2d(pixels, patches.weight, stride=16).transpose(0, 1).flatten(1)
    torch.testing.assert_close(features @ features.T / features.shape[1], torch.eye(32), atol=0.2, rtol=0)


@pytest.mark.parametrize("model_type", TOWERS)
def test_positions_start_as_waves_of_unit_variance(model_type):
    model, _, _ = build(model_type)
    name, others = TOWERS[model_type]
    positions = model.vision_model.get_parameter(name).detach().view(-1, 32)
    assert len(positions) == others + 16
    grid = positions[others:].view(4, 4, 32)
    assert grid.square().mean().item() == pytest.approx(1, rel=1e-4)
    # The first half tells rows apart, the second columns; neighbours are more alike than what lies far apart.
    assert torch.equal(grid[2, 0, :16], grid[2, 3, :16]) and torch.equal(grid[0, 1, 16:], grid[3, 1, 16:])
    distances = [(grid[0, 0] - grid[k, k]).norm().item() for k in range(4)]
    assert distances == sorted(distances) and distances[1] > 0.1 * distances[3]


def test_towers_without_a_table_of_positions_or_a_convolution():
    model, _, _ = build("dinov3_vit")  # rotary positions: nothing to set
    assert model.config.vision_config.model_type == "dinov3_vit"
    with pytest.raises(ValueError, match="'siglip2_vision_model' tower cannot be trained from scratch"):
        build("siglip2_vision_model", num_patches=16)


def test_pixels_start_with_mean_0_and_deviation_1():
    _, processor, dataset = build("siglip_vision_model")
    pictures = [dataset[i]["image"] for i in range(0, 300, 3)]
    pixels = processor(images=pictures, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixels.mean((0, 2, 3)), 0, atol=0.1)
    np.testing.assert_allclose(pixels.std((0, 2, 3)), 1, atol=0.1)


def test_projections_and_head_keep_the_variance():
    model, _, _ = build("siglip_vision_model")
    for module in (model.visual_projection, model.text_projection, model.lm_head):
        assert module.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)


def test_attention_of_both_towers_is_chosen(processor, tmp_path):
    make_model(processor).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    dataset = PairDataset(ScenesDataset("train", 4, 32))
    arguments = ModelArguments(init_from=str(tmp_path), attn_implementation="eager")
    model, _ = build_model_and_processor(arguments, dataset, max_length=30)
    towers = (model.vision_model, model.language_model)
    assert {tower.config._attn_implementation for tower in towers} == {"eager"}
    arguments.attn_implementation = "flash_attention_9"
    with pytest.raises(ValueError, match="--attn_implementation flash_attention_9"):
        build_model_and_processor(arguments, dataset, max_length=30)
