"""
One of the processes that test_suite.py starts: every metric of a tiny model on the same pictures, as JSON.

    torchrun --nproc_per_node 2 -m tests.evaluation.two_processes out.json
"""

import json
import sys

import torch
import torch.distributed as dist

from mmgem.data.pairs import PairDataset
from mmgem.data.regions import RegionDataset
from mmgem.data.scenes import CLASSES, ScenesDataset
from mmgem.evaluation.classification import evaluate_classification
from mmgem.evaluation.evaluator import evaluate_model
from mmgem.evaluation.long_text import evaluate_long_text
from mmgem.evaluation.regions import evaluate_regions
from mmgem.evaluation.reranking import evaluate_reranking
from tests.conftest import Table, make_model


def all_metrics(processor, batch_size):
    """Of scenes, of which one cannot be read; 9 of them, which two processes cannot halve."""
    torch.manual_seed(0)
    model = make_model(processor)
    table = Table([ScenesDataset("test", 9, 32)[i] for i in range(9)])
    table[4]["image"] = b"no picture"
    pairs, long = PairDataset(table), PairDataset(table, caption_column="long_caption")
    metrics, outputs = evaluate_model(model, processor, pairs, batch_size, caption_samples=9)
    readable = pairs.select(outputs["indices"])
    metrics.update(evaluate_reranking(model, processor, readable, 3, 2, max_new_tokens=5)[0])
    metrics.update(evaluate_classification(model, processor, pairs, table["label"], CLASSES, batch_size=batch_size)[0])
    metrics.update(evaluate_long_text(model, processor, long, batch_size, whole_image_box=True)[0])
    for stage in ("region-caption", "region-retrieval"):
        metrics.update(evaluate_regions(model, processor, RegionDataset(table), stage, batch_size)[0])
    return metrics


def main() -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(sys.argv[1])
    processor.max_length = 20
    dist.init_process_group("gloo")
    metrics = all_metrics(processor, 2)
    with open(f"{sys.argv[2]}/{dist.get_rank()}.json", "w") as file:
        json.dump(metrics, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
