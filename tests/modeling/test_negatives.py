"""Filters, weights and choices of negatives against loops over single numbers, in float64."""

import math

import pytest
import torch

from mmgem import MMGEMModel
from mmgem.modeling_mmgem import Negatives, contrastive_loss, relational_distillation
from mmgem.modeling_mmgem.negatives_mmgem import hardest_of_rows
from tests.conftest import make_model, make_picture


SCALE = 5.0


def embeddings(seed=0, count=12, dim=6, noise=1.5):
    """Texts near their images, unit norm, float64."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    texts = images + noise * torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return [torch.nn.functional.normalize(x, dim=-1).requires_grad_() for x in (texts, images)]


def row_of_loop(i, queries, keys, negatives, extra=(), left_out=()):
    """
    A row as the papers write it: cosine of the positive, and a list of the negatives' logits. Columns from `len(keys)`
    on are `extra` ones. Cosines in weights have no gradient.
    """
    positive = queries[i] @ keys[i]
    columns = [j for j in range(len(keys) + len(extra)) if j != i and (i, j) not in left_out]
    cosines = [queries[i] @ (keys[j] if j < len(keys) else extra[j - len(keys)]) for j in columns]
    if negatives.margin is not None:
        cosines = [cosine for cosine in cosines if cosine.item() <= positive.item() + negatives.margin]
    logits = [SCALE * cosine + negatives.hardness * cosine.item() for cosine in cosines]
    if negatives.hardest:
        logits.sort(key=lambda logit: -logit.item())
        logits = [logits[n % len(logits)] for n in range(negatives.hardest)] if logits else []
    return positive, logits


def looped(queries, keys, negatives, extra=(), left_out=()):
    """One direction of InfoNCE."""
    total = 0.0
    for i in range(len(queries)):
        positive, others = row_of_loop(i, queries, keys, negatives, extra, left_out)
        logits = torch.stack([SCALE * positive, *others])
        total = total + logits.logsumexp(0) - logits[0]
    return total / len(queries)


def looped_sigmoid(queries, keys, negatives, bias, extra=(), left_out=()):
    """SigLIP's loss (equation 1), pair by pair."""
    total = 0.0
    for i in range(len(queries)):
        positive, others = row_of_loop(i, queries, keys, negatives, extra, left_out)
        total = total - (SCALE * positive + bias).sigmoid().log()
        total = total - sum((-(logit + bias)).sigmoid().log() for logit in others)
    return total / len(queries)


def assert_gradients_equal(loss, expected, leaves):
    torch.testing.assert_close(loss.double(), expected, atol=1e-8, rtol=1e-8)
    for one, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=0)


CASES = {
    "margin": Negatives(margin=0.1),
    "negative margin": Negatives(margin=-0.2),
    "k hardest": Negatives(hardest=3),
    "more than there are": Negatives(hardest=40),
    "hardness": Negatives(hardness=9.0),
    "UniME": Negatives(margin=0.1, hardest=8),
    "all": Negatives(margin=0.0, hardness=2.0, hardest=4),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_equal_the_loop(name, seed):
    texts, images = embeddings(seed)
    loss = contrastive_loss(texts, images, torch.tensor(SCALE, dtype=torch.float64), negatives=CASES[name])
    expected = looped(texts, images, CASES[name]) + looped(images, texts, CASES[name])
    assert_gradients_equal(loss, expected, (texts, images))
    plain = contrastive_loss(texts, images, torch.tensor(SCALE, dtype=torch.float64))
    assert abs(float(loss - plain)) > 1e-6, "the option has an effect"


@pytest.mark.parametrize("name", ["plain", *CASES])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("seed", range(3))
def test_hard_negatives_and_their_gradients_equal_the_loop(name, kind, seed, monkeypatch):
    """With pairs that are no negatives of each other; two of the hard negatives are rows' own texts."""
    negatives = CASES.get(name, Negatives())
    texts, images = embeddings(seed)
    extra = embeddings(seed + 10, count=3)[0]
    ids = torch.arange(12)[:, None].repeat(1, 2) + torch.tensor([0, 100])
    ids[5, 0] = ids[4, 0]
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (SCALE, -2.0))
    monkeypatch.setattr("mmgem.modeling_mmgem.losses_mmgem.BLOCK_SIZE", 5 * 12)  # blocks of five rows
    loss = contrastive_loss(
        *(texts, images, scale),
        pair_ids=ids,
        negative_keys=extra,
        negative_ids=torch.tensor([7, 999, 102]),
        negatives=negatives,
        logit_bias=bias if kind == "sigmoid" else None,
    )
    twice = {(4, 5), (5, 4)}
    left_out, leaves = {*twice, (7, 12), (2, 14)}, [texts, images, extra]
    if kind == "sigmoid":
        expected = looped_sigmoid(texts, images, negatives, bias, extra, left_out)
        leaves.append(bias)
    else:
        expected = looped(texts, images, negatives, extra, left_out) + looped(images, texts, negatives, (), twice)
    assert_gradients_equal(loss, expected, leaves)


def test_sigmoid_loss_is_that_of_transformers(processor):
    model = make_model(processor, config={"logit_bias_init_value": -2.5})
    texts = processor(text=["a dog on a beach", "snow", "two people"], return_tensors="pt")
    inputs = {**texts, **processor(images=[make_picture(i) for i in range(3)], return_tensors="pt")}
    with torch.no_grad():
        output = model(**inputs, return_loss=True)
    assert output.logit_bias == -2.5 and output.logit_scale == pytest.approx(1 / 0.07)
    cosines = output.text_embeds @ output.image_embeds.T
    torch.testing.assert_close(output.logits_per_text, cosines / 0.07 - 2.5)
    # As in SiglipModel.forward.
    signs = -torch.ones(3, 3) + 2 * torch.eye(3)
    expected = -torch.nn.functional.logsigmoid(signs * output.logits_per_text).sum(-1).mean()
    torch.testing.assert_close(output.contrastive_loss, expected)


