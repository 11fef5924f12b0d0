"""
Flickr8k from scratch: MM-GEM beside open_clip's CoCa (Yu et al., 2022), as good as either becomes in the same time.

Both have the same images of 96 px, augmentation, tokenizer, widths and ViT, as many parameters within 5 %, batch,
optimiser, warm-up and cosine over the clock, and the best of the same learning rates, chosen on the last 1,000
training images by the geometric mean of both R@10 and CIDEr-D: all of them after `--tuning_minutes` on the other
images, then the better two after `--minutes` (longer runs want lower rates). Each starts and weighs its
losses as its own package does: ours with patches whitened on the training images, positions as waves, and L_Emb +
L_Gen; "coca" as open_clip builds and feeds it, with its mix of losses, 256 queries of the attentional pooler (the
first becomes the embedding, the others are visual tokens), texts padded to the context length (here 40, not 76).
"coca, trimmed" is spared what only slows it down here: texts are cut to the longest of their batch, and 36 patches
become 36 visual tokens and the embedding. Nobody ships that, but it is the harder peer; `--systems` names more, one
with our start and losses among them.

    make bench-env
    .venv-bench/bin/python benchmarks/flickr8k_coca.py --train_file train.parquet --validation_file validation.parquet

A run that is done is kept in `--output_dir`; started again, the benchmark goes on where it stopped. Nothing else
should run beside it.
"""

# isort: off
import torchvision_without_cuda  # noqa: F401
# isort: on

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytorch_optimizer
import torch
from coca import build_coca, coca_texts, fix_class_position
from common import joint_losses, print_result

from mmgem.data.arguments import DataArguments
from mmgem.data.collator import PairCollator
from mmgem.data.loading import load_pairs
from mmgem.data.pairs import PairDataset
from mmgem.evaluation.captioning import cider_d
from mmgem.evaluation.embedding import embed_pairs
from mmgem.evaluation.evaluator import generate_captions, held_out_caption_loss
from mmgem.evaluation.retrieval import retrieval_metrics
from mmgem.processing import MMGEMProcessor
from mmgem.training.building import build_model_and_processor
from mmgem.training.model_arguments import ModelArguments
from mmgem.training.stages import freeze_parameters, parameter_groups


