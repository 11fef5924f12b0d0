"""The exported folder in sentence-transformers: the same embeddings."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings
from transformers import AutoModel, AutoProcessor

from ..conftest import make_picture


TEXTS = ["a dog on a beach", "snow", "the cat sat on the mat and two people ride red bicycles on a mountain " * 9]


@pytest.fixture(scope="module")
def encoder(exported) -> SentenceTransformer:
    return SentenceTransformer(str(exported), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def embed(trained):
    model, processor = AutoModel.from_pretrained(trained).eval(), AutoProcessor.from_pretrained(trained)

    @torch.inference_mode()
    def embed(**inputs):
        return model.get_embedding(**processor(**inputs, return_tensors="pt")).numpy()

    return embed


def test_texts_and_pictures(encoder, embed):
    pictures = [make_picture(0), make_picture(1, (30, 60))]
    np.testing.assert_allclose(encoder.encode(TEXTS), embed(text=TEXTS), atol=1e-5)
    np.testing.assert_allclose(encoder.encode(pictures), embed(images=pictures), atol=1e-5)
    with pytest.raises(ValueError, match="one call per modality"):
        encoder.encode([TEXTS[0], pictures[1]])
    assert encoder.get_embedding_dimension() == 16


def test_a_text_with_its_picture(exported, trained, embed):
    """Through the adapter, as processor and model do it by themselves; without it, refused."""
    texts, pictures = ["but red", "a dog on a beach"], [make_picture(0), make_picture(1, (30, 60))]
    inputs = [{"text": text, "image": picture} for text, picture in zip(texts, pictures)]
    own = SentenceTransformer(str(exported), trust_remote_code=True, device="cpu")
    with pytest.raises(ValueError, match="none is active"):
        own.encode(inputs)
    own.load_adapter(str(exported / "fused-retrieval"))
    model, processor = AutoModel.from_pretrained(trained).eval(), AutoProcessor.from_pretrained(trained)
    model.load_adapter(str(trained / "fused-retrieval"))
    with torch.inference_mode():
        together = processor(text=texts, images=pictures, task="embed", return_tensors="pt")
        expected = model.get_embedding(**together).numpy()
    np.testing.assert_allclose(own.encode(inputs), expected, atol=1e-5)
    np.testing.assert_allclose(own.encode(texts), embed(text=texts), atol=1e-5)


def test_short_embeddings(encoder, embed):
    texts = ["a dog on a beach", "snow"]
    found = encoder.encode(texts, truncate_dim=5, normalize_embeddings=True)
    expected = embed(text=texts)[:, :5]
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_prompts_and_similarity(encoder, embed):
    found = encoder.encode(["dog"], prompt="a photo of a ")
    np.testing.assert_allclose(found, embed(text=["a photo of a dog"]), atol=1e-5)
    similarity = encoder.similarity(encoder.encode(TEXTS[:2]), encoder.encode([make_picture(0)]))
    expected = embed(text=TEXTS[:2]) @ embed(images=[make_picture(0)]).T
    np.testing.assert_allclose(similarity.numpy(), expected, atol=1e-5)


def test_texts_as_people_write_them(encoder, embed):
    spelled = ["<image>", "a [EMB] dog", "[CAP]</s>"]
    np.testing.assert_allclose(encoder.encode(spelled), embed(text=spelled), atol=1e-5)
    np.testing.assert_allclose(encoder.encode([" snow\n", "\0a dog "]), embed(text=["snow", "a dog"]), atol=1e-5)
    # It sorts them by their lengths, so that the error must say which it is, not where it stands.
    for wrong, message in {" ": "is empty, ' '", "a \ud83d": r"half a surrogate pair, '\\ud83d'.*'a \\ud83d'"}.items():
        with pytest.raises(ValueError, match=message):
            encoder.encode(["a dog on a beach", wrong, "snow", "a cat"])
    encoder.max_seq_length = 2
    try:
        with pytest.raises(ValueError, match="max_length must be an integer of at least 3"):
            encoder.encode(["a dog"])
    finally:
        encoder.max_seq_length = 50


def test_the_length_of_texts(encoder, embed):
    assert encoder.max_seq_length == 50, "that of the processor"
    short, long = embed(text=[TEXTS[2]], max_length=10), embed(text=[TEXTS[2]])
    assert np.abs(short - long).max() > 1e-3
    encoder.max_seq_length = 10
    try:
        np.testing.assert_allclose(encoder.encode([TEXTS[2]]), short, atol=1e-5)
    finally:
        encoder.max_seq_length = 50


def test_quantised(encoder):
    exact = encoder.encode(TEXTS)
    binary = encoder.encode(TEXTS, precision="binary")
    assert binary.dtype == np.int8 and binary.shape == (3, 2)
    np.testing.assert_array_equal(np.unpackbits((binary.astype(np.int16) + 128).astype(np.uint8), axis=1), exact > 0)
    ranges = np.stack([exact.min(0), exact.max(0)])
    steps = (ranges[1] - ranges[0]) / 255
    int8 = quantize_embeddings(exact, "int8", ranges=ranges)
    np.testing.assert_allclose((int8.astype(np.float32) + 128) * steps + ranges[0], exact, atol=steps.max() * 1.01)


def test_saved_by_sentence_transformers_and_loaded_again(encoder, tmp_path):
    encoder.save_pretrained(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    np.testing.assert_array_equal(again.encode(TEXTS), encoder.encode(TEXTS))
