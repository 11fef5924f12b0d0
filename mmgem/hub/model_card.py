"""The model card: model_card_template.md, filled from the model, its training.json and its results.json."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data import json_files
from ..evaluation.report import table as metrics_table
from ..modeling_mmgem import MMGEMModel
from ..options import option


TEMPLATE = Path(__file__).with_name("model_card_template.md")
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
    "box_": ("zero-shot-image-classification", "Box classification"),
    "fused_": ("image-text-retrieval", "Fused retrieval"),
    "choices_": ("image-text-retrieval", "Choices"),
    "pope_": ("visual-question-answering", "Questions"),
    "": ("image-text-retrieval", "Retrieval"),
}
EXPLANATIONS = {
    "retrieval.png": "Sentences and the five images nearest to each; green is the right one.",
    "captions.png": "Images with a reference (grey) and the caption written by the model (black).",
    "regions.png": "Regions with a reference (grey), the caption of stage 1 and that of the adapter (green: as the "
    "reference).",
    "fused.png": "Queries of a text and an image, and the five candidates nearest to each; green is the target.",
    "heat_maps.png": "A phrase and its box; where stage 1 sees what it says, and where the adapter does.",
}


@dataclass
class CardOptions:
    """What a model card cannot know by itself."""

    license: str | None = option(
        None,
        "License of the weights, as the Hub names it. By default that of the code, apache-2.0, if training.json says "
        "that they were trained from scratch; otherwise none.",
    )
    language: list[str] = option([], "Languages of the captions, such as en.")
    limits: str = option("", "What users of this very model should know of its limits.")
    images: bool = option(
        False, "Put the evaluation's sheets of your images into the folder too; those of drawn scenes always are."
    )
    model_card: str | None = option(None, "A card of your own (a Markdown file) instead of the one that fills itself.")


def model_card(
    repo_id: str,
    model: MMGEMModel,
    max_length: int,
    sources: dict[str, Path],
    images: list[str],
    options: CardOptions,
) -> str:
    """
    The card's text, metadata first.

    Args:
        max_length: tokens to which the processor truncates a text.
        sources: folders with results.json and training.json: the model's (""), and those of its adapters by kind.
        images: names of the files in `images/`.

    Raises:
        ValueError: for a results.json or training.json that train.py did not write.
    """
    results = {kind: read_json(folder / "results.json") for kind, folder in sources.items()}
    records = {kind: read_json(folder / "training.json") for kind, folder in sources.items()}
    _check(results, records, sources)
    card = ModelCard.from_template(
        _metadata(repo_id, results, records, options),
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        name=repo_id.rpartition("/")[2],
        config=model.config,
        tau=f"{1 / model.logit_scale.scale.item():.3g}",
        max_length=max_length,
        visual_tokens="one visual token" if (k := model.config.image_grid_size) == 1 else f"{k} x {k} visual tokens",
        adapters=list(sources),
        architecture=_architecture(model),
        training=_training(records),
        evaluations=list(_evaluations(results)),
        images=[(name, EXPLANATIONS[name]) for name in images],
        is_of_scenes=records[""].get("data") == ["scenes"],
        limits=options.limits,
    )
    return str(card)


def read_json(path: Path) -> dict[str, Any]:
    """
    The JSON object in a file, or an empty one if there is no file.

    Raises:
        ValueError: for a file that holds no JSON object.
    """
    content = json_files.read_json(str(path)) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return content


def _check(results: dict[str, Any], records: dict[str, Any], sources: dict[str, Path]) -> None:
    """Raises ValueError if a results.json or training.json is not as `train.py` and the evaluation write it."""
    for kind, folder in sources.items():
        found, record = results[kind], records[kind]
        metrics = found.get("metrics", {})
        values = metrics.values() if isinstance(metrics, dict) else [metrics]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise ValueError(f"{folder / 'results.json'}: metrics must be numbers by name; evaluate once more.")
        if not isinstance(found.get("setting", {}), dict):
            raise ValueError(f"{folder / 'results.json'}: setting must be an object; evaluate once more.")
        try:
            _training({kind: record})
            [*record.get("base_models", []), *record.get("dataset_ids", [])]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"is not as train.py writes it ({error!r}); delete it to go without"
            raise ValueError(f"{folder / 'training.json'} {reason}.") from error


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
        beginning = next(beginning for beginning in TASKS if metric.removeprefix("stage_1_").startswith(beginning))
        task, heading = TASKS[beginning]
        of_suite = "classification_suite" in setting and metric.startswith("classification_")
        yield EvalResult(
            task_type=task,
            task_name=heading,
            dataset_type=(None if of_suite else setting.get("dataset_id")) or "unknown",
            dataset_name="a suite of data sets" if of_suite else _dataset_name(setting),
            dataset_split=setting.get("split"),
            metric_type=metric,
            metric_name=metric,
            metric_value=round(value, 6),
        )


def _dataset_name(setting: dict[str, Any]) -> str:
    """Its id, or names of files without the folders that they lie in on somebody's machine."""
    dataset = setting.get("dataset_id") or setting.get("dataset") or "unknown"
    files = [dataset] if isinstance(dataset, str) else list(dataset)
    return ", ".join(files if setting.get("dataset_id") else [Path(file).name for file in files])