IMAGE_SIZE, PATCH_SIZE, WIDTH, HEADS = 96, 16, 128, 4
VISION = {"layers": 3, "heads": 8, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
# Ours, wide enough for as many parameters: CoCa has two layers and two, and those of its decoder are two blocks each.
TEXT_LAYERS, TEXT_INTERMEDIATE = 4, 5 * WIDTH
MAX_LENGTH, WARMUP_STEPS = 40, 50
BATCH_SIZE = 64  # at 128 both learn as much from a pair
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
AUGMENTATION_SCALE, WEIGHT_DECAY = 0.6, 0.1
CAPTION_WEIGHT = 1.0  # of ours, beside the sum of both directions of L_Emb: the paper's
OUR_MIX = CAPTION_WEIGHT / 2  # the same beside their mean, as CoCa has it
HELD_OUT = 1000
BATCH = 100  # of evaluation


class MMGEM:
    """Ours: stage 1, and captions from it."""

    def __init__(self, train: PairDataset, caption_weight: float = CAPTION_WEIGHT, attention_dropout: float = 0.0):
        towers = ModelArguments(
            vision_config={
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
                "hidden_size": WIDTH,
                "intermediate_size": 4 * WIDTH,
                "num_hidden_layers": VISION["layers"],
                "num_attention_heads": VISION["heads"],
                "image_size": IMAGE_SIZE,
                "patch_size": PATCH_SIZE,
                "hidden_act": "gelu",
            },
            text_config={
                "hidden_size": WIDTH,
                "intermediate_size": TEXT_INTERMEDIATE,
                "num_hidden_layers": TEXT_LAYERS,
                "num_attention_heads": HEADS,
                "num_key_value_heads": HEADS,
                "max_position_embeddings": 256,
                "attention_dropout": attention_dropout,
                "tie_word_embeddings": False,
            },
            projection_dim=WIDTH,
        )
        self.model, self.processor = build_model_and_processor(towers, train, MAX_LENGTH)
        freeze_parameters(self.model, "joint")
        self.caption_weight = caption_weight
        self.collate = PairCollator(self.processor, pack_length=64)

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        contrastive, caption = joint_losses(self.model, batch)
        return contrastive + self.caption_weight * caption

    def evaluate(self, dataset: PairDataset) -> dict[str, float]:
        embeds = embed_pairs(self.model, self.processor, dataset, BATCH)
        return {
            **retrieval_metrics(embeds["text_embeds"], embeds["image_embeds"], embeds["text_to_image"]),
            "caption_loss": held_out_caption_loss(self.model, self.processor, dataset, BATCH),
            **caption_figures(generate_captions(self.model, self.processor, dataset, len(dataset), BATCH), dataset),
        }


class CoCa:
    """open_clip's, with its mix of losses unless another weight is given (theirs halves L_Emb)."""

    def __init__(self, train: PairDataset, caption_weight: float = 2.0, trimmed: bool = False):
        self.processor: MMGEMProcessor = MMGEM(train).processor
        self.trimmed = trimmed
        queries = 37 if trimmed else 256
        self.model = build_coca(WIDTH, HEADS, VISION, 2, 2, self.processor, MAX_LENGTH + 1, queries)
        if trimmed:
            fix_class_position(self.model)
        pad_id = self.processor.tokenizer.pad_token_id
        self.losses = open_clip.CoCaLoss(caption_loss_weight=caption_weight, clip_loss_weight=1, pad_id=pad_id)
        self.pixel_values = PairCollator(self.processor).pixel_values

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        images, captions = [e["image"] for e in examples], [e["caption"] for e in examples]
        return {"pixel_values": self.pixel_values(images), "texts": self.texts(captions)}

    def texts(self, captions: list[str]) -> torch.Tensor:
        """Padded to the context length, or to the longest of them where that only costs time."""
        texts = coca_texts(self.processor, captions)
        missing = 0 if self.trimmed else MAX_LENGTH - texts.shape[1]
        return torch.nn.functional.pad(texts, (0, missing), value=self.processor.tokenizer.pad_token_id)

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        return sum(self.losses(**self.model(batch["pixel_values"], batch["texts"])))

    @torch.inference_mode()
    def evaluate(self, dataset: PairDataset) -> dict[str, float]:
        images, image_tokens, texts, owners, captions = [], [], [], [], []
        total = tokens = 0
        pad_id = self.processor.tokenizer.pad_token_id
        for start in range(0, len(dataset), BATCH):
            examples = [dataset[i] for i in range(start, min(start + BATCH, len(dataset)))]
            latent, visual = self.model._encode_image(self.pixel_values([e["image"] for e in examples]))
            images.append(latent)
            image_tokens.append(visual)
            captions += self.write(visual)
            pairs = [(i, caption) for i, example in enumerate(examples) for caption in example["captions"]]
            for first in range(0, len(pairs), BATCH):
                part = pairs[first : first + BATCH]
                ids = self.texts([caption for _, caption in part])
                own = torch.tensor([i for i, _ in part])
                outputs = self.model(None, ids, image_latent=latent[own], image_embs=visual[own])
                texts.append(outputs["text_features"])
                owners.append(own + start)
                logits, labels = outputs["logits"].flatten(0, 1), ids[:, 1:].flatten()
                total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=pad_id, reduction="sum").item()
                tokens += int((labels != pad_id).sum())
        return {
            **retrieval_metrics(torch.cat(texts), torch.cat(images), torch.cat(owners)),
            "caption_loss": total / tokens,
            **caption_figures(captions, dataset),
        }

    def write(self, visual: torch.Tensor) -> list[str]:
        """Greedy captions of visual tokens `(B, queries, D)`."""
        tokenizer = self.processor.tokenizer
        ids = torch.full((len(visual), 1), tokenizer.bos_token_id)
        for _ in range(MAX_LENGTH - 1):
            following = self.model(None, ids, image_latent=visual, image_embs=visual, output_labels=False)["logits"]
            ended = (ids == tokenizer.eos_token_id).any(1)
            chosen = following[:, -1].argmax(-1).masked_fill(ended, tokenizer.eos_token_id)
            ids = torch.cat([ids, chosen[:, None]], 1)
            if ended.all():
                break
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def caption_figures(captions: list[str], dataset: PairDataset) -> dict[str, float]:
    cider = cider_d(captions, dataset.captions())[0]
    return {"caption_cider": cider, "caption_distinct": len(set(captions)) / len(captions)}


def coca_as_ours(train: PairDataset) -> CoCa:
    """The trimmed CoCa with our mix of losses, patch embedding and positions."""
    peer, ours = CoCa(train, OUR_MIX, trimmed=True), MMGEM(train)
    with torch.no_grad():
        peer.model.visual.conv1.weight.copy_(ours.model.vision_model.embeddings.patch_embedding.weight)
        peer.model.visual.positional_embedding[1:] = ours.model.vision_model.embeddings.position_embedding.weight
    return peer


