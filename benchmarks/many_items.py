"""
Retrieval among many items in constant memory: peak memory beyond the embeddings, and time, for more and more items.

    python benchmarks/many_items.py
"""

import argparse
import resource
import subprocess
import sys
import time

from common import print_result


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(items: int, dimensions: int) -> None:
    """In a process of its own: peak memory before and after, and seconds."""
    import torch

    from mmgem.evaluation.retrieval import retrieval_metrics

    generator = torch.Generator().manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(items, dimensions, generator=generator), dim=-1)
    images = torch.nn.functional.normalize(texts + 0.1 * torch.randn(items, dimensions, generator=generator), dim=-1)
    retrieval_metrics(texts[:4096], images[:4096], torch.arange(4096))  # what is allocated once
    before, start = peak_megabytes(), time.perf_counter()
    metrics = retrieval_metrics(texts, images, torch.arange(items))
    print(peak_megabytes() - before, time.perf_counter() - start, metrics["text_to_image_R@1"])


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
