"""
The losses, negatives and batches of docs/negatives.md in stage 1, one factor at a time, in the same minutes.

On drawn scenes, from scratch, and on Flickr8k with pretrained towers, every run goes through train.py for as long as
the plain one takes for `--steps` (of L_Emb alone, the plain one of L_Emb alone): what changes the loss alone takes the
same steps, and of the others the speed is measured right after that of the plain one. Mined negatives and clusters
come from the plain model of seed 0, which costs once more what that run did. A run that is done is kept in
`--output_dir`; started again, the benchmark goes on where it stopped. Runs may share a machine if each keeps to cores
of its own (`taskset`, `OMP_NUM_THREADS=1`).

    python benchmarks/negatives.py --data scenes --runs plain "8 hardest" mined
    python benchmarks/negatives.py --data flickr8k --steps 140 --seeds 0 --runs plain distilled --vision VIT_FOLDER \
        --text LM_FOLDER --distilled LM_FOLDER --train_file train.parquet --validation_file validation.parquet
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import yaml
from scipy.stats import t

from mmgem.data.scenes import ScenesDataset


# What the options of a run add to the recipe; {…} are files and numbers that differ by data.
SAME_SPEED = {
    "plain": [],
    "margin 0.1": ["--false_negative_margin", "0.1"],
    "8 hardest": ["--hardest_negatives", "8"],
    "hardness 9": ["--hardness_weight", "9"],
    "sigmoid": ["--contrastive_loss", "sigmoid"],
    "clustered": ["--batch_sampler", "clustered", "--train_file", "{mined}"],
    "distilled": ["--text_model_name_or_path", "{distilled}"],
    "teacher": ["--teacher", "{teacher}"],
}
OTHER_SPEED = {
    "mined": ["--negative_caption_column", "negative_caption", "--train_file", "{mined}"],
    "batch 512": ["--per_device_train_batch_size", "512", "--mini_batch_size", "{batch}"],
}
ALONE = ["--objective", "contrastive", "--caption_samples", "0"]
RUNS = {**SAME_SPEED, **OTHER_SPEED}
RUNS |= {f"{name}, L_Emb alone": [*options, *ALONE] for name, options in RUNS.items()}
COLUMNS = {
    "text to image R@1": "text_to_image_R@1",
    "image to text R@1": "image_to_text_R@1",
    "text to image R@10": "text_to_image_R@10",
    "CIDEr-D": "caption_cider",
    "L_Gen": "caption_loss",
}
CALIBRATION_STEPS = 40
SCENES = 24_000
MINED_SCORES = ["--num_negatives", "8", "--absolute_margin", "-0.1", "--cluster_size", "16"]


def train(options: list[str], folder: Path, steps: int, seed: int) -> dict[str, float]:
    """Runs train.py; its metrics, and the steps a minute that its log says."""
    command = [sys.executable, "train.py", *options, "--output_dir", str(folder), "--max_steps", str(steps)]
    fixed = {"seed": seed, "disable_tqdm": "true", "logging_steps": 8, "eval_strategy": "no", "use_cpu": "true"}
    command += [part for name, value in fixed.items() for part in (f"--{name}", str(value))]
    run = subprocess.run(command, capture_output=True, text=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.parent.joinpath(f"{folder.name}.log").write_text(run.stdout + run.stderr)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
    speeds = [float(speed) for speed in re.findall(r"'samples_per_second': '?([\d.]+)", run.stdout)]
    results, record = (json.loads((folder / name).read_text()) for name in ("results.json", "training.json"))
    return {
        **{name: results["metrics"][name] for name in COLUMNS.values() if name in results["metrics"]},
        "pairs": record["examples"],
        "steps_per_minute": 60 * statistics.median(speeds[1:] or speeds) / record["batch_size"],
    }


def steps_of(name: str, recipe: list[str], extra: list[str], options: argparse.Namespace) -> int:
    """As many steps as take the time of the plain run's."""
    if name.removesuffix(", L_Emb alone") in SAME_SPEED:
        return options.steps
    few = ["--max_eval_samples", "8", "--caption_samples", "0"]
    plain, speeds = ALONE if name.endswith(", L_Emb alone") else [], []
    for i, added in enumerate((plain, extra, plain, extra)):
        steps = CALIBRATION_STEPS // (8 if "512" in added else 1) + 16
        found = train([*recipe, *added, *few], options.work_dir / f"{options.data} {name} speed {i}", steps, 0)
        speeds.append(found["steps_per_minute"])
    return max(1, round(options.steps * (speeds[1] + speeds[3]) / (speeds[0] + speeds[2])))


def scenes_as_files(folder: Path) -> tuple[str, str]:
    """Parquet files of drawn scenes, to train and to evaluate on."""
    paths = [folder / f"scenes {split}.parquet" for split in ("train", "test")]
    for path, split, count in zip(paths, ("train", "test"), (SCENES, 500)):
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            drawn = ScenesDataset(split, count, 64)
            rows = [drawn[i] for i in range(count)]
            columns = {name: [row[name] for row in rows] for name in ("image", "caption")}
            datasets.Dataset.from_dict(columns).to_parquet(path)
    return str(paths[0]), str(paths[1])


