"""The gradient cache alone; with the Trainer and several processes it is in test_distributed.py."""

import contextlib

import pytest
import torch
from torch import nn

from mmgem.modeling_mmgem import contrastive_loss
from mmgem.training.gradient_cache import cached_backward, refuse_dropout
from tests.conftest import make_model


def test_gradient_of_the_whole_and_one_exchange():
    torch.manual_seed(0)
    text, image, scale = nn.Linear(5, 4), nn.Linear(6, 4), nn.Parameter(torch.tensor(2.0))
    parameters = [*text.parameters(), *image.parameters(), scale]
    x, y = torch.randn(7, 5), torch.randn(7, 6)

    def embed(part):
        normalize = nn.functional.normalize
        return normalize(text(x[part]), dim=-1), normalize(image(y[part]), dim=-1), scale.exp()

    def own_loss(part):
        return image(y[part]).square().sum()

    whole = slice(0, 7)
    expected = torch.autograd.grad(contrastive_loss(*embed(whole)) + own_loss(whole), parameters)

    events = []

    @contextlib.contextmanager
    def no_sync():
        events.append("hold")
        yield
        events.append("release")

    def backward(total):
        events.append("backward")
        total.backward()

    parts = [slice(0, 3), slice(3, 6), slice(6, 7)]
    loss = cached_backward(
        parts, embed, contrastive_loss, lambda part: (embed(part), own_loss(part)), backward, no_sync
    )
    torch.testing.assert_close(loss, contrastive_loss(*embed(whole)).detach())
    for parameter, gradient in zip(parameters, expected):
        torch.testing.assert_close(parameter.grad, gradient)
    assert events == ["hold", "backward", "release"] * 2 + ["backward"]


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_dropout": 0.1},
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
        {"model_type": "starcoder2", "residual_dropout": 0.1},
    ],
    ids=["llama", "gpt2", "starcoder2"],
)
def test_whatever_drops_is_refused(processor, changes):
    with pytest.raises(ValueError, match=r"language_model.*is 0\.1: with active dropout"):
        refuse_dropout(make_model(processor, **changes))
    refuse_dropout(make_model(processor))
