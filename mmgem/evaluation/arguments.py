"""The options of `python -m mmgem.evaluation`."""

import math
from dataclasses import dataclass, fields
from typing import Literal

from ..data.arguments import ANNOTATION_FILES, TableArguments
from ..options import option


LONG_CAPTION_COLUMN = "long_caption"
LIKELIHOOD_WEIGHT = 8.0  # of log P(text | image) per token beside cosine / tau (docs/questions.md)
MAX_LENGTHS = (50, 200)  # tokens: as trained, and as the paper tests
TASKS = (
    *("retrieval", "classification", "captioning", "long_text", "regions", "box_classification"),
    *("fused", "choices", "questions"),
)


def check_dims(dims: list[int], projection_dim: int | None = None) -> None:
    """Raises ValueError for lengths of embeddings that do not ascend from 1 or more, or reach `projection_dim`."""
    if dims != sorted(set(dims)) or (dims and dims[0] < 1):
        raise ValueError(f"matryoshka_dims must ascend from 1 or more, got {', '.join(map(str, dims))}.")
    if projection_dim is not None and dims and dims[-1] >= projection_dim:
        raise ValueError(
            f"matryoshka_dims holds {dims[-1]}, but embeddings have {projection_dim} numbers (projection_dim): name "
            "shorter lengths."
        )


@dataclass
class EvaluationArguments(TableArguments):
    """What to evaluate a model on, and on what data."""

    model: str | None = option(None, "MM-GEM checkpoint, a folder or a Hub id.")
    adapters: list[str] = option([], "Adapters of the model, for regions and fused.")
    tasks: list[str] = option(["retrieval", "captioning"], f"Any of {', '.join(TASKS)}; commas or spaces between.")
    split: str = option("test", "Split of the dataset, or of Karpathy's file.")
    data_file: str | None = option(None, "Table to evaluate on: parquet, jsonl, json or csv.")
    annotations: list[str] | None = option(None, f"Published files to evaluate on: {ANNOTATION_FILES}.")
    long_caption_column: str = option(
        LONG_CAPTION_COLUMN, f"For long_text; caption_column where there is no {LONG_CAPTION_COLUMN}."
    )
    label_column: str = option("label", "For classification: column of class numbers.")
    captions_per_image: int = option(5, "For retrieval: captions that count of each image, the first ones.")
    class_names: list[str] | None = option(
        None, "For (box) classification: the classes, if the data does not name them."
    )
    templates: list[str] | None = option(
        None, "For (box) classification and questions: sentences with {} for the name of the class or object."
    )
    classification_suite: str | None = option(
        None, "For classification: YAML, a list of datasets, each a mapping of options such as these."
    )
    max_lengths: list[int] = option([*MAX_LENGTHS], "For long_text: tokens to truncate captions to.")
    caption_samples: int | None = option(None, "Number of images to caption; all by default.")
    num_beams: int = option(1, "For captioning: number of beams; 1 is greedy decoding.")
    draws: int = option(0, "Number of captions to sample of each image and to rank by the model; 0 for none.")
    matryoshka_dims: list[int] = option([], "For retrieval: lengths below D to evaluate embeddings at too.")
    rerank: int = option(
        0, "Retrieval and classification: the best by cosine to re-order by cosine and likelihood; 0 for none."
    )
    likelihood_weight: float = option(
        LIKELIHOOD_WEIGHT, "Of log P(text | image) per token beside cosine / tau, in rerank, draws and choices."
    )
    alpha: float = option(
        0.0, "Weight of log P(text), subtracted from log P(text | image) in rerank, draws and choices."
    )
    caption_results: str | None = option(None, "Captions in COCO's format to score; no model is needed.")
    caption_references: str | None = option(None, "COCO's, NoCaps' or Karpathy's reference file (with --split).")
    caption_subset: bool = option(False, "Score the images that caption_results has, not all of caption_references.")
    max_samples: int | None = option(None, "Number of examples to use, the first ones (scenes: 500).")
    max_length: int | None = option(None, "Tokens per text; the processor's own by default.")
    do_center_crop: bool = option(
        True, "false resizes whole images, where the model's image processor would cut out the middle."
    )
    batch_size: int = option(64, "Images, or texts, at a time.")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Precision of the weights.")
    seed: int = option(0, "Seed of sampled captions.")
    output_dir: str = option("outputs/evaluation", "Folder for results.json, report.md and images.")

    def __post_init__(self) -> None:
        for declared in fields(self):
            if getattr(self, declared.name) is None and declared.default is not None:
                raise ValueError(f"{declared.name} needs a value; leave it out for its default.")
        self.tasks = [task for word in self.tasks for task in word.split(",") if task]
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise ValueError(f"Unknown task {unknown[0]!r}; the tasks are {', '.join(TASKS)}.")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"A task is named twice in {', '.join(self.tasks)}.")
        if (self.caption_results is None) != (self.caption_references is None):
            raise ValueError("caption_results are scored against caption_references: give both.")
        if self.caption_results is not None:
            if self.model is not None:
                raise ValueError("caption_results need no model to write captions: give them or model, not both.")
            return
        if self.model is None:
            raise ValueError("Give --model, or captions to score with --caption_results and --caption_references.")
        sources = ("dataset_name", "data_file", "annotations")
        if self.classification_suite is None or self.tasks != ["classification"]:
            self.require_one_of(sources)
        elif given := [name for name in sources if getattr(self, name) is not None]:
            raise ValueError(f"classification_suite names its datasets itself; leave out {given[0]}.")
        self.require_image_folders(self.annotations)
        self.require_at_least(1, "batch_size", "captions_per_image", "num_beams", "caption_samples", "max_samples")
        self.require_at_least(0, "draws", "rerank", "likelihood_weight")
        for name in ("likelihood_weight", "alpha"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}.")
        if self.alpha and not self.rerank and not self.draws and "choices" not in self.tasks:
            raise ValueError(
                f"alpha is {self.alpha:g}, but no likelihood uses it: set rerank or draws, or ask choices."
            )
        check_dims(self.matryoshka_dims)
        for name, tasks in {"rerank": ("retrieval", "classification"), "matryoshka_dims": ("retrieval",)}.items():
            if getattr(self, name) and not {*tasks} & {*self.tasks}:
                raise ValueError(f"{name} is for {' and '.join(tasks)}, but the tasks are {', '.join(self.tasks)}.")
        for length in [*self.max_lengths, *([] if self.max_length is None else [self.max_length])]:
            if length < 4:
                raise ValueError(f"A text of {length} tokens holds no word beside BOS and [EMB].")
