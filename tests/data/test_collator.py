"""Batches as they reach the model: the words, their labels, and packing."""

import itertools

import pytest
import torch

from mmgem import MMGEMProcessor
from mmgem.data.collator import PairCollator, pack
from tests.conftest import CORPUS, make_model, make_picture


def examples(captions):
    return [
        {"image": make_picture(i), "image_id": i, "caption": c, "bad": {i: "OSError: broken"} if i == 1 else {}}
        for i, c in enumerate(captions)
    ]


def rows_of(batch, processor):
    """Every row as words, and what it is asked to predict."""
    rows = []
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        rows.append((processor.tokenizer.decode(ids), processor.tokenizer.decode(labels[labels != -100])))
    return rows


def test_a_pair_is_a_sentence_and_a_caption(processor):
    batch = PairCollator(processor)(examples(["a dog on a beach", "cat"]))
    rows = rows_of(batch, processor)
    assert [row.replace("<pad>", "") for row, _ in rows] == [
        "<s>a dog on a beach[EMB]",
        "<s>cat[EMB]",
        "<s><image>[CAP]a dog on a beach</s>",
        "<s><image>[CAP]cat</s>",
    ]
    assert [labels for _, labels in rows] == ["", "", "a dog on a beach</s>", "cat</s>"]
    pad = processor.tokenizer.pad_token_id
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == pad)
    assert batch["bad"] == {1: "OSError: broken"} and batch["truncated"] == 0 and batch["pixel_values"].shape[0] == 2


def test_objectives_leave_out_what_they_do_not_need(processor):
    contrastive = PairCollator(processor, "contrastive")(examples(["a dog", "cat"]))
    assert len(contrastive["input_ids"]) == 2 and "labels" not in contrastive
    caption = PairCollator(processor, "caption")(examples(["a dog", "cat"]))
    assert len(caption["input_ids"]) == 2 and (caption["input_ids"] != processor.tokenizer.vocab["[EMB]"]).all()


def test_long_caption_keeps_emb_and_learns_no_end(processor):
    short = MMGEMProcessor(processor.image_processor, processor.tokenizer, max_length=6)
    batch = PairCollator(short)(examples(["a dog on a beach with two people", "cat"]))
    assert batch["truncated"] == 1
    (sentence, _), _, (_, labels), (_, whole) = rows_of(batch, processor)
    assert sentence.replace("<pad>", "").endswith("[EMB]")
    assert (batch["input_ids"][0] != processor.tokenizer.pad_token_id).sum() == 6
    assert not labels.endswith("</s>") and whole.endswith("</s>")
    assert "a dog on a beach with two people".startswith(labels)


def test_packed_rows_hold_the_same_sequences_with_restarting_positions(processor):
    captions = CORPUS * 2
    padded = PairCollator(processor)(examples(captions))
    packed = PairCollator(processor, pack_length=64)(examples(captions))
    assert packed["input_ids"].shape[1] == 64 and "attention_mask" not in packed
    sequences, pad = [], processor.tokenizer.pad_token_id
    for ids, positions in zip(packed["input_ids"], packed["position_ids"]):
        starts = [*(positions == 0).nonzero().flatten().tolist(), 64]
        for start, end in itertools.pairwise(starts):
            assert positions[start:end].tolist() == list(range(end - start))
            if ids[start] != pad:
                sequences.append(ids[start:end].tolist())
    assert sequences == [row[mask.bool()].tolist() for row, mask in zip(padded["input_ids"], padded["attention_mask"])]


@pytest.mark.parametrize("objective", ["joint", "contrastive", "caption"])
def test_packed_losses_and_gradients_equal_the_padded_ones(processor, objective):
    model = make_model(processor).train()
    results = []
    for pack_length in (0, 64, 128):
        batch = PairCollator(processor, objective, pack_length)(examples(CORPUS))
        model.zero_grad()
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("bad", "truncated", "pair_ids")}
        output = model(**inputs, return_loss=objective != "caption")
        output.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((output.loss.detach(), gradient))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=1e-5)
        assert (gradient - results[0][1]).norm() <= 1e-5 * results[0][1].norm()


def test_rows_too_short_for_a_sequence_are_refused(processor):
    with pytest.raises(ValueError, match=r"pack_length 51.*needs 52"):
        PairCollator(processor, pack_length=51)


def test_pack_keeps_the_order_and_the_length():
    sequences = [([i] * n, [-100] * n) for i, n in enumerate([5, 4, 2, 8, 1, 10, 3])]
    rows = pack(sequences, 10)
    assert [len(ids) for row in rows for ids, _ in row] == [5, 4, 2, 8, 1, 10, 3]
    assert [sum(len(ids) for ids, _ in row) for row in rows] == [9, 10, 1, 10, 3]
