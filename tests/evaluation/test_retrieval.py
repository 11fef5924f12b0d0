import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgem.evaluation.retrieval import retrieval_metrics


def unit(n, seed, dim=6):
    return torch.nn.functional.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def brute_force(texts, images, owners, k):
    """The protocol in words, one query at a time."""
    similarity = (texts @ images.T).tolist()
    to_image = []
    for t, row in enumerate(similarity):
        nearer = sum(row[i] >= row[owners[t]] for i in range(len(images)) if i != owners[t])
        to_image.append(nearer < k)
    to_text = []
    for i in range(len(images)):
        best = max(similarity[t][i] for t in range(len(texts)) if owners[t] == i)
        nearer = sum(similarity[t][i] >= best for t in range(len(texts)) if owners[t] != i)
        to_text.append(nearer < k)
    return sum(to_image) / len(to_image), sum(to_text) / len(to_text)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), images=st.integers(1, 12), extra=st.integers(0, 20), chunk=st.integers(1, 9))
def test_equals_brute_force_with_several_captions_per_image(seed, images, extra, chunk):
    generator = torch.Generator().manual_seed(seed)
    owners = torch.cat([torch.arange(images), torch.randint(images, (extra,), generator=generator)])
    texts, pictures = unit(len(owners), seed), unit(images, seed + 1)
    metrics = retrieval_metrics(texts, pictures, owners, chunk_size=chunk)
    for k in (1, 5, 10):
        expected = brute_force(texts, pictures, owners.tolist(), k)
        if k <= images:
            assert metrics[f"text_to_image_R@{k}"] == pytest.approx(expected[0], abs=1e-6)
        if k <= len(owners):
            assert metrics[f"image_to_text_R@{k}"] == pytest.approx(expected[1], abs=1e-6)
    in_pairs = torch.stack([torch.arange(len(owners)), owners], 1)[torch.randperm(len(owners), generator=generator)]
    assert retrieval_metrics(texts, pictures, in_pairs) == metrics


@pytest.mark.parametrize("seed", range(3))
def test_one_to_one_equals_scikit_learn(seed):
    from sklearn.metrics import top_k_accuracy_score

    texts, images = unit(60, seed), unit(60, seed + 100)
    metrics = retrieval_metrics(texts, images, torch.arange(60), ks=(1, 5, 10))
    for direction, similarity in (("text_to_image", texts @ images.T), ("image_to_text", images @ texts.T)):
        for k in (1, 5, 10):
            expected = top_k_accuracy_score(range(60), similarity.numpy(), k=k, labels=range(60))
            assert metrics[f"{direction}_R@{k}"] == pytest.approx(expected)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), chunk=st.integers(1, 7))
def test_several_right_items_both_ways(seed, chunk):
    """Any of them will do, and none of them stands in the way of another."""
    generator = torch.Generator().manual_seed(seed)
    texts, images = unit(9, seed), unit(7, seed + 1)
    right = torch.rand(9, 7, generator=generator) < 0.3
    right[torch.arange(9), torch.arange(9) % 7] = True
    similarity = texts @ images.T
    metrics = retrieval_metrics(texts, images, right.nonzero(), ks=(1, 3), chunk_size=chunk)
    for direction, scores, of_query in (
        ("text_to_image", similarity, right),
        ("image_to_text", similarity.T, right.T),
    ):
        best = scores.masked_fill(~of_query, -2).amax(1, keepdim=True)
        ranks = 1 + ((scores >= best) & ~of_query).sum(1)
        for k in (1, 3):
            assert metrics[f"{direction}_R@{k}"] == pytest.approx((ranks <= k).float().mean().item())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_order_changes_nothing_and_a_perfect_item_lowers_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    owners = torch.cat([torch.arange(8), torch.randint(8, (12,), generator=generator)])
    texts, images = unit(20, seed), unit(8, seed + 1)
    metrics = retrieval_metrics(texts, images, owners, ks=(1, 3))
    order, places = torch.randperm(20, generator=generator), torch.randperm(8, generator=generator)
    assert retrieval_metrics(texts[order], images[places], places.argsort()[owners[order]], ks=(1, 3)) == metrics
    better = texts.clone()
    better[3] = images[owners[3]]
    found = retrieval_metrics(better, images, owners, ks=(1, 3))
    assert all(found[f"text_to_image_R@{k}"] >= metrics[f"text_to_image_R@{k}"] for k in (1, 3))


