"""
The paper's claims on scenes, with several seeds each: what joint training costs, what the language model brings to
long texts, what stage 2 brings to regions and to long texts, what a higher resolution brings. Writes
docs/paper-claims.md.

    python benchmarks/paper_claims.py            # three seeds, under 90 minutes on two CPU cores
    python benchmarks/paper_claims.py --quick    # one seed and short runs, 6 minutes: does it all work?

Every run is kept in `--output_dir`; started again, the script goes on with what is missing. Delete the folder when
code or recipes have changed.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_optimizer
import torch
import yaml
from clip_text import CONTEXT_LENGTH, ClipTextSide, LanguageModelSide
from common import print_result, save_for_docs
from paper_claims_page import write_page

from mmgem import MMGEMModel, MMGEMProcessor
from mmgem.data.pairs import PairDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.evaluation.evaluator import evaluate_long_text
from mmgem.evaluation.retrieval import retrieval_metrics
from mmgem.training.building import build_model_and_processor
from mmgem.training.model_arguments import ModelArguments
from mmgem.training.stages import parameter_groups


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
SEEDS = [0, 1, 2]
QUICK_STEPS = 30
TEXT_SIDE_STEPS = 300  # of (b)
CLIP_RATES = {"clip-text": 1.0, "clip-text-half": 0.5, "clip-text-quarter": 0.25}  # times the demo's learning rate
H4_STEPS = 200  # of (d), whose long captions make slow steps
TOWERS = ("vision_config", "text_config", "vocab_size", "projection_dim")
# What the paper has otherwise than the demo: one visual token for a whole image; and the shorter training of all rows.
PAPER = {"image_grid_size": 1, "pack_length": 64, "max_steps": 560, "max_train_samples": 560 * 64}
DEMO_TOKENS = 4  # k of the demo
Metrics = dict[str, float]


class Runs:
    """The runs of all claims, each done once."""

    def __init__(self, folder: Path, quick: bool):
        self.folder = folder
        self.quick = quick
        self.eval_samples = 100 if quick else 500
        asked = folder / "asked.json"
        if asked.exists() and json.loads(asked.read_text()) != {"quick": quick}:
            raise SystemExit(
                f"{folder} holds runs of another kind, with --quick or without; give another --output_dir."
            )
        asked.write_text(json.dumps({"quick": quick}) + "\n")
        self.seconds_file = folder / "seconds.json"
        self.seconds = json.loads(self.seconds_file.read_text()) if self.seconds_file.exists() else {}
        self.scenes = {**yaml.safe_load((CONFIGS / "scenes.yaml").read_text()), **PAPER}
        # To go on from a checkpoint, which has its own towers.
        going_on = {name: value for name, value in self.scenes.items() if name not in (*TOWERS, "image_grid_size")}
        (folder / "going-on.yaml").write_text(yaml.safe_dump(going_on))

    def train(self, name: str, config: Path, **options: Any) -> Metrics:
        """A run of train.py; its metrics."""
        results = self.folder / name / "results.json"
        if not results.exists():
            if self.quick:
                few = {"max_steps": QUICK_STEPS, "max_train_samples": 64 * QUICK_STEPS}
                options = {"warmup_steps": 10, **options, **few}
            options = {"max_eval_samples": self.eval_samples, "eval_strategy": "no", "disable_tqdm": True, **options}
            words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
            command = [sys.executable, "train.py", "--config", str(config), *words]
            log = self.folder / f"{name.replace('/', ' ')}.log"
            with self._timed(name), open(log, "w") as output:
                subprocess.run(
                    [*command, "--output_dir", str(results.parent)], cwd=ROOT, stdout=output, stderr=output, check=True
                )
        return json.loads(results.read_text())["metrics"]

    def commits(self) -> list[str]:
        """Of the code that trained."""
        files = [*self.folder.glob("*/results.json"), *self.folder.glob("*/*/results.json")]
        return sorted({str(json.loads(file.read_text())["setting"]["commit"]) for file in files})

    def compute(self, name: str, function: Callable[[], Metrics]) -> Metrics:
        """What a function gives, kept."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            with self._timed(name):
                metrics = function()
            file.write_text(json.dumps(metrics, indent=2) + "\n")
        return json.loads(file.read_text())

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Adds a run's seconds to those of all runs."""
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)
        self.seconds_file.write_text(json.dumps(self.seconds, indent=2) + "\n")

    def objectives(self, seed: int) -> dict[str, Metrics]:
        """(a) Both losses as the demo weighs them, as the paper does, and each alone: the same examples in order."""
        options: dict[str, dict[str, Any]] = {
            "joint": {"objective": "joint"},
            "joint-tokens": {"objective": "joint", "image_grid_size": DEMO_TOKENS, "pack_length": 80},
            "joint-paper": {"objective": "joint", "caption_loss_weight": 1.0},
            "contrastive": {"objective": "contrastive", "caption_samples": 0},  # what never learned to write need not
            "caption": {"objective": "caption"},
        }
        fixed = {"seed": seed, "caption_samples": 500, **PAPER}
        return {
            name: self.train(f"{name}-{seed}", CONFIGS / "scenes.yaml", **{**fixed, **own})
            for name, own in options.items()
        }

    def regions(self, seed: int) -> Metrics:
        """(c) Both adapters on the joint model."""
        base = {"init_from": str(self.folder / f"joint-{seed}"), "seed": seed}
        found = {}
        for adapter in ("region-caption", "region-retrieval"):
            found.update(self.train(f"joint-{seed}/{adapter}", CONFIGS / f"scenes-{adapter}.yaml", **base))
        return found

    def text_sides(self, seed: int) -> dict[str, Metrics]:
        """
        (b) Contrastive alone on short and long captions: the language model, CLIP's text tower at several learning
        rates, and the language model when it reads no further than that.
        """
        short = {"max_length": CONTEXT_LENGTH}
        sides = {
            "language-model": (LanguageModelSide, {}),
            "language-model-77": (LanguageModelSide, short),
            **{name: (ClipTextSide, {**short, "rate": rate}) for name, rate in CLIP_RATES.items()},
        }
        return {
            name: self.compute(
                f"{name}-{seed}",
                lambda name=name, side=side, options=options: self._text_side(side, name, seed, **options),
            )
            for name, (side, options) in sides.items()
        }

    def _text_side(
        self,
        side_class: Any,
        name: str,
        seed: int,
        max_length: int = 200,
        column: str = "captions",
        rate: float = 1.0,
    ) -> Metrics:
        """Metrics of a text side trained at `rate` times the demo's learning rate; a language model is kept."""
        config = {**self.scenes, "learning_rate": rate * self.scenes["learning_rate"]}
        steps = QUICK_STEPS if self.quick else TEXT_SIDE_STEPS
        scenes = ScenesDataset("train", steps * self.scenes["per_device_train_batch_size"], seed=seed)
        torch.manual_seed(seed)
        towers = ModelArguments(**{key: self.scenes[key] for key in TOWERS})
        words = PairDataset(scenes, caption_column="captions")  # the tokenizer knows those of long captions too
        model, processor = build_model_and_processor(towers, words, max_length)
        side = side_class(model, processor)
        train_contrastive(side, PairDataset(scenes, caption_column=column, seed=seed), steps, config, seed)
        if side_class is LanguageModelSide:
            model.save_pretrained(self.folder / f"{name}-{seed}")
            processor.save_pretrained(self.folder / f"{name}-{seed}")
        test = ScenesDataset("test", self.eval_samples)
        images = side.embed_images([test[i]["image"] for i in range(len(test))])
        metrics = {"parameters": float(side.text_parameters())}
        for texts in ("caption", "long_caption"):
            for length in (length for length in side.lengths if length <= max_length):
                ranks = retrieval_metrics(side.embed_texts(test[texts], length), images, torch.arange(len(test)))
                metrics.update({f"{texts}_{length}_{key}": value for key, value in ranks.items()})
        return metrics

    def long_text_through_h4(self, seed: int) -> dict[str, Metrics]:
        """
        (d) h4 on regions and whole images with their captions, beside the language model of (b), which has seen long
        captions, and beside one that has seen short ones alone; there also without long ones in stage 2. To tell what
        pulls h4 where, it is also trained on regions alone, and on whole images alone.
        """
        self.text_sides(seed)
        short = f"short-captions-{seed}"
        self.compute(short, lambda: self._text_side(LanguageModelSide, "short-captions", seed, column="caption"))
        found = {}
        for name, stage_1, change in (
            ("language-model", "language-model", {}),
            ("regions-alone", "language-model", {"whole_image_weight": 0}),
            ("images-alone", "language-model", {"whole_image_weight": 1, "max_regions": 1}),
            ("short-captions", "short-captions", {}),
            ("short-captions-twice", "short-captions", {"caption_column": "caption"}),
        ):
            base = self.folder / f"{stage_1}-{seed}"
            options = {"init_from": str(base), "seed": seed, "caption_column": "captions", "max_length": 200}
            adapter = f"{base.name}/h4-{name}"
            config = CONFIGS / "scenes-region-retrieval.yaml"
            self.train(adapter, config, **{**options, "max_steps": H4_STEPS, **change})
            found[name] = self.compute(
                f"long-text-{name}-{seed}",
                lambda base=base, adapter=adapter: self._long_text(base, self.folder / adapter),
            )
        return found

    def _long_text(self, base: Path, adapter: Path) -> Metrics:
        data = PairDataset(ScenesDataset("test", self.eval_samples), caption_column="long_caption")
        model, processor = MMGEMModel.from_pretrained(base).eval(), MMGEMProcessor.from_pretrained(base)
        before, _ = evaluate_long_text(model, processor, data, whole_image_box=True)
        model.load_adapter(str(adapter))
        after, _ = evaluate_long_text(model, processor, data, whole_image_box=True)
        return {**{f"stage_1_{key}": value for key, value in before.items()}, **after}

    def resolutions(self, seed: int) -> dict[str, Metrics]:
        """(e) The joint model trained on, on new scenes, at its own resolution, at half and at one and a half."""
        options = {
            "init_from": str(self.folder / f"joint-{seed}"),
            "seed": seed + 100,
            "max_train_samples": 6400,
            "max_steps": 100,
            "learning_rate": 2e-3,
            "warmup_steps": 15,
        }
        config = self.folder / "going-on.yaml"
        return {str(side): self.train(f"{side}px-{seed}", config, image_size=side, **options) for side in (32, 64, 96)}


