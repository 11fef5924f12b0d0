"""Choices, questions, inventions and boxes: against figures computed another way, and from the shell."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

from mmgem import MMGEMModel, MMGEMProcessor
from mmgem.data.choices import Choice, ChoiceDataset
from mmgem.data.pairs import BadDataError
from mmgem.data.regions import RegionDataset
from mmgem.evaluation.choices import choices_section, evaluate_choices, right_texts
from mmgem.evaluation.hallucination import (
    area_under_curve,
    chair,
    evaluate_questions,
    object_words,
    objects_named,
    yes_no_metrics,
)
from mmgem.evaluation.regions import classify_boxes
from tests.conftest import Table, make_picture


TEXTS = ["a dog on a beach", "a beach on a dog", "the cat sat on the mat", "two people", "snow"]
COCO = ["person", "dog", "hot dog", "car", "bear", "teddy bear", "dining table", "bus", "tie"]
COCO += ["baseball glove", "mouse", "sports ball"]


@pytest.fixture
def model(checkpoint):
    return MMGEMModel.from_pretrained(checkpoint).eval()


@pytest.fixture
def own_processor(checkpoint):
    return MMGEMProcessor.from_pretrained(checkpoint)


def pictures(count, broken=()):
    return [{"image": b"?" if i in broken else make_picture(i)} for i in range(count)]


@torch.no_grad()
def scores_by_hand(model, processor, picture, texts):
    """Cosines, and log P per token by a plain forward for each pair."""
    image = model.get_embedding(**processor(images=[picture], return_tensors="pt"))
    cosines = (model.get_embedding(**processor(text=texts, return_tensors="pt")) @ image.T)[:, 0]
    likelihoods = []
    for text in texts:
        prompt = processor(images=[picture], task="caption", return_tensors="pt")
        words = processor(images=[picture], text=[text], task="score", return_tensors="pt")["labels"][0]
        ids = torch.cat([prompt["input_ids"][0], words])[None]
        logits = model(input_ids=ids, pixel_values=prompt["pixel_values"]).logits[0, -len(words) - 1 : -1]
        likelihoods.append(logits.log_softmax(-1).gather(1, words[:, None]).mean())
    return cosines.double(), torch.stack(likelihoods).double()


def test_equals_a_plain_forward_for_each_pair(model, own_processor):
    data = ChoiceDataset(
        pictures(4, broken={3}),
        [
            Choice([0], TEXTS[:2], "order"),
            Choice([0], TEXTS[1:], "many"),
            Choice([1, 2], TEXTS[2:4], "square"),
            Choice([3], TEXTS[:2], "order"),
        ],
    )
    metrics, outputs = evaluate_choices(model, own_processor, data, weight=2.0)
    assert outputs["indices"] == [0, 1, 2], "the one whose picture cannot be read is left out"
    expected = {"cosine": [], "likelihood": [], "both": []}
    scale = float(model.logit_scale.scale)
    for choice in data.choices[:3]:
        rows = [scores_by_hand(model, own_processor, make_picture(i), choice.texts) for i in choice.images]
        cosines, likelihoods = (torch.stack(parts) for parts in zip(*rows))
        for way, matrix in zip(expected, (cosines, likelihoods, scale * cosines + 2.0 * likelihoods)):
            expected[way].append(matrix)
    for way, matrices in expected.items():
        for found, matrix in zip(outputs["scores"][way], matrices, strict=True):
            torch.testing.assert_close(found, matrix, atol=1e-4, rtol=0)
        right = [bool(matrix[i].argmax() == i) for matrix in matrices for i in range(len(matrix))]
        assert metrics[f"choices_{way}"] == pytest.approx(np.mean(right))
        of_kinds = [right[0], right[1], np.mean(right[2:])]
        assert metrics[f"choices_{way}_mean_per_kind"] == pytest.approx(np.mean(of_kinds))
        square = matrices[2]
        by_image = all(square[:, i].argmax() == i for i in range(2))
        assert metrics[f"choices_{way}_text"] == all(right[2:]) and metrics[f"choices_{way}_image"] == by_image
        assert metrics[f"choices_{way}_group"] == (all(right[2:]) and by_image)
    section = choices_section(metrics, outputs, data)
    assert section.images["choices.png"].size[0] > 300 and any("| many | 1 |" in line for line in section.lines)


def test_no_choice_without_all_of_its_images(model, own_processor):
    data = ChoiceDataset(pictures(2, broken={1}), [Choice([0, 1], TEXTS[:2])])
    with pytest.raises(BadDataError, match="No choice has all of its images"):
        evaluate_choices(model, own_processor, data)


def test_a_tie_is_wrong():
    assert right_texts(torch.tensor([[1.0, 0.0], [0.2, 0.2]]), 1e-6).tolist() == [True, False]
    assert right_texts(torch.tensor([[0.5, 0.5 - 1e-7]]), 1e-6).tolist() == [False]


def test_questions_ask_whether_the_image_makes_the_object_likelier(model, own_processor):
    objects = ["dog", "cat", "mountain"]
    choices = [Choice([i], [name], "yes" if (i + j) % 2 else "no") for i in range(3) for j, name in enumerate(objects)]
    metrics, outputs = evaluate_questions(model, own_processor, ChoiceDataset(pictures(3), choices), "there is a {}")
    texts = [f"there is a {name}" for name in objects]
    cosines, gains = [], []
    for i in range(3):
        inputs = own_processor(images=[make_picture(i)], text=texts, task="score", return_tensors="pt")
        gains += model.score(**inputs, alpha=1.0)[0].tolist()
        cosines += scores_by_hand(model, own_processor, make_picture(i), texts)[0].tolist()
    torch.testing.assert_close(outputs["scores"], torch.tensor(gains), atol=1e-4, rtol=0)
    right = [choice.kind == "yes" for choice in choices]
    assert metrics["pope_auc"] == pytest.approx(roc_auc_score(right, gains))
    assert metrics["pope_cosine_auc"] == pytest.approx(roc_auc_score(right, cosines))
    assert metrics["pope_accuracy"] == pytest.approx(np.mean([(gain > 0) == yes for gain, yes in zip(gains, right)]))


def test_yes_and_no_as_scikit_learn_counts_them():
    rng = torch.Generator().manual_seed(0)
    scores = torch.randn(200, generator=rng).mul(4).round()  # with ties
    right = torch.rand(200, generator=rng) < 0.4
    found = yes_no_metrics(scores > 0, right)
    expected = precision_recall_fscore_support(right, scores > 0, average="binary")[:3]
    assert [found[f"pope_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx(list(expected))
    assert found["pope_yes"] == pytest.approx(float((scores > 0).double().mean()))
    assert area_under_curve(scores, right) == pytest.approx(roc_auc_score(right, scores))
    assert area_under_curve(scores, torch.ones(200, dtype=torch.bool)) == 0.5


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("Two men and a woman walk their dogs.", ["person", "person", "dog"]),
        ("A hot dog lies on the table beside a teddy bear", ["hot dog", "dining table", "teddy bear"]),
        ("buses, cars and bears at the bus stop", ["bus", "car", "bear"]),
        ("a boy in ties", ["person", "tie"]),
        ("a ball player with two baseball gloves and mice", ["baseball glove", "mouse"]),
        ("nothing at all", []),
    ],
)
def test_objects_that_a_caption_names(text, objects):
    assert objects_named(text, object_words(COCO)) == objects


def test_questions_need_the_object_in_their_sentence(model, own_processor):
    data = ChoiceDataset(pictures(1), [Choice([0], ["dog"], "yes")])
    with pytest.raises(ValueError, match=r"has no \{\} for the name of the object"):
        evaluate_questions(model, own_processor, data, "a photo")


def test_chair_counts_what_is_neither_seen_nor_told():
    captions = ["a man with a dog and a car", "a bear", "snow"]
    found = chair(captions, [["dog"], ["teddy bear"], []], [["a person walks"], ["a toy"], ["white"]], COCO)
    assert found == {"caption_chair_i": pytest.approx(2 / 4), "caption_chair_s": pytest.approx(2 / 3)}


def test_boxes_are_classified_like_images(model, own_processor):
    boxes = [[0, 0, 24, 20], [10, 5, 40, 38]]
    rows = [
        {"image": make_picture(i), "regions": [{"box": b, "phrase": p} for b, p in zip(boxes, names)]}
        for i, names in enumerate([("dog", "wine_glass"), ("dog", "dog")])
    ]
    data = RegionDataset(Table(rows))
    templates = ["a {}", "one {}"]
    metrics, outputs = classify_boxes(model, own_processor, data, ["dog", "wine_glass", "car"], templates)
    with torch.no_grad():
        inputs = own_processor(images=[make_picture(0), make_picture(1)], boxes=[boxes] * 2, return_tensors="pt")
        regions = model.get_embedding(**inputs).flatten(0, 1)
        texts = [f"{t} {name}" for name in ("dog", "wine glass", "car") for t in ("a", "one")]
        classes = model.get_embedding(**own_processor(text=texts, return_tensors="pt")).view(3, 2, -1).mean(1)
    found = (regions @ torch.nn.functional.normalize(classes, dim=-1).T).argmax(1)
    right = found == torch.tensor([0, 1, 0, 0])
    assert metrics["box_top1"] == pytest.approx(right.double().mean().item())
    of_dogs = right[[0, 2, 3]].double().mean().item()
    assert metrics["box_mean_per_class"] == pytest.approx((of_dogs + right[1].double().item()) / 2)
    assert len(outputs["regions"]) == 4
    with pytest.raises(ValueError, match="A box is a 'dog', which is none of the 1 class_names"):
        classify_boxes(model, own_processor, data, ["car"])


def test_from_the_shell(checkpoint, adapters, run, tmp_path):
    """COCO's own files: captions beside instances, boxes, choices and questions; one image is missing."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        make_picture(i).save(folder / f"{i}.jpg")
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 48, "height": 40} for i in range(4)]
    captions = [{"id": i, "image_id": i, "caption": f"a man and {i} dogs"} for i in range(4)]
    instances = [{"id": i, "image_id": i, "bbox": [2, 3, 20, 30], "category_id": 1 + i % 2} for i in range(4)]
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    files = {"captions.json": {"annotations": captions}, "instances.json": {"annotations": instances}}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps({"images": images, "categories": categories, **content}))
    rows = {str(i): {"filename": f"{i}.jpg", "caption": "a dog", "negative_caption": "a cat"} for i in range(4)}
    (tmp_path / "swap.json").write_text(json.dumps(rows))
    lines = [{"image": f"{i}.jpg", "text": "Is there a dog in the image?", "label": "yes"} for i in range(4)]
    (tmp_path / "pope.json").write_text("\n".join(map(json.dumps, lines)))
    base = ["--model", checkpoint, "--image_folders", str(folder)]
    annotations = [str(tmp_path / name) for name in files]
    found = run(*base, "--tasks", "captioning", "--annotations", *annotations, "--max_length", 8)["metrics"]
    assert {"caption_chair_i", "caption_chair_s"} <= found.keys()
    boxes = ["--tasks", "box_classification", "--annotations", annotations[1], "--adapters", *adapters]
    results = run(*base, *boxes)
    assert results["setting"]["sizes"]["Box classification"] == {"size": 3, "left_out": 1, "boxes": 3, "classes": 2}
    assert {"box_top1", "box_mean_per_class", "stage_1_box_top1"} <= results["metrics"].keys()
    results = run(*base, "--tasks", "choices", "--annotations", str(tmp_path / "swap.json"), "--alpha", 0.5)
    assert results["setting"]["sizes"]["Choices"] == {"size": 3, "left_out": 1}
    assert (tmp_path / "out" / "choices.png").is_file()
    results = run(*base, "--tasks", "questions", "--annotations", str(tmp_path / "pope.json"))
    assert results["setting"]["sizes"]["Questions"] == {"size": 3, "left_out": 1}
    drawn = run("--model", checkpoint, "--tasks", "choices", "--dataset_name", "scenes", "--max_samples", 6)
    assert drawn["setting"]["sizes"]["Choices"] == {"size": 6, "left_out": 0}
