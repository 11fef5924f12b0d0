"""The options of train.py, one dataclass per concern, from YAML and the command line."""

import importlib.util
import math
import os
from dataclasses import MISSING, dataclass, fields
from typing import Literal

import torch
from transformers import TrainingArguments, training_args

from ..data.arguments import DataArguments
from ..evaluation.arguments import EvaluationArguments, check_dims
from ..modeling_mmgem import Negatives
from ..options import checked_token, option, parse_options
from .checks import PYTORCH_OPTIMIZERS, refuse_unsupported, refuse_unsupported_loaders, warn_of_slow_bfloat16
from .model_arguments import ModelArguments


MINIMA = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "lora_alpha": 1,
    "lora_rank": 0,
    "mini_batch_size": 0,
    "hardest_negatives": 0,
    "caption_samples": 0,
    "generation_num_beams": 1,
    "dataloader_num_workers": 0,
}

# Options that another stage than the first has no use for, and those that one of them has not.
NOT_OF_LATER_STAGES = (
    *("batch_sampler", "objective", "freeze", "projection_lr_multiplier", "generation_num_beams"),
    "distillation_weight",
)
NOT_OF_STAGE = {
    "region-caption": ("lora_rank", "temperature", "mini_batch_size"),
    "region-retrieval": ("lora_rank", "mini_batch_size", "caption_loss_weight"),
    "fused-retrieval": ("cache_features", "train_sampling_strategy", "caption_loss_weight"),
    "text-distillation": (
        *("cache_features", "matryoshka_dims", "false_negative_margin", "hardest_negatives", "hardness_weight"),
        *("caption_loss_weight", "push_to_hub", "dry_run", "torch_compile"),
    ),
}

DISTILLATION_TAU = 0.05  # of both similarities; in stage 1 L_Emb has its own, which is learned

# The options that most runs set: `--help` lists these.
COMMON = (
    *("init_from", "vision_model_name_or_path", "text_model_name_or_path", "image_pooling", "image_grid_size"),
    *("dataset_name", "train_file", "validation_file", "train_shards", "train_annotations", "validation_annotations"),
    *("image_folders", "image_column", "caption_column", "max_length", "stage", "output_dir", "max_steps"),
    *("num_train_epochs", "per_device_train_batch_size", "learning_rate", "warmup_steps", "objective", "freeze"),
    *("lora_rank", "mini_batch_size", "cache_features", "bf16", "use_cpu", "seed", "dataloader_num_workers"),
    *("eval_strategy", "eval_steps", "save_steps", "resume_from_checkpoint", "report_to", "dry_run"),
    *("push_to_hub", "hub_model_id"),
)


@dataclass
class DryRunArguments:
    """What `--dry_run` estimates for, from configurations alone: it reads neither weights nor data."""

    dry_run_devices: int = option(1, "Devices of the run; the batch size is that of each.")
    dry_run_memory: float | None = option(None, "GiB of each device, to warn by; this machine's by default.")
    dry_run_tflops: float | None = option(None, "Peak of each device in TFLOP/s; measured on this machine by default.")
    dry_run_mfu: float = option(0.4, "Share of the peak that training reaches, what is computed twice included.")
    dry_run_sharded: bool = option(False, "Weights, gradients and optimiser divided among the devices, as FSDP does.")
    dry_run_caption_tokens: int = option(20, "Tokens of an average caption, BOS and [EMB] included.")


