"""What goes into a Hub folder, and what does not."""

import ast
import json
import shutil

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmgem import MMGEMModel
from mmgem.hub import export as export_module
from mmgem.hub.export import export
from mmgem.hub.remote_code import FOLDERS, remote_code
from mmgem.training.adapters import add_region_adapter
from mmgem.training.building import build_model_and_processor
from mmgem.training.model_arguments import ModelArguments

from ..conftest import make_model
from .conftest import LEFT_BEHIND, REPO_ID, ROOT


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_everything_that_is_needed_and_nothing_else(exported):
    files = files_of(exported)
    assert files >= {
        *("config.json", "generation_config.json", "model.safetensors", "processor_config.json"),
        *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "README.md", "images/retrieval.png"),
        *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
        *("region-caption/adapter_config.json", "region-caption/adapter_model.safetensors"),
        *("region-retrieval/adapter_config.json", "region-retrieval/adapter_model.safetensors"),
        *("configuration_mmgem.py", "modeling_mmgem.py", "processing_mmgem.py", "pipelines_mmgem.py"),
    }
    assert not files & set(LEFT_BEHIND) and not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    assert "Apache License" in (exported / "LICENSE_CODE").read_text(), "whose the weights are is not known"


def test_json_names_the_code_and_the_adapters_their_base(exported):
    config = json.loads((exported / "config.json").read_text())
    classes = [*config["auto_map"].values(), config["custom_pipelines"]["region-captioning"]["impl"]]
    classes += json.loads((exported / "processor_config.json").read_text())["auto_map"].values()
    for reference in classes:
        module, name = reference.split(".")
        assert f"class {name}" in (exported / f"{module}.py").read_text()
    for kind in ("region-caption", "region-retrieval"):
        adapter = json.loads((exported / kind / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == REPO_ID
        assert adapter["auto_mapping"]["parent_library"] == "transformers", "mmgem may not be there"


def test_sheets_of_ones_own_images_stay_unless_asked_for(trained, tmp_path, caplog):
    shutil.copytree(trained, tmp_path / "run")
    for dataset, expected in (("data/pairs.parquet", False), ("scenes", True)):
        results = json.loads((tmp_path / "run/results.json").read_text())
        results["setting"]["dataset"] = dataset
        (tmp_path / "run/results.json").write_text(json.dumps(results))
        export(str(tmp_path / "run"), REPO_ID, str(tmp_path / "hub"))
        assert ("images/retrieval.png" in files_of(tmp_path / "hub")) == expected
        assert ("images/retrieval.png" in (tmp_path / "hub/README.md").read_text()) == expected
    assert "--images publishes them too" in caplog.text


def test_nobodys_folders_are_published(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["vision_config"]["_name_or_path"] = "/home/somebody/clip"
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    files = export(str(tmp_path / "run"), REPO_ID, str(tmp_path / "hub"))
    for file in files:
        if file.suffix in (".json", ".md", ".py", ".jinja"):
            text = (tmp_path / "hub" / file).read_text()
            assert "/home/somebody" not in text and str(tmp_path) not in text and str(trained) not in text, file


def test_the_processor_writes_prompts_for_the_adapter(exported):
    config = json.loads((exported / "processor_config.json").read_text())
    assert config["region_grid_size"] == 2 == json.loads((exported / "config.json").read_text())["region_grid_size"]


def test_code_that_travels_is_flat():
    """The Hub's loader follows `from .sibling import` only, and mmgem is not there."""
    code = remote_code()
    sources = [file for folder in FOLDERS for file in (ROOT / folder).glob("*_mmgem.py")]
    assert sorted(code) == sorted(file.name for file in sources), "each name once"
    assert "from .configuration_mmgem import MMGEMConfig" in code["modeling_mmgem.py"]
    for name, text in code.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1 and (node.level == 0 or f"{node.module}.py" in code), name
                assert node.level or node.module.split(".")[0] != "mmgem", name
            elif isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "mmgem" for alias in node.names), name


def test_large_models_come_in_shards(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "MAX_SHARD_SIZE", "40KB")
    files = export(str(trained), REPO_ID, str(tmp_path / "hub"))
    assert {file.as_posix() for file in files} == files_of(tmp_path / "hub")
    shards = [file for file in files if file.suffix == ".safetensors" and file.parent.name == ""]
    assert len(shards) > 2 and (tmp_path / "hub/model.safetensors.index.json").exists()
    names = set()
    for shard in shards:
        with safe_open(tmp_path / "hub" / shard, "pt") as file:
            names |= set(file.keys())
    with safe_open(trained / "model.safetensors", "pt") as file:
        assert names == set(file.keys())


def test_an_earlier_export_is_replaced(exported, trained, tmp_path):
    shutil.copytree(exported, tmp_path / "hub")
    (tmp_path / "hub/model-00001-of-00002.safetensors").write_bytes(b"of a larger model")
    export(str(trained), REPO_ID, str(tmp_path / "hub"), adapters=[])
    files = files_of(tmp_path / "hub")
    assert files < files_of(exported) and not any(name.startswith("region-") for name in files)
    assert [path.name for path in tmp_path.iterdir()] == ["hub"], "nothing else is left behind"


def test_a_model_that_was_trained_on_from_an_export_names_no_code_that_it_lacks(exported, tmp_path):
    model, processor = build_model_and_processor(ModelArguments(init_from=str(exported)), [], 20)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for name in ("config.json", "processor_config.json"):
        assert not json.loads((tmp_path / name).read_text()).keys() & {"auto_map", "custom_pipelines"}


def corrupt_weights(run):
    (run / "model.safetensors").write_bytes(b"\x00" * 100)


def truncated_results(run):
    (run / "results.json").write_text('{"metrics": ')


def half_the_weights(run):
    tensors = load_file(run / "model.safetensors")
    save_file(dict(list(tensors.items())[: len(tensors) // 2]), run / "model.safetensors", {"format": "pt"})


def no_weights(run):
    (run / "model.safetensors").unlink()


def truncated_adapter(run):
    file = run / "region-caption/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def broken_adapter_config(run):
    (run / "region-retrieval/adapter_config.json").write_text("{")


def another_adapter(run):
    (run / "region-retrieval/adapter_config.json").write_text('{"peft_type": "LORA"}')


def pickled_weights(run):
    (run / "model.safetensors").rename(run / "pytorch_model.bin")
    (run / "model_old.safetensors").write_bytes(b"")


def pickled_adapter(run):
    (run / "region-caption/adapter_model.safetensors").rename(run / "region-caption/adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt_weights, "could not be loaded"),
        (half_the_weights, "is missing"),
        (truncated_results, r"results.json is not valid JSON"),
        (no_weights, "has no model.safetensors"),
        (truncated_adapter, "region-caption could not be loaded"),
        (broken_adapter_config, r"adapter_config.json is not valid JSON"),
        (another_adapter, "region-retrieval holds no adapter of region-caption"),
        (pickled_weights, "has no model.safetensors"),
        (pickled_adapter, "has no adapter_model.safetensors"),
    ],
)
def test_a_failed_export_leaves_the_earlier_one(exported, trained, tmp_path, damage, message):
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(exported, tmp_path / "hub")
    damage(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        export(str(tmp_path / "run"), REPO_ID, str(tmp_path / "hub"))
    assert files_of(tmp_path / "hub") == files_of(exported)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hub"}


def test_what_cannot_be_exported_is_named(trained, tmp_path, processor):
    with pytest.raises(ValueError, match="region-caption is an adapter; give its base"):
        export(str(trained / "region-caption"), REPO_ID, str(tmp_path / "hub"))
    with pytest.raises(ValueError, match=r"nowhere has no config\.json"):
        export(str(tmp_path / "nowhere"), REPO_ID, str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="would be replaced"):
        export(str(trained), REPO_ID, str(trained))
    with pytest.raises(ValueError, match="holds no adapter of region-caption"):
        export(str(trained), REPO_ID, str(tmp_path / "hub"), adapters=[str(tmp_path)])
    with pytest.raises(ValueError, match="are both a region-caption"):
        export(str(trained), REPO_ID, str(tmp_path / "hub"), adapters=[str(trained / "region-caption")] * 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis.tex, and would be replaced"):
        export(str(trained), REPO_ID, str(tmp_path / "mine"))
    assert (tmp_path / "mine/thesis.tex").exists()
    for name in ("config.json", "model.safetensors"):  # a model, but not an export of one
        (tmp_path / "model").mkdir(exist_ok=True)
        shutil.copyfile(trained / name, tmp_path / "model" / name)
    with pytest.raises(ValueError, match="is no earlier export"):
        export(str(trained), REPO_ID, str(tmp_path / "model"))


def test_adapters_that_retraining_left_behind_stay_there(trained, tmp_path, processor, caplog):
    shutil.copytree(trained, tmp_path / "run")
    make_model(processor, seed=5).save_pretrained(tmp_path / "run")
    files = export(str(tmp_path / "run"), REPO_ID, str(tmp_path / "hub"))
    assert not any(file.parent.name.startswith("region") for file in files)
    assert "region-caption was trained on other weights" in caplog.text and "left out" in caplog.text
    assert "region-caption" not in (tmp_path / "hub/README.md").read_text()


def test_an_adapter_of_another_base_is_refused(trained, tmp_path, processor):
    make_model(processor, seed=5).save_pretrained(tmp_path / "other")
    other = MMGEMModel.from_pretrained(tmp_path / "other")
    add_region_adapter(other, "region-retrieval", 1).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapter was trained on other weights than those in"):
        export(str(trained), REPO_ID, str(tmp_path / "hub"), adapters=[str(tmp_path / "adapter")])
    assert not (tmp_path / "hub").exists()
