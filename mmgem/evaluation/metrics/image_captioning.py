"""Caption metrics in pure Python as a metric of `evaluate`."""

import datasets
import evaluate

from mmgem.evaluation.captioning import TOKENIZER, caption_scores


class ImageCaptioning(evaluate.Metric):
    """CIDEr-D, BLEU-1 to 4 and ROUGE-L without Java: see `mmgem.evaluation.captioning`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.List(text)})
        inputs = (
            f"predictions: a caption of each image. references: its references. Split into words by {TOKENIZER}; a "
            "character of a script without spaces is a word."
        )
        return evaluate.MetricInfo(self.__doc__, "", features, inputs)

    def _compute(self, predictions, references):  # type: ignore[no-untyped-def]
        scores = caption_scores(predictions, references)
        return {name.removeprefix("caption_"): value for name, value in scores.items()}
