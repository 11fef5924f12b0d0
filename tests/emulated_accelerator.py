"""
An accelerator with two devices, `pretend:1` and `pretend:2`, made of the CPU.

A tensor on it holds a CPU tensor. Each operation runs on the CPU, is refused where its tensors sit on different
devices, and is counted where a real accelerator would make the host wait for it.

Import this module before anything is trained: autograd counts the devices once. torch gives a backend in Python one
device, so that in C++ all tensors are on `pretend:0`; what an operation makes there inside belongs anywhere.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _DummyPrivateUse1Hook, _setup_privateuseone_for_python_backend


aten = torch.ops.aten
NAME = "pretend"
COPIES = {aten.copy_.default, aten._to_copy.default}
# Operations whose result, or the size of it, the host must read.
WAITING = {
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default),
    *(aten._unique2.default, aten.unique_dim.default, aten.repeat_interleave.Tensor, aten.bincount.default),
    *(aten.unique_consecutive.default, aten.allclose.default),
}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
_recording: list[list[str]] = []  # the list of the block of `waits` that we are in


class PretendTensor(torch.Tensor):
    """A CPU tensor that says it is on a device."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, index: int) -> "PretendTensor":
        return torch.Tensor._make_wrapper_subclass(
            *(cls, held.shape, held.stride(), held.storage_offset()), dtype=held.dtype, device=f"{NAME}:0"
        )

    def __init__(self, held: torch.Tensor, index: int):
        self.held, self.index = held, index

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(NAME, self.index)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendTensor({self.held}, device={self.device})"

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """torch's own compares devices in C++, where all of these are one."""
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        copy = kwargs.pop("copy", False)
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if (device or self.device) == self.device and (dtype or self.dtype) == self.dtype and not copy:
            return self
        return super().to(*args, **kwargs, copy=copy)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parts = func.decompose(*args, **kwargs)  # in inference mode nothing did that before
        if parts is not NotImplemented:
            return parts
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        index: int | None = max(t.index for t in tensors if isinstance(t, PretendTensor))
        target = kwargs.get("device") or (args[0].device if func is aten.copy_.default else None)
        if target is not None:
            index = _index_of(target)
        if func not in COPIES:
            _check_devices(func, tensors)
        if func in WAITING or _is_mask_index(func, args) or (func in COPIES and index is None):
            _record_wait(func)
        options = {name: _held(value) for name, value in kwargs.items()}
        if "device" in options:
            options["device"] = "cpu"
        if options.get("pin_memory"):
            options["pin_memory"] = False
        result = func(*tree_map(_held, args), **tree_map(_held, options))
        written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if written and len(func._schema.returns) == 1:  # in place: "self" or "out"
            return kwargs["out"] if written == ["out"] else args[0]
        if index is None:
            return result
        with torch.inference_mode(False):  # a view of an ordinary tensor is one, in inference mode too
            wrapped = tree_map(lambda t: PretendTensor(t, index) if isinstance(t, torch.Tensor) else t, result)
            return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _index_of(device: Any) -> int | None:
    """Of a device of ours, 0 for any of them; None for the CPU."""
    device = torch.device(device)
    return (device.index or 0) if device.type == NAME else None


def _held(value: Any) -> Any:
    return value.held if isinstance(value, PretendTensor) else value


def _check_devices(func: Any, tensors: list[torch.Tensor]) -> None:
    """As CUDA does: scalars, and indices in brackets, may be on the CPU."""
    indexes = func in INDEXING
    devices = {
        str(t.device)
        for t in tensors
        if (t.index if isinstance(t, PretendTensor) else t.ndim > 0 and not (indexes and not t.is_floating_point()))
    }
    if len(devices) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {sorted(devices)}.")


def _is_mask_index(func: Any, args: Any) -> bool:
    return func in INDEXING and any(t is not None and t.dtype == torch.bool for t in args[1])


def _record_wait(func: Any) -> None:
    """The operation, and the innermost function outside torch that asked for it."""
    if not _recording:
        return
    frame = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__][-1]
    _recording[-1].append(f"{func} in {'/'.join(frame.filename.split('/')[-3:])}, {frame.name}")


def _empty(size: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> torch.Tensor:
    return PretendTensor(torch.empty(size, dtype=dtype), _index_of(device))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> torch.Tensor:
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype), _index_of(device))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _held(target).copy_(_held(source))
    return target


def _autocast(func: Any) -> Any:
    """The operation with its tensors in autocast's precision, as the products of every accelerator are."""

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME)

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return func(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return run


class _Hook(_DummyPrivateUse1Hook):
    """Nothing in the other tests sees an accelerator: it is there for those who name it."""

    def is_available(self) -> bool:
        return False


_BACKEND = SimpleNamespace(
    is_initialized=lambda: True,
    is_available=lambda: False,
    current_device=lambda: 1,
    device_count=lambda: 3,
    _is_in_bad_fork=lambda: False,
    manual_seed_all=lambda seed: None,
    get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    get_rng_state=lambda device=0: torch.empty(0, dtype=torch.uint8),
    set_rng_state=lambda state, device=0: None,
)
_setup_privateuseone_for_python_backend(NAME, _BACKEND, hook=_Hook())
_library = torch.library.Library("aten", "IMPL")
_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
for _name in ("linear", "matmul", "mm", "bmm", "addmm", "conv2d", "scaled_dot_product_attention"):
    _library.impl(_name, _autocast(getattr(aten, _name).default), "AutocastPrivateUse1")
_fallback = torch.library.Library("_", "IMPL")
_fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


@contextmanager
def waits() -> Iterator[list[str]]:
    """The operations inside the block that the host has to wait for, and who asked for them."""
    _recording.append([])
    try:
        yield _recording[-1]
    finally:
        _recording.pop()
