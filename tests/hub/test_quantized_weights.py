"""The language model in 8 or 4 bits by bitsandbytes, here on CPU: `make test-quantized`."""

import pytest
import torch
from transformers import AutoModel, AutoProcessor, BitsAndBytesConfig

from ..conftest import make_picture
from .clean_process import TEXTS, outputs
from .conftest import save_model_and_adapters


functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
KEPT = ["vision_model", "visual_projection", "text_projection", "caption_projection", "region_projection", "lm_head"]


@pytest.fixture(scope="module")
def wide(processor, tmp_path_factory) -> str:
    """Wide enough for four bits: bitsandbytes quantises rows in blocks of 64."""
    folder = tmp_path_factory.mktemp("wide")
    save_model_and_adapters(folder, processor, hidden_size=64, intermediate_size=128)
    return str(folder)


def rounded(model, bits):
    """The same model in float32, with the language model's weights as bitsandbytes rounds them."""
    for layer in model.language_model.modules():
        if isinstance(layer, torch.nn.Linear):
            weight = layer.weight.data
            if bits == 8:
                numbers, scales, _ = functional.int8_vectorwise_quant(weight.half())
                weight.copy_(numbers * scales[:, None] / 127)
            else:
                weight.copy_(functional.dequantize_4bit(*functional.quantize_4bit(weight)))
    return model


@pytest.mark.parametrize("bits", [8, 4])
def test_embeddings_captions_and_adapters(wide, bits):
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=KEPT)
    small = AutoModel.from_pretrained(wide, quantization_config=config).eval()
    for name, layer in small.language_model.named_modules():
        assert not isinstance(layer, torch.nn.Linear) or not layer.weight.is_floating_point(), name
    model, processor = AutoModel.from_pretrained(wide).eval(), AutoProcessor.from_pretrained(wide)
    found, expected = (outputs(m, processor, make_picture(3), wide) for m in (small, model))
    for name in ("pictures", "regions"):  # of what was kept, with the adapter
        torch.testing.assert_close(found[name], expected[name], atol=1e-2, rtol=0)
    for name in ("caption", "region_captions"):
        assert len(found[name]) == len(expected[name])
    with torch.inference_mode():
        texts = rounded(model, bits).get_embedding(**processor(text=TEXTS, return_tensors="pt"))
    assert torch.cosine_similarity(found["texts"], texts).min() > 0.99
