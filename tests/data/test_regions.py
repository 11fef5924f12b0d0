"""Regions from tables, from COCO's and Visual Genome's files, and from scenes."""

import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmgem.data.annotations import read_annotations
from mmgem.data.collator import RegionCollator
from mmgem.data.loading import load_pairs
from mmgem.data.pairs import BadDataError, PairDataset
from mmgem.data.regions import RegionDataset, as_regions
from mmgem.data.scenes import ScenesDataset
from mmgem.processing.image_processors_mmgem import without_center_crop
from mmgem.processing.tokenization_mmgem import CAP_TOKEN, EMB_TOKEN, IMAGE_TOKEN
from mmgem.training.arguments import DataArguments

from ..conftest import Table, make_picture


COCO = Path(__file__).parents[3] / "shared" / "data" / "coco_sample"


def row(seed=0, regions=(((2, 3, 20, 30), "a dog"),), captions=(), **columns):
    listed = [{"box": list(box), "phrase": phrase} for box, phrase in regions]
    return {"image": make_picture(seed), "regions": listed, "caption": list(captions), **columns}


def test_examples_keep_boxes_in_pixels_of_the_file():
    buffer = io.BytesIO()
    make_picture(0, (640, 480)).save(buffer, "JPEG")
    dataset = RegionDataset(Table([{**row(regions=[((10, 20, 630, 470), " a dog ")]), "image": buffer.getvalue()}]))
    dataset.least_side = 60
    example = dataset[0]
    assert example["image"].size == (80, 60), "decoded at an eighth"
    assert example["size"] == (640, 480) and example["boxes"] == [[10, 20, 630, 470]]
    assert example["phrases"] == ["a dog"]


def test_an_opened_jpeg_of_the_callers_keeps_its_size(tmp_path):
    """Otherwise it would be another picture in the next epoch, and its boxes would lie elsewhere."""
    make_picture(0, (640, 480)).save(tmp_path / "a.jpg")
    table = Table([{**row(regions=[((10, 20, 630, 470), "a dog")]), "image": Image.open(tmp_path / "a.jpg")}])
    for dataset in (RegionDataset(table), PairDataset(table)):
        dataset.least_side = 60
        table[0]["caption"] = ["a dog"]
        for _ in range(2):
            assert dataset.read(0)["image"].size == (640, 480)
    assert RegionDataset(table).read(0)["size"] == (640, 480)


def test_boxes_are_upright_as_a_viewer_shows_the_picture():
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    make_picture(0, (60, 40)).save(buffer, "JPEG", exif=exif)
    example = RegionDataset(Table([{**row(), "image": buffer.getvalue()}]))[0]
    assert example["size"] == example["image"].size == (40, 60)


def test_training_draws_regions_anew_and_mixes_in_captions_by_weight():
    regions = [((i, 0, i + 9, 9), f"part {i}") for i in range(8)]
    table = Table([row(i, regions, captions=["all of it", "the whole"]) for i in range(200)])
    dataset = RegionDataset(table, max_regions=3, whole_image_weight=0.25)
    first = [dataset[i] for i in range(200)]
    whole = [e for e in first if e["boxes"][-1] == [0, 0, 48, 40]]
    assert 30 < len(whole) < 70 and {e["phrases"][-1] for e in whole} == {"all of it", "the whole"}
    assert all(len(e["boxes"]) == len(e["phrases"]) == 3 for e in first)
    drawn = Counter(p for e in first for p in e["phrases"] if p.startswith("part"))
    assert len(drawn) == 8 and max(drawn.values()) < 2 * min(drawn.values())
    assert [dataset[i]["phrases"] for i in range(200)] == [e["phrases"] for e in first], "a function of the epoch"
    dataset.set_epoch(1)
    assert [dataset[i]["phrases"] for i in range(200)] != [e["phrases"] for e in first]


def test_evaluation_sees_every_region_in_order_and_no_caption():
    regions = [((i, 0, i + 9, 9), f"part {i}") for i in range(8)]
    dataset = RegionDataset(Table([row(0, regions, captions=["all of it"])]), whole_image_weight=1.0)
    assert dataset[0]["phrases"] == [f"part {i}" for i in range(8)]


