"""
UniME's second stage on composed scenes: what its negatives and its temperature add to in-batch negatives alone.

Each run trains the adapter of configs/scenes-fused-retrieval.yaml beside the same stage-1 model for as many steps, and
is judged on the same held-out scenes, near misses among the candidates. A run that is done is kept in `--output_dir`.

    make demo && python benchmarks/unime.py
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from common import print_result

from mmgem.training.arguments import parse_arguments
from mmgem.training.building import planned_config
from mmgem.training.run import build_trainer


UNIME = ["--false_negative_margin", "0.1", "--hardest_negatives", "8"]
TAU = ["--temperature", "0.02"]
# By name: whether near misses are columns of the loss, and options.
RUNS: dict[str, tuple[bool, list[str]]] = {
    "in-batch": (False, []),
    "in-batch, tau 0.02": (False, TAU),
    "in-batch, margin 0.1, 8 hardest, tau 0.02": (False, [*UNIME, *TAU]),
    "near misses": (True, []),
    "UniME, near misses, margin 0.1, 8 hardest, tau 0.02": (True, [*UNIME, *TAU]),
    "near misses, tau 0.02": (True, TAU),
}
FIGURES = ("fused_R@1", "fused_R@5")


class WithoutNegatives:
    """Triplets whose negatives are left out."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "negative_image": None, "negative_text": None}


def measure(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Metrics of one run; from its file if it was done before."""
    file = options.output_dir / f"{name} {seed}.json"
    if file.exists() and (found := json.loads(file.read_text()))["steps"] == options.steps:
        return found
    with_near_misses, extra = RUNS[name]
    words = ["--config", "configs/scenes-fused-retrieval.yaml", "--init_from", options.base, "--seed", str(seed)]
    words += ["--output_dir", str(options.work_dir), "--max_steps", str(options.steps), "--use_cpu", "true"]
    model_args, data_args, args, _ = parse_arguments([*words, "--eval_strategy", "no", *extra])
    trainer: Any = build_trainer(model_args, data_args, args, planned_config(model_args), None)
    if not with_near_misses:
        trainer.train_dataset.table = WithoutNegatives(trainer.train_dataset.table)
    trainer.train()
    metrics = trainer.evaluate()
    result = {"run": name, "seed": seed, "steps": options.steps, **{f: metrics[f"eval_{f}"] for f in FIGURES}}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="outputs/scenes")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results/unime"))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/unime"))
    options = parser.parse_args()
    results = {name: [measure(name, seed, options) for seed in options.seeds] for name in options.runs}
    print("| run | R@1 | R@5 |\n|---|---|---|")
    means = {}
    for name, runs in results.items():
        cells = []
        for figure in FIGURES:
            values = [run[figure] for run in runs]
            means[name, figure] = statistics.mean(values)
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{means[name, figure]:.3f}{spread}")
        print(f"| {name} | {' | '.join(cells)} |")
    ours, plain = "UniME, near misses, margin 0.1, 8 hardest, tau 0.02", "in-batch"
    if {ours, plain} <= results.keys():
        gain = 100 * (means[ours, "fused_R@1"] - means[plain, "fused_R@1"])
        print_result("unime_gain", round(gain, 1), "points of R@1", ">= 5", "in-batch negatives alone")


if __name__ == "__main__":
    main()
