"""Builds the model and processor that a run starts from."""

import difflib
import math
import os
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.clip import CLIPImageProcessorPil

from ..configuration import MMGEMConfig
from ..configuration.configuration_mmgem import TOKEN_IDS
from ..data.pairs import PairDataset
from ..data.shards import ShardStream
from ..data.tokenizer import train_tokenizer
from ..loading import load_checkpoint
from ..modeling_mmgem import MMGEMModel
from ..modeling_mmgem.conversion_mmgem import configure_generation
from ..modeling_mmgem.losses_mmgem import LogitScale
from ..modeling_mmgem.vision_mmgem import interpolate_positions, tower_projection_dim, vision_config_of
from ..processing import MMGEMProcessor, set_image_size, to_mmgem_tokenizer
from ..processing.image_processors_mmgem import without_center_crop
from ..processing.tokenization_mmgem import special_token_ids
from .model_arguments import SIGLIP, ModelArguments


IMAGES = 256  # that the start of a new vision tower is computed from


def build_model_and_processor(
    arguments: ModelArguments,
    train_dataset: PairDataset | ShardStream,
    max_length: int,
    checkpoint: str | None = None,
) -> tuple[MMGEMModel, MMGEMProcessor]:
    """
    Builds them from an MM-GEM checkpoint (`init_from`), from the checkpoints of two towers, or from scratch with a
    tokenizer trained on the training captions.

    Args:
        checkpoint: folder that the run resumes from. Tokenizer and image processor come from there, and the model too
            unless the folder holds an adapter only.

    Raises:
        ValueError: if `init_from` is a checkpoint of another model type, or damaged; if the attention is unknown or
            not installed.
    """
    model, processor = _build(arguments, train_dataset, max_length, checkpoint)
    if not arguments.do_center_crop:
        processor.image_processor = without_center_crop(processor.image_processor)
    if arguments.attn_implementation is not None:
        try:
            model.set_attn_implementation(arguments.attn_implementation)
        except (ImportError, ValueError) as error:
            raise ValueError(f"--attn_implementation {arguments.attn_implementation}: {error}") from error
    return model, processor


def _build(
    arguments: ModelArguments, train_dataset: PairDataset | ShardStream, max_length: int, checkpoint: str | None
) -> tuple[MMGEMModel, MMGEMProcessor]:
    saved = None if checkpoint is None else MMGEMProcessor.from_pretrained(checkpoint)
    source = _source(arguments, checkpoint)
    if source is not None:
        _load_config(source)
        # float32 for a 16-bit checkpoint too, in which small steps of the optimizer would be rounded away.
        model = load_checkpoint(source, dtype=torch.float32)
        processor = saved or MMGEMProcessor.from_pretrained(source)
        for name in ("auto_map", "custom_pipelines"):
            vars(model.config).pop(name, None)  # an export names code that is not saved with this run
        processor.max_length = max_length
        if arguments.contrastive_loss is not None:
            _set_contrastive_loss(model, arguments.contrastive_loss)
        if arguments.region_grid_size is not None:
            processor.region_grid_size = arguments.region_grid_size
        if arguments.image_grid_size is not None:
            processor.image_grid_size = model.config.image_grid_size = arguments.image_grid_size
        if arguments.image_size not in (None, model.config.vision_config.image_size):
            model.vision_model = interpolate_positions(model.vision_model, arguments.image_size)
            model.config.vision_config = model.vision_model.config
            set_image_size(processor.image_processor, arguments.image_size)
        return model, processor
    if arguments.vision_model_name_or_path and arguments.text_model_name_or_path:
        towers: dict[str, Any] = {
            "vision": arguments.vision_model_name_or_path,
            "text": arguments.text_model_name_or_path,
            "image_size": arguments.image_size,
            "vision_kwargs": arguments.vision_kwargs,
            "text_kwargs": arguments.text_kwargs,
        }
        model = MMGEMModel.from_vision_text_pretrained(**towers, **arguments.config_settings)
        processor = saved or MMGEMProcessor.from_vision_text_pretrained(
            **towers, max_length=max_length, image_grid_size=model.config.image_grid_size
        )
        processor.max_length = max_length
        return model, processor
    return _from_scratch(arguments, train_dataset, max_length)


