"""The adapters of stage 2 through PEFT's and through transformers' own doors."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModel

from mmgem import MMGEMModel
from mmgem.modeling_mmgem import adapters_mmgem, generation_mmgem
from mmgem.modeling_mmgem.adapters_mmgem import REGION_ADAPTERS
from mmgem.training.adapters import add_lora, add_region_adapter

from ..conftest import make_model, make_picture


BOXES = [[[2.0, 3.0, 20.0, 30.0], [5.0, 5.0, 40.0, 38.0]]]


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory):
    """A base, and two adapters that were "trained" on it: k is 2 for the captions."""
    folder = tmp_path_factory.mktemp("adapters")
    make_model(processor).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    for seed, stage in enumerate(REGION_ADAPTERS):
        base = MMGEMModel.from_pretrained(folder / "base")
        adapter = add_region_adapter(base, stage, grid_size=2)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        adapter.save_pretrained(folder / stage)
    return folder


@pytest.fixture
def base(folder):
    return MMGEMModel.from_pretrained(folder / "base").eval()


def load_both(model, folder):
    for stage in REGION_ADAPTERS:
        model.load_adapter(str(folder / stage), adapter_name=stage)
    return model


def add_own_lora(model, **options):
    """What `model.add_adapter` does, which transformers 5.24 refuses beside the PEFT that is current with it."""
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options), model, "own")
    model._hf_peft_config_loaded = True


def region_inputs(processor, k=1):
    processor = copy.copy(processor)
    processor.region_grid_size = k
    return processor(images=[make_picture(0)], boxes=BOXES, task="region-caption", return_tensors="pt")


@torch.no_grad()
def everything(model, processor, k=1):
    """Embeddings of a text, a picture and its regions, and the scores that region captions begin with."""
    inputs = region_inputs(processor, k)
    output = model(**inputs, logits_to_keep=1)
    text = model.get_embedding(**processor(text=["a dog"], return_tensors="pt"))
    picture = model.get_embedding(pixel_values=inputs["pixel_values"])
    caption = model(**processor(images=[make_picture(0)], task="caption", return_tensors="pt")).logits
    return {"text": text, "picture": picture, "caption": caption, "regions": output.image_embeds, "of": output.logits}


def same(a, b):
    """Names of what does not differ; the adapters here change things by far more than the last digits."""
    return {name for name in a if torch.allclose(a[name], b[name], atol=1e-5)}


def test_files_hold_their_own_tensors_alone(folder):
    prefix = "base_model.model."
    for stage, modules in REGION_ADAPTERS.items():
        tensors = load_file(folder / stage / "adapter_model.safetensors")
        assert {name.removeprefix(prefix).split(".")[0] for name in tensors} == set(modules)
        assert sum(tensor.numel() for tensor in tensors.values()) < 4000
    names = {name.removeprefix(prefix) for name in load_file(folder / "region-caption" / "adapter_model.safetensors")}
    assert names == {
        *("caption_projection.weight", "caption_projection.bias"),
        "soft_prompts.weight",
    }


def test_every_door_gives_the_same_model(folder, base, processor):
    """PeftModel, load_adapter, and AutoModel from the adapter's folder; also on a base that was sharded."""
    expected = {}
    for stage, k in (("region-caption", 2), ("region-retrieval", 1)):
        wrapped = PeftModel.from_pretrained(MMGEMModel.from_pretrained(folder / "base"), folder / stage).eval()
        expected[stage] = everything(wrapped.get_base_model(), processor, k)
        by_folder = AutoModel.from_pretrained(folder / stage)
        assert len(same(everything(by_folder, processor, k), expected[stage])) == 5
        sharded = folder / "sharded"
        base.save_pretrained(sharded, max_shard_size="20KB")
        assert len(list(sharded.glob("*.safetensors"))) > 1
        other = MMGEMModel.from_pretrained(sharded)
        other.load_adapter(str(folder / stage))
        assert len(same(everything(other, processor, k), expected[stage])) == 5
    plain = everything(base, processor)
    assert same(expected["region-retrieval"], plain) == {"text", "picture", "caption", "of"}
    assert same(expected["region-caption"], plain) == {"text", "picture", "regions"}


