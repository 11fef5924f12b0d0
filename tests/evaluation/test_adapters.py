"""Stage 1 beside an adapter: asked with the prompt that it knows."""

import torch

from mmgem.evaluation.regions import stage_1
from tests.conftest import make_model, make_picture


@torch.no_grad()
def test_stage_1_is_asked_for_a_region_as_for_a_picture(processor):
    """One visual token and one [CAP]: the box that covers a picture gives its caption's prompt, and its caption."""
    model, pictures = make_model(processor), [make_picture(i, (32, 32)) for i in range(3)]
    expected = processor(images=pictures, task="caption", return_tensors="pt")
    model.config.region_grid_size = 3
    with stage_1(model, processor) as own_processor:
        own_processor.region_grid_size = model.region_grid_size
        boxes = [[[0, 0, 32, 32]]] * 3
        inputs = own_processor(images=pictures, boxes=boxes, task="region-caption", return_tensors="pt")
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
        logits = model(**inputs).logits
    torch.testing.assert_close(logits, model(**expected).logits)
    assert model.config.region_grid_size == 3 and processor.num_soft_prompts > 1, "as before"
