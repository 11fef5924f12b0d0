"""
`MMGEMModel.score` of images and texts beside loops that run "<image> [CAP] text" once for each pair, with the ViT or
with features of each image that were computed once; with one visual token and with 7 x 7.

    python benchmarks/score.py
"""

import argparse

import torch
from common import IMAGE_SIZE, alternate, build, print_result

from mmgem.data.scenes import ScenesDataset


GRID_SIZES = (1, 7)


def main() -> None:
    """Prints a table and, as the last line, the smaller ratio as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    captions = [scene["caption"] for scene in ScenesDataset("train", 500, 32)]
    texts = captions[: options.texts]
    model, processor = build(captions)
    model.eval()
    images = [torch.randint(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8) for _ in range(options.images)]
    patches = (IMAGE_SIZE // model.config.vision_config.patch_size) ** 2
    ratios = []
    for k in GRID_SIZES:
        model.config.image_grid_size = processor.image_grid_size = k
        inputs = processor(images=images, text=texts, task="score", return_tensors="pt")
        prompt = inputs["input_ids"].shape[1]

        @torch.inference_mode()
        def loop(once: bool, inputs=inputs, prompt=prompt, k=k) -> torch.Tensor:
            features = {"pixel_values": inputs["pixel_values"]}
            if once:
                features = model.compact_features(inputs["pixel_values"], k)
            scores = torch.empty(options.images, options.texts)
            for i in range(options.images):
                own = {name: values[i : i + 1] for name, values in features.items()}
                for j, text in enumerate(inputs["labels"]):
                    text = text[text.ne(-100)]
                    ids = torch.cat([inputs["input_ids"][i], text])[None]
                    logits = model(input_ids=ids, **own).logits[0, prompt - 1 : -1]
                    scores[i, j] = logits.log_softmax(-1).gather(1, text[:, None]).mean()
            return scores

        difference = (model.score(**inputs) - loop(once=False)).abs().max().item()
        runs = {"score": lambda inputs=inputs: model.score(**inputs)}
        runs |= {"loop": lambda loop=loop: loop(once=False), "loop, ViT once": lambda loop=loop: loop(once=True)}
        seconds = alternate(runs, options.repeats)
        ratios.append(seconds["loop"] / seconds["score"])
        tokens = prompt + inputs["labels"].ne(-100).sum(1).float().mean().item()
        print(
            f"{k} x {k} visual tokens, {tokens:.0f} tokens a pair ({tokens - k**2 + patches:.0f} with one for each "
            f"patch), largest difference {difference:.1e}"
        )
        for name, value in seconds.items():
            ratio = value / seconds["score"]
            print(f"  {name:16}{options.images * options.texts / value:8.1f} pairs/s, score is {ratio:.1f} x")
    print_result("score", round(min(ratios), 2), "x pairs/s", ">= 5", "a forward per pair")


if __name__ == "__main__":
    main()
