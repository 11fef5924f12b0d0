"""A Hub Space: the page of `mmgem serve`, with the model and the index that the Space's variables name."""

import os

from huggingface_hub import snapshot_download

from mmgem.library import Index, LoadedModel
from mmgem.page.app import APPEARANCE, build_page


MODEL = os.environ["MODEL"]  # a model on the Hub: org/mm-gem
INDEX = os.environ.get("INDEX")  # a dataset on the Hub, with the folder of `mmgem embed`; without it, drawn scenes

loaded = LoadedModel.load(MODEL)
if INDEX:
    index = Index(snapshot_download(INDEX, repo_type="dataset"), loaded)
else:
    index = Index.build("scenes", "index", loaded)
page = build_page(index)
page.queue(default_concurrency_limit=1)
page.launch(**APPEARANCE)
