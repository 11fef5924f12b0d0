"""The equivalents of transformers' common tests, and the contracts of the architecture."""

import json
import os

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from mmgem import MMGEMModel
from mmgem.modeling_mmgem.losses_mmgem import caption_loss_of_states
from tests.conftest import make_model, make_picture


def embed(model, processor, texts, **kwargs):
    with torch.no_grad():
        return model.get_embedding(**processor(text=texts, return_tensors="pt", **kwargs))


def test_saved_and_loaded_model_is_the_same(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is MMGEMModel
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    picture = make_picture(0)
    inputs = processor(images=[picture], task="caption", return_tensors="pt")
    loaded_inputs = loaded_processor(images=[picture], task="caption", return_tensors="pt")
    assert torch.equal(inputs["input_ids"], loaded_inputs["input_ids"])
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), loaded.generate(**loaded_inputs, max_new_tokens=5))


def test_sharded_checkpoint_and_device_map(model, processor, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len([name for name in os.listdir(tmp_path) if name.endswith(".safetensors")]) > 1
    loaded = AutoModel.from_pretrained(tmp_path, device_map="auto").eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    torch.testing.assert_close(embed(model, processor, ["a dog"]), embed(loaded, processor, ["a dog"]))


def test_checkpoint_without_stage_2_weights_gets_identity_and_zero(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {
        name: tensor
        for name, tensor in load_file(path).items()
        if not name.startswith(("region_projection", "soft_prompts"))
    }
    save_file(weights, path, metadata={"format": "pt"})
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.region_projection.weight, torch.eye(16))
    assert not loaded.region_projection.bias.any() and not loaded.soft_prompts.weight.any()
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("tie", [True, False])
def test_tied_weights_survive_saving(processor, tmp_path, tie):
    model = make_model(processor, tie_word_embeddings=tie)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tie
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tie
    loaded = AutoModel.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tie
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_resize_token_embeddings(processor):
    model = make_model(processor)
    before = embed(model, processor, ["a dog"])
    size = model.config.text_config.vocab_size
    model.resize_token_embeddings(size + 7)
    assert model.lm_head.out_features == model.config.text_config.vocab_size == size + 7
    assert torch.equal(before, embed(model, processor, ["a dog"]))


@pytest.mark.slow  # compiles flex attention
def test_attention_backends_agree(processor):
    texts = ["a dog on a beach", "cat"]
    reference = embed(make_model(processor), processor, texts)
    for backend in ("eager", "sdpa", "flex_attention"):
        model = make_model(processor)
        model.set_attn_implementation(backend)
        assert model.language_model.config._attn_implementation == backend
        torch.testing.assert_close(embed(model, processor, texts), reference, atol=1e-5, rtol=1e-5)


def joint_batch(processor, texts, pictures):
    """Rows of texts, then rows of captions, as training has them."""
    from mmgem.data.collator import PairCollator

    examples = [{"image": p, "image_id": i, "caption": t, "bad": {}} for i, (t, p) in enumerate(zip(texts, pictures))]
    batch = PairCollator(processor)(examples)
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "labels")}


def test_gradient_checkpointing_gives_the_same_gradient(processor):
    batch = joint_batch(processor, ["a dog on a beach", "the cat"], [make_picture(0), make_picture(1)])
    gradients = []
    for checkpointing in (False, True):
        model = make_model(processor).train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        model(**batch, return_loss=True).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_checkpointing_sends_no_gradient_through_a_frozen_vision_tower(processor):
    """The library's hook on the inputs of every tower would: a backward pass, and its memory, for nothing."""
    model = make_model(processor).train()
    model.vision_model.requires_grad_(False)
    model.activation_checkpointing_enable()
    pictures = processor(images=[make_picture(0)], return_tensors="pt")
    assert not model.vision_model(**pictures).last_hidden_state.requires_grad
    embeds = model.get_input_embeddings().requires_grad_(False)(torch.zeros(1, 3, dtype=torch.long))
    assert embeds.requires_grad  # which frozen language models with adapters need


