"""Published files of choices and questions, made here after their descriptions; swapped scenes."""

import json
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from mmgem.data.annotations import read_annotations, read_categories
from mmgem.data.choices import read_choices
from mmgem.data.pairs import BadDataError
from mmgem.data.scenes import parse_objects
from mmgem.data.swapped_scenes import swapped_scenes

from ..conftest import make_picture
from .test_triplets import png


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        make_picture(i).save(tmp_path / f"images/{i:012}.png")
    return tmp_path


def write(path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def read(folder, *files, **options):
    return read_choices(files, [str(folder / "images")], **options)


def test_sugarcrepe(folder):
    rows = {
        "0": {"filename": "000000000000.png", "caption": "a dog on a mat", "negative_caption": "a mat on a dog"},
        "1": {"filename": "000000000009.png", "caption": "snow", "negative_caption": "sand"},
        "2": {"filename": "000000000002.png", "caption": "two cats", "negative_caption": "three cats"},
    }
    found = read(folder, write(folder / "swap_obj.json", rows))
    assert [choice.texts for choice in found.choices] == [
        ["a dog on a mat", "a mat on a dog"],
        ["two cats", "three cats"],
    ]
    assert {choice.kind for choice in found.choices} == {"swap_obj"} and found.missing == 1
    images = [found.image(choice.images[0]) for choice in found.choices]
    assert [np.array_equal(image, make_picture(i).convert("RGB")) for image, i in zip(images, (0, 2))] == [True] * 2
    other = write(folder / "add_att.json", {"0": rows["0"]})
    with pytest.raises(ValueError, match="is given twice"):
        read(folder, other, other)
    both = read(folder, str(folder / "swap_obj.json"), other, limit=1)
    assert [choice.kind for choice in both.choices] == ["swap_obj", "add_att"]


def test_aro_is_about_a_part_of_the_image(folder):
    box = {"bbox_x": 4, "bbox_y": 5, "bbox_w": 20, "bbox_h": 30}
    texts = {"true_caption": "the dog is on the mat", "false_caption": "the mat is on the dog"}
    relation = {"image_id": 1, "image_path": "000000000001.png", "relation_name": "on", **box, **texts}
    attribute = {**relation, "attributes": ["red", "small"]}
    del attribute["relation_name"]
    files = (write(folder / "relation.json", [relation]), write(folder / "attribution.json", [attribute]))
    found = read(folder, *files)
    assert [choice.kind for choice in found.choices] == ["on", "red_small"]
    image = found.image(found.choices[0].images[0])
    assert np.array_equal(image, make_picture(1).convert("RGB").crop((4, 5, 24, 35)))
    assert found.choices[0].texts == list(texts.values())
    outside = {**relation, "bbox_x": 99}
    found = read(folder, write(folder / "outside.json", [outside]))
    with pytest.raises(BadDataError, match="has no area in an image of 48 x 40"):
        found.image(0)


def test_winoground_and_bivlc_have_two_images(folder):
    row = {"id": 0, "image_0": "000000000000", "image_1": "000000000001", "caption_0": "a b", "caption_1": "b a"}
    (folder / "examples.jsonl").write_text(json.dumps({**row, "collapsed_tag": "Object"}) + "\n")
    found = read(folder, str(folder / "examples.jsonl"))
    assert len(found.choices[0].images) == 2 and found.choices[0].kind == "Object"
    pictures = {name: [{"bytes": png(i), "path": None}] for i, name in enumerate(("image", "negative_image"))}
    texts = {"caption": ["a"], "negative_caption": ["b"], "type": ["swap"], "subtype": ["obj"]}
    Dataset.from_dict({**pictures, **texts}).to_parquet(folder / "bivlc.parquet")
    found = read(folder, str(folder / "bivlc.parquet"))
    assert found.choices[0].kind == "swap_obj" and found.choices[0].texts == ["a", "b"]
    assert np.array_equal(found.image(1), make_picture(1).convert("RGB"))


def test_multiple_choices(folder):
    rows = {"image": ["000000000000.png"] * 2, "choices": [["red", "blue", "green"], ["one", "two"]], "label": [2, 0]}
    Dataset.from_dict(rows).to_parquet(folder / "questions.parquet")
    found = read(folder, str(folder / "questions.parquet"))
    assert [choice.texts for choice in found.choices] == [["green", "red", "blue"], ["one", "two"]]


def test_pope(folder):
    """Its files are named .json, and hold a question in each line."""
    lines = [
        {"question_id": 1, "image": "000000000000.png", "text": "Is there a snowboard in the image?", "label": "yes"},
        {"question_id": 2, "image": "000000000000.png", "text": "Is there an orange in the image?", "label": "no"},
        {"question_id": 3, "image": "absent.png", "text": "Is there a dog in the imange?", "label": "no"},
    ]
    (folder / "coco_pope_random.json").write_text("\n".join(map(json.dumps, lines)))
    found = read(folder, str(folder / "coco_pope_random.json"), questions=True)
    assert [(choice.texts, choice.kind) for choice in found.choices] == [(["snowboard"], "yes"), (["orange"], "no")]
    assert found.missing == 1 and len(found) == 1, "one image for both questions"
    with pytest.raises(ValueError, match="is none of SugarCrepe's"):
        read(folder, str(folder / "coco_pope_random.json"))
    (folder / "one.json").write_text(json.dumps(lines[0]))
    assert len(read(folder, str(folder / "one.json"), questions=True).choices) == 1
    lines[0]["text"] = "How many dogs?"
    (folder / "bad.json").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"Example 0 of .*asks for no object"):
        read(folder, str(folder / "bad.json"), questions=True)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ([{"image": "0.png"}], "is none of SugarCrepe's"),
        ([], "is none of"),
        ("text", "holds no list of examples"),
        (
            {"0": {"filename": "000000000000.png", "caption": "a", "negative_caption": 3}},
            "has 3 as a text about image",
        ),
        ({"0": {"filename": "absent.png", "caption": "a", "negative_caption": "b"}}, "None of the images"),
        ([{"image": "000000000000.png", "choices": ["a", "b"], "label": 2}], "Example 0 of .*label 2 is none of 2"),
        ([{"image": "000000000000.png", "choices": "dog", "label": 0}], "a list of two texts at least, got 'dog'"),
        ([{"image": "000000000000.png", "choices": ["a", "b"], "label": True}], "label True is none of 2"),
        ([{"image": "000000000000.png", "choices": ["a", " "], "label": 0}], "Example 0 of .*text 1 is empty"),
        ([{"image": 5, "choices": ["a", "b"], "label": 0}], "the image 5 is no name of a file"),
    ],
)
def test_wrong_files_are_named(folder, content, fault):
    with pytest.raises(ValueError, match=fault):
        read(folder, write(folder / "file.json", content))


