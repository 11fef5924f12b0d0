"""Every task of the suite, with the model on an emulated accelerator."""

import pytest
import torch
from peft import LoraConfig

from mmgem.evaluation.arguments import EvaluationArguments
from mmgem.evaluation.classification import classification_metrics
from mmgem.evaluation.retrieval import retrieval_metrics
from mmgem.evaluation.tasks import load_model, run_tasks
from mmgem.training.adapters import add_fused_adapter
from tests import emulated_accelerator
from tests.evaluation.conftest import bold_model


DEVICE = f"{emulated_accelerator.NAME}:2"
TASKS = ["retrieval", "classification", "captioning", "long_text", "regions", "box_classification", "fused", "choices"]


def test_every_task_gives_the_figures_of_the_cpu(checkpoint, adapters, processor, tmp_path):
    add_fused_adapter(bold_model(processor), LoraConfig(r=2)).save_pretrained(tmp_path / "fused")
    metrics = []
    for device in ("cpu", DEVICE):
        arguments = EvaluationArguments(
            model=checkpoint,
            adapters=[*adapters, str(tmp_path / "fused")],
            tasks=TASKS,
            dataset_name="scenes",
            max_samples=6,
            max_length=20,
            batch_size=4,
            draws=2,
            rerank=2,
            matryoshka_dims=[4],
            output_dir=str(tmp_path / "out"),
        )
        model, processor = load_model(arguments)
        sections = run_tasks(model.to(device), processor, arguments)
        assert model.device == torch.device(device)
        metrics.append({name: value for section in sections for name, value in section.metrics.items()})
    assert len(metrics[0]) > 40 and metrics[1] == pytest.approx(metrics[0], rel=1e-4)


def retrieval(scores, labels):
    texts = torch.nn.functional.normalize(scores, dim=-1)
    return retrieval_metrics(texts, texts[:7].flip(0), labels)


@pytest.mark.parametrize("metric", [classification_metrics, retrieval])
def test_metrics_of_tensors_on_the_accelerator(metric):
    torch.manual_seed(0)
    scores, labels = torch.randn(8, 7), torch.arange(8) % 7
    expected = metric(scores, labels)
    assert metric(scores.to(DEVICE), labels) == expected == metric(scores.to(DEVICE), labels.to(DEVICE))
