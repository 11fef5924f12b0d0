"""The tasks of the suite: each loads its data, evaluates, and gives a section of the report."""

import os
from dataclasses import replace
from typing import Any

from peft import PeftConfig

from ..modeling_mmgem import MMGEMModel
from ..processing import MMGEMProcessor
from .arguments import EvaluationArguments
from .caption_files import read_caption_references, read_caption_results, score_captions, write_caption_results
from .classification import evaluate_classification
from .data import load_labelled, load_pairs, load_regions
from .embedding import embed_dataset
from .evaluator import evaluate_captions, evaluate_retrieval
from .long_text import evaluate_long_text
from .region_report import evaluate_adapter, region_section
from .regions import evaluate_regions
from .report import Section, caption_sheet, class_sheet, retrieval_sheet, table
from .reranking import evaluate_reranking
from .sharing import process


STAGES = {"caption_projection": "region-caption", "region_projection": "region-retrieval"}


def run_tasks(model: MMGEMModel, processor: MMGEMProcessor, arguments: EvaluationArguments) -> list[Section]:
    """
    A section for each of `arguments.tasks`, with its metrics. Where there are several processes, all must call it;
    each does its part, and gets the whole.

    Raises:
        ValueError, FileNotFoundError: for data that is not there, or not as it should be.
    """
    tasks = {
        "retrieval": retrieval,
        "classification": classification,
        "captioning": captioning,
        "long_text": long_text,
        "regions": regions,
    }
    return [tasks[task](model, processor, arguments) for task in arguments.tasks]


def retrieval(model: MMGEMModel, processor: MMGEMProcessor, arguments: EvaluationArguments) -> Section:
    dataset = load_pairs(arguments, _image_size(model))
    metrics, outputs = evaluate_retrieval(model, processor, dataset, arguments.batch_size)
    readable = dataset.select(outputs["indices"])
    texts = len(outputs["text_embeds"])
    lines = [f"{_counted(readable, dataset)}, {texts} captions.", "", *table(metrics)]
    lines += ["", "The five nearest pictures of each sentence; green is the right one."]
    return Section("Retrieval", metrics, lines, {"retrieval.png": retrieval_sheet(readable, outputs)})


def classification(model: MMGEMModel, processor: MMGEMProcessor, arguments: EvaluationArguments) -> Section:
    metrics: dict[str, float] = {}
    lines, pictures = [], {}
    top1 = []
    for data in load_labelled(arguments, _image_size(model)):
        found, outputs = evaluate_classification(
            model, processor, data.dataset, data.labels, data.class_names, data.templates, arguments.batch_size
        )
        prefix = f"classification_{data.name}_" if data.name else "classification_"
        metrics.update({prefix + name: value for name, value in found.items()})
        top1.append(found["top1"])
        readable = data.dataset.select(outputs["indices"])
        kinds = f"{len(data.class_names)} classes, templates {', '.join(map(repr, data.templates))}"
        lines += [f"{data.name or 'The dataset'}: {_counted(readable, data.dataset)}, {kinds}.", ""]
        file = f"classification{'_' if data.name else ''}{_file_name(data.name)}.png"
        pictures[file] = class_sheet(readable, outputs, data.class_names)
    if len(top1) > 1:
        metrics["classification_mean_top1"] = sum(top1) / len(top1)
    lines += [*table(metrics), "", "What each picture was taken for; grey: what it is."]
    return Section("Zero-shot classification", metrics, lines, pictures)


def captioning(model: MMGEMModel, processor: MMGEMProcessor, arguments: EvaluationArguments) -> Section:
    """By stage 1, whose prompt it is: "region-caption" is for regions."""
    if arguments.adapters:
        model.disable_adapters()
        section = captioning(model, processor, replace(arguments, adapters=[]))
        model.enable_adapters()
        return section
    dataset = load_pairs(arguments, _image_size(model))
    readable = dataset.select(embed_dataset(model, processor, dataset, arguments.batch_size)[0])
    count = arguments.caption_samples or len(readable)
    metrics, outputs = evaluate_captions(model, processor, readable, arguments.batch_size, count)
    count = len(outputs["captions"])
    drawn = None
    if arguments.draws:
        of_draws, drawn = evaluate_reranking(model, processor, readable, count, arguments.draws, arguments.seed)
        metrics.update(of_draws)
    ids = _image_ids(readable, count)
    if arguments.annotations and process()[0] == 0:
        os.makedirs(arguments.output_dir, exist_ok=True)
        write_caption_results(os.path.join(arguments.output_dir, "captions.json"), ids, outputs["captions"])
    domains = _domains(readable, count)
    if domains:
        references = dict(zip(ids, readable.captions()))
        scores = score_captions(dict(zip(ids, outputs["captions"])), references, dict(zip(ids, domains)))
        metrics.update({name: value for name, value in scores.items() if name.endswith("domain")})
    lines = [f"{_counted(readable, dataset)}; {count} were captioned.", "", *table(metrics), ""]
    lines += ["Grey: a reference. Black: written by the model, most probable word by word."]
    if drawn:
        lines += ["", f"Of {arguments.draws} captions drawn of a picture, the nearest to it and the furthest:", ""]
        lines += ["| nearest | | furthest | |", "|---|---|---|---|"]
        lines += [f"| {of[0][0]} | {of[0][1]:.2f} | {of[-1][0]} | {of[-1][1]:.2f} |" for of in drawn[:8]]
    return Section("Captions", metrics, lines, {"captions.png": caption_sheet(readable, outputs["captions"])})


