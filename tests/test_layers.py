"""The layers of the house: imports go down only, and each third-party library keeps to its rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import featcache

PACKAGE = Path(featcache.__file__).parent

# A module may import from the layers below its own, and from its own family.
LAYERS = (
    {"cli", "__main__", "__init__", "demo"},
    {"commands"},
    {
        "embedding",
        "together",
        "update",
        "explanation",
        "forecast",
        "embedder",
        "request",
        "origin",
        "filling",
        "reuse",
        "sharding",
        "lanes",
        "needs",
        "pipeline",
        "engines",
        "evaluate",
        "exporting",
        "fitting",
        "joining",
        "keeping",
        "model",
        "options",
        "inference",
        "answers",
        "next_step",
        "outputs",
        "tuning",
        "verification",
    },
    {"images", "backbones", "store", "heads"},
    {"spec", "records", "progress", "versions", "disk", "interrupts", "words", "processors", "transforms"},
    {"errors"},
)
# The operations that build on other operations: {importer: imported}.
WITHIN_A_LAYER = {
    "cli": {"demo"}, "__main__": {"cli"}, "lanes": {"engines"},
    "pipeline": {"engines", "lanes"}, "filling": {"lanes", "reuse"},
    "request": {"engines"}, "embedder": {"engines", "request"},
    "needs": {"origin", "pipeline", "reuse"},
    "explanation": {"reuse"}, "keeping": {"reuse"}, "sharding": {"reuse"},
    "embedding": {"embedder", "filling", "lanes", "pipeline", "request", "reuse"},
    "together": {"embedding", "lanes", "pipeline", "reuse"},
    "update": {"embedding", "forecast", "keeping", "reuse", "sharding"},
    "options": {"embedder", "embedding", "engines", "origin", "request", "sharding"},
    "inference": {"engines", "lanes", "model", "pipeline", "request"},
    "answers": {"inference", "model"},
    "next_step": {"answers", "evaluate", "fitting", "model"},
    "outputs": {"model"},
    "fitting": {"evaluate", "model"},
    "tuning": {
        "answers", "embedder", "embedding", "engines", "evaluate", "fitting", "inference", "model",
        "next_step", "origin", "outputs", "request", "sharding", "together", "update",
    },
    "exporting": {"engines", "model", "request"},
    "forecast": {"embedder", "embedding", "engines", "lanes", "pipeline", "request", "reuse"},
}  # fmt: skip
ROOMS = {
    "click": {"cli"},
    "h5py": {"store"},
    "onnxruntime": {"engines", "exporting"},
    "onnx": {"engines", "exporting"},
    "skl2onnx": {"exporting"},
    "torchvision": {"backbones", "exporting"},
    "timm": {"backbones"},
    "PIL": {"images", "tuning"},
    "sklearn": {"heads", "evaluate"},
    "skops": {"heads"},
    "pyarrow": {"demo", "exporting"},
    "simplejpeg": {"images"},
    "torch": {"backbones", "engines", "exporting", "heads", "images", "store", "tuning"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def unit_of(module: str) -> str:
    """`featcache.store.layout` -> `store`."""
    return module.split(".")[1] if "." in module else "__init__"


def imports_of(path: Path) -> Iterator[str]:
    """Every module a file imports, in functions as well; not what is only for type checkers."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            if node.module == "featcache":
                yield from (f"featcache.{alias.name}" for alias in node.names)
            else:
                yield node.module


def layer_of(unit: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if unit in layer)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    unit = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imports_of(path):
        if not module.startswith("featcache"):
            continue
        other = unit_of(module)
        own_family = unit == other and unit != "commands"
        allowed = own_family or other in WITHIN_A_LAYER.get(unit, ()) or layer_of(other) > layer_of(unit)
        assert allowed, f"{unit} may not import {module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_third_party_libraries_keep_to_their_rooms(path: Path) -> None:
    unit = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imports_of(path):
        library = module.split(".")[0]
        if library in ROOMS:
            assert unit in ROOMS[library], f"{unit} may not import {library}"


def loaded_after(code: str) -> set[str]:
    """Top-level modules in memory once `code` has run in a fresh interpreter."""
    tail = "\nimport sys; print(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    ran = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=True)
    return set(ran.stdout.splitlines()[-1].split())


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    loaded = loaded_after("import featcache, featcache.cli")
    assert not loaded & {"torch", "torchvision", "sklearn", "h5py", "numpy", "PIL", "scipy"}


@pytest.mark.parametrize(
    "verb",
    [
        "info",
        "fit",
        "compare",
        "embed",
        "verify",
        "repair",
        "explain",
        "merge",
        "plan",
        "evaluate",
        "finetune",
    ],
)
def test_a_verb_is_imported_without_torch(verb: str) -> None:
    assert not loaded_after(f"import featcache.commands.{verb}") & {"torch", "torchvision", "timm"}
