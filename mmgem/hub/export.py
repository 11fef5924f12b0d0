"""Writes the folder that goes to the Hub from a trained model's folder; only files of a fixed list are copied."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

from huggingface_hub import ModelCard
from safetensors import SafetensorError
from transformers.utils import logging
from yaml import YAMLError

from ..data.loading import BUILT_IN
from ..loading import load_checkpoint
from ..modeling_mmgem import MMGEMModel
from ..modeling_mmgem.adapters_mmgem import ADAPTERS, FUSED_ADAPTER, adapter_stage
from ..modeling_mmgem.loading_mmgem import weights_revision
from ..processing import MMGEMProcessor
from .model_card import CardOptions, model_card, read_json
from .remote_code import add_to_json, write_remote_code


logger = logging.get_logger(__name__)

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
# The files of a Hub folder. Optimizer states, pickles and logs that runs leave beside a model are not copied.
ALLOWED = (
    *("README.md", "LICENSE", "LICENSE_CODE", "images/*.png", "*_mmgem.py", *WEIGHTS),
    *("config.json", "generation_config.json"),
    *("processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *(f"{name}/{file}" for name in ADAPTERS for file in ADAPTER_FILES),
)
IMAGES = {
    "": ("retrieval.png", "captions.png"),
    "region-caption": ("regions.png",),
    "region-retrieval": ("heat_maps.png",),
    "fused-retrieval": ("fused.png",),
}
UNREADABLE = (OSError, SafetensorError, RuntimeError, KeyError, TypeError)  # raised by damaged files
MAX_SHARD_SIZE = "2GB"  # at most this much is sent again after an interrupted upload


def export(
    model: str,
    repo_id: str,
    output_dir: str,
    adapters: Sequence[str] | None = None,
    options: CardOptions | None = None,
) -> list[Path]:
    """
    Writes the whole folder that goes to the Hub as `repo_id`: weights in shards, configuration, processor, code,
    adapters, sentence-transformers' files, model card and license.

    Args:
        model: folder of a stage-1 model, as train.py leaves it.
        output_dir: replaced if it holds an earlier export; an export that fails leaves it unchanged.
        adapters: folders of adapters; by default `region-caption`, `region-retrieval` and `fused-retrieval` in the
            model's own folder, if they were trained on its weights.
        options: license, language and limits for the card.

    Returns:
        the files, relative to `output_dir`.

    Raises:
        ValueError: for a folder without a whole MM-GEM model; for a named adapter of another base; for an output_dir
            that holds other files than those of an earlier export.
    """
    source, target = Path(model), Path(output_dir).resolve()
    found = find_adapters(source) if adapters is None else _by_kind([Path(path) for path in adapters])
    _check_target(source, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        folder = Path(scratch, "new")
        folder.mkdir()
        loaded, processor = _load(source)
        for kind, path in list(found.items()):
            if fault := _fault_of_base(path, source):
                if adapters is not None:
                    raise ValueError(f"{fault} Train it again, or export the base that it was trained on.")
                logger.warning(f"{fault} It is left out.")
                del found[kind]
                continue
            try:
                loaded.load_adapter(str(path), adapter_name=kind)
            except UNREADABLE as error:
                raise ValueError(f"The adapter {path} could not be loaded: {error}") from error
            _write_adapter(path, folder / kind, repo_id)
            if kind == "region-caption":
                grid_size = loaded.region_grid_size
                processor.region_grid_size = loaded.config.region_grid_size = grid_size
            loaded.delete_adapter(kind)
        for tower in (loaded.config.vision_config, loaded.config.text_config):
            tower._name_or_path = ""  # may be a private folder
        loaded.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        processor.tokenizer.model_max_length = processor.max_length  # sentence-transformers' max_seq_length
        processor.save_pretrained(folder)
        write_remote_code(folder)
        _write_sentence_transformers_files(folder, FUSED_ADAPTER in found)
        sources = {"": source, **found}
        options = options or CardOptions()
        images = _copy_images(sources, folder / "images", options.images)
        if options.model_card is not None:
            shutil.copyfile(options.model_card, folder / "README.md")
        else:
            text = model_card(repo_id, loaded, processor.max_length, sources, images, options)
            (folder / "README.md").write_text(text, encoding="utf-8")
        _write_license(folder)
        files = files_of(folder)
        if target.exists():
            target.rename(Path(scratch, "old"))
        folder.rename(target)
    return files


def files_of(folder: Path) -> list[Path]:
    """The files in a folder that belong to a Hub folder, relative to it."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(path for path in paths if matches(path.as_posix(), ALLOWED))


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a path fits one of the patterns, whose `*` does not cross folders."""
    return any(fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns)


def find_adapters(model: Path) -> dict[str, Path]:
    """
    Adapters in the model's own folder, by kind.

    Raises:
        ValueError: for an adapter of another kind under one of their names.
    """
    folders = [model / kind for kind in ADAPTERS]
    return _by_kind([folder for folder in folders if (folder / "adapter_config.json").is_file()])


def _by_kind(adapters: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for adapter in adapters:
        config = read_json(adapter / "adapter_config.json")
        kind = adapter_stage(config.get("modules_to_save"), config.get("auto_mapping"))
        if kind is None:
            raise ValueError(f"{adapter} holds no adapter of {', '.join(ADAPTERS)}.")
        if kind in found:
            raise ValueError(f"{found[kind]} and {adapter} are both a {kind}; a Hub folder has room for one.")
        if not (adapter / "adapter_model.safetensors").is_file():
            raise ValueError(f"The adapter {adapter} has no adapter_model.safetensors.")
        found[kind] = adapter
    return found


def _check_target(source: Path, target: Path) -> None:
    """Raises ValueError if the output folder holds other files than those of an earlier export."""
    if target in (source.resolve(), Path.cwd()):
        raise ValueError(f"--output_dir {target} would be replaced as a whole; give a folder of its own.")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    files = [path.relative_to(target) for path in target.rglob("*") if not path.is_dir()]
    foreign = [path for path in files if not matches(path.as_posix(), ALLOWED)]
    if foreign or Path("modules.json") not in files or Path("configuration_mmgem.py") not in files:
        reason = f"holds {foreign[0]}" if foreign else "is no earlier export"
        raise ValueError(f"--output_dir {target} {reason}, and would be replaced as a whole; give another.")


def _load(source: Path) -> tuple[MMGEMModel, MMGEMProcessor]:
    """Raises ValueError for a model that cannot be loaded whole, which should not be published."""
    if not (source / "config.json").is_file():
        is_adapter = (source / "adapter_config.json").is_file()
        raise ValueError(f"--model {source} {'is an adapter; give its base' if is_adapter else 'has no config.json'}.")
    if not any(list(source.glob(pattern)) for pattern in WEIGHTS):
        raise ValueError(f"--model {source} has no model.safetensors (or shards of it).")
    try:
        return load_checkpoint(str(source), dtype="auto"), MMGEMProcessor.from_pretrained(source)
    except UNREADABLE as error:
        raise ValueError(f"--model {source} could not be loaded: {error}") from error


def _fault_of_base(adapter: Path, base: Path) -> str | None:
    """Says that an adapter was trained on other weights than those of `base`; None if it was trained on these."""
    revision = read_json(adapter / "adapter_config.json").get("revision")
    is_digest = isinstance(revision, str) and revision.startswith("sha256:")
    if not is_digest or revision == weights_revision(str(base)):
        return None
    return f"The adapter {adapter} was trained on other weights than those in {base}."


def _write_adapter(source: Path, folder: Path, repo_id: str) -> None:
    """Copies the adapter's weights, and writes its configuration with the Hub's name of its base."""
    folder.mkdir()
    for name in ADAPTER_FILES:
        shutil.copyfile(source / name, folder / name)
    mapping = read_json(source / "adapter_config.json").get("auto_mapping") or {}
    mapping |= {"base_model_class": "AutoModel", "parent_library": "transformers"}
    base = {"base_model_name_or_path": repo_id, "revision": None, "auto_mapping": mapping}
    add_to_json(folder / "adapter_config.json", base)


def _copy_images(sources: dict[str, Path], folder: Path, of_all: bool) -> list[str]:
    """Copies the sheets of evaluations, unless they show images of the user who did not ask for it; their names."""
    evaluated = {kind: source for kind, source in sources.items() if (source / "results.json").is_file()}
    images = []
    for kind, source in evaluated.items():
        own = [source / name for name in IMAGES[kind] if (source / name).is_file()]
        setting = read_json(source / "results.json").get("setting")
        is_drawn = isinstance(setting, dict) and setting.get("dataset") in BUILT_IN
        if own and not of_all and not is_drawn:
            logger.warning(f"{source} has sheets of the images that it was evaluated on. --images publishes them too.")
        else:
            images += own
    if images:
        folder.mkdir()
    for image in images:
        shutil.copyfile(image, folder / image.name)
    return [image.name for image in images]


def _write_sentence_transformers_files(folder: Path, has_fused: bool) -> None:
    """sentence-transformers calls get_text_features, get_image_features or get_fused_features, and normalises."""
    module = "sentence_transformers.base.modules"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{module}.transformer.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": f"{module}.normalize.Normalize"},
    ]
    named = {"text": "text", "image": "image", **({"image+text": "fused"} if has_fused else {})}
    features = {
        modality: {"method": f"get_{name}_features", "method_output_name": "pooler_output"}
        for modality, name in named.items()
    }
    transformer = {"transformer_task": "feature-extraction", "modality_config": features}
    contents = {
        "modules.json": modules,
        "sentence_bert_config.json": {**transformer, "module_output_name": "sentence_embedding"},
        "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_license(folder: Path) -> None:
    """Copies the code's license, as LICENSE_CODE if the card says that the weights have another one."""
    try:
        weights = ModelCard.load(folder / "README.md").data.license
    except (YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"The metadata at the top of the model card cannot be read: {error}") from error
    files = metadata.distribution("mmgem").files or []
    license_file = next(file.locate() for file in files if file.name == "LICENSE")
    shutil.copyfile(str(license_file), folder / ("LICENSE" if weights == "apache-2.0" else "LICENSE_CODE"))