def train_contrastive(side: Any, data: PairDataset, steps: int, config: dict[str, Any], seed: int) -> None:
    """As `configs/scenes.yaml` trains, the contrastive loss alone."""
    groups = parameter_groups(side.trained(), config["learning_rate"], 1.0, config["weight_decay"])
    options = {"precondition_frequency": 5, "max_precondition_dim": 256}
    betas = (config["adam_beta1"], config["adam_beta2"])
    optimizer = pytorch_optimizer.SOAP(groups, lr=config["learning_rate"], betas=betas, **options)
    warmup = config["warmup_steps"] if steps > 100 else 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(step - warmup, 0) / (steps - warmup)))
        ),
    )
    generator = torch.Generator().manual_seed(seed)
    loader = torch.utils.data.DataLoader(
        data, config["per_device_train_batch_size"], True, drop_last=True, collate_fn=side.collate, generator=generator
    )
    for step, batch in zip(range(steps), loader):
        loss = side.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(side.trained().parameters(), config["max_grad_norm"])
        optimizer.step()
        schedule.step()
        side.clamp()
        if step % 100 == 0:
            print(f"  step {step}, loss {loss.item():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output_dir", type=Path, default=None)
    parser.add_argument("--page", type=Path, default=None, help="docs/paper-claims.md; beside the runs with --quick")
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    options = parser.parse_args()
    folder = options.output_dir or Path("outputs/paper-claims-quick" if options.quick else "outputs/paper-claims")
    folder.mkdir(parents=True, exist_ok=True)
    seeds = options.seeds or ([0] if options.quick else SEEDS)
    runs = Runs(folder.resolve(), options.quick)
    found: dict[str, list[Any]] = {}
    for seed in seeds:
        for claim in ("objectives", "regions", "text_sides", "long_text_through_h4", "resolutions"):
            found.setdefault(claim, []).append(getattr(runs, claim)(seed))
    page = options.page or (folder / "paper-claims.md" if options.quick else ROOT / "docs" / "paper-claims.md")
    setting = {"samples": runs.eval_samples, "weight": runs.scenes["caption_loss_weight"], "commits": runs.commits()}
    write_page(page, found, seeds, setting, has_notes=not options.quick and seeds == SEEDS)
    images = page.parent / "images"
    images.mkdir(exist_ok=True)
    for name in ("region-caption/regions.png", "region-retrieval/heat_maps.png", "captions.png"):
        target = images / f"paper-claims-{Path(name).name.replace('_', '-')}"
        save_for_docs(folder / f"joint-{seeds[0]}" / name, target)
    gain = statistics.mean(
        run["joint"]["text_to_image_R@1"] - run["contrastive"]["text_to_image_R@1"] for run in found["objectives"]
    )
    print(f"{sum(runs.seconds.values()) / 60:.0f} minutes in all runs. {os.path.relpath(page)}")
    print_result(
        "paper_claims", round(gain, 3), "of R@1, joint minus contrastive alone", ">= 0", "itself, without L_Gen"
    )


if __name__ == "__main__":
    main()
