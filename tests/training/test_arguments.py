"""Options from YAML and the command line."""

import importlib.util
import math
import re
from dataclasses import fields

import pytest
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from mmgem.output_lock import output_lock
from mmgem.training.arguments import MMGEMTrainingArguments, parse_arguments
from mmgem.training.checks import UNSUPPORTED
from mmgem.training.stages import check_optimizer


TOWERS = ["--vision_model_name_or_path", "a", "--text_model_name_or_path", "b"]


def test_options_come_from_yaml_and_the_command_line_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"dataset_name: scenes\nmax_steps: 5\noutput_dir: {tmp_path}\nvision_config: {{hidden_size: 8}}\n")
    model_args, data_args, args, _ = parse_arguments(
        ["--config", str(path), "--max_steps", "7", "--objective", "caption"]
    )
    assert (args.max_steps, args.objective, data_args.dataset_name) == (7, "caption", "scenes")
    assert model_args.vision_config == {"hidden_size": 8}
    path.write_text(
        f"dataset_name: scenes\noutput_dir: {tmp_path}\nlearning_rate: 1e-3\nfreeze: vision_model\npacking: false\n"
        "max_eval_samples: null\nlr_scheduler_kwargs: {num_cycles: 0.3}\n"
    )
    _, data_args, args, _ = parse_arguments(["--config", str(path)])
    assert (args.learning_rate, args.freeze, args.packing) == (1e-3, ["vision_model"], False)
    assert data_args.max_eval_samples is None and args.lr_scheduler_kwargs == {"num_cycles": 0.3}
    path.write_text("dataset_name: scenes\nlearning_rat: 1\n")
    with pytest.raises(ValueError, match=r"'learning_rat'.*'learning_rate'"):
        parse_arguments(["--config", str(path)])
    with pytest.raises(ValueError, match=r"'max_step'.*'max_steps'"):
        parse_arguments(["--dataset_name", "scenes", "--max_step", "3"])
    with pytest.raises(ValueError, match="dataset_name, train_file, train_mixture, train_shards, train_annotations"):
        parse_arguments([])


