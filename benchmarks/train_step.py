"""
A joint training step beside that of open_clip's CoCa (Yu et al., 2022): one process, alternating runs, the same
tokenizer ids, sizes of towers and images, and batch. CoCa has a second language model of the same size for captions,
as its authors have it; MM-GEM has one.

    make bench-env
    .venv-bench/bin/python benchmarks/train_step.py --train_file pairs.parquet --caption_column captions
"""

# isort: off
import torchvision_without_cuda  # noqa: F401
# isort: on

import argparse

import open_clip
import torch
from coca import build_coca, coca_texts
from common import (
    IMAGE_SIZE,
    MAX_LENGTH,
    PATCH_SIZE,
    TOWER,
    alternate,
    build,
    examples_of,
    joint_losses,
    make_step,
    print_result,
    read_captions,
)

from mmgem.data.collator import PairCollator


CONTEXT_LENGTH = 76  # of open_clip's CoCa configurations


def main() -> None:
    """Prints a table and, as the last line, our pairs/s over CoCa's as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--caption_column", default="captions")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    captions = read_captions(args.train_file, args.caption_column)
    model, processor = build(captions)
    tokenizer, examples = processor.tokenizer, examples_of(captions[: args.batch_size])
    packed = PairCollator(processor, pack_length=128)(examples)
    padded = PairCollator(processor)(examples)
    fixed = {**padded}
    missing = MAX_LENGTH - padded["input_ids"].shape[1]
    for name, value in {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}.items():
        fixed[name] = torch.nn.functional.pad(padded[name], (0, missing), value=value)

    width, layers, heads = (TOWER[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    vision = {"layers": layers, "heads": heads, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    coca = build_coca(width, heads, vision, layers, layers, processor, CONTEXT_LENGTH)
    coca_loss = open_clip.CoCaLoss(caption_loss_weight=1, clip_loss_weight=1, pad_id=tokenizer.pad_token_id)
    texts = coca_texts(processor, captions[: args.batch_size])
    rest = CONTEXT_LENGTH - texts.shape[1]
    long_texts = torch.nn.functional.pad(texts, (0, rest), value=tokenizer.pad_token_id)
    assert (texts[:, 1:] != tokenizer.pad_token_id).sum() == (packed["labels"] != -100).sum()

    own_step, coca_step = make_step(model), make_step(coca)

    def loss_of_coca(texts: torch.Tensor) -> torch.Tensor:
        return sum(coca_loss(**coca(padded["pixel_values"], texts)))

    runs = {
        f"CoCa, texts of {CONTEXT_LENGTH}": lambda: coca_step(lambda: loss_of_coca(long_texts)),
        f"CoCa, cut to the longest ({texts.shape[1]})": lambda: coca_step(lambda: loss_of_coca(texts)),
    }
    rows = {
        f"padded to {MAX_LENGTH}": fixed,
        f"padded to the longest ({padded['input_ids'].shape[1]})": padded,
        "packed in rows of 128": packed,
    }
    for name, batch in rows.items():
        runs[f"mmgem, {name}"] = lambda batch=batch: own_step(lambda: sum(joint_losses(model, batch)))
    seconds = alternate(runs, args.repeats)
    coca_parameters, own_parameters = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (coca, model))
    print(f"CoCa {coca_parameters:.1f} M parameters, mmgem {own_parameters:.1f} M; batch {args.batch_size}, float32")
    print(f"{'joint training step':36}{'pairs/s':>9}{'packed is faster':>18}")
    *_, last = seconds.values()
    for name, value in seconds.items():
        print(f"{name:36}{args.batch_size / value:9.1f}{value / last:17.2f}x")
    ratio = next(iter(seconds.values())) / last
    peer = f"open_clip CoCa, texts of {CONTEXT_LENGTH}"
    print_result("train_step", round(ratio, 2), "x CoCa's pairs/s", ">= 5", peer, open_clip=open_clip.__version__)


if __name__ == "__main__":
    main()
