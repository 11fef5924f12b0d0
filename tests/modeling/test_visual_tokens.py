"""What a whole image is embedded from, and the k x k visual tokens in front of its caption."""

import copy

import pytest
import torch

from mmgem.data.collator import MODEL_INPUTS, PairCollator
from mmgem.modeling_mmgem.vision_mmgem import EncodedImages, encode_images
from tests.conftest import CORPUS, VISION, make_model, make_picture


def with_grid(processor, k):
    processor = copy.copy(processor)
    processor.image_grid_size = k
    return processor


def pixels_of(processor, number=2):
    images = [make_picture(i) for i in range(number)]
    return processor(images=images, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def test_each_pooling_takes_its_part_of_the_hidden_states(processor):
    pixels = pixels_of(processor)
    tower = make_model(processor).vision_model
    hidden = tower.post_layernorm(tower(pixel_values=pixels).last_hidden_state)
    class_token, mean = hidden[:, 0], hidden[:, 1:].mean(1)
    expected = {"mean": mean, "cls": class_token, "cls+mean": torch.cat([class_token, mean], 1), "tower": class_token}
    for image_pooling, pooled in expected.items():
        model = make_model(processor, config={"image_pooling": image_pooling})
        assert model.visual_projection.in_features == pooled.shape[1]
        torch.testing.assert_close(model.get_image_features(pixels).pooler_output, model.visual_projection(pooled))


@torch.no_grad()
@pytest.mark.parametrize("image_pooling", ["mean", "cls", "cls+mean"])
def test_a_whole_image_gives_the_tokens_of_the_box_around_it(processor, image_pooling):
    config = {"image_pooling": image_pooling, "image_grid_size": 2, "region_grid_size": 2}
    model = make_model(processor, config=config)
    pixels = pixels_of(processor)
    box = torch.tensor([0.0, 0, *pixels.shape[:1:-1]]).expand(2, 1, 4)
    images, regions = model._encode_images(pixels), model._encode_images(pixels, box)
    tokens = model._visual_tokens(images)
    assert tokens.shape == (8, 32)
    torch.testing.assert_close(tokens, model._visual_tokens(regions))
    quarters = images.patches.unflatten(1, (2, 2)).unflatten(3, (2, 2)).mean((2, 4)).flatten(1, 2)  # 4 x 4 patches
    if image_pooling == "cls+mean":
        class_token = images.pooled[:, None, :32].expand_as(quarters)
        quarters = torch.cat([class_token, quarters], -1)
    torch.testing.assert_close(tokens, model.caption_projection(model.visual_projection(quarters)).flatten(0, 1))


@torch.no_grad()
def test_one_token_comes_from_the_embedding_of_the_image(processor):
    model = make_model(processor, config={"image_pooling": "cls"})
    images = model._encode_images(pixels_of(processor))
    embeds = model._image_embeds(images)
    torch.testing.assert_close(model._visual_tokens(images), model.caption_projection(embeds))


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 2])
def test_captions_follow_a_prompt_of_as_many_tokens(processor, k):
    """Several at a time and one by one, and more than `generate` continues at once."""
    processor, model = with_grid(processor, k), make_model(processor, config={"image_grid_size": k})
    images = [make_picture(i) for i in range(3)]
    inputs = processor(images=images, task="caption", return_tensors="pt")
    assert inputs["input_ids"].eq(model.config.image_token_id).sum(1).tolist() == [k * k] * 3
    ids = model.generate(**inputs, max_new_tokens=6)
    for image, row in zip(images, ids):
        alone = processor(images=[image], task="caption", return_tensors="pt")
        assert torch.equal(model.generate(**alone, max_new_tokens=6)[0], row)
    prompts = processor(images=[images[0]] * 300, task="caption", return_tensors="pt")
    many = model.generate(**prompts, max_new_tokens=6)
    assert len(many) == 300 and torch.equal(many[0], many[-1])
    chat = processor(images=images[0], text="<image> a", return_tensors="pt")["input_ids"]
    assert chat.eq(model.config.image_token_id).sum() == k * k


