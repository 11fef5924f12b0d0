"""Checkpoints that are loaded whole or refused."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


# Stage 1 does not train these: if a checkpoint has none, they start as the identity, and as copies of [CAP].
OPTIONAL_MODULES = ("region_projection", "soft_prompts")


class CheckedLoadingMixin:
    """Makes `from_pretrained` refuse damaged checkpoints, whose missing weights transformers would draw at random."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """
        [`PreTrainedModel.from_pretrained`]. The `name_or_path` of a model from a folder is an absolute path, because
        an adapter names its base by it: from another working directory, a relative path would be a name on the Hub.

        Raises:
            ValueError: naming the first weight that the checkpoint lacks, or that holds NaN or infinity.
        """
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        name = str(pretrained_model_name_or_path)
        missing = [key for key in info["missing_keys"] if key.split(".")[0] not in OPTIONAL_MODULES]
        if missing:
            raise ValueError(
                f"{name} is damaged: {min(missing)} is missing ({len(missing)} such weights). Take another copy."
            )
        refuse_not_finite(model.state_dict(), name)
        if os.path.isdir(model.name_or_path):
            model.name_or_path = model.config.name_or_path = os.path.abspath(model.name_or_path)
        return (model, info) if output_loading_info else model


@torch.no_grad()
def refuse_not_finite(tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """
    Raises:
        ValueError: naming the first weight that holds NaN or infinity; `name` is the checkpoint's.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(
                f"{name} is damaged: {key} holds NaN or infinity, as after a training that diverged. Take an earlier "
                "checkpoint."
            )


def weights_revision(folder: str | None, beginnings: tuple[str, ...] = ("",)) -> str | None:
    """
    A digest of the weights in a model's folder whose names have one of these beginnings, in whatever shards they are.
    An adapter's configuration holds it as the `revision` of its base, PEFT's name for what is a commit on the Hub.
    None if `folder` has no weights.
    """
    files = [safe_open(path, "pt") for path in Path(folder).glob("model*.safetensors")] if folder else []
    file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118  # not a mapping
    keys = sorted(key for key in file_of if key.startswith(beginnings))
    return digest_of_tensors((key, file_of[key].get_tensor(key)) for key in keys) if files else None


def digest_of_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """`sha256:` and the digest of names and contents, one tensor in memory at a time."""
    digest = hashlib.sha256()
    for key, tensor in tensors:
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


__all__ = ["CheckedLoadingMixin", "OPTIONAL_MODULES", "digest_of_tensors", "refuse_not_finite", "weights_revision"]
