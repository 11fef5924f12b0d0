"""
Retrieval among many items in constant memory: peak memory beside the embeddings, and time, for more and more items
(Linux alone: the peak is reset before the ranking).

    python benchmarks/many_items.py
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from common import print_result


def megabytes(name: str) -> float:
    """VmRSS, what is in memory now, or VmHWM, the most there ever was."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measure(items: int, dimensions: int) -> None:
    """In a process of its own: megabytes that ranking took at its peak, seconds, and R@1."""
    import torch

    from mmgem.evaluation.retrieval import retrieval_metrics

    generator = torch.Generator().manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(items, dimensions, generator=generator), dim=-1)
    images = torch.nn.functional.normalize(texts + 0.1 * torch.randn(items, dimensions, generator=generator), dim=-1)
    retrieval_metrics(texts[:64], images[:64], torch.arange(64))  # libraries that load when first used
    Path("/proc/self/clear_refs").write_text("5")  # from here on a new peak
    before, start = megabytes("VmRSS"), time.perf_counter()
    metrics = retrieval_metrics(texts, images, torch.arange(items))
    print(megabytes("VmHWM") - before, time.perf_counter() - start, metrics["text_to_image_R@1"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--dimensions", type=int, default=128)
    parser.add_argument("--measure", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure, options.dimensions)
    print("| items each way | MB beyond the embeddings | seconds | R@1 |\n|---|---|---|---|")
    for items in options.items:
        command = [sys.executable, __file__, "--measure", str(items), "--dimensions", str(options.dimensions)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        memory, seconds, recall = map(float, output.split())
        print(f"| {items:,} | {memory:.0f} | {seconds:.1f} | {recall:.3f} |", flush=True)
    print_result(
        "many_items", round(memory), "MB for the largest", "constant", f"{items:,}^2 floats: {items**2 / 2.5e8:.0f} GB"
    )


if __name__ == "__main__":
    main()
