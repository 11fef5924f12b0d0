"""The pipeline region-captioning, from a base and from an adapter's folder."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from mmgem import RegionCaptioningPipeline
from mmgem.training.region_adapters import add_region_adapter

from ..conftest import make_model, make_picture


BOXES = [[2.0, 3.0, 20.0, 30.0], [5.0, 5.0, 40.0, 38.0]]


@pytest.fixture(scope="module")
def describe(processor, tmp_path_factory):
    """From the folder of an adapter whose k is not the base's."""
    folder = tmp_path_factory.mktemp("pipeline")
    make_model(processor).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    model = make_model(processor)
    model.config._name_or_path = model.name_or_path = str(folder / "base")
    adapter = add_region_adapter(model, "region-caption", 2)
    with torch.no_grad():
        model.soft_prompts.modules_to_save["default"].weight.normal_()
    adapter.save_pretrained(folder / "adapter")
    return pipeline("region-captioning", model=str(folder / "adapter"))


def test_the_adapter_beside_a_model_is_found(trained):
    describe = pipeline("region-captioning", model=str(trained))
    assert describe.model.active_adapters() == ["region-caption"] and describe.model.region_grid_size == 2
    expected = pipeline("region-captioning", model=str(trained / "region-caption"))
    picture = make_picture(0)
    assert describe(picture, boxes=BOXES, max_new_tokens=4) == expected(picture, boxes=BOXES, max_new_tokens=4)


def test_batches_give_what_single_inputs_give(trained):
    pictures = [make_picture(0), make_picture(1, (30, 60))]
    caption = pipeline("image-text-to-text", model=str(trained))
    image = [{"type": "image", "image": pictures[0]}]
    chats = [
        [{"role": "user", "content": [*image, *text]}] for text in ([], [{"type": "text", "text": "the cat sat"}])
    ]
    options = {"max_new_tokens": 5, "return_full_text": False}
    single, batched = (caption(text=chats, batch_size=n, **options) for n in (1, 2))
    assert [answer[0]["generated_text"] for answer in batched] == [answer[0]["generated_text"] for answer in single]
    extract = pipeline("image-feature-extraction", model=str(trained))
    np.testing.assert_allclose(extract(pictures, batch_size=2), extract(pictures), atol=1e-6)
    classify = pipeline("zero-shot-image-classification", model=str(trained))
    single, batched = (classify(pictures, candidate_labels=["dog", "snow"], batch_size=n) for n in (1, 2))
    for one, other in zip(single, batched):
        assert {s["label"]: round(s["score"], 5) for s in one} == {s["label"]: round(s["score"], 5) for s in other}


def test_a_model_that_has_an_adapter_keeps_it(trained):
    model = AutoModelForImageTextToText.from_pretrained(trained)
    model.load_adapter(str(trained / "region-caption"), adapter_name="mine")
    model.disable_adapters()
    describe = pipeline("region-captioning", model=model, processor=AutoProcessor.from_pretrained(trained))
    assert list(describe.model.peft_config) == ["mine"]


def test_regions_of_one_picture_and_of_several(describe):
    assert isinstance(describe, RegionCaptioningPipeline) and describe.model.region_grid_size == 2
    images = [make_picture(0), make_picture(1, (30, 60)), make_picture(2)]
    one = describe(images[0], boxes=BOXES, max_new_tokens=4)
    assert [region["box"] for region in one] == BOXES and all(isinstance(r["caption"], str) for r in one)
    several = describe(images, boxes=[BOXES, [], BOXES[:1]], max_new_tokens=4)
    assert several[0] == one and several[1] == [] and len(several[2]) == 1
    assert describe(images[0], boxes=BOXES[1:], max_new_tokens=4) == one[1:], "a region does not know of the others"


def test_masks_and_options_of_generate(describe):
    mask = np.zeros((40, 48), dtype=bool)
    mask[5:30, 10:40] = True
    (region,) = describe(make_picture(0), masks=[mask], generate_kwargs={"max_new_tokens": 2, "num_beams": 2})
    assert region["mask"] is mask and isinstance(region["caption"], str)


def test_what_is_missing_is_named(describe):
    with pytest.raises(ValueError, match="needs the regions"):
        describe(make_picture(0))
    with pytest.raises(ValueError, match="2 pictures, but boxes holds 1"):
        describe([make_picture(0)] * 2, boxes=[BOXES])
    with pytest.raises(ValueError, match=r"boxes\[0\]\[0\].*no area"):
        describe(make_picture(0), boxes=[[9, 9, 3, 3]])
    with pytest.raises(ValueError, match="Unknown option 'max_token'"):
        describe(make_picture(0), boxes=BOXES, max_token=3)
