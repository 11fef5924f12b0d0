"""
A joint training step with packed rows beside the same step padded: how full the rows are, what packing costs, pairs/s.

    python benchmarks/packing.py --train_file pairs.parquet --caption_column captions
"""

import argparse
import statistics
import time

import datasets
import torch
from common import print_result
from transformers.models.clip import CLIPImageProcessorPil

from mmgem import MMGEMConfig, MMGEMModel, MMGEMProcessor
from mmgem.data.collator import PairCollator, pack
from mmgem.data.pairs import as_captions
from mmgem.data.tokenizer import train_tokenizer
from mmgem.modeling_mmgem import contrastive_loss
from mmgem.processing import to_mmgem_tokenizer
from mmgem.processing.tokenization_mmgem import special_token_ids


MAX_LENGTH = 50
TOWER = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "pixel_values", "labels")


def build(captions: list[str]) -> tuple[MMGEMModel, MMGEMProcessor]:
    """ViT and Llama of 6 layers x 384, pictures of 128 px, a BPE of the captions."""
    tokenizer = to_mmgem_tokenizer(train_tokenizer(captions, 4096))
    vision = {"model_type": "clip_vision_model", "image_size": 128, "patch_size": 16, **TOWER}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **TOWER}
    config = MMGEMConfig(vision_config=vision, text_config=text, projection_dim=384, **special_token_ids(tokenizer))
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 128}, crop_size={"height": 128, "width": 128})
    return MMGEMModel(config).train(), MMGEMProcessor(image_processor, tokenizer, max_length=MAX_LENGTH)


def pad_to(batch: dict, length: int, pad_token_id: int) -> dict:
    """The padded batch as it is where every text has one fixed length."""
    missing = length - batch["input_ids"].shape[1]
    values = {"input_ids": pad_token_id, "attention_mask": 0, "labels": -100}
    for name, value in values.items():
        batch[name] = torch.nn.functional.pad(batch[name], (0, missing), value=value)
    return batch


def step(model: MMGEMModel, batch: dict) -> float:
    """Seconds for forward and backward."""
    start = time.perf_counter()
    model.zero_grad()
    outputs = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch})
    texts = outputs.text_embeds[batch["text_index"]]
    loss = outputs.caption_loss + contrastive_loss(texts, outputs.image_embeds, outputs.logit_scale)
    loss.backward()
    return time.perf_counter() - start


def main() -> None:
    """Prints a table and, as the last line, packed rows of 128 over rows padded to `max_length` as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--caption_column", default="captions")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    column = datasets.load_dataset("parquet", data_files=args.train_file, split="train")[args.caption_column]
    captions = [as_captions(value)[0] for value in column]
    model, processor = build(captions)
    image = processor.image_processor
    blank = torch.zeros(image.crop_size["height"], image.crop_size["width"], 3, dtype=torch.uint8).numpy()
    examples = [
        {"image": blank, "image_id": i, "caption": caption, "bad": {}}
        for i, caption in enumerate(captions[: args.batch_size])
    ]
    longest = MAX_LENGTH + 2
    batches = {f"packed {n}": PairCollator(processor, "joint", n)(examples) for n in (64, 96, 128, 192, 256)}
    batches["padded to the longest"] = PairCollator(processor)(examples)
    batches["padded to 50"] = pad_to(PairCollator(processor)(examples), longest, processor.tokenizer.pad_token_id)
    times: dict[str, list[float]] = {name: [] for name in batches}
    for run in range(args.repeats + 1):
        for name, batch in batches.items():
            seconds = step(model, batch)
            if run > 0:
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}

    lengths = [len(ids) for ids in processor.tokenizer(captions)["input_ids"]]
    print(f"{len(captions)} captions, {statistics.mean(lengths):.1f} tokens on average with BOS and [EMB]")
    print(f"{'rows':24}{'pairs/s':>9}{'fill':>8}{'packing':>10}")
    for name, batch in batches.items():
        tokens = sum(2 * n + 1 for n in lengths[: args.batch_size])
        fill = tokens / batch["input_ids"].numel()
        share = ""
        if name.startswith("packed"):
            row_length = batch["input_ids"].shape[1]
            both = [n for n in lengths[: args.batch_size] for n in (n, n + 1)]
            start = time.perf_counter()
            pack(both, row_length)
            share = f"{(time.perf_counter() - start) / medians[name]:10.2%}"
        print(f"{name:24}{args.batch_size / medians[name]:9.1f}{fill:8.3f}{share}")
    ratio = medians["padded to 50"] / medians["packed 128"]
    print_result(
        "packing", round(ratio, 2), "x the padded step's pairs/s", ">= 1.6", "the same step padded to 50 tokens"
    )


if __name__ == "__main__":
    main()
