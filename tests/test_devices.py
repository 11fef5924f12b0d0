"""Everything the model does, on an emulated accelerator with two devices: the CPU's values, and who waits for them."""

import copy

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from accelerate.state import AcceleratorState
from peft import LoraConfig

from mmgem.data.pairs import PairDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.modeling_mmgem.adapters_mmgem import REGION_ADAPTERS
from mmgem.training.adapters import add_fused_adapter, add_region_adapter
from mmgem.training.arguments import MMGEMTrainingArguments
from mmgem.training.trainer import MMGEMTrainer
from tests import emulated_accelerator
from tests.conftest import make_model, make_picture


DEVICE = "pretend:2"
# The embeddings stay apart from the language model, whose states meet them at its head.
TWO_DEVICES = {
    **dict.fromkeys(("vision_model", "visual_projection", "region_projection", "logit_scale"), "pretend:1"),
    **dict.fromkeys(("language_model", "lm_head", "text_projection"), DEVICE),
    **dict.fromkeys(("caption_projection", "soft_prompts", "pool_aggregator"), "pretend:1"),
}
BOXES = [[[2.0, 3.0, 20.0, 30.0], [5.0, 5.0, 40.0, 38.0]], [[0.0, 0.0, 48.0, 40.0]]]


def on_one_device(model):
    return model.to(DEVICE)


def over_two_devices(model):
    return dispatch_model(model, TWO_DEVICES, main_device=DEVICE)


def everything(model, processor, device):
    """What a user can ask of a model, by name."""
    images = [make_picture(i) for i in range(2)]
    masks = [[np.asarray(make_picture(i).convert("L")) > 99 for i in range(2)]] * 2

    def inputs(**kwargs):
        return processor(return_tensors="pt", **kwargs).to(device)

    texts = inputs(text=["a dog on a beach", "snow"])
    prompts = inputs(images=images, task="caption")
    regions = inputs(images=images, boxes=BOXES, task="region-caption")
    both = inputs(text=["a dog", "snow on a mountain"], images=images)
    labels = torch.where(prompts["input_ids"].eq(processor.image_token_id), -100, prompts["input_ids"])
    with torch.no_grad():
        return {
            "texts": model.get_embedding(**texts),
            "images": model.get_embedding(**inputs(images=images)),
            "boxes": model.get_embedding(**inputs(images=images, boxes=BOXES)),
            "masks": model.get_embedding(**inputs(images=images, masks=masks)),
            "logits_per_image": model(**both, return_loss=True).logits_per_image,
            "loss": model(**both, return_loss=True).loss,
            "caption_loss": model(**prompts, labels=labels).loss,
            "logits": model(**prompts).logits,
            "greedy": model.generate(**prompts, max_new_tokens=5, do_sample=False),
            "beams": model.generate(**prompts, max_new_tokens=5, do_sample=False, num_beams=2),
            "regions": model.generate(**regions, max_new_tokens=5, do_sample=False),
            "scores": model.score(**inputs(images=images, text=["a dog", "snow on a beach"], task="score"), alpha=0.5),
        }


@pytest.mark.parametrize("place", [on_one_device, over_two_devices])
def test_embeddings_losses_and_captions_are_those_of_the_cpu(processor, place, monkeypatch):
    monkeypatch.setattr("mmgem.modeling_mmgem.generation_mmgem.MAX_ROWS", 2)  # three regions come in parts
    expected = everything(make_model(processor), processor, "cpu")
    found = everything(place(make_model(processor)), processor, DEVICE)
    for name, value in expected.items():
        assert found[name].device.type == "pretend", name
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("place", [on_one_device, over_two_devices])
def test_fused_queries(processor, place, tmp_path):
    adapter = add_fused_adapter(make_model(processor), LoraConfig(r=2))
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapter.save_pretrained(tmp_path)
    found = []
    for model, device in ((make_model(processor), "cpu"), (place(make_model(processor)), DEVICE)):
        model.load_adapter(str(tmp_path), adapter_name="fused-retrieval")
        inputs = {"images": [make_picture(i) for i in range(2)], "text": ["but red", "a dog on a beach"]}
        with torch.no_grad():
            fused = model.get_embedding(**processor(**inputs, task="embed", return_tensors="pt").to(device))
            without_placeholders = processor(**inputs, return_tensors="pt").to(device)
            features = model.get_fused_features(**without_placeholders).pooler_output
        assert fused.device.type == device.partition(":")[0]
        torch.testing.assert_close(torch.nn.functional.normalize(features, dim=-1), fused)
        found.append(fused.cpu())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", [on_one_device, over_two_devices])
