"""
How full packed rows are on real captions, by their length and the batch, and what packing costs of a training step.

    python benchmarks/packing.py --train_file pairs.parquet --caption_column captions
"""

import argparse
import random
import time

import torch
from common import alternate, build, examples_of, joint_losses, make_step, print_result, read_captions

from mmgem.data.collator import PairCollator, pack


LENGTHS, BATCH_SIZES = (64, 80, 96, 128, 192, 256), (32, 64, 128, 256, 512)


def fill(lengths: list[int], row_length: int, batch_size: int) -> float:
    """Tokens over places, for captions in batches: each is in a batch once as a sentence, once behind an image."""
    places = tokens = 0
    for start in range(0, len(lengths) - batch_size + 1, batch_size):
        sequences = [n + extra for n in lengths[start : start + batch_size] for extra in (0, 1)]
        tokens += sum(sequences)
        places += len(pack(sequences, row_length)) * row_length
    return tokens / places


def main() -> None:
    """Prints a table and, as the last line, the fill at the default row length and batch 64 as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--caption_column", default="captions")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    captions = read_captions(args.train_file, args.caption_column)
    random.Random(0).shuffle(captions)
    model, processor = build(captions)
    lengths = [min(len(ids), processor.max_length) for ids in processor.tokenizer(captions)["input_ids"]]
    print(f"{len(captions)} captions, {sum(lengths) / len(lengths):.1f} tokens on average with BOS and [EMB]")
    print(f"{'fill':>10}" + "".join(f"{f'rows of {n}':>12}" for n in LENGTHS))
    for batch_size in BATCH_SIZES:
        print(f"{f'batch {batch_size}':>10}" + "".join(f"{fill(lengths, n, batch_size):12.3f}" for n in LENGTHS))

    examples = examples_of(captions[:64])
    sequences = [n + extra for n in lengths[:64] for extra in (0, 1)]
    batches = {n: PairCollator(processor, pack_length=n)(examples) for n in LENGTHS}
    step = make_step(model)
    runs = {
        f"rows of {n}": lambda batch=batch: step(lambda: sum(joint_losses(model, batch)))
        for n, batch in batches.items()
    }
    seconds = alternate(runs, args.repeats)
    print(f"\n{'batch 64':>12}{'pairs/s':>9}{'packing, share of the step':>28}")
    for n in LENGTHS:
        start = time.perf_counter()
        for _ in range(100):
            pack(sequences, n)
        share = (time.perf_counter() - start) / 100 / seconds[f"rows of {n}"]
        print(f"{f'rows of {n}':>12}{64 / seconds[f'rows of {n}']:9.1f}{share:28.4%}")
    print_result("packing_fill", round(fill(lengths, 128, 64), 3), "tokens / places", ">= 0.95", "-")


if __name__ == "__main__":
    main()
