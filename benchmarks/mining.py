"""
Memory of mining N x N: each size in a process of its own, on random unit vectors of 384 numbers.

    python benchmarks/mining.py
"""

import resource
import subprocess
import sys
import time

import torch
from common import print_result
from torch.nn.functional import normalize

from mmgem.mining import Embedded, MiningArguments, find_negatives


SIZES = (25_000, 50_000, 100_000)
DIM = 384


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def mine(count: int) -> None:
    """Prints the MiB of the vectors, those that mining took beside them at its peak, and its seconds."""
    torch.manual_seed(0)
    queries, keys = torch.empty(count, DIM), torch.empty(count, DIM)
    for vectors in (queries, keys):
        for part in vectors.split(1000):
            part.copy_(normalize(torch.randn(part.shape), dim=-1))
    before, start = peak_mib(), time.perf_counter()
    positives = torch.arange(count)[:, None].repeat(1, 2)
    options = MiningArguments(model="-", data_file="-", num_negatives=8, absolute_margin=0.0)
    chosen = find_negatives(Embedded(queries, keys, positives), options)
    assert sum(map(len, chosen)) > 0
    print(2 * count * DIM * 4 / 2**20, peak_mib() - before, time.perf_counter() - start)


def main() -> None:
    if len(sys.argv) > 1:
        mine(int(sys.argv[1]))
        return
    found = {}
    for count in SIZES:
        run = subprocess.run([sys.executable, __file__, str(count)], capture_output=True, text=True, check=True)
        vectors, beside, seconds = map(float, run.stdout.split())
        found[count] = beside
        whole = count**2 * 4 / 2**20
        print(
            f"{count:,} x {count:,}: {beside:.0f} MiB beside {vectors:.0f} MiB of vectors (all similarities: "
            f"{whole:,.0f} MiB), {seconds:.0f} s",
            flush=True,
        )
    ratio = found[SIZES[-1]] / found[SIZES[0]]
    print_result("mining_memory", round(ratio, 2), "x that of a sixteenth of the pairs", "<= 4", "none")


if __name__ == "__main__":
    main()