def test_both_adapters(processor, place, tmp_path):
    for stage in REGION_ADAPTERS:
        add_region_adapter(make_model(processor), stage, 1).save_pretrained(tmp_path / stage)

    def with_adapters(model, device):
        for stage in REGION_ADAPTERS:
            model.load_adapter(str(tmp_path / stage), adapter_name=stage)
        model.set_adapter(list(REGION_ADAPTERS))
        return everything(model, processor, device)

    expected = with_adapters(make_model(processor), "cpu")
    found = with_adapters(place(make_model(processor)), DEVICE)
    for name in ("boxes", "masks", "regions"):
        torch.testing.assert_close(found[name].cpu(), expected[name], rtol=1e-5, atol=1e-5)


def test_generate_waits_for_the_stopping_check_alone(processor):
    model = make_model(processor).to(DEVICE)
    inputs = processor(images=[make_picture(0)], task="caption", return_tensors="pt").to(DEVICE)
    counts = []
    for tokens in (3, 8):
        with emulated_accelerator.waits() as waits:
            model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        counts.append(len([wait for wait in waits if "generation/utils.py" not in wait]))
        per_token = [wait for wait in waits if "generation/utils.py, __call__" in wait]
        assert len(per_token) == tokens, waits
    assert counts[0] == counts[1]


@pytest.fixture
def accelerator(monkeypatch):
    """transformers' Trainer trains on the emulated device."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", DEVICE)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    AcceleratorState._reset_state(reset_partial_state=True)


def step(processor, tmp_path, pack_length=0, image_grid_size=1, **options):
    """The Trainer's loss and gradients of one batch, and who waited for the device."""
    defaults = {"per_device_train_batch_size": 4, "max_steps": 1, "report_to": "none", "disable_tqdm": True}
    defaults |= {"packing": pack_length > 0, "pack_length": pack_length}
    args = MMGEMTrainingArguments(output_dir=str(tmp_path), **defaults, **options)
    processor = copy.copy(processor)
    processor.image_grid_size = image_grid_size
    model = make_model(processor, config={"image_grid_size": image_grid_size})
    trainer = MMGEMTrainer(model, args, processor, PairDataset(ScenesDataset("train", 4, 32)))
    trainer.create_optimizer()
    batches = iter(trainer.get_train_dataloader())
    trainer.current_gradient_accumulation_steps = 1
    (batch,), count = trainer.get_batch_samples(batches, 1, args.device)
    with emulated_accelerator.waits() as waits:
        loss = trainer.training_step(trainer._wrap_model(trainer.model), batch, count)
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    assert model.device == args.device
    return loss.cpu(), gradients, waits


def test_projections_start_on_the_accelerator_where_the_model_waits_on_the_cpu(
    processor, tmp_path, accelerator, monkeypatch
):
    """As under FSDP, which shards the model later."""
    monkeypatch.setattr(MMGEMTrainingArguments, "place_model_on_device", False)
    devices = []
    monkeypatch.setattr("mmgem.training.trainer.start_projections", lambda model, *args: devices.append(model.device))
    monkeypatch.setattr("transformers.Trainer.train", lambda self, *args, **kwargs: devices.append(self.base.device))
    monkeypatch.setattr(MMGEMTrainer, "_refuse_diverged", lambda self: None)
    options = {"per_device_train_batch_size": 4, "max_steps": 1, "report_to": "none", "disable_tqdm": True}
    model = make_model(processor)
    model.has_new_projections = True
    data = PairDataset(ScenesDataset("train", 4, 32))
    MMGEMTrainer(model, MMGEMTrainingArguments(str(tmp_path), **options), processor, data).train()
    assert [str(device) for device in devices] == [DEVICE, "cpu"]


STEPS = {
    "packed": {"pack_length": 256},
    "padded": {},
    "gradient cache": {"pack_length": 256, "mini_batch_size": 2},
    "contrastive": {"pack_length": 256, "objective": "contrastive"},
    "captions": {"pack_length": 256, "objective": "caption"},
    "bf16": {"pack_length": 256, "bf16": True},
    "visual tokens": {"pack_length": 256, "image_grid_size": 2},
}


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_stage_1_trains_as_on_the_cpu_and_nothing_of_ours_waits(processor, tmp_path, options, request):
    expected, gradients, _ = step(processor, tmp_path, use_cpu=True, **options)
    request.getfixturevalue("accelerator")
    loss, found, waits = step(processor, tmp_path, **options)
    torch.testing.assert_close(loss, expected)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    assert [wait for wait in waits if "transformers/masking_utils.py" not in wait] == []
