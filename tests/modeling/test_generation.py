"""Captions from `generate`, against a loop over the plain forward pass."""

import logging
import warnings

import pytest
import torch
from transformers import CompileConfig, pipeline

from mmgem import MMGEMModel, MMGEMProcessor
from mmgem.modeling_mmgem import generation_mmgem
from tests.conftest import make_model, make_picture


NEW = 8


def prompts(processor, count=2, **kwargs):
    return processor(images=[make_picture(i) for i in range(count)], task="caption", return_tensors="pt", **kwargs)


def next_token(model, inputs, ids, pixels):
    """The likeliest next token of one row, from a full forward pass without cache or mask."""
    with torch.no_grad():
        scores = model(input_ids=ids[None], pixel_values=pixels[None]).logits[0, -1]
    scores[model.generation_config.suppress_tokens] = -torch.inf
    return scores.log_softmax(-1)


def greedy_reference(model, inputs):
    """Row by row, the picture given to every pass anew."""
    rows = []
    for ids, mask, pixels in zip(inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"]):
        row = ids[mask.bool()]
        for _ in range(NEW):
            token = next_token(model, inputs, row, pixels).argmax()
            row = torch.cat([row, token[None]])
            if token == model.generation_config.eos_token_id:
                break
        rows.append(row[mask.sum() :].tolist())
    return rows


def new_tokens(model, inputs, ids):
    """What was written behind the prompt, up to EOS."""
    rows = []
    for row in ids[:, inputs["input_ids"].shape[1] :].tolist():
        eos = model.generation_config.eos_token_id
        rows.append(row[: row.index(eos) + 1] if eos in row else row)
    return rows


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_greedy_equals_the_plain_loop(model, processor, options):
    inputs = prompts(processor, 3)
    ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)
    assert new_tokens(model, inputs, ids) == greedy_reference(model, inputs)
    assert len({tuple(row) for row in new_tokens(model, inputs, ids)}) == 3, "the pictures make no difference"


def test_left_padded_batch_of_prefixes_equals_single_rows(model, processor):
    texts = ["a dog on", "the", "two people ride red"]
    inputs = prompts(processor, 3, text=texts)
    assert not inputs["attention_mask"].all()
    ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert new_tokens(model, inputs, ids) == greedy_reference(model, inputs)
    for i, caption in enumerate(processor.batch_decode(ids, skip_special_tokens=True)):
        assert caption.startswith(texts[i])


def test_beams_find_a_caption_at_least_as_likely_and_keep_their_picture(model, processor):
    inputs = prompts(processor)

    def log_likelihood(row, i):
        prompt = inputs["input_ids"][i]
        tokens = torch.tensor(row)
        with torch.no_grad():
            full = torch.cat([prompt, tokens])
            logits = model(input_ids=full[None], pixel_values=inputs["pixel_values"][i][None]).logits[0]
        return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, tokens[:, None]).sum().item()

    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    greedy = new_tokens(model, inputs, model.generate(**inputs, **options))
    found = model.generate(
        **inputs, **options, num_beams=4, num_return_sequences=2, return_dict_in_generate=True, output_scores=True
    )
    beams = new_tokens(model, inputs, found.sequences)
    assert len(beams) == 4
    for i in range(2):
        best, second = (log_likelihood(beams[2 * i + j], i) for j in range(2))
        assert best >= second and best >= log_likelihood(greedy[i], i) - 1e-4
        # The score that beam search computed, with its cache and reordering, is that of the row and its own picture.
        assert found.sequences_scores[2 * i].item() * 4 == pytest.approx(best, abs=1e-3)


def test_sampling_and_num_return_sequences(model, processor):
    inputs = prompts(processor)
    greedy = new_tokens(model, inputs, model.generate(**inputs, max_new_tokens=NEW, do_sample=False))
    options = {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 3}
    only_best = new_tokens(model, inputs, model.generate(**inputs, **options, top_k=1))
    assert only_best == [greedy[0]] * 3 + [greedy[1]] * 3
    torch.manual_seed(0)
    drawn = new_tokens(model, inputs, model.generate(**inputs, **options, temperature=2.0))
    assert len({tuple(row) for row in drawn}) > 3
    torch.manual_seed(0)
    assert drawn == new_tokens(model, inputs, model.generate(**inputs, **options, temperature=2.0))


def test_tokens_that_are_no_words_are_never_written(model, processor):
    inputs = prompts(processor, 4)
    torch.manual_seed(0)
    ids = model.generate(**inputs, max_new_tokens=50, do_sample=True, temperature=50.0, num_return_sequences=4)
    special = {model.config.image_token_id, model.config.cap_token_id, model.config.emb_token_id}
    written = {token for row in new_tokens(model, inputs, ids) for token in row}
    assert len(written) > 100 and not special & written


def test_every_region_gets_its_own_caption(processor):
    # Four [CAP] instead of 64: among those, one visual token of a random model would count for little.
    processor = MMGEMProcessor(processor.image_processor, processor.tokenizer, num_soft_prompts=4, region_grid_size=1)
    model = make_model(processor, config={"num_soft_prompts": 4})
    pictures = [make_picture(0), make_picture(1)]
    boxes = [[[0, 0, 20, 20], [20, 10, 48, 40]], [[5, 5, 45, 38]]]
    inputs = processor(images=pictures, boxes=boxes, task="region-caption", return_tensors="pt")
    batch = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, num_beams=2)
    assert len(batch) == 3
    single = []
    for picture, of_image in zip(pictures, boxes):
        for box in of_image:
            alone = processor(images=[picture], boxes=[[box]], task="region-caption", return_tensors="pt")
            single += new_tokens(model, alone, model.generate(**alone, max_new_tokens=NEW, num_beams=2))
    assert new_tokens(model, inputs, batch) == single
    assert len({tuple(row) for row in single}) > 1


