"""Dense captioning as a metric of `evaluate`."""

import datasets
import evaluate

from mmgem.evaluation.dense_captioning import dense_captioning_map


class DenseCaptioning(evaluate.Metric):
    """Mean average precision of boxes with captions: see `mmgem.evaluation.dense_captioning`."""

    def _info(self) -> evaluate.MetricInfo:
        box = datasets.List(datasets.Value("float64"), length=4)
        text = datasets.Value("string")
        predictions = datasets.List({"box": box, "caption": text, "score": datasets.Value("float64")})
        references = datasets.List({"box": box, "phrase": text})
        features = datasets.Features({"predictions": predictions, "references": references})
        inputs = (
            "predictions: of each image, boxes [x0, y0, x1, y1] with a caption and a score. references: of each "
            "image, boxes with a phrase."
        )
        return evaluate.MetricInfo(self.__doc__, "", features, inputs)

    def _compute(self, predictions, references):  # type: ignore[no-untyped-def]
        return dense_captioning_map(predictions, references)
