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
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=(
                "predictions: the scores of all classes for each image. references: the number of the right class."
            ),
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references, seed=0):  # type: ignore[no-untyped-def]
        scores = torch.from_numpy(np.asarray(predictions, dtype=np.float32))
        return classification_metrics(scores, torch.as_tensor(np.asarray(references)), seed)
