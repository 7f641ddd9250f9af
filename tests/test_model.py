"""The model file: what is saved predicts the same, and what is not a sound model is refused in one line."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gaussians import PROVENANCE, gaussian_features
from safetensors.numpy import load, save, save_file

from featcache.commands.info import info
from featcache.errors import DiskError, ModelError
from featcache.fitting import Wishes, fit_features
from featcache.heads import HEADS
from featcache.model import Model, begins_as_model, content_digest
from featcache.store.features import FeatureSet

NAMES = [
    *(name for name in HEADS if name != "sklearn"),
    "sklearn:LogisticRegression",
    "sklearn:RandomForestClassifier",
]
QUICK: dict[str, dict[str, Any]] = {
    "linear": {"weight_decay": 0.1, "epochs": 2},
    "sklearn:RandomForestClassifier": {"n_estimators": 5},
}


def fitted(name: str = "ncm") -> Model:
    return fit_on(gaussian_features(), name)


def fit_on(features: FeatureSet, name: str) -> Model:
    wishes = Wishes(head=name, params=QUICK.get(name, {}))
    return fit_features(features, wishes, provenance=PROVENANCE)[1]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    fitted().save(tmp_path / "m.model")
    return tmp_path / "m.model"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a model file with its description changed."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    about = json.loads(metadata["model"])
    change(about)
    rewrite(path, load(data), {**metadata, "model": json.dumps(about)})


def edit_arrays(path: Path, **arrays: Any) -> None:
    """Rewrite a model file with other arrays; None removes one."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    kept = {name: array for name, array in {**load(data), **arrays}.items() if array is not None}
    rewrite(path, kept, metadata)


