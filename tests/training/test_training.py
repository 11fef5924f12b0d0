"""Training as a user runs it: arguments, groups, tau, overfitting, bad data, resume."""

import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback
from transformers.utils import logging

from mmgem import MMGEMModel
from mmgem.data.pairs import BadDataError, PairDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.evaluation.evaluator import evaluate_model
from mmgem.training.arguments import MMGEMTrainingArguments
from mmgem.training.checks import check_parallelism
from mmgem.training.stages import freeze_parameters, parameter_groups
from mmgem.training.trainer import MMGEMTrainer
from tests.conftest import Table, make_model, make_picture


ROOT = Path(__file__).parents[2]
CAPTIONS = [
    "a dog on a beach",
    "the cat sat on the mat",
    "two people ride red bicycles",
    "snow on a mountain",
    "a boat in the harbour",
    "an old man reads a newspaper",
    "three birds on a wire",
    "a bowl of green apples",
]


def eight_pictures(**kwargs) -> PairDataset:
    return PairDataset(Table({"image": make_picture(i), "caption": c} for i, c in enumerate(CAPTIONS)), **kwargs)


def training_arguments(tmp_path, **kwargs) -> MMGEMTrainingArguments:
    options = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "projection_lr_multiplier": 1.0,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "packing": False,
    }
    return MMGEMTrainingArguments(**{**options, **kwargs})


@pytest.mark.parametrize("pack_length", [0, 64])
def test_overfits_eight_pictures_and_writes_their_captions(processor, tmp_path, pack_length):
    model = make_model(processor)
    dataset = eight_pictures()
    packing = {"packing": pack_length > 0, "pack_length": pack_length}
    args = training_arguments(tmp_path, max_steps=200, lr_scheduler_type="constant", **packing)
    MMGEMTrainer(model, args, processor, dataset).train()
    metrics, outputs = evaluate_model(model, processor, dataset, batch_size=8, caption_samples=8)
    assert outputs["captions"] == CAPTIONS
    assert metrics["caption_loss"] < 0.1
    assert metrics["text_to_image_R@1"] == metrics["image_to_text_R@1"] == 1
    inputs = processor(images=[make_picture(3)], task="caption", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=60)
    assert ids[0, -1] == processor.tokenizer.eos_token_id and ids.shape[1] < 40


def test_equal_captions_and_equal_pictures_in_a_batch_are_no_negatives(processor, tmp_path):
    pairs = [(0, CAPTIONS[0]), (1, CAPTIONS[0]), (2, CAPTIONS[1]), (2, CAPTIONS[2])]
    dataset = PairDataset(Table({"image": make_picture(i), "caption": c} for i, c in pairs))
    model = make_model(processor)
    with torch.no_grad():
        texts = model.get_embedding(**processor(text=[c for _, c in pairs], return_tensors="pt"))
        images = model.get_embedding(**processor(images=[make_picture(i) for i, _ in pairs], return_tensors="pt"))
        scale = model.logit_scale.weight.exp()
    expected = 0.0
    for i, columns in enumerate(([0, 2, 3], [1, 2, 3], [0, 1, 2], [0, 1, 3])):
        for own, others in ((texts[i], images), (images[i], texts)):
            logits = scale * others @ own
            expected += (logits[columns].logsumexp(0) - logits[i]).item() / 4
    args = training_arguments(tmp_path, max_steps=1, per_device_train_batch_size=4, logging_steps=1)
    trainer = MMGEMTrainer(model, args, processor, dataset)
    trainer.train()
    assert trainer.state.log_history[0]["contrastive_loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow  # compiles
def test_compiled_twice_at_most_in_a_hundred_steps_of_any_number_of_rows(processor, tmp_path, monkeypatch):
    rng = random.Random(0)
    words = " ".join(CAPTIONS).split()
    rows = [
        {"image": make_picture(i), "caption": " ".join(rng.choices(words, k=rng.randint(1, 20)))} for i in range(64)
    ]

    def curve(folder, **options):
        options = {"packing": True, "pack_length": 64, **options}
        args = training_arguments(tmp_path / folder, max_steps=100, logging_steps=1, **options)
        trainer = MMGEMTrainer(make_model(processor), args, processor, PairDataset(Table(rows)))
        collate, numbers = trainer.data_collator, set()

        def collate_and_count(examples):
            batch = collate(examples)
            numbers.add(len(batch["input_ids"]))
            return batch

        trainer.data_collator = collate_and_count
        trainer.train()
        assert len(numbers) >= 3
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    # Logits come in parts here, but for the graph, where each number of parts would make another.
    monkeypatch.setattr("mmgem.modeling_mmgem.losses_mmgem.MAX_LOGITS", 2 * 64 * len(processor.tokenizer))
    torch._dynamo.reset()
    counters.clear()
    plain = curve("plain")
    assert counters["stats"]["unique_graphs"] == 0
    # What the Trainer sets is undone after the test.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=False, capture_scalar_outputs=False):
        compiled = curve("compiled", torch_compile=True, torch_compile_backend="eager")
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]
    torch.testing.assert_close(compiled[:20], plain[:20], rtol=1e-4, atol=0)