def test_equal_items_count_against_us_however_they_were_summed():
    """The right picture's twin is as near: rank 2. One differs in the last bits only."""
    images = unit(6, 0, dim=300)
    images = torch.cat([images, images[:1] * (1 + 1e-7)])
    metrics = retrieval_metrics(images, images, torch.arange(7), ks=(1, 2))
    assert metrics["text_to_image_R@1"] == pytest.approx(5 / 7)
    assert metrics["text_to_image_R@2"] == 1


def test_recall_at_more_items_than_there_are_is_left_out():
    metrics = retrieval_metrics(unit(8, 0), unit(4, 1), torch.arange(8) % 4, ks=(1, 4, 5, 10))
    assert {"text_to_image_R@4", "image_to_text_R@5"} <= metrics.keys()
    assert not {"text_to_image_R@5", "image_to_text_R@10"} & metrics.keys()


def test_hand_worked():
    images = torch.eye(3)
    texts = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0], [0.1, 0.9, 0], [0.8, 0.1, 0.6]]), dim=-1)
    metrics = retrieval_metrics(texts, images, torch.arange(3), ks=(1, 2))
    assert metrics["text_to_image_R@1"] == pytest.approx(2 / 3)
    assert metrics["text_to_image_R@2"] == 1
    assert metrics["text_to_image_median_rank"] == 1


def test_median_rank_is_that_of_the_field():
    """floor(median of ranks from 0) + 1, as the evaluations of COCO retrieval have it, of ranks 1, 2, 5 and 6."""
    images = torch.eye(8)
    texts = torch.zeros(8, 8)
    for query, rank in enumerate((1, 2, 5, 6, 1, 2, 5, 6)):
        others = [i for i in range(8) if i != query]
        texts[query, query] = 0.5
        texts[query, others[: rank - 1]] = 0.7
    metrics = retrieval_metrics(torch.nn.functional.normalize(texts, dim=-1), images, torch.arange(8))
    ranks = np.array([0, 1, 4, 5, 0, 1, 4, 5])
    assert metrics["text_to_image_median_rank"] == np.floor(np.median(ranks)) + 1 == 3


def test_embeddings_that_are_not_of_unit_norm_are_refused():
    texts = unit(4, 0)
    texts[3] *= 2
    with pytest.raises(ValueError, match="1 of 4 text embeddings are not of unit norm: number 3 has 2"):
        retrieval_metrics(texts, unit(4, 1), torch.arange(4))
    half = unit(4, 0, dim=64).to(torch.bfloat16)
    retrieval_metrics(half, half, torch.arange(4))


def test_constant_embeddings_do_not_score():
    constant = torch.ones(10, 4) / 2
    metrics = retrieval_metrics(constant, constant, torch.arange(10))
    assert metrics["text_to_image_R@1"] == metrics["image_to_text_R@5"] == 0
    assert metrics["text_to_image_median_rank"] == 10


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused(value):
    texts, images = unit(4, 0), unit(4, 1)
    texts[2, 0] = value
    with pytest.raises(ValueError, match=r"1 of 4 embeddings .* the first that of 'text 2'"):
        retrieval_metrics(texts, images, torch.arange(4))
    with pytest.raises(ValueError, match=r"1 of 4 embeddings .* the first that of 'image 2'"):
        retrieval_metrics(images, texts, torch.arange(4))


def test_picture_without_a_text_and_text_without_a_picture_are_refused():
    with pytest.raises(ValueError, match="text 1 is wrong"):
        retrieval_metrics(unit(2, 0), unit(1, 1), torch.tensor([[0, 0]]))
    with pytest.raises(ValueError, match="an image for 1 of 2 texts"):
        retrieval_metrics(unit(2, 0), unit(1, 1), torch.tensor([0]))
    with pytest.raises(ValueError, match="image 1 is wrong"):
        retrieval_metrics(unit(2, 0), unit(3, 1), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="image -1 is wrong"):
        retrieval_metrics(unit(2, 0), unit(2, 1), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="image 5 is wrong"):
        retrieval_metrics(unit(3, 0), unit(2, 1), torch.tensor([0, 1, 5]))
