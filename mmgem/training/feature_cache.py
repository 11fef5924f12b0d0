"""Features of a frozen vision tower, computed once into files that `data/features.py` reads."""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ..configuration import MMGEMConfig
from ..data.collator import PairCollator
from ..data.feature_parts import ShardImages, TableImages, part_names, rows_of_part
from ..data.features import ROWS_PER_PART, CachedFeatures, FeatureCacheError
from ..data.pairs import BadDataError, PairDataset
from ..data.regions import RegionDataset
from ..data.shards import ShardStream
from ..modeling_mmgem import MMGEMModel
from ..modeling_mmgem.loading_mmgem import digest_of_tensors
from ..output_lock import output_lock
from .arguments import MMGEMTrainingArguments


CHECKED_IMAGES = 10_000  # of a table, when a cache is used again
# Settings of configurations and image processors that change no feature.
IRRELEVANT = ("_name_or_path", "architectures", "dtype", "processor_class", "transformers_version")
GIB = 2**30


class DiskFullError(OSError):
    """The features do not fit on their disk, or cannot be written there."""


def cache_features(
    model: MMGEMModel,
    dataset: PairDataset | ShardStream,
    collator: PairCollator,
    args: MMGEMTrainingArguments,
    accelerator: Accelerator,
) -> dict[int | str, str]:
    """
    Runs the frozen vision tower once over the images of a training set, which reads their features from then on.

    Returns:
        a table's unreadable images, by index with the reason. A stream tells them as it goes.

    Raises:
        as [`FeatureCache.compute`].
    """
    dataset.features = FeatureCache(model, dataset, collator, args, accelerator).compute()
    return unreadable_images(dataset.features) if isinstance(dataset, PairDataset) else {}


def kept_grid_size(config: MMGEMConfig, objective: str) -> int:
    """k of the cells that stage 1 keeps of V; 1 keeps none, since the pooled vector is all that embeddings need."""
    return 1 if objective == "contrastive" else config.image_grid_size


