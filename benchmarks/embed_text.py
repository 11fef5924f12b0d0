"""
Embeddings of ragged real text, 5 to 200 words: `embed_texts` beside sentence-transformers around the same weights.

    pip install -e ".[sentence-transformers]"
    python benchmarks/embed_text.py

The text is Python's own manual, as `pydoc` carries it, cut into passages.
"""

import argparse
import random
import re
import tempfile
from pydoc_data.topics import topics

import sentence_transformers
import torch
from common import alternate, build, print_result
from sentence_transformers import SentenceTransformer

from mmgem.evaluation.embedding import embed_texts
from mmgem.hub.export import export


WORDS = (5, 200)
DEFAULT = 32  # the batch size of sentence-transformers where none is given


def passages(number: int) -> list[str]:
    """Runs of words, each of another length, every length equally likely."""
    generator = random.Random(0)
    words = re.findall(r"\S+", " ".join(topics[name] for name in sorted(topics)))
    found, start = [], 0
    for _ in range(number):
        length = generator.randint(*WORDS)
        start = start if start + length <= len(words) else 0
        found.append(" ".join(words[start : start + length]))
        start += length
    return found


def main() -> None:
    """Prints a table and, as the last line, the ratio to the peer as it comes (its batches of 32) as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    texts = passages(options.passages)
    model, processor = build(texts)
    model.eval()
    processor.max_length = 512  # nothing is cut
    tokens = sum(len(row) for row in processor.tokenizer(texts)["input_ids"])
    print(f"{len(texts)} passages, {tokens / len(texts):.0f} tokens on average with BOS and [EMB]")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        processor.save_pretrained(f"{folder}/model")
        export(f"{folder}/model", "org/mm-gem", f"{folder}/hub")
        encoder = SentenceTransformer(f"{folder}/hub", trust_remote_code=True, device=str(model.device))

    ours = embed_texts(model, processor, texts)
    peers = encoder.encode(texts, convert_to_tensor=True).cpu()
    print(f"largest difference between the embeddings: {(ours - peers).abs().max():.1e}")
    sizes = (4, 8, DEFAULT, 128)
    runs = {f"sentence-transformers, batch {n}": lambda n=n: encoder.encode(texts, batch_size=n) for n in sizes}
    seconds = alternate({"mmgem": lambda: embed_texts(model, processor, texts), **runs}, options.repeats)
    for name, value in seconds.items():
        ratio = value / seconds["mmgem"]
        print(f"{name:36}{len(texts) / value:8.1f} texts/s{tokens / value:10.0f} tokens/s, mmgem is {ratio:.2f} x")
    ratio = seconds[f"sentence-transformers, batch {DEFAULT}"] / seconds["mmgem"]
    versions = {"sentence_transformers": sentence_transformers.__version__}
    print_result("embed_text", round(ratio, 3), "x texts/s", ">= 1.3", "sentence-transformers", **versions)


if __name__ == "__main__":
    main()