@pytest.mark.parametrize("k", [1, 2])
def test_many_regions_come_in_parts_with_the_same_captions(processor, monkeypatch, k):
    """Five regions of two pictures, two at a time, as all at once; the parts may differ in length."""
    processor = MMGEMProcessor(processor.image_processor, processor.tokenizer, num_soft_prompts=4, region_grid_size=k)
    model = make_model(processor, config={"num_soft_prompts": 4, "region_grid_size": k})
    with torch.no_grad():  # so that each region has a caption of its own
        model.visual_projection.weight.normal_(std=2.0)
        model.caption_projection.weight.normal_(std=2.0)
        for layer in model.language_model.layers:
            for parameter in layer.parameters():
                parameter.mul_(6 if parameter.ndim == 2 else 1)
    boxes = [[[i, i, 20 + i, 20 + 2 * i] for i in range(4)], [[5, 5, 45, 38]]]
    inputs = processor(
        images=[make_picture(0), make_picture(1)], boxes=boxes, task="region-caption", return_tensors="pt"
    )
    whole = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert len({tuple(row) for row in new_tokens(model, inputs, whole)}) >= 4
    rows = []
    build = MMGEMModel._build_inputs
    monkeypatch.setattr(
        MMGEMModel, "_build_inputs", lambda s, ids, *a, **k: rows.append(len(ids)) or build(s, ids, *a, **k)
    )
    monkeypatch.setattr(generation_mmgem, "MAX_ROWS", 2)
    parts = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert new_tokens(model, inputs, parts) == new_tokens(model, inputs, whole)
    assert [count for count in rows if count > 0][:1] == [2] and max(rows) == 2
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert len(output.sequences) == 5


def test_pipelines_of_the_library(model, processor):
    pictures = [make_picture(0, (64, 64)), make_picture(1, (64, 64))]
    parts = {"model": model, "tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    classify = pipeline("zero-shot-image-classification", **parts)
    labels = ["a dog", "the cat", "snow"]
    result = classify(pictures[0], candidate_labels=labels, hypothesis_template="{}")
    with torch.no_grad():
        scores = model(**processor(text=labels, images=pictures[:1], return_tensors="pt")).logits_per_image.softmax(-1)
    assert {r["label"]: pytest.approx(r["score"], abs=1e-5) for r in result} == dict(zip(labels, scores[0].tolist()))

    caption = pipeline("image-text-to-text", model=model, processor=processor)
    result = caption(
        images=pictures,
        text=["<image>", "<image>"],
        return_full_text=False,
        generate_kwargs={"max_new_tokens": NEW, "do_sample": False},
    )
    inputs = processor(images=pictures, task="caption", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    captions = [r[0]["generated_text"] if isinstance(r, list) else r["generated_text"] for r in result]
    assert captions == processor.batch_decode(ids, skip_special_tokens=True)

    extract = pipeline("image-feature-extraction", model=model, image_processor=processor.image_processor)
    with torch.no_grad():
        embedding = model.get_embedding(**processor(images=pictures[:1], return_tensors="pt"))
    torch.testing.assert_close(torch.tensor(extract(pictures[0])), embedding)


def test_decoding_with_a_static_cache_is_one_graph(model, processor):
    inputs = prompts(processor)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    expected = model.generate(**inputs, **options)
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True  # transformers compiles on accelerators alone
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = model.generate(**inputs, **options, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_hidden_states_and_attentions_of_generate(model, processor):
    inputs = prompts(processor)
    model.set_attn_implementation("eager")
    output = model.generate(
        **inputs,
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    layers, start = model.config.text_config.num_hidden_layers, inputs["input_ids"].shape[1]
    assert len(output.hidden_states) == len(output.attentions) == output.sequences.shape[1] - start
    assert {len(step) for step in output.hidden_states} == {layers + 1}
    assert {len(step) for step in output.attentions} == {layers}
    # What the head reads at each step.
    logits = model._logits(output.hidden_states[1][-1][:, -1])
    assert torch.equal(logits.argmax(-1), output.sequences[:, start + 1])
    states = model(**inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[-1], output.hidden_states[0][-1])


def test_no_deprecated_name_is_used(model, processor, tmp_path, caplog, monkeypatch):
    """Of any version of transformers: 5.24 renamed `past_key_values` to `cache`, in arguments and in outputs."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inputs = prompts(processor)
        model.save_pretrained(tmp_path)
        output = MMGEMModel.from_pretrained(tmp_path)(**inputs, use_cache=True)
        name = "cache" if hasattr(output, "cache") else "past_key_values"
        assert output[name].get_seq_length() == inputs["input_ids"].shape[1]
        model.generate(**inputs, max_new_tokens=3, num_beams=2, return_dict_in_generate=True)
        model.get_embedding(**processor(text=["a dog"], return_tensors="pt"))
    messages = [str(w.message) for w in caught if issubclass(w.category, FutureWarning | DeprecationWarning)]
    assert [m for m in [*messages, *caplog.messages] if "deprecated" in m] == []


def test_sentences_and_nan_are_no_prompts(model, processor):
    with pytest.raises(ValueError, match=r"a sentence, which ends with \[EMB\].*Pass images"):
        model.generate(**processor(text=["a dog", "<image>"], return_tensors="pt"))
    inputs = prompts(processor, 2)
    for value in (float("nan"), float("inf")):
        inputs["pixel_values"][1, 0, 3, 3] = value
        with pytest.raises(ValueError, match="features of pixel_values are NaN or infinite"):
            model.generate(**inputs, max_new_tokens=2)
