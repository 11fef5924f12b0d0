"""Weights in 16 bits, computing in 16 bits."""

import pytest
import torch

from mmgem import MMGEMModel
from mmgem.data.pairs import PairDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.evaluation.evaluator import evaluate_model, held_out_caption_loss
from mmgem.training.arguments import MMGEMTrainingArguments
from mmgem.training.building import build_model_and_processor
from mmgem.training.model_arguments import ModelArguments
from mmgem.training.trainer import MMGEMTrainer
from tests.conftest import make_model, make_picture


OPTIONS = {
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "packing": False,
}


@pytest.fixture
def scenes():
    return PairDataset(ScenesDataset("train", 8, 32))


def test_a_checkpoint_in_16_bits_trains_in_float32(processor, scenes, tmp_path):
    """At this rate a step is a hundredth of the distance between two numbers of bfloat16."""
    make_model(processor).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    model, own = build_model_and_processor(ModelArguments(init_from=str(tmp_path / "half")), scenes, 50)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    args = MMGEMTrainingArguments(output_dir=str(tmp_path), max_steps=2, learning_rate=1e-6, bf16=True, **OPTIONS)
    MMGEMTrainer(model, args, own, scenes).train()
    moved = [n for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(moved) > 0.9 * len(trained) and {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_cpu_computes_in_16_bits_without_being_asked_to_be_one(tmp_path, monkeypatch, caplog):
    options = {**OPTIONS, "use_cpu": False}
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for has_instructions in (True, False):
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda has=has_instructions: {"avx512_bf16": has}, raising=False
        )
        args = MMGEMTrainingArguments(output_dir=str(tmp_path), bf16=True, **options)
        assert args.use_cpu and args.device.type == "cpu"
        assert ("no instructions for bfloat16" in caplog.text) != has_instructions
    assert not MMGEMTrainingArguments(output_dir=str(tmp_path), **options).use_cpu


def test_a_model_in_16_bits_is_refused_by_name(processor, scenes, tmp_path):
    args = MMGEMTrainingArguments(output_dir=str(tmp_path), max_steps=1, **OPTIONS)
    model = make_model(processor).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"vision_model.* is torch.bfloat16.*dtype=torch.float32"):
        MMGEMTrainer(model, args, processor, scenes)


def test_evaluation_while_training_computes_as_training_does(processor, scenes, tmp_path):
    """Embeddings and captions as well as the loss, which alone goes through the forward that Accelerate wraps."""
    args = MMGEMTrainingArguments(output_dir=str(tmp_path), max_steps=1, bf16=True, **OPTIONS)
    model = make_model(processor)
    trainer = MMGEMTrainer(model, args, processor, scenes, scenes)
    dtypes = []
    model.visual_projection.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    found = trainer.evaluate()
    found.pop("epoch", None)
    assert set(dtypes) == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        expected = evaluate_model(make_model(processor), processor, scenes, args.per_device_eval_batch_size)[0]
    assert found == pytest.approx({f"eval_{name}": value for name, value in expected.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_and_temperature_are_float32_whatever_the_weights_are(processor, dtype, tmp_path):
    model = make_model(processor).to(dtype)
    texts = processor(text=["a dog on a beach", "snow", "the cat"], return_tensors="pt")
    embeds = model.get_embedding(**texts)
    assert embeds.dtype == torch.float32
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3))
    assert model.dtype == dtype
    model.save_pretrained(tmp_path)
    for loaded in (model, MMGEMModel.from_pretrained(tmp_path), MMGEMModel.from_pretrained(tmp_path, dtype=dtype)):
        assert loaded.dtype == dtype
        inputs = processor(text=["snow"], images=[make_picture(0)], return_tensors="pt").to(dtype)
        assert loaded(**inputs).logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-6)


def test_held_out_loss_never_holds_all_logits(processor, scenes, monkeypatch):
    """Of 8 captions of 50 tokens it needs those of the captions' own tokens, some at a time, and not in training."""
    model = make_model(processor)
    expected = held_out_caption_loss(model, processor, scenes, 8)
    rows = []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: rows.append(logits.numel()))
    limit = 20 * model.config.text_config.vocab_size
    monkeypatch.setattr("mmgem.modeling_mmgem.losses_mmgem.MAX_LOGITS", limit)
    assert held_out_caption_loss(model, processor, scenes, 8) == pytest.approx(expected)
    assert max(rows) <= limit and len(rows) > 10
