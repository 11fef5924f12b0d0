"""Two checkpoints on disk become one MM-GEM whose language model is still the original."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CohereConfig,
    CohereForCausalLM,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.clip import CLIPImageProcessorPil

from mmgem import MMGEMModel, MMGEMProcessor
from tests.conftest import make_picture


TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1}
LANGUAGE_MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, DECODER),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**DECODER, "head_dim": 8}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {**DECODER, "head_dim": 8, "sliding_window": 8}),
    "granite": (GraniteConfig, GraniteForCausalLM, {**DECODER, "logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, GPT2),
    "phi": (PhiConfig, PhiForCausalLM, {**DECODER, "num_key_value_heads": 4}),
    "cohere": (CohereConfig, CohereForCausalLM, {**DECODER, "logit_scale": 0.25}),
}
TEXT_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 99,
}


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A full CLIP checkpoint, text tower included, as the Hub has them."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(vision_config=TOWER, text_config=TEXT_TOWER)).save_pretrained(folder)
    save_image_processor(folder)
    return str(folder)


def save_image_processor(folder):
    mean = [0.5, 0.4, 0.3]  # not CLIP's: the checkpoint's own must survive
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=mean
    ).save_pretrained(folder)


def save_language_model(folder, name, tokenizer, **changes):
    config_class, model_class, settings = LANGUAGE_MODELS[name]
    torch.manual_seed(0)
    model = model_class(config_class(**{**settings, "vocab_size": len(tokenizer), **changes})).eval()
    for parameter in model.parameters():  # biases and norms away from their zeros and ones
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_logits_equal_the_original_language_model(name, tie, vision, base_tokenizer, tmp_path):
    original = save_language_model(tmp_path, name, base_tokenizer, tie_word_embeddings=tie)
    model = MMGEMModel.from_vision_text_pretrained(vision, str(tmp_path), projection_dim=16)
    size = len(base_tokenizer)
    ids = torch.randint(0, size, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = original(ids).logits
        torch.testing.assert_close(model(ids).logits[..., :size], expected, atol=1e-5, rtol=1e-5)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tie
    new_rows = model.get_input_embeddings().weight[size:]
    torch.testing.assert_close(new_rows[0], original.get_input_embeddings().weight.mean(0))
    assert len(new_rows) == 3 and torch.equal(new_rows[0], new_rows[2])
    assert model.has_new_projections
    model.save_pretrained(tmp_path / "out")
    loaded = MMGEMModel.from_pretrained(tmp_path / "out").eval()
    assert not loaded.has_new_projections
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits[..., :size], expected, atol=1e-5, rtol=1e-5)


class PeakOfNewMemory(TorchDispatchMode):
    """Bytes of the storages that operations of this thread make, at most at a time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def release(self, key, size):
        self.seen.discard(key)
        self.live -= size


def test_towers_are_taken_over_not_copied(vision, base_tokenizer, tmp_path):
    wide = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    save_language_model(tmp_path, "llama", base_tokenizer, **wide)
    with PeakOfNewMemory() as memory:
        model = MMGEMModel.from_vision_text_pretrained(vision, str(tmp_path))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert memory.peak < 1.4 * size
    assert model.config.text_config is model.language_model.config
    assert model.config.vision_config is model.vision_model.config


@pytest.mark.parametrize("dtype", [torch.bfloat16, "auto"])
def test_dtype_and_attention_of_both_towers(vision, base_tokenizer, tmp_path, dtype):
    text = str(tmp_path / "text")
    save_language_model(text, "llama", base_tokenizer).to(torch.bfloat16).save_pretrained(text)
    model = MMGEMModel.from_vision_text_pretrained(vision, text, dtype=dtype, attn_implementation="eager")
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes.pop("logit_scale.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16} == {model.dtype}
    towers = (model.vision_model, model.language_model)
    assert {tower.config._attn_implementation for tower in towers} == {"eager"}
    model.save_pretrained(tmp_path / "saved")
    assert MMGEMModel.from_pretrained(tmp_path / "saved").dtype == torch.bfloat16
    assert MMGEMModel.from_vision_text_pretrained(vision, text).dtype == torch.float32


def test_whole_model_generates_and_embeds(vision, base_tokenizer, tmp_path):
    save_language_model(tmp_path, "llama", base_tokenizer)
    model = MMGEMModel.from_vision_text_pretrained(vision, str(tmp_path), projection_dim=16).eval()
    processor = MMGEMProcessor.from_vision_text_pretrained(vision, str(tmp_path))
    assert list(processor.image_processor.image_mean) == [0.5, 0.4, 0.3]
    assert model.generation_config.eos_token_id == base_tokenizer.eos_token_id
    inputs = processor(images=[make_picture(0)], task="caption", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=4).shape[0] == 1


def save_vision_tower(folder, kind):
    torch.manual_seed(0)
    registers = {k: v for k, v in TOWER.items() if k != "intermediate_size"}
    towers = {
        "clip_vision": lambda: CLIPVisionModel(CLIPVisionConfig(**TOWER)),
        "siglip": lambda: SiglipModel(SiglipConfig(vision_config=TOWER, text_config=TEXT_TOWER)),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**registers)),
        "dinov2_with_registers": lambda: Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**registers, num_register_tokens=3)
        ),
        "vit": lambda: ViTModel(ViTConfig(**TOWER)),
        "vit_without_pooler": lambda: ViTModel(ViTConfig(**TOWER), add_pooling_layer=False),
    }
    tower = towers[kind]().eval()
    tower.save_pretrained(folder)
    save_image_processor(folder)
    return getattr(tower, "vision_model", tower)


