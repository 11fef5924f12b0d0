"""A Hub Space: the page of `mmgem serve`, with the model and the index that the Space's variables name."""

import os

from huggingface_hub import snapshot_download

from mmgem.library import Index
from mmgem.page.app import APPEARANCE, build_page


MODEL = os.environ["MODEL"]  # a model on the Hub: org/mm-gem
INDEX = os.environ.get("INDEX")  # a dataset on the Hub, with the folder of `mmgem embed`; without it, drawn scenes

downloaded = snapshot_download(INDEX, repo_type="dataset") if INDEX else None
index = Index(downloaded, MODEL) if downloaded else Index.build("scenes", "index", MODEL)
build_page(index).launch(**APPEARANCE)
