"""Figures of regions against the definition, heat maps against their patches."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmgem.data.pairs import BadDataError
from mmgem.data.regions import RegionDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.evaluation.region_report import draw_heat_map, region_sheet, with_boxes
from mmgem.evaluation.regions import (
    caption_regions,
    evaluate_regions,
    heat_map,
    patches_inside,
    region_caption_metrics,
)

from ..conftest import Table, make_model, make_picture


PHRASES = ["a dog", "the cat", "two people", "a dog", "snow", "red bicycles"]
BOXES = [[0, 0, 20, 20], [20, 10, 48, 40], [4, 20, 30, 38]]


@pytest.fixture
def dataset():
    """Two pictures of three regions and one that cannot be read; the first and the fourth share a phrase."""
    rows = [
        {"image": make_picture(i), "regions": [{"box": b, "phrase": p} for b, p in zip(BOXES, PHRASES[3 * i :])]}
        for i in range(2)
    ]
    return RegionDataset(Table([rows[0], {"image": b"?", "regions": rows[0]["regions"]}, rows[1]]))


def test_retrieval_and_pointing_game_against_the_definition(model, processor, dataset):
    metrics, outputs = evaluate_regions(model, processor, dataset, "region-retrieval", batch_size=1)
    regions = outputs["regions"]
    assert [region["phrase"] for region in regions] == PHRASES and {region["index"] for region in regions} == {0, 2}
    embeds, hits, areas = [], [], []
    for i, region in enumerate(regions):
        image = dataset.read(region["index"])["image"]
        inputs = processor(images=[image], boxes=[[region["box"]]], return_tensors="pt")
        embeds.append(model.get_embedding(**inputs)[0, 0])
        heat = heat_map(model, processor, image, region["phrase"])
        row, column = divmod(int(heat.argmax()), heat.shape[1])
        x0, y0, x1, y1 = inputs["boxes"][0, 0].tolist()
        centres = [(8 * c + 4, 8 * r + 4) for r in range(4) for c in range(4)]
        areas.append(sum(x0 <= x <= x1 and y0 <= y <= y1 for x, y in centres) / 16)
        hits.append(x0 <= 8 * column + 4 <= x1 and y0 <= 8 * row + 4 <= y1)
        assert region["hit"] == hits[i]
    assert metrics["pointing_game"] == pytest.approx(np.mean(hits))
    assert metrics["pointing_game_chance"] == pytest.approx(np.mean(areas))
    phrases = sorted(set(PHRASES))
    texts = [model.get_embedding(**processor(text=[p], return_tensors="pt"))[0] for p in phrases]
    similarity = torch.stack([torch.stack([e @ t for t in texts]) for e in embeds])
    ranks = [int((row >= row[phrases.index(p)]).sum()) for row, p in zip(similarity, PHRASES)]
    assert metrics["region_to_phrase_R@1"] == pytest.approx(np.mean([rank == 1 for rank in ranks]))
    best = [PHRASES[int(column.argmax())] for column in similarity.T]
    assert metrics["phrase_to_region_R@1"] == pytest.approx(np.mean([a == b for a, b in zip(best, phrases)]))
    again, _ = evaluate_regions(model, processor, dataset, "region-retrieval", batch_size=64)
    assert again == pytest.approx(metrics)


def test_boxes_of_one_picture_that_share_a_phrase_are_one_place(model, processor):
    """A hit in either counts for both, and chance is their union."""
    regions = [{"box": box, "phrase": "a dog"} for box in ([0, 0, 32, 16], [0, 16, 32, 32])]
    dataset = RegionDataset(Table([{"image": make_picture(0, (32, 32)), "regions": regions}]))
    metrics, outputs = evaluate_regions(model, processor, dataset, "region-retrieval")
    assert [region["hit"] for region in outputs["regions"]] == [True, True]
    assert metrics["pointing_game_chance"] == 1


def test_a_heat_map_without_a_highest_place_points_nowhere(processor):
    model = make_model(processor)
    with torch.no_grad():
        for parameter in model.vision_model.parameters():
            parameter.zero_()
        model.vision_model.post_layernorm.bias.fill_(1)
    dataset = RegionDataset(Table([{"image": make_picture(0), "regions": [{"box": [0, 0, 24, 40], "phrase": "a"}]}]))
    metrics, _ = evaluate_regions(model, processor, dataset, "region-retrieval")
    assert 0 < metrics["pointing_game_chance"] < 1 and metrics["pointing_game"] == 0


def test_embeddings_that_are_no_numbers_name_the_region(processor, dataset):
    for stage, projection in (("region-retrieval", "visual_projection"), ("region-caption", "text_projection")):
        model = make_model(processor)
        with torch.no_grad():
            model.get_submodule(projection).weight.fill_(float("nan"))
        with pytest.raises(ValueError, match=r"region \[0.0, 0.0, 20.0, 20.0\] of image 0"):
            evaluate_regions(model, processor, dataset, stage)


def test_captions_are_those_of_each_region_alone(model, processor, dataset):
    regions = caption_regions(model, processor, dataset, batch_size=2, max_new_tokens=4)
    for region in regions:
        image = dataset.read(region["index"])["image"]
        inputs = processor(images=[image], boxes=[[region["box"]]], task="region-caption", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert processor.batch_decode(ids, skip_special_tokens=True)[0].strip() == region["caption"]
    metrics, _ = evaluate_regions(model, processor, dataset, "region-caption")
    assert set(metrics) == {"region_caption_exact", "region_caption_cider", "dense_captioning_map"}
    for region in regions:
        image = dataset.read(region["index"])["image"]
        embed = model.get_embedding(**processor(images=[image], boxes=[[region["box"]]], return_tensors="pt"))[0, 0]
        if region["caption"]:
            text = model.get_embedding(**processor(text=[region["caption"]], return_tensors="pt"))[0]
            assert region["score"] == pytest.approx(float((embed @ text).detach()), abs=1e-5)


def test_what_counts_as_right_in_a_caption():
    written = ["a small red star", "a large red star", "red", "a small red star and a blue star"]
    region = {"index": 0, "phrase": "a small red star", "score": 0.5}
    regions = [{**region, "box": [9 * i, 0, 9 * i + 8, 8], "caption": caption} for i, caption in enumerate(written)]
    metrics = region_caption_metrics(regions, RegionDataset(ScenesDataset("test", 1)))
    assert metrics["region_caption_exact"] == 0.25
    assert metrics["region_caption_size"] == 0.5
    assert metrics["region_caption_colour"] == 0.75, "a second colour is wrong"
    assert metrics["region_caption_shape"] == 0.75
    assert 0.25 < metrics["dense_captioning_map"] < 1


def test_what_is_left_out_is_logged(model, processor, dataset, caplog):
    for count, stage in enumerate(("region-caption", "region-retrieval"), 1):
        dataset.table[0]["regions"].append({"box": [500, 500, 510, 510], "phrase": "nothing"})
        evaluate_regions(model, processor, dataset, stage)
        assert f"2 of 3 images or regions of them are left out, such as {count} regions of image 0" in caplog.text


def test_nothing_readable_is_an_error(model, processor):
    dataset = RegionDataset(Table([{"image": b"?", "regions": [{"box": [0, 0, 9, 9], "phrase": "a"}]}]))
    for stage in ("region-caption", "region-retrieval"):
        with pytest.raises(BadDataError, match="None of the 1 images"):
            evaluate_regions(model, processor, dataset, stage)


def test_patches_inside_by_hand(model):
    """A map of 4 x 4 patches of 8 pixels; a box between all centres has the patch that its own centre lies in."""
    boxes = torch.tensor([[[0.0, 0.0, 32.0, 32.0], [3.0, 11.0, 13.0, 21.0], [14.0, 14.0, 15.0, 15.0]]])
    inside = patches_inside(model, {"pixel_values": torch.zeros(1, 3, 32, 32), "boxes": boxes}).view(3, 4, 4)
    assert inside[0].all()
    assert inside[1].nonzero().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert inside[2].nonzero().tolist() == [[1, 1]]
    behind = torch.tensor([[[33.0, 9.0, 38.0, 15.0]]])  # pixels that make up no whole patch
    inside = patches_inside(model, {"pixel_values": torch.zeros(1, 3, 38, 38), "boxes": behind}).view(4, 4)
    assert inside.nonzero().tolist() == [[1, 3]]


def test_a_single_region_has_no_cider(model, processor):
    dataset = RegionDataset(Table([{"image": make_picture(0), "regions": [{"box": BOXES[0], "phrase": "a dog"}]}]))
    metrics, _ = evaluate_regions(model, processor, dataset, "region-caption")
    assert set(metrics) == {"region_caption_exact", "dense_captioning_map"}


def test_heat_map_is_the_similarity_of_every_patch_as_a_region(processor):
    model = make_model(processor)
    with torch.no_grad():
        model.region_projection.weight.normal_()
    image = make_picture(0, (32, 32))
    heat = heat_map(model, processor, image, "a dog")
    patches = [[[8.0 * c, 8.0 * r, 8.0 * c + 8, 8.0 * r + 8] for r in range(4) for c in range(4)]]
    masks = np.zeros((1, 16, 32, 32))
    for i, (x0, y0, x1, y1) in enumerate(patches[0]):
        masks[0, i, int(y0) : int(y1), int(x0) : int(x1)] = 1
    embeds = model.get_embedding(**processor(images=[image], masks=masks, return_tensors="pt"))[0]
    text = model.get_embedding(**processor(text=["a dog"], return_tensors="pt"))[0]
    torch.testing.assert_close(heat, (embeds @ text).view(4, 4), atol=1e-5, rtol=0)


def test_drawn_heat_lies_where_it_belongs_and_the_cut_away_part_stays_grey(processor):
    heat = torch.zeros(4, 4)
    heat[1, 2] = 1  # of the square in the middle of a picture twice as wide as high
    drawn = np.asarray(draw_heat_map(Image.new("RGB", (128, 64), "grey"), heat, processor)).astype(int)
    assert drawn.shape == (64, 128, 3)
    warm = drawn[..., 0] - drawn[..., 2]
    row, column = divmod(int(warm.argmax()), 128)
    assert abs(row - 24) <= 8 and abs(column - (32 + 40)) <= 8
    assert (drawn[:, :32] == 128).all() and (drawn[:, 96:] == 128).all()
    assert (drawn[40:, 40:56, 2] > drawn[40:, 40:56, 0]).all(), "cold is blue"


def test_frames_and_sheets(model, processor, dataset):
    framed = np.asarray(with_boxes(Image.new("RGB", (168, 168)), [[10.0, 20.0, 60.0, 90.0]]))
    assert framed[20:90, 10].any(-1).all() and framed[20, 10:60].any(-1).all() and not framed[30:80, 20:50].any()
    regions = caption_regions(model, processor, dataset, max_new_tokens=3)
    outputs = {"stage_1": regions, "stage_2": regions}
    sheet = np.asarray(region_sheet(dataset, outputs))
    assert sheet.shape[1] > 400 and len(set(map(tuple, sheet.reshape(-1, 3)[::7]))) > 50
