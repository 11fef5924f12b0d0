"""Re-ordering by cosine and likelihood, against loops over all pairs."""

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value

from mmgem.data.pairs import BadDataError, PairDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.evaluation.arguments import EvaluationArguments
from mmgem.evaluation.classification import evaluate_classification
from mmgem.evaluation.data import load_labelled
from mmgem.evaluation.evaluator import evaluate_reranking, evaluate_retrieval
from mmgem.evaluation.likelihood import (
    evaluate_reranked_classification,
    evaluate_reranked_retrieval,
    pair_likelihoods,
    rerank,
    reranked_ranks,
)
from mmgem.evaluation.tasks import load_model
from tests.conftest import CORPUS, make_picture
from tests.evaluation.conftest import bold_model


WORDS = [*CORPUS[:4], "snow", "red bicycles on a beach", "a cat", "people sat on a dog"]


@pytest.fixture
def model(processor):
    return bold_model(processor)


@pytest.fixture
def dataset():
    """Five pictures of one or two captions."""
    captions = [[WORDS[i], WORDS[5 + i // 2]] if i % 2 else [WORDS[i]] for i in range(5)]
    features = Features({"image": Image(decode=True), "captions": List(Value("string"))})
    rows = {"image": [make_picture(i) for i in range(5)], "captions": captions}
    return PairDataset(Dataset.from_dict(rows, features=features), caption_column="captions")


def all_scores(model, processor, pictures, texts, alpha=0.0):
    """cosine / tau and log P of every picture and text, each pair by itself."""
    scale = model.logit_scale.weight.exp().item()
    images = model.get_embedding(**processor(images=pictures, return_tensors="pt"))
    cosines = images @ model.get_embedding(**processor(text=texts, return_tensors="pt")).T
    scores = [
        [
            model.score(**processor(images=[picture], text=[text], task="score", return_tensors="pt"), alpha=alpha)
            for text in texts
        ]
        for picture in pictures
    ]
    return scale * cosines, torch.tensor(scores)


@torch.no_grad()
def test_rerank_orders_by_both(model, processor):
    pictures = [make_picture(i) for i in range(4)]
    cosines, scores = all_scores(model, processor, pictures, WORDS, alpha=0.5)
    total = cosines + 3 * scores
    found = rerank(model, processor, WORDS[1], pictures, weight=3, alpha=0.5)
    assert [i for i, _ in found] == total[:, 1].argsort(descending=True).tolist()
    assert [score for _, score in found] == pytest.approx(total[:, 1].sort(descending=True).values.tolist(), abs=1e-3)
    found = rerank(model, processor, pictures[2], WORDS, weight=3, alpha=0.5)
    assert [i for i, _ in found] == total[2].argsort(descending=True).tolist()
    by_cosine = [i for i, _ in rerank(model, processor, pictures[2], WORDS, weight=0)]
    assert by_cosine == cosines[2].argsort(descending=True).tolist() != [i for i, _ in found]


@torch.no_grad()
@pytest.mark.parametrize("count", [3, 50])
def test_reranked_recall_is_that_of_a_loop(model, processor, dataset, count):
    _, outputs = evaluate_retrieval(model, processor, dataset)
    options = {"count": count, "batch_size": 2, "weight": 100.0, "alpha": 0.5, "ks": (1, 2, 5)}
    found = evaluate_reranked_retrieval(model, processor, dataset, outputs, **options)
    pictures = [make_picture(i) for i in range(5)]
    texts = [text for captions in dataset.captions() for text in captions]
    cosines, scores = all_scores(model, processor, pictures, texts, alpha=0.5)
    owners = outputs["text_to_image"].tolist()
    ranks = {"text_to_image": [], "image_to_text": []}
    for text, owner in enumerate(owners):
        order = cosines[:, text].argsort(descending=True).tolist()
        head = sorted(order[:count], key=lambda i: -float(cosines[i, text] + 100 * scores[i, text]))
        ranks["text_to_image"].append([*head, *order[count:]].index(owner) + 1)
    for image in range(5):
        order = cosines[image].argsort(descending=True).tolist()
        head = sorted(order[:count], key=lambda i: -float(cosines[image, i] + 100 * scores[image, i]))
        ordered = [*head, *order[count:]]
        ranks["image_to_text"].append(min(ordered.index(i) + 1 for i, own in enumerate(owners) if own == image))
    expected = {
        f"reranked_{way}_R@{k}": sum(rank <= k for rank in of) / len(of)
        for way, of in ranks.items()
        for k in (1, 2, 5)
    }
    assert found == pytest.approx(expected)
    by_cosine = evaluate_reranked_retrieval(model, processor, dataset, outputs, **{**options, "weight": 0.0})
    assert by_cosine != found


def test_ranks_of_a_reordered_head():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.3, 0.2], [0.1, 0.2, 0.3]])
    candidates = torch.tensor([[4, 2, 7], [1, 3, 0], [5, 6, 8]])
    right = torch.tensor([[0, 4], [0, 7], [1, 3], [2, 9]])
    ranks = reranked_ranks(scores, candidates, right, torch.tensor([1, 2, 9]))
    assert ranks.tolist() == [2, 2, 9], "the better of two, a tie, and one that is no candidate"


