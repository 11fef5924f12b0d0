"""Zero-shot classification against scikit-learn and by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from mmgem.data.pairs import PairDataset
from mmgem.data.scenes import CLASSES, ScenesDataset
from mmgem.evaluation.classification import class_embeddings, classification_metrics, evaluate_classification
from tests.conftest import Table, make_model, make_picture


def random_scores(seed, pictures=50, classes=12):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (pictures - classes,), generator=generator)])
    scores = torch.randn(pictures, classes, generator=generator)
    scores[torch.arange(pictures), labels] += 1
    return scores, labels


@pytest.mark.parametrize("seed", range(3))
def test_equals_scikit_learn(seed):
    scores, labels = random_scores(seed)
    metrics = classification_metrics(scores, labels)
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, scores.numpy(), k=k, labels=range(12))
        assert metrics[f"top{k}"] == pytest.approx(expected)
    assert metrics["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, scores.argmax(1)))


def test_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1]])
    metrics = classification_metrics(scores, torch.tensor([0, 0, 1, 1]))
    assert metrics["top1"] == 0.75 and metrics["mean_per_class"] == 0.75, "class 2 does not occur"
    assert "top5" not in metrics
    unbalanced = classification_metrics(scores, torch.tensor([0, 0, 0, 1]))
    assert unbalanced["mean_per_class"] == pytest.approx((2 / 3 + 0) / 2)


def test_probabilities_however_small_are_told_apart():
    scores = torch.tensor([[0.999998, 5e-7, 4e-7, 3e-7, 2e-7, 1e-7, 1e-8, 1e-9]], dtype=torch.float64)
    assert classification_metrics(scores, torch.tensor([1]))["top5"] == 1
    assert classification_metrics(scores, torch.tensor([5]))["top5"] == 0
    assert classification_metrics(scores, torch.tensor([1]), tie=1e-6)["top5"] == 0


def test_bootstrap_interval_is_that_of_the_binomial():
    hit = torch.arange(1000) < 700
    scores = torch.stack([hit.float(), 0.5 * torch.ones(1000)], 1)
    metrics = classification_metrics(scores, torch.zeros(1000, dtype=torch.int64))
    error = 1.96 * (0.7 * 0.3 / 1000) ** 0.5
    assert metrics["top1_low"] == pytest.approx(0.7 - error, abs=0.005)
    assert metrics["top1_high"] == pytest.approx(0.7 + error, abs=0.005)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_order_changes_nothing_a_perfect_picture_lowers_nothing_and_ties_count_against_us(seed):
    scores, labels = random_scores(seed, 30, 7)
    metrics = classification_metrics(scores, labels)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    shuffled = classification_metrics(scores[order], labels[order])
    exact = ("top1", "top5", "mean_per_class")
    assert shuffled == pytest.approx(metrics)
    better = scores.clone()
    better[3, labels[3]] = 100
    assert all(classification_metrics(better, labels)[name] >= metrics[name] - 1e-12 for name in exact)
    assert classification_metrics(torch.ones(30, 7), labels)["top5"] == 0


def test_classes_are_means_of_their_sentences_and_figures_do_not_depend_on_the_batch(processor):
    model = make_model(processor)
    names, templates = ["dog", "cat", "red bicycle"], ["a {}", "two {}s on a beach"]
    classes = class_embeddings(model, processor, names, templates)
    for name, embed in zip(names, classes):
        inputs = processor(text=[template.replace("{}", name) for template in templates], return_tensors="pt")
        expected = torch.nn.functional.normalize(model.get_embedding(**inputs).mean(0), dim=-1)
        torch.testing.assert_close(embed, expected)
    rows = Table([{"image": make_picture(i)} for i in range(7)])
    rows[2]["image"] = b"no picture"
    labels = [0, 1, 2, 0, 1, 2, 0]
    one, many = (
        evaluate_classification(model.train(), processor, PairDataset(rows), labels, names, templates, batch_size)
        for batch_size in (1, 64)
    )
    assert model.training
    assert one[0] == many[0] and one[1]["indices"] == [0, 1, 3, 4, 5, 6]
    images = model.eval().get_embedding(**processor(images=[make_picture(3)], return_tensors="pt"))
    assert one[1]["predicted"][2] == (images @ classes.T).argmax()


def test_classes_of_one_name_are_one(processor):
    model = make_model(processor)
    dataset = PairDataset(Table([{"image": make_picture(i)} for i in range(6)]))
    twice, _ = evaluate_classification(model, processor, dataset, [0, 1, 2, 3, 1, 3], ["dog", "cat", "snow", "cat"])
    once, outputs = evaluate_classification(model, processor, dataset, [0, 1, 2, 1, 1, 1], ["dog", "cat", "snow"])
    assert twice == once and outputs["class_names"] == ["dog", "cat", "snow"]


def test_classes_as_near_as_sums_differ_are_ties(processor, monkeypatch):
    """Summed in another order, a cosine differs in its last digits: neither of two such classes is found."""
    classes = torch.nn.functional.normalize(torch.ones(2, 16), dim=-1)
    classes[0, 0] += 3e-7
    classes[1, 1] += 3e-7
    monkeypatch.setattr("mmgem.evaluation.classification.class_embeddings", lambda *_: classes)
    dataset = PairDataset(Table([{"image": make_picture(i)} for i in range(4)]))
    metrics, _ = evaluate_classification(make_model(processor), processor, dataset, [0, 1, 0, 1], ["dog", "cat"])
    assert metrics["top1"] == 0


def test_probabilities_rank_as_the_scores_they_come_from():
    scores, labels = random_scores(0)
    probabilities = classification_metrics((5 * scores).softmax(-1), labels)
    assert probabilities == classification_metrics(scores.double(), labels)


def test_scenes_of_one_object():
    scenes = ScenesDataset("single", 40, 32)
    assert {len(scene.objects) for scene in scenes.scenes} == {1}
    assert [CLASSES[label] for label in scenes["label"]] == [caption[8:] for caption in scenes["caption"]]
    assert scenes[3]["label"] == scenes["label"][3]
    seeds = {scene.seed for split in ("train", "test") for scene in ScenesDataset(split, 300, 32).scenes}
    assert not seeds & {scene.seed for scene in scenes.scenes}


def test_errors_name_the_offender(processor):
    model = make_model(processor)
    with pytest.raises(ValueError, match="Class 1 has no name"):
        class_embeddings(model, processor, ["dog", " "])
    with pytest.raises(ValueError, match=r"'a photo' has no \{\}"):
        class_embeddings(model, processor, ["dog"], ["a photo"])
    dataset = PairDataset(Table([{"image": make_picture(0)}] * 2))
    with pytest.raises(ValueError, match="1 of 2 labels are no class from 0 to 1, such as None of image 1"):
        evaluate_classification(model, processor, dataset, [0, None], ["dog", "cat"])
    scores = torch.ones(3, 2)
    with pytest.raises(ValueError, match="label 5 of image 1 is none"):
        classification_metrics(scores, torch.tensor([0, 5, 1]))
    scores[1, 0] = float("nan")
    with pytest.raises(ValueError, match="the first that of 'image 1'"):
        classification_metrics(scores, torch.tensor([0, 1, 1]))
