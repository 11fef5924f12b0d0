"""The tasks of the suite: each loads its data, evaluates, and returns a section of the report."""

import copy
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..data.annotations import read_categories
from ..data.choices import ChoiceDataset
from ..data.pairs import PairDataset
from ..loading import load_with_adapters
from ..modeling_mmgem import MMGEMModel
from ..modeling_mmgem.adapters_mmgem import FUSED_ADAPTER, REGION_ADAPTERS
from ..processing import MMGEMProcessor
from ..processing.image_processors_mmgem import without_center_crop
from .arguments import EvaluationArguments, check_dims
from .caption_files import read_caption_references, read_caption_results, score_captions, write_caption_results
from .choices import choices_section, evaluate_choices
from .classification import DEFAULT_TEMPLATES, evaluate_classification
from .data import load_choices, load_fused, load_labelled, load_pairs, load_regions
from .embedding import evaluating, readable_examples
from .evaluator import (
    DrawnCaption,
    evaluate_captions,
    evaluate_long_text,
    evaluate_reranking,
    evaluate_retrieval,
    shorter_retrieval,
)
from .fused import evaluate_fused, fused_section
from .hallucination import chair, evaluate_questions
from .likelihood import evaluate_reranked_classification, evaluate_reranked_retrieval
from .region_report import region_section
from .regions import adapters_off, classify_boxes, evaluate_adapter, evaluate_regions, stage_1
from .report import Section, caption_sheet, class_sheet, retrieval_section, table
from .sharing import is_first_process


def run_tasks(model: MMGEMModel, processor: MMGEMProcessor, arguments: EvaluationArguments) -> Iterator[Section]:
    """
    A section for each of `arguments.tasks`, with its metrics, as it comes. If there are several processes, all must
    call it; each does its share of embedding and writing, and gets all the figures and images.

    Args:
        model: with the adapters that `arguments` name loaded under the names of their stages, as [`load_model`] does.

    Raises:
        ValueError, FileNotFoundError: for missing or invalid data.
    """
    tasks = (retrieval, classification, captioning, long_text, regions, box_classification, fused, choices, questions)
    by_name = {task.__name__: task for task in tasks}
    processor = copy.copy(processor)
    processor.max_length = arguments.max_length or processor.max_length
    for task in arguments.tasks:
        with evaluating(model):
            section = by_name[task](model, processor, arguments)
        yield section


def load_model(arguments: EvaluationArguments) -> tuple[MMGEMModel, MMGEMProcessor]:
    """[`load_with_adapters`] of the checkpoint and adapters that the arguments name."""
    assert arguments.model is not None
    model, processor = load_with_adapters(arguments.model, arguments.adapters, arguments.dtype)
    if not arguments.do_center_crop:
        processor.image_processor = without_center_crop(processor.image_processor)
    return model, processor


def retrieval(model: MMGEMModel, processor: MMGEMProcessor, arguments: EvaluationArguments) -> Section:
    check_dims(arguments.matryoshka_dims, model.config.projection_dim)
    dataset = load_pairs(arguments, _image_size(model), max_captions=arguments.captions_per_image)
    metrics, outputs = evaluate_retrieval(model, processor, dataset, arguments.batch_size)
    readable = dataset.select(outputs["indices"])
    metrics.update(shorter_retrieval(outputs, arguments.matryoshka_dims))
    if arguments.rerank:
        with adapters_off(model):
            found = evaluate_reranked_retrieval(model, processor, readable, outputs, **_rerank_options(arguments))
        metrics.update(found)
    section = retrieval_section("Retrieval", metrics, outputs, readable)
    counted = f"{_counted(readable, dataset)}, {len(outputs['text_embeds'])} captions."
    section.lines = [counted, "", *section.lines]
    section.sizes = _sizes(len(readable), dataset)
    return section


