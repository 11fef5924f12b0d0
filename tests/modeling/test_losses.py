import pytest
import torch

from mmgem.modeling_mmgem import caption_loss, contrastive_loss, losses_mmgem


def unit(n, seed):
    return torch.nn.functional.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_contrastive_loss_is_the_plain_sum_of_both_directions():
    texts, images, scale = unit(5, 0).double(), unit(5, 1).double(), torch.tensor(7.0, dtype=torch.float64)
    expected = 0.0
    for i in range(5):
        to_images = torch.stack([scale * texts[i] @ images[j] for j in range(5)])
        to_texts = torch.stack([scale * images[i] @ texts[j] for j in range(5)])
        expected += (to_images.logsumexp(0) - to_images[i] + to_texts.logsumexp(0) - to_texts[i]) / 5
    torch.testing.assert_close(contrastive_loss(texts, images, scale).double(), expected, atol=1e-5, rtol=1e-5)


def test_local_rows_against_gathered_columns_average_to_the_whole():
    texts, images, scale = unit(6, 0), unit(6, 1), torch.tensor(5.0)
    parts = [
        contrastive_loss(texts[i : i + 2], images[i : i + 2], scale, texts, images, offset=i) for i in range(0, 6, 2)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), contrastive_loss(texts, images, scale))


def test_duplicates_are_no_negatives():
    texts, images, scale = unit(3, 0), unit(3, 1), torch.tensor(5.0)
    pair_ids = torch.tensor([[7, 1], [7, 2], [8, 3]])  # the first two share a caption
    expected = 0.0
    for i, columns in enumerate(([0, 2], [1, 2], [0, 1, 2])):
        for own, others in ((texts[i], images), (images[i], texts)):
            logits = scale * others @ own
            expected += (logits[columns].logsumexp(0) - logits[i]) / 3
    loss = contrastive_loss(texts, images, scale, pair_ids=pair_ids)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(contrastive_loss(texts, images, scale, pair_ids=pair_ids.flip(1)), expected)
    assert loss < contrastive_loss(texts, images, scale)


@pytest.mark.parametrize("with_ids", [False, True])
def test_blocks_of_rows_give_the_loss_and_gradient_of_the_whole(monkeypatch, with_ids):
    options = {"pair_ids": torch.randint(4, (11, 2), generator=torch.Generator().manual_seed(2))} if with_ids else {}
    results = []
    for block_size in (losses_mmgem.BLOCK_SIZE, 33):  # all at once; three rows, and two at last
        monkeypatch.setattr(losses_mmgem, "BLOCK_SIZE", block_size)
        inputs = [t.requires_grad_() for t in (unit(11, 0), unit(11, 1), torch.tensor(9.0))]
        loss = contrastive_loss(*inputs, **options)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_blocks_keep_no_similarities_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(losses_mmgem, "BLOCK_SIZE", 64 * 256)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        contrastive_loss(unit(256, 0).requires_grad_(), unit(256, 1).requires_grad_(), torch.tensor(9.0))
    assert max(saved, default=0) <= 256 * 8, "the embeddings themselves, 256 x 8, at most"


def test_similarities_stay_float32_under_autocast():
    texts, images, scale = unit(64, 0).bfloat16(), unit(64, 1).bfloat16(), torch.tensor(100.0)
    expected = contrastive_loss(texts.float(), images.float(), scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert contrastive_loss(texts, images, scale).item() == expected.item()


def test_caption_loss_is_a_mean_over_tokens_or_a_given_count():
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.arange(7)
    each = -logits.log_softmax(-1)[torch.arange(7), targets]
    torch.testing.assert_close(caption_loss(logits, targets), each.mean())
    torch.testing.assert_close(caption_loss(logits, targets, 21), each.sum() / 21)
    nothing = caption_loss(logits[:0], targets[:0])
    assert nothing.item() == 0
    nothing.backward()  # a graph, so that a batch without captions does not stop a run
