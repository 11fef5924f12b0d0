"""LoRA on the language model: what trains, what is saved, and the plain model at the end."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModel

from mmgem import MMGEMModel
from mmgem.training.adapters import add_lora, held_in_bfloat16
from mmgem.training.stages import PROJECTIONS, parameter_groups
from mmgem.training.trainer import MMGEMTrainer
from tests.conftest import make_model, make_picture
from tests.training.test_training import CAPTIONS, eight_pictures, training_arguments


LANGUAGE_MODELS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
}


def make_trainer(processor, folder, changes=None, **options):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lora_rank": 4, **options}
    options |= {"packing": True, "pack_length": 64}
    args = training_arguments(folder, **options)
    model = make_model(processor, **(changes or {}))
    return MMGEMTrainer(model, args, processor, eight_pictures())


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_trains_adapter_projections_and_new_rows_and_ends_as_one_plain_model(processor, tmp_path, name):
    before = make_model(processor, **LANGUAGE_MODELS[name]).state_dict()
    trainer = make_trainer(processor, tmp_path, LANGUAGE_MODELS[name], activation_checkpointing=name == "llama")
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    kept = {key.removeprefix("base_model.model.").split(".")[0] for key in saved}
    assert kept == {"language_model", *PROJECTIONS}
    assert not any("base_layer" in key or "vision" in key for key in saved)

    texts = processor(text=CAPTIONS, return_tensors="pt")
    pictures = processor(images=[make_picture(i) for i in range(8)], return_tensors="pt")
    model = trainer.model.eval()
    with torch.no_grad():
        trained = [model.get_embedding(**texts), model.get_embedding(**pictures)]
    trainer.merge_lora()
    trainer.save_model()
    merged = AutoModel.from_pretrained(tmp_path).eval()
    assert type(merged) is MMGEMModel
    after = merged.state_dict()
    assert after.keys() == before.keys()
    with torch.no_grad():
        for expected, inputs in zip(trained, (texts, pictures)):
            assert torch.cosine_similarity(merged.get_embedding(**inputs), expected).min() > 0.9999

    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert {key.split(".")[0] for key in changed} - {"lm_head"} == {"language_model", *PROJECTIONS}
    assert ("lm_head.weight" in changed) == bool(merged.config.text_config.tie_word_embeddings)
    rows = (
        merged.get_input_embeddings().weight
        - make_model(processor, **LANGUAGE_MODELS[name]).get_input_embeddings().weight
    )
    new = {merged.config.emb_token_id, merged.config.cap_token_id}
    assert set(rows.abs().sum(1).nonzero().flatten().tolist()) == new


def test_resume_equals_the_uninterrupted_run(processor, tmp_path):
    whole, resumed = (make_trainer(processor, tmp_path / folder) for folder in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected, actual = whole.model.state_dict(), resumed.model.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


def test_projections_learn_ten_times_faster(processor):
    model = add_lora(make_model(processor), LoraConfig(r=4))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, 1.0, 10.0, 0.0):
        for parameter in group["params"]:
            is_projection = any(f".{name}." in names[id(parameter)] for name in PROJECTIONS)
            assert group["lr"] == (10.0 if is_projection else 1.0), names[id(parameter)]


def test_with_the_gradient_cache(processor, tmp_path):
    """Two mini-batches of four give the step that one batch of eight does."""
    whole, cached = (
        make_trainer(processor, tmp_path / str(size), max_steps=2, mini_batch_size=size) for size in (0, 4)
    )
    whole.train()
    cached.train()
    expected, actual = whole.model.state_dict(), cached.model.state_dict()
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("held", [True, False])
def test_frozen_weights_that_bfloat16_holds_exactly_are_held_in_it(processor, tmp_path, monkeypatch, held):
    """Afterwards they are what they were, to the last bit."""
    trainer = make_trainer(processor, tmp_path, bf16=True)
    frozen = [parameter for parameter in trainer.base.language_model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.data = parameter.data.bfloat16().float() + (0 if held else 1e-4)
    before = [parameter.detach().clone() for parameter in frozen]
    dtypes = set()
    compute_loss = trainer.compute_loss

    def look(*args, **kwargs):
        dtypes.update(parameter.dtype for parameter in frozen)
        return compute_loss(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", look)
    trainer.train()
    assert dtypes == {torch.bfloat16 if held else torch.float32}
    for parameter, value in zip(frozen, before):
        assert torch.equal(parameter, value)


def test_only_weights_in_float32_are_held_in_bfloat16():
    """Those of a quantized model are integers, and some are in 16 bits already."""
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False) for _ in range(3)])
    layers.requires_grad_(False)
    layers[0].weight.data = torch.ones(2, 2)
    layers[1].weight.data = torch.ones(2, 2, dtype=torch.bfloat16)
    layers[2].weight.data = torch.ones(2, 2, dtype=torch.uint8)
    dtypes = [torch.float32, torch.bfloat16, torch.uint8]
    with held_in_bfloat16(layers):
        assert [layer.weight.dtype for layer in layers] == [torch.bfloat16, *dtypes[1:]]
    assert [layer.weight.dtype for layer in layers] == dtypes
