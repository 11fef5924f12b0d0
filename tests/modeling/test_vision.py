"""Every vision tower: patch features, pooling, other image sizes, and what the checkpoint's own model embeds."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from mmgem import MMGEMModel
from mmgem.data.collator import PairCollator
from mmgem.modeling_mmgem.towers_mmgem import VISION_TOWERS
from mmgem.modeling_mmgem.vision_mmgem import encode_images, interpolate_positions, load_vision_model, vision_config_of
from mmgem.training.stages import freeze_parameters
from tests.conftest import CORPUS, TOWER, make_model, make_picture


TEXT_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 99,
}
# Settings of the tower, the norm that its last hidden state has not passed, tokens before the patches.
NORM = "post_layernorm"
TOWERS = {
    "clip_vision_model": ({}, NORM, 1),
    "metaclip_2_vision_model": ({}, NORM, 1),
    "altclip_vision_model": ({}, NORM, 1),
    "chinese_clip_vision_model": ({}, NORM, 1),
    "clipseg_vision_model": ({}, NORM, 1),
    "siglip_vision_model": ({}, None, 0),
    "siglip2_vision_model": ({"num_patches": 16}, None, 0),
    "aimv2_vision_model": ({"use_head": True}, None, 0),
    "tipsv2_vision_model": ({}, None, 2),
    "mlcd_vision_model": ({}, NORM, 1),
    "dinov2": ({}, None, 1),
    "dinov2_with_registers": ({"num_register_tokens": 3}, None, 4),
    "dinov3_vit": ({"num_register_tokens": 3}, None, 4),
    "ijepa": ({}, None, 0),
    "pixio": ({"n_cls_tokens": 3}, None, 3),
    "radio": ({"max_img_size": 64}, None, 10),
    "vit": ({}, None, 1),
    "vit_msn": ({}, None, 1),
    "deit": ({}, None, 2),
    "beit": ({"use_relative_position_bias": True, "use_absolute_position_embeddings": True}, "pooler.layernorm", 1),
    "data2vec-vision": (
        {"use_mean_pooling": False, "use_shared_relative_position_bias": True, "use_mask_token": True},
        None,
        1,
    ),
}
# The classes whose own embeddings "tower" keeps, with their text towers.
PEERS = {
    "clip_vision_model": ("CLIP", {}),
    "metaclip_2_vision_model": ("MetaClip2", {}),
    "altclip_vision_model": ("AltCLIP", {"project_dim": 24}),
    "chinese_clip_vision_model": ("ChineseCLIP", {}),
    "clipseg_vision_model": ("CLIPSeg", {}),
    "siglip_vision_model": ("Siglip", {}),
    "siglip2_vision_model": ("Siglip2", {}),
    "aimv2_vision_model": ("Aimv2", {}),
    "tipsv2_vision_model": ("Tipsv2", {}),
}
PIXELS = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(2))


def settings_of(kind):
    settings = {**TOWER, **TOWERS[kind][0]}
    if kind == "siglip2_vision_model":
        del settings["image_size"]  # its configuration has none
    return settings


def with_noise(model):
    """Norms, biases and positions away from the ones and zeros that they start with."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def make_tower(kind):
    config = transformers.AutoConfig.for_model(kind, **settings_of(kind))
    return with_noise(getattr(transformers, VISION_TOWERS[kind].model_class)(config))


def make_peer(kind):
    name, text = PEERS[kind]
    text = {**TEXT_TOWER, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, **text}
    config = getattr(transformers, f"{name}Config")(
        vision_config=settings_of(kind), text_config=text, projection_dim=24
    )
    return with_noise(getattr(transformers, f"{name}Model")(config))


