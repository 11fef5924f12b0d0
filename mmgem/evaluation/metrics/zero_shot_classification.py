"""Zero-shot classification as a metric of `evaluate`."""

import datasets
import evaluate
import numpy as np
import torch

from mmgem.evaluation.classification import classification_metrics


class ZeroShotClassification(evaluate.Metric):
    """Top-1, top-5, mean per class and a bootstrap interval: see `mmgem.evaluation.classification`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
        inputs = "predictions: the scores of all classes for each image. references: the index of the right class."
        return evaluate.MetricInfo(self.__doc__, "", datasets.Features(features), inputs)

    def _compute(self, predictions, references, seed=0):  # type: ignore[no-untyped-def]
        scores = torch.from_numpy(np.asarray(predictions, dtype=np.float32))
        return classification_metrics(scores, torch.as_tensor(np.asarray(references)), seed)
