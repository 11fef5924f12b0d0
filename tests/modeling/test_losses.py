import torch

from mmgem.modeling_mmgem import caption_loss, contrastive_loss


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
    duplicates = torch.tensor([[False, True, False], [True, False, False], [False, False, False]])
    expected = 0.0
    for i, columns in enumerate(([0, 2], [1, 2], [0, 1, 2])):
        for own, others in ((texts[i], images), (images[i], texts)):
            logits = scale * others @ own
            expected += (logits[columns].logsumexp(0) - logits[i]) / 3
    loss = contrastive_loss(texts, images, scale, duplicates=duplicates)
    torch.testing.assert_close(loss, expected)
    assert loss < contrastive_loss(texts, images, scale)


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
