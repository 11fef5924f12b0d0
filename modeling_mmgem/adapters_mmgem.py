"""
The two adapters of stage 2, as PEFT loads, switches and saves them.

    region-caption    caption_projection (h3) and soft_prompts ([CAP_1..64])    paper, equation 6
    region-retrieval  region_projection (h4)                                    paper, equation 7

Both are PEFT's `modules_to_save`: copies of these modules beside those of the base, so that switching them off gives
the base back bit for bit. Two values are saved with an adapter's tensors, as buffers: `grid_size`, the k that its
prompts were trained with, and `trained_on`, 64 weights of its base, by which another base is recognised.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME


REGION_ADAPTERS = {
    "region-caption": ("caption_projection", "soft_prompts"),
    "region-retrieval": ("region_projection",),
}
SIGNATURE_SIZE = 64  # weights by which an adapter knows its base


class RegionAdapterMixin:
    """Adapter methods of [`MMGEMModel`], since transformers' own expect LoRA layers, of which these have none."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """
        As [`PreTrainedModel.from_pretrained`]. If an adapter's folder names its base by a relative path, the base is
        looked for beside the adapter: transformers would look in the working directory, and then on the Hub.
        """
        name = pretrained_model_name_or_path
        base = _base_of_adapter(name)
        if base is not None:
            adapter = {"_adapter_model_path": os.fspath(name)}  # as AutoModel hands it over
            kwargs["adapter_kwargs"] = {**(kwargs.get("adapter_kwargs") or {}), **adapter}
        return super().from_pretrained(base or name, *args, **kwargs)  # type: ignore[misc]

    def register_adapter_buffers(self: Any) -> None:
        """Registers the buffers that are saved with an adapter (see above); the base does not use its own."""
        for module in (self.soft_prompts, self.region_projection):
            module.register_buffer("trained_on", torch.zeros(SIGNATURE_SIZE))
        self.soft_prompts.register_buffer("grid_size", torch.tensor(self.config.region_grid_size))

    @property
    def region_grid_size(self: Any) -> int:
        """k of the active adapter, or else of the configuration: a region becomes k x k visual tokens."""
        adapter = active_module(self.soft_prompts)
        return self.config.region_grid_size if adapter is None else int(adapter.grid_size)

    @torch.compiler.assume_constant_result
    def _active_grid_size(self: Any) -> int:
        return self.region_grid_size

    @torch.no_grad()
    def base_signature(self: Any) -> torch.Tensor | None:
        """
        One weight each of 64 matrices spread over ViT, h1 and language model, `(64,)` float32; two models that were
        trained apart do not share them. None where weights are not at hand (offloaded, sharded, or in 8 or 4 bits).
        Matrices that other adapters (LoRA) put beside the base's do not count.
        """
        modules = (self.vision_model, self.visual_projection, self.language_model)
        of_adapters = {"modules_to_save"}
        for module in self.modules():
            of_adapters.update(getattr(module, "adapter_layer_names", ()))
        matrices = [
            parameter
            for module in modules
            for name, parameter in module.named_parameters()
            if parameter.ndim > 1 and of_adapters.isdisjoint(name.split("."))
        ]
        if any(m.is_meta or not m.is_floating_point() or hasattr(m, "full_tensor") for m in matrices):
            return None
        chosen = [matrices[i * len(matrices) // SIGNATURE_SIZE] for i in range(SIGNATURE_SIZE)]
        places = [(i * 7919) % matrix.numel() for i, matrix in enumerate(chosen)]
        return torch.stack([matrix.flatten()[place].float().cpu() for matrix, place in zip(chosen, places)])

    def check_base_of(self: Any, module: nn.Module) -> None:
        """
        Compares what the active adapter of a module remembers with this model, once; weights that were rounded to 16
        bits count as equal.

        Raises:
            ValueError: where it was trained on another base.
        """
        adapter = None if torch.compiler.is_compiling() else active_module(module)
        if adapter is None or getattr(adapter.trained_on, "checked", False):
            return
        trained_on, own = adapter.trained_on.float().cpu(), self.base_signature()
        if own is not None and not torch.isclose(trained_on, own, rtol=0.01, atol=1e-6).all():
            raise ValueError(
                "The active adapter was trained on another base: the weights that it remembers are not those of "
                f"{self.config._name_or_path or 'this model'!r}. Load it on the base that its adapter_config.json "
                "names."
            )
        adapter.trained_on.checked = True

    def load_adapter(self: Any, peft_model_id: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As [`PreTrainedModel.load_adapter`]; the adapter is then the one that is active. For both of stage 2 at once:
        `set_adapter([…, …])`.

        Raises:
            ValueError: for an adapter that does not fit, is damaged or was trained on another base, with both names.
            If loading fails, the adapter is removed and the previously active adapters stay active.
        """
        name = kwargs.get("adapter_name") or (args[0] if args else None) or "default"
        is_new = name not in getattr(self, "peft_config", {})
        active = self.active_adapters() if self._hf_peft_config_loaded else []
        conversions = getattr(self, "_weight_conversions", None)
        try:
            info = super().load_adapter(peft_model_id, *args, **kwargs)  # type: ignore[misc]
            self._check_adapter_weights(name, getattr(info, "missing_keys", ()))
            self.set_adapter(name)  # PEFT leaves it to what was loaded and deleted before
            for module in (self.soft_prompts, self.region_projection):
                self.check_base_of(module)
            config = self.peft_config[name]
            if peft_model_id is not None:  # save_pretrained may write it into another folder
                base = config.base_model_name_or_path
                config.base_model_name_or_path = find_base_folder(base, peft_model_id) or base
        except Exception as error:
            if not is_new or name not in getattr(self, "peft_config", {}):
                raise
            expected = self.peft_config[name].base_model_name_or_path
            self.delete_adapter(name)
            if active:
                self.set_adapter(active)
            if not isinstance(error, RuntimeError | ValueError):
                raise
            raise ValueError(
                f"Adapter {name!r} from {peft_model_id} was trained on {expected!r} and does not fit "
                f"{self.config._name_or_path or 'this model'!r}: {error}"
            ) from error
        finally:
            # transformers keeps the adapter's key conversions, which would rename the base's tensors when it is saved.
            self._weight_conversions = conversions
        return info

    def _check_adapter_weights(self: Any, adapter_name: str, missing: Any) -> None:
        """Raises ValueError for an adapter whose file lacks a tensor, or holds NaN or infinity in one."""
        own = [key for key in missing if adapter_name in key.split(".")]  # "own" counts down_proj as well
        if own:
            raise ValueError(f"its file is damaged: {min(own)} is missing.")
        for key, tensor in self.state_dict().items():
            if adapter_name in key.split(".") and not (tensor.is_meta or tensor.isfinite().all()):
                raise ValueError(f"its file is damaged: {key} holds NaN or infinity.")

    def set_adapter(self: Any, adapter_name: str | list[str]) -> None:
        """
        Activates one adapter, or several that do not share a module, and deactivates the others; undoes
        `disable_adapters`.

        Raises:
            ValueError: for a name that is not loaded, with those that are; for two adapters of one module.
        """
        try:  # not at the top: PEFT is slow to import, and optional without adapters
            from peft.functional import set_adapter
        except ImportError as error:
            raise ImportError("Adapters need PEFT: pip install peft.") from error

        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self._check_loaded(name)
        for module_name, module in self.named_modules():
            sharing = [name for name in names if name in getattr(module, "modules_to_save", {})]
            if len(sharing) > 1:
                raise ValueError(
                    f"{sharing[0]!r} and {sharing[1]!r} are both adapters of {module_name}: only one can be active."
                )
        self.enable_adapters()
        set_adapter(self, names)

    def save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """
        As [`PreTrainedModel.save_pretrained`] of the base, whatever adapters are loaded, active or not; each of these
        goes into a folder of its name in `save_directory`, in PEFT's format.
        """
        adapters = list(self.peft_config) if self._hf_peft_config_loaded else []
        with self._unwrapped():
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        for name in adapters if kwargs.get("is_main_process", True) else []:
            from peft import get_peft_model_state_dict

            folder = os.path.join(save_directory, name)
            self.peft_config[name].save_pretrained(folder)
            tensors = get_peft_model_state_dict(self, adapter_name=name, save_embedding_layers=False)
            tensors = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in tensors.items()}
            save_file(tensors, os.path.join(folder, ADAPTER_SAFE_WEIGHTS_NAME), {"format": "pt"})

    @contextmanager
    def _unwrapped(self: Any) -> Iterator[None]:
        """Temporarily replaces PEFT's wrappers by the model's own modules."""
        modules, loaded = dict(self.named_modules()), self._hf_peft_config_loaded
        replaced: dict[str, nn.Module] = {}
        for name, module in modules.items():
            if not any(name.startswith(f"{outer}.") for outer in replaced):
                inner = module
                while hasattr(inner, "original_module") or hasattr(inner, "base_layer"):
                    inner = inner.original_module if hasattr(inner, "original_module") else inner.base_layer
                if inner is not module:
                    replaced[name] = inner
        self._hf_peft_config_loaded = False
        try:
            for name, inner in replaced.items():
                self.set_submodule(name, inner)
            yield
        finally:
            for name in replaced:
                self.set_submodule(name, modules[name])
            self._hf_peft_config_loaded = loaded

    def active_adapters(self: Any) -> list[str]:
        """Names of the adapters that `set_adapter` chose, in the order they were loaded, switched off or not."""
        active = {name for layer in self._adapter_layers() for name in layer.active_adapters}
        return [name for name in self.peft_config if name in active]

    def enable_adapters(self: Any) -> None:
        """Undoes `disable_adapters`: the adapters that `set_adapter` chose are active again."""
        for layer in self._adapter_layers():
            layer.enable_adapters(True)

    def disable_adapters(self: Any) -> None:
        """The base alone, bit for bit, until `enable_adapters`."""
        for layer in self._adapter_layers():
            layer.enable_adapters(False)

    def delete_adapter(self: Any, adapter_names: str | list[str]) -> None:
        """
        Removes adapters; with the last one of a module, PEFT's wrapper around it goes too.

        Raises:
            ValueError: for a name that is not loaded, with those that are.
        """
        # transformers' own refuses the PEFT that is current beside transformers 5.24 (it asks for 0.22).
        from peft.functional import delete_adapter

        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._check_loaded(name)
            delete_adapter(self, name, prefix=f"{self.peft_config.pop(name).peft_type.value.lower()}_")
        if not self.peft_config:
            del self.peft_config
            self._hf_peft_config_loaded = False
        for name, module in list(self.named_children()):
            if hasattr(module, "modules_to_save") and not module.modules_to_save:
                setattr(self, name, module.original_module)

    def _check_loaded(self: Any, name: str) -> None:
        loaded = list(getattr(self, "peft_config", {}))
        if name not in loaded:
            raise ValueError(
                f"There is no adapter {name!r}; loaded are {', '.join(map(repr, loaded)) or 'none'} "
                "(model.load_adapter(folder, adapter_name=…) loads one)."
            )

    def _adapter_layers(self: Any) -> list[Any]:
        layers = [layer for layer in self.modules() if hasattr(layer, "active_adapters") and layer is not self]
        layers = [layer for layer in layers if not callable(layer.active_adapters)]  # of PEFT, not of transformers
        if not layers:
            raise ValueError("No adapter is loaded: model.load_adapter(folder) loads one.")
        return layers


