"""A model with its processor and adapters, ready to embed and to caption."""

import json
import os
from dataclasses import dataclass

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers.utils.peft_utils import find_adapter_config_file

from ..loading import load_with_adapters
from ..modeling_mmgem import MMGEMModel
from ..modeling_mmgem.adapters_mmgem import ADAPTERS
from ..modeling_mmgem.loading_mmgem import digest_of_tensors, weights_revision
from ..processing import MMGEMProcessor
from ..processing.image_processors_mmgem import without_center_crop
from .tables import Identity


IMAGE_WEIGHTS = ("vision_model.", "visual_projection.")
PREPROCESSING = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_pad", "pad_size", "do_rescale"),
    *("rescale_factor", "do_normalize", "image_mean", "image_std"),
)


@dataclass
class LoadedModel:
    """A model with its processor, and how it was loaded."""

    name: str
    model: MMGEMModel
    processor: MMGEMProcessor
    do_center_crop: bool = True

    @classmethod
    def load(
        cls, name: str, device: str | None = None, dtype: str = "float32", do_center_crop: bool = True
    ) -> "LoadedModel":
        """
        Loads a checkpoint with the adapters that lie beside it.

        Args:
            name: folder or Hub id.
            device: by default the GPU if there is one.
            dtype: of the weights.
            do_center_crop: False resizes whole images instead of cutting their middle out.

        Raises:
            ValueError: for a device that does not exist; as [`load_with_adapters`].
            OSError: as [`load_with_adapters`].
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"There is no device {device!r}: {str(error).splitlines()[0]}") from error
        model, processor = load_with_adapters(name, (), dtype)
        beside = [stage for stage in ADAPTERS if find_adapter_config_file(name, subfolder=stage) is not None]
        for stage in beside:
            model.load_adapter(name, adapter_name=stage, adapter_kwargs={"subfolder": stage})
        if beside:
            model.set_adapter(beside)
        processor.region_grid_size = model.region_grid_size
        if not do_center_crop:
            processor.image_processor = without_center_crop(processor.image_processor)
        model.to(device)  # type: ignore[arg-type]
        return cls(name, model, processor, do_center_crop)

    def identity(self) -> Identity:
        """What the vectors of images depend on, whatever the dtype that the model was loaded in."""
        settings = self.processor.image_processor.to_dict()
        preprocessing = {name: settings[name] for name in PREPROCESSING if settings.get(name) is not None}
        preprocessing["image_pooling"] = self.model.config.image_pooling
        return Identity(
            os.path.abspath(self.name) if os.path.isdir(self.name) else self.name,
            self._weights(),
            self.do_center_crop,
            json.dumps(preprocessing, sort_keys=True, default=str),
            self.model.config.projection_dim,
        )

    def _weights(self) -> str:
        folder: str | None = self.name if os.path.isdir(self.name) else None
        if folder is None:
            try:
                config = try_to_load_from_cache(self.name, "config.json")
            except HFValidationError:
                config = None
            folder = os.path.dirname(config) if isinstance(config, str) else None
        state = {n: t for n, t in self.model.state_dict().items() if n.startswith(IMAGE_WEIGHTS)}
        return weights_revision(folder, IMAGE_WEIGHTS) or digest_of_tensors(sorted(state.items()))