def plain_start(train: PairDataset) -> MMGEM:
    """Ours with a ViT whose patches and positions start as noise of the same scale."""
    ours = MMGEM(train)
    embeddings = ours.model.vision_model.embeddings
    torch.nn.init.normal_(embeddings.patch_embedding.weight, std=(3 * PATCH_SIZE**2) ** -0.5)
    torch.nn.init.normal_(embeddings.position_embedding.weight, std=WIDTH**-0.5)
    return ours


SYSTEMS: dict[str, Callable[[PairDataset], Any]] = {
    "mmgem": MMGEM,
    "coca": CoCa,
    "coca, trimmed": lambda train: CoCa(train, trimmed=True),
    # One factor at a time.
    "mmgem, caption weight 4": lambda train: MMGEM(train, 4.0),
    "mmgem, caption weight 10": lambda train: MMGEM(train, 10.0),
    "mmgem, plain start of the ViT": plain_start,
    "mmgem, attention dropout 0.2": lambda train: MMGEM(train, attention_dropout=0.2),
    "coca, trimmed, our mix of losses": lambda train: CoCa(train, OUR_MIX, trimmed=True),
    "coca, trimmed, our losses and start of the ViT": coca_as_ours,
}


def batches(dataset: PairDataset, collate: Any, seed: int) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    loader = torch.utils.data.DataLoader(
        dataset, BATCH_SIZE, shuffle=True, drop_last=True, collate_fn=collate, generator=generator
    )
    epoch = 0
    while True:
        dataset.set_epoch(epoch)
        yield from loader
        epoch += 1


def train(system: Any, dataset: PairDataset, learning_rate: float, seconds: float, seed: int) -> int:
    """SOAP, warmed up, with a cosine over the clock; returns the steps it made."""
    start = time.perf_counter()
    groups = parameter_groups(system.model, learning_rate, 1.0, WEIGHT_DECAY)
    options = {"precondition_frequency": 10, "max_precondition_dim": 512}
    optimizer = pytorch_optimizer.SOAP(groups, lr=learning_rate, betas=(0.9, 0.95), **options)
    scale = system.model.logit_scale
    scale = scale if isinstance(scale, torch.nn.Parameter) else scale.weight
    system.model.train()
    step = 0
    for batch in batches(dataset, system.collate, seed):
        passed = (time.perf_counter() - start) / seconds
        if passed >= 1:
            break
        factor = min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * passed))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        optimizer.zero_grad()
        loss = system.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(system.model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            scale.clamp_(max=math.log(100))
        if step % 100 == 0:
            print(f"  step {step}, {passed:.0%}, loss {loss.item():.3f}", flush=True)
        step += 1
    system.model.eval()
    return step


def measure(
    name: str,
    learning_rate: float,
    minutes: float,
    seed: int,
    data: tuple[PairDataset, PairDataset],
    file: Path,
) -> dict[str, Any]:
    """Metrics of one run; from its file where the same was done before."""
    asked: dict[str, Any] = {"system": name, "learning_rate": learning_rate, "asked": minutes, "seed": seed}
    asked |= {"batch_size": BATCH_SIZE, "max_length": MAX_LENGTH, "image_size": IMAGE_SIZE}
    asked |= {"train": len(data[0]), "evaluated": len(data[1]), "augmentation_scale": AUGMENTATION_SCALE}
    asked |= {"weight_decay": WEIGHT_DECAY}
    if file.exists():
        result = json.loads(file.read_text())
        if {key: result.get(key) for key in asked} != asked:
            raise SystemExit(f"{file} holds another run; delete it, or give another --output_dir.")
        return result
    torch.manual_seed(seed)
    train_dataset, eval_dataset = data
    system = SYSTEMS[name](train_dataset)
    torch.manual_seed(seed)
    start = time.perf_counter()
    steps = train(system, train_dataset, learning_rate, 60 * minutes, seed)
    minutes = (time.perf_counter() - start) / 60
    trained = [p for p in system.model.parameters() if p.requires_grad]
    result = {
        **asked,
        "minutes": minutes,
        "steps": steps,
        "parameters": sum(p.numel() for p in trained),
        **system.evaluate(eval_dataset),
    }
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result), flush=True)
    return result