@pytest.mark.parametrize("num_items", [None, 40])
def test_many_logits_come_in_parts_with_the_same_loss_and_gradient(processor, monkeypatch, num_items):
    texts = ["a dog on a beach", "the cat", "snow on a mountain", "two people"]
    batch = joint_batch(processor, texts, [make_picture(i) for i in range(4)])
    losses, gradients, largest = [], [], []
    labels = int((batch["labels"] != -100).sum())
    for limit in (2**27, labels // 5 * len(processor.tokenizer)):  # all; a fifth of the labels, six parts at most
        monkeypatch.setattr("mmgem.modeling_mmgem.losses_mmgem.MAX_LOGITS", limit)
        model = make_model(processor).train()
        hidden_states = torch.randn(*batch["labels"].shape, 32, generator=torch.Generator().manual_seed(0))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # noqa: B023
            size = model.config.text_config.vocab_size
            loss = caption_loss_of_states(hidden_states, batch["labels"], model._logits, size, None, num_items)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        largest.append(max(kept))
    assert largest[0] >= labels * len(processor.tokenizer) > 4 * largest[1]
    torch.testing.assert_close(losses[1], losses[0])
    assert gradients[0].keys() == {"lm_head.weight"} == gradients[1].keys()
    torch.testing.assert_close(gradients[1]["lm_head.weight"], gradients[0]["lm_head.weight"])


def test_bfloat16(processor):
    model = make_model(processor)
    reference = embed(model, processor, ["a dog on a beach"])
    half = model.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.cosine_similarity(embed(half, processor, ["a dog on a beach"]).float(), reference) > 0.99
    inputs = processor(images=[make_picture(0)], task="caption", return_tensors="pt")
    assert half.generate(**inputs, max_new_tokens=3).shape[1] >= 4


def test_compiles_without_graph_break(processor):
    model = make_model(processor)
    pictures = processor(images=[make_picture(0)], return_tensors="pt")
    regions = processor(images=[make_picture(0)], boxes=[[[0, 0, 20, 20], [4, 4, 40, 30]]], return_tensors="pt")
    for inputs in (processor(text=["a dog"], return_tensors="pt"), pictures, regions):
        compiled = torch.compile(model.get_embedding, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs), model.get_embedding(**inputs), atol=1e-5, rtol=1e-5)


def test_embedding_does_not_depend_on_padding_or_batch_mates(model, processor):
    texts = ["a dog on a beach", "cat", "two people ride red bicycles in the snow"]
    right = embed(model, processor, texts, padding_side="right")
    left = embed(model, processor, texts, padding_side="left")
    single = torch.cat([embed(model, processor, [text]) for text in texts])
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(single, right, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(right.norm(dim=-1), torch.ones(3))


def test_embedding_is_read_at_emb_and_nowhere_else(model, processor):
    inputs = processor(text=["a dog on a beach"], return_tensors="pt")
    features = model.get_text_features(**inputs)
    at_emb = features.last_hidden_state[:, -1]
    assert inputs["input_ids"][0, -1] == model.config.emb_token_id
    assert torch.equal(features.pooler_output, model.text_projection(at_emb))
    with pytest.raises(ValueError, match=r"\[EMB\]"):
        model.get_embedding(input_ids=inputs["input_ids"][:, :-1])


def test_packed_row_equals_padded_rows(model, processor):
    texts, pictures = ["a dog on a beach", "the cat"], [make_picture(0), make_picture(1)]
    batch = joint_batch(processor, texts, pictures)
    padded = model(**batch)
    sequences = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    labels = [ids[mask.bool()] for ids, mask in zip(batch["labels"], batch["attention_mask"])]
    order = [2, 0, 1, 3]  # captions and texts mixed; texts and pictures each keep their order
    packed = model(
        input_ids=torch.cat([sequences[i] for i in order])[None],
        position_ids=torch.cat([torch.arange(len(sequences[i])) for i in order])[None],
        labels=torch.cat([labels[i] for i in order])[None],
        pixel_values=batch["pixel_values"],
    )
    torch.testing.assert_close(packed.text_embeds, padded.text_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed.caption_loss, padded.caption_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed.logits_per_image, padded.logits_per_image, atol=1e-4, rtol=1e-5)


def test_losses_of_forward_against_the_definition(processor):
    model = make_model(processor)
    batch = joint_batch(processor, ["a dog on a beach", "the cat"], [make_picture(0), make_picture(1)])
    with torch.no_grad():
        output = model(**batch, return_loss=True)
    log_probs = output.logits.log_softmax(-1)
    terms = [
        -log_probs[row, column - 1, label]
        for row in range(4)
        for column, label in enumerate(batch["labels"][row].tolist())
        if label != -100
    ]
    torch.testing.assert_close(output.caption_loss, torch.stack(terms).mean())
    per_image = output.logits_per_image.log_softmax(-1).diagonal().mean()
    per_text = output.logits_per_text.log_softmax(-1).diagonal().mean()
    torch.testing.assert_close(output.contrastive_loss, -(per_image + per_text))
    torch.testing.assert_close(output.loss, output.contrastive_loss + output.caption_loss)
    trained = model.train()(**batch, return_loss=True)
    assert trained.logits is None
    torch.testing.assert_close(trained.loss, output.loss)


def test_tau_never_falls_below_its_bound(model, processor):
    with torch.no_grad():
        model.logit_scale.weight.fill_(9.0)
    inputs = processor(text=["a dog"], images=[make_picture(0)], return_tensors="pt")
    assert model(**inputs).logit_scale.item() == pytest.approx(100)


def test_clip_meaning_of_text_and_images(model, processor):
    texts, pictures = ["a dog", "a cat", "snow"], [make_picture(0), make_picture(1)]
    output = model(**processor(text=texts, images=pictures, return_tensors="pt"))
    assert output.logits_per_image.shape == (2, 3) and output.logits_per_text.shape == (3, 2)
    cosine = output.image_embeds @ output.text_embeds.T
    torch.testing.assert_close(output.logits_per_image, cosine / 0.07, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="3 texts and 2 images"):
        model(**processor(text=texts, images=pictures, return_tensors="pt"), return_loss=True)


def test_pictures_and_placeholders_must_match(model, processor):
    inputs = processor(images=[make_picture(0), make_picture(1)], task="caption", return_tensors="pt")
    with pytest.raises(ValueError, match="placeholders"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
    with pytest.raises(ValueError, match="no pixel_values"):
        model(input_ids=inputs["input_ids"])
    without = inputs["input_ids"][inputs["input_ids"] != model.config.image_token_id].reshape(2, -1)
    with pytest.raises(ValueError, match="<image>"):
        model.generate(input_ids=without, pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="call get_embedding twice"):
        model.get_embedding(**processor(text=["a"], images=[make_picture(0)], return_tensors="pt"))


def test_run_of_soft_prompts_starts_as_cap_and_a_single_cap_is_untouched(model, processor):
    ids = torch.tensor([[0, 5, *[model.config.cap_token_id] * 64, 7], [0, model.config.cap_token_id, *[8] * 65]])
    plain = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model._build_inputs(ids, None, check=False), plain)
    with torch.no_grad():
        model.soft_prompts.weight.copy_(torch.arange(64.0)[:, None].expand(-1, 32) + 1)
    difference = (model._build_inputs(ids, None, check=False) - plain)[..., 0]
    torch.testing.assert_close(difference[0], torch.tensor([0, 0, *range(1, 65), 0.0]))
    assert not difference[1].any()


def test_unsupported_towers_are_refused_by_name(processor):
    with pytest.raises(ValueError, match="swin"):
        make_model(processor, config={"vision_config": {"model_type": "swin"}})
    with pytest.raises(ValueError, match="mamba"):
        make_model(
            processor,
            config={
                "text_config": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 400}
            },
        )
    with pytest.raises(StrictDataclassError, match="distinct"):
        make_model(processor, config={"cap_token_id": 10**6})


