"""A text with its image as one query: the adapter works there and nowhere else."""

import copy

import pytest
import torch
from peft import LoraConfig

from mmgem import MMGEMModel, MMGEMProcessor
from mmgem.modeling_mmgem.adapters_mmgem import FUSED_ADAPTER
from mmgem.training.adapters import add_fused_adapter, add_region_adapter

from ..conftest import make_model, make_picture


TEXTS = ["but the dog is red", "snow", "without the two people on the mountain"]
PICTURES = [make_picture(i) for i in range(3)]


def disturb(adapter) -> None:
    """As if it had been trained."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.fixture(scope="module", params=[1, 2], ids=["k=1", "k=2"])
def folder(request, processor, tmp_path_factory):
    """A base, its processor, and adapters of regions and of fused queries."""
    folder, k = tmp_path_factory.mktemp("fused"), request.param
    own = copy.copy(processor)
    own.image_grid_size = k
    own.save_pretrained(folder / "base")
    make_model(processor, config={"image_grid_size": k}).save_pretrained(folder / "base")
    for name in (FUSED_ADAPTER, "region-caption"):
        base = MMGEMModel.from_pretrained(folder / "base")
        fused = name == FUSED_ADAPTER
        adapter = add_fused_adapter(base, LoraConfig(r=4)) if fused else add_region_adapter(base, name, 2)
        disturb(adapter)
        adapter.save_pretrained(folder / name)
    return folder


@pytest.fixture
def own_processor(folder):
    return MMGEMProcessor.from_pretrained(folder / "base")


@pytest.fixture
def model(folder):
    model = MMGEMModel.from_pretrained(folder / "base").eval()
    model.load_adapter(str(folder / FUSED_ADAPTER), adapter_name=FUSED_ADAPTER)
    return model


@torch.no_grad()
def fused(model, processor, texts=TEXTS, pictures=PICTURES, **options):
    return model.get_embedding(**processor(images=pictures, text=texts, task="embed", return_tensors="pt", **options))


@torch.no_grad()
def plain(model, processor):
    """Everything that is no fused call."""
    prompts = processor(images=PICTURES, task="caption", return_tensors="pt")
    scored = processor(images=PICTURES, text=TEXTS, task="score", return_tensors="pt")
    return [
        model.get_embedding(**processor(text=TEXTS, return_tensors="pt")),
        model.get_embedding(**processor(images=PICTURES, return_tensors="pt")),
        model(**processor(images=PICTURES, text=TEXTS, return_tensors="pt")).text_embeds,
        model(**prompts).logits,
        model.generate(**prompts, max_new_tokens=5, do_sample=False),
        model.score(**scored),
    ]


def test_equals_the_merged_weights_and_leaves_all_else_bit_for_bit(folder, model, own_processor):
    base = MMGEMModel.from_pretrained(folder / "base").eval()
    before = plain(base, own_processor)
    assert all(torch.equal(a, b) for a, b in zip(before, plain(model, own_processor)))
    found = fused(model, own_processor)
    assert all(torch.equal(a, b) for a, b in zip(before, plain(model, own_processor))), "after a fused call too"
    # The reference: LoRA's product added to the weights by hand, and the model's plain forward.
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, module in base.named_modules():
            if hasattr(modules[name], "lora_A"):
                a, b = (getattr(modules[name], part)[FUSED_ADAPTER].weight for part in ("lora_A", "lora_B"))
                module.weight += modules[name].scaling[FUSED_ADAPTER] * b @ a
        inputs = own_processor(images=PICTURES, text=TEXTS, task="embed", return_tensors="pt")
        expected = base(**inputs).text_embeds
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    texts = model.get_embedding(**own_processor(text=TEXTS, return_tensors="pt"))
    assert (found - texts).abs().max() > 0.05, "the image counts"


def test_tokens(own_processor, processor):
    rows = own_processor(images=PICTURES[:1], text=["a dog"], task="embed")["input_ids"]
    tokens = own_processor.tokenizer.convert_ids_to_tokens(rows[0])
    count = own_processor.image_grid_size**2
    assert tokens[1 : 1 + count] == ["<image>"] * count
    assert tokens[:1] + tokens[1 + count :] == processor.tokenizer.convert_ids_to_tokens(
        processor(text=["a dog"])["input_ids"][0]
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_alone_padded_or_without_placeholders(model, own_processor, side):
    together = fused(model, own_processor, padding_side=side)
    for i in range(3):
        alone = fused(model, own_processor, TEXTS[i : i + 1], PICTURES[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)
    # As sentence-transformers calls processor and model.
    inputs = own_processor(images=PICTURES, text=TEXTS, return_tensors="pt", padding_side=side)
    with torch.no_grad():
        features = model.get_fused_features(**inputs)
        without_mask = model.get_fused_features(inputs["input_ids"], inputs["pixel_values"])
    for found in (features, without_mask):
        embeds = torch.nn.functional.normalize(found.pooler_output, dim=-1)
        torch.testing.assert_close(embeds, together, atol=1e-5, rtol=0)


def test_beside_adapters_of_regions(folder, model, own_processor):
    expected = fused(model, own_processor)
    model.load_adapter(str(folder / "region-caption"), adapter_name="region-caption")
    assert model.active_adapters() == ["region-caption"]
    model.set_adapter(["region-caption", FUSED_ADAPTER])
    assert model.active_adapters() == [FUSED_ADAPTER, "region-caption"]
    assert torch.equal(fused(model, own_processor), expected), "visual tokens are the base's"
    inputs = own_processor(images=PICTURES[:1], task="caption", return_tensors="pt")
    own = type(model).from_pretrained(folder / "base").eval()
    own.load_adapter(str(folder / "region-caption"), adapter_name="region-caption")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, own(**inputs).logits), "the other one is active outside"


def test_switched_off_deleted_and_saved(folder, model, own_processor, tmp_path):
    expected = fused(model, own_processor)
    model.disable_adapters()
    with pytest.raises(ValueError, match="none is active"):
        fused(model, own_processor)
    model.enable_adapters()
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name), "training may go on"
    assert torch.equal(fused(model, own_processor), expected)
    model.save_pretrained(tmp_path)
    again = MMGEMModel.from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match="none is active"):
        fused(again, own_processor)
    again.load_adapter(str(tmp_path / FUSED_ADAPTER), adapter_name="own")
    assert torch.equal(fused(again, own_processor), expected)
    with pytest.raises(ValueError, match="'own' and 'twice' are both of fused queries"):
        again.load_adapter(str(tmp_path / FUSED_ADAPTER), adapter_name="twice")
        again.set_adapter(["own", "twice"])
    again.delete_adapter(["own", "twice"])
    base = MMGEMModel.from_pretrained(folder / "base").state_dict()
    assert again.state_dict().keys() == base.keys()
    assert all(torch.equal(tensor, base[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(ValueError, match="none is active"):
        fused(again, own_processor)


def test_an_error_within_a_fused_call_leaves_the_adapter_inactive(model, own_processor, monkeypatch):
    before = plain(model, own_processor)
    monkeypatch.setattr(model, "_run_language_model", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fused(model, own_processor)
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(before, plain(model, own_processor)))


def test_gradient_reaches_the_adapter_alone(folder, own_processor):
    model = MMGEMModel.from_pretrained(folder / "base")
    add_fused_adapter(model, LoraConfig(r=4))
    inputs = own_processor(images=PICTURES, text=TEXTS, task="embed", return_tensors="pt")
    model.get_embedding(**inputs).sum().backward()
    assert {"lora_" in name for name, parameter in model.named_parameters() if parameter.grad is not None} == {True}
    texts = model.get_embedding(**own_processor(text=TEXTS, return_tensors="pt"))
    assert not texts.requires_grad, "a plain text has nothing to learn"


def test_bad_input(model, own_processor):
    call = own_processor
    with pytest.raises(ValueError, match="one image per text, got 2 for 1"):
        call(images=PICTURES[:2], text=["a dog"], task="embed")
    with pytest.raises(ValueError, match="one image per text, got 2 for 1"):
        call(images=[PICTURES[:2]], text=["a dog"], task="embed")
    with pytest.raises(ValueError, match="needs images, but there are none"):
        call(text=["a dog"], task="embed")
    with pytest.raises(ValueError, match="needs texts, but there are none"):
        call(images=PICTURES, task="embed")
    with pytest.raises(ValueError, match="is empty"):
        call(images=PICTURES[:1], text=[" "], task="embed")
    with pytest.raises(ValueError, match="Leave out boxes"):
        call(images=PICTURES[:1], text=["a dog"], boxes=[[[0, 0, 9, 9]]], task="embed")
    with pytest.raises(ValueError, match="task='embed'"):
        model.get_embedding(**call(images=PICTURES, text=TEXTS, return_tensors="pt"))
    inputs = call(images=PICTURES, text=TEXTS, task="embed", return_tensors="pt")
    with pytest.raises(ValueError, match="3 texts came with 1 images"):
        model.get_embedding(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
    with pytest.raises(ValueError, match="Leave out boxes"):
        model.get_embedding(**inputs, boxes=torch.zeros(3, 1, 4))
    other = copy.copy(call)
    other.image_grid_size = 3
    with pytest.raises(ValueError, match="another number of <image>"):
        model.get_embedding(**other(images=PICTURES, text=TEXTS, task="embed", return_tensors="pt"))
    with pytest.raises(ValueError, match="dim is 17"):
        model.get_embedding(**inputs, dim=17)


def test_a_long_text_is_truncated_before_emb(own_processor):
    inputs = own_processor(images=PICTURES[:1], text=["a dog on a beach " * 40], task="embed", truncation=True)
    row = inputs["input_ids"][0]
    assert row[-1] == own_processor.tokenizer.convert_tokens_to_ids("[EMB]")
    assert len(row) == own_processor.max_length + own_processor.image_grid_size**2
