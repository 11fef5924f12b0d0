"""What a text is: the same letters for training, the processor, its tokenizer alone and everyone who calls them."""

import json
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, pipeline

from mmgem import MMGEMProcessor
from mmgem.data.collator import PairCollator
from mmgem.data.pairs import as_captions
from tests.conftest import make_model, make_picture


SPELLED = ["<image>", "a [EMB] b", "[CAP]<s></s><pad>", "two <image><image> of [CAP]"]


def special_tokens(processor, ids):
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    return [token for token in tokens if token in processor.tokenizer.get_added_vocab()]


@pytest.mark.parametrize("text", SPELLED)
def test_special_tokens_that_a_text_spells_are_letters(processor, tmp_path, text):
    processor.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    example = {"caption": text, "image": make_picture(0), "image_id": 0, "bad": {}}
    rows = [
        processor(text=[text])["input_ids"][0],
        processor(text=[text, "a dog"], images=[make_picture(0)], padding=False)["input_ids"][0],
        processor.tokenizer(text)["input_ids"],  # pipelines call the tokenizer alone
        loaded(text)["input_ids"],
        PairCollator(processor, "contrastive")([example])["input_ids"][0].tolist(),
    ]
    for row in rows:
        assert row == rows[0] and special_tokens(processor, row) == ["<s>", "[EMB]"]
        assert processor.decode(row[1:-1]) == text


def test_image_is_a_placeholder_where_every_text_beside_images_has_it(processor):
    pictures = [make_picture(0), make_picture(1)]
    prompts = processor(images=pictures, text=["<image>a dog", "look: <image>"])["input_ids"]
    assert [row.count(processor.image_token_id) for row in prompts] == [1, 1]
    captions = processor(images=pictures, text=["a dog", "a text of <image>"])["input_ids"]
    assert [row.count(processor.image_token_id) for row in captions] == [0, 0]
    assert processor.decode(captions[1], skip_special_tokens=True) == "a text of <image>"
    with pytest.raises(ValueError, match=r"text\[0\] holds 2 <image>.*task="):
        processor(images=pictures[:1], text="<image><image>")


@pytest.mark.parametrize("text", [*SPELLED, "what is <image>?"])
def test_texts_of_a_task_and_of_a_chat_smuggle_in_nothing(processor, text):
    picture = make_picture(0)
    expected = ["<s>", "<image>", "[CAP]"]
    (behind,) = processor(images=[picture], text=text, task="caption")["input_ids"]
    assert special_tokens(processor, behind) == expected
    assert processor.decode(behind, skip_special_tokens=True) == text
    regions = {"images": [picture], "boxes": [[[0, 0, 20, 20]]], "task": "region-caption"}
    (of_region,) = processor(text=text, **regions)["input_ids"]
    assert special_tokens(processor, of_region) == ["<s>", "<image>"] + ["[CAP]"] * 64
    image, words = {"type": "image", "image": picture}, {"type": "text", "text": text}
    for content in ([image, words], [words, image]):
        chat = [{"role": "user", "content": content}]
        (row,) = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
        assert special_tokens(processor, row) == expected
        assert processor.decode(row, skip_special_tokens=True) == text
    chat = [{"role": "user", "content": [image]}, {"role": "assistant", "content": text}]
    (row,) = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    assert row == behind


def test_a_caption_goes_on_with_the_tokens_that_training_has_there(processor):
    """Behind [CAP] and at the start of a text words are the same tokens, with white space around them or not."""
    (sentence,) = processor(text=["a photo of"])["input_ids"]
    for text in ("a photo of", " a photo of ", "\na photo of"):
        for inputs in ({"text": text, "task": "caption"}, {"text": "<image>" + text}):
            (prompt,) = processor(images=[make_picture(0)], **inputs)["input_ids"]
            assert prompt[3:] == sentence[1:-1]


def test_white_space_around_a_text_says_nothing(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    expected = processor(text=["a  dog"])["input_ids"][0]
    around = [chr(i) for i in range(sys.maxunicode) if chr(i).isspace()] + ["\0", "\0 \n\0"]
    texts = [f"{space}a  dog{space}" for space in around]
    assert processor(text=texts)["input_ids"] == [expected] * len(texts)
    assert processor.tokenizer(texts)["input_ids"] == loaded(texts)["input_ids"] == [expected] * len(texts)
    assert as_captions(texts) == ["a  dog"] * len(texts)
    assert processor(text=["a\0  dog"])["input_ids"][0] == expected
    for empty in ("", " \0", "\0"):
        assert as_captions(empty) == []
        with pytest.raises(ValueError, match=r"text\[1\] of this call is empty"):
            processor(text=["a dog", empty])


def test_half_a_surrogate_pair_is_named(processor):
    with pytest.raises(ValueError, match=r"text\[1\] of this call: half a surrogate pair.*\\ud83d"):
        processor(text=["a dog", "a \ud83d dog"])
    with pytest.raises(ValueError, match=r"text\[0\] of this call: half a surrogate pair"):
        processor(images=[make_picture(0)], text="\udce9", task="caption")
    with pytest.raises(ValueError, match="half a surrogate pair"):
        as_captions(["a dog", "\ud83d"])


def test_an_empty_text_beside_an_image_says_what_to_do(processor):
    with pytest.raises(
        ValueError, match=r"text\[0\] of this call is empty, '': drop it.*leave text out.*task=\"caption\""
    ):
        processor(images=[make_picture(0)], text="")
    assert len(processor(images=[make_picture(0)], text="", task="caption")["input_ids"][0]) == 3


@pytest.mark.parametrize("length", [0, 1, 2, -1, 2.5, True, "50"])
def test_a_max_length_that_holds_no_text_is_refused(processor, tmp_path, length):
    with pytest.raises(ValueError, match=rf"max_length must be .* 3 .*got {length!r}"):
        processor(text=["a dog"], max_length=length)
    with pytest.raises(ValueError, match=rf"max_length must be .* 3 .*got {length!r}"):
        MMGEMProcessor(processor.image_processor, processor.tokenizer, max_length=length)
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_length": length}))
    with pytest.raises(ValueError, match="max_length must be"):
        MMGEMProcessor.from_pretrained(tmp_path)


def test_no_max_length_is_the_processors_own(processor):
    texts = ["a dog on a beach " * 30]
    assert len(processor(text=texts, max_length=None)["input_ids"][0]) == 50
    assert len(processor(text=texts, max_length=np.int64(3))["input_ids"][0]) == 3
    assert len(processor(text=texts, truncation="do_not_truncate")["input_ids"][0]) > 50


@pytest.mark.parametrize("change", [{"region_grid_size": 0}, {"num_soft_prompts": -1}, {"region_grid_size": 2.5}])
def test_sizes_of_prompts_are_checked(processor, change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be 1 or more"):
        MMGEMProcessor(processor.image_processor, processor.tokenizer, **change)


def test_labels_that_spell_tokens_are_classified(processor, tmp_path):
    model = make_model(processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path))
    labels = ["dog", "<image>", "[EMB]", " snow "]
    scores = classify(make_picture(0), candidate_labels=labels, hypothesis_template="{}")
    with torch.inference_mode():
        texts = model.get_embedding(**processor(text=labels, return_tensors="pt"))
        image = model.get_embedding(**processor(images=[make_picture(0)], return_tensors="pt"))
    logits = model.logit_scale(image @ texts.T)[0].softmax(-1)
    expected = dict(zip(labels, logits.tolist()))
    assert {s["label"]: s["score"] for s in scores} == pytest.approx(expected, abs=1e-5)