@torch.inference_mode()
def check(names: list[str], train: PairDataset) -> None:
    """What learns must be as large, and a text of CoCa's the same in any company, while training and after."""
    systems = {name: SYSTEMS[name](train) for name in names}
    sizes = {n: sum(p.numel() for p in s.model.parameters() if p.requires_grad) for n, s in systems.items()}
    assert max(sizes.values()) < 1.05 * min(sizes.values()), sizes
    captions = sorted((example[0] for example in train.captions()[:BATCH]), key=len)
    for system in systems.values():
        if isinstance(system, CoCa):
            alone = system.model.encode_text(system.texts(captions[:1]))
            torch.testing.assert_close(alone, system.model.encode_text(system.texts(captions))[:1])


def quality(result: dict[str, float]) -> float:
    """What a learning rate is chosen by."""
    figures = [result[name] for name in ("text_to_image_R@10", "image_to_text_R@10", "caption_cider")]
    return math.prod(figures) ** (1 / 3)


def tuned_as(name: str) -> str:
    """The system whose learning rate it takes."""
    return "coca, trimmed" if name.startswith("coca, trimmed") else name.partition(",")[0]


def choose_rate(name: str, options: argparse.Namespace, data: tuple[PairDataset, PairDataset]) -> float:
    """The best of `options.learning_rates`; one alone is taken without a run."""
    rates, minutes = options.learning_rates, (options.tuning_minutes, options.minutes)
    for kept, length, ending in zip((2, 1), minutes, ("", " whole")):
        if len(rates) > kept:
            files = {rate: options.output_dir / f"tuning {name} {rate}{ending}.json" for rate in rates}
            found = {rate: quality(measure(name, rate, length, 0, data, file)) for rate, file in files.items()}
            rates = sorted(found, key=lambda rate: -found[rate])[:kept]
            print(f"{name}, quality by learning rate after {length:g} minutes: {found}", flush=True)
    return rates[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/flickr8k_coca"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--tuning_minutes", type=float, default=5.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="+", default=["mmgem", "coca", "coca, trimmed"], choices=SYSTEMS)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=LEARNING_RATES)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    data_args = DataArguments(
        train_file=options.train_file,
        validation_file=options.validation_file,
        caption_column="captions",
        max_length=MAX_LENGTH,
        augmentation_scale=AUGMENTATION_SCALE,
    )
    pairs, validation = load_pairs(data_args, IMAGE_SIZE, seed=0)
    tuning = (pairs.select(range(len(pairs) - HELD_OUT)), pairs.select(range(len(pairs) - HELD_OUT, len(pairs))))
    tuning[1].augmentation_scale = 1.0
    check(options.systems, pairs)
    families = list(dict.fromkeys(tuned_as(name) for name in options.systems))
    best = {name: choose_rate(name, options, tuning) for name in families}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.systems}
    for seed in options.seeds:
        for name in options.systems:  # in turn, so that a slow hour of the machine meets both
            file = options.output_dir / f"{name} {seed}.json"
            rate = best[tuned_as(name)]
            runs[name].append(measure(name, rate, options.minutes, seed, (pairs, validation), file))
    columns = [f"{way}_R@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    columns += ["caption_cider", "caption_loss", "caption_distinct", "steps", "parameters", "learning_rate"]
    print(f"| system | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    means = {}
    for name, results in runs.items():
        means[name] = {c: statistics.mean(r[c] for r in results) for c in columns}
        spread = {c: statistics.stdev(r[c] for r in results) if len(results) > 1 else 0.0 for c in columns}
        cells = [f"{means[name][c]:.4g} ± {spread[c]:.2g}" if spread[c] else f"{means[name][c]:.4g}" for c in columns]
        print(f"| {name} | {' | '.join(cells)} |")
    goals = {columns[2]: 1.4, columns[5]: 1.4, "caption_cider": 1.1}
    for peer in ("coca, trimmed", "coca"):
        if not {"mmgem", peer} <= runs.keys():
            continue
        ratios = {c: round(means["mmgem"][c] / means[peer][c], 2) for c in goals}
        print(f"mmgem over {peer}: {json.dumps(ratios)}; goals {json.dumps(goals)}")
        name = "flickr8k_coca" + ("" if peer == "coca" else "_trimmed")
        least = min(ratios[columns[2]], ratios[columns[5]])
        print_result(
            f"{name}_recall", least, "x R@10, the lesser way", ">= 1.4", peer, open_clip=open_clip.__version__
        )
        cider = ratios["caption_cider"]
        print_result(f"{name}_cider", cider, "x CIDEr-D", ">= 1.1", peer, open_clip=open_clip.__version__)


if __name__ == "__main__":
    main()
