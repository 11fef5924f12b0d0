"""
Flickr8k with pretrained towers: the recipe of configs/pretrained.yaml beside its baselines, in the same minutes.

Every run goes through train.py, on the cached features of the same frozen ViT, for as many steps as fit into
`--minutes` (a short run measures the speed beforehand, and caches the features) or for `--steps`, which machines of
any speed can compare, and is judged on all validation images. Baselines: "LiT", a text tower of CLIP's size from
scratch (Zhai et al., 2022); "captions alone", the same language model without L_Emb, as ClipCap (Mokady et al.,
2021) trains it; "from scratch", configs/flickr8k.yaml; "random towers", the recipe on towers of the same sizes that
nobody trained.

    python benchmarks/pretrained_flickr8k.py --vision VIT_FOLDER --text LM_FOLDER \
        --train_file train.parquet --validation_file validation.parquet

A run that is done is kept in `--output_dir`; started again, the benchmark goes on where it stopped. Nothing else
should run beside it.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import torch
from common import print_result
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from mmgem.data.pairs import as_captions
from mmgem.data.tokenizer import train_tokenizer
from mmgem.training.checks import has_bfloat16_instructions


POOLING = "cls+mean"  # for a ViT with a class token
RECIPE = ["--config", "configs/pretrained.yaml", "--image_pooling", POOLING]
SCRATCH = ["--config", "configs/flickr8k.yaml", "--generation_num_beams", "3"]
# By name: what a run's options add to the recipe. `{…}` are folders that `prepare` makes.
RUNS: dict[str, list[str]] = {
    "mmgem": [],
    "LiT": [
        *("--objective", "contrastive", "--text_model_name_or_path", "{clip_text}"),
        *("--projection_lr_multiplier", "1", "--warmup_steps", "50", "--per_device_train_batch_size", "64"),
        *("--caption_samples", "0"),  # it cannot write
    ],
    "captions alone": ["--objective", "caption"],
    "from scratch": SCRATCH,
    "random towers": ["--vision_model_name_or_path", "{random}/vision", "--text_model_name_or_path", "{random}/text"],
    # One factor at a time.
    "contrastive alone": ["--objective", "contrastive", "--caption_samples", "0"],
    "cls pooling": ["--image_pooling", "cls"],
    "mean pooling": ["--image_pooling", "mean"],
    "mean pooling, k = 2": ["--image_pooling", "mean", "--image_grid_size", "2"],
    "k = 4": ["--image_grid_size", "4"],
    "k = 7": ["--image_grid_size", "7", "--pack_length", "96"],
    "LoRA": ["--lora_rank", "16", "--learning_rate", "2.5e-4", "--projection_lr_multiplier", "4"],
    "10 layers": ["--text_model_name_or_path", "{layers}"],
    "caption weight 1": ["--caption_loss_weight", "1"],
    "caption weight 8": ["--caption_loss_weight", "8"],
    "batch 64": ["--per_device_train_batch_size", "64", "--learning_rate", "2e-4"],
    "float32": ["--bf16", "false"],
}
# The columns of the table, and the figures in each.
COLUMNS = {
    "text to image R@1 / 5 / 10": [f"text_to_image_R@{k}" for k in (1, 5, 10)],
    "image to text R@1 / 5 / 10": [f"image_to_text_R@{k}" for k in (1, 5, 10)],
    "CIDEr-D": ["caption_cider"],
    "L_Gen": ["caption_loss"],
    "pairs": ["pairs"],
    "share of the peak": ["share_of_peak"],
}
METRICS = {*(name for names in COLUMNS.values() for name in names), "caption_distinct"}
# What the figures begin with that say nothing of a run with one objective.
UNTRAINED = {"contrastive": ("caption_",), "caption": ("text_to_image_", "image_to_text_")}
FEATURE_OPTIONS = ("--image_pooling", "--image_grid_size", "--vision_model_name_or_path")
CALIBRATION_STEPS = 40
KEPT_LAYERS = 10


def train(options: list[str], folder: Path, steps: int, seed: int, judged: list[str]) -> dict[str, float]:
    """Runs train.py; its metrics, and the speed that it logged."""
    command = [sys.executable, "train.py", *options, "--output_dir", str(folder), "--max_steps", str(steps)]
    fixed = {"seed": seed, "disable_tqdm": "true", "logging_steps": 8, "eval_strategy": "no"}
    if not torch.cuda.is_available():
        fixed["attn_implementation"] = "eager"  # on CPUs faster than the fused one, for rows this short
    command += [part for name, value in fixed.items() for part in (f"--{name}", str(value))] + judged
    run = subprocess.run(command, capture_output=True, text=True)
    folder.parent.joinpath(f"{folder.name}.log").write_text(run.stdout + run.stderr)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
    speeds = [float(speed) for speed in re.findall(r"'samples_per_second': '?([\d.]+)", run.stdout)]
    (seconds,) = re.findall(r"'train_runtime': '?([\d.]+)", run.stdout)
    results, record = (json.loads((folder / name).read_text()) for name in ("results.json", "training.json"))
    pairs_per_minute = 60 * statistics.median(speeds[1:])  # the first steps are slower
    return {
        **{name: value for name, value in results["metrics"].items() if name in METRICS},
        "minutes": float(seconds) / 60,
        "pairs": record["examples"],
        "steps_per_minute": pairs_per_minute / record["batch_size"],
    }


def operations(options: list[str], folder: Path, caption_tokens: int) -> tuple[float, float]:
    """TFLOP of a step by the dry run, and the TFLOP/s that this machine reaches in a product of matrices."""
    dry = ["--dry_run", "--dry_run_caption_tokens", str(caption_tokens), "--output_dir", str(folder)]
    command = [sys.executable, "train.py", *options, *dry]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"([\d.,]+) TFLOP per step .* of ([\d.,]+) TFLOP/s", text)
    step, peak = (float(number.replace(",", "")) for number in found)
    return step, peak


def steps_for(minutes: float, options: list[str], folder: Path) -> int:
    """As many steps as fit into the minutes; the features are cached on the way."""
    few = ["--max_eval_samples", "8", "--caption_samples", "0"]
    speed = train(options, folder, CALIBRATION_STEPS, 0, few)
    shutil.rmtree(folder)
    return max(1, round(minutes * speed["steps_per_minute"]))


def prepare(options: argparse.Namespace) -> dict[str, Path]:
    """Folders of towers that nobody trained, and of a shorter language model."""
    vision, text, folder = options.vision, options.text, options.work_dir
    made = {name: folder / name for name in ("random", "layers", "clip_text")}
    if made["clip_text"].exists():  # the last to be made
        return made
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.from_pretrained(vision)).save_pretrained(made["random"] / "vision")
    AutoImageProcessor.from_pretrained(vision, backend="pil").save_pretrained(made["random"] / "vision")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(text)).save_pretrained(made["random"] / "text")
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.save_pretrained(made["random"] / "text")
    shorter = AutoModelForCausalLM.from_pretrained(text)
    shorter.model.layers = shorter.model.layers[:KEPT_LAYERS]
    shorter.config.num_hidden_layers = KEPT_LAYERS
    shorter.save_pretrained(made["layers"])
    tokenizer.save_pretrained(made["layers"])
    table = datasets.load_dataset("parquet", data_files=options.train_file, split="train")
    own = train_tokenizer((caption for value in table["captions"] for caption in as_captions(value)), 4096)
    # CLIP's text tower is a GPT-2.
    ids = {"vocab_size": len(own), "bos_token_id": own.bos_token_id, "eos_token_id": own.eos_token_id}
    sizes = {"n_embd": 512, "n_layer": 12, "n_head": 8, "n_positions": 77}
    no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(**sizes, **no_dropout, activation_function="quick_gelu", **ids)
    GPT2LMHeadModel(config).save_pretrained(made["clip_text"])
    own.save_pretrained(made["clip_text"])
    return made


def measure(name: str, seed: int, options: argparse.Namespace, steps: int | None) -> dict[str, Any]:
    """Metrics of one run, of as many steps as fit into the minutes by default; from its file if it was done before."""
    budget = f"{options.steps} steps" if options.steps else f"{options.minutes:g} minutes"
    stem = f"{name} {budget} {seed}"
    file, work = options.output_dir / f"{stem}.json", options.work_dir / stem
    if file.exists():
        return json.loads(file.read_text())
    run_options = ["--train_file", options.train_file, "--validation_file", options.validation_file]
    extra = [part.format(**options.folders) for part in RUNS[name]]
    if extra != SCRATCH:
        # Runs share the features of the same tower, pooling and k.
        own = {part: value for part, value in pairwise([*RECIPE, *extra]) if part in FEATURE_OPTIONS}
        folder = " ".join(["features", *(Path(value).name for value in own.values())])
        run_options += [*RECIPE, "--feature_cache_dir", str(options.work_dir / folder)]
        towers = {"vision": options.vision, "text": options.text}
        run_options += [part for kind, path in towers.items() for part in (f"--{kind}_model_name_or_path", path)]
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not has_bfloat16_instructions():
        run_options += ["--bf16", "false"]
    run_options += extra
    steps = steps or steps_for(options.minutes, run_options, work)
    found = {**train(run_options, work, steps, seed, []), "steps": steps}
    step, peak = operations(run_options, work, options.caption_tokens)
    found["tflop_per_step"] = step
    if options.steps:  # runs may share the machine: their speeds say nothing
        del found["minutes"], found["steps_per_minute"]
    else:
        found |= {"peak_tflops": peak, "share_of_peak": round(found["steps_per_minute"] / 60 * step / peak, 3)}
    card = torch.cuda.get_device_name() if has_gpu else "CPU"
    result = {"run": name, "seed": seed, "budget": budget, "card": card, **found}
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results/pretrained_flickr8k"))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/pretrained_flickr8k"))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--steps", type=int, help="Instead of minutes.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", default=["mmgem"], choices=RUNS)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    options.folders = prepare(options)
    texts = datasets.load_dataset("parquet", data_files=options.train_file, split="train[:1000]")["captions"]
    tokenizer = AutoTokenizer.from_pretrained(options.text)
    lengths = [len(ids) for captions in texts for ids in tokenizer(as_captions(captions))["input_ids"]]
    options.caption_tokens = round(statistics.mean(lengths)) + 1  # with [EMB]
    results = {name: [] for name in options.runs}
    for seed in options.seeds:
        for name in options.runs:
            if seed == options.seeds[0] or name == "mmgem":  # baselines and factors have one seed
                steps = results[name][0]["steps"] if results[name] else options.steps  # all seeds take the same
                results[name].append(measure(name, seed, options, steps))
    print("\n".join(table(results)))
    ours = results.get("mmgem", [])
    goals = {"text_to_image_R@10": 0.36, "caption_cider": 0.33}
    for column, goal in goals.items():
        if ours:
            value = statistics.mean(run[column] for run in ours)
            print_result(f"pretrained_flickr8k_{column}", round(value, 3), "share or points", f">= {goal}", "none")


def table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of Markdown: the means of every run's seeds, ± their standard deviation; without what it did not train."""
    cells = []
    for name, runs in results.items():
        untrained = next((starts for objective, starts in UNTRAINED.items() if objective in RUNS[name]), ())
        trained = [{figure: v for figure, v in run.items() if not figure.startswith(untrained)} for run in runs]
        cells.append([name, *(" / ".join(_mean(trained, figure) for figure in of) for of in COLUMNS.values())])
    header = ["run", *COLUMNS]
    known = [i for i in range(len(header)) if any(set(row[i]) - set("– /") for row in cells)]
    lines = [header, ["---"] * len(header), *cells]
    return [f"| {' | '.join(line[i] for i in known)} |" for line in lines]


def _mean(runs: list[dict[str, Any]], figure: str) -> str:
    values = [run[figure] for run in runs if figure in run]
    if not values:
        return "–"
    mean = statistics.mean(values)
    if mean >= 100:
        return f"{mean:,.0f}"
    return f"{mean:.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
