"""One step of stage 2 on eight pictures, however many processes there are; run by test_distributed.py."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.models.clip import CLIPImageProcessorPil

from mmgem import MMGEMProcessor
from mmgem.data.regions import RegionDataset
from mmgem.data.scenes import ScenesDataset
from mmgem.data.tokenizer import train_tokenizer
from mmgem.processing import to_mmgem_tokenizer
from mmgem.training.region_trainer import RegionTrainer
from tests.conftest import CORPUS, make_model
from tests.training.sharding import training_arguments, whole


PICTURES = 8


class Sequential(RegionTrainer):
    """Takes the pictures in their order, so that every number of processes has the same batch."""

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main(strategy: str, stage: str, cache_features: bool, folder: Path) -> None:
    torch.set_num_threads(1)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = MMGEMProcessor(image_processor, to_mmgem_tokenizer(train_tokenizer(CORPUS, 320)), max_length=200)
    model = make_model(processor)
    # 1 to 4 objects: processes have different numbers of regions.
    dataset = RegionDataset(ScenesDataset("train", PICTURES, 32), max_regions=4, whole_image_weight=0.5)
    args = training_arguments(
        strategy,
        output_dir=str(folder),
        stage=stage,
        cache_features=cache_features,
        per_device_train_batch_size=PICTURES // int(os.environ["WORLD_SIZE"]),
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
    gradients = {}
    trainer = Sequential(model, args, processor, dataset)

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients.update({n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None})

    trainer.add_callback(Keep())
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    if int(os.environ["RANK"]) == 0:
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        loss = torch.tensor(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
        torch.save({"gradients": gradients, "world_size": world_size, "loss": loss}, folder / "gradients.pt")
    trainer.leave_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "cached", Path(sys.argv[4]))
