"""Batches as they reach the model: the words, their labels, and packing."""

import itertools

import numpy as np
import pytest
import torch
from transformers.models.bit import BitImageProcessorPil
from transformers.models.clip import CLIPImageProcessorPil
from transformers.models.siglip import SiglipImageProcessorPil

from mmgem import MMGEMProcessor
from mmgem.data.collator import MODEL_INPUTS, PairCollator, pack
from mmgem.data.pairs import digest
from mmgem.modeling_mmgem import contrastive_loss
from tests.conftest import CORPUS, make_model, make_picture


LANGUAGE_MODELS = {
    "llama": {},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "sliding_window": 4},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0, "resid_pdrop": 0}
    | {"embd_pdrop": 0},
}


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


def sequences_of(batch, pad):
    """The sequences of packed rows, in order, without padding; positions must restart with each."""
    sequences = []
    for ids, positions in zip(batch["input_ids"], batch["position_ids"]):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in itertools.pairwise(starts):
            assert positions[start:end].tolist() == list(range(end - start))
            if ids[start] != pad:
                sequences.append(ids[start:end].tolist())
    return sequences


def texts_of(batch, emb):
    """The words in front of each [EMB] that `text_positions` names, in the order of the images."""
    positions = batch["text_positions"][batch["text_index"]]
    row, end = positions // 64, positions % 64
    assert batch["input_ids"][row, end].eq(emb).all()
    start = end - batch["position_ids"][row, end]
    return [batch["input_ids"][r, s + 1 : e].tolist() for r, s, e in zip(row, start, end)]


def test_packed_rows_hold_the_same_sequences_and_say_which_belong_together(processor):
    captions = [*CORPUS, "snow", "a dog", "two people ride red bicycles on a beach on the mat"]
    padded = PairCollator(processor)(examples(captions))
    packed = PairCollator(processor, pack_length=64)(examples(captions))
    assert packed["input_ids"].shape[1] == 64 and "attention_mask" not in packed
    assert len(packed["input_ids"]) < len(padded["input_ids"]) / 3
    found = sequences_of(packed, processor.tokenizer.pad_token_id)
    expected = [row[mask.bool()].tolist() for row, mask in zip(padded["input_ids"], padded["attention_mask"])]
    assert sorted(found) == sorted(expected)
    emb = processor.tokenizer.vocab["[EMB]"]
    texts = [sequence[1:-1] for sequence in found if sequence[-1] == emb]
    written = [sequence[3:-1] for sequence in found if sequence[-1] != emb]
    # Each text's [EMB], in the order of the captions.
    assert texts_of(packed, emb) == written and sorted(texts) == sorted(written)
    # The pictures are those of the captions, in this order.
    order = [int(image_id) for image_id in packed["pair_ids"][:, 1]]
    assert written == [expected[i][1:-1] for i in order] and sorted(order) == list(range(len(captions)))
    assert torch.equal(packed["pixel_values"], padded["pixel_values"][order])


@pytest.mark.parametrize("objective", ["joint", "contrastive", "caption"])
@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_packed_losses_and_gradients_equal_the_padded_ones(processor, objective, language_model):
    model = make_model(processor, **LANGUAGE_MODELS[language_model]).train()
    results = []
    for pack_length in (0, 64, 128):
        batch = PairCollator(processor, objective, pack_length)(examples(CORPUS))
        model.zero_grad()
        output = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch})
        losses = [] if objective == "contrastive" else [output.caption_loss]
        if objective != "caption":
            texts = output.text_embeds[batch["text_index"]]
            losses.append(contrastive_loss(texts, output.image_embeds, output.logit_scale))
        loss = torch.stack(losses).sum()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((loss.detach(), gradient))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=1e-5)
        assert (gradient - results[0][1]).norm() <= 1e-5 * results[0][1].norm()


