"""One optimizer step on the first 16 pairs, however many processes there are; test_distributed.py runs it."""

import os
import sys
from pathlib import Path

import torch
from transformers.models.clip import CLIPImageProcessorPil

from mmgem import MMGEMProcessor
from mmgem.data.collator import PairCollator
from mmgem.data.pairs import PairDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.data.tokenizer import train_tokenizer
from mmgem.evaluation.sharing import gather_parts
from mmgem.processing import to_mmgem_tokenizer
from mmgem.training.trainer import MMGEMTrainer
from tests.conftest import CORPUS, Table, make_model
from tests.training.sharding import take_step, training_arguments


PAIRS = 16
CACHED_PAIRS = 1030  # two parts of a feature cache
CAPTION_LOSS_WEIGHT = 3.0


class Sequential(MMGEMTrainer):
    """Takes the pairs in their order, so that every number of processes has the same micro-batches."""

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main(strategy: str, accumulation_steps: int, mini_batch_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    world_size = int(os.environ["WORLD_SIZE"])
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = MMGEMProcessor(image_processor, to_mmgem_tokenizer(train_tokenizer(CORPUS, 320)), max_length=200)
    is_sigmoid = strategy == "ddp-sigmoid"
    model = make_model(processor, config={"logit_bias_init_value": -3.0} if is_sigmoid else {})
    if is_sigmoid:  # in float64: biases of keys have no gradient but what rounding leaves of it
        model.double()
    is_cached = strategy == "ddp-cached"
    negatives = {"false_negative_margin": 0.02, "hardest_negatives": 4, "hardness_weight": 2.0}
    negatives = negatives if strategy == "ddp-negatives" else {}
    # 1 to 4 objects: captions of very different lengths
    scenes = ScenesDataset("train", CACHED_PAIRS if is_cached else PAIRS, 32)
    if is_sigmoid:  # with hard negatives, of which processes and mini-batches have different numbers, and a teacher
        hard = [None if i in (2, 9) else CORPUS[i % 4] for i in range(PAIRS)]
        scenes = Table([{**scenes[i], "hard": text} for i, text in enumerate(hard)])
    dataset = PairDataset(scenes, negative_column="hard" if is_sigmoid else None)
    if is_sigmoid:
        goals = torch.nn.functional.normalize(
            torch.randn(PAIRS, 5, generator=torch.Generator().manual_seed(0)), dim=-1
        )
        dataset.teacher = {dataset[i]["caption"]: goals[i] for i in range(PAIRS)}
    micro_batch = PAIRS // accumulation_steps
    expected_loss = reference_loss(model, processor, dataset, micro_batch)
    args = training_arguments(
        strategy.partition("-")[0] if strategy.startswith("ddp") else strategy,
        **negatives,
        cache_features=is_cached,
        freeze=["vision_model"] if is_cached else [],
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch // world_size,
        gradient_accumulation_steps=accumulation_steps,
        mini_batch_size=mini_batch_size,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=1e-6,
        caption_loss_weight=CAPTION_LOSS_WEIGHT,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        pack_length=256,
    )
    encoded = [0]

    def count(module, args, output):
        encoded[0] += len(output[0])

    model.vision_model.register_forward_hook(count)
    trainer = Sequential(model, args, processor, dataset)

    take_step(trainer, folder, expected_loss=expected_loss, encoded=lambda: gather_parts(encoded))


@torch.no_grad()
def reference_loss(model, processor, dataset, micro_batch: int) -> torch.Tensor:
    """
    Mean contrastive loss of the micro-batches, without hard negatives and the teacher, and weighted caption loss over
    all tokens of the step.
    """
    collate = PairCollator(processor)
    contrastive, nll, tokens = [], 0.0, 0
    extra = ("negative", "teacher_embeds")
    for start in range(0, PAIRS, micro_batch):
        rows = [dataset[i] for i in range(start, start + micro_batch)]
        batch = collate([{name: value for name, value in row.items() if name not in extra} for row in rows])
        labels = batch["labels"]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "labels")}
        output = model(**inputs, return_loss=True)
        contrastive.append(output.contrastive_loss)
        nll += output.caption_loss * (labels != -100).sum()
        tokens += (labels != -100).sum()
    return torch.stack(contrastive).mean() + CAPTION_LOSS_WEIGHT * nll / tokens


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
