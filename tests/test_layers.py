"""The imports between our modules: none runs upward, and none runs in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# A module imports from its own layer and from those before it.
LAYERS = (
    *("configuration", "processing", "modeling_mmgem", "data", "evaluation", "training", "hub"),
    *("library", "page", "cli", "scripts"),
)
# Modules of mmgem/ itself, by the highest layer that they may import from.
BESIDE = {
    "mmgem._version": "configuration",
    "mmgem.options": "modeling_mmgem",
    "mmgem.output_lock": "modeling_mmgem",
    "mmgem.loading": "modeling_mmgem",
    "mmgem.mining": "evaluation",
    "mmgem": "modeling_mmgem",
    "mmgem.__main__": "cli",
}
SCRIPTS = ("train", "push_to_hub")


def our_modules() -> dict[str, Path]:
    """Paths by the names of the modules; `mmgem.configuration` and its like are links to the folders of the root."""
    folders = [ROOT / "mmgem", *(ROOT / "mmgem" / layer for layer in LAYERS[:-1])]
    files = [file for folder in folders for file in (*folder.glob("*.py"), *folder.glob("metrics/*.py"))]
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {
        **{name.removesuffix(".__init__"): file for name, file in modules.items()},
        **{name: ROOT / f"{name}.py" for name in SCRIPTS},
    }


MODULES = our_modules()


def imported_modules(name: str) -> set[str]:
    """Our modules that a module imports anywhere in it, inside of functions too."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            # `from . import regions` names modules, `from .regions import as_regions` what is in one.
            found |= {
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source for alias in node.names
            }
    return found & MODULES.keys() - {name}


def layer(name: str) -> int:
    if name in SCRIPTS:
        return LAYERS.index("scripts")
    return LAYERS.index(BESIDE[name] if name in BESIDE else name.split(".")[1])


def test_the_imports_are_found():
    assert "mmgem.data.regions" in imported_modules("mmgem.data.collator")
    assert "mmgem.evaluation.retrieval" in imported_modules("mmgem.evaluation.metrics.image_text_retrieval")
    assert "mmgem.training.run" in imported_modules("mmgem.cli.train")
    assert "mmgem.cli.train" in imported_modules("train")


@pytest.mark.parametrize("name", MODULES)
def test_no_import_runs_upward(name):
    upward = [other for other in imported_modules(name) if layer(other) > layer(name)]
    assert not upward, f"{name} is below {', '.join(upward)}"


def test_no_import_runs_in_a_circle():
    # A package's __init__ stands for the package, which its own modules cannot do without.
    graph = {name: {other for other in imported_modules(name) if not name.startswith(f"{other}.")} for name in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError, with the circle
