"""
Two processes of one thread (torchrun, gloo) beside one process of two threads: pairs/s of `train.py`, the same batch.

    python benchmarks/two_processes.py
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import TOWER, print_result


TRAIN = str(Path(__file__).parents[1] / "train.py")
BATCH_SIZE, STEPS, WARMUP = 64, 8, 2


def run(processes: int) -> float:
    """Pairs/s, the median over steps."""
    size = ", ".join(f'"{name}": {value}' for name, value in TOWER.items())
    vision = f'{{"model_type": "siglip_vision_model", "vision_use_head": false, "image_size": 128, {size}, '
    vision += f'"patch_size": 16, "intermediate_size": {4 * TOWER["hidden_size"]}}}'
    text = f'{{{size}, "intermediate_size": {8 * TOWER["hidden_size"] // 3}}}'
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *(torchrun if processes > 1 else []), TRAIN, "--dataset_name", "scenes"]
        command += ["--vision_config", vision, "--text_config", text, "--vocab_size", "512", "--output_dir", folder]
        command += ["--per_device_train_batch_size", str(BATCH_SIZE // processes), "--max_steps", str(STEPS)]
        command += ["--max_train_samples", "1024", "--max_eval_samples", "4", "--per_device_eval_batch_size", "4"]
        command += ["--use_cpu", "true", "--disable_tqdm", "true", "--caption_samples", "0"]
        command += ["--logging_steps", "1", "--save_strategy", "no", "--report_to", "none"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(2 // processes)}
        finished = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    rates = [float(rate) for rate in re.findall(r"'samples_per_second': '([\d.]+)'", finished.stdout)]
    if len(rates) != STEPS:
        raise RuntimeError(f"{len(rates)} of {STEPS} steps were logged: {finished.stdout}\n{finished.stderr}")
    return statistics.median(rates[WARMUP:])


def main() -> None:
    """Prints a table and, as the last line, two processes over one as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.repeats):
        for processes, values in rates.items():
            values.append(run(processes))
    print(f"{'':36}{'pairs/s':>9}   (each run)")
    for processes, name in {1: "1 process of 2 threads", 2: "2 processes of 1 thread"}.items():
        values = rates[processes]
        each = " ".join(f"{rate:.1f}" for rate in values)
        name = f"{name}, {BATCH_SIZE // processes} pairs each"
        print(f"{name:36}{statistics.median(values):9.1f}   ({each})")
    ratio = statistics.median(rates[2]) / statistics.median(rates[1])
    print_result("two_processes", round(ratio, 2), "x one process's pairs/s", ">= 0.9", "1 process of 2 threads")


if __name__ == "__main__":
    main()
