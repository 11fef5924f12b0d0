"""
The adapters that are trained beside a frozen model, in PEFT's format.

    region-caption    caption_projection (h3) and soft_prompts ([CAP_1..64])    paper, equation 6
    region-retrieval  region_projection (h4)                                    paper, equation 7
    fused-retrieval   LoRA on language_model, for queries of an image with a text

The first two are PEFT's `modules_to_save`: copies of these modules beside those of the base, so that switching them
off gives the base back bit for bit. The k that the prompts of region-caption are trained with is `region_grid_size` in
the `auto_mapping` of the adapter's configuration. The third, known by `stage` there, works in fused calls alone:
texts, images and captions stay what they are.
"""

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, logging

from .loading_mmgem import refuse_not_finite, weights_revision


logger = logging.get_logger(__name__)


REGION_ADAPTERS = {
    "region-caption": ("caption_projection", "soft_prompts"),
    "region-retrieval": ("region_projection",),
}
FUSED_ADAPTER = "fused-retrieval"
ADAPTERS = (*REGION_ADAPTERS, FUSED_ADAPTER)


class AdapterMixin:
    """transformers' adapter methods for whole modules (its own look for LoRA layers only), and for fused queries."""

    _fused_adapter: str | None = None  # of those that `set_adapter` chose

    @property
    def region_grid_size(self: Any) -> int:
        """k of the active adapter, or else of the configuration: a region becomes k x k visual tokens."""
        for name in active_adapters_of(self.soft_prompts):
            return (self.peft_config[name].auto_mapping or {}).get("region_grid_size", self.config.region_grid_size)
        return self.config.region_grid_size

    @property
    def is_gradient_checkpointing(self: Any) -> bool:
        """For PEFT, which asks by this name; transformers' own property warns that it is deprecated."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def load_adapter(self: Any, peft_model_id: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        [`PreTrainedModel.load_adapter`], after which this adapter alone is active. If loading fails, the adapter is
        removed, and the previously active adapters stay active. A warning says if it was trained on other weights.

        Raises:
            ValueError: for an adapter that does not fit this model, or is damaged.
        """
        name = kwargs.get("adapter_name") or (args[0] if args else None) or "default"
        loaded, conversions = dict(getattr(self, "peft_config", {})), getattr(self, "_weight_conversions", None)
        active = self.active_adapters() if loaded else []
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
                info = super().load_adapter(peft_model_id, *args, **kwargs)  # type: ignore[misc]
            missing = [key for key in info.missing_keys if name in key.split(".")]
            if missing:
                raise ValueError(f"{peft_model_id} is damaged: {min(missing)} is missing.")
            if any(key.endswith("grid_size") for key in info.unexpected_keys):
                raise ValueError(
                    f"{peft_model_id} does not say its k, as a first version of mmgem saved it. Train it again."
                )
            tensors = {key: tensor for key, tensor in self.state_dict().items() if name in key.split(".")}
            refuse_not_finite(tensors, str(peft_model_id))
            revision = self.peft_config[name].revision or ""
            if revision.startswith("sha256:") and weights_revision(self.name_or_path) not in (None, revision):
                logger.warning(
                    f"Adapter {peft_model_id} was trained on other weights than those in {self.name_or_path}, or on "
                    "these in another precision. Expect other results than after its training."
                )
            self.set_adapter(name)
        except Exception as error:
            if name not in loaded and name in getattr(self, "peft_config", {}):
                base = self.peft_config[name].base_model_name_or_path
                self.delete_adapter(name)
                if active:
                    self.set_adapter(active)
                if isinstance(error, RuntimeError):  # of tensors of other shapes
                    raise ValueError(
                        f"Adapter {name!r} was trained on {base!r} and does not fit {self.name_or_path!r}: {error}"
                    ) from error
            raise
        finally:
            # transformers keeps the adapter's key conversions, which would rename the base's tensors when it is saved.
            self._weight_conversions = conversions
        return info

    def save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """[`PreTrainedModel.save_pretrained`] of the base, and each loaded adapter into a folder of its name there."""
        adapters = dict(getattr(self, "peft_config", {}))
        if adapters:
            kwargs["state_dict"] = {
                re.sub(r"\.(original_module|token_adapter|base_layer)\b", "", key): tensor
                for key, tensor in (kwargs.get("state_dict") or self.state_dict()).items()
                if adapters.keys().isdisjoint(key.split("."))
            }
        self._hf_peft_config_loaded = False  # or transformers would save the active adapter only
        try:
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._hf_peft_config_loaded = bool(adapters)
        for name, config in adapters.items() if kwargs.get("is_main_process", True) else ():
            from peft import get_peft_model_state_dict

            folder = os.path.join(save_directory, name)
            config.save_pretrained(folder)
            tensors = get_peft_model_state_dict(self, adapter_name=name, save_embedding_layers=False)
            tensors = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in tensors.items()}
            save_file(tensors, os.path.join(folder, ADAPTER_SAFE_WEIGHTS_NAME), {"format": "pt"})

    def set_adapter(self: Any, adapter_name: str | list[str]) -> None:
        """
        Activates one adapter, or several that do not share a module, and deactivates the others.

        Raises:
            ValueError: for a name that is not loaded; for two adapters of one module.
        """
        from peft.functional import set_adapter  # not at the top: PEFT is optional without adapters

        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_loaded(names)
        fused = [name for name in names if is_fused(self.peft_config[name])]
        if len(fused) > 1:
            raise ValueError(f"{fused[0]!r} and {fused[1]!r} are both of fused queries: only one can be active.")
        for module_name, module in self.named_modules():
            sharing = [name for name in names if name in getattr(module, "modules_to_save", {})]
            if len(sharing) > 1:
                raise ValueError(
                    f"{sharing[0]!r} and {sharing[1]!r} are both adapters of {module_name}: only one can be active."
                )
        self.enable_adapters()
        set_adapter(self, names)
        self.hold_back(fused[0] if fused else None)

    def hold_back(self: Any, fused_adapter: str | None) -> None:
        """Keeps an adapter, if any, inactive except in fused calls, whose adapter it is."""
        self._fused_adapter = fused_adapter
        for module in adapter_modules(self) if fused_adapter else ():
            # PEFT's own methods would also change which parameters require a gradient.
            module._active_adapter = [name for name in module.active_adapters if name != fused_adapter]

    @contextmanager
    def in_fused_call(self: Any) -> Iterator[None]:
        """
        Within it, the chosen adapter of fused queries is active and no other. The model's state changes meanwhile, so
        other threads must not use it.

        Raises:
            ValueError: if none is chosen, or adapters are switched off.
        """
        modules = adapter_modules(self) if self._fused_adapter else []
        if not modules or any(module.disable_adapters for module in modules):
            raise ValueError(
                "A text with an image is embedded by an adapter (--stage fused-retrieval), and none is active: call "
                "model.load_adapter(folder), or embed text and image in two calls."
            )
        active = [module._active_adapter for module in modules]
        try:
            for module in modules:
                module._active_adapter = [self._fused_adapter]
            yield
        finally:
            for module, names in zip(modules, active):
                module._active_adapter = names

    def active_adapters(self: Any) -> list[str]:
        """Names of the adapters that `set_adapter` chose, in the order they were loaded, switched off or not."""
        self._check_loaded([])
        active = {name for module in adapter_modules(self) for name in module.active_adapters}
        return [name for name in self.peft_config if name in active or name == self._fused_adapter]

    def enable_adapters(self: Any, enabled: bool = True) -> None:
        """Undoes `disable_adapters`: the adapters that `set_adapter` chose are active again."""
        self._check_loaded([])
        fused = self._fused_adapter
        for module in adapter_modules(self):
            if enabled and fused in getattr(module, "modules_to_save", [fused]):
                # PEFT lets active adapters require a gradient.
                module._active_adapter = [*module.active_adapters, fused]
            module.enable_adapters(enabled)
        self.hold_back(fused)

    def disable_adapters(self) -> None:
        """The base alone, bit for bit, until `enable_adapters`."""
        self.enable_adapters(False)

    def delete_adapter(self: Any, adapter_names: str | list[str]) -> None:
        """
        Removes adapters; with the last one of a module, PEFT's wrapper around it goes too.

        Raises:
            ValueError: for a name that is not loaded.
        """
        from peft.functional import delete_adapter

        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._check_loaded(names)
        for name in names:
            delete_adapter(self, name, prefix=f"{self.peft_config.pop(name).peft_type.value.lower()}_")
            if name == self._fused_adapter:
                self._fused_adapter = None
        if not self.peft_config:
            del self.peft_config
            self._hf_peft_config_loaded = False
        for name, module in list(self.named_modules()):
            if hasattr(module, "modules_to_save") and not module.modules_to_save:
                self.set_submodule(name, module.original_module)
            elif hasattr(module, "lora_A") and not (module.lora_A or module.lora_embedding_A):
                self.set_submodule(name, module.base_layer)

    def _check_loaded(self, names: list[str]) -> None:
        """Raises ValueError if an adapter of `names`, or every adapter, is missing."""
        loaded = list(getattr(self, "peft_config", {}))
        missing = [name for name in names if name not in loaded]
        if missing or not loaded:
            raise ValueError(
                f"There is no adapter{f' {missing[0]!r}' if missing else ''}; loaded are "
                f"{', '.join(map(repr, loaded)) or 'none'}. Load one: model.load_adapter(folder, adapter_name=…)."
            )


def adapter_modules(model: nn.Module) -> list[Any]:
    """PEFT's modules of a model: LoRA's layers, and whole modules with copies."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def adapter_stage(modules_to_save: Sequence[str] | None, auto_mapping: dict[str, Any] | None) -> str | None:
    """The stage that trained an adapter, from two entries of its configuration; None for any other adapter."""
    if (auto_mapping or {}).get("stage") == FUSED_ADAPTER:
        return FUSED_ADAPTER
    return next((stage for stage, own in REGION_ADAPTERS.items() if {*own} == {*(modules_to_save or ())}), None)


def is_fused(config: Any) -> bool:
    """Whether this PEFT configuration is one of an adapter of fused queries."""
    return adapter_stage(None, config.auto_mapping) == FUSED_ADAPTER


def active_adapters_of(module: Any) -> list[str]:
    """The active adapter that has a copy of this module; none if adapters are switched off."""
    if not hasattr(module, "modules_to_save") or module.disable_adapters:
        return []
    return list(module.active_adapters)


__all__ = ["ADAPTERS", "FUSED_ADAPTER", "REGION_ADAPTERS", "AdapterMixin", "active_adapters_of", "adapter_stage"]