def test_one_configuration_file_with_dates_as_they_stand(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("dataset_name: scenes\noutput_dir: 2026-01-02\n")
    assert parse_arguments(["--config", str(path)])[2].output_dir == "2026-01-02"
    with pytest.raises(ValueError, match="--config is given 2 times"):
        parse_arguments(["--config", str(path), "--config", str(path)])


def test_a_path_that_the_locale_cannot_write_is_refused():
    undecoded = "gr\udcc3\udcb6\udcc3\udc9fe"  # how Python reads "größe" where the locale is ASCII
    with pytest.raises(ValueError, match=r"'gr\\udcc3.* cannot be a path in this locale.* PYTHONUTF8=1"):
        parse_arguments(["--dataset_name", "scenes", "--output_dir", undecoded])
    with pytest.raises(ValueError, match="PYTHONUTF8=1"), output_lock(undecoded):
        pass


def test_an_estimate_for_gpus_can_be_asked_for_without_one(tmp_path):
    command = ["--dataset_name", "scenes", "--output_dir", str(tmp_path)]
    assert parse_arguments([*command, "--dry_run"])[2].use_cpu
    (tmp_path / "run.yaml").write_text("dry_run: true")
    assert parse_arguments([*command, "--config", str(tmp_path / "run.yaml")])[2].use_cpu
    assert not parse_arguments([*command, "--dry_run", "false"])[2].use_cpu


@pytest.mark.parametrize(
    "option",
    [
        *(["--max_train_samples", "9"], ["--image_column", "picture"]),
        *(["--ignore_data_skip", "true"], ["--train_sampling_strategy", "sequential"]),
    ],
)
def test_options_of_tables_are_refused_for_streams(option):
    with pytest.raises(ValueError, match="are for tables"):
        parse_arguments(["--train_shards", "a.tar", "--output_dir", "out", *option])


def test_lists_and_nothing_in_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    lines = [
        "dataset_name: scenes",
        f"output_dir: {tmp_path}",
        "max_grad_norm: null",
        "report_to: [tensorboard, wandb]",
    ]
    path.write_text("\n".join([*lines, "freeze: [vision_model, lm_head]"]))
    args = parse_arguments(["--config", str(path)])[2]
    assert args.max_grad_norm == 0 and args.report_to == ["tensorboard", "wandb"]
    assert args.freeze == ["vision_model", "lm_head"]
    with pytest.raises(ValueError, match="'stray'"):
        parse_arguments(["--config", str(path), "stray"])
    for line, message in (("max_steps: [1]", "max_steps takes one value"), ("a: [", "run.yaml is no YAML")):
        path.write_text("\n".join([*lines, line]))
        with pytest.raises(ValueError, match=message):
            parse_arguments(["--config", str(path)])


@pytest.mark.parametrize("line, option", [("objective: contrastve", "objective"), ("max_steps: many", "max_steps")])
def test_values_from_yaml_are_checked_like_those_of_the_command_line(tmp_path, capsys, line, option):
    path = tmp_path / "run.yaml"
    path.write_text(f"dataset_name: scenes\noutput_dir: {tmp_path}\n{line}\n")
    with pytest.raises(SystemExit):
        parse_arguments(["--config", str(path)])
    assert f"argument --{option}" in capsys.readouterr().err


@pytest.mark.parametrize("word, meaning", [("true", True), ("false", None), ("outputs/a", "outputs/a")])
def test_resume_is_a_switch_or_a_folder(tmp_path, word, meaning):
    command = ["--dataset_name", "scenes", "--output_dir", str(tmp_path), "--resume_from_checkpoint", word]
    assert parse_arguments(command)[2].resume_from_checkpoint == meaning


# Those of transformers' options that do here what its documentation says. A new one must be tried, and then be added
# here or to UNSUPPORTED.
EFFECTIVE = set(
    re.findall(
        r"\w+",
        """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    gradient_accumulation_steps average_tokens_across_devices max_grad_norm bf16 fp16 tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode neftune_noise_alpha torch_empty_cache_steps
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start
    save_only_model save_strategy save_steps save_on_each_node save_total_limit push_to_hub hub_token
    hub_private_repo hub_model_id hub_revision load_best_model_at_end metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
    accelerator_config dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor
    dataloader_multiprocessing_context train_sampling_strategy ddp_find_unused_parameters ddp_bucket_cap_mb
    ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config debug skip_memory_metrics
    resume_from_checkpoint local_rank
""",
    )
)


def test_every_option_of_transformers_has_its_effect_or_is_refused():
    names = {field.name for field in fields(TrainingArguments)}
    assert names - EFFECTIVE - UNSUPPORTED.keys() == set()
    assert EFFECTIVE & UNSUPPORTED.keys() == set()


OTHER_VALUES = {"hub_strategy": "every_save", "optim_target_modules": "all-linear", "deepspeed": "ds.json"}
OTHER_VALUES |= {"liger_kernel_config": {"rope": True}, "parallelism_config": object(), "label_names": ["labels"]}
OTHER_VALUES |= {"include_num_input_tokens_seen": "all", "include_for_metrics": ["loss"], "length_column_name": "n"}
OTHER_VALUES |= {"label_smoothing_factor": 0.1, "eval_accumulation_steps": 2}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_option_without_effect_is_refused_by_its_name(tmp_path, name):
    default = {field.name: field.default for field in fields(MMGEMTrainingArguments)}[name]
    value = OTHER_VALUES.get(name, not default)
    with pytest.raises(ValueError, match=rf"^{name} is not supported: .* Leave out --{name}\."):
        MMGEMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy 'group_by_length'"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config's split_batches"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config's dispatch_batches"),
        ({"neftune_noise_alpha": 5, "mini_batch_size": 4}, "neftune_noise_alpha is not supported beside"),
        ({"neftune_noise_alpha": 5, "stage": "region-caption"}, "neftune_noise_alpha is for stage 1"),
        ({"torch_empty_cache_steps": 5, "mini_batch_size": 4}, "torch_empty_cache_steps is not supported beside"),
        ({"load_best_model_at_end": True}, "metric_for_best_model must name"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "metric_for_best_model must name"),
        ({"save_strategy": "best"}, "metric_for_best_model must name"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be 1 or more, got 0"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be 1 or more, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be 1 or more, got 0"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be 0 or more, got -1"),
        ({"max_steps": 0}, "max_steps must be 1 or more"),
        ({"weight_decay": math.nan}, "weight_decay must be a finite number of 0 or more, got nan"),
        ({"caption_loss_weight": math.inf}, "caption_loss_weight must be a finite number of 0 or more, got inf"),
        ({"projection_lr_multiplier": -1.0}, "projection_lr_multiplier must be a finite number of 0 or more, got -1"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number of 0 or more"),
        ({"num_train_epochs": -1.0}, "num_train_epochs must be a finite number of 0 or more"),
        ({"num_train_epochs": 0.0}, "num_train_epochs must be above 0, got 0"),
        ({"lora_alpha": 8}, "lora_alpha is the scale of LoRA's matrices: give --lora_rank too"),
        ({"lora_rank": 2, "lora_alpha": 0}, "lora_alpha must be 1 or more, got 0"),
        ({"do_train": False}, r"do_train is not supported: train.py always trains.* Leave out --do_train"),
    ],
)
def test_values_that_could_not_have_their_effect_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        MMGEMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--projection_dim", "0"], "projection_dim must be 1 or more, got 0"),
        (["--projection_dim", "99", "--init_from", "a"], "projection_dim of the checkpoint of --init_from is kept"),
        (["--vocab_size", "99", "--init_from", "a"], "vocab_size is for a model from scratch"),
        (["--vocab_size", "99", *TOWERS], "vocab_size is for a model from scratch"),
        (["--text_config", '{"hidden_size": 8}', *TOWERS], "text_config is for a model from scratch"),
        (["--max_bad_fraction", "nan"], r"max_bad_fraction must lie in \[0, 1\], got nan"),
        (["--do_train", "false"], "do_train is not supported"),
        (["--vision_config", "[" * 100_000], "vision_config is no JSON: it is nested more than"),
        (["--pack_length", "0"], "pack_length must be 1 or more, got 0"),
        (["--lr_scheduler_kwargs", '{"a": ' * 100_000], "An option holds JSON that is nested too deeply"),
        (["--projection_lr_multiplier", "-1"], "projection_lr_multiplier must be a finite number"),
    ],
)
def test_options_that_would_be_ignored_or_fail_later_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--dataset_name", "scenes", "--output_dir", str(tmp_path), "--use_cpu", *options])


