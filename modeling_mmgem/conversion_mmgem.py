"""MM-GEM from two checkpoints: a vision tower and a causal language model."""

from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..configuration.configuration_mmgem import MMGEMConfig
from ..configuration.hub_options_mmgem import checked_hub_options
from ..processing.tokenization_mmgem import special_token_ids, to_mmgem_tokenizer
from .vision_mmgem import load_tower_projection, load_vision_model, vision_config_of


def from_vision_text_pretrained(
    cls: Any,
    vision: str,
    text: str,
    image_size: int | None = None,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str | None = None,
    vision_kwargs: dict[str, Any] | None = None,
    text_kwargs: dict[str, Any] | None = None,
    **config_kwargs: Any,
) -> Any:
    """
    Loads both towers, adds the new tokens (their rows start at the mean of the old ones) and new projections, which a
    Trainer starts from its training data (`has_new_projections`).

    The loaded towers become part of the model as they are: no second copy of their weights is made.

    Args:
        vision (`str`): Hub id or folder of a checkpoint with one of `towers_mmgem.VISION_TOWERS`; of a full CLIP or
            SigLIP the text tower is dropped.
        text (`str`): Hub id or folder of a causal language model.
        image_size (`int`, *optional*): pixels per side; another size than the checkpoint's interpolates its position
            embeddings (the paper's ViT-L-336).
        dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`): precision of all weights; "auto" is
            the language model's. Train in float32 (under autocast): small steps are lost in 16-bit weights.
        attn_implementation (`str`, *optional*): of both towers, such as "sdpa" or "flash_attention_2".
        vision_kwargs, text_kwargs (`dict`, *optional*): options of each tower's `from_pretrained` that say where its
            files are: `revision`, `subfolder` and `token`, and for the text `gguf_file`.
        **config_kwargs: of [`MMGEMConfig`], such as `projection_dim`. With `image_pooling="tower"` h1 starts as the
            tower's own projection, whose size is the only `projection_dim`: images then have the embeddings that they
            had in the checkpoint, and keep them while the vision tower and h1 are frozen.

    Raises:
        ValueError: for a vision tower or language model that could not be rebuilt exactly, by name; for another
            `projection_dim` than the tower's; for another option of a tower, with where it belongs.
    """
    vision_kwargs = checked_hub_options(vision_kwargs, "vision_kwargs")
    text_kwargs = checked_hub_options(text_kwargs, "text_kwargs")
    image_pooling = config_kwargs.get("image_pooling", "mean")
    vision_config = vision_config_of(vision, image_pooling, **vision_kwargs)  # refuses before anything is loaded
    tower_projection = None
    if image_pooling == "tower":
        tower_projection = load_tower_projection(vision, vision_config, **vision_kwargs)
        size = len(tower_projection)
        if config_kwargs.setdefault("projection_dim", size) != size:
            raise ValueError(
                f"projection_dim {config_kwargs['projection_dim']} is not that of {vision}, {size}, which "
                "image_pooling 'tower' keeps. Leave out projection_dim."
            )
    causal_lm = AutoModelForCausalLM.from_pretrained(text, dtype=dtype, **text_kwargs)
    dtype = causal_lm.dtype
    vision_model = load_vision_model(vision, vision_config, image_size, dtype, **vision_kwargs)
    old_tokenizer = AutoTokenizer.from_pretrained(text, **text_kwargs)
    old_vocabulary = old_tokenizer.get_vocab()
    tokenizer = to_mmgem_tokenizer(old_tokenizer)
    check_language_model(causal_lm)
    # Inside a vocabulary that was padded, the new tokens take rows that no old token uses.
    known = torch.tensor(sorted(i for i in old_vocabulary.values() if i < causal_lm.config.vocab_size))
    probe = {"input_ids": known[:32][None], "attention_mask": torch.ones_like(known[:32][None])}
    with torch.no_grad():
        expected = causal_lm.eval()(**probe).logits[..., known]
    new_ids = [i for token, i in tokenizer.get_vocab().items() if token not in old_vocabulary]
    _add_rows(causal_lm, len(tokenizer), known, new_ids)

    head = causal_lm.get_output_embeddings()
    config = MMGEMConfig(
        vision_config=vision_model.config,
        text_config=causal_lm.config,
        **special_token_ids(tokenizer),
        lm_head_bias=head.bias is not None,
        **config_kwargs,
    )
    with torch.device("meta"):
        model = cls(config).eval()
    model.vision_model, model.language_model, model.lm_head = vision_model.eval(), causal_lm.base_model, head
    for module in model.children():
        if any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()]):
            module.to(dtype).to_empty(device=causal_lm.device)
            model._init_weights(module)
    if tower_projection is not None:
        model.visual_projection.weight.data.copy_(tower_projection)
        model.visual_projection.bias.data.zero_()
    model.tie_weights()
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    configure_generation(model, tokenizer)
    model.has_new_projections = True

    with torch.no_grad():
        error = (model(**probe).logits[..., known] - expected).abs().max() / expected.abs().max()
    if not error < max(1e-4, 4 * torch.finfo(dtype).eps):
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
    generation.suppress_tokens = list(special_token_ids(tokenizer).values())


def check_language_model(causal_lm: PreTrainedModel) -> None:
    """Raises ValueError for what is no plain causal language model with attention only."""
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


def _add_rows(causal_lm: PreTrainedModel, vocab_size: int, known: torch.Tensor, new_ids: list[int]) -> None:
    """Room for `new_ids` in embeddings and head, each new row (and bias) the mean of the `known` ones."""
    if vocab_size > causal_lm.config.vocab_size:
        causal_lm.resize_token_embeddings(vocab_size, mean_resizing=False)
    for module in {causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()}:
        for parameter in module.parameters():
            parameter.data[new_ids] = parameter.data[known].mean(0)


__all__ = ["check_language_model", "configure_generation", "from_vision_text_pretrained"]
