"""The encoder in MTEB's own mock tasks, which need no download."""

import mteb
import numpy as np
import pytest
import torch
from mteb import mocks
from peft import LoraConfig

from mmgem.evaluation.mteb import MMGEMEncoder
from mmgem.training.adapters import add_fused_adapter
from tests.conftest import make_model, make_picture


@pytest.fixture
def encoder(processor, tmp_path):
    make_model(processor).save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    return MMGEMEncoder(str(tmp_path / "tiny"))


@pytest.mark.parametrize(
    "task",
    [
        mocks.MockSTSTask,
        mocks.MockRetrievalTask,
        mocks.MockAny2AnyRetrievalI2TTask,
        mocks.MockAny2AnyRetrievalT2ITask,
        mocks.MockZeroShotClassificationTask,
        mocks.MockImageTextPairClassificationTask,
        mocks.MockImageClassificationTask,
    ],
)
def test_runs_mock_tasks(encoder, task):
    results = mteb.evaluate(encoder, task(), cache=None, show_progress_bar=False)
    scores = results.task_results[0].scores
    assert all(np.isfinite(entry["main_score"]) for split in scores.values() for entry in split)


def test_embeddings_are_the_models_own(encoder, processor):
    texts, pictures = ["a dog", "the cat", "snow"], [make_picture(i) for i in range(3)]

    def encode(**columns):
        batches = [{name: values[i : i + 2] for name, values in columns.items()} for i in (0, 2)]
        return encoder.encode(batches, task_metadata=None, hf_split="test", hf_subset="default")

    model = encoder.model
    with torch.no_grad():
        expected_texts = model.get_embedding(**processor(text=texts, return_tensors="pt")).numpy()
        expected_images = model.get_embedding(**processor(images=pictures, return_tensors="pt")).numpy()
    np.testing.assert_allclose(encode(text=texts), expected_texts, atol=1e-6)
    np.testing.assert_allclose(encode(image=pictures), expected_images, atol=1e-6)
    both = expected_texts + expected_images
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    np.testing.assert_allclose(encode(text=texts, image=pictures), both, atol=1e-6)
    assert np.isfinite(encode(text=["", "a dog", " "])).all()
    with pytest.raises(ValueError, match="this batch has audio"):
        encode(audio=[0, 0, 0])


@torch.no_grad()
def test_an_input_with_both_goes_through_the_adapter(encoder, processor, tmp_path):
    base = make_model(processor)
    adapter = add_fused_adapter(base, LoraConfig(r=2))
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
    adapter.save_pretrained(tmp_path / "fused")
    fused = MMGEMEncoder(str(tmp_path / "tiny"), adapter=str(tmp_path / "fused"), dim=5)
    texts, pictures = ["a dog", "the cat"], [make_picture(i) for i in range(2)]
    inputs = processor(text=texts, images=pictures, task="embed", return_tensors="pt")
    expected = base.eval().get_embedding(**inputs, dim=5)
    np.testing.assert_allclose(fused.encode([{"text": texts, "image": pictures}]), expected.numpy(), atol=1e-5)
    plain = MMGEMEncoder(str(tmp_path / "tiny"), dim=5)
    for batch in ({"text": texts}, {"image": pictures}):
        assert np.array_equal(fused.encode([batch]), plain.encode([batch]))


@torch.no_grad()
def test_short_embeddings(encoder, processor, tmp_path):
    short = MMGEMEncoder(str(tmp_path / "tiny"), dim=5)
    assert short.mteb_model_meta.embed_dim == 5
    texts, pictures = ["a dog", "the cat"], [make_picture(i) for i in range(2)]
    found = short.encode([{"text": texts, "image": pictures}])
    text = encoder.model.get_embedding(**processor(text=texts, return_tensors="pt"), dim=5)
    image = encoder.model.get_embedding(**processor(images=pictures, return_tensors="pt"), dim=5)
    expected = torch.nn.functional.normalize(text + image, dim=-1)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="dim is 17, but embeddings have 16 numbers"):
        MMGEMEncoder(str(tmp_path / "tiny"), dim=17)
