"""The built-in scenes: true captions, honest splits."""

from collections import Counter

import numpy as np
import pytest

from mmgem.data.scenes import SHAPES, ScenesDataset, draw, parse_objects, relation


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@pytest.fixture(scope="module")
def train():
    return ScenesDataset("train", 4000)


@pytest.fixture(scope="module")
def test():
    return ScenesDataset("test", 500)


def test_same_seed_same_scenes_whatever_the_order_or_size(train):
    shorter = ScenesDataset("train", 20)
    assert shorter["caption"] == train["caption"][:20]
    first, again = train[7], train[7]
    assert np.array_equal(np.asarray(first["image"]), np.asarray(again["image"]))
    assert first["long_caption"] == again["long_caption"]
    assert ScenesDataset("train", 20, seed=1)["caption"] != shorter["caption"]


def test_another_size_is_the_same_scene(test):
    large = ScenesDataset("test", 60, image_size=224)
    assert large["caption"] == test["caption"][:60]
    for small, big in zip((test[i] for i in range(60)), large):
        assert big["image"].size == (224, 224)
        for a, b in zip(small["regions"], big["regions"]):
            # Half a pixel of rounding on each side. A tip of 36 degrees (star) or 53 (triangle) is narrower than a
            # pixel for its last 1.5 pixels, so its box may end another one earlier.
            pixels = 2 if a["label"] in ("star", "triangle") else 1
            assert np.abs(np.array(a["box"]) * 3.5 - b["box"]).max() <= pixels * 3.5


def test_held_out_captions_never_occur_in_training_read_from_either_end(train, test):
    def backwards(scene):
        phrases = [item.phrase for item in scene.objects][::-1]
        relations = [OPPOSITE[relation(a, b)] for a, b in zip(scene.objects, scene.objects[1:])][::-1]
        return f"a {phrases[0]}" + "".join(f" {r} a {p}" for r, p in zip(relations, phrases[1:]))

    validation = ScenesDataset("validation", 500)
    seen = set(train["caption"]) | {backwards(scene) for scene in train.scenes}
    assert not seen & set(test["caption"]) and not seen & set(validation["caption"])
    assert not set(test["caption"]) & set(validation["caption"])
    assert len(set(test["caption"])) == 500
    assert min(len(scene.objects) for scene in test.scenes) == 2
    assert {len(scene.objects) for scene in train.scenes} == {1, 2, 3, 4}


def test_selected_columns_are_those_of_the_whole_example(train):
    whole, part = train[7], train.select_columns(["image", "caption"])
    assert part.column_names == ("image", "caption") and [*part[7]] == ["image", "caption"]
    assert part[7] == {"image": whole["image"], "caption": whole["caption"]}
    assert [*train.select_columns(["regions"])[7]] == ["image", "regions"]
    assert "regions" in train[7]


def test_captions_and_regions_are_true(train):
    for index in range(300):
        example, scene = train[index], train.scenes[index]
        boxes = np.array([region["box"] for region in example["regions"]])
        total = sum(region["mask"].astype(int) for region in example["regions"])
        assert total.max() == 1, "objects overlap"
        for region, item in zip(example["regions"], scene.objects):
            rows, columns = np.nonzero(region["mask"])
            assert region["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert region["phrase"] in example["caption"] and region["label"] == item.shape
            side = max(region["box"][2] - region["box"][0], region["box"][3] - region["box"][1])
            assert (side > 20) == (item.size == "large")
        assert parse_objects(example["caption"]) == Counter((i.colour, i.shape) for i in scene.objects)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        for k, (a, b) in enumerate(zip(scene.objects, scene.objects[1:])):
            dx, dy = centres[k] - centres[k + 1]
            said = relation(a, b)
            assert f"{a.phrase} {said} a {b.phrase}" in example["caption"]
            assert {"left of": dx < 0, "right of": dx > 0, "above": dy < 0, "below": dy > 0}[said]
        assert 100 <= len(example["long_caption"].split()) <= 200


def test_parse_objects_reads_bad_captions():
    assert parse_objects("red a blue star, star the white large cross circle") == Counter(
        {("blue", "star"): 1, ("white", "cross"): 1}
    )
    assert not parse_objects("")


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"'dev'.*train, validation, test"):
        ScenesDataset("dev", 1)


def test_colour_counting_does_not_solve_retrieval(train, test):
    """Ridge regression from a 64-bin colour histogram to the caption's words: the best of many settings."""

    def histogram(scene):
        bins = draw(scene, 64)[0] // 64
        return np.bincount((bins @ np.array([16, 4, 1])).ravel(), minlength=64) / 64**2

    words = sorted({word for caption in train["caption"] for word in caption.split()})

    def bag(captions):
        return np.array([[caption.split().count(word) for word in words] for caption in captions], dtype=float)

    x, y = np.array([histogram(scene) for scene in train.scenes]), bag(train["caption"])
    x_test, y_test = np.array([histogram(scene) for scene in test.scenes]), bag(test["caption"])
    recalls = []
    for alpha in (1e-4, 1e-3, 1e-2, 1e-1, 1, 10):
        centred = x - x.mean(0)
        weights = np.linalg.solve(centred.T @ centred + alpha * np.eye(64), centred.T @ (y - y.mean(0)))
        for shift in (0, y.mean(0)):
            predicted = (x_test - x.mean(0)) @ weights + y.mean(0) - shift
            target = y_test - shift
            similarity = predicted @ (target / np.linalg.norm(target, axis=1, keepdims=True)).T
            recalls.append((similarity.argmax(1) == np.arange(500)).mean())
    assert 0.01 < max(recalls) <= 0.15, max(recalls)
    assert len(SHAPES) == 6