def classification(model: MMGEMModel, processor: MMGEMProcessor, arguments: EvaluationArguments) -> Section:
    section = Section("Zero-shot classification")
    main_metrics = []
    for i, data in enumerate(load_labelled(arguments, _image_size(model)), 1):
        found, outputs = evaluate_classification(
            model, processor, data.dataset, data.labels, data.class_names, data.templates, arguments.batch_size
        )
        main_metrics.append(found[data.metric])
        class_names, readable = outputs["class_names"], data.dataset.select(outputs["indices"])
        if arguments.rerank:
            given = {"templates": data.templates, **_rerank_options(arguments)}
            with adapters_off(model):
                found.update(evaluate_reranked_classification(model, processor, readable, outputs, **given))
        prefix = f"classification_{data.name}_" if data.name else "classification_"
        sizes = {**_sizes(len(readable), data.dataset), "classes": len(class_names)}
        section.metrics.update({prefix + name: value for name, value in found.items()})
        section.sizes.update({prefix + name: value for name, value in sizes.items()})
        kinds = f"{len(class_names)} classes, templates {', '.join(map(repr, data.templates))}"
        section.lines += [f"{data.name or 'The dataset'}: {_counted(readable, data.dataset)}, {kinds}.", ""]
        file = f"classification_{i}.png" if data.name else "classification.png"
        section.images[file] = class_sheet(readable, outputs, class_names)
    if len(main_metrics) > 1:
        section.metrics["classification_mean"] = sum(main_metrics) / len(main_metrics)
    section.lines += [*table(section.metrics), "", "What each image was taken for; grey: what it is."]
    return section


def captioning(model: MMGEMModel, processor: MMGEMProcessor, arguments: EvaluationArguments) -> Section:
    """By stage 1, whose prompt it is: "region-caption" is for regions."""
    dataset = load_pairs(arguments, _image_size(model))
    readable = dataset.select(readable_examples(dataset))
    count = min(arguments.caption_samples or len(readable), len(readable))
    ids = _image_ids(readable, count) if arguments.annotations else []
    drawn: list[list[DrawnCaption]] = []
    with adapters_off(model):
        beams = {"num_beams": arguments.num_beams}
        metrics, outputs = evaluate_captions(model, processor, readable, arguments.batch_size, count, **beams)
        if arguments.draws:
            chosen = {"weight": arguments.likelihood_weight, "alpha": arguments.alpha, "seed": arguments.seed}
            of_draws, drawn = evaluate_reranking(model, processor, readable, count, arguments.draws, **chosen)
            metrics.update(of_draws)
    if ids and is_first_process():
        os.makedirs(arguments.output_dir, exist_ok=True)
        write_caption_results(os.path.join(arguments.output_dir, "captions.json"), ids, outputs["captions"])
    if names := read_categories(arguments.annotations or []):
        regions = _column(readable, "regions", count)
        objects = [{region["phrase"] for region in of_image} & {*names} for of_image in regions]
        metrics.update(chair(outputs["captions"], objects, readable.captions()[:count], names))
    domains = _column(readable, "domain", count)
    if ids and any(domains):
        references = dict(zip(ids, readable.captions()))
        scores = score_captions(dict(zip(ids, outputs["captions"])), references, dict(zip(ids, domains)))
        metrics.update({name: value for name, value in scores.items() if name.endswith("domain")})
    how = "most probable word by word" if arguments.num_beams == 1 else f"with {arguments.num_beams} beams"
    lines = [f"{_counted(readable, dataset)}; {count} were captioned.", "", *table(metrics), ""]
    lines += [f"Grey: a reference. Black: written by the model, {how}.", *_drawn_lines(drawn[:8], arguments.draws)]
    images = {"captions.png": caption_sheet(readable, outputs["captions"])}
    return Section("Captions", metrics, lines, images, {**_sizes(len(readable), dataset), "captioned": count})


def _drawn_lines(drawn: list[list[DrawnCaption]], draws: int) -> list[str]:
    """A table of the nearest and the furthest caption of each image."""
    if not drawn:
        return []
    lines = ["", f"Of {draws} captions drawn of an image, the nearest to it and the furthest:", ""]
    lines += ["| nearest | | furthest | |", "|---|---|---|---|"]
    for captions in drawn:
        ends = ((of.text.replace("|", "\\|"), of.cosine) for of in (captions[0], captions[-1]))
        nearest, furthest = (f"{text} | {cosine:.2f}" for text, cosine in ends)
        lines.append(f"| {nearest} | {furthest} |")
    return lines


