"""
Captions per second: MM-GEM beside transformers' LLaVA around towers of the same sizes. Ours reads one token of a
picture, LLaVA one per patch.

    python benchmarks/caption.py

Llama beside a ViT as large in proportion as the paper's ViT-B and ViT-L beside TinyLlama, at widths that two CPU cores
bear; pictures of 224 px in patches of 14. Weights are random, so both write as many tokens as they may: 16, a caption.
"""

import argparse
from functools import partial
from typing import Any

import torch
from common import alternate, print_result
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmgem import MMGEMConfig, MMGEMModel


IMAGE_SIZE, PATCH_SIZE, VOCABULARY = 224, 14, 32_000
WIDTHS = {"ViT-B": 256, "ViT-L": 480}
TEXT = {"hidden_size": 640, "intermediate_size": 1760, "num_hidden_layers": 12, "num_attention_heads": 10}
IMAGE, CAP = VOCABULARY - 3, VOCABULARY - 2
PROMPTS = {"mmgem": [0, IMAGE, CAP], "LLaVA": [0, *[IMAGE] * (IMAGE_SIZE // PATCH_SIZE) ** 2]}


def build(width: int) -> tuple[MMGEMModel, LlavaForConditionalGeneration]:
    """Both with the same configurations of their towers."""
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 6, "num_attention_heads": 4}
    vision |= {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
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
    """Prints a table per ViT and, as the last line, the ratio at the largest batch beside ViT-B as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    ratios = {}
    for vision, width in WIDTHS.items():
        models = dict(zip(("mmgem", "LLaVA"), build(width)))
        sizes = [sum(p.numel() for p in part.parameters()) for part in models["mmgem"].children()]
        print(f"{vision}: {sizes[0] / 1e6:.1f} M, language model {sum(sizes[1:3]) / 1e6:.1f} M")
        print(f"{'greedy captions/s':24}{'mmgem':>8}{'LLaVA':>8}{'ratio':>8}")
        for batch_size in options.batch_sizes:
            pixels = torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
            runs = {name: partial(caption, m, name, pixels, options.new_tokens) for name, m in models.items()}
            seconds = alternate(runs, options.repeats)
            ratios[vision] = seconds["LLaVA"] / seconds["mmgem"]
            speeds = "".join(f"{batch_size / value:8.2f}" for value in seconds.values())
            print(f"{f'{batch_size} at once':24}{speeds}{ratios[vision]:8.2f}", flush=True)
        print()
    print("tokens in front of a caption: " + ", ".join(f"{name} {len(prompt)}" for name, prompt in PROMPTS.items()))
    peer = "transformers' LlavaForConditionalGeneration"
    print_result("caption", round(ratios["ViT-B"], 3), "x captions/s", ">= 5", peer)


def caption(model: Any, name: str, pixels: torch.Tensor, new_tokens: int) -> None:
    ids = torch.tensor([PROMPTS[name]] * len(pixels))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    assert ids.shape[1] == len(PROMPTS[name]) + new_tokens


if __name__ == "__main__":
    main()
