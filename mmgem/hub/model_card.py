"""The model card: README.md of a Hub folder, filled from the model, its training.json and its results.json."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData

from ..evaluation.report import table
from ..modeling_mmgem import MMGEMModel
from . import card_examples as examples


TAGS = [
    *("mm-gem", "multimodal", "image-text-retrieval", "zero-shot-image-classification", "image-captioning"),
    *("image-feature-extraction", "sentence-transformers", "feature-extraction", "sentence-similarity"),
]
# What a metric measures, by the beginning of its name: Hub task and heading.
TASKS = {
    "caption_": ("image-to-text", "Captions"),
    "draws_": ("image-to-text", "Captions"),
    "classification_": ("zero-shot-image-classification", "Zero-shot classification"),
    "long_text_": ("image-text-retrieval", "Long texts"),
    "region_caption": ("region-captioning", "Region captions"),
    "dense_": ("region-captioning", "Region captions"),
    "region_": ("region-retrieval", "Region retrieval"),
    "phrase_": ("region-retrieval", "Region retrieval"),
    "pointing_": ("region-retrieval", "Region retrieval"),
    "": ("image-text-retrieval", "Retrieval"),
}
EXPLANATIONS = {
    "retrieval.png": "Sentences and the five pictures nearest to each; green is the right one.",
    "captions.png": "Pictures with a reference (grey) and the caption written by the model (black).",
    "regions.png": "Regions with a reference (grey), the caption of stage 1 and that of the adapter (green: as the "
    "reference).",
    "heat_maps.png": "A phrase and its box; where stage 1 sees what it says, and where the adapter does.",
}
CITATION = """\
@article{ma2024multimodal,
  title   = {Multi-Modal Generative Embedding Model},
  author  = {Feipeng Ma and Hongwei Xue and Guangting Wang and Yizhou Zhou and Fengyun Rao and Shilin Yan and
             Yueyi Zhang and Siying Wu and Mike Zheng Shou and Xiaoyan Sun},
  journal = {arXiv preprint arXiv:2405.19333},
  year    = {2024}
}"""


@dataclass
class CardOptions:
    """What a model card cannot know by itself."""

    license: str | None = field(
        default=None,
        metadata={
            "help": "Of the weights, as the Hub names licenses. By default that of the code, apache-2.0, where "
            "training.json says that they were trained from scratch; otherwise none."
        },
    )
    language: list[str] = field(default_factory=list, metadata={"help": "Of the captions, such as en."})
    limits: str = field(default="", metadata={"help": "What users of this very model should know of its limits."})
    model_card: str | None = field(
        default=None, metadata={"help": "A card of your own (a Markdown file) instead of the one that fills itself."}
    )


def model_card(
    repo_id: str,
    model: MMGEMModel,
    max_length: int,
    sources: dict[str, Path],
    pictures: list[str],
    options: CardOptions,
) -> str:
    """
    The card's text, metadata first.

    Args:
        max_length: tokens at which the processor cuts a text.
        sources: folders with results.json and training.json: of the model (""), and of its adapters by kind.
        pictures: names of the files in `images/`.

    Raises:
        ValueError: for a results.json or training.json that is none.
    """
    results = {kind: read_json(folder / "results.json") for kind, folder in sources.items()}
    records = {kind: read_json(folder / "training.json") for kind, folder in sources.items()}
    _check(results, records, sources)
    sections = [
        _introduction(repo_id, model),
        _use(repo_id, list(sources)),
        _architecture(model, max_length),
        _training(records),
        _evaluation(results, pictures),
        _limits(records, max_length, options),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    metadata = _metadata(repo_id, results, records, options)
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """
    A JSON object, or an empty one where there is no file.

    Raises:
        ValueError: for a file that holds none.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return content