def rewrite(path: Path, arrays: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write a model file as somebody would who knows the format, its digest included."""
    path.write_bytes(save(arrays, {**metadata, "digest": content_digest(metadata["model"], arrays)}))


def test_a_flipped_bit_anywhere_in_the_file_is_found(saved: Path) -> None:
    whole = saved.read_bytes()
    for offset in range(0, len(whole), 13):
        saved.write_bytes(whole[:offset] + bytes([whole[offset] ^ 4]) + whole[offset + 1 :])
        with pytest.raises(ModelError):
            Model.load(saved)


def refusal(path: Path) -> str:
    """The one line with which a file is refused, by `Model.load` or when its head is first used."""
    with pytest.raises(ModelError) as caught:
        _ = Model.load(path).head
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_is_the_same_model(name: str, tmp_path: Path) -> None:
    model = fitted(name)
    model.save(tmp_path / "m.model")
    again = Model.load(tmp_path / "m.model")
    X = gaussian_features(seed=1).X
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    for field in ("head_name", "params", "classes", "spec", "nodes", "provenance"):
        assert getattr(again, field) == getattr(model, field), field
    assert again.fingerprint == model.fingerprint == again.spec.fingerprint()
    assert json.loads(json.dumps(model.metrics)) == again.metrics
    assert json.loads(json.dumps(model.chosen)) == again.chosen


def test_a_model_file_is_a_safetensors_file_that_says_what_it_is(saved: Path) -> None:
    data = saved.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    assert (metadata["encoding-type"], metadata["encoding-version"]) == ("featcache-model", "2")
    assert set(load(data)) == {"coef", "intercept", "trained_on"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a model file"),
        (b"abc", "not a model file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "is a feature store.*featcache fit"),
        (b"\x89PNG" + bytes(100), "not a model file"),
        (pickle.dumps({"coef": [1.0] * 50}), "pickles are never opened"),
        (struct.pack("<Q", 2**63) + b"{" + bytes(100), "cut short"),
        (struct.pack("<Q", 40) + b"{" * 40, "damaged header"),
        (struct.pack("<Q", 200_005) + b'{"a":' + b"[" * 200_000, "damaged header"),
        (struct.pack("<Q", 22) + b'{"__metadata__": "no"}', "damaged header"),
        (save({"weight": np.zeros(3)}), "safetensors file, but not a featcache model"),
        (save({"weight": np.zeros(3)}, {"encoding-type": "other"}), "not a featcache model.*other"),
        (save({}, {"encoding-type": "featcache-model", "encoding-version": "3"}), "format 3: upgrade"),
        (save({}, {"encoding-type": "featcache-model", "encoding-version": "1"}), "damaged header"),
    ],
)
def test_what_is_no_model_of_this_version_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)
    assert re.search(words, refusal(path))


def test_what_is_not_there_or_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "No such file" in refusal(tmp_path / "none.model")
    assert "not a regular file" in refusal(tmp_path)
    assert "not a regular file" in refusal(tmp_path / "fifo")


def test_a_large_file_of_another_kind_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.h5"
    with path.open("wb") as file:
        file.write(b"\x89HDF\r\n\x1a\n")
        file.truncate(1 << 42)  # sparse: reading it would need four terabytes
    assert "feature store" in refusal(path)


def test_a_model_is_known_by_its_first_bytes(saved: Path, tmp_path: Path) -> None:
    assert begins_as_model(saved)
    cut = tmp_path / "cut.model"
    cut.write_bytes(saved.read_bytes()[:-10])
    assert begins_as_model(cut)
    save_file({"a": np.zeros(3)}, tmp_path / "other", {"note": "featcache-model"})
    (tmp_path / "empty").touch()
    assert not any(begins_as_model(tmp_path / name) for name in ("other", "empty", "none", "."))


def test_a_message_is_one_line_whatever_the_name_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new\nline"
    for content in (b"", b"no model at all", b"\x89HDF\r\n\x1a\n0000", struct.pack("<Q", 9) + b"{1"):
        path.write_bytes(content)
        with pytest.raises(ModelError) as refused:
            Model.load(path)
        assert r"new\nline" in str(refused.value)
        assert str(refused.value).isprintable()


def test_a_model_file_cut_anywhere_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    for size in (1, 7, 9, 10, 8 + length // 2, 8 + length - 1, 8 + length, 8 + length + 5, len(data) - 1):
        saved.write_bytes(data[:size])
        assert "not a model file" in refusal(saved) or "cut short" in refusal(saved), size


def drop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda about: about.pop(name)


def put(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda about: about.update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(fingerprint="0" * 64), "fingerprint is not that of the spec"),
        (lambda about: about["spec"].update(weights_sha256="1" * 64), "fingerprint is not that of the spec"),
        (put(head="sklearn:\x1b[31m"), "name of the head is not printable"),
        (put(head="logistik"), "no head 'logistik'. Did you mean logistic"),
        (put(classes=["a", "b"]), "coef has shape (3, 5), but 2 classes of 5 features need (2, 5)"),
        (put(classes=["a", "b", "b"]), "different names"),
        (put(classes=[]), "two or more"),
        (put(classes=[1, 2, 3]), "different names"),
        (put(node="layer3"), "KeyError: 'layer3'"),
        (put(params={"power": 3}), "cannot be rebuilt.*power"),
        (put(params=3), "cannot be read"),
        (put(head="knn"), "arrays coef, intercept, not labels, vectors"),
        *((drop(name), name) for name in ("head", "classes", "spec", "node", "provenance")),
    ],
)  # fmt: skip
def test_a_description_that_contradicts_itself_is_refused(
    saved: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    edit(saved, change)
    said = refusal(saved)
    assert all(part in said for part in words.split(".*"))
    assert "Fit" in said


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"coef": np.zeros((3, 4))}, "coef has shape (3, 4), but 3 classes of 5 features need (3, 5)"),
        ({"coef": np.zeros((2, 5))}, "need (3, 5)"),
        ({"coef": np.zeros(15)}, "coef has 1 dimensions, not 2"),
        ({"intercept": np.zeros(2)}, "intercept has shape (2,)"),
        ({"coef": np.full((3, 5), np.nan)}, "coef holds values that are not finite"),
        ({"intercept": np.array([0, np.inf, 0])}, "intercept holds values that are not finite"),
        ({"intercept": None}, "arrays coef, not coef, intercept"),
        ({"more": np.zeros(1)}, "arrays coef, intercept, more"),
    ],
)
def test_arrays_that_do_not_fit_the_description_are_refused(
    saved: Path, arrays: dict[str, Any], words: str
) -> None:
    edit_arrays(saved, **arrays)
    assert words in refusal(saved)


def test_neighbours_with_labels_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    model, path = fitted("knn"), tmp_path / "m.model"
    model.save(path)
    edit_arrays(path, labels=model.arrays["labels"] + 1)
    assert "classes that do not exist" in refusal(path)
    edit_arrays(path, labels=model.arrays["labels"][:-1])
    assert "shape" in refusal(path)


class Planted:
    """Tells whether it was built from a file."""

    built = False

    def __setstate__(self, state: object) -> None:
        type(self).built = True


def test_a_scikit_learn_model_with_a_foreign_type_is_refused_and_not_run(tmp_path: Path) -> None:
    from skops.io import dumps, loads

    path = tmp_path / "m.model"
    fitted("sklearn:LogisticRegression").save(path)
    planted = Planted()
    planted.__dict__["x"] = 1
    payload = dumps({"it": planted})
    loads(payload, trusted=[f"{__name__}.Planted"])
    assert Planted.built, "the plant works where it is trusted"
    Planted.built = False
    edit_arrays(path, skops=np.frombuffer(payload, dtype=np.uint8))
    assert "Planted, a type that featcache does not load" in refusal(path)
    assert not Planted.built


@pytest.mark.parametrize("payload", [b"", b"no archive", b"PK\x03\x04" + bytes(60)])
def test_a_scikit_learn_model_that_is_no_archive_is_refused(tmp_path: Path, payload: bytes) -> None:
    path = tmp_path / "m.model"
    fitted("sklearn:LogisticRegression").save(path)
    edit_arrays(path, skops=np.frombuffer(payload, dtype=np.uint8))
    assert "cannot be rebuilt" in refusal(path)


def test_a_scikit_learn_model_of_other_features_or_classes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.model"
    model = fitted("sklearn:LogisticRegression")
    other = fit_on(gaussian_features(d=4), "sklearn:LogisticRegression")
    replace(model, arrays=other.arrays).save(path)
    assert "does not fit its features" in refusal(path)
    other = fit_on(gaussian_features(k=2), "sklearn:LogisticRegression")
    replace(model, arrays=other.arrays).save(path)
    assert "other classes than the model" in refusal(path)
    replace(model, rest={**model.rest, "n_classes": 2}).save(path)
    assert "n_classes is 2, not 3" in refusal(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"writing .*m\.model failed: No space left on device"):
        fitted("ridge").save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["m.model"]


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="No such file or directory"):
        fitted().save(tmp_path / "none" / "m.model")


def test_a_model_made_without_a_store_says_so_where_its_origin_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "m.model"
    replace(fitted(), provenance={}).save(path)
    assert Model.load(path).classes == ("class0", "class1", "class2")
    with pytest.raises(ModelError, match="does not say which source and label its weights had"):
        info(path)


def test_describing_a_model_imports_neither_torch_nor_scikit_learn(tmp_path: Path) -> None:
    path = tmp_path / "m.model"
    fitted("sklearn:LogisticRegression").save(path)
    code = (
        "import sys; from featcache.commands.info import info; print(info(sys.argv[1]).describe());"
        "print(sorted({'torch', 'sklearn', 'skops', 'PIL'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "sklearn:LogisticRegression" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "[]"


def test_other_safetensors_files_of_the_same_arrays_are_no_model(tmp_path: Path) -> None:
    path = tmp_path / "m.model"
    save_file(dict(fitted().arrays), path)
    assert "not a featcache model (None)" in refusal(path)
