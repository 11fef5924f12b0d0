"""The stage fused-retrieval as a user runs it: what moves, its loss, resume, evaluation, faults."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import cross_entropy

from mmgem import MMGEMModel
from mmgem.data.loading import load_triplets
from mmgem.data.pairs import PairDataset
from mmgem.data.triplets import TripletDataset
from mmgem.evaluation.__main__ import main
from mmgem.evaluation.fused import evaluate_fused
from mmgem.modeling_mmgem import Negatives, contrastive_loss
from mmgem.modeling_mmgem.adapters_mmgem import FUSED_ADAPTER
from mmgem.training.adapters import lora_config
from mmgem.training.arguments import MMGEMTrainingArguments, parse_arguments
from mmgem.training.checkpoints import CheckpointError
from mmgem.training.fused_trainer import FusedTrainer
from tests.conftest import Table, make_model, make_picture

from .test_cli import train  # noqa: F401
from .test_region_training import arguments as adapter_arguments
from .test_region_training import checksums


def triplets(count: int = 8) -> TripletDataset:
    """Every third has a negative, every fourth a text for a target."""
    rows = []
    for i in range(count):
        target = {"target_text": f"picture {i}"} if i % 4 == 3 else {"target_image": make_picture(100 + i)}
        negative = {"negative_image": make_picture(200 + i)} if i % 3 == 0 else {}
        rows.append({"query_image": make_picture(i), "query_text": f"the dog {i}", **target, **negative})
    return TripletDataset(Table(rows))


def arguments(tmp_path, **options) -> MMGEMTrainingArguments:
    return adapter_arguments(tmp_path, "fused-retrieval", **{"per_device_train_batch_size": 8, **options})


def state_of_lora(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}


def test_only_the_matrices_move_and_the_model_stays_as_it_was(processor, tmp_path):
    model = make_model(processor, attention_dropout=0.5)
    before = {name.replace("base_layer.", ""): value for name, value in checksums(model).items()}
    texts = processor(text=["a dog", "snow"], return_tensors="pt")
    with torch.no_grad():
        plain = model.eval().get_embedding(**texts)
    trainer = FusedTrainer(model, arguments(tmp_path), processor, triplets())
    start = state_of_lora(model)
    trainer.train()
    assert all(
        not torch.equal(tensor, start[name]) for name, tensor in state_of_lora(model).items() if "lora_B" in name
    )
    after = {name.replace("base_layer.", ""): value for name, value in checksums(model).items() if "lora_" not in name}
    assert after == before
    with torch.no_grad():
        assert torch.equal(model.get_embedding(**texts), plain)
    trainer.save_model()
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]["stage"] == FUSED_ADAPTER


UNIME = {"false_negative_margin": 0.0, "hardest_negatives": 4, "temperature": 0.05}


@pytest.mark.parametrize("options", [{}, UNIME, {**UNIME, "mini_batch_size": 3}], ids=["plain", "UniME", "cached"])
def test_loss_is_that_of_embeddings_computed_one_by_one(processor, tmp_path, options):
    """Plain by hand; with margin, hardest negatives and tau by the loss that stands against loops elsewhere."""
    model, data = make_model(processor), triplets()
    args = arguments(tmp_path, max_steps=1, learning_rate=0.0, matryoshka_dims=[8], **options)
    trainer = FusedTrainer(model, args, processor, data)
    trainer.train()
    logged = trainer.state.log_history[0]["contrastive_loss"]

    @torch.no_grad()
    def embed(item):
        task = {"task": "embed"} if item.is_fused else {}
        inputs = {"text": [item.text]} if item.text else {}
        inputs |= {"images": [item.image]} if item.image is not None else {}
        return model.get_embedding(**processor(**inputs, **task, return_tensors="pt"))

    examples = [data[i] for i in range(8)]
    queries, targets = (torch.cat([embed(example[side]) for example in examples]) for side in ("query", "target"))
    negatives = torch.cat([embed(example["negative"]) for example in examples if example["negative"] is not None])
    scale, right, plain, chosen = model.logit_scale.scale.detach(), torch.arange(8), 0.0, 0.0
    for dim in (8, 16):
        q, t, n = (torch.nn.functional.normalize(part[:, :dim], dim=-1) for part in (queries, targets, negatives))
        plain += cross_entropy(scale * q @ torch.cat([t, n]).T, right) + cross_entropy(scale * t @ q.T, right)
        chosen += contrastive_loss(q, t, torch.tensor(20.0), negative_keys=n, negatives=Negatives(0.0, hardest=4))
    expected, other = (chosen, plain) if options else (plain, chosen)
    assert logged == pytest.approx(float(expected) / 2, rel=1e-4)
    assert logged != pytest.approx(float(other) / 2, rel=1e-2)


def test_a_negative_that_is_the_rows_own_target_is_none_of_it():
    torch.manual_seed(0)
    queries, targets, negatives = (torch.nn.functional.normalize(torch.randn(n, 4), dim=-1) for n in (3, 3, 2))
    ids = torch.tensor([[1, 10], [2, 20], [3, 30]])
    found = contrastive_loss(
        *(queries, targets, torch.tensor(5.0)),
        pair_ids=ids,
        negative_keys=negatives,
        negative_ids=torch.tensor([20, 99]),
    )
    scores = 5 * queries @ torch.cat([targets, negatives]).T
    scores[1, 3] = -torch.inf
    right = torch.arange(3)
    expected = cross_entropy(scores, right) + cross_entropy(5 * targets @ queries.T, right)
    torch.testing.assert_close(found, expected)


def test_resumed_equals_uninterrupted(processor, tmp_path):
    states = []
    for name, stops in (("whole", False), ("halves", True)):
        base = make_model(processor)
        base.save_pretrained(tmp_path / f"base of {name}")
        for resume in (False, True) if stops else (False,):
            model = MMGEMModel.from_pretrained(tmp_path / f"base of {name}")
            options = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
            steps = {} if resume or not stops else {"max_steps": 2}
            args = arguments(tmp_path / name, **{"max_steps": 4, "lr_scheduler_type": "constant", **options, **steps})
            trainer = FusedTrainer(model, args, processor, triplets())
            trainer.train(resume_from_checkpoint=resume or None)
        states.append(state_of_lora(model))
        texts = processor(text=["a dog"], return_tensors="pt")
        with torch.no_grad():
            plain = MMGEMModel.from_pretrained(tmp_path / f"base of {name}").eval().get_embedding(**texts)
            assert torch.equal(model.eval().get_embedding(**texts), plain), "inactive after loading too"
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    with torch.no_grad():
        base.text_projection.weight.add_(1)
    base.save_pretrained(tmp_path / "other")
    other = MMGEMModel.from_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="base_revision"):
        FusedTrainer(other, args, processor, triplets()).train(resume_from_checkpoint=True)


def test_learns_and_is_evaluated(processor, tmp_path):
    """Twelve changes by heart, from a table as it is; the mean of two embeddings finds none of them for sure."""
    model = make_model(processor)
    rows = {"query_image": [make_picture(i % 4) for i in range(12)], "query_text": ["snow", "a dog", "the cat"] * 4}
    data = Dataset.from_dict({**rows, "target_image": [make_picture(50 + i) for i in range(12)]})
    options = {"lora_rank": 8, "eval_strategy": "steps", "eval_steps": 60}
    args = arguments(tmp_path, max_steps=60, per_device_train_batch_size=12, **options)
    trainer = FusedTrainer(model, args, processor, data, data)
    trainer.train()
    metrics = [log for log in trainer.state.log_history if "eval_fused_R@1" in log][-1]
    assert metrics["eval_fused_R@1"] >= 0.9 > metrics["eval_stage_1_fused_R@1"] + 0.3


def test_ranks_and_what_is_left_out(processor, monkeypatch):
    """Against ranks counted by hand; the query's own picture is no candidate, but is with another text."""
    rows = [
        {"query_image": make_picture(0), "query_text": "a", "target_image": make_picture(1)},
        {"query_image": make_picture(1), "query_text": "b", "target_image": make_picture(2)},
        {"query_image": make_picture(1), "query_text": "b", "target_image": make_picture(3)},
        {"query_image": make_picture(4), "query_text": "c", "negative_text": "d"},
        {"query_image": make_picture(1), "query_text": "e", "target_image": make_picture(1), "target_text": "f"},
    ]
    # On a circle: pictures 1, 2, 3 and "1 f" as candidates, and the queries.
    angles = {"1": 0.0, "2": 0.5, "3": 1.0, "1 f": 2.2, "0 a": 0.3, "1 b": 0.2, "1 e": 2.0}
    names = {np.asarray(make_picture(i).convert("RGB")).tobytes(): str(i) for i in range(4)}

    def on_circle(model, processor, images, texts):
        named = (f"{names[np.asarray(i).tobytes()]} {text}".strip() for i, text in zip(images, texts))
        angle = torch.tensor([[angles[name]] for name in named])
        return torch.cat([angle.cos(), angle.sin()], 1)

    monkeypatch.setattr("mmgem.evaluation.fused.embed_mixed", on_circle)
    monkeypatch.setattr("mmgem.evaluation.fused.embed_averaged", lambda m, p, images, texts: torch.ones(len(texts), 2))
    metrics, outputs = evaluate_fused(make_model(processor), processor, TripletDataset(Table(rows)), ks=(1, 2, 3))
    # "0 a" is nearest to 2 (0.2 away), then 1 (0.3), its target. "1 b" is nearest to 1, which is its own picture, then
    # to 2, one of its two targets. "1 e" finds "1 f", which holds its own picture.
    assert outputs["indices"] == [0, 1, 2, 4]
    assert metrics["fused_R@1"] == pytest.approx(3 / 4) and metrics["fused_R@2"] == 1
    assert outputs["candidates"] == [(0, "target"), (1, "target"), (2, "target"), (4, "target")]
    assert outputs["nearest"][1][:2] == [1, 2] and outputs["nearest"][3][0] == 3


