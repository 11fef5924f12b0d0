"""Texts in batches of like length: each is embedded as if it were alone, in the order of the caller."""

from itertools import pairwise

import pytest
import torch

from mmgem.evaluation import embedding
from mmgem.evaluation.embedding import batches_by_length, embed_texts


TEXTS = [" ".join(["a dog on a beach"] * n) for n in (1, 7, 2, 5, 1, 3)] + ["snow", "two people"]


@pytest.mark.parametrize("tokens", [1, 30, 1000])
def test_each_as_if_it_were_alone(model, processor, monkeypatch, tokens):
    monkeypatch.setattr(embedding, "CPU_TOKENS", tokens)
    alone = [model.get_embedding(**processor(text=[text], max_length=20, return_tensors="pt")) for text in TEXTS]
    found = embed_texts(model, processor, TEXTS, batch_size=3, max_length=20)
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-6, rtol=0)
    assert not torch.allclose(found[0], found[1], atol=1e-4), "or it would not matter which is which"


def test_no_texts(model, processor):
    assert embed_texts(model, processor, []).shape == (0, 16)


def test_batches_hold_every_index_once_and_as_much_as_they_may():
    lengths = torch.randint(1, 60, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(batches_by_length(lengths, 8, 100))
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    for batch, following in pairwise(batches):
        assert len(batch) <= 8 and len(batch) * max(lengths[i] for i in batch) <= 100
        assert len(batch) == 8 or (len(batch) + 1) * lengths[following[0]] > 100, "one more would have fitted"
    assert list(batches_by_length([5, 3], 8, 2)) == [[1], [0]], "longer than a batch may be, and alone"
    assert list(batches_by_length([5, 3, 9], 2, None)) == [[1, 0], [2]]
