"""Tiny checkpoints and pictures that the tests make themselves."""

import io
import os
import tarfile

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.clip import CLIPImageProcessorPil

from mmgem import MMGEMConfig, MMGEMModel, MMGEMProcessor
from mmgem.data.tokenizer import train_tokenizer
from mmgem.modeling_mmgem.conversion_mmgem import configure_generation
from mmgem.processing import to_mmgem_tokenizer
from mmgem.processing.tokenization_mmgem import special_token_ids


hypothesis.settings.register_profile("same_examples_every_time", derandomize=True)
hypothesis.settings.load_profile("same_examples_every_time")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
else:
    torch.set_num_threads(2)

CORPUS = ["a dog on a beach", "the cat sat on the mat", "two people ride red bicycles", "snow on a mountain"] * 3
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
VISION = {"model_type": "clip_vision_model", **TOWER}
TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


class Table(list):
    """Rows with the one thing more that PairDataset asks of a table."""

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def make_picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth picture of random colours, (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def base_tokenizer():
    return train_tokenizer(CORPUS, 320)


@pytest.fixture(scope="session")
def processor(base_tokenizer) -> MMGEMProcessor:
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return MMGEMProcessor(image_processor, to_mmgem_tokenizer(base_tokenizer), region_grid_size=1)


def make_model(processor: MMGEMProcessor, seed: int = 0, **changes) -> MMGEMModel:
    """A tiny model in eval mode; `changes` go to the text config, `config` to MMGEMConfig."""
    tokenizer = processor.tokenizer
    config_changes = changes.pop("config", {})
    config = MMGEMConfig(
        **{
            "vision_config": VISION,
            "text_config": {
                **TEXT,
                "vocab_size": len(tokenizer),
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                **changes,
            },
            "projection_dim": 16,
            "region_grid_size": 1,
            **special_token_ids(tokenizer),
            **config_changes,
        }
    )
    torch.manual_seed(seed)
    model = MMGEMModel(config).eval()
    configure_generation(model, tokenizer)
    return model


def make_language_model(tokenizer, seed: int = 0, **changes) -> LlamaForCausalLM:
    """A tiny causal language model in eval mode, whose head is not tied to its embeddings."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, "vocab_size": len(tokenizer), **changes})).eval()


@pytest.fixture
def model(processor) -> MMGEMModel:
    return make_model(processor)


def write_shards(folder) -> None:
    """Four shards of twelve samples each, 0.tar to 3.tar, every caption of a shard ending in its number."""
    for s in range(4):
        samples = [(f"{i:03}", make_picture(12 * s + i), f"{CORPUS[i % 4]} {s}") for i in range(12)]
        write_shard(folder / f"{s}.tar", samples)


def write_shard(path, samples) -> None:
    """A tar of (key, picture, caption), in img2dataset's layout."""
    with tarfile.open(path, "w") as tar:
        for key, picture, caption in samples:
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG")
            for name, content in ((f"{key}.jpg", buffer.getvalue()), (f"{key}.txt", caption.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
