"""The options that say which model a run starts from."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from ..configuration.hub_options_mmgem import checked_hub_options
from ..data.json_files import parse_json
from ..options import option


SIGLIP = {"logit_scale_init_value": math.log(10), "logit_bias_init_value": -10.0}  # Zhai et al., 2023, section 3.2


@dataclass
class ModelArguments:
    """Where the model comes from: an MM-GEM checkpoint, checkpoints of two towers, or configurations."""

    init_from: str | None = option(None, "MM-GEM checkpoint (folder or Hub id) to go on from, on new data.")
    vision_model_name_or_path: str | None = option(
        None, "Checkpoint for the vision tower: CLIP, SigLIP, DINOv3, … (table in docs/training.md)."
    )
    text_model_name_or_path: str | None = option(None, "Causal language model checkpoint.")
    vision_kwargs: dict | str | None = option(None, "Where the vision checkpoint is (JSON): revision, subfolder.")
    text_kwargs: dict | str | None = option(None, "The same of the language model; gguf_file too.")
    vision_config: dict | str | None = option(None, "From scratch: settings of the vision tower (JSON).")
    text_config: dict | str | None = option(None, "From scratch: settings of the language model (JSON).")
    vocab_size: int = option(None, "From scratch: size of the BPE trained on the captions; 4096 by default.")
    image_size: int | None = option(None, "Pixels per side; position embeddings are interpolated where it is new.")
    attn_implementation: str | None = option(
        None, "Attention of both towers: sdpa (default), eager, flash_attention_2, …"
    )
    do_center_crop: bool = option(
        True, "false resizes whole images to the model's square, where its image processor would cut out the middle."
    )
    projection_dim: int | None = option(
        None, "D, the size of the embedding space of a new model; 512 by default, or the tower's."
    )
    image_pooling: Literal["mean", "cls", "cls+mean", "tower"] | None = option(
        None,
        "What a new model embeds images from; mean of the patches by default. tower: as CLIP or SigLIP does itself.",
    )
    image_grid_size: int | None = option(
        None, "k: a whole image becomes k x k visual tokens; 1 by default, or the checkpoint's own."
    )
    contrastive_loss: Literal["softmax", "sigmoid"] | None = option(
        None,
        "L_Emb: InfoNCE (softmax; the paper's, and the default of a new model), or SigLIP's sigmoid loss with its "
        "learned bias. By default the checkpoint's own.",
    )
    region_grid_size: int | None = option(
        None, "k: a region becomes k x k visual tokens; by default the checkpoint's own."
    )

    @property
    def config_settings(self) -> dict[str, Any]:
        """The settings of a new model's configuration that were given."""
        names = ("projection_dim", "image_pooling", "image_grid_size")
        settings = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return settings | (SIGLIP if self.contrastive_loss == "sigmoid" else {})

    def __post_init__(self) -> None:
        self.vision_config = _as_mapping(self.vision_config, "vision_config")
        self.text_config = _as_mapping(self.text_config, "text_config")
        for name in ("vision_kwargs", "text_kwargs"):
            options = checked_hub_options(_as_mapping(getattr(self, name), name), name)
            tower = name.replace("kwargs", "model_name_or_path")
            if options and not getattr(self, tower):
                raise ValueError(f"{name} is for --{tower}. Leave out --{name}.")
            if "token" in options:
                raise ValueError(f"{name} is written into checkpoints. Set HF_TOKEN instead of its token.")
            setattr(self, name, options)
        if self.init_from and (self.vision_model_name_or_path or self.text_model_name_or_path):
            raise ValueError("init_from brings its own towers. Leave out --vision_model_name_or_path and its pair.")
        if self.init_from and self.projection_dim is not None:
            raise ValueError("projection_dim of the checkpoint of --init_from is kept. Leave out --projection_dim.")
        if self.init_from and self.image_pooling is not None:
            raise ValueError("image_pooling of the checkpoint of --init_from is kept. Leave out --image_pooling.")
        for name in ("vocab_size", "vision_config", "text_config"):
            if getattr(self, name) and (self.init_from or self.vision_model_name_or_path):
                raise ValueError(
                    f"{name} is for a model from scratch: pretrained towers and --init_from bring their own. Leave "
                    f"out --{name}."
                )
        self.vocab_size = 4096 if self.vocab_size is None else self.vocab_size
        if self.projection_dim is None and self.image_pooling != "tower":  # which has a size of its own
            self.projection_dim = 512
        for name in ("projection_dim", "vocab_size", "image_grid_size", "region_grid_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}.")


def _as_mapping(value: dict | str | None, name: str) -> dict:
    """Returns a mapping from YAML as it is, and parses JSON from the command line."""
    try:
        mapping = parse_json(value) if isinstance(value, str) else value or {}
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {error}.") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"{name} must be a mapping, got {value!r}.")
    return mapping