def test_switching_natively(folder, base, processor):
    plain = everything(base, processor)
    model = load_both(base, folder)
    assert model.active_adapters() == ["region-retrieval"], "the newest is active"
    assert same(everything(model, processor), plain) == {"text", "picture", "caption", "of"}
    model.set_adapter("region-caption")
    assert model.active_adapters() == ["region-caption"] and model.region_grid_size == 2
    captioning = everything(model, processor, 2)
    assert same(captioning, plain) == {"text", "picture", "regions"}
    model.set_adapter(["region-caption", "region-retrieval"])
    both = everything(model, processor, 2)
    assert same(both, plain) == {"text", "picture"} and same(both, captioning) >= {"caption", "of"}
    model.disable_adapters()
    assert model.region_grid_size == 1
    off = everything(model, processor)
    assert len(same(off, plain)) == 5
    for name in ("text", "picture"):
        assert torch.equal(off[name], plain[name]) and torch.equal(both[name], plain[name]), "bit for bit the base"
    model.enable_adapters()
    assert len(same(everything(model, processor, 2), both)) == 5
    model.delete_adapter("region-caption")
    assert model.active_adapters() == ["region-retrieval"] and model.region_grid_size == 1


def test_switching_by_peft(folder, base, processor):
    plain = everything(base, processor)
    wrapped = PeftModel.from_pretrained(base, folder / "region-caption", adapter_name="region-caption").eval()
    wrapped.load_adapter(folder / "region-retrieval", adapter_name="region-retrieval")
    model = wrapped.get_base_model()
    assert same(everything(model, processor, 2), plain) == {"text", "picture", "regions"}
    wrapped.set_adapter("region-retrieval")
    assert same(everything(model, processor), plain) == {"text", "picture", "caption", "of"}
    with wrapped.disable_adapter():
        assert len(same(everything(model, processor), plain)) == 5