def long_text(model: MMGEMModel, processor: MMGEMProcessor, arguments: EvaluationArguments) -> Section:
    dataset = load_pairs(arguments, _image_size(model), long=True)
    through_h4 = any("region_projection" in _modules(adapter) for adapter in arguments.adapters)
    metrics, outputs = evaluate_long_text(
        model, processor, dataset, arguments.batch_size, arguments.max_lengths, whole_image_box=through_h4
    )
    words = outputs["words"]
    names = [f"{way}_{name}" for way in ("text_to_image", "image_to_text") for name in ("R@1", "R@5", "R@10")]
    lines = [
        f"{_counted(dataset.select(outputs['indices']), dataset)}, {len(words)} captions of {min(words)} to "
        f"{max(words)} words, on average {sum(words) / len(words):.0f}.",
        "",
        f"| cut to | that many are | pictures | {' | '.join(names)} |",
        "|---" * (3 + len(names)) + "|",
    ]
    for length in arguments.max_lengths:
        for path, called in {"": "whole", "_whole_box": "as the box that covers them, through h4"}.items():
            keys = [f"long_text_{length}{path}_{name}" for name in names]
            if any(key in metrics for key in keys):
                cells = [f"{metrics[key]:.4g}" if key in metrics else "" for key in keys]
                cut = f"{metrics[f'long_text_{length}_cut']:.0%}"
                lines.append(f"| {length} tokens | {cut} | {called} | {' | '.join(cells)} |")
    by_words = {name: value for name, value in metrics.items() if name.endswith("_words")}
    return Section("Long texts", metrics, [*lines, "", *table(by_words)], {})


def regions(model: MMGEMModel, processor: MMGEMProcessor, arguments: EvaluationArguments) -> Section:
    """Stage 1 alone, or stage 1 beside each adapter."""
    dataset = load_regions(arguments, _image_size(model))
    section = Section("Regions", {}, [], {})
    for adapter in arguments.adapters:
        stage = next(STAGES[module] for module in _modules(adapter) if module in STAGES)
        metrics, outputs = evaluate_adapter(model, processor, dataset, stage, arguments.batch_size)
        own = region_section(stage, metrics, outputs, model, processor, dataset)
        section.metrics.update(own.metrics)
        section.lines += [f"### {own.heading}", "", *own.lines, ""]
        section.pictures.update(own.pictures)
    if not arguments.adapters:
        for stage in STAGES.values():
            section.metrics.update(evaluate_regions(model, processor, dataset, stage, arguments.batch_size)[0])
        section.lines += ["Stage 1 alone, which has learned no more than the mean over all patches.", ""]
        section.lines += table(section.metrics)
    return section


def score_caption_files(arguments: EvaluationArguments) -> Section:
    """Captions that anybody's model wrote, against COCO's or NoCaps' references."""
    assert arguments.caption_results is not None and arguments.caption_references is not None
    results = read_caption_results(arguments.caption_results)
    references, domains = read_caption_references(arguments.caption_references)
    metrics = score_captions(results, references, domains)
    return Section("Captions", metrics, [f"{len(results)} captions.", "", *table(metrics)], {})


def _image_size(model: MMGEMModel) -> int:
    return model.config.vision_config.image_size


def _counted(readable: Any, dataset: Any) -> str:
    left_out = len(dataset) - len(readable)
    return f"{len(readable)} pictures" + (f" ({left_out} more could not be read)" if left_out else "")


def _modules(adapter: str) -> list[str]:
    """Of the model, that this adapter replaces."""
    return list(getattr(PeftConfig.from_pretrained(adapter), "modules_to_save", None) or [])


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def _column(dataset: Any, name: str, count: int) -> list[Any]:
    """Of a table of annotations; empty for others."""
    if name not in getattr(dataset.table, "column_names", ()):
        return []
    values = dataset.table[name]
    return [values[row] for row in dataset.rows[:count]]


def _image_ids(dataset: Any, count: int) -> list[str]:
    ids = _column(dataset, "image_id", count) or [None] * count
    return [str(row if own is None else own) for row, own in zip(dataset.rows, ids)]


def _domains(dataset: Any, count: int) -> list[str]:
    domains = _column(dataset, "domain", count)
    return domains if all(domains) else []