@pytest.mark.parametrize(
    "kind", ["clip_vision", "siglip", "dinov2", "dinov2_with_registers", "vit", "vit_without_pooler"]
)
def test_patch_features_of_each_vision_tower(kind, base_tokenizer, tmp_path):
    tower = save_vision_tower(tmp_path / "vision", kind)
    save_language_model(tmp_path / "text", "llama", base_tokenizer)
    model = MMGEMModel.from_vision_text_pretrained(str(tmp_path / "vision"), str(tmp_path / "text"), projection_dim=16)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = tower(pixels).last_hidden_state[:, -16:]
        if kind == "clip_vision":
            expected = tower.post_layernorm(expected)
        features = model.get_image_features(pixels).last_hidden_state
    assert features.shape == (2, 16, 32)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    # After the final norm: gain 1 and bias 0 at the start, so every patch has zero mean and unit variance.
    torch.testing.assert_close(features.mean(-1), torch.zeros(2, 16), atol=1e-4, rtol=0)


def test_full_clip_checkpoint_drops_its_text_tower(vision, base_tokenizer, tmp_path):
    save_language_model(tmp_path, "llama", base_tokenizer)
    model = MMGEMModel.from_vision_text_pretrained(vision, str(tmp_path), projection_dim=16)
    original = CLIPModel.from_pretrained(vision).vision_model
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, model.vision_model.get_parameter(name)), name
    assert not any("text_model" in name for name in model.state_dict())


@pytest.mark.parametrize("kind", ["clip_vision", "siglip", "dinov2_with_registers", "vit"])
def test_other_image_size_interpolates_the_positions(kind, base_tokenizer, tmp_path):
    tower = save_vision_tower(tmp_path / "vision", kind)
    save_language_model(tmp_path / "text", "llama", base_tokenizer)
    paths = (str(tmp_path / "vision"), str(tmp_path / "text"))
    model = MMGEMModel.from_vision_text_pretrained(*paths, image_size=48, projection_dim=16).eval()
    processor = MMGEMProcessor.from_vision_text_pretrained(*paths, image_size=48)
    assert model.config.vision_config.image_size == 48
    pixels = processor(images=[make_picture(0)], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 48)
    with torch.no_grad():
        options = {} if kind.startswith("dino") else {"interpolate_pos_encoding": True}
        expected = tower(pixels, **options).last_hidden_state[:, -36:]
        if kind == "clip_vision":
            expected = tower.post_layernorm(expected)
        torch.testing.assert_close(model.get_image_features(pixels).last_hidden_state, expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="multiple"):
        MMGEMModel.from_vision_text_pretrained(*paths, image_size=50)


def test_recurrent_language_model_is_refused_by_name(vision, base_tokenizer, tmp_path):
    config = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=len(base_tokenizer), state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    base_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'mamba'.*recurrent"):
        MMGEMModel.from_vision_text_pretrained(vision, str(tmp_path))


def test_language_model_with_unknown_logits_is_refused_by_name(vision, base_tokenizer, tmp_path, monkeypatch):
    save_language_model(tmp_path, "gemma2", base_tokenizer, final_logit_softcapping=0.1)
    monkeypatch.setattr(MMGEMModel, "_logits", lambda self, hidden: self.lm_head(hidden))
    with pytest.raises(ValueError, match="'gemma2'"):
        MMGEMModel.from_vision_text_pretrained(vision, str(tmp_path))


def test_other_vision_tower_is_refused_by_name(base_tokenizer, tmp_path):
    from transformers import SwinConfig, SwinModel

    swin = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1], num_heads=[1], window_size=4)
    SwinModel(swin).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'swin'"):
        MMGEMModel.from_vision_text_pretrained(str(tmp_path), str(tmp_path))
