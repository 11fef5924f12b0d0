"""The pipeline `region-captioning`."""

import copy
import re
from typing import Any

from transformers import GenerationConfig, Pipeline
from transformers.utils.peft_utils import find_adapter_config_file


ADAPTER = "region-caption"


class RegionCaptioningPipeline(Pipeline):
    """
    Describes parts of pictures, with a model of MM-GEM and its adapter region-caption: one that the model has loaded,
    or else that in the folder `region-caption` beside the model, on the Hub or on disk.

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
            # `pipeline` puts classes in the place of their names, and the configuration could not be saved any more.
            task["pt"] = [getattr(auto_class, "__name__", auto_class) for auto_class in task["pt"]]
        if model.name_or_path and not hasattr(model.soft_prompts, "modules_to_save"):
            # Code from the Hub knows which commit it is of; the adapter is to be of the same.
            commit = re.search(r"\b[0-9a-f]{40}\b", f"{type(model).__module__} {type(self).__module__}")
            options: Any = {"subfolder": ADAPTER, "revision": commit[0] if commit else None}
            if find_adapter_config_file(model.name_or_path, **options):
                model.load_adapter(model.name_or_path, adapter_name=ADAPTER, adapter_kwargs=options)

    def __call__(self, image: Any, boxes: Any = None, masks: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """
        Args:
            image: a picture (PIL, path or URL), or a list of them.
            boxes: a list of `[x0, y0, x1, y1]` in pixels of the original picture; for several pictures a list of such
                lists, any of which may be empty.
            masks: `(height, width)` arrays instead of boxes.
            max_new_tokens (`int`, *optional*), generate_kwargs (`dict`, *optional*): for `generate`.

        Returns:
            a list of `{"box", "caption"}` (or `{"mask", "caption"}`), in the order of the regions; a list of lists for
            several pictures.

        Raises:
            ValueError: where regions are missing, or not as many lists as pictures; for a region that is none.
        """
        kind = "boxes" if masks is None else "masks"
        regions = boxes if masks is None else masks
        if regions is None or (boxes is not None and masks is not None):
            raise ValueError("region-captioning needs the regions to describe: pass boxes, or masks.")
        if not isinstance(image, list | tuple):
            return super().__call__({"image": image, kind: regions}, **kwargs)
        if len(image) != len(regions):
            raise ValueError(f"There are {len(image)} pictures, but {kind} holds {len(regions)} lists.")
        return super().__call__([{"image": i, kind: r} for i, r in zip(image, regions)], **kwargs)

    def _sanitize_parameters(
        self, max_new_tokens: int | None = None, generate_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> tuple[dict, dict, dict]:
        if kwargs:
            raise ValueError(f"Unknown option {next(iter(kwargs))!r}; options of generate go into generate_kwargs.")
        options = dict(generate_kwargs or {})
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        return {}, options, {}

    def preprocess(self, inputs: dict[str, Any], **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        kind = "boxes" if "boxes" in inputs else "masks"
        regions = list(inputs[kind])
        if not regions:
            return {"kind": kind, "regions": regions}
        # A pipeline takes the processor from the base, whose k may be another than the adapter's.
        processor: Any = copy.copy(self.processor)
        processor.region_grid_size = self.model.region_grid_size
        batch = processor(images=[inputs["image"]], task="region-caption", return_tensors="pt", **{kind: [regions]})
        return {"kind": kind, "regions": regions, **batch}

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        kept = {name: model_inputs.pop(name) for name in ("kind", "regions")}
        if not model_inputs:
            return {**kept, "ids": []}
        options = self._prepare_generate_kwargs(generate_kwargs, return_dict_in_generate=False)
        model: Any = self.model
        return {**kept, "ids": model.generate(**model_inputs, **options)}

    def postprocess(self, model_outputs: dict[str, Any], **kwargs: Any) -> list[dict[str, Any]]:  # type: ignore[override]
        processor: Any = self.processor
        captions = [processor.decode(row, skip_special_tokens=True) for row in model_outputs["ids"]]
        name = {"boxes": "box", "masks": "mask"}[model_outputs["kind"]]
        return [
            {name: region, "caption": caption.strip()}
            for region, caption in zip(model_outputs["regions"], captions, strict=True)
        ]


__all__ = ["RegionCaptioningPipeline"]