def peer_inputs(kind, pixels):
    """What a tower of transformers takes; SigLIP 2's own image processor makes its patches."""
    if kind != "siglip2_vision_model":
        return {"pixel_values": pixels}
    as_it_is = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    patches = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=(pixels.shape[-1] // 8) ** 2, **as_it_is)
    return patches(list(pixels.numpy()), return_tensors="pt", input_data_format="channels_first")


def own_features(kind, tower, pixels, **options):
    """Class token (or None) and patches after the final norm, and the pooled output, by transformers alone."""
    _, norm, prefix = TOWERS[kind]
    outputs = tower(**peer_inputs(kind, pixels), **options)
    hidden = outputs.last_hidden_state
    hidden = hidden if norm is None else tower.get_submodule(norm)(hidden)
    count = (pixels.shape[-1] // 8) ** 2
    assert hidden.shape[1] == prefix + count
    return hidden[:, 0], hidden[:, prefix:].unflatten(1, (pixels.shape[-1] // 8,) * 2), outputs


def load(folder, image_size=None, pooling="mean"):
    config = vision_config_of(str(folder), pooling)
    return load_vision_model(str(folder), config, image_size, torch.float32).eval()


@pytest.mark.parametrize("kind", VISION_TOWERS)
@torch.no_grad()
def test_patches_and_class_token_of_each_tower(kind, tmp_path):
    tower, pixels = make_tower(kind), PIXELS[..., :32, :32]
    tower.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config.image_size == 32
    assert not [name for name, _ in loaded.named_children() if name == "head"]  # only "tower" needs it
    first, patches, outputs = own_features(kind, tower, pixels)
    pooled, found = encode_images(loaded, pixels, "mean")
    torch.testing.assert_close(found, patches, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, patches.mean((1, 2)), atol=1e-5, rtol=1e-5)
    if kind == "radio" or TOWERS[kind][2] == 0:
        with pytest.raises(ValueError, match=f"'{kind}' has no class token"):
            vision_config_of(str(tmp_path), "cls")
        return
    expected = outputs.pooler_output if kind == "pixio" else first
    pooled, _ = encode_images(loaded, pixels, "cls+mean")
    torch.testing.assert_close(pooled, torch.cat([expected, patches.mean((1, 2))], -1), atol=1e-5, rtol=1e-5)


# The argument with which a tower resamples its own positions; the others do so unasked, or have none.
ASKED = {"interpolate_pos_encoding": True}
INTERPOLATES = dict.fromkeys(["vit", "vit_msn", "deit", "ijepa", "siglip_vision_model"], ASKED) | {
    kind: ASKED for kind in PEERS if TOWERS[kind][1] == NORM
}


@pytest.mark.parametrize("kind", VISION_TOWERS)
@torch.no_grad()
def test_another_image_size_is_interpolated_as_the_tower_does(kind, tmp_path):
    tower = make_tower(kind)
    tower.save_pretrained(tmp_path)
    same = interpolate_positions(load(tmp_path), 32)
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in load(tmp_path).state_dict().items())
    resized = load(tmp_path, 48)
    assert resized.config.image_size == 48
    _, found = encode_images(resized, PIXELS, "mean")
    assert found.shape == (2, 6, 6, 32)
    if kind not in ("aimv2_vision_model", "mlcd_vision_model"):  # aimv2's own cannot, mlcd's has no positions
        _, patches, _ = own_features(kind, tower, PIXELS, **INTERPOLATES.get(kind, {}))
        torch.testing.assert_close(found, patches, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="multiple"):
        interpolate_positions(same, 50)


@pytest.mark.parametrize("kind", VISION_TOWERS)
def test_each_tower_trains_on_packed_rows_and_is_saved(kind, processor, tmp_path):
    vision = {"model_type": kind, **settings_of(kind)}
    pooling = "tower" if kind in PEERS else "mean"
    model = make_model(processor, config={"vision_config": vision, "image_pooling": pooling})
    freeze_parameters(model, "joint")
    pixels = PIXELS[..., :32, :32]
    examples = [{"image": make_picture(i), "caption": CORPUS[i], "image_id": i, "bad": {}} for i in range(2)]
    batch = PairCollator(processor, pack_length=64)(examples)
    names = ("input_ids", "position_ids", "labels", "text_positions", "label_positions")
    output = model.train()(**{name: batch[name] for name in names}, pixel_values=pixels, return_loss=True)
    (output.contrastive_loss + output.caption_loss).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert model.visual_projection.weight.grad.abs().sum() > 0
    model.eval().save_pretrained(tmp_path)
    loaded = MMGEMModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded.get_embedding(pixel_values=pixels), model.get_embedding(pixel_values=pixels))


def save_towers(folder, vision, base_tokenizer):
    """Folders of a vision checkpoint and of a tiny language model."""
    vision.save_pretrained(folder / "vision")
    base_tokenizer.save_pretrained(folder / "text")
    config = transformers.LlamaConfig(**{**TEXT_TOWER, "vocab_size": len(base_tokenizer)})
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "text")
    return str(folder / "vision"), str(folder / "text")


@pytest.mark.parametrize("kind", PEERS)
def test_tower_pooling_keeps_the_embeddings_of_the_checkpoint(kind, processor, base_tokenizer, tmp_path):
    peer, pixels = make_peer(kind), PIXELS[..., :32, :32]
    towers = save_towers(tmp_path, peer, base_tokenizer)
    model = MMGEMModel.from_vision_text_pretrained(*towers, image_pooling="tower").eval()
    # Before the comparison: torch.matmul chooses its kernel by whether the weights require a gradient.
    freeze_parameters(model, "joint", ["vision_model", "visual_projection"])
    with torch.no_grad():
        expected = peer.get_image_features(**peer_inputs(kind, pixels)).pooler_output
        before = model.get_embedding(pixel_values=pixels)
    torch.testing.assert_close(before, torch.nn.functional.normalize(expected, dim=-1), atol=1e-6, rtol=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    texts = processor(text=CORPUS[:2], return_tensors="pt")
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(**texts, pixel_values=pixels, return_loss=True).contrastive_loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(model.eval().get_embedding(pixel_values=pixels), before)


def test_tower_pooling_needs_a_projection(processor, base_tokenizer, tmp_path):
    towers = save_towers(tmp_path, make_tower("clip_vision_model"), base_tokenizer)
    with pytest.raises(ValueError, match="lacks visual_projection"):
        MMGEMModel.from_vision_text_pretrained(*towers, image_pooling="tower")
    with pytest.raises(ValueError, match="'dinov2' has no image embedding of its own; choose mean, cls or cls"):
        make_model(processor, config={"vision_config": {"model_type": "dinov2", **TOWER}, "image_pooling": "tower"})


def test_a_checkpoint_without_the_attention_head_is_refused(base_tokenizer, tmp_path):
    vision, text = save_towers(tmp_path, make_tower("siglip_vision_model"), base_tokenizer)
    file = Path(vision) / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if ".head." not in f".{name}"}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of its vision tower: head"):
        MMGEMModel.from_vision_text_pretrained(vision, text, image_pooling="tower")
    assert MMGEMModel.from_vision_text_pretrained(vision, text) is not None
