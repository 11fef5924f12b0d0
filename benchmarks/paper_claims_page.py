"""docs/paper-claims.md from the figures of paper_claims.py."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t


Row = tuple[str, Sequence[float]]


def write_page(path: Path, found: dict[str, list[Any]], seeds: Sequence[int], samples: int) -> None:
    """`found`: by claim, what each seed gave."""
    sections = [
        INTRODUCTION.format(seeds=len(seeds), samples=samples),
        _objectives(found["objectives"]),
        _text_sides(found["text_sides"]),
        _regions(found["regions"]),
        _long_text(found["long_text_through_h4"]),
        _resolutions(found["resolutions"]),
    ]
    path.write_text("\n".join(section.strip("\n") + "\n" for section in sections))


INTRODUCTION = """
# The paper's claims, at a size that two cores can run

Written by `python benchmarks/paper_claims.py`. The demo's model (0.8 M parameters) and data (drawn scenes, 64 px);
every row of a table was trained on the same examples for as many steps, with {seeds} seed(s), and judged on {samples}
held-out scenes (except stage 2, which comes on top). Figures are means, ± the standard deviation over seeds. A verdict
looks at the 95 % interval of the difference over seeds (Student's t, so it is wide). A gain holds where the interval
lies above 0, and does not where it lies below. That nothing is lost holds where it lies above a loss of 2 % of the
figure, and does not where it lies below that. Everything else is open at this number of seeds.
"""


def _objectives(runs: list[dict[str, dict[str, float]]]) -> str:
    retrieval = ("text_to_image_R@1", "text_to_image_R@5", "image_to_text_R@1")
    captions = ("caption_cider", "caption_object_f1", "caption_exact", "caption_loss")
    names = {"joint": "joint, L_Emb + L_Gen", "contrastive": "L_Emb alone", "caption": "L_Gen alone"}
    lines = ["| | " + " | ".join((*retrieval, *captions)) + " |", "|---" * (len(retrieval) + len(captions) + 1) + "|"]
    for objective, name in names.items():
        shown = [*(retrieval if objective != "caption" else []), *(captions if objective != "contrastive" else [])]
        cells = [_cell([run[objective][m] for run in runs]) if m in shown else "–" for m in (*retrieval, *captions)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    pairs = [("text_to_image_R@1", "contrastive"), ("image_to_text_R@1", "contrastive")]
    pairs += [("caption_cider", "caption"), ("caption_object_f1", "caption")]
    verdicts = [
        _verdict(
            f"{metric}, joint against {other}",
            [run["joint"][metric] - run[other][metric] for run in runs],
            allowed=0.02 * statistics.mean(run[other][metric] for run in runs),
        )
        for metric, other in pairs
    ]
    return "\n".join(["## (a) Joint training costs neither task anything", "", *lines, "", *verdicts, "", NOTES["a"]])


def _text_sides(runs: list[dict[str, dict[str, float]]]) -> str:
    lm, clip = ([run[name] for run in runs] for name in ("language-model", "clip-text"))
    lines = [
        "| text side | parameters | tokens | short captions R@1 | long captions R@1 | R@5 |",
        "|---|---|---|---|---|---|",
    ]
    for name, of, lengths in (("language model", lm, (50, 77, 200)), ("CLIP's text tower", clip, (77,))):
        for length in lengths:
            keys = [f"caption_{length}_text_to_image_R@1"]
            keys += [f"long_caption_{length}_text_to_image_R@{k}" for k in (1, 5)]
            cells = [_cell([run[key] for run in of]) for key in keys]
            lines.append(f"| {name} | {of[0]['parameters'] / 1e6:.2f} M | {length} | {' | '.join(cells)} |")
    key = "text_to_image_R@1"
    differences = [a[f"long_caption_200_{key}"] - b[f"long_caption_77_{key}"] for a, b in zip(lm, clip)]
    verdict = _verdict("long captions R@1, language model at 200 tokens against CLIP's 77", differences)
    same = [a[f"long_caption_77_{key}"] - b[f"long_caption_77_{key}"] for a, b in zip(lm, clip)]
    length_alone = _verdict("the same with 77 tokens for both", same)
    title = "## (b) Long texts: a language model against a 77-token text tower"
    intro = "Contrastive alone, on short and long captions by turns; both sides see a caption as far as they can read."
    return "\n".join([title, "", intro, "", *lines, "", verdict, length_alone, "", NOTES["b"]])


def _regions(runs: list[dict[str, float]]) -> str:
    metrics = ("region_caption_exact", "region_caption_cider")
    metrics += ("region_to_phrase_R@1", "phrase_to_region_R@1", "pointing_game")
    lines = ["| | stage 1 | stage 2 |", "|---|---|---|"]
    for metric in metrics:
        before, after = ([run[prefix + metric] for run in runs] for prefix in ("stage_1_", ""))
        lines.append(f"| {metric} | {_cell(before)} | {_cell(after)} |")
    chance = _cell([run["pointing_game_chance"] for run in runs])
    verdicts = [
        _verdict(f"{metric}, stage 2 against stage 1", [run[metric] - run[f"stage_1_{metric}"] for run in runs])
        for metric in ("region_caption_exact", "region_to_phrase_R@1")
    ]
    title = "## (c) Stage 2: regions, at no cost to the whole picture"
    pictures = ["![](images/paper-claims-regions.png)", "", "![](images/paper-claims-heat-maps.png)"]
    intro = f"(The pointing game by chance: {chance}. No adapter touches whole pictures without a box: tests.)"
    return "\n".join([title, "", intro, "", *lines, "", *verdicts, "", NOTES["c"], "", *pictures])


def _long_text(runs: list[dict[str, dict[str, float]]]) -> str:
    header = ["| path | R@1 at 50 tokens | R@1 at 200 tokens | R@5 at 200 tokens |", "|---|---|---|---|"]
    bases = {
        "language-model": "Stage 1 has seen short and long captions (the language model of (b)); so does stage 2:",
        "short-captions": "Stage 1 has seen short captions alone, as the paper's; stage 2 sees long ones too:",
        "short-captions-twice": "Stage 1 and stage 2 have seen short captions alone:",
    }
    key = "text_to_image_R@1"
    lines = []
    for base, title in bases.items():
        lines += [title, "", *header]
        of_base = [run[base] for run in runs]
        paths = {"stage 1, the whole picture": ("stage_1_", "")}
        paths["stage 2, the box that covers it, through h4"] = ("", "_whole_box")
        for name, (prefix, path) in paths.items():
            keys = [f"{prefix}long_text_{n}{path}_text_to_image_R@{k}" for n, k in ((50, 1), (200, 1), (200, 5))]
            lines.append(f"| {name} | {' | '.join(_cell([run[k] for run in of_base]) for k in keys)} |")
        gains = [run[f"long_text_200_whole_box_{key}"] - run[f"stage_1_long_text_200_{key}"] for run in of_base]
        lines += ["", _verdict("R@1 at 200 tokens, through h4 after stage 2 against stage 1", gains), ""]
    title = "## (d) Long texts through h4, before and after stage 2"
    intro = (
        "Held-out scenes by their captions of 100 to 200 words. Stage 2 trains h4 on regions, and on whole pictures "
        "with their captions; before it h4 is the identity."
    )
    return "\n".join([title, "", intro, "", *lines, NOTES["d"]])


def _resolutions(runs: list[dict[str, dict[str, float]]]) -> str:
    metrics = ("text_to_image_R@1", "image_to_text_R@1", "caption_cider", "caption_object_f1", "caption_exact")
    lines = [f"| pixels | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for side in ("64", "96"):
        lines.append(f"| {side} | {' | '.join(_cell([run[side][m] for run in runs]) for m in metrics)} |")
    verdicts = [
        _verdict(f"{metric}, 96 px against 64", [run["96"][metric] - run["64"][metric] for run in runs])
        for metric in ("text_to_image_R@1", "caption_cider", "caption_object_f1")
    ]
    title = "## (e) A higher resolution"
    intro = (
        "The joint models of (a) trained on for 100 steps on new scenes, as they are and with 96-pixel pictures "
        "(interpolated position embeddings), as the paper has ViT-L and ViT-L-336."
    )
    return "\n".join([title, "", intro, "", *lines, "", *verdicts, "", NOTES["e"]])


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _verdict(what: str, differences: Sequence[float], allowed: float | None = None) -> str:
    """Whether the gain is above 0, or, with `allowed`, no loss larger than that."""
    count, mean = len(differences), statistics.mean(differences)
    if count == 1:
        return f"- {what}: {mean:+.3f} with one seed. **Open.**"
    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / count**0.5
    floor = 0.0 if allowed is None else -allowed
    verdict = "Holds" if mean - half > floor else "Does not hold" if mean + half < floor else "Open"
    return f"- {what}: {mean:+.3f}, between {mean - half:+.3f} and {mean + half:+.3f}. **{verdict}.**"


# Written after looking at the figures; what could not be found out says so.
NOTES = {"a": "", "b": "", "c": "", "d": "", "e": ""}