def test_a_prompt_of_another_k_is_refused(processor):
    model = make_model(processor, config={"image_grid_size": 2})
    inputs = processor(images=[make_picture(0)], task="caption", return_tensors="pt")
    with pytest.raises((ValueError, RuntimeError), match="give 4 visual tokens"):
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("image_pooling", ["mean", "cls+mean"])
def test_packed_rows_and_kept_features_give_the_losses_of_padded_rows_and_pixels(processor, image_pooling):
    processor = with_grid(processor, 2)
    model = make_model(processor, config={"image_grid_size": 2, "image_pooling": image_pooling})
    examples = [{"image": make_picture(i), "image_id": i, "caption": CORPUS[i], "bad": {}} for i in range(4)]
    with torch.no_grad():
        pixels = PairCollator(processor).pixel_values([example["image"] for example in examples])
        pooled, patches = encode_images(model.vision_model, pixels, image_pooling)
        cells = model.pool_aggregator(patches.flatten(1, 2), patches.shape[1:3], grid_size=2).unflatten(1, (2, 2))
    kept = [
        {**example, "pooled_features": pooled[i], "patch_features": cells[i]} for i, example in enumerate(examples)
    ]
    losses = []
    for rows, pack_length in ((examples, 0), (examples, 64), (kept, 64)):
        batch = PairCollator(processor, pack_length=pack_length)(rows)
        assert ("pixel_values" in batch) == (rows is examples)
        outputs = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch}, return_loss=False)
        texts = outputs.text_embeds[batch["text_index"]]
        # In the order of the images, which packing changes.
        diagonal = (texts * outputs.image_embeds).sum(1).sort().values
        losses.append(torch.cat([outputs.caption_loss[None], diagonal]))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[1])


@torch.no_grad()
def test_each_patch_is_embedded_by_itself(processor):
    pixels = pixels_of(processor)
    tower = make_model(processor).vision_model
    hidden = tower.post_layernorm(tower(pixel_values=pixels).last_hidden_state)
    for image_pooling in ("mean", "cls+mean"):
        model = make_model(processor, config={"image_pooling": image_pooling})
        model.region_projection.weight.normal_(std=0.2)
        patches = hidden[:, 1:]
        if image_pooling == "cls+mean":
            patches = torch.cat([hidden[:, :1].expand_as(patches), patches], -1)
        expected = model.region_projection(model.visual_projection(patches))
        expected = expected / expected.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(model.get_patch_embedding(pixels), expected)


def test_tokens_that_do_not_fit_the_patches_are_refused(processor):
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"must lie in \[1, 4\], got {k}"):
            make_model(processor, config={"image_grid_size": k})


def test_images_smaller_than_the_grid_are_refused(processor):
    """DINOv2 takes images of any size, whatever its configuration says."""
    vision = {**VISION, "model_type": "dinov2", "mlp_ratio": 2}
    model = make_model(processor, config={"image_grid_size": 4, "vision_config": vision})
    inputs = with_grid(processor, 4)(images=[make_picture(0)], task="caption", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
    inputs["pixel_values"] = inputs["pixel_values"][..., :24, :24]
    with pytest.raises(ValueError, match="image_grid_size is 4, but these images have 3 x 3 patches only"):
        model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match="3 x 3 patches only"):
        model.compact_features(inputs["pixel_values"], 4)


@pytest.mark.parametrize(
    ("vision", "image_pooling", "message"),
    [
        ({"model_type": "siglip_vision_model", "vision_use_head": False}, "cls", "has no class token"),
        ({"model_type": "siglip_vision_model", "vision_use_head": False}, "tower", "set vision_use_head"),
        ({"model_type": "dinov2"}, "tower", "has no image embedding of its own; choose mean, cls or cls"),
    ],
)
def test_a_pooling_that_the_tower_does_not_have_is_refused(processor, vision, image_pooling, message):
    with pytest.raises(ValueError, match=message):
        make_model(processor, config={"vision_config": {**VISION, **vision}, "image_pooling": image_pooling})


