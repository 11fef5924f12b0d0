"""Dense captioning's average precision by hand and against COCO's own code."""

import contextlib
import io

import numpy as np
import pytest

from mmgem.evaluation.dense_captioning import box_iou, dense_captioning_map


def found(box, caption, score):
    return {"box": box, "caption": caption, "score": score}


def wanted(box, phrase):
    return {"box": box, "phrase": phrase}


def test_iou_by_hand():
    assert box_iou([0, 0, 4, 4], [2, 2, 6, 6]) == pytest.approx(4 / 28)
    assert box_iou([0, 0, 4, 4], [0, 0, 4, 4]) == 1
    assert box_iou([0, 0, 4, 4], [4, 0, 8, 4]) == box_iou([0, 0, 4, 4], [9, 9, 8, 8]) == 0


def test_perfect_and_nothing():
    references = [[wanted([0, 0, 10, 10], "a dog"), wanted([20, 0, 30, 10], "a cat")], [wanted([0, 0, 5, 5], "snow")]]
    perfect = [[found(r["box"], r["phrase"], 0.5) for r in of] for of in references]
    metrics = dense_captioning_map(perfect, references)
    # A word alone is one chunk for one match: METEOR halves it, which is still above 0.25.
    assert metrics["dense_captioning_map"] == 1
    assert dense_captioning_map([[], []], references)["dense_captioning_map"] == 0


def test_by_hand():
    """Right box and words, then a sentence that matches nothing: half of the recall at full precision."""
    references = [[wanted([0, 0, 10, 10], "a dog"), wanted([20, 0, 30, 10], "a cat")]]
    predictions = [[found([0, 0, 10, 10], "a dog", 0.9), found([20, 0, 30, 10], "snow", 0.8)]]
    metrics = dense_captioning_map(predictions, references)
    half = 51 / 101  # recalls 0, 0.01, …, 0.5 are reached
    assert metrics["dense_captioning_ap_iou_0.5"] == pytest.approx(half)
    # The other way round the right one comes second: precision 1/2 at recall 1/2.
    predictions[0][1]["score"] = 0.95
    metrics = dense_captioning_map(predictions, references)
    assert metrics["dense_captioning_ap_iou_0.5"] == pytest.approx(half / 2)
    # Moved by 3 of 10, it overlaps by 70 of 130.
    predictions = [[found([0, 3, 10, 13], "a dog", 0.9)]]
    metrics = dense_captioning_map(predictions, references)
    assert [metrics[f"dense_captioning_ap_iou_{t}"] > 0 for t in (0.3, 0.4, 0.5, 0.6, 0.7)] == [True] * 3 + [False] * 2


def test_a_box_counts_once_and_near_boxes_of_the_reference_are_one():
    references = [[wanted([0, 0, 10, 10], "a dog"), wanted([0, 0, 10, 11], "a brown dog")]]
    predictions = [[found([0, 0, 10, 10], "a dog", 0.9), found([0, 0, 10, 11], "a brown dog", 0.8)]]
    # One reference with two phrases: the second prediction finds it taken, but the first was enough.
    assert dense_captioning_map(predictions, references)["dense_captioning_map"] == 1
    # The surest takes it, wrong as it is: as in DenseCap, and not as in COCO.
    predictions[0][0]["caption"] = "snow"
    assert dense_captioning_map(predictions, references)["dense_captioning_map"] == 0
    predictions[0][0]["score"] = 0.7
    assert dense_captioning_map(predictions, references)["dense_captioning_map"] == 1