def _check(results: dict[str, Any], records: dict[str, Any], sources: dict[str, Path]) -> None:
    """What a card is made of must be as `train.py` and the evaluation write it."""
    for kind, folder in sources.items():
        found, record = results[kind], records[kind]
        metrics = found.get("metrics", {})
        if not isinstance(metrics, dict) or not all(_is_number(value) for value in metrics.values()):
            raise ValueError(f"{folder / 'results.json'}: metrics must be numbers by name; evaluate once more.")
        if not isinstance(found.get("setting", {}), dict):
            raise ValueError(f"{folder / 'results.json'}: setting must be an object; evaluate once more.")
        try:
            _training({kind: record})
            [*record.get("base_models", []), *record.get("dataset_ids", [])]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{folder / 'training.json'} is not as train.py writes it ({error!r}); delete it to go without."
            ) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _metadata(repo_id: str, results: dict[str, Any], records: dict[str, Any], options: CardOptions) -> ModelCardData:
    def unique(name: str) -> list[str] | None:
        return list(dict.fromkeys(i for record in records.values() for i in record.get(name, []))) or None

    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license=options.license or ("apache-2.0" if records[""].get("from_scratch") else None),
        language=options.language or None,
        base_model=unique("base_models"),
        datasets=unique("dataset_ids"),
        tags=TAGS,
        model_name=repo_id.rpartition("/")[2],
        eval_results=[result for found in results.values() for result in _eval_results(found)] or None,
    )


def _eval_results(results: dict[str, Any]) -> Iterator[EvalResult]:
    setting = results.get("setting", {})
    for metric, value in results.get("metrics", {}).items():
        task, heading = _task(metric)
        of_suite = "classification_suite" in setting and metric.startswith("classification_")
        name = "a suite of data sets" if of_suite else _dataset_name(setting)
        hub_id = None if of_suite else setting.get("dataset_id")
        yield EvalResult(
            task_type=task,
            task_name=heading,
            dataset_type=hub_id or "unknown",
            dataset_name=name,
            dataset_split=setting.get("split"),
            metric_type=metric,
            metric_name=metric,
            metric_value=round(value, 6),
        )


def _task(metric: str) -> tuple[str, str]:
    metric = metric.removeprefix("stage_1_")
    return next(task for beginning, task in TASKS.items() if metric.startswith(beginning))


def _dataset_name(setting: dict[str, Any]) -> str:
    """Its id, or names of files without the folders that they lie in on somebody's machine."""
    dataset = setting.get("dataset_id") or setting.get("dataset") or "unknown"
    files = [dataset] if isinstance(dataset, str) else list(dataset)
    return ", ".join(files if setting.get("dataset_id") else [Path(file).name for file in files])


def _introduction(repo_id: str, model: MMGEMModel) -> str:
    dim = model.config.projection_dim
    return f"""# {repo_id.rpartition("/")[2]}

An MM-GEM, a [Multi-Modal Generative Embedding Model](https://arxiv.org/abs/2405.19333): one vision encoder and **one
language model that embeds and writes**. The same weights turn a sentence into a vector of {dim} numbers that lies near
those of the pictures it fits, and write captions from a picture's vector. Trained and exported with `mmgem`, an open
implementation; the paper's authors published neither code nor weights, and this is not their model."""


def _use(repo_id: str, sources: list[str]) -> str:
    parts = [
        ("", f"```bash\n{examples.INSTALL}\n```"),
        ("Search: texts and pictures in one space", examples.EMBED),
        ("Captions", examples.CAPTION),
        ("Captions of regions", examples.REGION_CAPTION if "region-caption" in sources else ""),
        ("Search for regions", examples.REGION_RETRIEVAL if "region-retrieval" in sources else ""),
        ("Pipelines", examples.PIPELINES + ("\n" + examples.REGION_PIPELINE if "region-caption" in sources else "")),
        ("sentence-transformers", examples.SENTENCE_TRANSFORMERS),
    ]
    lines = ["## Use"]
    for heading, code in parts:
        if heading and code:
            lines.append(f"### {heading}\n\n```python\n{code.replace('REPO_ID', repo_id)}```")
        elif code:
            lines.append(code)
    return "\n\n".join(lines)