def long_text(model: MMGEMModel, processor: MMGEMProcessor, arguments: EvaluationArguments) -> Section:
    dataset = load_pairs(arguments, _image_size(model), long=True)
    metrics, outputs = evaluate_long_text(
        *(model, processor, dataset, arguments.batch_size, arguments.max_lengths),
        whole_image_box="region-retrieval" in _stages(model),
    )
    words, readable = outputs["words"], dataset.select(outputs["indices"])
    names = [f"{way}_{name}" for way in ("text_to_image", "image_to_text") for name in ("R@1", "R@5", "R@10")]
    lines = [
        f"{_counted(readable, dataset)}, {len(words)} captions of {min(words)} to {max(words)} words, on average "
        f"{sum(words) / len(words):.0f}.",
        "",
        f"| truncated to | that many are | images | {' | '.join(names)} |",
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
    return Section("Long texts", metrics, [*lines, "", *table(by_words)], {}, _sizes(len(readable), dataset))


def regions(model: MMGEMModel, processor: MMGEMProcessor, arguments: EvaluationArguments) -> Section:
    """Stage 1 alone, or stage 1 beside each adapter."""
    dataset = load_regions(arguments, _image_size(model))
    section = Section("Regions")
    stages = _stages(model)
    found: list[dict[str, Any]] = []
    for stage in stages:
        model.set_adapter(stage)  # another active adapter would change the scores of captions
        try:
            metrics, outputs = evaluate_adapter(model, processor, dataset, stage, arguments.batch_size)
            found = outputs["stage_2"]
            own = region_section(stage, metrics, outputs, model, processor, dataset)
            section.metrics.update(metrics)
            section.lines += [f"### {own.heading}", "", *own.lines, ""]
            section.images.update(own.images)
        finally:
            model.set_adapter(list(model.peft_config))
    if not stages:
        with stage_1(model, processor) as own_processor:
            for stage in REGION_ADAPTERS:
                metrics, outputs = evaluate_regions(model, own_processor, dataset, stage, arguments.batch_size)
                found = outputs["regions"]
                section.metrics.update(metrics)
        section.lines = ["Stage 1 alone, which has learned no more than the mean over all patches.", ""]
        section.lines += table(section.metrics)
    section.sizes = {**_sizes(len({region["index"] for region in found}), dataset), "regions": len(found)}
    return section


def box_classification(model: MMGEMModel, processor: MMGEMProcessor, arguments: EvaluationArguments) -> Section:
    """Of COCO's or LVIS' instances: stage 1 alone, or beside the adapter of retrieval."""
    dataset = load_regions(arguments, _image_size(model))
    names = arguments.class_names or read_categories(arguments.annotations or []) or None
    given: dict[str, Any] = {"class_names": names, "batch_size": arguments.batch_size}
    given["templates"] = arguments.templates or DEFAULT_TEMPLATES
    with stage_1(model, processor) as own_processor:
        metrics, outputs = classify_boxes(model, own_processor, dataset, **given)
    if "region-retrieval" in _stages(model):
        metrics = {f"stage_1_{name}": value for name, value in metrics.items()}
        metrics.update(classify_boxes(model, processor, dataset, **given)[0])
    boxes, images = len(outputs["regions"]), len({region["index"] for region in outputs["regions"]})
    sizes = {**_sizes(images, dataset), "boxes": boxes, "classes": len(outputs["class_names"])}
    line = f"{boxes} boxes of {images} images, {sizes['classes']} classes, templates {given['templates']}."
    return Section("Box classification", metrics, [line, "", *table(metrics)], {}, sizes)


def fused(model: MMGEMModel, processor: MMGEMProcessor, arguments: EvaluationArguments) -> Section:
    """Queries of an image with a text, by the adapter of fused-retrieval."""
    if FUSED_ADAPTER not in getattr(model, "peft_config", {}):
        raise ValueError(
            "The task fused needs the adapter that --stage fused-retrieval trained: give it to --adapters."
        )
    dataset = load_fused(arguments, _image_size(model))
    metrics, outputs = evaluate_fused(model, processor, dataset, arguments.batch_size)
    section = fused_section(metrics, outputs, dataset)
    section.sizes = _sizes(len(outputs["indices"]), dataset)
    candidates = section.sizes["candidates"] = len(outputs["candidates"])
    section.lines = [f"{_with_left_out(section.sizes, 'queries')}, {candidates} candidates.", "", *section.lines]
    return section


def choices(model: MMGEMModel, processor: MMGEMProcessor, arguments: EvaluationArguments) -> Section:
    """Right texts against near misses, by stage 1."""
    dataset = load_choices(arguments, _image_size(model))
    weights = {"weight": arguments.likelihood_weight, "alpha": arguments.alpha}
    with adapters_off(model):
        metrics, outputs = evaluate_choices(model, processor, dataset, arguments.batch_size, **weights)
    section = choices_section(metrics, outputs, dataset)
    section.sizes = _sizes_of_choices(outputs, dataset)
    section.lines = [f"{_with_left_out(section.sizes, 'choices')}.", "", *section.lines]
    return section


def questions(model: MMGEMModel, processor: MMGEMProcessor, arguments: EvaluationArguments) -> Section:
    """POPE's, by stage 1."""
    dataset = load_choices(arguments, _image_size(model), questions=True)
    templates = arguments.templates or DEFAULT_TEMPLATES
    if len(templates) > 1:
        raise ValueError(f"Questions are put in one sentence, but there are {len(templates)} templates. Give one.")
    with adapters_off(model):
        metrics, outputs = evaluate_questions(model, processor, dataset, templates[0], arguments.batch_size)
    sizes = _sizes_of_choices(outputs, dataset)
    lines = [f"{_with_left_out(sizes, 'questions')}; {templates[0]!r}.", "", *table(metrics)]
    return Section("Questions", metrics, lines, {}, sizes)


def score_caption_files(arguments: EvaluationArguments) -> Section:
    """Captions that anybody's model wrote, against COCO's or NoCaps' references."""
    assert arguments.caption_results is not None and arguments.caption_references is not None
    results = read_caption_results(arguments.caption_results)
    references, domains = read_caption_references(arguments.caption_references, arguments.split)
    metrics = score_captions(results, references, domains, arguments.caption_subset)
    return Section("Captions", metrics, [f"{len(results)} captions.", "", *table(metrics)], {})


def _rerank_options(arguments: EvaluationArguments) -> dict[str, Any]:
    options = {"count": arguments.rerank, "batch_size": arguments.batch_size}
    return {**options, "weight": arguments.likelihood_weight, "alpha": arguments.alpha}


def _image_size(model: MMGEMModel) -> int:
    return model.config.vision_config.image_size


def _stages(model: MMGEMModel) -> list[str]:
    """Of the adapters loaded."""
    return [stage for stage in REGION_ADAPTERS if stage in getattr(model, "peft_config", {})]


def _sizes(used: int, dataset: PairDataset) -> dict[str, int]:
    """How many images of the data count; the others cannot be read, or do not exist."""
    return {"size": used, "left_out": len(dataset) - used + dataset.missing}


def _sizes_of_choices(outputs: dict[str, Any], dataset: ChoiceDataset) -> dict[str, int]:
    used = len(outputs["indices"])
    return {"size": used, "left_out": len(dataset.choices) - used + dataset.missing}


def _counted(used: PairDataset, dataset: PairDataset) -> str:
    return _with_left_out(_sizes(len(used), dataset), "images")


def _with_left_out(sizes: dict[str, int], kind: str) -> str:
    return f"{sizes['size']} {kind}" + (f" ({sizes['left_out']} more are left out)" if sizes["left_out"] else "")


def _column(dataset: PairDataset, name: str, count: int) -> list[Any]:
    """The first values of a column; empty for a table without it."""
    if name not in getattr(dataset.table, "column_names", ()):
        return []
    values = dataset.table[name]
    return [values[row] for row in dataset.rows[:count]]


def _image_ids(dataset: PairDataset, count: int) -> list[str]:
    """The ids of a table of annotations; the name of the file for an image without one."""
    files, ids = _column(dataset, dataset.image_column, count), _column(dataset, "image_id", count)
    ids = [os.path.basename(file) if own is None else own for file, own in zip(files, ids)]
    for image, times in Counter(ids).most_common(1):
        if times > 1:
            raise ValueError(f"The annotations have {times} images of the id {image}. Evaluate one file at a time.")
    return ids
