"""The model file: a fitted head with the identity of its backbone, one safetensors file, no pickle.

Knows arrays and JSON. Describing a model needs neither torch nor scikit-learn; `predict_proba` imports what
its head needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from featcache.disk import open_regular, write_atomically
from featcache.errors import HeadError, ModelError
from featcache.heads import find_head
from featcache.images.paths import show_path
from featcache.spec import FeatureNode, FeatureSpec, require_shallow
from featcache.words import name_some, show_text

if TYPE_CHECKING:
    from featcache.heads.base import Head

ENCODING_TYPE = "featcache-model"
# 1: one node, no network of its own, no record of the images; such models are still written as 1
ENCODING_VERSION = 2
TRAINED_ON = "trained_on"  # the array of `image_keys`
NETWORK = "network."  # before the names of the tensors of a fine-tuned backbone
_LONGEST_HEADER = 100_000_000  # bytes, of any safetensors file

# What the rebuilding of a head raises on odd content; skops, whose archives are zip files, adds its own.
_REBUILD_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
)
_DESCRIPTION_ERRORS = (
    AttributeError,
    HeadError,
    KeyError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A fitted head and what is needed to give it the features it was fitted on.

    arrays, rest: what the head's `to_arrays` gave. params: the parameters it was built with.
    nodes: of the spec, whose vectors, one after the other, are the head's features.
    network: the state dict of the backbone without its classifier where it was fine-tuned, else empty.
    provenance: of the store, with at least the request for the backbone and the identity of its weights.
    metrics: of the rows held out. chosen: how the parameters were chosen.
    trained_on: `image_keys` of the images the head was fitted on; empty where that is not known.
    """

    head_name: str
    params: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]
    rest: Mapping[str, Any]
    classes: tuple[str, ...]
    spec: FeatureSpec
    nodes: tuple[FeatureNode, ...]
    provenance: Mapping[str, Any]
    metrics: Mapping[str, Any]
    chosen: Mapping[str, Any]
    network: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    trained_on: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))

    @property
    def num_features(self) -> int:
        """Of the vectors of all nodes together."""
        return sum(node.num_features for node in self.nodes)

    @property
    def fingerprint(self) -> str:
        """Of the spec of the store the head was fitted on."""
        return self.spec.fingerprint()

    @property
    def weights(self) -> Mapping[str, Any]:
        """The identity and source of the backbone's weights, as the store recorded them.

        ModelError where the file does not say them, here and in `request`.
        """
        return self._recorded("weights", texts=("source", "label"))

    @property
    def request(self) -> Mapping[str, Any]:
        """What was asked for when the store was made: the backbone's name, its weights, its seed."""
        return self._recorded("request", texts=("backbone",))

    @property
    def tunings(self) -> tuple[Mapping[str, Any], ...]:
        """What each fine-tuning recorded of itself, the first one first."""
        before, last = self.provenance.get("tuned_before"), self.provenance.get("tuned")
        found = [*(before if isinstance(before, list) else ()), last]
        return tuple(one for one in found if isinstance(one, Mapping))

    @property
    def first_weights(self) -> Mapping[str, Any]:
        """Those the first fine-tuning began with; without any, and where it does not say, `weights`."""
        began = self.tunings[0].get("weights") if self.tunings else None
        if isinstance(began, Mapping) and all(isinstance(began.get(key), str) for key in ("source", "label")):
            return began
        return self.weights

    def _recorded(self, name: str, *, texts: tuple[str, ...]) -> Mapping[str, Any]:
        found = self.provenance.get(name)
        if not isinstance(found, Mapping) or not all(isinstance(found.get(text), str) for text in texts):
            raise ModelError(
                f"this model does not say which {' and '.join(texts)} its {name} had. Fit it on a store."
            )
        return found

    @cached_property
    def head(self) -> Head:
        """The fitted head, built from the arrays when it is first used; its classes are 0 … n - 1."""
        kind = find_head(self.head_name)
        try:
            head = kind.load().from_arrays(self.arrays, self.rest, params=self.params)
            _require_probabilities(
                head.predict_proba(np.zeros((2, self.num_features), dtype=np.float32)),
                shape=(2, len(self.classes)),
            )
            return head
        except _REBUILD_ERRORS as error:
            raise ModelError(
                f"the {self.head_name} head of this model cannot be rebuilt: {_one_line(error)}. "
                "Fit it again."
            ) from error

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probabilities of `classes` for feature vectors X of shape (n_samples, num_features)."""
        probabilities: NDArray[np.float64] = self.head.predict_proba(X)
        try:
            _require_probabilities(probabilities, shape=(len(np.asarray(X)), len(self.classes)))
        except ValueError as error:
            raise ModelError(
                f"the {self.head_name} head of this model is not sound: {error}. Fit it again."
            ) from error
        return probabilities

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file under a temporary name, then rename it. DiskError: no space, no permission."""
        about = {
            "head": self.head_name,
            "params": dict(self.params),
            "rest": dict(self.rest),
            "classes": list(self.classes),
            "spec": json.loads(self.spec.to_json()),
            "fingerprint": self.fingerprint,
            "provenance": dict(self.provenance),
            "metrics": dict(self.metrics),
            "chosen": dict(self.chosen),
        }
        one = len(self.nodes) == 1
        about |= {"node": self.nodes[0].key} if one else {"nodes": [node.key for node in self.nodes]}
        arrays = {name: np.asarray(array, order="C") for name, array in self.arrays.items()}
        arrays |= {NETWORK + name: np.asarray(array, order="C") for name, array in self.network.items()}
        if len(self.trained_on):
            arrays[TRAINED_ON] = np.asarray(self.trained_on, dtype=np.uint64)
        plain = one and not self.network and not len(self.trained_on)
        text = json.dumps(about, sort_keys=True)
        metadata = {
            "encoding-type": ENCODING_TYPE,
            "encoding-version": "1" if plain else str(ENCODING_VERSION),
            "model": text,
            "digest": content_digest(text, arrays),
        }
        write_atomically(Path(path), save(arrays, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a model file. ModelError when it is another kind of file, newer, damaged or inconsistent."""
        path = Path(path)
        data = _read_bytes(path)
        metadata = _read_metadata(path, data)
        try:
            arrays = load(data)
        except (SafetensorError, KeyError) as error:  # KeyError: a type of number that numpy has not
            raise ModelError(
                f"{show_path(path)} is damaged or cut short: {_one_line(error)}. Fit again, or copy it again."
            ) from error
        if content_digest(metadata["model"], arrays) != metadata.get("digest"):
            raise ModelError(
                f"{show_path(path)} is damaged: its content is not what was written. "
                "Fit again, or copy it again."
            )
        try:
            network = {name: arrays.pop(name) for name in sorted(arrays) if name.startswith(NETWORK)}
            trained_on = arrays.pop(TRAINED_ON, np.zeros(0, np.uint64))
            if trained_on.dtype != np.uint64 or trained_on.ndim != 1:
                raise ValueError(f"{TRAINED_ON} is a list of keys of images")
            model = cls(
                **_fields(json.loads(metadata["model"])),
                arrays=arrays,
                network={name.removeprefix(NETWORK): array for name, array in network.items()},
                trained_on=trained_on,
            )
            kind_arrays = find_head(model.head_name).arrays
        except _DESCRIPTION_ERRORS as error:
            _refuse(path, f"its description cannot be read ({type(error).__name__}: {_one_line(error)})")
        _check_arrays(path, model, kind_arrays)
        return model


def begins_as_model(path: Path) -> bool:
    """Whether a file is there that says it is a model of ours; it may be damaged all the same."""
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, _LONGEST_HEADER))
    except OSError:
        return False  # nothing of ours; opening or writing will say what is wrong with it
    return f'"encoding-type":"{ENCODING_TYPE}"'.encode() in header


def _require_probabilities(given: NDArray[Any], *, shape: tuple[int, int]) -> None:
    """ValueError when a head does not answer with probabilities; a forged one may."""
    if given.shape != shape or not np.allclose(given.sum(axis=1), 1, atol=1e-6):
        raise ValueError(f"it does not give probabilities of {shape[1]} classes")


def image_keys(sha256: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The first 8 bytes of digests (n, 32), as numbers: two images share them by a chance of 2**-64."""
    return np.ascontiguousarray(sha256[:, :8]).view("<u8").ravel().astype(np.uint64)


def content_digest(text: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    """sha256 over the description and every array by name, type, shape and bytes: it finds damage."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode() + array.tobytes())
    return digest.hexdigest()


def _read_bytes(path: Path) -> bytes:
    """The file, read whole only if it begins as a safetensors file does: it may be a store of many GB."""
    try:
        with open_regular(path) as file:
            start = file.read(10)
            if start.startswith(b"\x89HDF"):
                raise ModelError(
                    f"{show_path(path)} is a feature store, not a model. Fit one on it: "
                    f"featcache fit {show_path(path)} -o MODEL."
                )
            if len(start) < 10 or start[8:9] != b"{":
                raise ModelError(
                    f"{show_path(path)} is not a model file: a safetensors file is expected, and pickles are "
                    "never opened. `featcache fit` writes one."
                )
            file.seek(0)  # rather than join two parts: it may hold a whole network
            return file.read()
    except OSError as error:
        raise ModelError(
            f"{show_path(path)} cannot be opened: {error.strerror}. "
            "A model file, as `featcache fit` writes one, is expected."
        ) from error


def _read_metadata(path: Path, data: bytes) -> dict[str, str]:
    """The file's metadata, from a header that is checked before anything else is looked at."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 + length:
        raise ModelError(
            f"{show_path(path)} is cut short at {len(data):,} bytes. Fit again, or copy it again."
        )
    try:
        metadata: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        kind = metadata.get("encoding-type")
        if kind != ENCODING_TYPE:
            raise ModelError(
                f"{show_path(path)} is a safetensors file, but not a featcache model ({kind!r}). "
                "`featcache fit` writes one."
            )
        version = metadata["encoding-version"]
        if int(version) > ENCODING_VERSION:
            raise ModelError(
                f"{show_path(path)} was written by format {show_text(version)}: upgrade featcache to read it."
            )
        json.loads(metadata["model"])
    except _DESCRIPTION_ERRORS as error:
        raise ModelError(
            f"{show_path(path)} has a damaged header: {_one_line(error)}. Fit again, or copy it again."
        ) from error
    return metadata


def _fields(about: Mapping[str, Any]) -> dict[str, Any]:
    require_shallow(about)
    spec = FeatureSpec.from_json(json.dumps(about["spec"]))
    if spec.fingerprint() != about["fingerprint"]:
        raise ValueError("the fingerprint is not that of the spec")
    nodes = {node.key: node for node in spec.nodes}
    keys = about["nodes"] if "nodes" in about else [about["node"]]
    if not isinstance(keys, list) or not keys or len(set(keys)) < len(keys):
        raise ValueError("nodes are one or more different names")
    classes = tuple(about["classes"])
    if len(classes) < 2 or len(set(classes)) < len(classes) or not all(isinstance(c, str) for c in classes):
        raise ValueError("classes are two or more different names")
    if not about["head"].isprintable():
        raise ValueError("the name of the head is not printable")
    return {
        "head_name": about["head"],
        "params": dict(about["params"]),
        "rest": dict(about["rest"]),
        "classes": classes,
        "spec": spec,
        "nodes": tuple(nodes[key] for key in keys),
        "provenance": dict(about["provenance"]),
        "metrics": dict(about["metrics"]),
        "chosen": dict(about["chosen"]),
    }


def _check_arrays(path: Path, model: Model, expected: Mapping[str, tuple[str, ...]]) -> None:
    """Names, shapes and values of the arrays, against the classes and the node's features."""
    sizes: dict[str, int] = {"K": len(model.classes), "D": model.num_features}
    if set(model.arrays) != set(expected):
        _refuse(
            path, f"it holds the arrays {name_some(sorted(model.arrays))}, not {', '.join(sorted(expected))}"
        )
    for name, letters in expected.items():
        array = model.arrays[name]
        if array.ndim != len(letters):
            _refuse(path, f"{name} has {array.ndim} dimensions, not {len(letters)}")
        wanted = tuple(
            sizes.setdefault(letter, size) for letter, size in zip(letters, array.shape, strict=True)
        )
        if array.shape != wanted:
            _refuse(
                path,
                f"{name} has shape {array.shape}, but {sizes['K']} classes of {sizes['D']} features "
                f"need {wanted}",
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            _refuse(path, f"{name} holds values that are not finite")
    for name, array in model.network.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            _refuse(path, f"{name} of its network holds values that are not finite")
    for name, size in (("n_classes", "K"), ("n_features", "D")):
        if model.rest.get(name, sizes[size]) != sizes[size]:
            _refuse(path, f"{name} is {model.rest[name]}, not {sizes[size]}")


def _one_line(error: Exception) -> str:
    return show_text(" ".join(str(error).split())[:200])


def _refuse(path: Path, why: str) -> NoReturn:
    raise ModelError(f"{show_path(path)} cannot be used: {why}. Fit the model again.")