def _architecture(model: MMGEMModel, max_length: int) -> str:
    config = model.config
    vision, text = config.vision_config, config.text_config

    def size(*modules: Any) -> str:
        return f"{sum(p.numel() for module in modules for p in module.parameters()) / 1e6:.3g} M"

    maps = (model.visual_projection, model.text_projection, model.caption_projection, model.region_projection)
    rows = [
        (
            "vision encoder",
            f"{vision.model_type}, {vision.num_hidden_layers} layers of {vision.hidden_size}, "
            f"{vision.image_size} px in patches of {vision.patch_size}",
            size(model.vision_model),
        ),
        (
            "language model",
            f"{text.model_type}, {text.num_hidden_layers} layers of {text.hidden_size}, "
            f"vocabulary of {text.vocab_size}{', tied head' if config.tie_word_embeddings else ''}",
            size(model.language_model, *([] if config.tie_word_embeddings else [model.lm_head])),
        ),
        ("maps h1 to h4 between them", f"linear, embedding of {config.projection_dim}", size(*maps)),
        ("in all", f"{str(model.dtype).removeprefix('torch.')}", f"{model.num_parameters() / 1e6:.3g} M"),
    ]
    lines = "\n".join(f"| {part} | {what} | {parameters} |" for part, what, parameters in rows)
    return f"""## Architecture

| part | | parameters |
|---|---|---|
{lines}

In front of its caption a picture is one visual token, a region {config.region_grid_size} x {config.region_grid_size}.
Texts are cut at {max_length} tokens (`max_length=` of the processor changes that). tau is \
{1 / model.logit_scale(torch.ones(())).item():.3g}."""


def _training(records: dict[str, Any]) -> str:
    known = {kind or "stage 1": record for kind, record in records.items() if record}
    if not known:
        return "## Training\n\nHow this model was trained is not recorded."
    rows: list[tuple[str, list[str]]] = [
        ("objective", [str(r["objective"]) for r in known.values()]),
        ("data", [", ".join(r["data"]) for r in known.values()]),
        ("steps x batch size", [f"{r['steps']:,} x {r['batch_size']:,}" for r in known.values()]),
    ]
    settings = dict.fromkeys(name for record in known.values() for name in record["settings"])
    rows += [(name, [str(r["settings"].get(name, "")) for r in known.values()]) for name in settings]
    rows += [
        ("hardware", [r["hardware"] for r in known.values()]),
        ("time", [_duration(r) for r in known.values()]),
        ("mmgem, transformers, torch", [", ".join(r["versions"].values()) for r in known.values()]),
    ]
    lines = [f"| | {' | '.join(known)} |", "|---" * (len(known) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(values)} |" for name, values in rows]
    return "## Training\n\n" + "\n".join(lines)


def _duration(record: dict[str, Any]) -> str:
    seconds = record["seconds"]
    time = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    return time + (" since it was resumed" if record["resumed"] else "")


def _evaluation(results: dict[str, Any], pictures: list[str]) -> str:
    parts = ["## Evaluation"]
    for kind, found in results.items():
        if not found.get("metrics"):
            continue
        setting = found.get("setting", {})
        details = [f"{n} `{setting[n]}`" for n in ("split", "size", "prompt", "max_length", "dtype") if n in setting]
        parts.append(f"### {kind or 'Stage 1'}\n\nOn {_dataset_name(setting)}; {', '.join(details)}.")
        parts.append("\n".join(table(found["metrics"])))
    if len(parts) == 1:
        parts.append("This model was not evaluated when it was exported.")
    parts += [f"![{EXPLANATIONS[name]}](images/{name})\n\n*{EXPLANATIONS[name]}*" for name in pictures]
    return "\n\n".join(parts)


def _limits(records: dict[str, Any], max_length: int, options: CardOptions) -> str:
    lines = [
        "- It continues captions; it follows no instructions, and answers no questions.",
        "- One vector stands for a whole picture: small things and their number get lost in it. What a caption says "
        "may be wrong, and is wrong with confidence; do not let it decide about people.",
        "- It knows the kinds of pictures and the language of its training data, and has learned whatever prejudices "
        "these hold; similarity is no measure of truth.",
        f"- Of a text longer than {max_length} tokens the rest is not read, unless you raise `max_length`.",
    ]
    if records[""].get("data") == ["scenes"]:
        lines.append(
            "- It was trained on drawn scenes of coloured shapes and knows nothing else: a model to try things with."
        )
    if options.limits:
        lines.append(f"- {options.limits}")
    return "## Limits and biases\n\n" + "\n".join(lines)