def test_an_adapter_names_a_base_that_is_a_folder_by_its_absolute_path(folder, processor, tmp_path, monkeypatch):
    """Also if PEFT made and saved it: from another working directory, the Hub is not asked for the relative path."""
    shutil.copytree(folder / "base", tmp_path / "outputs" / "scenes")
    monkeypatch.chdir(tmp_path)
    for base in (MMGEMModel.from_pretrained("outputs/scenes"), AutoModel.from_pretrained("outputs/scenes")):
        by_peft = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
        by_peft.save_pretrained("lora")
        saved = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == str(tmp_path / "outputs" / "scenes")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    model = AutoModel.from_pretrained(tmp_path / "lora")
    model.save_pretrained("copy")
    saved = json.loads((tmp_path / "elsewhere" / "copy" / "default" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "outputs" / "scenes")
    shutil.rmtree(tmp_path / "outputs")
    with pytest.raises(OSError):  # of a folder that is not there, and still without the network
        AutoModel.from_pretrained(tmp_path / "lora")


def test_an_adapter_of_other_weights_is_warned_of(folder, processor, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(adapters_mmgem.logger, "warning", messages.append)
    base = MMGEMModel.from_pretrained(folder / "base")
    base.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    MMGEMModel.from_pretrained(tmp_path / "shards").load_adapter(str(folder / "region-caption"))
    assert not messages, "the same weights in other files"
    make_model(processor, seed=1).save_pretrained(tmp_path / "other")
    MMGEMModel.from_pretrained(tmp_path / "other").load_adapter(str(folder / "region-caption"))
    assert "trained on other weights" in messages.pop() and not messages


def test_saving_beside_lora_keeps_the_embedding(processor, tmp_path):
    model = make_model(processor)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_lora(model, LoraConfig(r=2)).get_base_model().save_pretrained(tmp_path)
    saved = MMGEMModel.from_pretrained(tmp_path).state_dict()
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in expected)


def test_k_survives_being_saved_by_peft(folder, tmp_path):
    base = MMGEMModel.from_pretrained(folder / "base")
    PeftModel.from_pretrained(base, folder / "region-caption").save_pretrained(tmp_path)
    again = MMGEMModel.from_pretrained(folder / "base")
    assert again.region_grid_size == again.config.region_grid_size == 1
    again.load_adapter(str(tmp_path))
    assert again.region_grid_size == 2


@pytest.mark.parametrize("state", ["active", "off"])
def test_save_pretrained_writes_the_base_and_each_adapter_beside_it(folder, base, processor, tmp_path, state):
    """Of the user's own LoRA too, which wraps other modules."""
    before = load_file(folder / "base" / "model.safetensors")
    model = load_both(base, folder)
    add_own_lora(model, init_lora_weights=False)
    model.set_adapter(["region-caption", "own"])
    expected = everything(model, processor, 2)
    if state == "off":
        model.disable_adapters()
        expected = everything(model, processor, 1)
    model.save_pretrained(tmp_path)
    after = load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    for stage in REGION_ADAPTERS:
        old, new = (load_file(root / stage / "adapter_model.safetensors") for root in (folder, tmp_path))
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {*REGION_ADAPTERS, "own"}
    assert len(same(everything(model, processor, 2 if state == "active" else 1), expected)) == 5, "nothing changed"
    again = load_both(MMGEMModel.from_pretrained(tmp_path), tmp_path)
    again.load_adapter(str(tmp_path / "own"), adapter_name="own")
    again.set_adapter(["region-caption", "own"])
    if state == "off":
        again.disable_adapters()
    assert len(same(everything(again, processor, 2 if state == "active" else 1), expected)) == 5


def test_adapter_follows_its_base_through_bfloat16(folder, processor):
    model = MMGEMModel.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model.load_adapter(str(folder / "region-caption"))
    assert model.region_grid_size == 2
    wrapped = PeftModel.from_pretrained(
        MMGEMModel.from_pretrained(folder / "base", dtype=torch.bfloat16), folder / "region-caption"
    )
    inputs = region_inputs(processor, 2).to(torch.bfloat16)
    output = wrapped.get_base_model()(**inputs)
    assert output.logits.dtype == torch.bfloat16 and output.logits.isfinite().all()


def test_k_is_the_adapters_and_another_prompt_is_refused(folder, base, processor):
    base.load_adapter(str(folder / "region-caption"))
    ids = base.generate(**region_inputs(processor, 2), max_new_tokens=3)
    assert len(ids) == 2
    for k in (1, 3):
        with pytest.raises(ValueError, match="region_grid_size"):
            base.generate(**region_inputs(processor, k), max_new_tokens=3)
        with pytest.raises(ValueError, match="region_grid_size"):
            base(**region_inputs(processor, k))


def test_adapters_load_on_a_compiled_base_which_follows_k(folder, base, processor):
    """One graph each: the number of visual tokens is a constant of it."""
    torch._dynamo.reset()
    compiled = torch.compile(base, backend="eager", fullgraph=True)
    model = load_both(compiled, folder)
    model.set_adapter(["region-caption", "region-retrieval"])
    expected = everything(base, processor, 2)
    with torch.no_grad():
        output = compiled(**region_inputs(processor, 2), logits_to_keep=1)
        assert torch.allclose(output.logits, expected["of"], atol=1e-5)
        model.disable_adapters()
        plain = compiled(**region_inputs(processor, 1), logits_to_keep=1)
        assert torch.allclose(plain.logits, everything(model, processor)["of"], atol=1e-5)


def test_adapter_of_another_size_is_refused_by_name(folder, processor):
    narrow = make_model(processor, config={"projection_dim": 12})
    with pytest.raises(ValueError, match="does not fit") as error:
        narrow.load_adapter(str(folder / "region-caption"))
    assert str(folder / "base") in str(error.value) and not hasattr(narrow, "peft_config")


def test_a_refused_adapter_leaves_the_others_active(folder, base, processor, tmp_path):
    other = make_model(processor, config={"projection_dim": 12})
    add_region_adapter(other, "region-caption", 1).save_pretrained(tmp_path / "foreign")
    base.load_adapter(str(folder / "region-retrieval"), adapter_name="region-retrieval")
    with pytest.raises(ValueError, match="does not fit"):
        base.load_adapter(str(tmp_path / "foreign"), adapter_name="foreign")
    assert list(base.peft_config) == base.active_adapters() == ["region-retrieval"]


def test_a_model_that_had_an_adapter_saves_as_one_that_had_none(folder, base, processor, tmp_path):
    """After a refusal, a broken file, and a deletion."""
    names = set(base.state_dict())
    plain = everything(base, processor)
    other = make_model(processor, config={"projection_dim": 12})
    add_region_adapter(other, "region-caption", 1).save_pretrained(tmp_path / "foreign")
    shutil.copytree(tmp_path / "foreign", tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"no tensors")
    shutil.copytree(tmp_path / "foreign", tmp_path / "empty")
    (tmp_path / "empty" / "adapter_model.safetensors").unlink()
    for name, error in (("foreign", ValueError), ("broken", SafetensorError), ("empty", OSError)):
        with pytest.raises(error):
            base.load_adapter(str(tmp_path / name))
    load_both(base, folder)
    base.delete_adapter(list(REGION_ADAPTERS))
    assert set(base.state_dict()) == names
    base.save_pretrained(tmp_path / "saved")
    again = MMGEMModel.from_pretrained(tmp_path / "saved").eval()
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(
        load_file(folder / "base" / "model.safetensors")
    )
    assert len(same(everything(again, processor), plain)) == 5


def test_setting_an_adapter_switches_adapters_on(folder, base, processor):
    model = load_both(base, folder)
    model.set_adapter(["region-caption", "region-retrieval"])
    both = everything(model, processor, 2)
    model.disable_adapters()
    model.set_adapter(["region-caption", "region-retrieval"])
    assert len(same(everything(model, processor, 2), both)) == 5
    model.disable_adapters()
    model.load_adapter(str(folder / "region-caption"), adapter_name="again")
    assert model.active_adapters() == ["again"] and model.region_grid_size == 2
    with pytest.raises(ValueError, match="'again' and 'region-caption' are both adapters of caption_projection"):
        model.set_adapter(["again", "region-caption"])


def test_unknown_adapters_are_named(folder, base):
    with pytest.raises(ValueError, match="loaded are none"):
        base.set_adapter("region-caption")
    with pytest.raises(ValueError, match="loaded are none"):
        base.disable_adapters()
    base.load_adapter(str(folder / "region-caption"), adapter_name="region-caption")
    with pytest.raises(ValueError, match="'region-captoin'; loaded are 'region-caption'"):
        base.set_adapter("region-captoin")
    with pytest.raises(OSError):
        base.load_adapter(str(folder / "nowhere"), adapter_name="nowhere")
    assert base.active_adapters() == ["region-caption"]


def test_prompts_that_nothing_was_trained_for_are_warned_of(folder, base, processor, monkeypatch):
    messages = []
    monkeypatch.setattr(generation_mmgem.logger, "warning_once", messages.append)
    whole = processor(images=[make_picture(0)], task="caption", return_tensors="pt")
    base.generate(**whole, max_new_tokens=2)
    assert not messages
    base.generate(**region_inputs(processor), max_new_tokens=2)
    assert "never trained" in messages.pop()
    base.load_adapter(str(folder / "region-caption"))
    base.generate(**region_inputs(processor, 2), max_new_tokens=2)
    assert not messages
    base.generate(**whole, max_new_tokens=2)
    assert "stage 1's prompt" in messages.pop() and not messages


@pytest.mark.parametrize("lora_first", [True, False])
def test_beside_the_users_own_lora(folder, processor, lora_first, base):
    """Loaded before or after it."""
    plain = load_both(MMGEMModel.from_pretrained(folder / "base").eval(), folder)
    plain.set_adapter(list(REGION_ADAPTERS))
    expected = everything(plain, processor, 2)
    for step in (lora_first, not lora_first):
        if step:
            add_own_lora(base)
        else:
            load_both(base, folder)
    base.set_adapter(["own", *REGION_ADAPTERS])
    for name, value in everything(base, processor, 2).items():
        torch.testing.assert_close(value, expected[name])  # LoRA starts at zero
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "lora_B" in name:
                parameter.add_(1)
    assert not same(everything(base, processor, 2), expected) & {"text", "caption", "of"}
