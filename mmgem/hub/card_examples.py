"""The model card's code. Tests run every block as a reader would, in its order, beside a picture.jpg."""

INSTALL = 'pip install "transformers>=5.23" torch pillow "peft>=0.21" "sentence-transformers>=6.2"'

EMBED = """\
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("REPO_ID", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("REPO_ID", trust_remote_code=True)
picture = Image.open("picture.jpg")

with torch.inference_mode():
    texts = model.get_embedding(**processor(text=["a dog on a beach", "two red bicycles"], return_tensors="pt"))
    pictures = model.get_embedding(**processor(images=[picture], return_tensors="pt"))
print(pictures @ texts.T)  # cosine similarities, (1, 2)
"""

CAPTION = """\
inputs = processor(images=[picture], task="caption", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=40)
print(processor.batch_decode(ids, skip_special_tokens=True))
"""

REGION_CAPTION = """\
model.load_adapter("REPO_ID", adapter_name="region-caption", adapter_kwargs={"subfolder": "region-caption"})
boxes = [[[0, 0, picture.width // 2, picture.height]]]  # per picture: [x0, y0, x1, y1] in its own pixels
inputs = processor(images=[picture], boxes=boxes, task="region-caption", return_tensors="pt")
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=40), skip_special_tokens=True))
model.disable_adapters()  # and the model is as before
"""

REGION_RETRIEVAL = """\
model.load_adapter("REPO_ID", adapter_name="region-retrieval", adapter_kwargs={"subfolder": "region-retrieval"})
boxes = [[[0, 0, picture.width // 2, picture.height], [picture.width // 2, 0, picture.width, picture.height]]]
with torch.inference_mode():
    regions = model.get_embedding(**processor(images=[picture], boxes=boxes, return_tensors="pt"))  # (1, 2, D)
    phrase = model.get_embedding(**processor(text=["a dog"], return_tensors="pt"))
print(regions[0] @ phrase[0])  # which half is the dog in?
model.disable_adapters()
"""

PIPELINES = """\
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="REPO_ID", trust_remote_code=True)
print(classify("picture.jpg", candidate_labels=["dog", "bicycle"], hypothesis_template="a photo of a {}"))

caption = pipeline("image-text-to-text", model="REPO_ID", trust_remote_code=True)
print(caption(images="picture.jpg", text="<image>", max_new_tokens=40, return_full_text=False))
content = [{"type": "image", "path": "picture.jpg"}, {"type": "text", "text": "a photo of"}]  # goes on from there
print(caption(text=[{"role": "user", "content": content}], max_new_tokens=40, return_full_text=False))

extract = pipeline("image-feature-extraction", model="REPO_ID", trust_remote_code=True)
print(len(extract("picture.jpg")[0]))  # D
"""

REGION_PIPELINE = """\
describe = pipeline("region-captioning", model="REPO_ID", trust_remote_code=True)
print(describe("picture.jpg", boxes=[[0, 0, picture.width // 2, picture.height]]))
"""

SENTENCE_TRANSFORMERS = """\
from sentence_transformers import SentenceTransformer

encoder = SentenceTransformer("REPO_ID", trust_remote_code=True)
texts = encoder.encode(["a dog on a beach", "two red bicycles"])
pictures = encoder.encode([picture])
print(encoder.similarity(pictures, texts))
"""