def find_base_folder(base: str | None, adapter_folder: str | os.PathLike) -> str | None:
    """
    Absolute path of an adapter's base, where `base` is a folder: in a folder above the adapter, or else in the working
    directory. None if it is in neither, as a base on the Hub.
    """
    folder = os.path.abspath(adapter_folder)
    while base:
        path = os.path.normpath(os.path.join(folder, base))
        if os.path.isfile(os.path.join(path, CONFIG_NAME)):
            return path
        if folder == os.path.dirname(folder):
            break
        folder = os.path.dirname(folder)
    return os.path.abspath(base) if base and os.path.isdir(base) else None


def _base_of_adapter(name: Any) -> str | None:
    """The folder of the base that a local adapter names; None for a whole model, and for a base on the Hub."""
    config = os.path.join(name or "", ADAPTER_CONFIG_NAME)
    if not name or not os.path.isfile(config) or os.path.isfile(os.path.join(name, CONFIG_NAME)):
        return None
    with open(config, encoding="utf-8") as file:
        return find_base_folder(json.load(file).get("base_model_name_or_path"), name)


def active_module(module: Any) -> Any:
    """An adapter's copy of a module, where one is active."""
    copies = getattr(module, "modules_to_save", None)
    if copies is None or module.disable_adapters or not module.active_adapters:
        return None
    return copies[module.active_adapters[0]]


__all__ = ["REGION_ADAPTERS", "RegionAdapterMixin", "active_module"]
