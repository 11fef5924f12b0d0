"""
What one accelerator does with MM-GEM, with random weights and images: a stage-1 step in bfloat16 with each attention,
compiled or not, through the gradient cache; peak memory beside what `train.py --dry_run` says; embedding and captions.

    python benchmarks/gpu.py --output gpu.json                      # at most 8 minutes
    python benchmarks/gpu.py --sizes tiny --device cpu --steps 1    # what the tests run

MFU is the step's operations, counted once whatever is computed twice, over what the card can do in its time.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from common import joint_losses
from PIL import Image
from transformers.models.clip import CLIPImageProcessorPil

import mmgem
from mmgem import MMGEMConfig, MMGEMModel, MMGEMProcessor
from mmgem.data.arguments import DataArguments
from mmgem.data.collator import MODEL_INPUTS, PairCollator
from mmgem.data.scenes import ScenesDataset
from mmgem.data.tokenizer import train_tokenizer
from mmgem.evaluation.embedding import embed_texts
from mmgem.modeling_mmgem import contrastive_loss
from mmgem.modeling_mmgem.conversion_mmgem import configure_generation
from mmgem.processing import to_mmgem_tokenizer
from mmgem.processing.tokenization_mmgem import special_token_ids
from mmgem.training.arguments import DryRunArguments, MMGEMTrainingArguments
from mmgem.training.dry_run import estimate, measured_tflops
from mmgem.training.gradient_cache import cached_backward
from mmgem.training.memory import GIB


@dataclasses.dataclass
class Size:
    """Two towers, their vocabulary, and the batch of a step."""

    vision: dict[str, Any]
    text: dict[str, Any]
    vocab_size: int
    batch_size: int


def tower(width: int, layers: int, heads: int, intermediate_size: int, **others: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": intermediate_size, **others}


SIZES = {
    "ViT-L/14 + TinyLlama-1.1B": Size(
        tower(1024, 24, 16, 4096, image_size=224, patch_size=14),
        tower(2048, 22, 32, 5632, num_key_value_heads=4),
        vocab_size=32_000,
        batch_size=64,
    ),
    "ViT-B/16 + SmolLM2-135M": Size(
        tower(768, 12, 12, 3072, image_size=224, patch_size=16),
        tower(576, 30, 9, 1536, num_key_value_heads=3, tie_word_embeddings=True),
        vocab_size=49_152,
        batch_size=256,
    ),
    "tiny": Size(tower(32, 2, 2, 64, image_size=32, patch_size=8), tower(32, 2, 2, 64), vocab_size=600, batch_size=8),
}
# Dense bfloat16, TFLOP/s, as the makers state them.
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71}
PACK_LENGTH = 128
Measurement = tuple[str, Callable[[], dict[str, Any]]]  # what is measured, and how


def build(size: Size, device: torch.device) -> tuple[MMGEMModel, MMGEMProcessor]:
    """A model of random weights on the device; its tokenizer knows the captions of scenes."""
    tokenizer = to_mmgem_tokenizer(train_tokenizer(captions(500), min(512, size.vocab_size)))
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = MMGEMConfig(
        vision_config={"model_type": "clip_vision_model", **size.vision},
        text_config={"model_type": "llama", **size.text, "vocab_size": size.vocab_size, **ids},
        projection_dim=size.vision["hidden_size"],
        **special_token_ids(tokenizer),
    )
    with device:
        model = MMGEMModel(config)
    configure_generation(model, tokenizer)
    side = size.vision["image_size"]
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return model, MMGEMProcessor(image_processor, tokenizer)


def captions(count: int) -> list[str]:
    """Of scenes; made of small words, they have about as many tokens as a caption of the web."""
    scenes = ScenesDataset("train", count, 32)
    return [scenes[i]["caption"] for i in range(count)]


def batches(size: Size, processor: MMGEMProcessor, mini_batch_size: int, device: torch.device) -> dict[str, Any]:
    """A batch, packed, on the device."""
    image = torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()
    texts = captions(size.batch_size)
    examples = [{"image": image, "image_id": i, "caption": text, "bad": {}} for i, text in enumerate(texts)]
    batch = PairCollator(processor, pack_length=PACK_LENGTH, mini_batch_size=mini_batch_size)(examples)

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: placed(item) for name, item in value.items()}
        if isinstance(value, list):
            return [placed(item) for item in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return placed(batch)


def make_step(model: Any, batch: dict[str, Any], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Forward, backward and AdamW, as the Trainer does them; through the gradient cache if the batch is in parts."""
    autocast = torch.autocast(batch_device(batch).type, torch.bfloat16)

    def forward(inputs: dict[str, Any]) -> Any:
        with autocast:
            outputs = model(**{name: inputs[name] for name in MODEL_INPUTS if name in inputs}, return_loss=False)
        texts = outputs.text_embeds[inputs["text_index"]]
        return (texts, outputs.image_embeds, outputs.logit_scale), outputs.caption_loss

    def step() -> None:
        if "mini_batches" in batch:
            cached_backward(
                batch["mini_batches"],
                lambda part: forward({"pixel_values": part["pixel_values"], **part["sentences"]})[0],
                contrastive_loss,
                forward,
                lambda loss: loss.backward(),
                contextlib.nullcontext,
            )
        else:
            with autocast:
                losses = joint_losses(model, batch)
            sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def batch_device(batch: dict[str, Any]) -> torch.device:
    return batch.get("mini_batches", [batch])[0]["pixel_values"].device


