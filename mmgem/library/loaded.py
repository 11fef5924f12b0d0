"""A model with its processor and adapters, ready to embed and to caption."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.utils.peft_utils import find_adapter_config_file

from ..loading import load_with_adapters
from ..modeling_mmgem import MMGEMModel
from ..modeling_mmgem.adapters_mmgem import ADAPTERS
from ..modeling_mmgem.loading_mmgem import digest_of_tensors
from ..processing import MMGEMProcessor
from ..processing.image_processors_mmgem import without_center_crop
from .tables import Identity


IRRELEVANT = ("processor_class", "_name_or_path", "image_processor_type")  # settings that change no vector


@dataclass
class LoadedModel:
    """A model with its processor, and how it was loaded."""

    name: str
    model: MMGEMModel
    processor: MMGEMProcessor
    do_center_crop: bool = True

    @classmethod
    def load(
        cls,
        name: str,
        adapters: Sequence[str] = (),
        device: str | None = None,
        dtype: str = "float32",
        do_center_crop: bool = True,
    ) -> "LoadedModel":
        """
        Loads a checkpoint with the adapters beside it.

        Args:
            adapters: instead of those in the checkpoint's folder or repository.
            device: by default the GPU if there is one.
            do_center_crop: False resizes whole images instead of cutting their middle out.

        Raises:
            OSError, ValueError: as [`load_with_adapters`].
        """
        model, processor = load_with_adapters(name, adapters, dtype)
        if not adapters:
            beside = [stage for stage in ADAPTERS if find_adapter_config_file(name, subfolder=stage) is not None]
            for stage in beside:
                model.load_adapter(name, adapter_name=stage, adapter_kwargs={"subfolder": stage})
            if beside:
                model.set_adapter(beside)
            processor.region_grid_size = model.region_grid_size
        if not do_center_crop:
            processor.image_processor = without_center_crop(processor.image_processor)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
        return cls(name, model, processor, do_center_crop)

    def identity(self) -> Identity:
        """What the vectors of images depend on."""
        parts = {n: t for n, t in self.model.state_dict().items() if n.startswith(("vision_model.", "visual_proj"))}
        settings = self.processor.image_processor.to_dict()
        kept = {name: value for name, value in settings.items() if name not in IRRELEVANT}
        preprocessing = json.dumps(kept, sort_keys=True, default=str)
        weights = digest_of_tensors(sorted(parts.items()))
        return Identity(self.name, weights, self.do_center_crop, preprocessing, self.model.config.projection_dim)
