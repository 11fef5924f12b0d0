"""
How many visual tokens a region should become: the demo's region-caption adapter for several k, each with two seeds.

    make demo && python benchmarks/region_grid_size.py
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import print_result


def train(base: str, k: int, seed: int, folder: Path) -> dict[str, float]:
    """The adapter's metrics, and the seconds that its steps took (features were cached before)."""
    command = [sys.executable, "train.py", "--config", "configs/scenes-region-caption.yaml", "--init_from", base]
    command += ["--region_grid_size", str(k), "--seed", str(seed), "--output_dir", str(folder)]
    run = subprocess.run([*command, "--disable_tqdm", "true"], capture_output=True, text=True, check=True)
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    # Trainer's own time, without the first pass over the images.
    speeds = [float(speed) for speed in re.findall(r"'samples_per_second': '([\d.]+)'", run.stdout)]
    return {**metrics, "images_per_second": statistics.median(speeds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="outputs/scenes")
    parser.add_argument("--grid_sizes", type=int, nargs="+", default=[1, 2, 3, 4, 7])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    names = ("exact", "size", "colour", "shape", "cider")
    print(f"| k | tokens | images/s | {' | '.join(names)} | exact, by seed |")
    print("|---|---|---|" + "---|" * (len(names) + 1))
    figures: dict[int, float] = {}
    for k in options.grid_sizes:
        with tempfile.TemporaryDirectory() as folder:
            runs = [train(options.base, k, seed, Path(folder) / str(seed)) for seed in options.seeds]
        means = [statistics.mean(run[f"region_caption_{name}"] for run in runs) for name in names]
        speed = statistics.mean(run["images_per_second"] for run in runs)
        exact = ", ".join(f"{run['region_caption_exact']:.3f}" for run in runs)
        cells = [str(k), str(k * k), f"{speed:.0f}", *(f"{mean:.3f}" for mean in means), exact]
        print(f"| {' | '.join(cells)} |", flush=True)
        figures[k] = means[0]
    best = max(figures, key=lambda k: figures[k])
    print_result("region captions exact, best k", round(figures[best], 3), "share", "0.6", f"k = {best}")


if __name__ == "__main__":
    main()