def seconds_of(run: Callable[[], Any], device: torch.device, steps: int) -> float:
    """Median of `steps` after two that do not count."""
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def training(size: Size, device: torch.device, steps: int, peak: float) -> Iterator[Measurement]:
    """The same step, computed in each way."""
    model, processor = build(size, device)
    plans = {part: planned(size, model, processor, part) for part in (0, size.batch_size // 4)}

    def measure(attention: str, compiled: bool, mini_batch_size: int) -> dict[str, Any]:
        model.set_attn_implementation(attention)
        batch = batches(size, processor, mini_batch_size, device)
        if attention == "flash_attention_2":  # it keeps packed sequences apart in a single row alone
            batch.update({name: batch[name].reshape(1, -1) for name in ("input_ids", "position_ids", "labels")})
        model.zero_grad()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=device.type == "cuda")
        step = make_step(torch.compile(model) if compiled else model, batch, optimizer)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(step, device, steps)
        return {
            "per_second": size.batch_size / seconds,
            "unit": "pairs",
            "mfu": plans[0].flops / seconds / (peak * 1e12),
            "memory_gib": torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None,
            "dry_run_gib": sum(plans[mini_batch_size].memory.values()) / GIB,
        }

    part = size.batch_size // 4
    yield "step, sdpa", lambda: measure("sdpa", False, 0)
    yield f"step, sdpa, gradient cache of {part}", lambda: measure("sdpa", False, part)
    yield "step, flash_attention_2, one row", lambda: measure("flash_attention_2", False, 0)
    yield "step, sdpa, compiled", lambda: measure("sdpa", True, 0)  # last: compiling takes minutes


def planned(size: Size, model: MMGEMModel, processor: MMGEMProcessor, mini_batch_size: int) -> Any:
    """What the dry run says of this step."""
    batch = batches(size, processor, 0, torch.device("cpu"))
    lengths = batch["position_ids"].flatten()[batch["text_positions"]] + 1
    options = {"per_device_train_batch_size": size.batch_size, "mini_batch_size": mini_batch_size}
    options["pack_length"] = PACK_LENGTH
    args = MMGEMTrainingArguments(output_dir="unused", bf16=True, use_cpu=True, report_to="none", **options)
    data_args = DataArguments(dataset_name="scenes")
    dry_run = DryRunArguments(dry_run_caption_tokens=round(lengths.float().mean().item()))
    return estimate(model.config, args, data_args, dry_run)


def inference(size: Size, device: torch.device, steps: int, peak: float) -> Iterator[Measurement]:
    """Embedding of images, texts and regions, and captions, in bfloat16."""
    model, processor = build(size, device)
    model = model.to(torch.bfloat16).eval()
    count, side = size.batch_size, size.vision["image_size"]
    pixels = torch.randn(count, 3, side, side, device=device, dtype=torch.bfloat16)
    boxes = torch.tensor([[0.1, 0.2, 0.6, 0.9]], device=device).repeat(count, 16, 1) * side
    texts = captions(4 * count)
    prompt = processor(images=[Image.new("RGB", (side, side))], task="caption", return_tensors="pt")["input_ids"]
    prompts = {"input_ids": prompt.repeat(count, 1).to(device), "pixel_values": pixels}
    length = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}

    @torch.inference_mode()
    def measure(number: int, unit: str, run: Callable[[], Any]) -> dict[str, Any]:
        return {"per_second": number / seconds_of(run, device, steps), "unit": unit}

    yield "images embedded", lambda: measure(count, "images", lambda: model.get_embedding(pixel_values=pixels))
    with_boxes = {"pixel_values": pixels, "boxes": boxes}
    yield (
        "regions embedded, 16 an image",
        lambda: measure(16 * count, "regions", lambda: model.get_embedding(**with_boxes)),
    )
    yield (
        "texts embedded",
        lambda: measure(len(texts), "texts", lambda: embed_texts(model, processor, texts, 256)),
    )
    yield (
        "captions of 20 tokens",
        lambda: measure(count, "captions", lambda: model.generate(**prompts, **length)),
    )


