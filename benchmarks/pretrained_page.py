"""
Puts the tables of pretrained_flickr8k.py into docs/pretrained.md, and images of what its first run can do into
docs/images: captions of photographs, searches, and captions of regions after stage 2 on a few images of COCO.

    python benchmarks/pretrained_page.py --model "outputs/pretrained_flickr8k/mmgem 20 minutes 0" \
        --validation_file validation.parquet --coco COCO_FOLDER

`COCO_FOLDER` holds `images` and `annotations/instances_sample.json`; the last quarter of its images is held out.
Without `--model`, only the tables are written.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import save_for_docs
from pretrained_flickr8k import RUNS, table

from mmgem import MMGEMProcessor
from mmgem.evaluation.arguments import EvaluationArguments
from mmgem.evaluation.data import load_pairs
from mmgem.evaluation.embedding import embed_pairs
from mmgem.evaluation.evaluator import generate_captions
from mmgem.evaluation.report import caption_sheet, retrieval_sheet
from mmgem.loading import load_checkpoint


PAGE = Path(__file__).parents[1] / "docs" / "pretrained.md"
START, END = "<!-- figures: benchmarks/pretrained_page.py -->", "<!-- end of figures -->"
CAPTIONS, SEARCHES, BATCH = 24, 6, 50


def sheets(options: argparse.Namespace) -> None:
    """Captions of the first validation images, and searches among all of them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = load_checkpoint(options.model).eval().to(device)
    processor = MMGEMProcessor.from_pretrained(options.model)
    data = EvaluationArguments(model=str(options.model), data_file=options.validation_file, caption_column="captions")
    dataset = load_pairs(data, image_size=0)
    with torch.autocast(device, torch.bfloat16):
        captions = generate_captions(model, processor, dataset, CAPTIONS, BATCH, num_beams=3)
        found = embed_pairs(model, processor, dataset, BATCH)
    caption_sheet(dataset, captions, CAPTIONS).save(options.work_dir / "captions.png")
    retrieval_sheet(dataset, found, SEARCHES).save(options.work_dir / "searches.png")


def regions(options: argparse.Namespace) -> None:
    """Trains h3 and soft prompts on three quarters of COCO's images; the report of the others has the sheet."""
    instances = json.loads((options.coco / "annotations" / "instances_sample.json").read_text())
    count = 3 * len(instances["images"]) // 4
    files = {}
    for name, images in (("train", instances["images"][:count]), ("validation", instances["images"][count:])):
        files[name] = options.work_dir / f"instances_{name}.json"
        files[name].write_text(json.dumps({**instances, "images": images, "annotations": _of(images, instances)}))
    command = [sys.executable, "train.py", "--stage", "region-caption", "--init_from", str(options.model)]
    command += ["--train_annotations", str(files["train"]), "--validation_annotations", str(files["validation"])]
    command += ["--image_folders", str(options.coco / "images"), "--cache_features", "true", "--bf16", "true"]
    command += ["--learning_rate", "2e-3", "--max_steps", "150", "--warmup_steps", "10", "--save_strategy", "no"]
    command += ["--per_device_train_batch_size", "8", "--report_to", "none", "--disable_tqdm", "true"]
    subprocess.run([*command, "--output_dir", str(options.work_dir / "region-caption")], check=True)


def _of(images: list[dict[str, Any]], instances: dict[str, Any]) -> list[dict[str, Any]]:
    ids = {image["id"] for image in images}
    return [annotation for annotation in instances["annotations"] if annotation["image_id"] in ids]


def _order(budget: tuple[str, str, str]) -> tuple[str, float, str]:
    unit, number, card = budget
    return unit, float(number), card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--validation_file")
    parser.add_argument("--coco", type=Path)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/pretrained_flickr8k"))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/pretrained_page"))
    options = parser.parse_args()
    if options.model:
        options.work_dir.mkdir(parents=True, exist_ok=True)
        sheets(options)
        regions(options)
        for name in ("captions.png", "searches.png", "region-caption/regions.png"):
            save_for_docs(options.work_dir / name, PAGE.parent / "images" / f"pretrained-{Path(name).name}")
    found = [json.loads(file.read_text()) for file in sorted(options.results.glob("*.json"))]
    lines = []
    for unit, number, card in sorted({(*reversed(run["budget"].split()), run["card"]) for run in found}, key=_order):
        budget = f"{number} {unit}"
        runs = [run for run in found if (run["budget"], run["card"]) == (budget, card)]
        results = {name: of for name in RUNS if (of := [run for run in runs if run["run"] == name])}
        lines += [f"{budget} of training, {card}:", "", *table(results), ""]
    page = PAGE.read_text()
    before, after = page[: page.index(START) + len(START)], page[page.index(END) :]
    PAGE.write_text("\n\n".join([before, "\n".join(lines).strip(), after]))
    print(PAGE)


if __name__ == "__main__":
    main()