@dataclass
class MMGEMTrainingArguments(TrainingArguments):
    """
    transformers' TrainingArguments and the options of both stages. `learning_rate` is the rate of the backbones in
    stage 1, and of the adapter in stage 2.
    """

    stage: Literal["1", "region-caption", "region-retrieval", "fused-retrieval", "text-distillation"] = option(
        "1",
        "1 trains everything on images with captions. text-distillation prepares the language model of "
        "--text_model_name_or_path for it, on texts alone. The others train an adapter beside the frozen model of "
        "--init_from: h3 and soft prompts (region-caption) or h4 (region-retrieval) on regions, or LoRA "
        "(fused-retrieval) on queries of an image with a text.",
    )
    dry_run: bool = option(False, "Print parameters, memory per device and cost of a step, and stop.")
    cache_features: bool = option(
        False, "Run the frozen vision tower once over all images, and read its features from files."
    )
    feature_cache_dir: str | None = option(
        None,
        "Folder of --cache_features, and of what --teacher embedded, which later runs may share; OUTPUT_DIR/features "
        "by default.",
    )
    packing: bool = option(True, "Stage 1: pack sequences into rows without padding; false gives each a padded row.")
    pack_length: int = option(128, "Length of the packed rows.")
    max_bad_fraction: float = option(0.01, "Stop when more than this share of the training set cannot be read.")

    optim: str = option(
        "adamw_torch_fused", "'lamb' or 'soap' (from pytorch-optimizer), or any of transformers' OptimizerNames."
    )
    objective: Literal["joint", "contrastive", "caption"] = option(
        "joint", "L_Emb + L_Gen, or one alone (the paper's ablation)."
    )
    caption_loss_weight: float = option(
        1.0,
        "L = L_Emb + this x L_Gen. The paper adds them; its L_Gen is a mean per token, so raise it where captions "
        "matter and the language model starts from scratch.",
    )
    matryoshka_dims: list[int] = option(
        [], "Lengths below D at which embeddings work too, ascending: L_Emb is the mean over these and D."
    )
    false_negative_margin: float | None = option(
        None,
        "L_Emb leaves out negatives whose cosine is above that of the positive by more than this (UniME: 0.1).",
    )
    hardest_negatives: int = option(0, "L_Emb sees so many of each row's negatives, the hardest (UniME: 8); 0: all.")
    hardness_weight: float = option(
        0.0, "Times the cosine of a negative, without a gradient, added to its logit: hard ones weigh more (LLaVE: 9)."
    )
    batch_sampler: Literal["random", "clustered"] = option(
        "random", "Stage 1: clustered makes batches of like examples, by the column of python -m mmgem.mining."
    )
    temperature: float | None = option(
        None,
        "tau where it is not learned: of text-distillation (0.05 by default), and of adapters that embed (by default "
        "the model's own; UniME: 0.02).",
    )
    distillation_weight: float = option(
        1.0, "Stage 1 with a --teacher: weight of its loss beside L_Emb (both similarities over tau 0.05, all of D)."
    )
    distillation_prompt: str = option(
        "Summary above sentence in one word:",
        "text-distillation: what stands behind each text; at its last token the text is embedded.",
    )
    mini_batch_size: int = option(
        0,
        "Gradient cache: each device's batch goes through the model in parts of this size, at their memory, with "
        "the contrastive loss and its gradient of the whole; 0: off.",
    )
    projection_lr_multiplier: float = option(10.0, "Learning rate of projections and logit_scale over the backbones'.")
    lora_rank: int = option(
        0,
        "Train LoRA matrices of this rank beside the language model's, its new tokens' rows and the projections, "
        "and nothing else; 0: everything. What is saved in the end is one plain model. fused-retrieval: 16 by "
        "default, and saved as an adapter.",
    )
    lora_alpha: int | None = option(None, "LoRA's scale; twice the rank by default.")
    freeze: list[str] = option([], "Parameters not to train: names or beginnings of names, such as vision_model.")
    # transformers' options with another default; UNSUPPORTED in checks.py says why no other value is accepted.
    hub_strategy: str = option("end", "The finished run is pushed, with its evaluation.")
    do_train: bool = option(True, "train.py always trains.")
    dataloader_drop_last: bool = option(True, "Every batch has the same size.")
    remove_unused_columns: bool = option(False, "The collator chooses the columns.")

    caption_samples: int = option(500, "Images to caption in the final evaluation; 0 for none.")
    generation_num_beams: int = option(1, "Stage 1: number of beams for these captions; 1 is greedy decoding.")
    evaluation_config: str | None = option(
        None, "Stage 1: options of `python -m mmgem.evaluation` (YAML), to run too at each evaluation."
    )

    def __post_init__(self) -> None:
        refuse_unsupported(self)
        self._check_numbers()
        self._set_metric_for_best_model()
        self._read_evaluation_config()
        if self.stage == "1":
            if self.temperature is not None:
                raise ValueError("temperature is learned in stage 1. Leave out --temperature.")
        else:
            self._set_up_later_stage()
        if self.mini_batch_size and self.objective == "caption":
            raise ValueError(
                "mini_batch_size is for the contrastive loss. A caption loss alone needs gradient accumulation only."
            )
        if self.matryoshka_dims and self.objective == "caption":
            raise ValueError("matryoshka_dims are for the contrastive loss, which is not trained here.")
        if self.negatives and self.objective == "caption":
            raise ValueError("false_negative_margin, hardest_negatives and hardness_weight are for L_Emb alone.")
        if self.optim in PYTORCH_OPTIMIZERS and importlib.util.find_spec("pytorch_optimizer") is None:
            raise ValueError(f"--optim {self.optim} needs pytorch-optimizer: pip install 'mmgem[optimizers]'.")
        self.max_grad_norm = self.max_grad_norm or 0.0  # null in YAML
        # On the command line this option is a string, even where a boolean is meant.
        switch = str(self.resume_from_checkpoint).lower()
        if switch in ("true", "false"):
            self.resume_from_checkpoint = True if switch == "true" else None  # type: ignore[assignment]
        if self.ddp_find_unused_parameters is None:
            # Parameters that an objective does not reach are frozen, so DistributedDataParallel need not search.
            self.ddp_find_unused_parameters = False
        # transformers accepts the options of a GPU run, and bfloat16 on a machine without a GPU, with use_cpu only.
        has_gpu = torch.accelerator.is_available() or training_args.is_torch_bf16_gpu_available()
        if self.dry_run or (self.bf16 and not has_gpu):
            self.use_cpu = True
        optim = self.optim
        self.optim = "adamw_torch" if optim in PYTORCH_OPTIMIZERS else optim  # transformers refuses unknown names
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and has_gpu  # torch warns of it without one
        self.optim = optim if optim in PYTORCH_OPTIMIZERS else self.optim
        refuse_unsupported_loaders(self)
        warn_of_slow_bfloat16(self)
        if self.push_to_hub and self.hub_token is not None:
            self.hub_token = checked_token(self.hub_token)

    @property
    def negatives(self) -> Negatives:
        """What L_Emb does to its negatives."""
        return Negatives(self.false_negative_margin, self.hardness_weight, self.hardest_negatives)

    def _check_numbers(self) -> None:
        if not self.caption_loss_weight > 0:
            raise ValueError(
                f"caption_loss_weight must be above 0, got {self.caption_loss_weight}. To train without captions, "
                "pass --objective contrastive."
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must lie in [0, 1], got {self.max_bad_fraction}.")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not 0 <= value < math.inf:
                raise ValueError(f"{field.name} must be a finite number of 0 or more, got {value}.")
        for name, minimum in MINIMA.items():
            if getattr(self, name) is not None and getattr(self, name) < minimum:
                raise ValueError(f"{name} must be {minimum} or more, got {getattr(self, name)}.")
        check_dims(self.matryoshka_dims)
        if self.packing and self.pack_length < 1:
            raise ValueError(f"pack_length must be 1 or more, got {self.pack_length}; or pass --packing false.")
        if self.max_steps == 0:
            raise ValueError("max_steps must be 1 or more, or -1 to train for num_train_epochs.")
        if self.max_steps < 0 and self.num_train_epochs == 0:
            raise ValueError("num_train_epochs must be above 0, got 0. Raise it, or give --max_steps.")
        if self.lora_alpha is not None and not self.lora_rank and self.stage != "fused-retrieval":
            raise ValueError("lora_alpha is the scale of LoRA's matrices: give --lora_rank too, or leave it out.")

    def _set_metric_for_best_model(self) -> None:
        """transformers' default is a loss that no evaluation here gives, and takes the highest rank for the best."""
        needs_metric = self.load_best_model_at_end or self.save_strategy == "best"
        if self.metric_for_best_model is None:
            if needs_metric or self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
                raise ValueError(
                    "metric_for_best_model must name the metric of an evaluation, such as caption_loss or "
                    "text_to_image_R@1."
                )
        elif self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith(("loss", "rank"))

    def _read_evaluation_config(self) -> None:
        """Reads the options of the evaluation suite into `self.evaluation`."""
        if self.evaluation_config is None:
            return
        if self.stage != "1":
            raise ValueError("evaluation_config is for stage 1; stage 2 evaluates its own adapter.")
        folder = str(self.output_dir)
        options = ["--config", self.evaluation_config, "--model", folder, "--output_dir", folder]
        (self.evaluation,) = parse_options([EvaluationArguments], self.evaluation_config, options)
        if self.evaluation.adapters:
            raise ValueError(f"{self.evaluation_config}: a model in training has no adapters.")

    def _set_up_later_stage(self) -> None:
        """The objective follows from the stage, and there is one learning rate."""
        defaults = {f.name: f.default if f.default is not MISSING else [] for f in fields(self)}
        for name in (*NOT_OF_LATER_STAGES, *NOT_OF_STAGE.get(self.stage, ())):
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} is for other stages, and has no effect in --stage {self.stage}.")
        self.objective = "caption" if self.stage == "region-caption" else "contrastive"
        self.projection_lr_multiplier = 1.0
        if self.stage == "text-distillation":
            self.temperature = DISTILLATION_TAU if self.temperature is None else self.temperature
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}.")