def test_checkpointing_changes_nothing(processor, tmp_path):
    """Layers that the backward pass computes anew have the adapter too."""
    states = []
    for name, options in (("plain", {}), ("anew", {"gradient_checkpointing": True})):
        trainer = FusedTrainer(make_model(processor), arguments(tmp_path / name, **options), processor, triplets())
        trainer.train()
        states.append(state_of_lora(trainer.base))
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-5, rtol=0)


def test_frozen_weights_in_bfloat16(processor, tmp_path):
    """Weights that are numbers of bfloat16 are held in it; plain items are computed as fused ones are."""
    model = make_model(processor)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    trainer = FusedTrainer(model, arguments(tmp_path, bf16=True), processor, triplets())
    trainer.train()
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["contrastive_loss"]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_own_matrices_and_other_data(processor, tmp_path):
    config = LoraConfig(r=3, target_modules=["q_proj"])
    trainer = FusedTrainer(make_model(processor), arguments(tmp_path), processor, triplets(), peft_config=config)
    assert {name.split(".")[-4] for name in state_of_lora(trainer.base)} == {"q_proj"}
    with pytest.raises(ValueError, match="train_dataset must be"):
        FusedTrainer(make_model(processor), arguments(tmp_path), processor, PairDataset(Table(pairs())))
    with pytest.raises(ValueError, match=r"8 training examples do not fill one batch of 9"):
        args = arguments(tmp_path, per_device_train_batch_size=9)
        FusedTrainer(make_model(processor), args, processor, triplets())