def test_what_is_not_given_takes_its_default(tmp_path):
    model_args, _, args, _ = parse_arguments(["--dataset_name", "scenes", "--output_dir", str(tmp_path), "--use_cpu"])
    assert (model_args.projection_dim, model_args.vocab_size, args.do_train) == (512, 4096, True)


@pytest.mark.parametrize("metric, greater", [("caption_loss", False), ("text_to_image_median_rank", False)])
def test_a_lower_loss_or_rank_is_better(tmp_path, metric, greater):
    options = {"eval_strategy": "steps", "metric_for_best_model": metric, "load_best_model_at_end": True}
    assert MMGEMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options).greater_is_better == greater
    options["metric_for_best_model"] = "text_to_image_R@1"
    assert MMGEMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options).greater_is_better


@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames])
def test_every_optimizer_is_made_or_refused_by_its_name(tmp_path, optim):
    """Those of packages that are not installed are refused too; bitsandbytes may be."""
    args = MMGEMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, optim=optim)
    of_bitsandbytes = any(part in optim for part in ("bit", "bnb", "ademamix"))
    if optim in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"):
        check_optimizer(args)
    elif not (of_bitsandbytes and importlib.util.find_spec("bitsandbytes")):
        with pytest.raises(ValueError, match=f"--optim {optim} .* cannot be set up: "):
            check_optimizer(args)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"optim_args": "amsgrad=true"}, "'amsgrad' of --optim_args has no effect"),
        ({"optim_args": "eps=0.01"}, "'eps' of --optim_args has no effect"),
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "'momentun' of --optim_args has no effect"),
        ({"optim": "lamb", "optim_args": "fixed_dekay=true"}, "'fixed_dekay' of --optim_args has no effect"),
        ({"optim": "lamb", "optim_args": "weight_decay=0.1"}, "'weight_decay' of --optim_args has no effect"),
        ({"adam_beta1": 1.5}, "beta"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, "cycles"),
    ],
)
def test_options_of_optimizer_and_schedule_are_tried_before_the_run(tmp_path, options, message):
    with pytest.raises(ValueError, match=f"cannot be set up: .*{message}"):
        check_optimizer(MMGEMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options))
    right = {"optim": "sgd", "optim_args": "momentum=0.9"}
    check_optimizer(MMGEMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **right))


def test_help_shows_what_is_ours_and_what_is_common_and_the_rest_on_demand(capsys):
    shown = {}
    for word in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            parse_arguments([word])
        shown[word] = capsys.readouterr().out
    assert "--lora_rank" in shown["--help"] and "--learning_rate" in shown["--help"]
    assert "--full_determinism" not in shown["--help"] and "--full_determinism" in shown["--help_all"]
    assert "--help_all" in shown["--help"] and len(shown["--help"]) < 0.6 * len(shown["--help_all"])
