"""The adapters of stage 2, to be trained."""

from peft import LoraConfig, PeftModel

from ..loading import weights_revision
from ..modeling_mmgem import MMGEMModel
from ..modeling_mmgem.adapters_mmgem import REGION_ADAPTERS
from .lora import add_adapter


def add_region_adapter(model: MMGEMModel, stage: str, grid_size: int) -> PeftModel:
    """
    The model with the new adapter of a stage, which alone trains and is saved: h3 and [CAP_i] start as those of stage
    1, h4 as the identity.

    Args:
        stage: "region-caption" or "region-retrieval".
        grid_size: k, of the prompts that the adapter is trained with.
    """
    mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    config = LoraConfig(
        # PEFT requires `target_modules`; "dummy-target-modules" is its sentinel for none.
        target_modules="dummy-target-modules",
        modules_to_save=list(REGION_ADAPTERS[stage]),
        # With a task_type, PeftModel.save_pretrained keeps `auto_mapping` instead of writing its own.
        task_type="FEATURE_EXTRACTION",
        revision=weights_revision(model.name_or_path),
        auto_mapping={**mapping, "region_grid_size": grid_size} if stage == "region-caption" else mapping,
    )
    return add_adapter(model, config)
