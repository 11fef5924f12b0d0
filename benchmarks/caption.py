"""
Captions per second: MM-GEM beside transformers' LLaVA around towers of the same sizes. Ours reads one token of a
image, LLaVA one per patch.

    python benchmarks/caption.py

Llama beside a ViT as large in proportion as the paper's ViT-B/16 and ViT-L/14 beside TinyLlama (vocabularies aside),
at widths that two CPU cores bear; images of 224 px. Weights are random, so both write as many tokens as they may,
16, a caption.
"""

import argparse
from functools import partial
from typing import Any

import torch
from common import alternate, print_result
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmgem import MMGEMConfig, MMGEMModel


IMAGE_SIZE, VOCABULARY = 224, 32_000
VISION = {"ViT-B/16": (256, 16), "ViT-L/14": (480, 14)}  # width, pixels of a patch
TEXT = {"hidden_size": 640, "intermediate_size": 1760, "num_hidden_layers": 12, "num_attention_heads": 10}
IMAGE, CAP = VOCABULARY - 3, VOCABULARY - 2


def build(width: int, patch_size: int) -> tuple[MMGEMModel, LlavaForConditionalGeneration]:
    """Both with the same configurations of their towers."""
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 6, "num_attention_heads": 4}
    vision |= {"image_size": IMAGE_SIZE, "patch_size": patch_size}
    text = {**TEXT, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    ours = MMGEMModel(
        MMGEMConfig(
            vision_config={"model_type": "clip_vision_model", **vision},
            text_config={"model_type": "llama", **text},
            projection_dim=512,
        )
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text), image_token_id=IMAGE
    )
    return ours.eval(), LlavaForConditionalGeneration(config).eval()


def main() -> None:
    """Prints a table per ViT and, as the last line, the ratio beside ViT-B, each at its best batch, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    ratios = {}
    for vision, (width, patch_size) in VISION.items():
        models = dict(zip(("mmgem", "LLaVA"), build(width, patch_size)))
        prompts = {"mmgem": [0, IMAGE, CAP], "LLaVA": [0, *[IMAGE] * (IMAGE_SIZE // patch_size) ** 2]}
        parts = (models["mmgem"].vision_model, models["mmgem"].language_model.layers)
        sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts]
        print(f"{vision}: {sizes[0]:.1f} M, layers of the language model {sizes[1]:.1f} M; ", end="")
        print(", ".join(f"{name} reads {len(prompt)} tokens" for name, prompt in prompts.items()))
        print(f"{'greedy captions/s':24}{'mmgem':>8}{'LLaVA':>8}{'ratio':>8}")
        best = dict.fromkeys(models, 0.0)
        for batch_size in options.batch_sizes:
            pixels = torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
            runs = {n: partial(caption, m, prompts[n], pixels, options.new_tokens) for n, m in models.items()}
            speeds = {name: batch_size / value for name, value in alternate(runs, options.repeats).items()}
            print_row(f"{batch_size} at once", speeds)
            best = {name: max(best[name], speed) for name, speed in speeds.items()}
        print_row("each at its best", best)
        ratios[vision] = best["mmgem"] / best["LLaVA"]
        print(flush=True)
    peer = "transformers' LlavaForConditionalGeneration"
    print_result("caption", round(ratios["ViT-B/16"], 3), "x captions/s", ">= 5", peer)


def print_row(name: str, speeds: dict[str, float]) -> None:
    columns = "".join(f"{speed:8.2f}" for speed in speeds.values())
    print(f"{name:24}{columns}{speeds['mmgem'] / speeds['LLaVA']:8.2f}", flush=True)


def caption(model: Any, prompt: list[int], pixels: torch.Tensor, new_tokens: int) -> None:
    ids = torch.tensor([prompt] * len(pixels))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    assert ids.shape[1] == len(prompt) + new_tokens


if __name__ == "__main__":
    main()