class FeatureCache:
    """
    The features of a training set's images in a folder. Every part is one file, written under another name and then
    renamed: a run that was killed computes the missing parts only.

    Args:
        model: whose vision tower is frozen.
        dataset: of training.
        collator: of training, for its image processor.
        args: of training.
        accelerator: whose processes share the work: those of one machine share the parts.
    """

    def __init__(
        self,
        model: MMGEMModel,
        dataset: PairDataset | ShardStream,
        collator: PairCollator,
        args: MMGEMTrainingArguments,
        accelerator: Accelerator,
    ):
        self.model = model
        self.dataset, self.collator, self.accelerator = dataset, collator, accelerator
        self.folder = args.feature_cache_dir or os.path.join(str(args.output_dir), "features")
        # A folder, because safetensors may leave files of its own there too.
        self.unfinished = os.path.join(self.folder, ".unfinished-parts")
        self.quiet = bool(args.disable_tqdm)
        self.loader: dict[str, Any] = {
            "batch_size": args.per_device_eval_batch_size,
            "num_workers": args.dataloader_num_workers,
            "multiprocessing_context": args.dataloader_multiprocessing_context,
        }
        self.paths = [os.path.join(self.folder, name) for name in part_names(dataset)]
        # None keeps all of V, which regions need.
        is_stage_1 = not isinstance(dataset, RegionDataset)
        self.grid_size = kept_grid_size(self.model.config, args.objective) if is_stage_1 else None
        self.key = self._key()

    def compute(self) -> CachedFeatures:
        """
        Computes the missing parts, with the vision tower in eval mode.

        Raises:
            FeatureCacheError: if the folder holds features of another tower, preprocessing or table, or another run
                computes features in it.
            DiskFullError: if the features do not fit, or cannot be written; whole parts stay.
            BadDataError: if no image of a table can be read.
        """
        local_rank = self.accelerator.local_process_index
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.accelerator.num_processes > 1 else 1
        with ExitStack() as stack:
            try:
                os.makedirs(self.folder, exist_ok=True)
                if self.accelerator.is_main_process:
                    stack.enter_context(output_lock(self.folder, "--feature_cache_dir"))
            except ValueError as error:
                raise FeatureCacheError(str(error)) from error
            except OSError as error:
                raise DiskFullError(
                    f"{self.folder} cannot be written ({error}); make room, or choose another --feature_cache_dir."
                ) from error
            if local_rank == 0:
                self._check_present()
            self.accelerator.wait_for_everyone()
            own = range(local_rank, len(self.paths), local_size)
            missing = [part for part in own if not os.path.exists(self.paths[part])]
            self._check_disk([part for part in range(len(self.paths)) if not os.path.exists(self.paths[part])])
            self._compute_parts(missing)
            self.accelerator.wait_for_everyone()
            if local_rank == 0:
                shutil.rmtree(self.unfinished, ignore_errors=True)
        for path in self.paths:
            self._check_key(path)
        return CachedFeatures(self.paths)

    def _key(self) -> dict[str, Any]:
        """What the features depend on, by names that an error can say."""
        tower, config = self.model.vision_model, self.model.config
        precision = self.accelerator.mixed_precision
        settings = {"vision_config": config.vision_config, "image_processor": self.collator.processor.image_processor}
        key = {
            "weights of the vision tower": digest_of_tensors(sorted(tower.state_dict().items())),
            "image_pooling": config.image_pooling,
            "grid": "patches" if self.grid_size is None else self.grid_size,
            "precision": str(tower.dtype) if precision == "no" else precision,
        }
        for name, values in settings.items():
            key.update({f"{name}.{k}": v for k, v in values.to_dict().items() if k not in IRRELEVANT})
        if isinstance(self.dataset, PairDataset):
            key["number of rows"] = len(self.dataset)
        return json.loads(json.dumps(key, default=str))

    def _check_key(self, path: str) -> None:
        try:
            with safe_open(path, "pt") as file:
                key = json.loads(file.metadata()["key"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FeatureCacheError(
                f"{path} is no part of a feature cache, or damaged ({type(error).__name__}: {error}). Delete it."
            ) from error
        for name in sorted(self.key.keys() | key.keys()):
            if key.get(name) != self.key.get(name):
                raise FeatureCacheError(
                    f"{path} holds features of another run: {name} was {key.get(name)!r} there, and is "
                    f"{self.key.get(name)!r} now. Pass another --feature_cache_dir, or delete {self.folder}."
                )

    def _check_present(self) -> None:
        """
        Refuses parts of an earlier run whose key differs, or that were made of other images of a table: all of them up
        to 10,000, of larger tables as many rows spread evenly. Removes what was being written when a run was killed.
        """
        shutil.rmtree(self.unfinished, ignore_errors=True)
        found = {part for part, path in enumerate(self.paths) if os.path.exists(path)}
        for part in sorted(found):
            self._check_key(self.paths[part])
        if not isinstance(self.dataset, PairDataset):
            return  # every sample of a stream is compared when it is read
        features, count = CachedFeatures(self.paths), len(self.dataset)
        for index in np.linspace(0, count - 1, min(count, CHECKED_IMAGES)).astype(int).tolist():
            part, row = divmod(index, ROWS_PER_PART)
            if part in found and features.part(part)[0]["image_ids"][row] != self.dataset.image_id(index):
                raise FeatureCacheError(
                    f"{self.folder} holds features of other images: that of row {index} differs. Pass another "
                    f"--feature_cache_dir, or delete {self.folder}."
                )

    def _check_disk(self, missing: list[int]) -> None:
        """Refuses what will not fit. How many images shards hold is known only once they are read."""
        rows = 0
        if isinstance(self.dataset, PairDataset):
            rows = sum(len(rows_of_part(self.dataset, part)) for part in missing)
        config, k = self.model.config.vision_config, self.grid_size
        # The image processor decides; DINOv2's config has another size.
        height, width = self.collator.pixel_values([Image.new("RGB", (64, 64))]).shape[-2:]
        cells = (height // config.patch_size) * (width // config.patch_size) if k is None else k**2
        patches = 0 if k == 1 else cells * config.hidden_size
        needed = rows * 2 * (self.model.visual_projection.in_features + patches)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise DiskFullError(
                f"--cache_features needs {needed / GIB:.1f} GiB in {self.folder}, where {free / GIB:.1f} GiB are "
                "free; leave it out, or choose another --feature_cache_dir."
            )

    @torch.no_grad()
    def _compute_parts(self, parts: list[int]) -> None:
        if not parts:
            return
        self.model.eval()
        dataset: Any = self.dataset
        table = dataset if isinstance(dataset, PairDataset) else None
        images: Any = ShardImages(dataset, parts) if table is None else TableImages(table, parts)
        # A generator of its own leaves the run's random state as it was.
        generator = torch.Generator().manual_seed(0)
        batches = torch.utils.data.DataLoader(
            images, collate_fn=_ImageBatch(self.collator), generator=generator, **self.loader
        )
        in_progress: dict[int, list[dict[str, Any]]] = defaultdict(list)
        is_quiet = self.quiet or not self.accelerator.is_main_process
        total = None if table is None else len(images)
        with tqdm(desc="Features", unit="images", total=total, disable=is_quiet) as bar:
            for entries, pixels in batches:
                encoded = iter(()) if pixels is None else self._encode(pixels)
                for part, found in entries:
                    if found is not None:
                        in_progress[part].append(found if "reason" in found else {**found, **next(encoded)})
                        bar.update()
                    is_last = table is not None and len(in_progress[part]) == len(rows_of_part(table, part))
                    if found is None or is_last:
                        self._write(part, in_progress.pop(part, []))

    def _encode(self, pixels: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
        """The features of each image, as they are kept."""
        with self.accelerator.autocast():
            kept = self.model.compact_features(pixels.to(self.model.device), self.grid_size)
        halves = {name: tensor.to(torch.float16).cpu() for name, tensor in kept.items()}
        for i in range(len(pixels)):
            yield {name: tensor[i] for name, tensor in halves.items()}

    def _write(self, part: int, rows: list[dict[str, Any]]) -> None:
        """
        Writes one part, whole or not at all.

        Raises:
            FeatureCacheError: for features that float16 cannot hold.
            DiskFullError: where it cannot be written.
        """
        path = self.paths[part]
        readable = torch.tensor(["reason" not in row for row in rows], dtype=torch.bool)
        tensors = {"readable": readable, "image_ids": torch.tensor([row["image_id"] for row in rows]).long()}
        reasons = {i: row["reason"] for i, row in enumerate(rows) if "reason" in row}
        first: dict[str, Any] = next((row for row in rows if "reason" not in row), {})
        for name in [name for name in ("pooled_features", "patch_features") if name in first]:
            empty = torch.zeros_like(first[name])
            tensors[name] = torch.stack([row.pop(name, empty) for row in rows])
            finite = tensors[name].flatten(1).isfinite().all(1)
            if not finite.all():
                raise FeatureCacheError(
                    f"The vision tower's features of image {int(finite.int().argmin())} of {os.path.basename(path)} "
                    "are not finite in float16, in which they are kept. Train without --cache_features."
                )
        if "size" in first:
            tensors["sizes"] = torch.tensor([row.get("size", (0, 0)) for row in rows])
        temporary = os.path.join(self.unfinished, f"{self.accelerator.process_index}-{os.path.basename(path)}")
        try:
            os.makedirs(self.unfinished, exist_ok=True)
            save_file(tensors, temporary, {"key": json.dumps(self.key), "unreadable": json.dumps(reasons)})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            with suppress(FileNotFoundError):
                os.remove(temporary)
            free = shutil.disk_usage(self.folder).free / GIB
            raise DiskFullError(
                f"{path} could not be written ({error}), with {free:.1f} GiB free on that disk. Make room, or choose "
                "another --feature_cache_dir; started again in this one, the run computes the missing parts only."
            ) from error


def unreadable_images(features: CachedFeatures) -> dict[int | str, str]:
    """
    The reasons of a table's images that could not be read, by index.

    Raises:
        BadDataError: if none could.
    """
    found: dict[int | str, str] = {}
    count = 0
    for part in range(len(features.paths)):
        tensors, reasons = features.part(part)
        found.update({part * ROWS_PER_PART + int(row): reason for row, reason in reasons.items()})
        count += len(tensors["readable"])
    if len(found) == count:
        raise BadDataError(f"None of the {count} images could be read: {next(iter(found.values()))}")
    return found


class _ImageBatch:
    """Collates images of parts: the entries without their images, and the pixels of these `(n, 3, height, width)`."""

    def __init__(self, collator: PairCollator):
        self.collator = collator

    def __call__(self, entries: list[tuple[int, Any]]) -> tuple[list[tuple[int, Any]], torch.Tensor | None]:
        images = [found.pop("image") for _, found in entries if found is not None and "image" in found]
        return entries, self.collator.pixel_values(images) if images else None