def pairs():
    return [{"image": make_picture(i), "caption": "a dog"} for i in range(8)]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--dataset_name", "scenes", "--cache_features", "true"], "cache_features is for other stages"),
        (["--dataset_name", "scenes", "--train_sampling_strategy", "sequential"], "train_sampling_strategy is for"),
        (["--dataset_name", "scenes", "--objective", "caption"], "objective is for other stages"),
        (["--dataset_name", "scenes", "--caption_loss_weight", "2"], "caption_loss_weight is for other stages"),
        (["--dataset_name", "scenes", "--region_grid_size", "2"], "region_grid_size is for captions of regions"),
        (["--dataset_name", "scenes", "--train_mixture", "a.yaml"], "exactly one of"),
        (["--dataset_name", "scenes", "--init_from", ""], "give --init_from"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, fault):
    given = ["--stage", "fused-retrieval", "--init_from", "base", "--output_dir", str(tmp_path), *options]
    with pytest.raises(ValueError, match=fault):
        parse_arguments(given)


def test_the_scale_goes_without_the_rank(tmp_path):
    given = ["--stage", "fused-retrieval", "--init_from", "base", "--output_dir", str(tmp_path), "--lora_alpha", "8"]
    args = parse_arguments([*given, "--dataset_name", "scenes"])[2]
    assert (lora_config(args).r, lora_config(args).lora_alpha) == (16, 8)


def test_a_mixture_is_for_this_stage_alone(tmp_path):
    with pytest.raises(ValueError, match="train_mixture is of triplets"):
        parse_arguments(["--train_mixture", "a.yaml", "--output_dir", str(tmp_path)])
    given = ["--dataset_name", "scenes", "--output_dir", str(tmp_path), "--query_instruction", "Find:"]
    with pytest.raises(ValueError, match="query_instruction is of triplets"):
        parse_arguments(given)
    data_args = parse_arguments([*given, "--stage", "fused-retrieval", "--init_from", "base"])[1]
    with pytest.raises(ValueError, match="Composed scenes take no instructions"):
        load_triplets(data_args, 32, 0)


def test_from_the_shell(processor, tmp_path, train, monkeypatch):  # noqa: F811
    """Composed scenes, trained, reported, and evaluated again by the suite."""
    make_model(processor, config={"image_grid_size": 2}).save_pretrained(tmp_path / "base")
    own = copy.copy(processor)
    own.image_grid_size = 2
    own.save_pretrained(tmp_path / "base")
    folder = tmp_path / "base" / "fused-retrieval"
    options = ["--stage", "fused-retrieval", "--init_from", str(tmp_path / "base"), "--output_dir", str(folder)]
    options += ["--dataset_name", "scenes", "--max_train_samples", "64", "--max_eval_samples", "10"]
    train(*options, "--max_steps", "2", "--per_device_train_batch_size", "16", "--use_cpu", "true")
    results = json.loads((folder / "results.json").read_text())
    assert {"fused_R@1", "stage_1_fused_R@10"} <= results["metrics"].keys()
    assert results["setting"]["size"] == 10 and (folder / "fused.png").is_file()
    given = ["--model", str(tmp_path / "base"), "--tasks", "fused", "--dataset_name", "scenes", "--max_samples", "10"]
    given = ["evaluation", *given, "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*given, "--adapters", str(folder)])
    main()
    again = json.loads((tmp_path / "out/results.json").read_text())
    assert again["metrics"] == pytest.approx(results["metrics"])
    assert again["setting"]["sizes"]["Fused retrieval"] == {"size": 10, "left_out": 0, "candidates": 20}
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit, match="give it to --adapters"):
        main()