def test_the_bias_is_saved_and_stays_in_float32(processor, tmp_path):
    model = make_model(processor, config={"logit_bias_init_value": -10})
    model.logit_scale.bias.data.fill_(-9.7123)
    model.save_pretrained(tmp_path)
    loaded = MMGEMModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for found in (loaded, model.to(torch.bfloat16)):
        assert found.logit_scale.bias.dtype == torch.float32
        assert found.logit_scale.bias.item() == pytest.approx(-9.7123, abs=1e-6)
    assert make_model(processor).logit_scale.bias is None


def test_a_pair_twice_is_no_negative_and_never_stands_in_for_one():
    texts, images = embeddings(1)
    ids = torch.arange(12)[:, None].repeat(1, 2)
    ids[5] = ids[4]
    negatives, twice = Negatives(margin=0.1, hardest=8), {(4, 5), (5, 4)}
    loss = contrastive_loss(texts, images, torch.tensor(SCALE, dtype=torch.float64), pair_ids=ids, negatives=negatives)
    expected = looped(texts, images, negatives, (), twice) + looped(images, texts, negatives, (), twice)
    torch.testing.assert_close(loss.double(), expected, atol=1e-8, rtol=1e-8)


def test_fewer_than_k_are_repeated_and_what_was_left_out_is_not_among_them():
    """Public code takes the top k of a row that holds -inf, and so the filtered negatives, or the positive."""
    logits = torch.tensor([[3.0, -math.inf, 1.0, -math.inf, 2.0], [-math.inf] * 5])
    found = hardest_of_rows(logits, 7)
    assert found[0].tolist() == [3.0, 2.0, 1.0, 3.0, 2.0, 1.0, 3.0]
    assert found[1].isinf().all()


def test_a_row_without_negatives_has_no_loss_and_a_finite_gradient():
    texts, images = embeddings(2, count=3)
    negatives = Negatives(margin=-3.0, hardest=2)  # every negative is taken for a false one
    loss = contrastive_loss(texts, images, torch.tensor(SCALE, dtype=torch.float64), negatives=negatives)
    assert loss.item() == 0
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (texts, images)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("processes", [2, 4])
def test_rows_of_several_processes_add_up_to_the_whole(name, processes):
    texts, images = embeddings(6)
    scale, rows = torch.tensor(SCALE, dtype=torch.float64), 12 // processes
    whole = contrastive_loss(texts, images, scale, negatives=CASES[name])
    parts = [
        contrastive_loss(
            *(texts[start : start + rows], images[start : start + rows], scale, texts, images, start),
            negatives=CASES[name],
        )
        for start in range(0, 12, rows)
    ]
    mean = torch.stack(parts).mean()
    torch.testing.assert_close(mean, whole, atol=1e-10, rtol=1e-10)
    found, right = (torch.autograd.grad(value, (texts, images)) for value in (mean, whole))
    for one, other in zip(found, right):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_blocks_of_rows_change_nothing(name, monkeypatch):
    texts, images = embeddings(7)
    scale = torch.tensor(SCALE, dtype=torch.float64)
    whole = contrastive_loss(texts, images, scale, negatives=CASES[name])
    monkeypatch.setattr("mmgem.modeling_mmgem.losses_mmgem.BLOCK_SIZE", 5 * 12)
    blocks = contrastive_loss(texts, images, scale, negatives=CASES[name])
    torch.testing.assert_close(blocks, whole, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("ids", [None, [0, 1, 2, 3, 4, 5, 0, 7, 8, 9, 4, 4]], ids=["distinct", "some texts twice"])
@pytest.mark.parametrize("rows_at_once", [12, 3])
def test_distillation_equals_the_definition(offset, ids, rows_at_once, monkeypatch):
    monkeypatch.setattr("mmgem.modeling_mmgem.losses_mmgem.BLOCK_SIZE", rows_at_once * 12)
    student, teacher = embeddings(3, dim=6)[0], embeddings(4, dim=9)[0].detach()
    rows, scale = slice(offset, offset + 4), torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    numbers = () if ids is None else (torch.tensor(ids)[rows], torch.tensor(ids))
    loss = relational_distillation(student[rows], teacher[rows], scale, student, teacher, offset, *numbers)
    expected = 0.0
    for i in range(offset, offset + 4):
        others = [j for j in range(12) if j != i and (ids is None or ids[j] != ids[i])]
        p = (scale * torch.stack([teacher[i] @ teacher[j] for j in others])).softmax(0)
        q = (scale * torch.stack([student[i] @ student[j] for j in others])).softmax(0)
        expected = expected + (p * (p / q).log()).sum() / 4
    assert_gradients_equal(loss, expected, (student, scale))


def test_a_student_that_agrees_has_no_loss():
    student = embeddings(5)[0]
    loss = relational_distillation(student, student.detach(), torch.tensor(SCALE))
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_a_text_that_stands_alone_teaches_nothing():
    """All others of the batch are the same one: no loss, and a gradient of zeros."""
    student = embeddings(5)[0]
    ids = torch.zeros(len(student), dtype=torch.long)
    loss = relational_distillation(student, student.detach().flip(0), torch.tensor(SCALE), ids=ids)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0 and torch.equal(gradient, torch.zeros_like(student))
