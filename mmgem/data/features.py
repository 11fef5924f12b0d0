"""Features of images that went through a frozen vision tower, from memory-mapped files."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open


ROWS_PER_PART = 1024  # of a table; of shards a part is one tar
MAX_OPEN_PARTS = 256  # of a process, which may map some ten thousand files only


class FeatureCacheError(ValueError):
    """A cache of features does not belong to this run, or cannot be read."""


class UnreadableImageError(ValueError):
    """There are no features, because the image could not be read; the message says why."""


class CachedFeatures:
    """
    The features of a table's or of shards' images, in parts: one safetensors file each, with the tensors
    `pooled_features` `(n, C)` or `(n, 2 C)` and, if the step needs them, `patch_features` `(n, rows, columns, C)`,
    float16 (neither where no image of the part can be read); `image_ids` and `readable` `(n,)`; for regions `sizes`
    `(n, 2)`. Their metadata holds `unreadable`, the reasons by row (JSON).

    Args:
        paths: of the parts, in the order of the images.
    """

    def __init__(self, paths: Sequence[str]):
        self.paths = list(paths)
        self._open: dict[int, tuple[dict[str, torch.Tensor], dict[str, str]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each process maps the files itself

    def of_row(self, index: int) -> dict[str, Any]:
        """
        What an example of a table holds instead of its image: `pooled_features` and `patch_features` in float32,
        `image_id`, `size`.

        Raises:
            UnreadableImageError: with the reason.
        """
        part, row = divmod(index, ROWS_PER_PART)
        return self._read(*self.part(part), row)

    def of_sample(self, part: int, row: int, image_id: int, key: str) -> dict[str, Any]:
        """
        [`of_row`] for sample `row` of a tar; `image_id` is the hash of its image file, `key` its name.

        Raises:
            UnreadableImageError: with the reason.
            FeatureCacheError: if the tar held another image when the features were computed.
        """
        tensors, reasons = self.part(part)
        if row >= len(tensors["image_ids"]) or tensors["image_ids"][row] != image_id:
            raise FeatureCacheError(
                f"{self.paths[part]} was made of other images: {key} has changed since. Delete this file, or pass "
                "another --feature_cache_dir."
            )
        return self._read(tensors, reasons, row)

    def part(self, number: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors of a part, whose memory is its file, and the reasons of its unreadable images by row."""
        if number not in self._open:
            if len(self._open) >= MAX_OPEN_PARTS:
                del self._open[next(iter(self._open))]
            with safe_open(self.paths[number], "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
                self._open[number] = tensors, json.loads(file.metadata()["unreadable"])
        return self._open[number]

    def _read(self, tensors: dict[str, torch.Tensor], reasons: dict[str, str], row: int) -> dict[str, Any]:
        if not tensors["readable"][row]:
            raise UnreadableImageError(reasons[str(row)])
        found: dict[str, Any] = {"image_id": int(tensors["image_ids"][row])}
        for name in ("pooled_features", "patch_features"):
            if name in tensors:
                found[name] = tensors[name][row].float()
        if "sizes" in tensors:
            found["size"] = tuple(tensors["sizes"][row].tolist())
        return found
