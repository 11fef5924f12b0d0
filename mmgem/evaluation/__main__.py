"""
Evaluates a checkpoint in the figures of its field.

    python -m mmgem.evaluation --model org/mm-gem --tasks retrieval,captioning --dataset_name scenes
    accelerate launch -m mmgem.evaluation --config evaluation.yaml
    python -m mmgem.evaluation --caption_results captions.json --caption_references captions_val2014.json
"""

import os
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from datasets.exceptions import DatasetsError

from ..data.loading import is_hub_id
from ..options import parse_options
from ..output_lock import output_lock
from ..processing import MMGEMProcessor
from .arguments import EvaluationArguments
from .captioning import TOKENIZER
from .data import read_suite
from .report import Section, environment, write_report
from .tasks import load_model, run_tasks, score_caption_files


def main(words: list[str] | None = None, script: str = "python -m mmgem.evaluation") -> None:
    """
    Evaluates and writes the report. Errors that the user can put right end it with one line.

    Args:
        words: the command line without the script; `sys.argv` by default.
        script: its name in the help.
    """
    try:
        (arguments,) = parse_options([EvaluationArguments], script, words)
        is_first = int(os.environ.get("RANK", "0")) == 0
        with output_lock(arguments.output_dir) if is_first else nullcontext():
            run(arguments)
    except (ValueError, OSError, DatasetsError) as error:
        sys.exit(f"error: {error}")


def run(arguments: EvaluationArguments) -> None:
    """Evaluates in all processes; the first one prints the metrics of each task as they come, and reports so far."""
    found: Iterable[Section]
    if arguments.caption_results is not None:
        found = [score_caption_files(arguments)]
        names = ("caption_results", "caption_references", "split", "caption_subset")
        setting, is_first = {name: getattr(arguments, name) for name in names}, True
    else:
        state = PartialState(cpu=not torch.cuda.is_available())
        model, processor = load_model(arguments)
        found = run_tasks(model.to(state.device), processor, arguments)
        setting, is_first = describe(arguments, processor, state), state.is_main_process
    sections = []
    for section in found:
        sections.append(section)
        if is_first:
            for name, value in section.metrics.items():
                print(f"{name:44} {value:.4f}", flush=True)
            whole = {**setting, **environment(), "caption_tokenizer": TOKENIZER}
            report = write_report(arguments.output_dir, "Evaluation", sections, whole)
    if is_first:
        print(f"Report: {os.path.relpath(report)}")


def describe(arguments: EvaluationArguments, processor: MMGEMProcessor, state: PartialState) -> dict[str, Any]:
    """What was evaluated on what, for results.json."""
    used = {name: value for name, value in vars(arguments).items() if value is not None and value != []}
    del used["output_dir"]
    if arguments.classification_suite is not None:
        used["classification_suite"] = read_suite(arguments.classification_suite)
    return {
        "dataset_id": arguments.dataset_name if is_hub_id(arguments.dataset_name) else None,
        "dataset": arguments.dataset_name or arguments.data_file or arguments.annotations,
        **used,
        "prompt": "".join(processor.image_prompt),
        "max_length": arguments.max_length or processor.max_length,
        "device": str(state.device),
        "processes": state.num_processes,
    }


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
