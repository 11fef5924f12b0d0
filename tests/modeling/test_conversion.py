"""Two checkpoints on disk become one MM-GEM whose language model is still the original."""

import json
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    CohereConfig,
    CohereForCausalLM,
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
)
from transformers.models.clip import CLIPImageProcessorPil

from mmgem import MMGEMModel, MMGEMProcessor
from mmgem.training.building import planned_config
from mmgem.training.model_arguments import ModelArguments
from tests.conftest import TOWER, make_picture


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


def test_full_clip_checkpoint_drops_its_text_tower_without_a_line_for_each_weight(
    vision, base_tokenizer, tmp_path, caplog
):
    save_language_model(tmp_path, "llama", base_tokenizer)
    model = MMGEMModel.from_vision_text_pretrained(vision, str(tmp_path), projection_dim=16)
    assert "UNEXPECTED" not in caplog.text
    CLIPVisionModel.from_pretrained(vision)  # as transformers reports it, and after ours has loaded
    assert "UNEXPECTED" in caplog.text
    original = CLIPModel.from_pretrained(vision).vision_model
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, model.vision_model.get_parameter(name)), name
    assert not any("text_model" in name for name in model.state_dict())


def test_another_image_size_is_the_processors_too(vision, base_tokenizer, tmp_path):
    save_language_model(tmp_path, "llama", base_tokenizer)
    model = MMGEMModel.from_vision_text_pretrained(vision, str(tmp_path), image_size=48, projection_dim=16).eval()
    processor = MMGEMProcessor.from_vision_text_pretrained(vision, str(tmp_path), image_size=48)
    assert model.config.vision_config.image_size == 48
    pixels = processor(images=[make_picture(0)], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 48)
    tower = CLIPModel.from_pretrained(vision).vision_model.eval()
    with torch.no_grad():
        expected = tower(pixels, interpolate_pos_encoding=True).last_hidden_state[:, -36:]
        found = model.get_image_features(pixels).last_hidden_state
    torch.testing.assert_close(found, tower.post_layernorm(expected), atol=1e-3, rtol=1e-3)


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


def test_files_of_a_tower_are_found_by_its_options(vision, base_tokenizer, tmp_path):
    text = save_language_model(tmp_path / "repository" / "text", "llama", base_tokenizer)
    CLIPModel.from_pretrained(vision).save_pretrained(tmp_path / "repository" / "clip")
    save_image_processor(tmp_path / "repository" / "clip")
    towers, options = [str(tmp_path / "repository")] * 2, {name: {"subfolder": name} for name in ("clip", "text")}
    kwargs = {"vision_kwargs": options["clip"], "text_kwargs": options["text"]}
    model = MMGEMModel.from_vision_text_pretrained(*towers, **kwargs, image_pooling="tower")
    assert torch.equal(model.language_model.layers[0].mlp.up_proj.weight, text.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(model.visual_projection.weight, CLIPModel.from_pretrained(vision).visual_projection.weight)
    processor = MMGEMProcessor.from_vision_text_pretrained(*towers, **kwargs)
    assert list(processor.image_processor.image_mean) == [0.5, 0.4, 0.3]
    arguments = {"vision_model_name_or_path": towers[0], "text_model_name_or_path": towers[1]}
    as_json = {name: json.dumps(value) for name, value in kwargs.items()}
    config = planned_config(ModelArguments(**arguments, **as_json, image_pooling="tower"))
    assert config.projection_dim == model.config.projection_dim == 512
    with pytest.raises(ValueError, match="Set HF_TOKEN"):
        ModelArguments(**arguments, vision_kwargs='{"token": "hf_x"}')
    with pytest.raises(ValueError, match="is for --text_model_name_or_path"):
        ModelArguments(text_kwargs={"revision": "main"})


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("vision_kwargs", "dtype", "pass dtype beside vision_kwargs"),
        ("text_kwargs", "quantization_config", "Quantize the finished model"),
        ("vision_kwargs", "gguf_file", "Choose from revision, subfolder, token"),
        ("text_kwargs", "revison", "Choose from revision, subfolder, token, gguf_file"),
    ],
)
def test_other_options_of_a_tower_are_refused_by_name(name, option, message):
    for build in (MMGEMModel, MMGEMProcessor):
        with pytest.raises(ValueError, match=f"{name} has no option '{option}'. .*{message}"):
            build.from_vision_text_pretrained("vision", "text", **{name: {option: "x"}})


def save_gguf(path, tokenizer):
    """A tiny Qwen2 whose matrices have 8 bits, as llama.cpp writes it."""
    gguf = pytest.importorskip("gguf")
    spelled = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokenizer))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokenizer))
    writer.add_token_merges([" ".join(pair) for pair in spelled["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    generator, size = np.random.default_rng(0), len(tokenizer)
    matrices = {"token_embd": (size, 32), "output": (size, 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32)}
    matrices |= {"blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32)}
    matrices |= {"blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    for name, shape in matrices.items():
        weight = gguf.quantize(generator.normal(0, 0.2, shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", weight, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    vectors = {"output_norm.weight": 32, "blk.0.attn_norm.weight": 32, "blk.0.ffn_norm.weight": 32}
    vectors |= {"blk.0.attn_q.bias": 32, "blk.0.attn_k.bias": 16, "blk.0.attn_v.bias": 16}
    for name, length in vectors.items():
        writer.add_tensor(name, generator.normal(1, 0.2, length).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_language_model_of_a_gguf_file(vision, base_tokenizer, tmp_path):
    (tmp_path / "text").mkdir()
    save_gguf(tmp_path / "text" / "tiny.gguf", base_tokenizer)
    text, options = str(tmp_path / "text"), {"gguf_file": "tiny.gguf"}
    original = AutoModelForCausalLM.from_pretrained(text, **options, dtype=torch.float32).eval()
    model = MMGEMModel.from_vision_text_pretrained(vision, text, text_kwargs=options, projection_dim=16)
    processor = MMGEMProcessor.from_vision_text_pretrained(vision, text, text_kwargs=options)
    ids = torch.tensor([base_tokenizer("a dog on a beach")["input_ids"]])
    with torch.no_grad():
        expected = original(ids).logits
        torch.testing.assert_close(model(ids).logits[..., : len(base_tokenizer)], expected, atol=1e-5, rtol=1e-5)
    assert processor.tokenizer("a dog on a beach")["input_ids"][-1] == model.config.emb_token_id
    model.save_pretrained(tmp_path / "saved")
    loaded = MMGEMModel.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