def test_pictures_without_regions_come_whole_in_training_and_not_at_all_in_evaluation():
    table = Table([row(0, [], captions=["all of it"]), row(1)])
    training = RegionDataset(table, max_regions=2)
    assert training[0]["phrases"] == ["all of it"] and training[0]["boxes"] == [[0, 0, 48, 40]]
    with pytest.raises(BadDataError, match="no region"):
        RegionDataset(table).read(0)
    with pytest.raises(BadDataError, match="neither"):
        RegionDataset(Table([row(0, [])]), max_regions=2).read(0)


def test_regions_that_are_none_are_left_out_or_named():
    kept = [((-5, -5, 10, 10), "partly outside"), ((0, 0, 48, 40), "all")]
    lost = [((5, 5, 5, 20), "no width"), ((60, 0, 70, 10), "outside"), ((3, 3, 9, 9), "  "), ((3, 3, 9, 9), None)]
    example = RegionDataset(Table([row(0, lost + kept)])).read(0)
    assert example["phrases"] == ["partly outside", "all"]
    for wrong, message in (
        ({"phrase": "a dog"}, "box None"),
        ({"box": [1, 2, 3], "phrase": "a dog"}, "four numbers"),
        ({"box": [1, 2, 3, float("nan")], "phrase": "a dog"}, "four numbers"),
        ({"box": [1, 2, 3, 4], "phrase": 7}, "no text"),
        ("a dog", "must be"),
    ):
        with pytest.raises(BadDataError, match=rf"regions\[1\].*{message}"):
            RegionDataset(Table([{**row(), "regions": [row()["regions"][0], wrong]}])).read(0)


def test_both_forms_of_a_list_of_regions():
    expected = [([1.0, 2.0, 3.0, 4.0], "a"), ([0.0, 0.0, 9.0, 9.0], "b")]
    assert as_regions([{"box": box, "phrase": phrase} for box, phrase in expected]) == expected
    assert as_regions({"box": [box for box, _ in expected], "phrase": ["a", "b"]}) == expected
    assert as_regions(None) == []
    for wrong, message in (("[]", "must be a list"), ({"box": [[1, 2, 3, 4]], "phrase": []}, "different lengths")):
        with pytest.raises(ValueError, match=message):
            as_regions(wrong)


def test_boxes_meant_for_another_size_of_the_picture_are_refused():
    with pytest.raises(BadDataError, match="640 x 480 pixels, but the file has 48 x 40"):
        RegionDataset(Table([row(width=640, height=480)])).read(0)