def _set_contrastive_loss(model: MMGEMModel, name: str) -> None:
    """Adds SigLIP's bias to a model without one, or takes it away; 1 / tau stays."""
    old = model.logit_scale
    if (name == "sigmoid") == (old.bias is not None):
        return
    bias = SIGLIP["logit_bias_init_value"] if name == "sigmoid" else None
    model.logit_scale = LogitScale(old.init_value, old.max_value, bias)
    model.logit_scale.weight.data.copy_(old.weight.data)
    model.config.logit_bias_init_value = bias


def planned_config(arguments: ModelArguments, checkpoint: str | None = None) -> MMGEMConfig:
    """
    Returns the architecture that a run would start from, without loading weights; see [`build_model_and_processor`].

    Raises:
        ValueError: if no option says which model to train.
    """
    source = _source(arguments, checkpoint)
    if source is not None:
        config = _load_config(source)
    elif arguments.vision_model_name_or_path and arguments.text_model_name_or_path:
        vision_name, settings = arguments.vision_model_name_or_path, arguments.config_settings
        vision_kwargs: Any = arguments.vision_kwargs
        text_kwargs: Any = arguments.text_kwargs
        if arguments.image_pooling == "tower":
            settings.setdefault("projection_dim", tower_projection_dim(vision_name, **vision_kwargs))
        vision = vision_config_of(vision_name, settings.get("image_pooling", "mean"), **vision_kwargs).to_dict()
        text = AutoConfig.from_pretrained(arguments.text_model_name_or_path, **text_kwargs).to_dict()
        vision["dtype"] = text["dtype"] = "float32"  # as both are loaded, whatever the files hold
        text["vocab_size"] += len(TOKEN_IDS)
        config = MMGEMConfig(vision_config=vision, text_config=text, **settings)
    elif arguments.vision_config and arguments.text_config:
        config = _config_from_scratch(arguments, {"vocab_size": arguments.vocab_size}, {})
    else:
        raise ValueError(
            "No option says which model to train. Give --init_from CHECKPOINT (an MM-GEM model, to go on from), "
            "--vision_model_name_or_path and --text_model_name_or_path (two pretrained towers), or --vision_config "
            "and --text_config (JSON: a model from scratch, as configs/scenes.yaml has it)."
        )
    if arguments.image_size is not None:
        config.vision_config.image_size = arguments.image_size
    if arguments.image_grid_size is not None:
        config.image_grid_size = arguments.image_grid_size
    config.check_image_grid_size()
    return config


def _source(arguments: ModelArguments, checkpoint: str | None) -> str | None:
    """Returns the MM-GEM checkpoint to load: the resumed one, unless it holds an adapter only, or `init_from`."""
    if checkpoint is not None and os.path.isfile(os.path.join(checkpoint, "config.json")):
        return checkpoint
    return arguments.init_from


def _load_config(name: str) -> MMGEMConfig:
    files = {file: os.path.isfile(os.path.join(name, file)) for file in ("config.json", "adapter_config.json")}
    if files["adapter_config.json"] and not files["config.json"]:
        raise ValueError(f"{name} is an adapter; give --init_from the model that it was trained on.")
    config = AutoConfig.from_pretrained(name)
    if config.model_type != "mmgem":
        raise ValueError(
            f"{name} is a '{config.model_type}' checkpoint, not 'mmgem'. Give a vision tower or language model as "
            "--vision_model_name_or_path or --text_model_name_or_path."
        )
    return config


