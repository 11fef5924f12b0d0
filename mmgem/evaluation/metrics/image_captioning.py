"""Caption metrics in pure Python as a metric of `evaluate`."""

import datasets
import evaluate

from mmgem.evaluation.captioning import TOKENIZER, bleu, cider_d, has_cider, rouge_l


class ImageCaptioning(evaluate.Metric):
    """CIDEr-D, BLEU-1 to 4 and ROUGE-L without Java: see `mmgem.evaluation.captioning`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=(
                f"predictions: a caption of each image. references: its references. Cut into words by {TOKENIZER}; "
                "a character of a script without spaces is a word."
            ),
            features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
        )

    def _compute(self, predictions, references):  # type: ignore[no-untyped-def]
        return {
            **({"cider": cider_d(predictions, references)[0]} if has_cider(references) else {}),
            **{f"bleu{n}": value for n, value in enumerate(bleu(predictions, references), 1)},
            "rouge_l": rouge_l(predictions, references)[0],
        }