@pytest.mark.parametrize("objective", ["joint", "contrastive"])
@pytest.mark.parametrize("mini_batch_size", [0, 4])
def test_hard_negatives_are_more_sentences_behind_those_of_the_images(processor, objective, mini_batch_size):
    hard = ["snow on a bicycle", None, "the dog", None, "a cat on a mountain in the snow", None]
    rows = [
        {**example, "captions": [example["caption"], "snow"][: 1 + i % 2], "negative": text}
        for i, (example, text) in enumerate(zip(examples(CORPUS[:6]), hard))
    ]
    batch = PairCollator(processor, objective, 64, mini_batch_size)(rows)
    emb, found = processor.tokenizer.vocab["[EMB]"], []
    for part in batch.get("mini_batches", [batch]):
        for inputs in (part, *([part["sentences"]] if mini_batch_size else [])):
            texts = [processor.tokenizer.decode(ids) for ids in texts_of({**part, **inputs}, emb)]
            ids = [*part["pair_ids"][:, 0].tolist(), *part["negative_ids"].tolist()]
            assert ids == [digest(text.encode()) for text in texts]
            own = [set(row) for row in part["own_ids"].tolist()]
            order = part["pair_ids"][:, 1].tolist()
            assert own == [{digest(text.encode()) for text in rows[i]["captions"]} for i in order]
        found += texts[len(part["pair_ids"]) :]
    assert found == [text for text in hard if text]
    assert "negative_ids" not in PairCollator(processor, "caption", 64)(rows)


def test_mini_batches_are_the_batch_in_parts(processor):
    captions = [*CORPUS[:4], "snow", "a dog"]
    batch = PairCollator(processor, pack_length=64, mini_batch_size=4)(examples(captions))
    first, second = batch["mini_batches"]
    assert len(first["pixel_values"]) == 4 and len(second["pixel_values"]) == 2 and batch["bad"]
    assert torch.equal(torch.cat([first["pair_ids"], second["pair_ids"]])[:, 1].sort().values, torch.arange(6))
    emb, pad = processor.tokenizer.vocab["[EMB]"], processor.tokenizer.pad_token_id
    for part in (first, second):
        alone, mixed = (texts_of(batch, emb) for batch in (part["sentences"], part))
        assert alone == mixed and len(alone) == len(part["pixel_values"])
        assert sorted(alone) == sorted(row[1:-1] for row in sequences_of(part["sentences"], pad))


@pytest.mark.parametrize("image_processor", [CLIPImageProcessorPil, SiglipImageProcessorPil, BitImageProcessorPil])
@pytest.mark.parametrize("options", [{}, {"do_normalize": False}, {"do_rescale": False}])
def test_pictures_are_what_the_image_processor_makes_of_them(processor, image_processor, options):
    image_processor = image_processor(image_mean=[0.5, 0.4, 0.3], image_std=[0.3, 0.2, 0.4], **options)
    own = MMGEMProcessor(image_processor, processor.tokenizer)
    examples = [{"image": make_picture(i), "image_id": i, "caption": "a dog", "bad": {}} for i in range(3)]
    expected = image_processor([example["image"] for example in examples], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(PairCollator(own)(examples)["pixel_values"], expected.float(), atol=2e-5, rtol=1e-5)


def test_rows_too_short_for_a_sequence_are_refused(processor):
    with pytest.raises(ValueError, match=r"pack_length 51.*needs 52"):
        PairCollator(processor, pack_length=51)


def test_pack_fills_rows_with_what_fits_best():
    lengths = [5, 4, 2, 8, 1, 10, 3]
    rows = pack(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(7))
    assert sorted(sum(lengths[i] for i in row) for row in rows) == [3, 10, 10, 10]
    assert pack(lengths, 0) == [[i] for i in range(7)] and pack([], 10) == []
    many = np.random.default_rng(0).integers(8, 30, 512)
    rows = pack(many.tolist(), 128)
    assert max(many[row].sum() for row in rows) <= 128
    assert many.sum() / (128 * len(rows)) > 0.98


def test_positions_of_padding_end_where_those_of_the_longest_sequence_do(processor):
    """A table of positions need not reach to the end of a row."""
    batch = PairCollator(processor, pack_length=200)(examples(["a dog"]))
    assert batch["position_ids"].max() < processor.longest_sequence < 200
