"""The order in which training examples are drawn, where like ones share a batch."""

from collections.abc import Iterator

import numpy as np
import torch

from .pairs import PairDataset
from .triplets import TripletDataset


CLUSTER_COLUMN = "cluster"  # as `python -m mmgem.mining` writes it


class ClusteredSampler(torch.utils.data.Sampler):
    """
    Every index once in an epoch, cluster by cluster, so that a batch holds like examples, which are hard negatives of
    each other (as B3 does; Thirukovalluru et al., 2025). Clusters are put in a new order in each epoch, and so are
    their members.

    Args:
        dataset: a table with a column of the numbers of clusters; its epoch is that of the order.
        seed: of the order.

    Raises:
        ValueError: for a table without this column.
    """

    def __init__(self, dataset: PairDataset, seed: int):
        try:
            clusters = np.asarray(dataset.table[CLUSTER_COLUMN][:], dtype=np.int64)[np.asarray(dataset.rows)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"--batch_sampler clustered needs a column {CLUSTER_COLUMN!r} of numbers, as python -m mmgem.mining "
                "--cluster_size 32 writes it."
            ) from error
        order = clusters.argsort(kind="stable")
        self.clusters = np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1)
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, int(self.dataset._epoch)])
        for i in rng.permutation(len(self.clusters)):
            yield from rng.permutation(self.clusters[i]).tolist()


class OneSourceSampler(torch.utils.data.Sampler):
    """
    Indices in groups of `group_size`, each from one source: whoever takes batches of a part of the group sees one
    dataset at a time, whose negatives are harder. A source that is used up is shuffled anew.

    Args:
        dataset: whose epoch the order depends on.
        group_size: the batch of all processes.
        seed: of the order.

    Raises:
        ValueError: for a source that does not fill a group.
    """

    def __init__(self, dataset: TripletDataset, group_size: int, seed: int):
        self.dataset, self.group_size, self.seed = dataset, group_size, seed
        self.members = dataset.members()
        for i, members in enumerate(self.members):
            if len(members) < group_size:
                which = f"Dataset {i} of the mixture, of" if len(self.members) > 1 else "A dataset of"
                raise ValueError(
                    f"{which} {len(members)} examples, does not fill a batch of {group_size}; lower "
                    "--per_device_train_batch_size, or leave it out."
                )
        weights = np.array([source.weight for source in dataset.sources], dtype=np.float64)
        self.shares = weights / weights.sum()
        self.groups = sum(len(members) // group_size for members in self.members)

    def __len__(self) -> int:
        return self.groups * self.group_size

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, int(self.dataset._epoch)])
        left: list[np.ndarray] = [np.empty(0, dtype=np.int64) for _ in self.members]
        for _ in range(self.groups):
            source = int(rng.choice(len(self.members), p=self.shares))
            if len(left[source]) < self.group_size:
                left[source] = rng.permutation(self.members[source])
            yield from left[source][: self.group_size].tolist()
            left[source] = left[source][self.group_size :]
