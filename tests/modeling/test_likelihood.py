"""Scores of texts as captions of images, against a plain forward of each pair."""

import pytest
import torch

from tests.conftest import CORPUS, make_model, make_picture


TEXTS = [*CORPUS[:2], "snow", "two people ride red bicycles on a mountain"]


def plain_score(model, processor, image, text, boxes=None, with_image=True):
    """The mean log-probability of a text's tokens and EOS, by one forward of "prompt text EOS"."""
    regions = {} if boxes is None else {"boxes": [boxes]}
    inputs = processor(images=[image], text=[text], task="score", return_tensors="pt", **regions)
    text_ids = inputs.pop("labels")[0]
    prompt = inputs["input_ids"][0]
    if not with_image:
        prompt, inputs = prompt[prompt != model.config.image_token_id], {}
    inputs["input_ids"] = torch.cat([prompt, text_ids])[None]
    inputs.pop("attention_mask", None)
    log_probs = model(**inputs).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    return log_probs.gather(1, text_ids[:, None]).mean()


@torch.no_grad()
@pytest.mark.parametrize(
    "k, text", [(1, {}), (2, {}), (1, {"model_type": "gpt2"}), (1, {"model_type": "gemma2", "sliding_window": 4})]
)
def test_scores_equal_a_plain_forward_of_each_pair(processor, k, text, monkeypatch):
    monkeypatch.setattr("mmgem.modeling_mmgem.likelihood_mmgem.MAX_TOKENS", {"cpu": 40})
    monkeypatch.setattr("mmgem.modeling_mmgem.likelihood_mmgem.MAX_PROMPTS", 1)
    monkeypatch.setattr("mmgem.modeling_mmgem.likelihood_mmgem.MAX_LOGITS", 1000)
    model = make_model(processor, config={"image_grid_size": k}, **text)
    monkeypatch.setattr(processor, "image_grid_size", k)
    images = [make_picture(i) for i in range(2)]
    inputs = processor(images=images, text=TEXTS, task="score", return_tensors="pt")
    expected = torch.stack([torch.stack([plain_score(model, processor, i, t) for t in TEXTS]) for i in images])
    found = model.score(**inputs)
    assert found.shape == (2, 4) and found.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    pairs = torch.tensor([[1, 3], [0, 0], [1, 0], [1, 3]])
    rows, columns = pairs.T
    torch.testing.assert_close(model.score(**inputs, pairs=pairs), expected[rows, columns], atol=1e-4, rtol=0)
    prior = torch.stack([plain_score(model, processor, images[0], t, with_image=False) for t in TEXTS])
    torch.testing.assert_close(model.score(**inputs, alpha=0.5), expected - 0.5 * prior, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        model.score(**inputs, pairs=pairs, alpha=1.0),
        (expected - prior)[rows, columns],
        atol=1e-4,
        rtol=0,
    )


@torch.no_grad()
def test_scores_of_regions(processor):
    model = make_model(processor)
    model.soft_prompts.weight.normal_()
    images = [make_picture(0), make_picture(1)]
    boxes = [[[2, 3, 20, 30], [10, 10, 40, 38]], [[5, 5, 30, 30]]]
    inputs = processor(images=images, text=TEXTS, boxes=boxes, task="score", return_tensors="pt")
    expected = [
        torch.stack([plain_score(model, processor, image, text, [box]) for text in TEXTS])
        for image, own in zip(images, boxes)
        for box in own
    ]
    torch.testing.assert_close(model.score(**inputs), torch.stack(expected), atol=1e-4, rtol=0)


def test_a_prompt_goes_through_the_language_model_once(model, processor, monkeypatch):
    """Not once for each of its texts, which run after copies of its keys and values."""
    tokens = []
    monkeypatch.setattr(
        model.language_model,
        "forward",
        lambda forward=model.language_model.forward, **kwargs: (
            tokens.append(kwargs["inputs_embeds"].shape[0] * kwargs["inputs_embeds"].shape[1]) or forward(**kwargs)
        ),
    )
    images = [make_picture(i) for i in range(3)]
    inputs = processor(images=images, text=["snow"] * 4, task="score", return_tensors="pt")
    model.score(**inputs)
    prompt, text = inputs["input_ids"].shape[1], inputs["labels"].shape[1]
    assert tokens == [3 * prompt, 12 * (text - 1)]


def test_training_predicts_what_is_scored(model, processor):
    """L_Gen of a caption is the negative score of its text."""
    inputs = processor(images=[make_picture(0)], text=TEXTS[:1], task="score", return_tensors="pt")
    score = model.score(**inputs)
    words = inputs.pop("labels")
    prompt = inputs.pop("input_ids")
    ids = torch.cat([prompt, words], 1)
    labels = torch.cat([torch.full_like(prompt, -100), words], 1)
    loss = model(input_ids=ids, labels=labels, pixel_values=inputs["pixel_values"]).caption_loss
    torch.testing.assert_close(-score[0, 0], loss)


def test_what_cannot_be_scored_is_refused(model, processor):
    image = make_picture(0)
    inputs = processor(images=[image], text=["snow", "a dog"], task="score", return_tensors="pt")
    with pytest.raises(ValueError, match=r"text\[1\] of this call is empty"):
        processor(images=[image], text=["snow", "  "], task="score")
    with pytest.raises(ValueError, match=r"needs texts, but there are none"):
        processor(images=[image], task="score")
    with pytest.raises(ValueError, match=r"needs images"):
        processor(text=["snow"], task="score")
    labels = inputs["labels"].clone()
    labels[1] = -100
    with pytest.raises(ValueError, match=r"labels\[1\] has no token to score"):
        model.score(**{**inputs, "labels": labels})
    labels[1, 1] = 5
    with pytest.raises(ValueError, match=r"labels\[1\] has -100 before its end"):
        model.score(**{**inputs, "labels": labels})
    with pytest.raises(ValueError, match="alpha is nan"):
        model.score(**inputs, alpha=float("nan"))
    for pairs, message in (
        ([[0, 2]], r"pairs\[0\] is \[0, 2\], but there are 1 prompts and 2 texts"),
        ([[0, 0], [-1, 0]], r"pairs\[1\] is \[-1, 0\]"),
        ([0, 1], r"shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.score(**inputs, pairs=torch.tensor(pairs))
    with pytest.raises(ValueError, match="no pixel_values"):
        model.score(inputs["input_ids"], inputs["labels"])
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.score(**{**inputs, "pixel_values": inputs["pixel_values"] * torch.nan})
    with pytest.raises(TypeError, match="alhpa"):
        model.score(**inputs, alhpa=0.5)
    padded = {**inputs, "attention_mask": torch.zeros_like(inputs["input_ids"])}
    with pytest.raises(ValueError, match=r"prompts are padded.*max_length"):
        model.score(**padded)
    with pytest.raises(ValueError, match="no <image> placeholder"):
        model.score(**{**inputs, "input_ids": inputs["labels"].clamp(min=0)})


def test_long_texts_are_truncated_as_in_training(processor, caplog):
    inputs = processor(images=[make_picture(0)], text=[" ".join(["snow"] * 80)], task="score")
    assert "1 of 1 texts are longer" in caplog.text
    labels = inputs["labels"][0]
    assert len(labels) == processor.max_length - 2 and processor.tokenizer.eos_token_id not in labels
