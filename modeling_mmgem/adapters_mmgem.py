"""
The two adapters of stage 2, as PEFT loads, switches and saves them.

    region-caption    caption_projection (h3) and soft_prompts ([CAP_1..64])    paper, equation 6
    region-retrieval  region_projection (h4)                                    paper, equation 7

Both are PEFT's `modules_to_save`: copies of these modules beside those of the base, so that switching them off gives
the base back bit for bit. What an adapter must not be parted from travels among its tensors, in buffers: `grid_size`,
the k that its prompts were trained with, and `trained_on`, by which it knows its base.
"""

from typing import Any

import torch
from torch import nn
from transformers.utils import torch_compilable_check


REGION_ADAPTERS = {
    "region-caption": ("caption_projection", "soft_prompts"),
    "region-retrieval": ("region_projection",),
}
SIGNATURE_SIZE = 16  # weights of h1 by which an adapter knows its base


class RegionAdapterMixin:
    """What [`MMGEMModel`] needs for adapters: transformers' own methods look for LoRA layers, and find none here."""

    def register_adapter_buffers(self: Any) -> None:
        """Gives soft_prompts and region_projection what their adapters remember."""
        for module in (self.soft_prompts, self.region_projection):
            module.register_buffer("trained_on", torch.zeros(SIGNATURE_SIZE))
        self.soft_prompts.register_buffer("grid_size", torch.tensor(self.config.region_grid_size))

    @property
    def region_grid_size(self: Any) -> int:
        """k of the active adapter, or else of the base: a region becomes k x k visual tokens."""
        return int(self.soft_prompts.grid_size)

    @torch.compiler.assume_constant_result
    def _active_grid_size(self: Any) -> int:
        return self.region_grid_size

    def base_signature(self: Any) -> torch.Tensor:
        """A few weights of h1, `(16,)`: two models that were trained apart do not share them."""
        weights = self.visual_projection.weight.detach().flatten()[:SIGNATURE_SIZE].float()
        return nn.functional.pad(weights, (0, SIGNATURE_SIZE - len(weights)))

    def check_base_of(self: Any, module: nn.Module) -> None:
        """
        Raises:
            ValueError: where an adapter's module was trained on another base.
        """
        trained_on: Any = module.trained_on
        # Both may have been rounded to bfloat16.
        is_own = torch.isclose(trained_on.float(), self.base_signature(), rtol=0.02, atol=1e-3).all()
        torch_compilable_check(
            is_own | trained_on.eq(0).all(),
            "The active adapter was trained on another base: it remembers other weights of visual_projection than "
            f"those of {self.config._name_or_path or 'this model'!r}. Load it on the base that its "
            "adapter_config.json names.",
        )

    def load_adapter(self: Any, peft_model_id: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As [`PreTrainedModel.load_adapter`]; the adapter is then the one that is active. For both of stage 2 at once:
        `set_adapter([…, …])`.

        Raises:
            ValueError: for an adapter that was trained on another base, with both names. Nothing of it stays loaded.
        """
        name = kwargs.get("adapter_name") or (args[0] if args else None) or "default"
        is_new = name not in getattr(self, "peft_config", {})
        active = self.active_adapters() if self._hf_peft_config_loaded else []
        try:
            info = super().load_adapter(peft_model_id, *args, **kwargs)  # type: ignore[misc]
            self.set_adapter(name)  # PEFT leaves it to what was loaded and deleted before
            for module in (self.soft_prompts, self.region_projection):
                self.check_base_of(module)
        except (RuntimeError, ValueError) as error:
            if not is_new or name not in getattr(self, "peft_config", {}):
                raise
            expected = self.peft_config[name].base_model_name_or_path
            self.delete_adapter(name)
            if active:
                self.set_adapter(active)
            raise ValueError(
                f"Adapter {name!r} from {peft_model_id} was trained on {expected!r} and does not fit "
                f"{self.config._name_or_path or 'this model'!r}: {error}"
            ) from error
        return info

    def set_adapter(self: Any, adapter_name: str | list[str]) -> None:
        """
        Makes one adapter the active one, or several that do not share a module; of the others the base is used.

        Raises:
            ValueError: for a name that is not loaded, with those that are; for two adapters of one module.
        """
        from peft.functional import set_adapter

        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        loaded = list(getattr(self, "peft_config", {}))
        if missing := [name for name in names if name not in loaded]:
            raise ValueError(
                f"There is no adapter {missing[0]!r}; loaded are {', '.join(map(repr, loaded)) or 'none'} "
                "(model.load_adapter(folder, adapter_name=…) loads one)."
            )
        set_adapter(self, names)

    def active_adapters(self: Any) -> list[str]:
        """Names of the adapters that take part in a forward, in the order they were loaded."""
        active = {name for layer in self._adapter_layers() for name in layer.active_adapters}
        return [name for name in self.peft_config if name in active]

    def enable_adapters(self: Any) -> None:
        """Undoes `disable_adapters`: those are active again that were."""
        for layer in self._adapter_layers():
            layer.enable_adapters(True)

    def disable_adapters(self: Any) -> None:
        """The base alone, bit for bit, until `enable_adapters`."""
        for layer in self._adapter_layers():
            layer.enable_adapters(False)

    def _adapter_layers(self: Any) -> list[Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import AuxiliaryTrainingWrapper

        layers = [layer for layer in self.modules() if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        if not layers:
            raise ValueError("No adapter is loaded: model.load_adapter(folder) loads one.")
        return layers


__all__ = ["REGION_ADAPTERS", "RegionAdapterMixin"]
