"""The index of Ray Data's local mode is that of one process: `make test-ray`."""

import json

import numpy as np
import pytest

from mmgem.library import SourceOptions
from mmgem.library.building import LEFT_OUT, build
from mmgem.library.tables import part_files, read_vectors

from ..conftest import write_shards
from .conftest import rows_of


ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_two_workers_give_the_vectors_of_one_process(photos, loaded, checkpoint, tmp_path):
    from mmgem.library.ray_engine import build_with_ray

    (photos / "broken.jpg").write_bytes(b"nothing")
    model = {"name": checkpoint, "device": "cpu"}
    report = build_with_ray(SourceOptions(str(photos)), str(tmp_path / "ray"), model, workers=2)
    build(SourceOptions(str(photos)), str(tmp_path / "alone"), loaded)
    assert report.embedded == 5 and list(report.left_out) == ["broken.jpg"]
    assert len(part_files(str(tmp_path / "ray"))) == 2
    assert json.loads((tmp_path / "ray" / LEFT_OUT).read_text())["id"] == "broken.jpg"
    found, expected = rows_of(tmp_path / "ray"), rows_of(tmp_path / "alone")
    assert found.keys() == expected.keys()
    for name, vector in expected.items():
        np.testing.assert_allclose(found[name], vector, atol=1e-5)
    again = build_with_ray(SourceOptions(str(photos)), str(tmp_path / "ray"), model, workers=2)
    assert (again.embedded, again.present) == (0, 5)


def test_shards(checkpoint, tmp_path):
    from mmgem.library.ray_engine import build_with_ray

    write_shards(tmp_path)
    options, model = SourceOptions(str(tmp_path / "{0..3}.tar")), {"name": checkpoint, "device": "cpu"}
    assert build_with_ray(options, str(tmp_path / "ray"), model, workers=2).embedded == 48
    assert len(read_vectors(str(tmp_path / "ray"))) == 48
    assert build_with_ray(options, str(tmp_path / "ray"), model, workers=2).embedded == 0


def test_a_worker_that_fails_ends_with_its_reason(photos, tmp_path, processor):
    from mmgem.library.ray_engine import build_with_ray

    from ..conftest import make_model

    model = make_model(processor)
    model.visual_projection.weight.data[:] = 3e38  # finite in the file, and not in an embedding
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"A worker failed: .*holds NaN or infinity"):
        build_with_ray(SourceOptions(str(photos)), str(tmp_path / "ray"), {"name": str(tmp_path / "model")})
