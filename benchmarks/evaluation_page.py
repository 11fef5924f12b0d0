"""
Evaluates the demo's model with every task, by one process and by two, and puts figures and images into
docs/evaluation.md, and an overview into docs/images.

    make demo && python benchmarks/evaluation_page.py
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from common import save_for_docs
from PIL import Image, ImageDraw, ImageFont


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "evaluation.md"
START, END = "<!-- figures: benchmarks/evaluation_page.py -->", "<!-- end of figures -->"

# Heading, sheet, and the part of it that is shown: the first rows, whatever the model made of them.
STRIPS = (
    ("A sentence finds images (green: its own)", "retrieval.png", (0, 0, 1130, 182)),
    ("An image gets a caption (grey: a reference, black: the model's)", "captions.png", (0, 0, 960, 286)),
    (
        "A region gets a caption (grey: a reference, black: stage 1, green: the adapter is right)",
        "regions.png",
        (0, 0, 976, 182),
    ),
    ("A phrase finds its region (blue: least similar, yellow: most)", "heat_maps.png", (0, 0, 1088, 196)),
)


def evaluate(model: Path, folder: Path, processes: int) -> dict[str, float]:
    """The metrics of the command line."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone", "-m"]
    command = [sys.executable, *(launch if processes > 1 else ["-m"]), "mmgem.evaluation", "--model", str(model)]
    command += ["--tasks", "retrieval,classification,captioning,long_text,regions", "--dataset_name", "scenes"]
    command += ["--adapters", str(model / "region-caption"), str(model / "region-retrieval"), "--draws", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1))}
    subprocess.run([*command, "--output_dir", str(folder)], check=True, cwd=ROOT, env=environment)
    return json.loads((folder / "results.json").read_text())["metrics"]


def overview(folder: Path) -> Image.Image:
    """The first rows of every sheet, one below the other."""
    width, heading = 1130, 34
    sheet = Image.new("RGB", (width, sum(bottom + heading for _, _, (*_, bottom) in STRIPS)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for text, name, part in STRIPS:
        draw.text((8, top + 10), text, fill="black", font=ImageFont.load_default(size=16))
        sheet.paste(Image.open(folder / name).crop(part), (0, top + heading))
        top += heading + part[3]
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("outputs/scenes"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/evaluation"))
    options = parser.parse_args()
    alone = evaluate(options.model, options.output_dir, 1)
    together = evaluate(options.model, options.output_dir.with_name(f"{options.output_dir.name}-2"), 2)
    exact = [name for name in alone if "R@" in name or "top" in name]
    furthest = max(alone, key=lambda name: abs(alone[name] - together[name]))
    lines = [
        START,
        "",
        f"One process and two: all {len(exact)} recalls and accuracies are "
        f"{'equal to the last digit' if all(alone[n] == together[n] for n in exact) else 'NOT equal'}; of the other "
        f"figures {furthest} differs most, by {abs(alone[furthest] - together[furthest]):.1e}.",
        "",
    ]
    report = (options.output_dir / "report.md").read_text()
    sections = report[report.index("## ") : report.index("## Setting")]
    for image in re.findall(r"!\[\]\((.+?)\)", sections):
        name = f"evaluation-{image.replace('_', '-')}"
        save_for_docs(options.output_dir / image, PAGE.parent / "images" / name)
        sections = sections.replace(f"![]({image})", f"![](images/{name})")
    overview(options.output_dir).save(options.output_dir / "overview.png")
    save_for_docs(options.output_dir / "overview.png", PAGE.parent / "images" / "overview.png")
    lines += [re.sub(r"^#", "##", sections, flags=re.MULTILINE).rstrip(), "", END]
    page = PAGE.read_text()
    before, after = page[: page.index(START)], page[page.index(END) + len(END) :]
    PAGE.write_text(before + "\n".join(lines) + after)
    print(f"{PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
