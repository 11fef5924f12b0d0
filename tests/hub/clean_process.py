"""
What a user without mmgem does: run as a script it loads a model from the Hub, writes down what it gives, saves it,
loads that, and tries the pipelines. Tests import `outputs` to know what it should give.
"""

import sys


if __name__ == "__main__":
    sys.modules["mmgem"] = None  # type: ignore[assignment]  # cannot be imported from here on

import json
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForZeroShotImageClassification, AutoProcessor


TEXTS = ["a dog on a beach", "snow on a mountain", "two people"]
BOXES = [[[2, 3, 20, 30], [0, 0, 48, 40]]]


@torch.inference_mode()
def outputs(model: Any, processor: Any, picture: Image.Image, where: str, **options: Any) -> dict[str, torch.Tensor]:
    """Embeddings and captions, without and with the adapters that lie in folders of `where`."""
    sentences = processor(text=TEXTS, return_tensors="pt")
    prompt = processor(images=[picture], task="caption", return_tensors="pt")
    found = {
        "texts": model.get_embedding(**sentences),
        "pictures": model.get_embedding(**processor(images=[picture], return_tensors="pt")),
        "logits": model(**processor(images=[picture], text=TEXTS, return_tensors="pt")).logits_per_image,
        "caption": model.generate(**prompt, max_new_tokens=6),
    }
    for kind in ("region-caption", "region-retrieval"):
        model.load_adapter(where, adapter_name=kind, adapter_kwargs={"subfolder": kind, **options})
    model.set_adapter(["region-caption", "region-retrieval"])
    processor.region_grid_size = model.region_grid_size
    regions = processor(images=[picture], boxes=BOXES, return_tensors="pt")
    prompts = processor(images=[picture], boxes=BOXES, task="region-caption", return_tensors="pt")
    found["regions"] = model.get_embedding(**regions)
    found["region_captions"] = model.generate(**prompts, max_new_tokens=6)
    for kind in ("region-caption", "region-retrieval"):
        model.delete_adapter(kind)
    return found


def load(where: str, auto_class: Any = AutoModel) -> tuple[Any, Any]:
    model = auto_class.from_pretrained(where, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(where, trust_remote_code=True)


def main(repo_id: str) -> None:
    picture = Image.open("picture.png")
    model, processor = load(repo_id)
    assert type(model).__module__.startswith("transformers_modules."), "this is not the Hub's code"
    found = outputs(model, processor, picture, repo_id)
    save_file({name: value.contiguous() for name, value in found.items()}, "outputs.safetensors")
    for auto_class in (AutoModelForImageTextToText, AutoModelForZeroShotImageClassification):
        other, _ = load(repo_id, auto_class)
        assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))

    model.save_pretrained("again")
    processor.save_pretrained("again")
    for name, value in outputs(*load("again"), picture, repo_id).items():
        assert torch.equal(value, found[name]), name

    from peft import PeftModel
    from transformers import pipeline

    base, processor = load(repo_id)
    if not HF_HUB_OFFLINE:  # PEFT 0.21 then looks for region-retrieval/region-retrieval/
        adapted = PeftModel.from_pretrained(base, repo_id, subfolder="region-retrieval")
        with torch.inference_mode():
            regions = adapted.get_embedding(**processor(images=[picture], boxes=BOXES, return_tensors="pt"))
        assert torch.equal(regions, found["regions"])
    whole = AutoModel.from_pretrained(
        repo_id, trust_remote_code=True, adapter_kwargs={"subfolder": "region-retrieval"}
    ).eval()
    with torch.inference_mode():
        regions = whole.get_embedding(**processor(images=[picture], boxes=BOXES, return_tensors="pt"))
    assert torch.equal(regions, found["regions"])

    said: dict[str, Any] = {}
    for where in (repo_id, "again"):
        pipe = pipeline("zero-shot-image-classification", model=where, trust_remote_code=True)
        said["labels"] = pipe("picture.png", candidate_labels=["dog", "snow"], hypothesis_template="a {}")
        pipe = pipeline("image-feature-extraction", model=where, trust_remote_code=True)
        assert torch.allclose(torch.tensor(pipe("picture.png")), found["pictures"], atol=1e-6)
        pipe = pipeline("image-text-to-text", model=where, trust_remote_code=True)
        said["plain"] = pipe(images="picture.png", text="<image>", max_new_tokens=6, return_full_text=False)
        chat = [{"role": "user", "content": [{"type": "image", "path": "picture.png"}]}]
        said["chat"] = pipe(text=chat, max_new_tokens=6, return_full_text=False)
    describe = pipeline("region-captioning", model=repo_id, trust_remote_code=True)
    assert type(describe).__module__.startswith("transformers_modules.")
    said["regions"] = describe("picture.png", boxes=BOXES[0], max_new_tokens=6)
    json.loads(describe.model.config.to_json_string())

    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(repo_id, trust_remote_code=True, device="cpu")
    for name, inputs in (("texts", TEXTS), ("pictures", [picture])):
        assert torch.allclose(torch.from_numpy(encoder.encode(inputs)), found[name], atol=1e-5), name
    with open("said.json", "w", encoding="utf-8") as file:
        json.dump(said, file)


if __name__ == "__main__":
    main(sys.argv[1])
