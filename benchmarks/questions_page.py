"""
Trains the demo's model and the adapter of fused queries with three seeds, asks them every question of
docs/questions.md, and puts figures and images there.

    python benchmarks/questions_page.py

A step that is done is kept in `--work_dir`; started again, the script goes on where it stopped.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from common import save_for_docs


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "questions.md"
START, END = "<!-- figures: benchmarks/questions_page.py {} -->", "<!-- end of figures -->"
DIMS = (16, 32, 64)
ASKED = ("--tasks", "retrieval,captioning,choices", "--dataset_name", "scenes", "--rerank", "50", "--draws", "8")
Figures = dict[str, float]


def run(folder: Path, *command: object) -> Figures:
    """The metrics of a command that writes results.json into `folder`; from the file if it was done before."""
    results = folder / "results.json"
    if not results.exists():
        print(" ".join(map(str, command)), flush=True)
        words = [sys.executable, *map(str, command), "--output_dir", str(folder)]
        subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return json.loads(results.read_text())["metrics"]


def measure(work: Path, seed: int) -> dict[str, Figures]:
    """The metrics of one seed, by what was asked."""
    base, fused, short = (work / f"{name}-{seed}" for name in ("base", "fused", "matryoshka"))
    own = ("--seed", seed, "--disable_tqdm", "true")
    dims = ",".join(map(str, DIMS))
    asked = ("--tasks", "retrieval", "--dataset_name", "scenes", "--matryoshka_dims", dims)
    run(base, "train.py", "--config", "configs/scenes.yaml", *own)
    run(short, "train.py", "--config", "configs/scenes.yaml", *own, "--matryoshka_dims", dims)
    found = {
        "fused": run(fused, "train.py", "--config", "configs/scenes-fused-retrieval.yaml", "--init_from", base, *own),
        "questions": run(work / f"questions-{seed}", "-m", "mmgem.evaluation", "--model", base, *ASKED),
        "plain": run(work / f"plain-{seed}", "-m", "mmgem.evaluation", "--model", base, *asked),
        "matryoshka": run(work / f"short-{seed}", "-m", "mmgem.evaluation", "--model", short, *asked),
    }
    minutes = json.loads((fused / "training.json").read_text())["seconds"] / 60
    return {**found, "fused": {**found["fused"], "minutes": minutes}}


def table(
    heads: tuple[str, ...], rows: dict[str, tuple[Callable[[dict[str, Figures]], float], ...]], seeds: list
) -> str:
    """Markdown: mean and standard deviation over the seeds of each cell."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, cells in rows.items():
        shown = []
        for cell in cells:
            values = [cell(found) for found in seeds]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            shown.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def of(kind: str, name: str) -> Callable[[dict[str, Figures]], float]:
    return lambda found: found[kind][name]


def tables(seeds: list[dict[str, Figures]]) -> dict[str, str]:
    """The tables of the page, by their marks."""
    ks = (1, 5, 10)
    ways = ("cosine", "likelihood", "both")
    searches = {
        name: f"{way}_R@1"
        for name, way in (("text to image R@1", "text_to_image"), ("image to text R@1", "image_to_text"))
    }
    reranked = {name: (of("questions", key), of("questions", f"reranked_{key}")) for name, key in searches.items()}
    reranked["CIDEr-D of the best of 8 drawn captions"] = (
        of("questions", "caption_cider_reranked"),
        of("questions", "caption_cider_reranked_both"),
    )
    lengths = {
        str(dim): tuple(
            of(kind, f"dim_{dim}_text_to_image_R@{k}") for k in (1, 10) for kind in ("plain", "matryoshka")
        )
        for dim in DIMS
    }
    lengths["128"] = tuple(of(kind, f"text_to_image_R@{k}") for k in (1, 10) for kind in ("plain", "matryoshka"))
    return {
        "fused": table(
            ("", *(f"R@{k}" for k in ks)),
            {
                "mean of the two embeddings": tuple(of("fused", f"stage_1_fused_R@{k}") for k in ks),
                "fused": tuple(of("fused", f"fused_R@{k}") for k in ks),
            },
            seeds,
        ),
        "rerank": table(("", "by cosine", "by cosine and likelihood"), reranked, seeds),
        "choices": table(
            ("", *ways),
            {"swapped scenes, right caption": tuple(of("questions", f"choices_{way}") for way in ways)},
            seeds,
        ),
        "matryoshka": table(
            ("length", "R@1, trained at 128", "R@1, matryoshka", "R@10, trained at 128", "R@10, matryoshka"),
            lengths,
            seeds,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "outputs" / "questions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    work = options.work_dir.resolve()
    seeds = [measure(work, seed) for seed in options.seeds]
    file = ROOT / "benchmarks" / "results" / "questions.json"
    file.write_text(json.dumps({str(seed): found for seed, found in zip(options.seeds, seeds)}, indent=2) + "\n")
    text = PAGE.read_text()
    for mark, lines in tables(seeds).items():
        start = START.format(mark)
        before, rest = text.split(start, 1)
        text = f"{before}{start}\n\n{lines}\n\n{END}{rest.split(END, 1)[1]}"
    PAGE.write_text(text)
    first = options.seeds[0]
    for name, image in (
        ("fused", work / f"fused-{first}/fused.png"),
        ("choices", work / f"questions-{first}/choices.png"),
    ):
        save_for_docs(image, ROOT / f"docs/images/questions-{name}.png")


if __name__ == "__main__":
    main()
