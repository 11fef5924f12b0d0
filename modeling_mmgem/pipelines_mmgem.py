"""The pipeline `region-captioning`."""

import copy
import re
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import GenerationConfig, Pipeline
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from ..processing.images_mmgem import is_one_image, with_one_scale
from ..processing.regions_mmgem import CroppedRegionError, geometry_of, map_box, map_mask, refuse_normalized


logger = logging.get_logger(__name__)

ADAPTER = "region-caption"


class RegionCaptioningPipeline(Pipeline):
    """
    Captions regions of images with an MM-GEM model and its adapter region-caption: the adapter that the model has
    loaded, or else the one in the folder `region-caption` beside the model, on the Hub or on disk.

    ```python
    >>> from transformers import pipeline
    >>> describe = pipeline("region-captioning", model="org/mm-gem", trust_remote_code=True)
    >>> describe("street.jpg", boxes=[[0, 20, 64, 90], [70, 5, 120, 110]])
    [{'box': [0, 20, 64, 90], 'caption': '…'}, {'box': [70, 5, 120, 110], 'caption': '…'}]
    ```
    """

    _load_processor: Any = True
    _load_tokenizer: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=50)

    def __init__(self, model: Any, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        for task in getattr(model.config, "custom_pipelines", {}).values():
            # `pipeline` replaces the names of classes by the classes, which a configuration cannot save.
            task["pt"] = [getattr(auto_class, "__name__", auto_class) for auto_class in task["pt"]]
        if model.name_or_path and not hasattr(model.soft_prompts, "modules_to_save"):
            # The module name of code from the Hub holds its commit: load the adapter of the same commit.
            commit = re.search(r"\b[0-9a-f]{40}\b", f"{type(model).__module__} {type(self).__module__}")
            options: Any = {"subfolder": ADAPTER, "revision": commit[0] if commit else None}
            if find_adapter_config_file(model.name_or_path, **options):
                model.load_adapter(model.name_or_path, adapter_name=ADAPTER, adapter_kwargs=options)

    def __call__(self, image: Any, boxes: Any = None, masks: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """
        Args:
            image: an image (PIL, path, URL or array), or several: a list, generator, dataset column or batch in one
                array or tensor; or, without `boxes` and `masks`, a list, generator or dataset of mappings
                `{"image", "boxes"}` or `{"image", "masks"}`.
            boxes: a list of `[x0, y0, x1, y1]` in pixels of the original image; for several images a list, generator
                or dataset column of such lists, any of which may be empty.
            masks: `(height, width)` arrays instead of boxes.
            batch_size (`int`, *optional*): images at a time.
            max_new_tokens (`int`, *optional*), generate_kwargs (`dict`, *optional*): for `generate`.

        Returns:
            a list of `{"box", "caption"}` (or `{"mask", "caption"}`), in the order of the regions; for several images
            a list of lists, or an iterator if they came from a generator or dataset. The caption is `None` if the
            image processor's centre crop leaves nothing of a region.

        Raises:
            ValueError: for missing regions, another number of lists than of images, an invalid region, and several
                captions per region (`num_return_sequences`).
        """
        if boxes is not None and masks is not None:
            raise ValueError("A region is a box or a mask: pass boxes or masks, not both.")
        kind = "boxes" if masks is None else "masks"
        regions = boxes if masks is None else masks
        if regions is None:
            is_stream = hasattr(image, "__iter__") and not isinstance(image, str | dict | list | Dataset)
            # Pipelines take torch's datasets, lists and generators; an array is one image.
            inputs = (item for item in image) if is_stream and not hasattr(image, "dtype") else image
        elif is_one_image(image):
            inputs = {"image": image, kind: regions}
        else:
            inputs = _paired(with_one_scale(image), regions, kind)
            if isinstance(image, list | tuple) or hasattr(image, "ndim"):
                inputs = list(inputs)
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self, max_new_tokens: int | None = None, generate_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> tuple[dict, dict, dict]:
        if kwargs:
            raise ValueError(f"Unknown option {next(iter(kwargs))!r}; options of generate go into generate_kwargs.")
        options = dict(generate_kwargs or {})
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        return {}, options, {}

    def preprocess(self, inputs: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        kinds = [kind for kind in ("boxes", "masks") if isinstance(inputs, dict) and inputs.get(kind) is not None]
        if len(kinds) != 1 or "image" not in inputs:
            raise ValueError("region-captioning needs the regions to describe: pass boxes, or masks, with each image.")
        kind, regions = kinds[0], list(inputs[kinds[0]])
        # A pipeline takes the processor from the base, whose k may be another than the adapter's.
        processor: Any = copy.copy(self.processor)
        processor.region_grid_size = self.model.region_grid_size
        (image,) = processor._load_images(inputs["image"])
        geometry = geometry_of(processor.image_processor, *image.size)
        map_region: Any = map_box if kind == "boxes" else map_mask
        if kind == "boxes":
            refuse_normalized(regions)
        shown, faults = [], []
        for i, region in enumerate(regions):
            try:
                map_region(region, *image.size, geometry, f"{kind}[{i}]")
                shown.append(i)
            except CroppedRegionError as error:
                faults.append(str(error))
        if faults:
            logger.warning(f"{len(faults)} of {len(regions)} regions get no caption: {faults[0]}")
        batch = None
        if shown:
            own = {kind: [[regions[i] for i in shown]]}
            batch = processor(images=[image], task="region-caption", return_tensors="pt", **own)
        return {"kind": kind, "regions": regions, "shown": shown, "batch": batch}

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """
        Generates for one image, or for a list of images in each entry; images of one size go through the model
        together.
        """
        batch = model_inputs.pop("batch")
        batches = batch if isinstance(batch, list) else [batch]
        ids: list[Any] = [()] * len(batches)
        alike: dict[Any, list[int]] = {}
        for i, one in enumerate(batches):
            if one is not None:
                alike.setdefault((tuple(one), one["pixel_values"].shape), []).append(i)
        options = self._prepare_generate_kwargs(generate_kwargs, return_dict_in_generate=False)
        model: Any = self.model
        for group in alike.values():
            rows = model.generate(**_joined([batches[i] for i in group]), **options)
            sizes = [len(batches[i]["input_ids"]) for i in group]
            if len(rows) != sum(sizes):
                raise ValueError(
                    f"region-captioning returns one caption per region, but generate returned {len(rows)} for "
                    f"{sum(sizes)} regions. Leave num_return_sequences at 1."
                )
            for i, own in zip(group, rows.split(sizes), strict=True):
                ids[i] = own.tolist()
        return {**model_inputs, "ids": ids if isinstance(batch, list) else ids[0]}

    def postprocess(self, model_outputs: dict[str, Any], **kwargs: Any) -> list[dict[str, Any]]:  # type: ignore[override]
        processor: Any = self.processor
        captions: dict[int, str] = {}
        for i, row in zip(model_outputs["shown"], model_outputs["ids"], strict=True):
            captions[i] = processor.decode(row, skip_special_tokens=True).strip()
        name = {"boxes": "box", "masks": "mask"}[model_outputs["kind"]]
        return [{name: region, "caption": captions.get(i)} for i, region in enumerate(model_outputs["regions"])]


def _paired(images: Any, regions: Any, kind: str) -> Iterator[dict[str, Any]]:
    """Each image with its regions. Raises ValueError if there are more of one than of the other."""
    if hasattr(images, "__len__") and hasattr(regions, "__len__") and len(images) != len(regions):
        raise ValueError(f"There are {len(images)} images, but {kind} holds {len(regions)} lists.")
    end = object()
    for i, (image, own) in enumerate(zip_longest(images, regions, fillvalue=end)):
        if image is end or own is end:
            more, fewer = (kind, "images") if image is end else ("images", kind)
            raise ValueError(f"There are more {more} than {fewer}, which end after {i}.")
        yield {"image": image, kind: own}


def _joined(batches: list[Any]) -> dict[str, torch.Tensor]:
    """Concatenates the inputs of several images to one batch, with regions padded at the end."""
    joined = {}
    for name in batches[0]:
        parts = [batch[name] for batch in batches]
        if name in ("boxes", "masks", "region_mask"):  # (1, R, …)
            joined[name] = pad_sequence([part[0] for part in parts], batch_first=True)
        else:
            joined[name] = torch.cat(parts)
    return joined


__all__ = ["RegionCaptioningPipeline"]