def measure(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Metrics of one run; from its file if it was done before."""
    file = options.output_dir / f"{options.data} {name} {seed}.json"
    if file.exists() and (found := json.loads(file.read_text()))["plain_steps"] == options.steps:
        return found
    mined = options.work_dir / f"{options.data} mined.parquet"
    filled = {"mined": mined, "batch": options.batch, "distilled": options.distilled, "teacher": options.teacher}
    extra = [part.format(**filled) for part in RUNS[name]]
    if str(mined) in extra and not mined.exists():
        model = options.work_dir / f"{options.data} plain 0"
        if not model.exists():
            train(options.recipe, model, options.steps, 0)
        words = ["--model", str(model), "--data_file", options.train_file]
        words += ["--caption_column", options.caption_column, "--output_file", str(mined), *MINED_SCORES]
        subprocess.run([sys.executable, "-m", "mmgem.mining", *words], check=True)
    steps = steps_of(name, options.recipe, extra, options)
    found = train([*options.recipe, *extra], options.work_dir / f"{options.data} {name} {seed}", steps, seed)
    result = {"data": options.data, "run": name, "seed": seed, "plain_steps": options.steps, "steps": steps, **found}
    del result["steps_per_minute"]  # runs may share the machine
    options.output_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result), flush=True)
    return result


def table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """
    Lines of Markdown: means over seeds, ± their standard deviation, and how far recall is from plain on the same
    seeds, ± half of the 95 % interval (Student's t).
    """
    lines = [["run", "pairs"]]
    for label in COLUMNS:
        lines[0] += [label, "minus plain"] if "R@" in label else [label]
    for name, runs in results.items():
        base = "plain, L_Emb alone" if name.endswith("alone") else "plain"
        plain = {run["seed"]: run for run in results.get(base, [])}
        cells = []
        for label, figure in COLUMNS.items():
            if figure.startswith("caption") and name.endswith("alone"):
                cells.append("–")
                continue
            values = {run["seed"]: run[figure] for run in runs if figure in run}
            cells.append(_mean(list(values.values()), statistics.stdev))
            if "R@" in label:
                gains = [value - plain[seed][figure] for seed, value in values.items() if seed in plain]
                cells.append("–" if name == base else _mean(gains, _half_interval, "+"))
        lines.append([name, f"{runs[0]['pairs']:,}", *cells])
    return [f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]]]


def _half_interval(values: list[float]) -> float:
    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def _mean(values: list[float], spread: Callable[[list[float]], float], sign: str = "") -> str:
    if not values:
        return "–"
    mean = f"{statistics.mean(values):{sign}.3f}"
    return f"{mean} ± {spread(values):.3f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["scenes", "flickr8k"], required=True)
    parser.add_argument("--steps", type=int, default=240, help="Of the plain run.")
    parser.add_argument("--vision")
    parser.add_argument("--text")
    parser.add_argument("--distilled", help="Language model that --stage text-distillation saved.")
    parser.add_argument("--teacher", help="Model of sentence-transformers, of captions in stage 1.")
    parser.add_argument("--train_file")
    parser.add_argument("--validation_file")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results/negatives"))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/negatives"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", default=["plain"], choices=RUNS)
    options = parser.parse_args()
    for name in ("distilled", "teacher"):
        if getattr(options, name) is None and any(run.startswith(name) for run in options.runs):
            parser.error(f"{name} needs --{name}")
    if options.data == "flickr8k" and None in (
        options.vision,
        options.text,
        options.train_file,
        options.validation_file,
    ):
        parser.error("flickr8k needs --vision, --text, --train_file and --validation_file")
    options.work_dir.mkdir(parents=True, exist_ok=True)
    if options.data == "scenes":
        options.train_file, options.validation_file = scenes_as_files(options.work_dir)
        options.caption_column, options.batch = "caption", 64
        settings = yaml.safe_load(Path("configs/scenes.yaml").read_text())
        config = options.work_dir / "scenes.yaml"  # the scenes as files, whose captions and clusters can be mined
        config.write_text(
            yaml.safe_dump({k: v for k, v in settings.items() if k not in ("dataset_name", "output_dir")})
        )
        options.recipe = ["--config", str(config)]
    else:
        options.caption_column, options.batch = "captions", 32
        options.recipe = ["--config", "configs/pretrained.yaml", "--image_pooling", "cls+mean"]
        options.recipe += ["--vision_model_name_or_path", options.vision, "--text_model_name_or_path", options.text]
        options.recipe += ["--feature_cache_dir", str(options.work_dir / "features")]
        options.recipe += ["--caption_samples", "500", "--generation_num_beams", "1"]
        options.recipe += ["--attn_implementation", "eager"]  # on CPUs faster than the fused one, for rows this short
    options.recipe += ["--warmup_steps", "0.14"]  # a share, since runs differ in their steps
    options.recipe += ["--train_file", options.train_file, "--validation_file", options.validation_file]
    results = {name: [measure(name, seed, options) for seed in options.seeds] for name in options.runs}
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