@torch.no_grad()
def test_classes_by_likelihood(model, processor, dataset):
    labels, templates = [0, 1, 2, 3, 4], ("a photo of a {}.", "{} on the mat")
    _, outputs = evaluate_classification(model, processor, dataset, labels, WORDS, templates)
    options = {"count": 4, "batch_size": 2, "weight": 5.0, "alpha": 0.5}
    found = evaluate_reranked_classification(model, processor, dataset, outputs, templates, **options)
    pictures = [make_picture(i) for i in range(5)]
    sentences = [template.replace("{}", name) for name in WORDS for template in templates]
    scores = all_scores(model, processor, pictures, sentences, alpha=0.5)[1].view(5, len(WORDS), 2).mean(-1)
    both = model.logit_scale.weight.exp() * outputs["cosines"] + 5 * scores
    hits = {"likelihood_top1": 0, "reranked_top1": 0}
    for i in range(5):
        head = outputs["cosines"][i].topk(4).indices
        hits["likelihood_top1"] += int(head[scores[i, head].argmax()]) == i
        hits["reranked_top1"] += int(head[both[i, head].argmax()]) == i
    assert found == {name: pytest.approx(count / 5) for name, count in hits.items()}


def test_the_command_line_reranks(checkpoint, run, labelled):
    classes = ["--tasks", "classification", "--data_file", labelled / "pets.parquet"]
    options = ["--rerank", "2", "--alpha", "0.5", "--likelihood_weight", "100"]
    found = run("--model", checkpoint, *classes, *options)["metrics"]
    arguments = EvaluationArguments(
        model=checkpoint, tasks=["classification"], data_file=str(labelled / "pets.parquet")
    )
    model, processor = load_model(arguments)
    (data,) = load_labelled(arguments, 32)
    of_data = (data.dataset, data.labels, data.class_names, data.templates)
    _, outputs = evaluate_classification(model, processor, *of_data)
    given = {"count": 2, "batch_size": 64, "weight": 100.0, "alpha": 0.5}
    expected = evaluate_reranked_classification(model, processor, data.dataset, outputs, data.templates, **given)
    assert {name: found[f"classification_{name}"] for name in expected} == pytest.approx(expected)


def test_options_without_effect_are_refused(labelled):
    data = {"model": "model", "data_file": "pets.parquet"}
    for tasks, options, message in (
        (["retrieval"], {"alpha": 0.5}, r"alpha is 0\.5, but no likelihood uses it"),
        (["captioning"], {"rerank": 5}, "rerank is for retrieval and classification, but the tasks are captioning"),
        (["captioning"], {"matryoshka_dims": [4]}, "matryoshka_dims is for retrieval"),
        (["retrieval"], {"matryoshka_dims": [8, 4]}, "matryoshka_dims must ascend"),
        (["retrieval"], {"rerank": 5, "likelihood_weight": float("nan")}, "likelihood_weight must be a finite number"),
        (["retrieval"], {"rerank": 5, "alpha": float("inf")}, "alpha must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluationArguments(tasks=tasks, **options, **data)


def test_an_image_that_can_no_longer_be_read_ends_the_evaluation(model, processor, dataset):
    pairs = torch.tensor([[0, 0], [1, 1], [2, 0]])

    def read(index):
        if index == 1:
            raise BadDataError("gone")
        return make_picture(index)

    with pytest.raises(BadDataError, match="1 images can no longer be read, such as 1: gone"):
        pair_likelihoods(model, processor, dataset, WORDS, pairs, 8, read=read)


def test_an_empty_draw_is_never_chosen(model, processor, monkeypatch):
    """Without weight its likelihood, minus infinity, would be NaN."""
    monkeypatch.setattr("mmgem.evaluation.evaluator.caption_inputs", lambda *args, **kwargs: ["", "snow", "a cat"])
    dataset = PairDataset(ScenesDataset("test", 2, 32))
    metrics, drawn = evaluate_reranking(model, processor, dataset, 2, 3, weight=0.0)
    assert all(of[-1].text == "" for of in drawn)
    assert metrics["caption_cider_reranked_both"] == metrics["caption_cider_reranked"]
