"""One step of an adapter on eight examples, however many processes there are; run by test_distributed.py."""

import os
import sys
from pathlib import Path

import torch
from transformers.models.clip import CLIPImageProcessorPil

from mmgem import MMGEMProcessor
from mmgem.data.composed_scenes import ComposedScenesDataset
from mmgem.data.regions import RegionDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.data.tokenizer import train_tokenizer
from mmgem.data.triplets import TripletDataset
from mmgem.processing import to_mmgem_tokenizer
from mmgem.training.fused_trainer import FusedTrainer
from mmgem.training.region_trainer import RegionTrainer
from tests.conftest import CORPUS, Table, make_model
from tests.training.sharding import take_step, training_arguments


EXAMPLES = 8


class Sequential:
    """Takes the examples in their order, so that every number of processes has the same batch."""

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class SequentialRegions(Sequential, RegionTrainer):
    pass


class SequentialTriplets(Sequential, FusedTrainer):
    pass


def examples_of(stage):
    """Pictures with 1 to 4 objects, or triplets of which few have a negative: processes have different numbers."""
    if stage != "fused-retrieval":
        return RegionDataset(ScenesDataset("train", EXAMPLES, 32), max_regions=4, whole_image_weight=0.5)
    drawn = ComposedScenesDataset("train", EXAMPLES, 32)
    rows = [drawn[i] if i in (0, 5, 6) else {**drawn[i], "negative_image": None} for i in range(EXAMPLES)]
    return TripletDataset(Table(rows))


def main(strategy: str, stage: str, features: str, folder: Path) -> None:
    torch.set_num_threads(1)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = MMGEMProcessor(image_processor, to_mmgem_tokenizer(train_tokenizer(CORPUS, 320)), max_length=200)
    model = make_model(processor)
    unime = {"false_negative_margin": 0.05, "hardest_negatives": 5, "temperature": 0.05}
    args = training_arguments(
        strategy,
        **({} if stage == "region-caption" else unime),
        output_dir=str(folder),
        stage=stage,
        cache_features=features == "cached",
        mini_batch_size=3 if features == "mini-batches" else 0,
        per_device_train_batch_size=EXAMPLES // int(os.environ["WORLD_SIZE"]),
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer_class = SequentialTriplets if stage == "fused-retrieval" else SequentialRegions
    trainer = trainer_class(model, args, processor, examples_of(stage))

    take_step(trainer, folder)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
