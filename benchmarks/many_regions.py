"""
Peak memory of captioning and embedding 5,000 regions of one image, beside 500: regions are pooled and captions are
written in parts.

    python benchmarks/many_regions.py
"""

import argparse
import resource
import subprocess
import sys

import numpy as np
import torch
from common import build, print_result
from PIL import Image


CAPTIONS = ["a dog on a beach", "two people ride red bicycles", "snow on a mountain"] * 50


def measure(count: int) -> float:
    """MiB at the peak, in a process of its own."""
    torch.manual_seed(0)
    model, processor = build(CAPTIONS)
    model.eval()
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 128, (count, 2, 2)), 1)  # x and y of both corners, in order
    corners[:, 1] += 4
    boxes = [corners.reshape(count, 4).tolist()]
    image = Image.fromarray(rng.integers(0, 255, (160, 160, 3), dtype=np.uint8))
    with torch.inference_mode():
        embeds = model.get_embedding(**processor(images=[image], boxes=boxes, return_tensors="pt"))
        inputs = processor(images=[image], boxes=boxes, task="region-caption", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
    assert embeds.shape[1] == len(ids) == count
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, help="measure this many, and nothing else")
    options = parser.parse_args()
    if options.count:
        print(measure(options.count))
        return
    peaks = {}
    for count in (500, 5000):
        command = [sys.executable, __file__, "--count", str(count)]
        peaks[count] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"{count} regions: {peaks[count]:.0f} MiB at the peak", flush=True)
    ratio = round(peaks[5000] / peaks[500], 3)
    print_result("peak memory of 5,000 regions over that of 500", ratio, "ratio", "1", "the same with 500")


if __name__ == "__main__":
    main()
