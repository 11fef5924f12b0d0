"""The parts of a cache of features, and the images that they are computed of."""

import re
from collections.abc import Iterator
from typing import Any

import torch

from .features import ROWS_PER_PART
from .pairs import PairDataset
from .shards import ShardStream, read_samples


def part_names(dataset: PairDataset | ShardStream) -> list[str]:
    """The files of the parts: of each 1,024 rows of a table, or of each shard, by its position and name."""
    if isinstance(dataset, PairDataset):
        return [f"rows-{part:06}.safetensors" for part in range(-(-len(dataset) // ROWS_PER_PART))]
    names = []
    for source, shards in enumerate(dataset.sources):
        for number, shard in enumerate(shards):
            name = re.sub(r"[^\w.-]", "_", shard.rpartition("/")[2])[:100]
            names.append(f"shard-{source}-{number:06}-{name}.safetensors")
    return names


def rows_of_part(table: PairDataset, part: int) -> range:
    """The examples of a table's part."""
    return range(part * ROWS_PER_PART, min((part + 1) * ROWS_PER_PART, len(table)))


class TableImages(torch.utils.data.Dataset):
    """Of parts of a table in ascending order, the part and the image of each row."""

    def __init__(self, table: PairDataset, parts: list[int]):
        self.table, self.parts = table, parts

    def __len__(self) -> int:
        return sum(len(rows_of_part(self.table, part)) for part in self.parts)

    def __getitem__(self, i: int) -> tuple[int, dict[str, Any]]:
        part = self.parts[i // ROWS_PER_PART]  # only the table's last part may be shorter
        return part, self.table.image_with_id(rows_of_part(self.table, part)[i % ROWS_PER_PART])


class ShardImages(torch.utils.data.IterableDataset):
    """Of shards, the part and the image of each sample, and None behind the last; each worker reads whole shards."""

    def __init__(self, stream: ShardStream, parts: list[int]):
        self.stream, self.parts = stream, parts

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        info = torch.utils.data.get_worker_info()
        shards = [shard for source in self.stream.sources for shard in source]
        for part in self.parts[info.id :: info.num_workers] if info else self.parts:
            for sample in read_samples(shards[part]):
                yield part, self.stream.image_with_id(sample)
            yield part, None