def data_seed(args: TrainingArguments) -> int:
    """Returns the seed of everything random about the data: `--data_seed`, or `--seed`."""
    return args.seed if args.data_seed is None else args.data_seed


def parse_arguments(
    arguments: list[str] | None = None, script: str = "train.py"
) -> tuple[ModelArguments, DataArguments, MMGEMTrainingArguments, DryRunArguments]:
    """
    Parses `--config file.yaml` and `--option value`; the command line wins over the file.

    Raises:
        ValueError: for an unknown option, with the nearest known one; for options that do not go together.
    """
    types = (ModelArguments, DataArguments, MMGEMTrainingArguments, DryRunArguments)
    model_args, data_args, args, dry_run_args = parse_options(types, script, arguments, COMMON)
    if args.stage == "text-distillation":
        _check_text_distillation(model_args, data_args)
    elif bool(model_args.vision_model_name_or_path) != bool(model_args.text_model_name_or_path):
        raise ValueError("vision_model_name_or_path and text_model_name_or_path go together. Give both or neither.")
    elif args.stage != "1":
        _check_adapter(model_args, data_args, args)
    elif model_args.region_grid_size is not None:
        raise ValueError("region_grid_size is for --stage region-caption; stage 1 has --image_grid_size.")
    if data_args.negative_caption_column is not None and (args.stage != "1" or args.objective == "caption"):
        raise ValueError("negative_caption_column is for L_Emb of stage 1. Leave it out.")
    for name in ("text_columns", "teacher_column"):
        if getattr(data_args, name) and args.stage != "text-distillation":
            raise ValueError(f"{name} is of texts, for --stage text-distillation.")
    if args.stage != "text-distillation" and args.distillation_prompt != MMGEMTrainingArguments.distillation_prompt:
        raise ValueError(
            "distillation_prompt is for --stage text-distillation; elsewhere [EMB] embeds a text. Leave it out."
        )
    if data_args.teacher is not None:
        _check_teacher(data_args, args)
    else:
        refuse_feature_folder(args)
        if args.distillation_weight != MMGEMTrainingArguments.distillation_weight:
            raise ValueError("distillation_weight is that of a teacher's loss. Give --teacher, or leave it out.")
    for name in ("train_mixture", "query_instruction", "target_instruction"):
        if getattr(data_args, name) and args.stage != "fused-retrieval":
            raise ValueError(f"{name} is of triplets, for --stage fused-retrieval.")
    if data_args.train_shards and (args.ignore_data_skip or args.train_sampling_strategy != "random"):
        raise ValueError(
            "ignore_data_skip and train_sampling_strategy are for tables: a stream goes on where it was, in its order."
        )
    if args.batch_sampler == "clustered" and (data_args.train_shards or args.train_sampling_strategy != "random"):
        raise ValueError("batch_sampler clustered is for tables, and sets their order. Leave one of the two out.")
    if args.lora_rank and model_args.text_config:
        raise ValueError("lora_rank trains matrices beside a pretrained language model; text_config makes a new one.")
    return model_args, data_args, args, dry_run_args


