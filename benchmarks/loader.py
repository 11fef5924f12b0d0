"""
JPEG to tensor on one core: our dataset and collator, texts and packing included, beside a plain DataLoader with Pillow
that decodes, resizes and crops each image and makes a tensor of it.

    python benchmarks/loader.py --images folder_of_jpegs
"""

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from common import alternate, print_result
from PIL import Image
from transformers.models.clip import CLIPImageProcessorPil

from mmgem import MMGEMProcessor
from mmgem.data.collator import PairCollator
from mmgem.data.pairs import PairDataset
from mmgem.data.tokenizer import train_tokenizer
from mmgem.processing import to_mmgem_tokenizer


SIDE, BATCH_SIZE = 224, 32
MEAN, STD = [0.4815, 0.4578, 0.4082], [0.2686, 0.2613, 0.2758]
SIZES = (None, 640, 1024, 2048)  # of the longer side; None: as they are


class PlainDataset(torch.utils.data.Dataset):
    """What one writes with Pillow and numpy."""

    def __init__(self, files: list[bytes]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(io.BytesIO(self.files[index])).convert("RGB")
        factor = SIDE / min(image.size)
        width, height = round(image.width * factor), round(image.height * factor)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - SIDE) // 2, (height - SIDE) // 2
        pixels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32) / 255
        normalised = (pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
        return torch.from_numpy(normalised).permute(2, 0, 1).contiguous()


def resized(content: bytes, longer: int | None) -> bytes:
    """The JPEG with its longer side of so many pixels."""
    if longer is None:
        return content
    image = Image.open(io.BytesIO(content)).convert("RGB")
    factor = longer / max(image.size)
    buffer = io.BytesIO()
    image.resize((round(image.width * factor), round(image.height * factor))).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def main() -> None:
    """Prints a table and, as the last line, the least ratio of images per second as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = [path.read_bytes() for path in sorted(Path(args.images).rglob("*.jpg"))]
    tokenizer = to_mmgem_tokenizer(train_tokenizer(["a dog on a beach", "two people ride red bicycles"] * 3, 320))
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=MEAN, image_std=STD
    )
    collator = PairCollator(MMGEMProcessor(image_processor, tokenizer), pack_length=128)
    print(f"{len(files)} JPEGs to {SIDE} x {SIDE}, one process, one thread; images/s")
    print(f"{'longer side':>12}{'mmgem':>9}{'plain':>9}{'ratio':>8}")
    ratios = []
    for longer in SIZES:
        contents = [resized(content, longer) for content in files]
        own = PairDataset([{"image": content, "caption": "a dog on a beach"} for content in contents])
        own.least_side = SIDE
        loaders = {
            "mmgem": torch.utils.data.DataLoader(own, BATCH_SIZE, collate_fn=collator),
            "plain": torch.utils.data.DataLoader(PlainDataset(contents), BATCH_SIZE),
        }
        runs = {name: lambda loader=loader: list(loader) for name, loader in loaders.items()}
        rates = {name: len(files) / seconds for name, seconds in alternate(runs, args.repeats).items()}
        ratios.append(rates["mmgem"] / rates["plain"])
        name = "as they are" if longer is None else f"{longer}"
        print(f"{name:>12}{rates['mmgem']:9.0f}{rates['plain']:9.0f}{ratios[-1]:8.2f}")
    print_result("loader", round(min(ratios), 2), "x plain images/s", "> 1", "DataLoader with Pillow and numpy")


if __name__ == "__main__":
    main()