@pytest.fixture
def annotations(tmp_path):
    """Three pictures of 48 x 40: 1 with captions and boxes, 2 with a box of Visual Genome's, 3 with nothing."""
    (tmp_path / "images").mkdir()
    for name in ("000000000001", "2", "3"):
        make_picture(int(name)).save(tmp_path / "images" / f"{name}.jpg")
    files = {
        "captions.json": {
            "images": [{"id": 1, "file_name": "000000000001.jpg", "width": 48, "height": 40}],
            "annotations": [{"image_id": 1, "caption": "one"}, {"image_id": 1, "caption": "uno"}],
        },
        "instances.json": {
            "images": [{"id": 1, "file_name": "000000000001.jpg", "width": 48, "height": 40}],
            "categories": [{"id": 7, "name": "dog"}],
            "annotations": [
                {"image_id": 1, "category_id": 7, "bbox": [1, 2, 10, 20], "iscrowd": 0},
                {"image_id": 1, "category_id": 7, "bbox": [0, 0, 48, 40], "iscrowd": 1},
            ],
        },
        "regions.json": [
            {"id": 2, "regions": [{"phrase": "a hat", "x": 3, "y": 4, "width": 5, "height": 6}]},
            {"id": 9, "regions": [{"phrase": "a picture that is not there", "x": 3, "y": 4, "width": 5, "height": 6}]},
        ],
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path, [str(tmp_path / name) for name in files]


def test_coco_and_visual_genome_are_joined_by_picture(annotations, caplog):
    folder, files = annotations
    table, missing = read_annotations(files, [str(folder / "images")])
    assert missing == 1
    assert [(row["caption"], row["regions"]) for row in table] == [
        (["one", "uno"], [{"box": [1, 2, 11, 22], "phrase": "dog"}]),
        ([], [{"box": [3, 4, 8, 10], "phrase": "a hat"}]),
    ]
    assert "1 images, such as 9, are not in" in caplog.text
    dataset = RegionDataset(table)
    assert [dataset[i]["phrases"] for i in range(2)] == [["dog"], ["a hat"]]


def test_ids_of_one_dataset_are_not_those_of_the_other(annotations):
    """COCO's 000000000002.jpg and Visual Genome's 2.jpg are two pictures, and neither stands in for the other."""
    folder, files = annotations
    make_picture(7).save(folder / "images" / "000000000002.jpg")
    make_picture(8).save(folder / "images" / "000000000009.jpg")
    coco = json.loads((folder / "captions.json").read_text())
    coco["images"].append({"id": 2, "file_name": "000000000002.jpg"})
    coco["annotations"].append({"image_id": 2, "caption": "two"})
    (folder / "captions.json").write_text(json.dumps(coco))
    (folder / "images" / "2.txt").write_text("no picture")
    rows = {os.path.basename(row["image"]): row for row in read_annotations(files, [str(folder / "images")])[0]}
    assert rows["000000000002.jpg"]["caption"] == ["two"] and not rows["000000000002.jpg"]["regions"]
    assert not rows["2.jpg"]["caption"] and rows["2.jpg"]["regions"][0]["phrase"] == "a hat"
    assert "000000000009.jpg" not in rows, "Visual Genome's 9 is not there"
    (folder / "other").mkdir()
    make_picture(9).save(folder / "other" / "2.jpg")
    with pytest.raises(ValueError, match="have the same name"):
        read_annotations(files, [str(folder / "images"), str(folder / "other")])


def test_files_that_are_something_else_are_named(annotations, tmp_path):
    folder, files = annotations
    images = [str(folder / "images")]
    for content, message in (("[1, 2", "not valid JSON"), ("{}", "none of COCO"), ("[]", "none of COCO")):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(ValueError, match=f"other.json.*{message}"):
            read_annotations([str(tmp_path / "other.json")], images)
    (tmp_path / "other.json").write_text('{"images": [{"id": 1}], "annotations": []}')
    with pytest.raises(ValueError, match=r"None of the images that .*other\.json describe"):
        read_annotations([str(tmp_path / "other.json")], images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="image_folders"):
        read_annotations(files, [str(tmp_path / "empty")])
    options = {"dataset_name": None, "train_annotations": files[2:], "image_folders": images}
    with pytest.raises(ValueError, match="no captions of whole images"):
        load_pairs(DataArguments(**options), 32, 0)


def test_annotations_open_nothing_outside_their_folders(annotations):
    folder, _ = annotations
    make_picture(5).save(folder / "secret.jpg")
    content = {
        "images": [{"id": 77, "file_name": "../secret.jpg", "width": 48, "height": 40}],
        "annotations": [{"image_id": 77, "caption": "not yours"}],
    }
    (folder / "evil.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="None of the images"):
        read_annotations([str(folder / "evil.json")], [str(folder / "images")])


@pytest.mark.skipif(not COCO.exists(), reason="the photographs are not here")
def test_real_annotations_fit_their_photographs(processor):
    names = ("captions_sample.json", "instances_sample.json", "region_descriptions.json")
    table, _ = read_annotations([str(COCO / "annotations" / name) for name in names], [str(COCO / "images")])
    assert len(table) == 72 and sum(map(len, table["caption"])) == 360
    dataset = RegionDataset(table, max_regions=99)
    examples = [dataset.read(i) for i in range(len(dataset))]
    assert sum(len(e["boxes"]) for e in examples) == 412 + 8 + sum(not regions for regions in table["regions"])
    for example in examples:
        width, height = example["size"]
        assert all(-1 <= x0 < x1 <= width + 1 and -1 <= y0 < y1 <= height + 1 for x0, y0, x1, y1 in example["boxes"])
    batch = RegionCollator(processor, "caption")([{**e, "bad": {}} for e in examples[:8]])
    assert batch["region_mask"].sum() == len(batch["input_ids"])


def examples_of(dataset):
    return [dataset[i] for i in range(len(dataset))]


def test_batch_for_retrieval(processor):
    table = Table([row(0), row(1, [((0, 0, 9, 9), "a cat"), ((5, 5, 9, 9), "a dog"), ((1, 1, 40, 40), "the cat")])])
    batch = RegionCollator(processor, "contrastive")(examples_of(RegionDataset(table)))
    assert batch["boxes"].shape == (2, 3, 4) and batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["region_mask"].tolist() == [[True, False, False], [True, True, True]]
    texts = [
        processor.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(batch["input_ids"], batch["attention_mask"])
    ]
    assert all(text.endswith(EMB_TOKEN) for text in texts)
    assert [t.replace("<s>", "").replace(EMB_TOKEN, "").strip() for t in texts] == [
        "a dog",
        "a cat",
        "a dog",
        "the cat",
    ]
    ids = batch["pair_ids"][:, 0].tolist()
    assert ids[0] == ids[2] and len(set(ids)) == 3, "equal phrases have equal hashes"
    assert "labels" not in batch


@pytest.mark.parametrize("k", [1, 2])
def test_batch_for_captions_is_the_processors_prompt_with_the_phrase_behind(processor, k, monkeypatch):
    monkeypatch.setattr(processor, "region_grid_size", k)
    dataset = RegionDataset(Table([row(0, [((2, 3, 20, 30), "a dog"), ((0, 0, 9, 9), "a dog on a beach")])]))
    batch = RegionCollator(processor, "caption")(examples_of(dataset))
    inputs = processor(
        images=[dataset[0]["image"]], boxes=[dataset[0]["boxes"]], task="region-caption", return_tensors="pt"
    )
    length = inputs["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], inputs["input_ids"])
    assert torch.equal(batch["boxes"], inputs["boxes"]) and torch.equal(batch["region_mask"], inputs["region_mask"])
    torch.testing.assert_close(batch["pixel_values"], inputs["pixel_values"], atol=1e-5, rtol=0)
    tokenizer = processor.tokenizer
    for ids, labels, phrase in zip(batch["input_ids"], batch["labels"], dataset[0]["phrases"]):
        assert (labels[:length] == -100).all()
        assert tokenizer.decode(labels[labels != -100]).replace(tokenizer.eos_token, "").strip() == phrase
        assert labels[labels != -100][-1] == tokenizer.eos_token_id
        assert ids.eq(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).sum() == k * k
        assert ids.eq(tokenizer.convert_tokens_to_ids(CAP_TOKEN)).sum() == processor.num_soft_prompts


def test_regions_that_the_crop_cuts_away_are_left_out(processor):
    table = Table(
        [{**row(0, [((0, 0, 9, 9), "left"), ((60, 2, 80, 30), "middle")]), "image": make_picture(0, (140, 32))}]
    )
    collate = RegionCollator(processor, "contrastive")
    assert len(collate(examples_of(RegionDataset(table)))["input_ids"]) == 1
    table[0]["regions"].pop()
    with pytest.raises(BadDataError, match="cuts away all regions of 1 images"):
        collate(examples_of(RegionDataset(table)))
    dataset = RegionDataset(table)
    dataset.image_processor = processor.image_processor  # as the Trainer sets it: such a picture is passed over
    with pytest.raises(BadDataError, match=r"the centre crop cuts all 1 of its regions away \(--do_center_crop false"):
        dataset.read(0)
    dataset.image_processor = without_center_crop(processor.image_processor)
    assert dataset.read(0)["phrases"] == ["left"]
    table[0]["regions"][0]["phrase"] = ""
    with pytest.raises(BadDataError, match="neither a caption nor a visible region"):
        dataset.read(0)
    table[0]["regions"][0]["phrase"] = "left"
    dataset.image_processor = processor.image_processor
    table[0]["caption"] = ["all of it"]
    dataset.max_regions = 3
    assert dataset.read(0)["phrases"] == ["all of it"] and dataset.read(0)["left_out"] == 1


def test_scenes_have_regions():
    dataset = RegionDataset(ScenesDataset("test", 5))
    for example in examples_of(dataset):
        caption = example["caption"]
        assert example["phrases"] and all(phrase in caption for phrase in example["phrases"])
        pixels = np.asarray(example["image"]).astype(int)
        for x0, y0, x1, y1 in np.array(example["boxes"]).astype(int):
            inside = pixels[y0:y1, x0:x1].max(-1).mean()
            assert inside > pixels[:4].max(-1).mean() + 20, "brighter than the ground at the edge"