def _check_text_distillation(model_args: ModelArguments, data_args: DataArguments) -> None:
    """It trains a language model on texts with a teacher, and nothing else."""
    defaults = ModelArguments()
    for name in vars(model_args).keys() - {"text_model_name_or_path", "text_kwargs", "attn_implementation"}:
        if getattr(model_args, name) != getattr(defaults, name):
            raise ValueError(f"{name} has no effect in --stage text-distillation, which has no images. Leave it out.")
    if not model_args.text_model_name_or_path:
        raise ValueError("--stage text-distillation trains a language model: give --text_model_name_or_path.")
    if (data_args.teacher is None) == (data_args.teacher_column is None):
        raise ValueError("Give exactly one of teacher, teacher_column: what the language model learns from.")


def _check_teacher(data_args: DataArguments, args: MMGEMTrainingArguments) -> None:
    """A teacher embeds texts for text-distillation, or captions of a table for stage 1."""
    if args.stage not in ("1", "text-distillation") or args.objective == "caption":
        raise ValueError("teacher is for --stage text-distillation, and for L_Emb of stage 1. Leave it out.")
    if data_args.train_shards and args.stage == "1":
        raise ValueError(
            "teacher embeds all captions before the run, and a stream of train_shards has no end. Give a table, or "
            "leave out --teacher."
        )


