"""
What `train.py --dry_run` says of a run's memory beside the most that two steps of it really took (peak resident size).

glibc keeps what is freed in blocks below a threshold, which moves up to 32 MB: where many tensors are just below, a
process takes more than is alive in it. With the threshold fixed at 1 MB it does not; both are shown.

    python benchmarks/dry_run.py
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from common import print_result

from mmgem.data.pairs import PairDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.data.tokenizer import train_tokenizer
from mmgem.processing import to_mmgem_tokenizer


TRAIN = str(Path(__file__).parents[1] / "train.py")
SAMPLES, VOCABULARY = 512, 512


def towers(width: int, layers: int) -> list[str]:
    """Both, from scratch, as options."""
    size = f'"hidden_size": {width}, "intermediate_size": {4 * width}, "num_hidden_layers": {layers}, '
    size += f'"num_attention_heads": {width // 64}'
    vision = '{"model_type": "siglip_vision_model", "vision_use_head": false, "image_size": 64, "patch_size": 8, '
    return ["--vision_config", vision + size + "}", "--text_config", "{" + size + "}"]


CONFIGURATIONS = {
    "184 M parameters, AdamW, batch 16": [*towers(768, 11), "--per_device_train_batch_size", "16"],
    "38 M, AdamW, batch 256": [*towers(512, 5), "--per_device_train_batch_size", "256"],
    "38 M, LAMB, batch 256 in mini-batches of 64": [
        *towers(512, 5),
        *("--per_device_train_batch_size", "256", "--mini_batch_size", "64", "--optim", "lamb"),
    ],
    "38 M, padded rows, caption loss alone, batch 128": [
        *towers(512, 5),
        *("--per_device_train_batch_size", "128", "--packing", "false", "--objective", "caption"),
    ],
}


def peak_of(command: list[str], **environment: str) -> float:
    """GiB that a process took at most."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, **environment}, **quiet)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"exit status {os.waitstatus_to_exitcode(status)}: {' '.join(command)}")
    return usage.ru_maxrss / 2**20


def main() -> None:
    """Prints a table and, as the last line, the largest deviation as JSON."""
    dataset = PairDataset(ScenesDataset("train", SAMPLES, 64))
    captions = [caption for captions in dataset.captions() for caption in captions]
    tokenizer = to_mmgem_tokenizer(train_tokenizer(captions, VOCABULARY))
    tokens = round(sum(map(len, tokenizer(captions)["input_ids"])) / len(captions))
    print(f"{'':50}{'estimate':>10}{'taken':>16}{'taken, threshold 1 MB':>24}   (GiB; estimate / taken)")
    ratios = []
    for name, options in CONFIGURATIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, TRAIN, "--dataset_name", "scenes", "--max_train_samples", str(SAMPLES)]
            command += ["--vocab_size", str(VOCABULARY), "--output_dir", folder, *options, "--report_to", "none"]
            dry_run = [*command, "--dry_run", "true", "--dry_run_caption_tokens", str(tokens)]
            text = subprocess.run(dry_run, check=True, capture_output=True, text=True).stdout
            estimate = float(re.search(r"total +([\d.]+)", text)[1])
            rest = ["--max_steps", "2", "--save_strategy", "no", "--max_eval_samples", "4", "--caption_samples", "0"]
            command += [*rest, "--per_device_eval_batch_size", "4"]
            taken, fixed = peak_of(command), peak_of(command, MALLOC_MMAP_THRESHOLD_="1000000")
        ratios.append(estimate / taken)
        both = f"{taken:10.2f} ({ratios[-1]:.2f}){fixed:17.2f} ({estimate / fixed:.2f})"
        print(f"{name:50}{estimate:10.2f}{both}", flush=True)
    deviation = max(abs(ratio - 1) for ratio in ratios[:2])
    print_result("dry_run", round(deviation, 3), "deviation, first two", "<= 0.15", "peak resident size")


if __name__ == "__main__":
    main()
