"""
What fewer bits cost of recall: sentence-transformers' int8 and binary embeddings, and bitsandbytes' 8- and 4-bit
language model.

    pip install -e ".[sentence-transformers,quantization]"
    python benchmarks/quantization.py --model outputs/scenes [--images 2000]

Ranges of int8 come from training scenes. A store keeps the quantised vectors; queries are quantised like them, or stay
float32 and meet what the stored vectors stand for.
"""

import argparse

import numpy as np
import torch
from sentence_transformers.util import quantize_embeddings
from transformers import BitsAndBytesConfig

from mmgem import MMGEMModel, MMGEMProcessor
from mmgem.data.scenes import ScenesDataset
from mmgem.evaluation.embedding import embed_images, embed_texts
from mmgem.evaluation.retrieval import retrieval_metrics


# As they are: a small part of the weights, and adapters replace the projections.
KEPT = ["vision_model", "visual_projection", "text_projection", "caption_projection", "region_projection", "lm_head"]


def embed(model: MMGEMModel, processor: MMGEMProcessor, split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts and images of scenes, each a row."""
    scenes = list(ScenesDataset(split, number))
    texts = embed_texts(model, processor, [scene["caption"] for scene in scenes])
    parts = [scenes[start : start + 100] for start in range(0, number, 100)]
    images = torch.cat([embed_images(model, processor, [scene["image"] for scene in part]) for part in parts])
    return texts.numpy(), images.numpy()


def recall(texts: np.ndarray, images: np.ndarray) -> list[float]:
    """R@1 and R@10, text to image and image to text, by cosine."""
    sides = [torch.nn.functional.normalize(torch.from_numpy(np.asarray(s, dtype=np.float32))) for s in (texts, images)]
    found = retrieval_metrics(*sides, torch.arange(len(sides[0])))
    return [found[f"{way}_R@{k}"] for way in ("text_to_image", "image_to_text") for k in (1, 10)]


def megabytes(module: torch.nn.Module) -> float:
    """Of its parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters()) / 1e6


def print_table(what: str, rows: dict[str, list[float]]) -> None:
    print(f"| {what} | text to image R@1 | R@10 | image to text R@1 | R@10 |")
    print("|---|---|---|---|---|")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |")


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/scenes")
    parser.add_argument("--images", type=int, default=2000)
    options = parser.parse_args()
    model = MMGEMModel.from_pretrained(options.model).eval()
    processor = MMGEMProcessor.from_pretrained(options.model)
    calibration = np.concatenate(embed(model, processor, "train", 1000))
    texts, images = embed(model, processor, "test", options.images)
    ranges = np.stack([calibration.min(0), calibration.max(0)])
    steps = (ranges[1] - ranges[0]) / 255

    def int8(embeds: np.ndarray) -> np.ndarray:
        """What the stored bytes stand for."""
        return (quantize_embeddings(embeds, "int8", ranges=ranges).astype(np.float32) + 128.5) * steps + ranges[0]

    def signs(embeds: np.ndarray) -> np.ndarray:
        """+1 and -1 of the stored bits: their cosine ranks as Hamming's distance does."""
        bits = np.unpackbits(quantize_embeddings(embeds, "ubinary"), axis=1)
        return 2.0 * bits[:, : embeds.shape[1]] - 1

    dim = texts.shape[1]
    rows = {
        f"float32, {4 * dim} bytes": recall(texts, images),
        f"int8, {dim} bytes": recall(int8(texts), int8(images)),
        f"binary, {dim // 8} bytes": recall(signs(texts), signs(images)),
    }
    float_queries = [recall(texts, signs(images))[:2], recall(signs(texts), images)[2:]]
    rows[f"binary, {dim // 8} bytes, queries float32"] = [value for side in float_queries for value in side]
    print(f"{options.images} images and captions\n")
    print_table("embeddings", rows)

    rows = {f"float32, {megabytes(model.language_model):.2f} MB": recall(texts, images)}
    model = MMGEMModel.from_pretrained(options.model, dtype=torch.float16).eval()
    name = f"float16, {megabytes(model.language_model):.2f} MB"
    rows[name] = recall(*embed(model, processor, "test", options.images))
    for bits in (8, 4):
        config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=KEPT)
        model = MMGEMModel.from_pretrained(options.model, quantization_config=config, dtype=torch.float16).eval()
        name = f"{bits} bits, the rest float16, {megabytes(model.language_model):.2f} MB"
        rows[name] = recall(*embed(model, processor, "test", options.images))
    print()
    print_table("language model", rows)


if __name__ == "__main__":
    main()