@pytest.mark.parametrize("seed", range(3))
def test_boxes_alone_equal_coco(seed):
    """Every sentence right, references apart, no two scores alike: COCO's AP at the same IoU."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(seed)
    references, predictions = [], []
    for _ in range(20):
        boxes = [[40 * i, 0, 40 * i + 20, 20] for i in range(rng.integers(1, 4))]
        references.append([wanted(box, "a dog") for box in boxes])
        moved = [[x + rng.uniform(-9, 9), y, x2, y2 + rng.uniform(0, 9)] for x, y, x2, y2 in boxes]
        wrong = [[200, 0, 220, 20]] * int(rng.integers(0, 3))
        predictions.append([found(box, "a dog", rng.random()) for box in moved + wrong])

    def xywh(box):
        return [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])]

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        annotations = [(i, xywh(r["box"])) for i, of in enumerate(references) for r in of]
        truth.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(20)],
            "categories": [{"id": 1}],
            "annotations": [
                {"id": k + 1, "image_id": i, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
                for k, (i, box) in enumerate(annotations)
            ],
        }
        truth.createIndex()
        rows = [(i, xywh(p["box"]), p["score"]) for i, of in enumerate(predictions) for p in of]
        results = [{"image_id": i, "category_id": 1, "bbox": box, "score": score} for i, box, score in rows]
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.iouThrs = np.array([0.3, 0.4, 0.5, 0.6, 0.7])
        evaluation.evaluate()
        evaluation.accumulate()
    theirs = evaluation.eval["precision"][:, :, 0, 0, 2].mean(1)
    metrics = dense_captioning_map(predictions, references)
    ours = [metrics[f"dense_captioning_ap_iou_{t}"] for t in (0.3, 0.4, 0.5, 0.6, 0.7)]
    assert ours == pytest.approx(theirs.tolist(), abs=1e-9)


def test_order_of_pictures_changes_nothing_and_a_perfect_prediction_lowers_nothing():
    references = [[wanted([0, 0, 10, 10], "a dog")], [wanted([0, 0, 5, 5], "snow")], [wanted([1, 1, 9, 9], "a cat")]]
    predictions = [[found([0, 0, 10, 9], "a dog", 0.4)], [found([3, 0, 9, 5], "sun", 0.9)], []]
    metrics = dense_captioning_map(predictions, references)
    assert dense_captioning_map(predictions[::-1], references[::-1]) == metrics
    predictions[2].append(found([1, 1, 9, 9], "a cat", 0.5))
    better = dense_captioning_map(predictions, references)
    assert all(better[name] >= value for name, value in metrics.items())
    assert better["dense_captioning_map"] > metrics["dense_captioning_map"]


@pytest.mark.parametrize("order", [1, -1])
def test_equal_scores_come_at_once_whatever_the_order(order):
    """One right and one wrong, equally sure: precision 1/2, never 1."""
    references = [[wanted([0, 0, 10, 10], "a dog")], [wanted([0, 0, 10, 10], "a cat")]][::order]
    predictions = [[found([0, 0, 10, 10], "a dog", 0.5)], [found([0, 0, 10, 10], "snow", 0.5 + 1e-8)]][::order]
    metrics = dense_captioning_map(predictions, references)
    assert metrics["dense_captioning_map"] == pytest.approx(51 / 101 / 2)
    # As near as that wherever they lie, on either side of a rounded number too.
    near = [[found([0, 0, 10, 10], "a dog", 0.50000051)], [found([0, 0, 10, 10], "snow", 0.50000049)]][::order]
    assert dense_captioning_map(near, references)["dense_captioning_map"] == pytest.approx(51 / 101 / 2)
    near = [[found([0, 0, 10, 10], "a dog", 0.500002)], [found([0, 0, 10, 10], "snow", 0.5)]][::order]
    assert dense_captioning_map(near, references)["dense_captioning_map"] == pytest.approx(51 / 101)
    # One better said, the other better placed: neither comes first.
    well_placed = found([0, 0, 10, 10], "a cat and a", 0.5)
    well_said = found([0, 0, 10, 2.5], "a dog on a beach", 0.5)
    pictures = [
        ([well_placed], [wanted([0, 0, 10, 10], "a cat and a dog")]),
        ([well_said], [wanted([0, 0, 10, 10], "a dog on a beach")]),
    ][::order]
    metrics = dense_captioning_map([found for found, _ in pictures], [wanted for _, wanted in pictures])
    assert metrics["dense_captioning_ap_iou_0.7"] == pytest.approx(51 / 101 / 2)
    # Two for one box: the worse of them takes it.
    twice = [[found([0, 0, 10, 10], "a dog", 0.5), found([0, 0, 10, 10], "snow", 0.5)][::order]]
    assert dense_captioning_map(twice, [[wanted([0, 0, 10, 10], "a dog")]])["dense_captioning_map"] == 0


def test_errors_name_the_offender():
    with pytest.raises(ValueError, match="1 images, references for 2"):
        dense_captioning_map([[]], [[], []])
    with pytest.raises(ValueError, match="There is no reference"):
        dense_captioning_map([[]], [[]])
    nan = [[], [found([0, 0, 1, 1], "a", float("nan"))]]
    with pytest.raises(ValueError, match="image 1 has the score nan"):
        dense_captioning_map(nan, [[wanted([0, 0, 1, 1], "a")], []])
    for box in ([0, 0, float("nan"), 1], [4, 0, 2, 4]):
        with pytest.raises(ValueError, match=r"A prediction for image 0 has the box .* which has no area"):
            dense_captioning_map([[found(box, "a", 0.5)]], [[wanted([0, 0, 1, 1], "a")]])
        with pytest.raises(ValueError, match=r"A reference for image 0 has the box .* which has no area"):
            dense_captioning_map([[]], [[wanted(box, "a")]])
