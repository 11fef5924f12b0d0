"""
Training steps of stage 1 on cached features beside the same steps on images: one process, one model, alternating. The
vision tower is frozen and the language model trained by LoRA; weights are random, which changes no time. Both read
their examples as training does: the one decodes images, the other reads features.

    .venv/bin/python benchmarks/feature_cache.py --train_file pairs.parquet --caption_column captions
"""

import argparse
import copy
import itertools
import tempfile

import torch
from common import MAX_LENGTH, alternate, print_result
from transformers.models.clip import CLIPImageProcessorPil

from mmgem import MMGEMConfig, MMGEMModel, MMGEMProcessor
from mmgem.data.arguments import DataArguments
from mmgem.data.loading import load_pairs
from mmgem.data.pairs import PairDataset
from mmgem.data.tokenizer import train_tokenizer
from mmgem.processing import to_mmgem_tokenizer
from mmgem.processing.tokenization_mmgem import special_token_ids
from mmgem.training.arguments import MMGEMTrainingArguments
from mmgem.training.feature_cache import cache_features
from mmgem.training.stages import make_optimizer
from mmgem.training.trainer import MMGEMTrainer


TOWERS = {
    "ViT-B/16 at 224": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16},
    "ViT-L/14 at 336": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14},
}
GOALS = {"ViT-B/16 at 224": 2, "ViT-L/14 at 336": 8}
SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


def make_trainer(tower: str, dataset: PairDataset, batch_size: int, folder: str) -> MMGEMTrainer:
    """The Trainer of a random model with this vision tower, LoRA of rank 16, and its optimizer."""
    tokenizer = to_mmgem_tokenizer(train_tokenizer((c for texts in dataset.captions() for c in texts), 4096))
    side = int(tower.split()[-1])
    vision = {"model_type": "clip_vision_model", "image_size": side, **TOWERS[tower]}
    config = MMGEMConfig(
        vision_config={**vision, "intermediate_size": 4 * vision["hidden_size"]},
        text_config={**SMOLLM2_135M, "pad_token_id": tokenizer.pad_token_id},
        projection_dim=512,
        **special_token_ids(tokenizer),
    )
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    args = MMGEMTrainingArguments(
        output_dir=folder,
        lora_rank=16,
        cache_features=True,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        max_steps=1,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    processor = MMGEMProcessor(image_processor, tokenizer, max_length=MAX_LENGTH)
    trainer = MMGEMTrainer(MMGEMModel(config), args, processor, dataset)
    trainer.optimizer = make_optimizer(args, trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def measure(tower: str, dataset: PairDataset, batch_size: int, repeats: int) -> dict[str, float]:
    """Median seconds of a step on images and on cached features."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(tower, dataset, batch_size, folder)
        uncached = copy.copy(trainer.train_dataset)
        collate = trainer.data_collator
        cache_features(trainer.model, trainer.train_dataset, collate, trainer.args, trainer.accelerator)
        batches = itertools.cycle(range(0, len(dataset) - batch_size + 1, batch_size))

        def step(dataset: PairDataset) -> None:
            start = next(batches)
            batch = collate([dataset[i] for i in range(start, start + batch_size)])
            trainer.training_step(trainer.model, batch)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        return alternate(
            {"images": lambda: step(uncached), "features": lambda: step(trainer.train_dataset)},
            repeats,
        )


def main() -> None:
    """Prints a table and, for each tower, the pairs/s on features over those on images as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--caption_column", default="captions")
    parser.add_argument("--towers", nargs="+", choices=list(TOWERS), default=list(TOWERS))
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    data = DataArguments(train_file=args.train_file, caption_column=args.caption_column, max_train_samples=args.images)
    dataset = load_pairs(data, image_size=224, seed=0)[0]
    print(f"SmolLM2-135M's size with LoRA of rank 16, batch {args.batch_size}, packed in rows of 128, float32")
    print(f"{'pairs/s':20}{'images':>9}{'features':>10}{'ratio':>8}")
    seconds = {tower: measure(tower, dataset, args.batch_size, args.repeats) for tower in args.towers}
    for tower, times in seconds.items():
        images, features = (args.batch_size / times[name] for name in ("images", "features"))
        print(f"{tower:20}{images:9.2f}{features:10.2f}{features / images:7.1f}x")
    for tower, times in seconds.items():
        ratio = round(times["images"] / times["features"], 1)
        peer = f"the same step on images, frozen {tower}"
        print_result("feature_cache", ratio, "x pairs/s on images", f">= {GOALS[tower]}", peer)


if __name__ == "__main__":
    main()