def refuse_feature_folder(args: MMGEMTrainingArguments) -> None:
    """Raises ValueError for a folder that nothing would be kept in."""
    if args.feature_cache_dir is not None and not args.cache_features:
        raise ValueError(
            "feature_cache_dir is the folder of cached features, and of what a teacher embeds: pass --cache_features "
            "true too, or --teacher."
        )


def _check_adapter(model_args: ModelArguments, data_args: DataArguments, args: MMGEMTrainingArguments) -> None:
    """An adapter works beside the model that it was trained on, and beside no other."""
    if not model_args.init_from:
        raise ValueError(f"--stage {args.stage} trains an adapter of a stage-1 model: give --init_from FOLDER.")
    for name in ("image_size", "image_grid_size", "contrastive_loss"):
        if getattr(model_args, name) is not None:
            raise ValueError(f"{name} would change the model of --init_from, and the adapter would not fit it.")
    if not model_args.do_center_crop:
        raise ValueError("do_center_crop is a setting of stage 1: an adapter sees images as the model of --init_from.")
    if args.stage != "region-caption" and model_args.region_grid_size is not None:
        raise ValueError("region_grid_size is for captions of regions (--stage region-caption).")
    if data_args.augmentation_scale != 1:
        raise ValueError("augmentation_scale is for stage 1: a random crop would move regions, and what changes.")
    if args.dry_run:
        raise ValueError("The dry run is for stage 1.")
    if args.push_to_hub and not os.path.isdir(model_args.init_from):
        raise ValueError("push_to_hub uploads an adapter together with its base, so --init_from must be a folder.")
