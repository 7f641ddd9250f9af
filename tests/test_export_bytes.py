"""`export` of the same model, or store, writes the same bytes, in whatever process."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from test_export import NOT_BEFORE_2_9, make_small

import featcache
from featcache.commands.export import export
from featcache.commands.fit import fit
from featcache.exporting import FORMATS
from featcache.exporting.tensors import encode_tensors

# {file: what it is of and in which format}
FILES: Mapping[str, tuple[str, str]] = {
    "state.safetensors": ("m.model", "torchvision"),
    "tensors.safetensors": ("m.model", "safetensors"),
    "graph.onnx": ("m.model", "onnx"),
    "trees.onnx": ("trees.model", "onnx"),
    "program.pt2": ("m.model", "torch"),
    "x.npz": ("s.h5", "features"),
    "x.parquet": ("s.h5", "features"),
}
NAMES = [pytest.param(name, marks=NOT_BEFORE_2_9 if to == "torch" else ()) for name, (_, to) in FILES.items()]
EXPORT_ALL = """
import json, sys
from pathlib import Path
from featcache.commands.export import export

made, folder, files = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
for name, (source, to) in files.items():
    export(made / source, folder / name, to=to)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with s.h5, and fitted on it m.model, which is linear, and trees.model."""
    folder = make_small(tmp_path_factory.mktemp("made"))
    trees = {"n_estimators": 5}
    fit(folder / "s.h5", folder / "trees.model", head="sklearn:RandomForestClassifier", params=trees)
    return folder


@pytest.fixture(scope="module")
def elsewhere(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What another process exports, in which sets and dicts of objects have another order."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (too_old,) = NOT_BEFORE_2_9.args
    files = {name: made_of for name, made_of in FILES.items() if made_of[1] != "torch" or not too_old}
    asked = (str(made), str(folder), json.dumps(files))
    subprocess.run(
        [sys.executable, "-c", EXPORT_ALL, *asked], check=True, env={**os.environ, "PYTHONHASHSEED": "1"}
    )
    return folder


def test_every_format_is_among_them() -> None:
    assert {to for _, to in FILES.values()} == set(FORMATS)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_is_exported_as_the_same_bytes(
    made: Path, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source, to = FILES[name]
    now = time.localtime(time.time() + 86_400)  # a zip may say when its members were made
    monkeypatch.setattr(time, "localtime", lambda *_: now)
    result = export(made / source, tmp_path / name, to=to)
    assert (tmp_path / name).read_bytes() == (elsewhere / name).read_bytes()
    if result.card:
        assert Path(result.card).read_bytes() == (elsewhere / f"{name}.md").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_no_file_names_a_folder_of_this_machine(made: Path, elsewhere: Path, name: str) -> None:
    """Of the code that made it, or of the images."""
    path = elsewhere / name
    parts = [path.read_bytes()]
    if path.suffix == ".pt2":
        with zipfile.ZipFile(path) as archive:
            parts = [archive.read(member) for member in archive.namelist()]
    for folder in (made, Path(featcache.__file__).parent, Path(torch.__file__).parent):
        assert not any(str(folder).encode() in part for part in parts)


def test_metadata_of_tensors_is_in_the_order_of_its_names() -> None:
    tensors = {"b": torch.arange(3.0), "a": torch.arange(5, dtype=torch.uint8), "é\n": torch.zeros(2, 2)}
    about = {name: f'"{name}" \\ \x1f \U0001f34e' for name in "zyxwvutsrq"}
    data = encode_tensors(tensors, about)
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert list(header["__metadata__"].items()) == sorted(about.items())
    theirs, ours = load(save(tensors, about)), load(data)
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in tensors)
    assert encode_tensors(tensors, about) == data
