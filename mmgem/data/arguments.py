"""Which data to train and to evaluate on."""

from dataclasses import dataclass
from typing import Any

from ..options import option


ANNOTATION_FILES = (
    "COCO's captions_*.json or instances_*.json, NoCaps' file, Karpathy's dataset_*.json, Visual Genome's "
    "region_descriptions.json, long captions of DCI, DOCCI, ShareGPT4V or Urban1k"
)


@dataclass
class TableArguments:
    """The options that training and evaluation share. The names are those of transformers' own examples."""

    dataset_name: str | None = option(None, "'scenes' (built in), a Hub id, or a local folder of `datasets`.")
    dataset_config_name: str | None = option(None, "Configuration of the Hub dataset.")
    image_folders: list[str] = option([], "Folders with the images that annotations name; one for triplets.")
    image_column: str = option("image", "Column of images, bytes or paths.")
    caption_column: str = option(
        "caption", "Column of texts, or lists of texts: one is drawn per step, all are evaluated."
    )
    regions_column: str = option("regions", "Column of lists of {box: [x0, y0, x1, y1], phrase}, in pixels.")
    query_instruction: str = option(
        "", "Triplets: text in front of every query's own; a train_mixture has its own instructions."
    )
    target_instruction: str = option("", "Triplets: the same of targets and negatives.")

    def require_one_of(self, names: tuple[str, ...]) -> None:
        """Raises ValueError unless exactly one of these options is set."""
        if sum(getattr(self, name) is not None for name in names) != 1:
            raise ValueError(f"Give exactly one of {', '.join(names)}.")

    def require_image_folders(self, annotations: Any) -> None:
        """Raises ValueError for annotations without the folders of their images."""
        if annotations and not self.image_folders:
            raise ValueError("Annotations do not say where their images are. Set --image_folders.")

    def require_at_least(self, minimum: int, *names: str) -> None:
        """Raises ValueError for an option that is set to less."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be {minimum} or more, got {value}.")


@dataclass
class DataArguments(TableArguments):
    """Images with captions, and for stage 2 with regions."""

    train_file: str | None = option(None, "Training table: parquet, jsonl, json, csv, or txt (a text in each line).")
    train_mixture: str | None = option(
        None,
        "fused-retrieval: YAML, a list of datasets of triplets with weights and instructions (docs/questions.md).",
    )
    validation_file: str | None = option(None, "Table to evaluate on, as train_file.")
    train_shards: list[str] | None = option(
        None,
        "Tar shards with jpg and txt or json, as img2dataset writes them: patterns such as "
        "'laion/{00000..00999}.tar' or 'hf://datasets/org/name/*.tar', one per source.",
    )
    shard_weights: list[float] | None = option(None, "How often to draw from each of train_shards; default: alike.")
    shuffle_window: int = option(1000, "Samples of a shard that are shuffled among each other.")
    train_annotations: list[str] | None = option(
        None, f"Published files to train on, joined by image: {ANNOTATION_FILES}."
    )
    validation_annotations: list[str] | None = option(None, "Published files to evaluate on, as train_annotations.")
    negative_caption_column: str | None = option(
        None,
        "Stage 1: column of captions that do not fit the image (a text, or a list of which one is drawn per step): "
        "hard negatives of L_Emb, as `python -m mmgem.mining` finds them.",
    )
    text_columns: list[str] = option(
        [], "text-distillation: columns of texts, or of lists of texts; the caption_column by default."
    )
    teacher: str | None = option(
        None,
        "Model of sentence-transformers (folder or Hub id), which embeds the texts of text-distillation, or the "
        "captions of stage 1, once: the model learns their similarities.",
    )
    teacher_column: str | None = option(None, "text-distillation: column of the teacher's vectors instead.")
    max_length: int = option(50, "Tokens per text, BOS and [EMB] included.")
    max_train_samples: int | None = option(None, "Number of training examples to use (scenes: 20,000).")
    max_eval_samples: int | None = option(None, "Number of examples to evaluate on (scenes: 500).")
    augmentation_scale: float = option(1.0, "Least share of the area that a random training crop keeps; 1: no crop.")
    max_regions: int = option(16, "Stage 2: regions of an image in a step, drawn anew.")
    whole_image_weight: float = option(
        0.2,
        "Stage 2: probability that an image with regions comes with a caption too, for the region that "
        "covers it. Images without regions always do.",
    )

    def __post_init__(self) -> None:
        self.require_one_of(("dataset_name", "train_file", "train_mixture", "train_shards", "train_annotations"))
        if self.train_mixture is not None and (self.max_train_samples or self.image_folders):
            raise ValueError("max_train_samples and image_folders are set in each entry of train_mixture.")
        self.require_image_folders(self.train_annotations or self.validation_annotations)
        if self.dataset_name is not None and (self.validation_file or self.validation_annotations):
            raise ValueError(
                "validation_file and validation_annotations go with training files; a dataset_name brings its own "
                "splits."
            )
        if self.validation_annotations and self.validation_file:
            raise ValueError("Give validation_file or validation_annotations, not both.")
        if self.train_shards is not None and (self.max_train_samples or self.image_column != "image"):
            raise ValueError(
                "max_train_samples and image_column are for tables: a stream ends with --max_steps, and its images "
                "are the files named jpg, png or webp."
            )
        if self.negative_caption_column is not None and (self.train_shards or self.dataset_name == "scenes"):
            raise ValueError("negative_caption_column is of tables. Leave it out.")
        self.require_at_least(1, "max_regions", "max_train_samples", "max_eval_samples", "shuffle_window")
        if not 0 <= self.whole_image_weight <= 1:
            raise ValueError(f"whole_image_weight must lie in [0, 1], got {self.whole_image_weight}.")
        if not 0 < self.augmentation_scale <= 1:
            raise ValueError(f"augmentation_scale must lie in (0, 1], got {self.augmentation_scale}.")