def test_config_holds_no_machine_paths(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "mmgem" and config["architectures"] == ["MMGEMModel"]
    assert str(tmp_path) not in json.dumps(config)


TABLES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "max_position_embeddings": 24},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 24},
}


@pytest.mark.parametrize("language_model", ["llama", *TABLES])
def test_padding_changes_nothing_wherever_it_is_with_a_mask_or_without(processor, language_model):
    """Absolute positions (GPT-2, OPT) count from the first token of the text, not of the row."""
    model = make_model(processor, model_type=language_model, **TABLES.get(language_model, {}))
    texts = ["a dog on a beach", "snow"]
    expected = torch.cat([model.get_embedding(**processor(text=[t], return_tensors="pt")) for t in texts])
    for side in ("left", "right"):
        inputs = processor(text=texts, padding_side=side, return_tensors="pt")
        assert not inputs["attention_mask"].all()
        for given in (inputs, {"input_ids": inputs["input_ids"]}):
            torch.testing.assert_close(model.get_embedding(**given), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model(**given).text_embeds, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("meaning", ["bos_token_id", "eos_token_id"])
def test_padding_that_is_another_token_too_is_known_without_a_mask(processor, meaning):
    """TinyLlama pads with EOS; others begin a text with what they pad with."""
    model = make_model(processor)
    expected = torch.cat(
        [model.get_embedding(**processor(text=[t], return_tensors="pt")) for t in ("a dog", "snow it")]
    )
    ids = processor(text=["a dog", "snow it"], padding_side="left", return_tensors="pt")["input_ids"]
    pad = getattr(model.generation_config, meaning)
    model.generation_config.pad_token_id = pad
    ids[ids == processor.tokenizer.pad_token_id] = pad
    assert (ids[:, 0] == pad).any()
    torch.testing.assert_close(model.get_embedding(input_ids=ids), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(input_ids=ids).text_embeds, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("language_model", TABLES)
def test_rows_longer_than_the_table_of_positions_are_refused(processor, language_model):
    model = make_model(processor, model_type=language_model, **TABLES[language_model])
    inputs = processor(text=["a dog on a beach " * 9], max_length=40, return_tensors="pt")
    with pytest.raises(ValueError, match=rf"40 tokens, but '{language_model}' has positions for 24 only"):
        model.get_embedding(**inputs)
    packed = torch.arange(40)[None] % 20
    with torch.no_grad():
        model(input_ids=torch.full((1, 40), 5), position_ids=packed)
    prompt = processor(images=[make_picture(0)], task="caption", return_tensors="pt")
    with pytest.raises(ValueError, match="25 tokens, but"):
        model.generate(**prompt, max_new_tokens=40, min_new_tokens=40)
