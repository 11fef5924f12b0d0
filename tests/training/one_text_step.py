"""One step of text-distillation on sixteen texts, however many processes there are; run by test_distributed.py."""

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset

from mmgem.data.texts import as_tensors
from mmgem.data.tokenizer import train_tokenizer
from mmgem.training import text_trainer
from mmgem.training.text_trainer import TextDistillationTrainer
from tests.conftest import CORPUS, make_language_model
from tests.training.sharding import take_step, training_arguments


TEXTS = [" ".join(CORPUS[i % 4].split()[: 2 + i % 5]) + f" {i}" for i in range(16)]


class Sequential(TextDistillationTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main(mini_batch_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    text_trainer.PART_SIZE = 3  # several forward passes before the backward pass
    tokenizer = train_tokenizer(CORPUS, 320)
    goals = torch.nn.functional.normalize(torch.randn(16, 12, generator=torch.Generator().manual_seed(3)), dim=-1)
    data = as_tensors(Dataset.from_dict({"text": TEXTS, "teacher_embeds": goals.tolist()}))
    args = training_arguments(
        "ddp",
        output_dir=str(folder),
        stage="text-distillation",
        per_device_train_batch_size=16 // int(os.environ["WORLD_SIZE"]),
        mini_batch_size=mini_batch_size,
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
    # In float64, since parts of other sizes have other rounding, which 1 / tau = 20 makes larger.
    take_step(Sequential(make_language_model(tokenizer).double(), args, tokenizer, data), folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
