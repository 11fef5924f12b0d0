"""train.py as a user types it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import BertConfig
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from mmgem.evaluation.evaluator import evaluate_model
from tests.conftest import make_picture


ROOT = Path(__file__).parents[2]
TOWERS = [
    "--vision_config",
    '{"model_type": "siglip_vision_model", "vision_use_head": false, "hidden_size": 16, "intermediate_size": 32, '
    '"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}',
    "--text_config",
    '{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}',
]


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Runs train.py in a folder of its own, in this process: it is the script's work that is tested."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

    return run


@pytest.fixture
def pairs(tmp_path):
    """A jsonl of sixteen pictures with two captions each, and relative paths."""
    rows = []
    for i in range(16):
        make_picture(i).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "captions": [f"picture number {i}", f"the {i}th of them"]})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "pairs.jsonl"


def test_the_saved_model_is_judged_in_the_precision_of_its_training(train, pairs, tmp_path, monkeypatch):
    """Its weights are float32, so that autocast alone tells."""
    precisions = []

    def evaluate(*args, **options):
        precisions.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return evaluate_model(*args, **options)

    monkeypatch.setattr("mmgem.training.run.evaluate_model", evaluate)
    data = ["--train_file", pairs, "--validation_file", pairs, "--caption_column", "captions", "--report_to", "none"]
    options = [*data, *TOWERS, "--max_steps", 1, "--per_device_train_batch_size", 4, "--caption_samples", 2]
    for bf16 in ("true", "false"):
        train(*options, "--bf16", bf16, "--generation_num_beams", 2, "--output_dir", bf16)
        setting = json.loads((tmp_path / bf16 / "results.json").read_text())["setting"]
        assert setting["num_beams"] == 2
        assert ("bf16" in setting["dtype"]) == (bf16 == "true")
    assert precisions == [torch.bfloat16, torch.float32]


def test_own_files_from_scratch_then_on_from_that_checkpoint(train, pairs, tmp_path, capsys):
    data = ["--train_file", pairs, "--validation_file", pairs, "--caption_column", "captions", "--report_to", "none"]
    options = ["--max_steps", 3, "--per_device_train_batch_size", 4, "--logging_steps", 1]
    train(*data, *options, *TOWERS, "--output_dir", "first", "--optim", "lamb")
    results = json.loads((tmp_path / "first" / "results.json").read_text())
    metrics = {"text_to_image_R@1", "image_to_text_R@10", "caption_loss", "caption_cider", "caption_bleu4"}
    assert metrics <= results["metrics"].keys()
    setting = results["setting"]
    assert setting["size"] == 16 and setting["steps"] == 3 and setting["split"] == "validation"
    assert {"transformers", "torch", "mmgem"} <= set(setting["versions"])
    for name in ("report.md", "captions.png", "retrieval.png", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "first" / name).is_file(), name
    assert all(f"'{name}'" in capsys.readouterr().out for name in ["contrastive_loss"])

    again = ["--init_from", "first", "--output_dir", "second", "--image_size", 32, "--freeze", "vision_model"]
    train(*data, *options, *again, "--objective", "contrastive")
    printed = capsys.readouterr().out
    assert "'contrastive_loss'" in printed and "'caption_loss'" not in printed
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["vision_config"]["image_size"] == 32
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    changed = {name for name in before if before[name].shape != after[name].shape}
    assert changed == {"vision_model.embeddings.position_embedding.weight"}
    frozen = [name for name in before if name.startswith("vision_model") and name not in changed]
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["text_projection.weight"], after["text_projection.weight"])


def test_what_a_run_changes_against_its_start_is_said_and_nothing_is_evaluated_twice(
    train, pairs, tmp_path, capsys, monkeypatch
):
    data = ["--train_file", pairs, "--validation_file", pairs, "--caption_column", "captions", "--report_to", "none"]
    options = ["--per_device_train_batch_size", 4, "--caption_samples", 0, "--max_steps", 2]
    start = [*TOWERS, "--max_length", 20, "--caption_loss_weight", 4, "--do_center_crop", "false"]
    train(*data, *options, *start, "--output_dir", "first")
    processor = json.loads((tmp_path / "first/processor_config.json").read_text())["image_processor"]
    assert not processor["do_center_crop"] and processor["size"] == {"height": 16, "width": 16}
    assert "was trained with" not in capsys.readouterr().out
    evaluated = []

    def counted(*args, **options):
        evaluated.append(args)
        return evaluate_model(*args, **options)

    for module in ("run", "evaluating_trainer"):
        monkeypatch.setattr(f"mmgem.training.{module}.evaluate_model", counted)
    logged, on_log = [], CallbackHandler.on_log

    def recorded(handler, args, state, control, logs):
        logged.append((state.global_step, logs))
        return on_log(handler, args, state, control, logs)

    monkeypatch.setattr(CallbackHandler, "on_log", recorded)
    again = ["--init_from", "first", "--output_dir", "second", "--eval_strategy", "steps", "--eval_steps", 1]
    train(*data, *options, *again)
    printed = capsys.readouterr().out
    line = "first was trained with --max_length 20 --caption_loss_weight 4.0; this run has max_length 50 and "
    assert line + "caption_loss_weight 1.0." in printed
    assert len(evaluated) == 2, "at step 1 and of the saved files"
    assert [step for step, log in logged if "eval_text_to_image_R@1" in log] == [1, 2], "the curve has its last point"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learning_rat", "1"], "did you mean 'learning_rate'"),
        (["--optim", "lion"], "lion"),
        (["--vision_config", "{"], "vision_config is no JSON"),
        (["--caption_column", "text"], "no column 'text'; its columns are image, captions"),
        (["--freeze", "vision_modle"], "nearest is 'vision_model'"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere holds no whole checkpoint"),
        (["--init_from", "bert", "--vision_config", "{}", "--text_config", "{}"], "'bert' checkpoint, not 'mmgem'"),
        (["--image_column", "captions"], "None of the 16 examples could be read"),
        (["--generation_num_beams", "0"], "generation_num_beams must be 1 or more"),
        (["--pack_length", "20"], "max_length 50 needs 52"),
        (["--dataset_name", "scenes"], "exactly one of dataset_name"),
        (["--caption_loss_weight", "0"], "--objective contrastive"),
        (["--optim", "soap", "--optim_args", "precondition_frequency"], "'precondition_frequency' is not"),
        (["--train_file", "pairs.txt"], "pairs.txt"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--vision_config", "{}"], "Give --init_from CHECKPOINT"),
        (["--vision_config", '{"hidden_size": 16}'], "not a multiple of the number of attention heads"),
        (
            ["--text_config", '{"hiden_size": 16}'],
            "text_config has no setting 'hiden_size'; did you mean 'hidden_size'",
        ),
        (["--vision_config", '{"model_type": "clap"}'], "clap"),
        (
            ["--image_grid_size", "5"],
            "must lie in [1, 2], got 5: 'siglip_vision_model' sees",
        ),
        (["--image_pooling", "cls"], "has no class token"),
        (["--lora_rank", "4"], "lora_rank trains matrices beside a pretrained language model"),
        (
            ["--text_config", '{"hidden_size": 65536, "intermediate_size": 262144}'],
            "are free on this machine. Choose smaller towers",
        ),
    ],
)
def test_mistakes_are_named_before_any_work(train, pairs, tmp_path, arguments, message):
    BertConfig().save_pretrained(tmp_path / "bert")
    options = ["--max_steps", 1, "--per_device_train_batch_size", 4, "--report_to", "none", "--output_dir", "out"]
    with pytest.raises(SystemExit) as error:
        train("--train_file", pairs, "--caption_column", "captions", *options, *TOWERS, *arguments)
    assert message in str(error.value)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_corrupt_pictures_are_skipped_counted_and_too_many_stop_the_run(train, tmp_path, caplog):
    make_picture(0).save(tmp_path / "0.png")
    good = (tmp_path / "0.png").read_bytes()
    rows = [
        {"image": {"bytes": b"broken" if i in (2, 5) else good, "path": None}, "caption": f"n {i}"} for i in range(16)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    options = ["--train_file", "pairs.parquet", "--max_steps", 4, "--per_device_train_batch_size", 4, *TOWERS]
    options += ["--output_dir", "out", "--report_to", "none"]
    logging.enable_propagation()
    train(*options, "--max_bad_fraction", 0.2)
    logging.disable_propagation()
    assert "2 training examples could not be read (2 UnidentifiedImageError; such as 2: " in caplog.text
    with pytest.raises(SystemExit, match=r"max_bad_fraction=0\.01"):
        train(*options)