def test_fresh_process_gets_the_trainers_embeddings_and_captions(processor, tmp_path):
    model = make_model(processor)
    trainer = MMGEMTrainer(model, training_arguments(tmp_path, max_steps=3), processor, eight_pictures())
    trainer.train()
    trainer.save_model()
    make_picture(0).save(tmp_path / "picture.png")
    script = """
import sys, torch, mmgem
from transformers import AutoModel, AutoProcessor
folder = sys.argv[1]
model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
picture = folder + "/picture.png"
torch.save({"text": model.get_embedding(**processor(text=["a dog on a beach"], return_tensors="pt")).detach(),
  "image": model.get_embedding(**processor(images=[picture], return_tensors="pt")).detach(),
  "ids": model.generate(**processor(images=[picture], task="caption", return_tensors="pt"), max_new_tokens=8)},
  folder + "/outputs.pt")
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=tmp_path, capture_output=True)
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    model.eval()
    inputs = processor(images=[make_picture(0)], return_tensors="pt")
    text = model.get_embedding(**processor(text=["a dog on a beach"], return_tensors="pt"))
    torch.testing.assert_close(outputs["text"], text.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(outputs["image"], model.get_embedding(**inputs).detach(), atol=1e-6, rtol=1e-6)
    prompt = processor(images=[make_picture(0)], task="caption", return_tensors="pt")
    assert torch.equal(outputs["ids"], model.generate(**prompt, max_new_tokens=8))


def test_tau_starts_where_it_should_and_stays_above_its_bound(processor, tmp_path):
    model = make_model(processor)
    assert 1 / model.logit_scale.weight.exp().item() == pytest.approx(0.07)
    # A rate that throws the parameter over the bound in one step, if nothing holds it.
    args = training_arguments(tmp_path, max_steps=3, learning_rate=5.0, objective="contrastive", warmup_steps=0)
    trainer = MMGEMTrainer(model, args, processor, eight_pictures())
    with torch.no_grad():
        model.logit_scale.weight.fill_(4.6)
    seen = []
    model.logit_scale.weight.register_hook(lambda gradient: seen.append(gradient) or -torch.ones_like(gradient))
    trainer.train()
    assert len(seen) == 3
    assert model.logit_scale.weight.item() == pytest.approx(model.config.logit_scale_max_value)


@pytest.mark.parametrize("objective", ["joint", "contrastive", "caption"])
def test_objective_trains_exactly_what_its_loss_reaches(processor, tmp_path, objective):
    model = make_model(processor)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    args = training_arguments(tmp_path, max_steps=1, objective=objective)
    reached = set()

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            reached.update(name for name, parameter in model.named_parameters() if parameter.grad is not None)

    MMGEMTrainer(model, args, processor, eight_pictures(), callbacks=[Keep()]).train()
    still = {name.split(".")[0] for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    expected = {
        "joint": {"region_projection", "soft_prompts"},
        "contrastive": {"region_projection", "soft_prompts", "caption_projection", "lm_head"},
        "caption": {"region_projection", "soft_prompts", "text_projection", "logit_scale"},
    }[objective]
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == expected
    assert expected <= still
    assert reached == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_freezing_by_name(processor):
    model = make_model(processor)
    freeze_parameters(model, "joint", ["vision_model"])
    assert not any(p.requires_grad for p in model.vision_model.parameters())
    assert all(p.requires_grad for p in model.language_model.parameters())
    with pytest.raises(ValueError, match=r"'visual_model'.*'vision_model'"):
        freeze_parameters(model, "joint", ["visual_model"])


def test_projections_learn_ten_times_faster_and_vectors_do_not_decay(processor):
    model = make_model(processor)
    freeze_parameters(model, "joint")
    groups = parameter_groups(model, 5e-5, 10.0, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            projection = name.split(".")[0] in (
                "visual_projection",
                "text_projection",
                "caption_projection",
                "logit_scale",
            )
            assert group["lr"] == pytest.approx(5e-4 if projection else 5e-5), name
            assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0), name
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trained)


@pytest.mark.parametrize(
    "optim, optim_args, options",
    [
        ("lamb", "eps=0.01", {"eps": 0.01}),
        ("soap", "precondition_frequency=2, max_precondition_dim=64", {"precondition_frequency": 2}),
    ],
)
def test_optimizers_of_the_kept_library_train(processor, tmp_path, optim, optim_args, options):
    pytest.importorskip("pytorch_optimizer")
    args = training_arguments(tmp_path, max_steps=3, optim=optim, optim_args=optim_args, adam_beta2=0.9)
    model = make_model(processor)
    before = model.text_projection.weight.detach().clone()
    trainer = MMGEMTrainer(model, args, processor, eight_pictures())
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert type(optimizer).__name__.lower() == optim
    for group in optimizer.param_groups:
        assert group["betas"][1] == 0.9 and group.items() >= options.items()
    assert not torch.equal(model.text_projection.weight, before)


@pytest.mark.parametrize(
    "options", [{"neftune_noise_alpha": 50.0}, {"data_seed": 1}, {"lr_scheduler_type": "constant"}]
)
def test_options_of_transformers_have_their_effect(processor, tmp_path, options):
    losses = []
    for changes in ({}, options, options):
        changes = {"packing": True, "pack_length": 64, "per_device_train_batch_size": 4, **changes}
        args = training_arguments(tmp_path, max_steps=3, logging_steps=1, **changes)
        trainer = MMGEMTrainer(make_model(processor), args, processor, eight_pictures())
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == losses[2] != losses[0]


def test_unreadable_pictures_are_skipped_counted_and_limited(processor, tmp_path):
    rows = Table({"image": make_picture(i), "caption": c} for i, c in enumerate(CAPTIONS * 2))
    rows[3]["image"] = b"this is no picture"
    rows[5]["image"] = "/nowhere/picture.png"
    dataset = PairDataset(rows)
    assert dataset[3]["caption"] == CAPTIONS[4] and dataset[3]["bad"].keys() == {3}
    args = training_arguments(tmp_path, max_steps=4, max_bad_fraction=0.2)
    trainer = MMGEMTrainer(make_model(processor), args, processor, dataset)
    trainer.train()
    assert trainer.counts.bad.keys() == {3, 5} and "FileNotFoundError" in trainer.counts.bad[5]
    with pytest.raises(BadDataError, match=r"such as 3: UnidentifiedImageError.*max_bad_fraction"):
        args = training_arguments(tmp_path, max_steps=4, per_device_train_batch_size=16, max_bad_fraction=0.1)
        MMGEMTrainer(make_model(processor), args, processor, dataset).train()


@pytest.mark.parametrize("bound", [0, 2])
def test_the_log_says_when_data_is_the_bottleneck(processor, tmp_path, monkeypatch, caplog, bound):
    monkeypatch.setattr("mmgem.training.base_trainer.DATA_BOUND", bound)
    logging.get_logger().warning_once.cache_clear()
    args = training_arguments(tmp_path, max_steps=3, logging_steps=1)
    trainer = MMGEMTrainer(make_model(processor), args, processor, eight_pictures())
    logging.enable_propagation()
    trainer.train()
    logging.disable_propagation()
    assert ("Data is the bottleneck" in caplog.text) == (bound == 0)


def test_caption_choice_depends_on_epoch_and_index_alone():
    rows = Table({"image": make_picture(0), "caption": [f"caption {k}" for k in range(50)]} for _ in range(8))
    dataset = PairDataset(rows, seed=1)
    first = [dataset[i]["caption"] for i in range(8)]
    assert [dataset[i]["caption"] for i in reversed(range(8))] == first[::-1]
    assert len(set(first)) > 1
    dataset.set_epoch(1)
    assert [dataset[i]["caption"] for i in range(8)] != first


def fsdp_plugin(fsdp_version=2, state_dict_type="FULL_STATE_DICT"):
    return SimpleNamespace(fsdp_version=fsdp_version, state_dict_type=state_dict_type)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_gpu": 2}, "accelerate launch"),
        ({"deepspeed": True}, "DeepSpeed is not supported"),
        ({"fsdp": fsdp_plugin(fsdp_version=1)}, "fsdp_version: 2"),
        ({"fsdp": fsdp_plugin(state_dict_type="SHARDED_STATE_DICT")}, "choose FULL_STATE_DICT"),
        ({"fsdp": fsdp_plugin(), "optim": "lamb"}, "lamb looks at whole matrices"),
        ({"fsdp": fsdp_plugin(), "eval_strategy": "steps"}, "--eval_strategy no"),
        ({"fsdp": fsdp_plugin(), "lora": True}, "without FSDP"),
        ({"world_size": 2, "average_tokens_across_devices": False}, "average_tokens_across_devices"),
    ],
)
def test_parallelism_that_would_train_on_other_gradients_is_refused(changes, message):
    sharding = {name: changes.pop(name) for name in ("fsdp", "deepspeed", "lora") if name in changes}
    plain = {"n_gpu": 0, "world_size": 1, "average_tokens_across_devices": True, "optim": "adamw_torch"}
    plain |= {"eval_strategy": "no"}
    check_parallelism(SimpleNamespace(**plain))
    check_parallelism(SimpleNamespace(**plain), fsdp_plugin())
    with pytest.raises(ValueError, match=message):
        check_parallelism(SimpleNamespace(**plain | changes), **sharding)


def test_processes_that_would_each_train_alone_are_refused(processor, tmp_path, monkeypatch):
    args = training_arguments(tmp_path, max_steps=1)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does, where Trainer takes no notice of it
    with pytest.raises(ValueError, match=r"2 processes .* one of 1; on CPU pass --use_cpu true"):
        check_parallelism(args)


def test_language_model_that_mixes_packed_sequences_is_refused(processor, tmp_path):
    # OPT counts its positions by the attention mask, whatever position_ids say.
    options = {"ffn_dim": 64, "max_position_embeddings": 512, "word_embed_proj_dim": 32}
    model = make_model(processor, model_type="opt", **options)
    args = training_arguments(tmp_path, max_steps=1)
    packed = training_arguments(tmp_path, max_steps=1, packing=True, pack_length=64)
    with pytest.raises(ValueError, match=r"'opt'.*--packing false"):
        MMGEMTrainer(model, packed, processor, eight_pictures())
    MMGEMTrainer(model, args, processor, eight_pictures()).train()
    MMGEMTrainer(make_model(processor), packed, processor, eight_pictures())


def test_gradient_cache_with_dropout_is_refused(processor, tmp_path):
    args = training_arguments(tmp_path, max_steps=1, mini_batch_size=2)
    with pytest.raises(ValueError, match=r"language_model.*attention_dropout is 0\.1"):
        MMGEMTrainer(make_model(processor, attention_dropout=0.1), args, processor, eight_pictures())
    MMGEMTrainer(make_model(processor), args, processor, eight_pictures()).train()


def test_fewer_pairs_than_a_batch_are_refused(processor, tmp_path):
    args = training_arguments(tmp_path, max_steps=1, per_device_train_batch_size=9)
    with pytest.raises(ValueError, match="8 training examples do not fill one batch of 9"):
        MMGEMTrainer(make_model(processor), args, processor, eight_pictures())


def test_scenes_are_a_table_of_pairs(processor):
    dataset = PairDataset(ScenesDataset("test", 3, image_size=32))
    assert dataset.captions() == [[caption] for caption in dataset.table["caption"]]
    assert dataset[1]["caption"] == dataset.table["caption"][1]
    assert isinstance(make_model(processor), MMGEMModel)


@pytest.mark.parametrize("pack_length", [0, 256])
def test_sequences_longer_than_the_positions_are_refused_before_training(processor, tmp_path, pack_length):
    """In packed rows, whose length says nothing, they would be an IndexError, on a GPU a device-side assert."""
    gpt2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "max_position_embeddings": 40}
    model = make_model(processor, model_type="gpt2", **gpt2)
    args = training_arguments(tmp_path, max_steps=1, packing=pack_length > 0, pack_length=pack_length)
    dataset = PairDataset(ScenesDataset("train", 16, 32))
    with pytest.raises(ValueError, match=r"52 tokens, but 'gpt2' has positions for 40 only; lower --max_length to 38"):
        MMGEMTrainer(model, args, processor, dataset)


def test_a_processor_of_another_k_is_refused_before_training(processor, tmp_path):
    """Each caption would see visual tokens of other images."""
    model, args = make_model(processor, config={"image_grid_size": 2}), training_arguments(tmp_path, max_steps=1)
    with pytest.raises(
        ValueError, match=r"image_grid_size 1, but the model's is 2: set processor.image_grid_size = 2"
    ):
        MMGEMTrainer(model, args, processor, PairDataset(ScenesDataset("train", 16, 32)))