def main() -> None:
    """Prints the table as it comes, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[name for name in SIZES if name != "tiny"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--peak_tflops", type=float, help="Of the card in bfloat16; known or measured by default.")
    parser.add_argument("--max_seconds", type=float, default=450, help="Nothing new is begun after that.")
    parser.add_argument("--output", help="File for the JSON.")
    args = parser.parse_args()
    start, device = time.perf_counter(), torch.device(args.device)
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    known = next((value for name, value in PEAK_TFLOPS.items() if name in card), None)
    peak = args.peak_tflops or known or measured_tflops(device.type, torch.bfloat16)
    print(f"{card}, {peak:.1f} TFLOP/s; torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{'':28}{'':44}{'':>12}{'':10}{'MFU':>7}{'GiB':>8}{'dry run':>9}")
    versions = {"mmgem": mmgem.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    result: dict[str, Any] = {"card": card, "peak_tflops": peak, "versions": versions, "rows": []}
    for name, measurements in ((name, part) for part in (inference, training) for name in args.sizes):
        for what, measure in measurements(SIZES[name], device, args.steps, peak):
            if time.perf_counter() - start > args.max_seconds:
                print(f"Stopped after {args.max_seconds:g} s.")
                return
            row = {"size": name, "what": what}
            try:
                row.update(measure())
            except Exception as error:  # of a kernel, a compiler, memory: the other rows are worth having
                row["fault"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            result["rows"].append(row)
            print(as_line(row), flush=True)
            if args.output:  # what was measured is kept, whatever comes next
                with open(args.output, "w", encoding="utf-8") as file:
                    json.dump(result, file, indent=1)


def as_line(row: dict[str, Any]) -> str:
    head = f"{row['size']:28}{row['what']:44}"
    if "fault" in row:
        return head + row["fault"]
    line = f"{head}{row['per_second']:12,.1f} {row['unit']}/s".ljust(94)
    numbers = [(row.get("mfu"), "7.1%"), (row.get("memory_gib"), "8.2f"), (row.get("dry_run_gib"), "9.2f")]
    return line + "".join("" if value is None else format(value, how) for value, how in numbers)


if __name__ == "__main__":
    main()
