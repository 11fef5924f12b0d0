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
        assert metrics[f"text_to_image_R@{k}"] == pytest.approx(expected[0], abs=1e-6)
        assert metrics[f"image_to_text_R@{k}"] == pytest.approx(expected[1], abs=1e-6)


def test_hand_worked():
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 0, 0], [0.1, 0.9, 0], [0.8, 0.1, 0.6]])
    metrics = retrieval_metrics(texts, images, torch.arange(3), ks=(1, 2))
    assert metrics["text_to_image_R@1"] == pytest.approx(2 / 3)
    assert metrics["text_to_image_R@2"] == 1
    assert metrics["text_to_image_median_rank"] == 1


def test_constant_embeddings_do_not_score():
    constant = torch.ones(10, 4) / 2
    metrics = retrieval_metrics(constant, constant, torch.arange(10))
    assert metrics["text_to_image_R@1"] == metrics["image_to_text_R@5"] == 0
    assert metrics["text_to_image_median_rank"] == 10


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused(value):
    texts, images = unit(4, 0), unit(4, 1)
    texts[2, 0] = value
    with pytest.raises(ValueError, match="1 of 4 text embeddings"):
        retrieval_metrics(texts, images, torch.arange(4))
    with pytest.raises(ValueError, match="1 of 4 image embeddings"):
        retrieval_metrics(images, texts, torch.arange(4))


def test_picture_without_a_text_is_refused():
    with pytest.raises(ValueError, match="picture 1 is wrong"):
        retrieval_metrics(unit(2, 0), unit(3, 1), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="picture 5 is wrong"):
        retrieval_metrics(unit(3, 0), unit(2, 1), torch.tensor([0, 1, 5]))
