"""push_to_hub.py to a Hub on 127.0.0.1 and back, with and without faults on the way."""

import hashlib
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from mmgem.hub import export as export_module
from mmgem.hub.export import export
from mmgem.hub.upload import upload

from ..conftest import make_picture
from ..training.test_cli import TOWERS
from .clean_process import outputs
from .conftest import LEFT_BEHIND, REPO_ID, ROOT, environment, push
from .hub_server import TOKEN, Fault


def test_the_folder_arrives_in_one_commit(pushed):
    hub, result, home = pushed
    folder = home / "hub"
    sent = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert hub.files(REPO_ID) == sent and not sent.keys() & set(LEFT_BEHIND)
    assert hub.repositories[REPO_ID].messages == ["initial commit", "Upload MM-GEM"]
    for name, content in sent.items():
        assert f"{len(content):,}  {name}\n" in result.stdout
    assert f"{hub.url}/{REPO_ID}/commit/" in result.stdout
    assert TOKEN not in result.stdout + result.stderr


def test_a_process_without_mmgem_gets_the_same_model(pushed, trained, tmp_path):
    hub, _, _ = pushed
    picture = make_picture(3)
    picture.save(tmp_path / "picture.png")
    model = AutoModel.from_pretrained(trained).eval()
    expected = outputs(model, AutoProcessor.from_pretrained(trained), picture, str(trained))
    for changes in ({}, {"HF_HUB_OFFLINE": "1"}):
        command = [sys.executable, str(Path(__file__).with_name("clean_process.py")), REPO_ID]
        env = environment(hub, tmp_path / "home", **changes)
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-4000:]
        found = load_file(tmp_path / "outputs.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].allclose(value, atol=1e-6), name
        said = json.loads((tmp_path / "said.json").read_text())
        processor = AutoProcessor.from_pretrained(trained)
        caption = processor.decode(expected["caption"][0], skip_special_tokens=True)
        assert said["plain"][0]["generated_text"] == said["chat"][0]["generated_text"] == caption
        captions = processor.batch_decode(expected["region_captions"], skip_special_tokens=True)
        assert [region["caption"] for region in said["regions"]] == [c.strip() for c in captions]
        assert {answer["label"] for answer in said["labels"]} == {"dog", "snow"}
        assert not hub.asked("GET", "optimizer|training_args")


def test_a_dry_run_sends_nothing(hub, trained, tmp_path):
    arguments = ("--model", str(trained), "--repo_id", REPO_ID, "--output_dir", "hub", "--dry_run")
    result = push(hub, tmp_path, *arguments, HF_TOKEN="")
    assert result.returncode == 0 and (tmp_path / "hub/README.md").exists() and not hub.requests
    assert "model.safetensors" in result.stdout
    result = push(hub, tmp_path, *arguments[:2], "--repo_id", "no/slash/here", "--output_dir", "hub")
    assert result.returncode == 1 and "--repo_id" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow  # a process for each option
def test_options_reach_the_hub(hub, trained, tmp_path):
    arguments = ("--model", str(trained), "--repo_id", REPO_ID, "--output_dir", "hub", "--private")
    result = push(hub, tmp_path, *arguments, "--create_pr", "--commit_message", "for you to see")
    assert result.returncode == 0 and result.stdout.strip().endswith("/discussions/1"), result.stderr
    repository = hub.repositories[REPO_ID]
    assert repository.private and repository.messages[-1] == "for you to see" and not hub.files(REPO_ID)


@pytest.fixture
def here(hub, monkeypatch):
    """This process has the Hub of this test."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # remembers the endpoint that it first had
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def send(here, exported):
    """Uploads to the Hub of this test."""
    return lambda folder=exported, **options: upload(str(folder), REPO_ID, token=TOKEN, **options)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", "/lfs/", cut=True),
        Fault("POST", "/preupload/", cut=True),
        Fault("PUT", "/lfs/", status=500),
        Fault("PUT", "/lfs/", status=429, headers={"Retry-After": "1"}),
        Fault("POST", "/info/lfs/objects/batch", status=503),
    ],
    ids=lambda fault: f"{fault.method} {'cut' if fault.cut else fault.status}",
)
def test_passing_faults_are_overcome(hub, send, exported, fault):
    hub.faults.append(fault)
    send()
    assert fault.times == 0, "the fault never happened"
    assert hub.files(REPO_ID)["model.safetensors"] == (exported / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("POST", "/commit/", status=500), "500"),
        (Fault("POST", "/commit/", cut=True), "disconnected|closed|reset"),
        (Fault("POST", "/commit/", status=401), "hf auth login"),
        (Fault("PUT", "/lfs/", corrupt=True, times=99), "checksum"),
        (Fault("PUT", "/lfs/", status=403, times=99), "may not write"),
    ],
    ids=["500", "cut", "401", "checksum", "403"],
)
def test_lasting_faults_leave_the_repository_as_it_was(hub, send, exported, tmp_path, fault, message):
    send()
    before = hub.files(REPO_ID)
    shutil.copytree(exported, tmp_path / "hub")
    (tmp_path / "hub/model.safetensors").write_bytes(b"retrained")
    hub.faults.append(fault)
    with pytest.raises(ConnectionError, match=rf"(?s)org/mm-gem was left as it is: .*({message})") as error:
        send(tmp_path / "hub")
    assert TOKEN not in str(error.value)
    assert hub.files(REPO_ID) == before
    fault.times = 0
    send(tmp_path / "hub")
    assert hub.files(REPO_ID)["model.safetensors"] == b"retrained"


def test_a_commit_whose_answer_is_lost_is_not_called_undone(hub, send):
    hub.faults.append(Fault("POST", "/commit/", lost=True))
    with pytest.raises(ConnectionError, match=r"has a new commit, [0-9a-f]{40}, perhaps this one"):
        send()
    assert "model.safetensors" in hub.files(REPO_ID)
    send()
    assert hub.repositories[REPO_ID].messages == ["initial commit", "Upload MM-GEM"], "there was nothing left to do"


def test_a_pull_request_whose_answer_is_lost_is_not_called_undone(hub, send):
    hub.faults.append(Fault("POST", "/commit/", lost=True))
    with pytest.raises(ConnectionError, match="look whether it has a pull request already"):
        send(create_pr=True)
    assert hub.files(REPO_ID, "refs/pr/1") and not hub.files(REPO_ID)


def test_nobody_is_overwritten_who_commits_meanwhile(hub, send):
    hub.faults.append(Fault("POST", "/commit/", overtaken=True))
    with pytest.raises(ConnectionError, match=r"(?s)has a new commit.*A commit has happened.*Run the command again"):
        send()
    assert list(hub.files(REPO_ID)) == ["theirs.md"]
    send()
    assert {"theirs.md", "model.safetensors"} <= hub.files(REPO_ID).keys()


@pytest.mark.parametrize(
    ("error", "message"),
    [(ConnectionError("cut"), "cut\nRun the command again"), (PermissionError("no"), "hf auth login")],
)
def test_faults_of_the_other_way_of_upload(hub, send, monkeypatch, error, message):
    """hf_xet, which this server does not speak, has errors of its own."""

    def fail(**_):
        raise error

    monkeypatch.setattr("huggingface_hub._commit_api._upload_files", fail)
    with pytest.raises(ConnectionError, match=f"org/mm-gem was left as it is: .*{message}"):
        send()


def test_shards_arrive_whole_and_are_one_model(hub, send, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "MAX_SHARD_SIZE", "40KB")
    export(str(trained), REPO_ID, str(tmp_path / "hub"), adapters=[])
    hub.faults.append(Fault("PUT", "/lfs/", cut=True))
    send(tmp_path / "hub")
    hub.faults.append(Fault("GET", "resolve/.*/model-00002-of", cut=True))
    found = AutoModel.from_pretrained(REPO_ID, cache_dir=tmp_path / "cache", trust_remote_code=True)
    assert not any(fault.times for fault in hub.faults)
    for name, value in AutoModel.from_pretrained(trained).state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


@pytest.mark.parametrize("interruption", ["commit", "weights"])
def test_an_interrupted_upload_goes_on(hub, send, exported, interruption):
    weights = hashlib.sha256((exported / "model.safetensors").read_bytes()).hexdigest()
    fault = Fault("POST", "/commit/", status=500)
    if interruption == "weights":
        fault = Fault("PUT", weights, status=403, times=99)
    hub.faults.append(fault)
    with pytest.raises(ConnectionError):
        send()
    assert not hub.files(REPO_ID)
    arrived = set(hub.blobs)
    fault.times = 0
    hub.requests.clear()
    send()
    sent = {path.rpartition("/")[2] for method, path in hub.requests if method == "PUT"}
    assert arrived and not sent & arrived, "what had arrived was sent again"
    assert (weights in sent) == (interruption == "weights") and "model.safetensors" in hub.files(REPO_ID)


def test_what_an_earlier_export_left_goes_and_what_others_put_there_stays(hub, send):
    send()
    repository = hub.repositories[REPO_ID]
    theirs = (
        "notes.md",
        "model.fp16.safetensors",
        "images/theirs.png",
        "onnx/model.safetensors",
        "scripts/tools_mmgem.py",
        ".gitattributes",
    )
    stale = (
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "gone_mmgem.py",
        "images/captions.png",
    )
    blob = hub.store(b"something")
    files = repository.commits[repository.branches["main"]] | dict.fromkeys(theirs + stale, blob)
    hub.commit(repository, "main", files, "by hand")
    send()
    left = hub.files(REPO_ID).keys()
    assert left >= set(theirs) and not left & set(stale)


def test_adapters_stay_with_the_weights_that_they_were_trained_on(hub, send, trained, tmp_path):
    send()
    export(str(trained), REPO_ID, str(tmp_path / "hub"), adapters=[str(trained / "region-caption")])
    send(tmp_path / "hub")
    assert "region-retrieval/adapter_model.safetensors" in hub.files(REPO_ID)
    (tmp_path / "hub/model.safetensors").write_bytes(b"retrained")
    send(tmp_path / "hub")
    adapters = [name for name in hub.files(REPO_ID) if name.startswith("region-")]
    assert sorted(adapters) == ["region-caption/adapter_config.json", "region-caption/adapter_model.safetensors"]


def test_branches_pull_requests_and_private_repositories(hub, send):
    send(private=True, commit_message="first")
    assert hub.repositories[REPO_ID].private and hub.repositories[REPO_ID].messages[-1] == "first"
    main = hub.files(REPO_ID)
    hub.repositories[REPO_ID].branches["main"] = next(iter(hub.repositories[REPO_ID].commits))
    send(revision="v1")
    assert hub.files(REPO_ID, "v1") == main and not hub.files(REPO_ID)
    assert send(create_pr=True).endswith("/discussions/1")
    assert hub.files(REPO_ID, "refs/pr/1") == main and not hub.files(REPO_ID)


def test_a_public_repository_does_not_take_what_is_private(hub, send):
    send()
    with pytest.raises(ValueError, match="public already"):
        send(private=True)


def test_no_token_no_upload(hub, exported, monkeypatch):
    monkeypatch.setattr("mmgem.hub.upload.get_token", lambda: None)
    with pytest.raises(ConnectionError, match="hf auth login"):
        upload(str(exported), REPO_ID)


def test_a_token_that_is_none_is_not_printed(here, hub, exported):
    upload(str(exported), REPO_ID, token=f" {TOKEN}\n")
    assert hub.files(REPO_ID)
    with pytest.raises(ValueError, match="holds characters that no token has") as error:
        upload(str(exported), REPO_ID, token="hf_secret secret")
    assert "secret" not in str(error.value)


def test_a_download_that_is_cut_goes_on(hub, send, exported, tmp_path):
    send()
    hub.faults.append(Fault("GET", r"resolve/.*/model\.safetensors", cut=True))
    path = huggingface_hub.hf_hub_download(REPO_ID, "model.safetensors", cache_dir=tmp_path, endpoint=hub.url)
    assert hub.faults[0].times == 0 and Path(path).read_bytes() == (exported / "model.safetensors").read_bytes()


def test_train_pushes_what_an_export_holds(hub, here, tmp_path, monkeypatch):
    def train(*arguments):
        common = ["--dataset_name", "scenes", "--max_train_samples", 16, "--max_eval_samples", 4, "--max_steps", 2]
        common += ["--per_device_train_batch_size", 4, "--save_steps", 1, "--report_to", "none"]
        common += ["--push_to_hub", "--hub_model_id", "org/trained", "--hub_private_repo", "true"]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, common + list(arguments))])
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

    monkeypatch.chdir(tmp_path)
    train(*TOWERS, "--output_dir", "run")
    files = hub.files("org/trained")
    assert hub.repositories["org/trained"].messages == ["initial commit", "Upload MM-GEM"]
    assert hub.repositories["org/trained"].private and not any(name.endswith(".bin") for name in files)
    assert not any(name.startswith("checkpoint-") for name in files)
    card = files["README.md"].decode()
    assert "| steps x batch size | 2 x 4 |" in card and "text_to_image_R@1" in card and "drawn scenes" in card
    assert '"data": [\n    "scenes"' in Path("run/training.json").read_text()
    train("--stage", "region-caption", "--init_from", "run", "--output_dir", "elsewhere/adapter")
    files = hub.files("org/trained")
    assert "region-caption/adapter_model.safetensors" in files and "model.safetensors" in files
    assert "| region_caption_exact |" in files["README.md"].decode()