def test_images_without_patches_are_one_token(processor):
    model = make_model(processor)
    pooled = torch.randn(3, 32)
    assert model._visual_tokens(EncodedImages(pooled, None)).shape == (3, 32)


@torch.no_grad()
def test_vectors_of_an_index_get_the_captions_of_their_images(processor):
    """Of any norm, and with the beginning of a caption."""
    model = make_model(processor, config={"image_pooling": "tower"})
    model.visual_projection.weight.normal_(std=2.0)  # so that images differ
    images = [make_picture(i) for i in range(3)]
    index = model.get_embedding(**processor(images=images, return_tensors="pt"))
    for options in ({}, {"text": "a"}):
        inputs = processor(images=images, task="caption", return_tensors="pt", **options)
        expected = model.generate(**inputs, max_new_tokens=6)
        assert len(expected.unique(dim=0)) > 1
        for vectors in (index, 7 * index.numpy()):
            prompts = processor(image_embeds=vectors, task="caption", return_tensors="pt", **options)
            assert torch.equal(model.generate(**prompts, max_new_tokens=6), expected)


@torch.no_grad()
def test_captions_of_a_large_index_come_in_parts(processor, monkeypatch):
    model = make_model(processor, config={"image_pooling": "tower"})
    prompts = processor(image_embeds=torch.randn(7, 16), task="caption", return_tensors="pt")
    whole = model.generate(**prompts, max_new_tokens=6)
    rows, forward = [], model.language_model.forward

    def count(**kwargs):
        rows.append(len(kwargs["inputs_embeds"]))
        return forward(**kwargs)

    monkeypatch.setattr("mmgem.modeling_mmgem.generation_mmgem.MAX_ROWS", 3)
    monkeypatch.setattr(model.language_model, "forward", count)
    assert torch.equal(model.generate(**prompts, max_new_tokens=6), whole)
    assert max(rows) == 3


@pytest.mark.parametrize(
    ("config", "vectors", "message"),
    [
        ({}, torch.ones(1, 16), "image_pooling 'tower' and image_grid_size 1, not 'mean' and 1"),
        ({"image_pooling": "tower", "image_grid_size": 2}, torch.ones(1, 16), "not 'tower' and 2"),
        ({"image_pooling": "tower"}, torch.ones(1, 8), r"shape \(1, 8\), but must be \(images, 16\)"),
        ({"image_pooling": "tower"}, torch.zeros(1, 16), "a vector of zeros"),
        ({"image_pooling": "tower"}, torch.full((1, 16), torch.nan), "NaN"),
    ],
)
def test_vectors_that_are_not_of_this_tower_are_refused(processor, config, vectors, message):
    model = make_model(processor, config=config)
    inputs = processor(image_embeds=vectors, task="caption", return_tensors="pt")
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=2)


def test_vectors_of_an_index_are_for_captions(processor):
    for options in ({}, {"task": "caption", "images": [make_picture(0)]}, {"text": "a"}):
        with pytest.raises(ValueError, match=r"image_embeds stand for the images of task=.caption."):
            processor(image_embeds=torch.ones(1, 16), **options)


def test_vectors_of_an_index_have_no_regions_and_no_pixels(processor):
    model = make_model(processor, config={"image_pooling": "tower"})
    inputs = processor(image_embeds=torch.ones(1, 16), task="caption", return_tensors="pt")
    for name in ("pixel_values", "boxes"):
        with pytest.raises(ValueError, match=f"image_embeds stand for whole images, without {name}"):
            model.generate(**inputs, **{name: torch.ones(1, 1, 4)}, max_new_tokens=2)
