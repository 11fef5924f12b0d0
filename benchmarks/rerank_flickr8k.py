"""
Re-ordering by likelihood on photographs: weight and alpha are fitted on training images, and judged on validation
images, whose first caption is the query (text to image) or the answer (image to text).

    python benchmarks/rerank_flickr8k.py --model outputs/flickr8k-pretrained \
        --train_file train.parquet --validation_file validation.parquet
"""

import argparse
import json
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from common import print_result

from mmgem import MMGEMModel, MMGEMProcessor
from mmgem.data.pairs import PairDataset
from mmgem.data.table_files import read_file
from mmgem.evaluation.embedding import embed_pairs, evaluating
from mmgem.evaluation.likelihood import combined, pair_likelihoods
from mmgem.training.checks import has_bfloat16_instructions


COUNT = 50
WEIGHTS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Candidates(NamedTuple):
    """Of one way: the best 50 of each query, `(Q, 50)` each, and which of them is right."""

    cosines: torch.Tensor
    likelihoods: torch.Tensor
    priors: torch.Tensor
    is_right: torch.Tensor


def candidates(
    model: MMGEMModel, processor: MMGEMProcessor, file: str, limit: int | None, ways: dict[str, int], batch_size: int
) -> dict[str, Candidates]:
    """Cosines and likelihoods of the best 50 of the first queries of each way."""
    rows = read_file(file, "test")
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    dataset = PairDataset(rows, caption_column="captions")
    dataset.max_captions = 1
    with evaluating(model):
        found = embed_pairs(model, processor, dataset, batch_size)
        texts = [captions[0] for captions in dataset.captions()]
        similarity = found["image_embeds"] @ found["text_embeds"].T
        result = {}
        for way, count in ways.items():
            scores = (similarity.T if way == "text to image" else similarity)[:count]
            best = scores.topk(COUNT)
            queries = torch.arange(len(scores))[:, None].expand_as(best.indices)
            pairs = torch.stack([queries, best.indices], -1).flatten(0, 1)
            pairs = pairs.flip(1) if way == "text to image" else pairs
            both = [
                pair_likelihoods(model, processor, dataset, texts, pairs, batch_size, alpha).view_as(best.values)
                for alpha in ((0.0,) if way == "text to image" else (0.0, 1.0))
            ]
            prior = both[0] - both[-1]
            result[way] = Candidates(best.values, both[0], prior, best.indices == queries)
    return result


def recall(model: MMGEMModel, of: Candidates, weight: float, alpha: float) -> float:
    """R@1, a tie counting as wrong."""
    scores = combined(model, of.cosines, of.likelihoods - alpha * of.priors, weight)
    own = scores.masked_fill(~of.is_right, -torch.inf).amax(1, keepdim=True)
    return (of.is_right.any(1) & ((scores >= own).sum(1) == 1)).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--train_images", type=int, default=300)
    parser.add_argument("--text_queries", type=int, default=1000, help="Of validation: the first ones.")
    parser.add_argument("--image_queries", type=int, default=300, help="0 leaves out image to text.")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    model = MMGEMModel.from_pretrained(options.model).eval()
    processor = MMGEMProcessor.from_pretrained(options.model)
    autocast = torch.autocast("cpu", torch.bfloat16) if has_bfloat16_instructions() else nullcontext()
    with autocast:
        ways = {"text to image": options.text_queries}
        if options.image_queries:
            ways["image to text"] = options.image_queries
        queries = dict.fromkeys(ways, options.train_images)
        train = candidates(model, processor, options.train_file, options.train_images, queries, options.batch_size)
        held_out = candidates(model, processor, options.validation_file, None, ways, options.batch_size)
    lines, figures = [], {}
    for way, of in held_out.items():
        alphas = ALPHAS if way == "image to text" else (0.0,)  # which of one text's images is right needs no prior
        weight, alpha = max(product(WEIGHTS, alphas), key=lambda pair: recall(model, train[way], *pair))
        before, after = recall(model, of, 0, 0), recall(model, of, weight, alpha)
        default = recall(model, of, 8.0, 0.0)
        figures[way] = {"weight": weight, "alpha": alpha, "before": before, "after": after, "default": default}
        figures[way] |= {"queries": len(of.cosines), "within 50": of.is_right.any(1).double().mean().item()}
        lines.append(f"{way}: {json.dumps(figures[way])}")
    table = read_file(options.validation_file, "test")
    pixels = processor(images=[table[0]["image"]], return_tensors="pt")["pixel_values"]
    k, patches = processor.image_grid_size**2, (pixels.shape[-1] // model.pool_aggregator.patch_size) ** 2
    ids = processor.sentence_ids([row[0] for row in table["captions"]])
    words = sum(map(len, ids)) / len(ids) - 1  # without BOS, [EMB] being EOS here
    figures["tokens per query"] = {
        "ours": COUNT * (words + 2 + k),
        "one for each patch": COUNT * (words + 2 + patches),
    }
    print("\n".join(lines), figures["tokens per query"], sep="\n")
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2) + "\n")
    found = figures["text to image"]
    print_result("text to image R@1, re-ordered", found["after"] / found["before"], "x", ">= 1.15", "cosine")


if __name__ == "__main__":
    main()
