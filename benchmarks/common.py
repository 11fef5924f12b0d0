"""What several benchmarks share: real captions, a model of the peers' size, alternating runs, and the last line."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
import transformers
from PIL import Image
from transformers.models.clip import CLIPImageProcessorPil

import mmgem
from mmgem import MMGEMConfig, MMGEMModel, MMGEMProcessor
from mmgem.data.collator import MODEL_INPUTS
from mmgem.data.pairs import as_captions
from mmgem.data.tokenizer import train_tokenizer
from mmgem.modeling_mmgem import contrastive_loss
from mmgem.processing import to_mmgem_tokenizer
from mmgem.processing.tokenization_mmgem import special_token_ids


MAX_LENGTH = 50
IMAGE_SIZE, PATCH_SIZE = 128, 16
TOWER = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}


def read_captions(parquet: str, column: str) -> list[str]:
    """The first caption of every image."""
    table = datasets.load_dataset("parquet", data_files=parquet, split="train")
    return [as_captions(value)[0] for value in table[column]]


def build(captions: list[str]) -> tuple[MMGEMModel, MMGEMProcessor]:
    """
    ViT and Llama of 6 layers x 384, images of 128 px, a BPE of the captions. Llama's gated MLP has three matrices:
    at 8/3 of the width it has as many weights as the ViT's two at 4 times the width.
    """
    tokenizer = to_mmgem_tokenizer(train_tokenizer(captions, 4096))
    vision = {"model_type": "clip_vision_model", "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    width = TOWER["hidden_size"]
    config = MMGEMConfig(
        vision_config={**vision, **TOWER, "intermediate_size": 4 * width, "hidden_act": "gelu"},
        text_config={**text, **TOWER, "intermediate_size": 8 * width // 3},
        projection_dim=width,
        **special_token_ids(tokenizer),
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return MMGEMModel(config).train(), MMGEMProcessor(image_processor, tokenizer, max_length=MAX_LENGTH)


def examples_of(captions: list[str]) -> list[dict]:
    """As a dataset gives them, with one black image."""
    image = torch.zeros(IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8).numpy()
    return [{"image": image, "image_id": i, "caption": c, "bad": {}} for i, c in enumerate(captions)]


def joint_losses(model: MMGEMModel, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """L_Emb and L_Gen of a collator's batch."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    outputs = model(**inputs, return_loss=False, logits_to_keep=1)
    embeds = outputs.text_embeds[batch["text_index"]], outputs.image_embeds
    contrastive = contrastive_loss(*embeds, outputs.logit_scale, pair_ids=batch["pair_ids"])
    return contrastive, outputs.caption_loss


def make_step(model: torch.nn.Module) -> Callable[[Callable[[], torch.Tensor]], None]:
    """A training step on whatever loss it is given: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(loss: Callable[[], torch.Tensor]) -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def alternate(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turn `repeats` times after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def save_for_docs(source: str | Path, target: str | Path) -> None:
    """A copy of an image that a page can bear: 900 pixels wide at most, 256 colours, the rare ones kept."""
    image = Image.open(source).convert("RGB")
    image.thumbnail((900, 10_000), Image.Resampling.LANCZOS)
    image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(target, optimize=True)


def print_result(name: str, value: float, unit: str, goal: str, peer: str, **versions: str) -> None:
    """One JSON object: the figure, what it is compared with, and what it was measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    result = {
        "name": name,
        "value": value,
        "unit": unit,
        "goal": goal,
        "peer": peer,
        "machine": f"{platform.system()} {platform.machine()}, {device}",
        "versions": {
            "mmgem": mmgem.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **versions,
        },
    }
    print(json.dumps(result))