def test_no_path_leads_out_of_the_folders(folder):
    make_picture(5).save(folder / "secret.png")
    rows = {"0": {"filename": "../secret.png", "caption": "a", "negative_caption": "b"}}
    with pytest.raises(ValueError, match="None of the images"):
        read(folder, write(folder / "file.json", rows))


def test_refcoco(folder):
    """As MDETR published it: an image is listed once for each expression."""
    images = [
        {
            "file_name": "000000000000.png",
            "id": i,
            "caption": text,
            "height": 40,
            "width": 48,
            "dataset_name": "refcoco",
        }
        for i, text in enumerate(["man on the left", "woman in red"])
    ]
    annotations = [{"id": 7 + i, "image_id": i, "bbox": [i, 2, 10, 20], "category_id": 1} for i in range(2)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
    assert not read_categories([write(folder / "finetune.json", content)]), "its one category is none"
    rows, missing = read_annotations([write(folder / "finetune_refcoco_val.json", content)], [str(folder / "images")])
    assert len(rows) == 1 and missing == 0
    assert rows[0]["regions"] == [
        {"box": [0.0, 2.0, 10.0, 22.0], "phrase": "man on the left"},
        {"box": [1.0, 2.0, 11.0, 22.0], "phrase": "woman in red"},
    ]


def test_lvis_names_no_files(folder):
    content = {
        "images": [{"id": 2, "coco_url": "http://images.cocodataset.org/val2017/000000000002.png"}],
        "annotations": [{"image_id": 2, "bbox": [0, 0, 5, 6], "category_id": 3}],
        "categories": [{"id": 3, "name": "aerosol_can"}],
    }
    rows, _ = read_annotations([write(folder / "lvis_v1_val.json", content)], [str(folder / "images")])
    assert rows[0]["regions"] == [{"box": [0.0, 0.0, 5.0, 6.0], "phrase": "aerosol_can"}]
    assert read_categories([str(folder / "lvis_v1_val.json")]) == ["aerosol_can"]


def test_swapped_scenes():
    found = swapped_scenes("test", 30)
    assert Counter(choice.kind for choice in found.choices) == {"colour": 10, "relation": 10, "count": 10}
    for choice in found.choices:
        right, wrong = map(parse_objects, choice.texts)
        assert choice.texts[0] != choice.texts[1]
        if choice.kind == "relation":
            assert right == wrong
        elif choice.kind == "count":
            assert abs(right.total() - wrong.total()) == 1
        else:
            assert right.total() == wrong.total()
            assert Counter(c for c, _ in right.elements()) == Counter(c for c, _ in wrong.elements())
    again = swapped_scenes("test", 2)
    assert [choice.texts for choice in again.choices] == [choice.texts for choice in found.choices[:2]]
    assert np.array_equal(again.image(1), found.image(1))
    with pytest.raises(ValueError, match="Unknown split"):
        swapped_scenes("single", 3)
