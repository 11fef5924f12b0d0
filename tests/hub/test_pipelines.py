"""The pipeline region-captioning, from a base and from an adapter's folder."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from mmgem import RegionCaptioningPipeline
from mmgem.training.adapters import add_region_adapter

from ..conftest import make_model, make_picture
from .conftest import bold


BOXES = [[2.0, 3.0, 20.0, 30.0], [5.0, 5.0, 40.0, 38.0]]


@pytest.fixture(scope="module")
def describe(processor, tmp_path_factory):
    """From the folder of an adapter whose k is not the base's."""
    folder = tmp_path_factory.mktemp("pipeline")
    bold(make_model(processor)).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    model = bold(make_model(processor))
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


def near(one, other) -> bool:
    """Equal but for rounding."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(near(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(near, one, other))
    return one == other if isinstance(one, str) else one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("task", ["image-feature-extraction", "zero-shot-image-classification", "image-text-to-text"])
def test_lists_generators_and_datasets_give_what_single_inputs_give(trained, task):
    pictures = [make_picture(0), make_picture(1, (30, 60)), make_picture(2)]
    inputs, options = pictures, {}
    if task.startswith("zero"):
        options = {"candidate_labels": ["dog", "snow on a mountain"]}
    if task == "image-text-to-text":
        texts = ["<image>", "<image>the cat sat on", "a <image>"]
        inputs = [{"images": picture, "text": text} for picture, text in zip(pictures, texts)]
        options = {"max_new_tokens": 5, "return_full_text": False}
    pipe = pipeline(task, model=str(trained))
    single = [pipe(**one, **options) if isinstance(one, dict) else pipe(one, **options) for one in inputs]
    for batch_size in (1, 2, 3):
        found = [list(pipe((one for one in inputs), batch_size=batch_size, **options))]
        if inputs is pictures:
            dataset = KeyDataset([{"image": picture} for picture in pictures], "image")
            found += [pipe(inputs, batch_size=batch_size, **options)]
            found += [list(pipe(dataset, batch_size=batch_size, **options))]
        assert all(near(answer, single) for answer in found), batch_size


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


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_regions_of_any_number_in_any_form_are_captioned_as_one_by_one(describe, batch_size):
    """Among them none at all, a mask beside boxes, and one that the centre crop cuts away."""
    mask = np.zeros((40, 48), dtype=bool)
    mask[5:30, 10:40] = True
    wide, lost = make_picture(3, (200, 40)), [0, 0, 10, 10]
    inputs = [
        {"image": make_picture(0), "boxes": BOXES},
        {"image": make_picture(1), "boxes": []},
        {"image": make_picture(2), "masks": [mask]},
        {"image": wide, "boxes": [lost, [90, 5, 110, 30]]},
        {"image": make_picture(4), "boxes": np.array(BOXES[:1])},
    ]
    single = [describe(**one, max_new_tokens=4) for one in inputs]
    assert [len(regions) for regions in single] == [2, 0, 1, 2, 1]
    assert [region["caption"] is None for region in single[3]] == [True, False]
    assert len({region["caption"] for regions in single for region in regions}) > 3, "they differ"
    options = {"batch_size": batch_size, "max_new_tokens": 4}

    def captions(answer):
        return [[region["caption"] for region in regions] for regions in answer]

    assert captions(describe(inputs, **options)) == captions(single)
    assert captions(describe((one for one in inputs), **options)) == captions(single)
    boxed = [one for one in inputs if "boxes" in one and isinstance(one["boxes"], list)]
    expected = captions(single[i] for i in (0, 1, 3))
    images, boxes = [one["image"] for one in boxed], [one["boxes"] for one in boxed]
    assert captions(describe(images, boxes=boxes, **options)) == expected
    assert captions(describe(iter(images), boxes=iter(boxes), **options)) == expected
    rows = [{"image": image, "boxes": [list(map(float, box)) for box in own]} for image, own in zip(images, boxes)]
    table = Dataset.from_list(rows)
    assert captions(describe(table, **options)) == expected
    assert captions(describe(table["image"], boxes=table["boxes"], **options)) == expected
    assert captions(describe(images, boxes=(own for own in boxes), **options)) == expected
    assert captions(describe(tuple(images), boxes=iter(boxes), **options)) == expected
    alike = [make_picture(i) for i in range(3)]
    expected = [captions([describe(image, boxes=BOXES, max_new_tokens=4)])[0] for image in alike]
    arrays = np.stack([np.asarray(image) for image in alike])
    for batch in (arrays, torch.tensor(arrays).permute(0, 3, 1, 2), torch.tensor(arrays / 255)):
        assert captions(describe(batch, boxes=[BOXES] * 3, **options)) == expected
    assert describe([], boxes=[]) == describe([]) == []


def test_masks_and_options_of_generate(describe):
    mask = np.zeros((40, 48), dtype=bool)
    mask[5:30, 10:40] = True
    (region,) = describe(make_picture(0), masks=[mask], generate_kwargs={"max_new_tokens": 2, "num_beams": 2})
    assert region["mask"] is mask and isinstance(region["caption"], str)


def test_what_is_missing_is_named(describe):
    with pytest.raises(ValueError, match="needs the regions"):
        describe(make_picture(0))
    with pytest.raises(ValueError, match="2 images, but boxes holds 1"):
        describe([make_picture(0)] * 2, boxes=[BOXES])
    with pytest.raises(ValueError, match=r"boxes\[1\].*no area"):
        describe(make_picture(0), boxes=[BOXES[0], [9, 9, 3, 3]])
    images = [make_picture(0)] * 2
    with pytest.raises(ValueError, match="2 images, but boxes holds 3"):
        describe(np.stack([np.asarray(image) for image in images]), boxes=[BOXES] * 3)
    with pytest.raises(ValueError, match="more images than boxes, which end after 1"):
        list(describe(iter(images), boxes=iter([BOXES]), max_new_tokens=2))
    with pytest.raises(ValueError, match="more masks than images, which end after 2"):
        list(describe(images, masks=iter([[np.ones((40, 48))]] * 3), max_new_tokens=2))
    with pytest.raises(ValueError, match="one caption per region, but generate returned 4 for 2 regions"):
        describe(images[0], boxes=BOXES, generate_kwargs={"num_beams": 2, "num_return_sequences": 2})
    for image in (make_picture(0), np.zeros((9, 9, 3), np.uint8), [make_picture(0)]):
        with pytest.raises(ValueError, match="needs the regions"):
            describe(image)
    with pytest.raises(ValueError, match="Unknown option 'max_token'"):
        describe(make_picture(0), boxes=BOXES, max_token=3)


def test_boxes_are_judged_together_as_by_the_processor(describe):
    """A corner of one pixel beside another box is in pixels; by itself it is probably normalized."""
    found = describe(make_picture(0, (48, 48)), boxes=[[0, 0, 1, 1], [5, 5, 40, 39]], max_new_tokens=2)
    assert [type(region["caption"]) for region in found] == [str, str]
    with pytest.raises(ValueError, match="probably normalized"):
        describe(make_picture(0, (48, 48)), boxes=[[0, 0, 1, 1]])
