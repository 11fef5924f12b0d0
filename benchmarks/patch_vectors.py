"""
A million real vectors: the patches of photographs, of unit norm, as any ViT of transformers computes them.

    python benchmarks/patch_vectors.py TOWER IMAGES.parquet --count 1000000 --output vectors.npy
"""

import argparse
import io

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel


def main() -> None:
    """Writes `(count, C)` float32."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tower")
    parser.add_argument("images")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    tower = AutoModel.from_pretrained(args.tower, dtype=torch.bfloat16).eval()
    processor = AutoImageProcessor.from_pretrained(args.tower, backend="pil")
    vectors = np.lib.format.open_memmap(args.output, "w+", np.float32, (args.count, tower.config.hidden_size))
    done, bar = 0, tqdm(total=args.count, unit=" vectors")
    for rows in pq.ParquetFile(args.images).iter_batches(args.batch_size, columns=["image"]):
        images = [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in rows["image"].to_pylist()]
        with torch.inference_mode():
            pixels = processor(images, return_tensors="pt")["pixel_values"].to(torch.bfloat16)
            patches = tower(pixels).last_hidden_state[:, 1:].float().flatten(0, 1)
        patches = normalize(patches, dim=-1).numpy()[: args.count - done]
        vectors[done : done + len(patches)] = patches
        done += len(patches)
        bar.update(len(patches))
        if done == args.count:
            return
    raise SystemExit(f"error: {args.images} has images for {done} vectors only.")


if __name__ == "__main__":
    main()
