"""Patch features of a frozen ViT, computed once and read from a memory-mapped file."""

import os
import shutil
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from tqdm import tqdm

from ..data.collator import PairCollator
from ..data.pairs import BadDataError
from ..data.regions import RegionDataset
from ..modeling_mmgem import MMGEMModel
from ..modeling_mmgem.vision_mmgem import encode_images


class DiskFullError(OSError):
    """The features do not fit on the disk of `output_dir`."""


class FeatureDataset(torch.utils.data.Dataset):
    """
    A [`RegionDataset`] after the ViT: its examples hold `patch_features` `(rows, columns, C)` instead of an image.
    """

    def __init__(
        self, dataset: RegionDataset, examples: list[dict[str, Any]], path: str, shape: torch.Size, dtype: torch.dtype
    ):
        self.dataset = dataset
        self.examples = examples
        self.path, self.shape, self.dtype = path, shape, dtype
        self._features: torch.Tensor | None = None

    @property
    def features(self) -> torch.Tensor:
        """`(images, rows, columns, C)`; each process maps the file for itself."""
        if self._features is None:
            self._features = _memory_mapped(self.path, self.shape, self.dtype)
        return self._features

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_features": None}  # a spawned worker of the loader maps the file itself

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        example = self.dataset.draw(example, self.dataset.rows[example["index"]])
        features = self.features[example["index"]]
        return {**example, "pooled_features": features.mean((0, 1)), "patch_features": features, "bad": {}}


class _ProcessShare(torch.utils.data.Dataset):
    """Every `step`-th example of a dataset with all its regions, or the reason why it cannot be read."""

    def __init__(self, dataset: RegionDataset, start: int, step: int):
        self.dataset = dataset
        self.indices = range(start, len(dataset), step)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[int, dict[str, Any] | str]:
        index = self.indices[i]
        try:
            return index, self.dataset.describe(self.dataset.rows[index])
        except Exception as error:  # Pillow's readers raise whatever they stumble over
            return index, f"{type(error).__name__}: {error}"


@torch.no_grad()
def cache_features(
    model: MMGEMModel,
    dataset: RegionDataset,
    collator: PairCollator,
    accelerator: Accelerator,
    path: str,
    quiet: bool = False,
    **loader: Any,
) -> tuple[FeatureDataset, dict[int | str, str]]:
    """
    Runs the ViT over all images, in eval mode. The processes of a machine share the work and the file.

    Args:
        path: of the file, images x patches x C numbers. The caller removes it in the end.
        quiet: shows no progress bar.
        **loader: arguments of the DataLoader that reads the images: `batch_size`, `num_workers`, …

    Returns:
        the dataset of the readable images; of this process's share, the reasons of unreadable ones by index.

    Raises:
        BadDataError: if no image can be read.
        DiskFullError: if the file does not fit on its disk, with both sizes.
    """
    model.eval()
    local_rank = accelerator.local_process_index
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if accelerator.num_processes > 1 else 1
    if local_rank == 0 and os.path.exists(path):  # left by a run that was killed
        os.remove(path)
    accelerator.wait_for_everyone()
    batches = torch.utils.data.DataLoader(_ProcessShare(dataset, local_rank, local_size), collate_fn=list, **loader)
    described: dict[int, dict[str, Any]] = {}
    bad: dict[int | str, str] = {}
    features, shape_and_dtype = None, None
    for batch in tqdm(batches, desc="Patch features", disable=quiet or not accelerator.is_main_process):
        bad.update({index: reason for index, reason in batch if isinstance(reason, str)})
        readable = {index: example for index, example in batch if not isinstance(example, str)}
        if not readable:
            continue
        pixels = collator.pixel_values([example.pop("image") for example in readable.values()])
        with accelerator.autocast():
            _, patches = encode_images(model.vision_model, pixels.to(model.device), "mean")
        if features is None:
            shape_and_dtype = (torch.Size((len(dataset), *patches.shape[1:])), patches.dtype)
            features = _memory_mapped(path, *shape_and_dtype)
        features[list(readable)] = patches.cpu()
        described.update({index: {**example, "index": index} for index, example in readable.items()})
    if accelerator.num_processes > 1:
        shares: list[Any] = [None] * accelerator.num_processes
        dist.all_gather_object(shares, (described, shape_and_dtype))
        for other_described, other_shape_and_dtype in shares:
            described.update(other_described)
            shape_and_dtype = shape_and_dtype or other_shape_and_dtype
    if shape_and_dtype is None:
        raise BadDataError(f"None of the {len(dataset)} images could be read: {next(iter(bad.values()))}")
    return FeatureDataset(dataset, [described[index] for index in sorted(described)], path, *shape_and_dtype), bad


def _memory_mapped(path: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor whose memory is the file; processes that map the same file share it."""
    size = shape.numel()
    needed, free = size * dtype.itemsize, shutil.disk_usage(os.path.dirname(path) or ".").free
    if needed > free and not os.path.exists(path):
        raise DiskFullError(
            f"--cache_features needs {needed / 2**30:.1f} GiB in {os.path.dirname(path)}, where {free / 2**30:.1f} "
            "GiB are free; leave it out, or choose another --output_dir."
        )
    return torch.from_file(path, shared=True, size=size, dtype=dtype).view(shape)
