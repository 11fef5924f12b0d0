"""A checkpoint with its three adapters, a folder of images, and the model loaded."""

import numpy as np
import pytest

from mmgem.library import LoadedModel
from mmgem.library.tables import read_vectors

from ..conftest import make_picture
from ..hub.conftest import save_model_and_adapters


def rows_of(folder):
    """The vector of each id of an index."""
    vectors = read_vectors(str(folder))
    return dict(zip(vectors.ids.to_pylist(), np.concatenate(list(vectors))))


@pytest.fixture(scope="session")
def checkpoint(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("library") / "model"
    save_model_and_adapters(folder, processor)
    return str(folder)


@pytest.fixture
def loaded(checkpoint):
    return LoadedModel.load(checkpoint, device="cpu")


@pytest.fixture
def photos(tmp_path):
    """Five images, one of them in a subfolder, beside files that are none."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for i in range(4):
        make_picture(i).save(folder / f"{i}.jpg", quality=95)
    make_picture(4, (40, 60)).save(folder / "sub" / "4.PNG")
    make_picture(5).save(folder / ".hidden" / "5.jpg")
    make_picture(6).save(folder / "._6.jpg")
    (folder / "notes.txt").write_text("no image")
    return folder
