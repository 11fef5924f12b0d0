"""
How regions should be read where `image_pooling` is "tower": a SigLIP of scenes' size, trained by transformers' own
loss, is frozen; a language model learns its space; then h4 learns regions (stage 2) from either

    patches   the pooled patches of a region, as everywhere else
    head      SigLIP's attention head on the pooled patches, as if they were an image of one patch

    python benchmarks/tower_regions.py
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import print_result
from transformers import LlamaConfig, LlamaForCausalLM, SiglipConfig, SiglipModel
from transformers.models.siglip import SiglipImageProcessorPil

from mmgem import MMGEMModel, MMGEMProcessor
from mmgem.data.pairs import PairDataset
from mmgem.data.regions import RegionDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.data.tokenizer import train_tokenizer
from mmgem.evaluation.evaluator import evaluate_model
from mmgem.evaluation.regions import evaluate_regions
from mmgem.modeling_mmgem.vision_mmgem import EncodedImages
from mmgem.training import MMGEMTrainer, MMGEMTrainingArguments, RegionTrainer


SIDE, WIDTH = 64, 128
BATCH = 64
COMMON = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "warmup_steps": 50}
SIZES = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4}


def train_siglip(folder: Path, steps: int, scenes: Any) -> None:
    """A SigLIP of both towers, and a random language model with the tokenizer of the captions."""
    tokenizer = train_tokenizer(scenes["caption"], 512)
    text = {**SIZES, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    vision = {**SIZES, "num_hidden_layers": 3, "image_size": SIDE, "patch_size": 8}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    siglip = SiglipModel(SiglipConfig(text_config={**text, **ids}, vision_config=vision)).train()
    with torch.no_grad():
        siglip.logit_scale.fill_(2.3)
        siglip.logit_bias.fill_(-10)
    image_processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    dataset = PairDataset(scenes)
    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, collate_fn=list, drop_last=True)
    optimizer = torch.optim.AdamW(siglip.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    done = 0
    while done < steps:
        for examples in loader:
            pixels = image_processor([example["image"] for example in examples], return_tensors="pt")["pixel_values"]
            texts = tokenizer([example["caption"] for example in examples], padding=True, return_tensors="pt")
            loss = siglip(input_ids=texts["input_ids"], pixel_values=pixels, return_loss=True).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done % 200 == 0 or done == steps:
                print(f"  SigLIP, step {done}: {loss.item():.3f}", flush=True)
            if done == steps:
                break
    siglip.save_pretrained(folder / "vision")
    image_processor.save_pretrained(folder / "vision")
    LlamaForCausalLM(LlamaConfig(**text, **ids, num_key_value_heads=4)).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")


def read_by_head(model: Any, images: EncodedImages, grid_size: int | None = None) -> torch.Tensor:
    """`_cell_embeds` with the attention head on each pooled vector."""
    vectors = images.features
    if grid_size is not None:
        vectors = model.pool_aggregator(vectors, images.grid, images.boxes, images.masks, grid_size)
    pooled = model.vision_model.head(vectors.flatten(0, 1)[:, None])
    return model.visual_projection(pooled.unflatten(0, vectors.shape[:2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--siglip_steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    scenes, held_out = ScenesDataset("train", 35_840, SIDE), ScenesDataset("test", 500, SIDE)
    found: dict[str, list[float]] = {"patches": [], "head": []}
    own_reading = MMGEMModel._cell_embeds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        train_siglip(folder, options.siglip_steps, scenes)
        towers = (str(folder / "vision"), str(folder / "text"))
        model = MMGEMModel.from_vision_text_pretrained(*towers, image_pooling="tower")
        processor = MMGEMProcessor.from_vision_text_pretrained(*towers)
        args = MMGEMTrainingArguments(
            str(folder / "stage 1"),
            max_steps=options.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            projection_lr_multiplier=1.0,
            freeze=["vision_model", "visual_projection"],
            **COMMON,
        )
        MMGEMTrainer(model, args, processor, PairDataset(scenes)).train()
        metrics = evaluate_model(model, processor, PairDataset(held_out), BATCH, 0)[0]
        print({name: round(value, 3) for name, value in metrics.items() if "R@1" in name}, flush=True)
        model.save_pretrained(folder / "base")
        for seed in options.seeds:
            for reading in found:
                MMGEMModel._cell_embeds = own_reading if reading == "patches" else read_by_head
                model = MMGEMModel.from_pretrained(folder / "base")
                args = MMGEMTrainingArguments(
                    str(folder / f"{reading} {seed}"),
                    stage="region-retrieval",
                    max_steps=options.steps // 2,
                    per_device_train_batch_size=BATCH,
                    learning_rate=3e-3,
                    seed=seed,
                    **COMMON,
                )
                regions = RegionDataset(ScenesDataset("train", 10_000, SIDE))
                trainer = RegionTrainer(model, args, processor, regions)
                trainer.train()
                judged = evaluate_regions(model, processor, RegionDataset(held_out), "region-retrieval", BATCH)[0]
                figures = {name: round(value, 3) for name, value in judged.items() if "R@1" in name or "game" in name}
                print(reading, seed, figures, flush=True)
                found[reading].append(judged["region_to_phrase_R@1"])
    means = {reading: sum(values) / len(values) for reading, values in found.items()}
    ratio = round(means["patches"] / means["head"], 3)
    print_result("region_to_phrase_R@1, patches over head", ratio, "x", ">= 1", "head")


if __name__ == "__main__":
    main()
