"""Options from YAML and the command line."""

import pytest

from mmgem.training.arguments import parse_arguments


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
    assert (args.learning_rate, args.freeze, data_args.packing) == (1e-3, ["vision_model"], False)
    assert data_args.max_eval_samples is None and args.lr_scheduler_kwargs == {"num_cycles": 0.3}
    path.write_text("dataset_name: scenes\nlearning_rat: 1\n")
    with pytest.raises(ValueError, match=r"'learning_rat'.*'learning_rate'"):
        parse_arguments(["--config", str(path)])
    with pytest.raises(ValueError, match=r"'max_step'.*'max_steps'"):
        parse_arguments(["--dataset_name", "scenes", "--max_step", "3"])
    with pytest.raises(ValueError, match="dataset_name, train_file, train_shards or train_annotations"):
        parse_arguments([])


def test_an_estimate_for_gpus_can_be_asked_for_without_one(tmp_path):
    command = ["--dataset_name", "scenes", "--output_dir", str(tmp_path)]
    assert parse_arguments([*command, "--dry_run"])[2].use_cpu
    (tmp_path / "run.yaml").write_text("dry_run: true")
    assert parse_arguments([*command, "--config", str(tmp_path / "run.yaml")])[2].use_cpu
    assert not parse_arguments([*command, "--dry_run", "false"])[2].use_cpu


@pytest.mark.parametrize("option", [["--max_train_samples", "9"], ["--image_column", "picture"]])
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
    assert args.max_grad_norm is None and args.report_to == ["tensorboard", "wandb"]
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