def _architecture(model: MMGEMModel) -> list[tuple[str, str, str]]:
    """Rows of part, description and size."""
    config = model.config
    vision, text = config.vision_config, config.text_config

    def size(*modules: Any) -> str:
        return f"{sum(p.numel() for module in modules for p in module.parameters()) / 1e6:.3g} M"

    encoder, decoder = (f"{c.model_type}, {c.num_hidden_layers} layers of {c.hidden_size}" for c in (vision, text))
    pixels = f"{vision.image_size} px in patches of {vision.patch_size}"
    words = f"vocabulary of {text.vocab_size}{', tied head' if config.tie_word_embeddings else ''}"
    head = [] if config.tie_word_embeddings else [model.lm_head]
    maps = (model.visual_projection, model.text_projection, model.caption_projection, model.region_projection)
    return [
        ("vision encoder", f"{encoder}, {pixels}", size(model.vision_model)),
        ("language model", f"{decoder}, {words}", size(model.language_model, *head)),
        ("maps h1 to h4 between them", f"linear, embedding of {config.projection_dim}", size(*maps)),
        ("in all", f"{str(model.dtype).removeprefix('torch.')}", f"{model.num_parameters() / 1e6:.3g} M"),
    ]


def _training(records: dict[str, Any]) -> list[list[str]]:
    """Rows of a name and its value in each stage, the stages' names first; none if nothing is recorded."""
    known = {kind or "stage 1": record for kind, record in records.items() if record}
    if not known:
        return []
    stages = list(known.values())
    settings = dict.fromkeys(name for record in stages for name in record["settings"])
    rows: list[tuple[str, list[Any]]] = [
        ("objective", [record["objective"] for record in stages]),
        ("data", [", ".join(record["data"]) for record in stages]),
        ("steps x batch size", [f"{record['steps']:,} x {record['batch_size']:,}" for record in stages]),
        *((name, [record["settings"].get(name, "") for record in stages]) for name in settings),
        ("hardware", [record["hardware"] for record in stages]),
        ("time", [_duration(record) for record in stages]),
        ("mmgem, transformers, torch", [", ".join(record["versions"].values()) for record in stages]),
    ]
    return [list(known), *([name, *map(str, values)] for name, values in rows)]


def _duration(record: dict[str, Any]) -> str:
    seconds = record["seconds"]
    time = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    return time + (" since it was resumed" if record["resumed"] else "")


def _evaluations(results: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Heading, setting and table of every stage that was evaluated."""
    for kind, found in results.items():
        if found.get("metrics"):
            setting = found.get("setting", {})
            names = [name for name in ("split", "size", "prompt", "max_length", "dtype") if name in setting]
            details = ", ".join(f"{name} `{setting[name]}`" for name in names)
            table = "\n".join(metrics_table(found["metrics"]))
            yield kind or "Stage 1", f"On {_dataset_name(setting)}; {details}.", table
