"""Which data to train and to evaluate on."""

from dataclasses import dataclass, field


@dataclass
class DataArguments:
    """Pictures with captions. The names are those of transformers' own examples."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "'scenes' (built in), a Hub id, or a local folder of `datasets`."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
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
    image_column: str = field(default="image", metadata={"help": "Pictures, bytes or paths."})
    caption_column: str = field(
        default="caption",
        metadata={"help": "A string, or a list of strings: one is drawn per step, all count in evaluation."},
    )
    max_length: int = field(default=50, metadata={"help": "Tokens per text, BOS and [EMB] included."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use that many (scenes: draws 20,000)."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use that many (scenes: draws 500)."})
    augmentation_scale: float = field(
        default=1.0, metadata={"help": "Least share of the area that a random crop keeps in training; 1: no crop."}
    )
    train_annotations: list[str] | None = field(
        default=None,
        metadata={
            "help": "COCO's captions_*.json and instances_*.json, Karpathy's dataset_*.json, Visual Genome's "
            "region_descriptions.json, long captions of DCI, DOCCI, ShareGPT4V or Urban1k: joined by picture."
        },
    )
    validation_annotations: list[str] | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    image_folders: list[str] = field(
        default_factory=list, metadata={"help": "Where the pictures of the annotations lie."}
    )
    regions_column: str = field(
        default="regions", metadata={"help": "Stage 2: lists of {box: [x0, y0, x1, y1], phrase}, in pixels."}
    )
    max_regions: int = field(default=16, metadata={"help": "Stage 2: regions of a picture in a step, drawn anew."})
    whole_image_weight: float = field(
        default=0.2,
        metadata={
            "help": "Stage 2: probability that a picture with regions comes with a caption too, for the region that "
            "covers it. Pictures without regions always do."
        },
    )

    def __post_init__(self) -> None:
        sources = (self.dataset_name, self.train_file, self.train_shards, self.train_annotations)
        if sum(source is not None for source in sources) != 1:
            raise ValueError("Give dataset_name, train_file, train_shards or train_annotations, one of the four.")
        if (self.train_annotations or self.validation_annotations) and not self.image_folders:
            raise ValueError("Annotations name pictures only; say where these lie with --image_folders.")
        if self.max_regions < 1:
            raise ValueError(f"max_regions must be 1 or more, got {self.max_regions}.")
        if not 0 <= self.whole_image_weight <= 1:
            raise ValueError(f"whole_image_weight is a probability, got {self.whole_image_weight}.")
        if self.dataset_name is not None and self.validation_file is not None:
            raise ValueError(
                "validation_file goes with train_file or train_shards; a dataset_name brings its own splits."
            )
        if self.train_shards is not None and (self.max_train_samples or self.image_column != "image"):
            raise ValueError(
                "max_train_samples and image_column are for tables: a stream ends with --max_steps, and its pictures "
                "are what is named jpg, png or webp."
            )
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.shuffle_window < 1:
            raise ValueError(f"shuffle_window must be 1 or more, got {self.shuffle_window}.")
        if not 0 < self.augmentation_scale <= 1:
            raise ValueError(f"augmentation_scale must lie in (0, 1], got {self.augmentation_scale}.")
