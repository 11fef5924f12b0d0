"""Image-text retrieval as a metric of `evaluate`."""

import datasets
import evaluate
import numpy as np
import torch

from mmgem.evaluation.retrieval import retrieval_metrics


class ImageTextRetrieval(evaluate.Metric):
    """R@1, R@5, R@10 and the median rank, both ways: see `mmgem.evaluation.retrieval.retrieval_metrics`."""

    def _info(self) -> evaluate.MetricInfo:
        embedding = datasets.List(datasets.Value("float32"))
        index = datasets.Value("int64")
        features = [
            datasets.Features({"predictions": embedding, "references": right})
            for right in (index, datasets.List(index))
        ]
        inputs = (
            "predictions: the embedding of each text, of unit norm. references: the index of the image that it "
            "describes, or a list of them. image_embeds: the embeddings of the images, of unit norm."
        )
        return evaluate.MetricInfo(self.__doc__, "", features, inputs)

    def _compute(self, predictions, references, image_embeds, ks=(1, 5, 10)):  # type: ignore[no-untyped-def]
        texts, images = (torch.from_numpy(np.asarray(part, dtype=np.float32)) for part in (predictions, image_embeds))
        right = [(i, int(picture)) for i, own in enumerate(references) for picture in np.atleast_1d(own)]
        return retrieval_metrics(texts, images, torch.tensor(right), ks)
