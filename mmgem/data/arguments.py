"""Which data to train and to evaluate on."""

from dataclasses import dataclass, field
from typing import Any


ANNOTATION_FILES = (
    "COCO's captions_*.json or instances_*.json, NoCaps' file, Karpathy's dataset_*.json, Visual Genome's "
    "region_descriptions.json, long captions of DCI, DOCCI, ShareGPT4V or Urban1k"
)


@dataclass
class TableArguments:
    """The options that training and evaluation share. The names are those of transformers' own examples."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "'scenes' (built in), a Hub id, or a local folder of `datasets`."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    image_folders: list[str] = field(
        default_factory=list, metadata={"help": "Folders with the images that annotations name."}
    )
    image_column: str = field(default="image", metadata={"help": "Images, bytes or paths."})
    caption_column: str = field(
        default="caption",
        metadata={"help": "A string, or a list of strings: one is drawn per step, all count in evaluation."},
    )
    regions_column: str = field(
        default="regions", metadata={"help": "Lists of {box: [x0, y0, x1, y1], phrase}, in pixels."}
    )

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

    train_file: str | None = field(default=None, metadata={"help": "parquet, jsonl, json or csv."})
    validation_file: str | None = field(default=None, metadata={"help": "parquet, jsonl, json or csv."})
    train_shards: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tar shards with jpg and txt or json, as img2dataset writes them: patterns such as "
            "'laion/{00000..00999}.tar' or 'hf://datasets/org/name/*.tar', one per source."
        },
    )
    shard_weights: list[float] | None = field(
        default=None, metadata={"help": "How often each of train_shards is drawn from; all alike by default."}
    )
    shuffle_window: int = field(
        default=1000, metadata={"help": "Samples of a shard that are shuffled among each other."}
    )
    train_annotations: list[str] | None = field(
        default=None, metadata={"help": f"{ANNOTATION_FILES}: joined by image."}
    )
    validation_annotations: list[str] | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    max_length: int = field(default=50, metadata={"help": "Tokens per text, BOS and [EMB] included."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use that many (scenes: draws 20,000)."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use that many (scenes: draws 500)."})
    augmentation_scale: float = field(
        default=1.0, metadata={"help": "Least share of the area that a random crop keeps in training; 1: no crop."}
    )
    max_regions: int = field(default=16, metadata={"help": "Stage 2: regions of an image in a step, drawn anew."})
    whole_image_weight: float = field(
        default=0.2,
        metadata={
            "help": "Stage 2: probability that an image with regions comes with a caption too, for the region that "
            "covers it. Images without regions always do."
        },
    )

    def __post_init__(self) -> None:
        self.require_one_of(("dataset_name", "train_file", "train_shards", "train_annotations"))
        self.require_image_folders(self.train_annotations or self.validation_annotations)
        if self.dataset_name is not None and (self.validation_file or self.validation_annotations):
            raise ValueError(
                "validation_file and validation_annotations go with train_file, train_shards or train_annotations; "
                "a dataset_name brings its own splits."
            )
        if self.validation_annotations and self.validation_file:
            raise ValueError("Give validation_file or validation_annotations, not both.")
        if self.train_shards is not None and (self.max_train_samples or self.image_column != "image"):
            raise ValueError(
                "max_train_samples and image_column are for tables: a stream ends with --max_steps, and its images "
                "are the files named jpg, png or webp."
            )
        self.require_at_least(1, "max_regions", "max_train_samples", "max_eval_samples", "shuffle_window")
        if not 0 <= self.whole_image_weight <= 1:
            raise ValueError(f"whole_image_weight must lie in [0, 1], got {self.whole_image_weight}.")
        if not 0 < self.augmentation_scale <= 1:
            raise ValueError(f"augmentation_scale must lie in (0, 1], got {self.augmentation_scale}.")
