"""
What the start of new projections is worth before any training step: retrieval by h1 and h2 alone, for several
poolings, numbers of images and floors of the whitening.

    python benchmarks/start.py --vision VIT_FOLDER --text LM_FOLDER --train_file train.parquet \
        --validation_file validation.parquet

Needs a column `image` and one of `captions`; the first caption of every image counts.
"""

import argparse
from typing import Any

import torch
from common import print_result
from tqdm import tqdm

import mmgem.training.start as start
from mmgem import MMGEMModel, MMGEMProcessor
from mmgem.data.arguments import DataArguments
from mmgem.data.collator import PairCollator
from mmgem.data.loading import load_pairs
from mmgem.data.pairs import PairDataset
from mmgem.evaluation.retrieval import retrieval_metrics
from mmgem.modeling_mmgem.embedding_mmgem import unit_norm
from mmgem.modeling_mmgem.vision_mmgem import encode_images


BATCH = 50
POOLINGS = ("mean", "cls", "cls+mean")


@torch.no_grad()
def encode(model: MMGEMModel, processor: MMGEMProcessor, dataset: PairDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Class token beside the mean of patches `(N, 2 C)`, and the states at [EMB] of the first captions `(N, H)`."""
    collator, pooled = PairCollator(processor), []
    for first in tqdm(range(0, len(dataset), BATCH), desc="Images"):
        images = [dataset.image(i) for i in range(first, min(first + BATCH, len(dataset)))]
        pooled.append(encode_images(model.vision_model, collator.pixel_values(images), "cls+mean")[0].float())
    texts = [captions[0] for captions in dataset.captions()]
    return torch.cat(pooled), start._text_states(model, processor, texts, BATCH)


@torch.no_grad()
def recall(train: Any, held_out: Any, size: int) -> float:
    """Text to image R@10 of the held-out pairs by an h1 and an h2 that start from the training pairs."""
    h1, h2 = torch.nn.Linear(train[0].shape[1], size), torch.nn.Linear(train[1].shape[1], size)
    start.whiten(h1, train[0])
    start.predict(h2, train[1][:, None], unit_norm(h1(train[0])))
    images, texts = unit_norm(h1(held_out[0])), unit_norm(h2(held_out[1]))
    return retrieval_metrics(texts, images, torch.arange(len(images)))["text_to_image_R@10"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("vision", "text", "train_file", "validation_file"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--images", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--floors", type=float, nargs="+", default=[0.01, 0.3, 1.0, 3.0, 10.0])
    parser.add_argument("--projection_dim", type=int, default=384)
    options = parser.parse_args()
    files = {"train_file": options.train_file, "validation_file": options.validation_file}
    datasets: Any = load_pairs(DataArguments(**files, caption_column="captions"), 0, seed=0)
    most = max(options.images)
    chosen = torch.linspace(0, len(datasets[0]) - 1, most).int().tolist()
    model = MMGEMModel.from_vision_text_pretrained(options.vision, options.text, attn_implementation="eager")
    processor = MMGEMProcessor.from_vision_text_pretrained(options.vision, options.text)
    with torch.autocast("cpu", torch.bfloat16):
        train, held_out = (encode(model, processor, part) for part in (datasets[0].select(chosen), datasets[1]))
    width = train[0].shape[1] // 2
    parts = {"mean": slice(width, None), "cls": slice(0, width), "cls+mean": slice(None)}
    print(f"| pooling | images | {' | '.join(f'floor {floor:g}' for floor in options.floors)} |")
    print("|---|---|" + "---|" * len(options.floors))
    best = 0.0
    for pooling in POOLINGS:
        for images in options.images:
            rows = torch.linspace(0, most - 1, images).int()
            found = []
            for start.FLOOR in options.floors:
                pairs = (train[0][rows][:, parts[pooling]], train[1][rows])
                found.append(recall(pairs, (held_out[0][:, parts[pooling]], held_out[1]), options.projection_dim))
            print(f"| {pooling} | {images:,} | {' | '.join(f'{value:.3f}' for value in found)} |", flush=True)
            best = max(best, *found)
    print_result("text_to_image_R@10 before training", round(best, 3), "share", "> 0.01 (chance)", "none")


if __name__ == "__main__":
    main()
