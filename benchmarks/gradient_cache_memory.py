"""
Peak memory of training at batch sizes 256 and 4,096 with the same mini-batches: fresh processes, VmHWM.

    python benchmarks/gradient_cache_memory.py
"""

import argparse
import json
import subprocess
import sys
import tempfile

import torch
from common import print_result
from transformers.models.clip import CLIPImageProcessorPil

from mmgem import MMGEMConfig, MMGEMModel, MMGEMProcessor
from mmgem.data.pairs import PairDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.data.tokenizer import train_tokenizer
from mmgem.processing import to_mmgem_tokenizer
from mmgem.processing.tokenization_mmgem import special_token_ids
from mmgem.training.arguments import MMGEMTrainingArguments
from mmgem.training.trainer import MMGEMTrainer


TOWER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
SIDE, DIMENSION = 64, 256


def peak() -> int:
    """Most bytes that this process has ever held (Linux)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def train(batch_size: int, mini_batch_size: int) -> dict[str, int]:
    """One step in this process: its peak, and what the batch's images, tokens and embeddings take of it."""
    torch.manual_seed(0)
    dataset = PairDataset(ScenesDataset("train", batch_size, SIDE))
    tokenizer = to_mmgem_tokenizer(train_tokenizer((c for of_image in dataset.captions() for c in of_image), 512))
    vision = {"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": 8, **TOWER}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **TOWER}
    config = MMGEMConfig(
        vision_config=vision, text_config=text, projection_dim=DIMENSION, **special_token_ids(tokenizer)
    )
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = MMGEMProcessor(image_processor, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        args = MMGEMTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            mini_batch_size=mini_batch_size,
            max_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        MMGEMTrainer(MMGEMModel(config), args, processor, dataset).train()
    images = batch_size * 3 * SIDE * SIDE
    embeddings = 2 * batch_size * DIMENSION * 4
    # Images as PIL and as float tensors, embeddings with and without gradient, and their gradients.
    return {"peak": peak(), "inputs": images * (1 + 4), "embeddings": 3 * embeddings}


def main() -> None:
    """Prints a table and, as the last line, the ratio of the peaks without inputs and embeddings as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mini_batch_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, help="Train in this process, and print its peak.")
    args = parser.parse_args()
    if args.batch_size:
        print(json.dumps(train(args.batch_size, args.mini_batch_size)))
        return
    rest = {}
    print(f"{'batch':>8}{'VmHWM, MiB':>12}{'inputs':>9}{'embeddings':>12}{'without them':>14}")
    for batch_size in (256, 4096):
        command = [sys.executable, __file__, "--batch_size", str(batch_size)]
        command += ["--mini_batch_size", str(args.mini_batch_size)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        sizes = {name: value / 2**20 for name, value in json.loads(output.splitlines()[-1]).items()}
        rest[batch_size] = sizes["peak"] - sizes["inputs"] - sizes["embeddings"]
        print(
            f"{batch_size:8}{sizes['peak']:12.0f}{sizes['inputs']:9.0f}{sizes['embeddings']:12.0f}"
            f"{rest[batch_size]:14.0f}"
        )
    ratio = round(rest[4096] / rest[256], 3)
    print_result("gradient_cache_memory", ratio, "x the peak at batch 256", "<= 1.15", "batch 256, same mini-batch")


if __name__ == "__main__":
    main()
