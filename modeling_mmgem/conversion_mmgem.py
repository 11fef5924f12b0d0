"""MM-GEM from two checkpoints: a vision tower and a causal language model."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ..configuration.configuration_mmgem import MMGEMConfig
from ..processing.tokenization_mmgem import CAP_TOKEN, EMB_TOKEN, IMAGE_TOKEN, to_mmgem_tokenizer


def from_vision_text_pretrained(
    cls: Any, vision: str, text: str, image_size: int | None = None, **config_kwargs: Any
) -> Any:
    """
    Loads both towers, adds the new tokens (their rows start at the mean of the old ones) and new projections.

    Args:
        vision (`str`): Hub id or folder of a CLIP, SigLIP, DINOv2 or ViT checkpoint; of a full CLIP or SigLIP the
            text tower is dropped.
        text (`str`): Hub id or folder of a causal language model.
        image_size (`int`, *optional*): pixels per side; another size than the checkpoint's interpolates its position
            embeddings (the paper's ViT-L-336).
        **config_kwargs: of [`MMGEMConfig`], such as `projection_dim`.

    Raises:
        ValueError: for a vision tower or language model that could not be rebuilt exactly, by name.
    """
    vision_model = _load_vision_tower(vision, image_size)
    causal_lm = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32)
    tokenizer = to_mmgem_tokenizer(AutoTokenizer.from_pretrained(text))
    _check_language_model(causal_lm)
    probe = torch.arange(min(32, causal_lm.config.vocab_size))[None]
    with torch.no_grad():
        expected = causal_lm.eval()(probe).logits
    new_tokens = (IMAGE_TOKEN, CAP_TOKEN, EMB_TOKEN, tokenizer.pad_token)
    _add_rows(causal_lm, len(tokenizer), [tokenizer.convert_tokens_to_ids(token) for token in new_tokens])

    head = causal_lm.get_output_embeddings()
    config = MMGEMConfig(
        vision_config=vision_model.config.to_dict(),
        text_config=causal_lm.config.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        cap_token_id=tokenizer.convert_tokens_to_ids(CAP_TOKEN),
        emb_token_id=tokenizer.convert_tokens_to_ids(EMB_TOKEN),
        lm_head_bias=head.bias is not None,
        **config_kwargs,
    )
    model = cls(config).eval()
    missing = model.vision_model.load_state_dict(vision_model.state_dict(), strict=False).missing_keys
    if missing:
        raise ValueError(f"{vision} lacks weights of its vision tower: {', '.join(missing[:5])}.")
    model.language_model.load_state_dict(causal_lm.base_model.state_dict())
    model.lm_head.load_state_dict(head.state_dict())
    model.tie_weights()
    configure_generation(model, tokenizer)

    with torch.no_grad():
        actual = model(probe).logits[..., : expected.shape[-1]]
    # The rows of the new tokens may lie inside a padded vocabulary; every other logit is the checkpoint's.
    old = torch.ones(expected.shape[-1], dtype=torch.bool)
    old[[i for i in map(tokenizer.convert_tokens_to_ids, new_tokens) if i < len(old)]] = False
    old_inputs = [i for i in range(probe.shape[1]) if old[i]]
    error = (actual - expected)[:, : len(old_inputs)][..., old].abs().max() / expected.abs().max()
    if not error < 1e-4:
        raise ValueError(
            f"The logits of '{causal_lm.config.model_type}' ({text}) are computed in a way that MM-GEM does not know "
            f"(they differ by {error:.1e}), so the language model would not be the same; choose another one."
        )
    return model


def configure_generation(model: Any, tokenizer: Any) -> None:
    """Captions stop at EOS, rows are padded with PAD, and tokens that are no part of a caption are never drawn."""
    generation = model.generation_config
    generation.bos_token_id = tokenizer.bos_token_id
    generation.eos_token_id = tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    generation.suppress_tokens = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, CAP_TOKEN, EMB_TOKEN])


def _load_vision_tower(vision: str, image_size: int | None) -> PreTrainedModel:
    from .modeling_mmgem import VISION_MODEL_TYPES

    config = AutoConfig.from_pretrained(vision)
    config = getattr(config, "vision_config", config)
    if config.model_type not in VISION_MODEL_TYPES:
        raise ValueError(
            f"Vision tower '{config.model_type}' ({vision}) is not supported; choose one of "
            f"{', '.join(VISION_MODEL_TYPES)}."
        )
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False  # we pool the patches ourselves
    model, info = AutoModel.from_pretrained(vision, config=config, dtype=torch.float32, output_loading_info=True)
    missing = [name for name in info["missing_keys"] if not name.startswith("pooler.")]
    if missing:
        raise ValueError(f"{vision} lacks weights of its vision tower: {', '.join(sorted(missing)[:5])}.")
    if image_size is None or image_size == config.image_size:
        return model
    return _interpolate_positions(model, config, image_size)


def _interpolate_positions(model: PreTrainedModel, config: PreTrainedConfig, image_size: int) -> PreTrainedModel:
    """The same tower for pictures of another size, position embeddings resampled as transformers does (bicubic)."""
    if image_size % config.patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of the tower's patch_size {config.patch_size}.")
    new_config = copy.deepcopy(config)
    new_config.image_size = image_size
    resized = AutoModel.from_config(new_config)
    state, shapes = model.state_dict(), resized.state_dict()
    for name in [name for name in state if state[name].shape != shapes[name].shape]:
        old, side = state[name], image_size // config.patch_size
        old_side = config.image_size // config.patch_size
        positions = old.reshape(-1, old.shape[-1])
        prefix, grid = positions[: len(positions) - old_side**2], positions[len(positions) - old_side**2 :]
        grid = grid.T.reshape(1, -1, old_side, old_side)
        grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        state[name] = torch.cat([prefix, grid.flatten(2)[0].T]).reshape(shapes[name].shape)
    resized.load_state_dict(state)
    return resized


def _check_language_model(causal_lm: PreTrainedModel) -> None:
    name = causal_lm.config.model_type
    if causal_lm._is_stateful:
        raise ValueError(
            f"Language model '{name}' carries a recurrent state, which would leak between sequences; choose one with "
            "attention only."
        )
    with torch.device("meta"):
        expected = type(AutoModel.from_config(causal_lm.config))
    if type(causal_lm.base_model) is not expected or causal_lm.get_output_embeddings() is None:
        raise ValueError(f"'{name}' is not a plain causal language model with one head; choose another one.")


def _add_rows(causal_lm: PreTrainedModel, vocab_size: int, new_ids: list[int]) -> None:
    """Room for `new_ids` in embeddings and head, each new row (and bias) the mean of the old ones."""
    old_size = causal_lm.config.vocab_size
    if vocab_size > old_size:
        causal_lm.resize_token_embeddings(vocab_size, mean_resizing=False)
    first_new = min(new_ids)
    for module in {causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()}:
        for parameter in module.parameters():
            mean = parameter.data[: min(first_new, old_size)].mean(0)
            parameter.data[sorted(new_ids)] = mean
            parameter.data[old_size:] = mean


__all__ = ["configure_generation", "from_vision_text_pretrained"]