def _from_scratch(
    arguments: ModelArguments, train_dataset: PairDataset | ShardStream, max_length: int
) -> tuple[MMGEMModel, MMGEMProcessor]:
    captions = (caption for captions in train_dataset.captions() for caption in captions)
    tokenizer = to_mmgem_tokenizer(train_tokenizer(captions, arguments.vocab_size))
    text = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = _config_from_scratch(arguments, text, special_token_ids(tokenizer))
    model = MMGEMModel(config)
    configure_generation(model, tokenizer)
    side = config.vision_config.image_size
    mean, std = _pixel_statistics(train_dataset)
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=mean, image_std=std
    )
    _whiten_patches(model.vision_model, image_processor, train_dataset)
    _set_sinusoidal_positions(model.vision_model, side // config.vision_config.patch_size)
    return model, MMGEMProcessor(
        image_processor, tokenizer, max_length=max_length, image_grid_size=config.image_grid_size
    )


def _config_from_scratch(arguments: ModelArguments, text: dict[str, Any], token_ids: dict[str, Any]) -> MMGEMConfig:
    vision: dict[str, Any] = {"model_type": "clip_vision_model", **arguments.vision_config}  # type: ignore[dict-item]
    if arguments.image_size is not None:
        vision["image_size"] = arguments.image_size
    try:
        config = MMGEMConfig(
            vision_config=vision,
            text_config={"model_type": "llama", **arguments.text_config, **text},  # type: ignore[dict-item]
            **arguments.config_settings,
            **token_ids,
        )
    except (StrictDataclassError, KeyError, TypeError) as error:
        raise ValueError(f"vision_config or text_config describes no model: {error}") from error
    for name in ("vision_config", "text_config"):
        # Not all settings are fields of a configuration's class: transformers keeps unknown ones as attributes.
        known = getattr(config, name).__dataclass_fields__.keys() | type(getattr(config, name))().to_dict().keys()
        for key in getattr(arguments, name).keys() - known:
            if nearest := difflib.get_close_matches(key, known, n=1, cutoff=0.8):
                raise ValueError(f"{name} has no setting {key!r}; did you mean {nearest[0]!r}?")
    # Keeps the variance. With transformers' 0.02, five matrices in a row would all but extinguish an image's signal.
    config.initializer_range = config.text_config.hidden_size**-0.5
    return config


def _pixel_statistics(dataset: PairDataset | ShardStream) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation of each colour, in [0, 1]."""
    count, total, squares = 0, np.zeros(3), np.zeros(3)
    for example in dataset.some_examples(IMAGES):
        pixels = np.asarray(example["image"]).reshape(-1, 3) / 255
        count += len(pixels)
        total += pixels.sum(0)
        squares += (pixels**2).sum(0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-4))
    return mean.round(4).tolist(), std.round(4).tolist()


@torch.no_grad()
def _whiten_patches(vision_model: PreTrainedModel, image_processor: Any, dataset: PairDataset | ShardStream) -> None:
    """
    Initializes the patch embedding of a new tower as a randomly rotated whitening of this data's patches, with unit
    variance (as Page, "How to train your ResNet", 2018, does with a first convolution). A random embedding passes on
    mainly the colour of a patch; edges, which distinguish shapes, take long to be learned.
    """
    patches = _patch_embedding(vision_model)
    size = patches.kernel_size[0]
    moments, count = torch.zeros(3 * size**2, 3 * size**2), 0
    for example in dataset.some_examples(IMAGES):
        pixel_values = image_processor(example["image"], return_tensors="pt")["pixel_values"]
        vectors = nn.functional.unfold(pixel_values, size, stride=size)[0]
        moments += vectors @ vectors.T
        count += vectors.shape[1]
    variances, directions = torch.linalg.eigh((moments / count).double())
    kept = min(patches.out_channels, len(variances))
    floor = 1e-3  # of a pixel's variance, which is 1: keeps directions that hardly vary from being amplified
    whitening = (directions / (variances + floor).sqrt())[:, -kept:].T.float()
    rotation = torch.linalg.qr(torch.randn(patches.out_channels, kept)).Q * math.sqrt(patches.out_channels / kept)
    patches.weight.copy_((rotation @ whitening).view_as(patches.weight))


def _patch_embedding(vision_model: PreTrainedModel) -> nn.Conv2d:
    embedding = next((module for module in vision_model.modules() if isinstance(module, nn.Conv2d)), None)
    if embedding is None:
        raise ValueError(
            f"A '{vision_model.config.model_type}' tower cannot be trained from scratch: it embeds patches without "
            "a convolution. Choose another vision_config, such as that of a siglip_vision_model."
        )
    return embedding


@torch.no_grad()
def _set_sinusoidal_positions(vision_model: PreTrainedModel, side: int) -> None:
    """
    Initializes the position embeddings of a new tower as sines and cosines of row and column (Beyer et al., "Better
    plain ViT baselines for ImageNet-1k", 2022), with unit variance like the patch embeddings. With transformers' faint
    noise, the pooled features say little about positions for many hundred steps. Towers with rotary or relative
    positions (DINOv3, BEiT) have none to initialize.
    """
    hidden_size = _patch_embedding(vision_model).out_channels
    named = vision_model.named_parameters()
    positions = next((value for name, value in named if "position_embedding" in name), None)
    if positions is None:
        return
    quarter = hidden_size // 4
    angles = torch.arange(side)[:, None] * (2.0 * side) ** -torch.linspace(0, 1, quarter)  # radians
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    grid = torch.cat([waves[:, None].expand(side, side, -1), waves.expand(side, side, -1)], -1).flatten(0, 1)
    positions.view(-1, hidden_size)[-(side**2) :, : 4 * quarter] = math.sqrt(2) * grid
