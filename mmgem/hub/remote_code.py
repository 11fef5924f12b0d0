"""
The model's code in a Hub folder: the files of `configuration/`, `modeling_mmgem/` and `processing/` side by side,
because the Hub's loader follows `from .sibling import` only.
"""

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any


FOLDERS = ("configuration", "modeling_mmgem", "processing")
MODEL = "modeling_mmgem.MMGEMModel"
CONFIG_ENTRIES = {
    "auto_map": {
        "AutoConfig": "configuration_mmgem.MMGEMConfig",
        "AutoModel": MODEL,
        "AutoModelForImageTextToText": MODEL,
        "AutoModelForZeroShotImageClassification": MODEL,
    },
    "custom_pipelines": {
        "region-captioning": {
            "impl": "pipelines_mmgem.RegionCaptioningPipeline",
            "pt": ["AutoModelForImageTextToText"],
            "type": "multimodal",
        }
    },
}
PROCESSOR_ENTRIES = {"auto_map": {"AutoProcessor": "processing_mmgem.MMGEMProcessor"}}


def write_remote_code(folder: Path) -> None:
    """
    Writes the code into a folder with a saved model and processor, and the names of its classes into their JSON, so
    that `trust_remote_code=True` loads them without mmgem installed.
    """
    for name, code in remote_code().items():
        (folder / name).write_text(code, encoding="utf-8")
    add_to_json(folder / "config.json", CONFIG_ENTRIES)
    add_to_json(folder / "processor_config.json", PROCESSOR_ENTRIES)


def remote_code() -> dict[str, str]:
    """Name and content of the flat files."""
    files: dict[str, str] = {}
    for folder in FOLDERS:
        for source in resources.files(f"mmgem.{folder}").iterdir():
            if source.name.endswith(".py") and source.name != "__init__.py":
                code = source.read_text(encoding="utf-8")
                files[source.name] = re.sub(r"^(\s*from )\.\.\w+(\.\w+ import)", r"\1\2", code, flags=re.MULTILINE)
    return files


def add_to_json(path: Path, entries: dict[str, Any]) -> None:
    """Sets entries of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **entries}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
