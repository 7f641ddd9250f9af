"""Files made to deceive: sound stores and models with a few things changed by one who knows the formats.

Every checksum, seal and digest is made right again after a change, so that the code behind them is reached.
Each mutant is opened and used in a forked child under limits of memory and time. It must be refused by a
`FeatcacheError`, or serve arrays that hold together; a crash, a hang, any other exception or arrays that
contradict each other is a violation.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import sys
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from conftest import make_toy_store, toy_spec
from gaussians import PROVENANCE, gaussian_features
from safetensors import SafetensorError
from safetensors.numpy import load, save

import featcache.store.opening
from faults.structure import Checked, find_checked
from featcache.commands.info import info
from featcache.errors import FeatcacheError
from featcache.fitting import Wishes, fit_features
from featcache.heads import HEADS
from featcache.model import Model, content_digest
from featcache.records import SPLITS, RowStatus
from featcache.store.layout import SEAL_DTYPE, STAT_COLUMNS, Region, StoreLayout
from featcache.store.opening import read_layout
from featcache.store.reader import FeatureStore

MEMORY = 1 << 30  # bytes a child may take beyond what its parent has
CPU_SECONDS, WALL_SECONDS = 10, 30
HEAD_NAMES = (
    *(name for name in HEADS if name != "sklearn"),
    "sklearn:LogisticRegression",
    "sklearn:RandomForestClassifier",
    "sklearn:SVC",
    "sklearn:MLPClassifier",
    "sklearn:GradientBoostingClassifier",
    "sklearn:GaussianNB",
    "sklearn:HistGradientBoostingClassifier",
    "sklearn:KNeighborsClassifier",
)
_QUICK: Mapping[str, Mapping[str, Any]] = {
    "sklearn:RandomForestClassifier": {"n_estimators": 3},
    "sklearn:GradientBoostingClassifier": {"n_estimators": 2},
    "sklearn:HistGradientBoostingClassifier": {"max_iter": 2, "min_samples_leaf": 3},
    "sklearn:MLPClassifier": {"hidden_layer_sizes": [4], "max_iter": 20},
}

NUMBERS = (0, 1, 2, 3, 4, 7, 8, 16, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31,
           2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant. `violation` is None when that was allowed."""

    kind: str
    result: str  # "served", "refused NotAStore", "SIGSEGV", …
    violation: str | None = None


@dataclass(frozen=True)
class Originals:
    """The sound files that mutants are made of."""

    stores: tuple[bytes, ...]
    structures: tuple[tuple[Checked, ...], ...]  # of each store
    layouts: tuple[StoreLayout, ...]
    models: Mapping[str, bytes]  # by head

    @classmethod
    def make(cls, folder: Path, *, heads: tuple[str, ...] = HEAD_NAMES) -> Originals:
        path = make_toy_store(folder / "store.h5", n=10)
        half = make_toy_store(folder / "half.h5", n=10, spec=toy_spec(store_dtype="float16"))
        stores = (path.read_bytes(), half.read_bytes(), _with_dense_links(path, folder / "dense.h5"))
        models = {}
        for name in heads:
            _make_model(name).save(folder / "m.model")
            models[name] = (folder / "m.model").read_bytes()
        return cls(
            stores=stores,
            structures=tuple(tuple(find_checked(store)) for store in stores),
            layouts=(read_layout(path), read_layout(half), read_layout(path)),
            models=models,
        )


def _make_model(name: str) -> Model:
    if name == "linear":  # fitting one imports torch, which makes every fork slower; its arrays are the same
        return replace(_make_model("logistic"), head_name="linear", params={"weight_decay": 0.1})
    if name == "mlp":
        rng = np.random.default_rng(0)
        arrays = {
            "hidden": rng.normal(size=(4, 5)),
            "hidden_bias": np.zeros(4),
            "output": rng.normal(size=(3, 4)),
            "output_bias": np.zeros(3),
        }
        return replace(_make_model("logistic"), head_name="mlp", params={"width": 4}, arrays=arrays)
    wishes = Wishes(head=name, params=_QUICK.get(name, {}))
    return fit_features(gaussian_features(), wishes, provenance=PROVENANCE)[1]


def _with_dense_links(path: Path, copy: Path) -> bytes:
    """The store with so many links in its root group that HDF5 keeps them in a B-tree and a heap."""
    copy.write_bytes(path.read_bytes())
    with h5py.File(copy, "r+", libver=("v110", "v110")) as file:
        for i in range(9):
            file.create_group(f"more{i}")
    return copy.read_bytes()


# Mutants of a store: bytes, and what is still to be done where the file lies (the seal).


def mutate_structure(rng: random.Random, originals: Originals) -> bytes:
    """One to three fields of HDF5 metadata changed, under right checksums."""
    i = rng.randrange(len(originals.stores))
    data, pieces = bytearray(originals.stores[i]), originals.structures[i]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        piece = rng.choice(pieces)
        _change_field(rng, data, piece, pieces)
    for piece in pieces:
        piece.repair(data)
    return bytes(data)


def _change_field(rng: random.Random, data: bytearray, piece: Checked, pieces: tuple[Checked, ...]) -> None:
    at = rng.randrange(piece.start, piece.stop)
    width = rng.choice([1, 1, 2, 4, 8])
    at = max(piece.start, min(at, piece.stop - width))
    choice = rng.randrange(6)
    if choice == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif choice == 1:
        data[at] = rng.choice([*range(26), 127, 128, 255])
    elif choice == 2:
        number = rng.choice([*NUMBERS, len(data), len(data) - 1, piece.start])
        data[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
    elif choice == 3:  # an address that leads to another piece, or back
        starts = {p.start for p in pieces} | {2**64 - 1}
        fields = [a for a in range(piece.start, piece.stop - 7) if _number(data, a) in starts]
        at = rng.choice(fields or [max(piece.start, piece.stop - 8)])
        data[at : at + 8] = rng.choice(pieces).start.to_bytes(8, "little")
    elif choice == 4:  # a stretch of another piece, such as one message in place of another
        other = rng.choice(pieces)
        source = rng.randrange(other.start, other.stop)
        stretch = data[source : min(source + rng.randrange(1, 40), other.stop)][: piece.stop - at]
        data[at : at + len(stretch)] = stretch
    else:
        data[at : at + width] = rng.randbytes(width)


def _number(data: bytearray, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")


def mutate_records(rng: random.Random, originals: Originals) -> bytes:
    """Fields of block records and what they vouch for, under right CRCs."""
    data, layout = bytearray(originals.stores[0]), originals.layouts[0]
    block = rng.randrange(layout.n_blocks)
    record = _view(data, layout.blocks)[block : block + 1]
    rows = layout.rows_of(block)
    what = rng.choice(["status", "sources", "features", "record", "order"])
    if what == "status":
        _view(data, layout.row_status)[rows] = rng.choice([0, 2, 3, 7, 8, 99, 255])
    elif what == "sources":
        field = rng.choice(list(STAT_COLUMNS))
        _view(data, layout.sources)[rows][field] = rng.choice([-1, -(2**63), 2**63 - 1])
    elif what == "features":
        region = rng.choice(list(layout.features.values()))
        _view(data, region)[rows] = rng.choice([np.nan, np.inf, 3e38])
    elif what == "order":
        records = _view(data, layout.blocks)
        records[:] = records[rng.sample(range(len(records)), len(records))]
        return bytes(data)
    else:
        field = rng.choice([name for name in record.dtype.names if name not in ("magic", "record_crc")])
        record[field] = rng.choice(NUMBERS) % (1 << 8 * record.dtype[field].itemsize)
    if what != "record":
        vectors = (_view(data, region)[rows].tobytes() for region in layout.features.values())
        features = layout.fingerprint.encode() + b"".join(vectors)
        columns = _view(data, layout.row_status)[rows].tobytes() + _view(data, layout.sources)[rows].tobytes()
        record["features_crc"], record["columns_crc"] = zlib.crc32(features), zlib.crc32(columns)
    record["record_crc"] = zlib.crc32(record.tobytes()[:60])
    return bytes(data)


def mutate_columns(rng: random.Random, originals: Originals) -> bytes:
    """Values of the columns that never change within a file: labels, splits, ids, classes, block records."""
    data = bytearray(originals.stores[0])
    with h5py.File(io.BytesIO(bytes(data))) as file:
        name = rng.choice(["labels", "splits", "ids", "classes"])
        offset, size = file[name].id.get_offset(), file[name].nbytes
    for _ in range(rng.choice([1, 1, 4])):
        at = rng.randrange(offset, offset + size)
        stretch = rng.choice(
            [b"\0", b"\xff", b"/", b"\n", b"../", b"\x80", b"\x01", rng.randbytes(8), b"\\x"]
        )
        stretch = stretch[: offset + size - at]
        data[at : at + len(stretch)] = stretch
    return bytes(data)


def _view(data: bytearray, region: Region) -> np.ndarray:
    return region.map(data)


def mutate_attributes(rng: random.Random, originals: Originals) -> bytes:
    """The spec, provenance and other attributes, as JSON and as text."""
    buffer = io.BytesIO(originals.stores[0])
    with h5py.File(buffer, "r+", libver=("v110", "v110")) as file:
        name = rng.choice(["spec", "spec", "provenance", "provenance", "fingerprint", "uuid", "block-rows"])
        if name == "block-rows":
            value = rng.choice([-1, 0, 1, 3, 2**31, 2**63 - 1, 1.5, float("nan"), "4", [4], [[4, 4]]])
            file.attrs[name] = value
        else:
            _set_text(file, name, _mutant_text(rng, file.attrs[name].decode()))
        if name == "spec" and rng.random() < 0.9:
            _set_text(file, "fingerprint", _fingerprint_of(file.attrs["spec"]) or "0" * 64)
    return buffer.getvalue()


def _set_text(file: h5py.File, name: str, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    data = data[:60_000] or b"\0"
    kind = h5py.string_dtype("utf-8", len(data))
    file.attrs.create(name, np.array(data, dtype=f"S{len(data)}"), dtype=kind)


def _fingerprint_of(spec: Any) -> str | None:
    """What a forger would write: the fingerprint the reader will compute, where it computes any."""
    from featcache.spec import FeatureSpec

    try:
        return FeatureSpec.from_json(bytes(spec).decode()).fingerprint()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None


def _mutant_text(rng: random.Random, text: str) -> str | bytes:
    if rng.random() < 0.15:
        return rng.choice(
            [
                "", "null", "[]", "{}", "1", '"text"', "NaN", "{", text[:-1], text + "}", text * 2,
                "[" * 20_000, '{"a":' * 8_000 + "1" + "}" * 8_000, "1" + "0" * 5000, b"\xff\xfe",
                b"\0" + text.encode(), text.replace("{", '{"backbone":1,', 1),
            ]
        )  # fmt: skip
    return json.dumps(mutate_json(rng, json.loads(text)) if text[:1] in "[{" else text[::-1])


def mutate_json(rng: random.Random, value: Any) -> Any:
    """The value with one to three of its parts replaced, removed, repeated, renamed or nested."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = list(_places(value))
        if not places:
            return _odd(rng, value)
        parent, key = rng.choice(places)
        what = rng.randrange(8)
        if what == 0:
            del parent[key]
        elif what == 1 and isinstance(parent, dict):
            parent[rng.choice(["", "a", "é\ud800", "__class__", "x" * 5000])] = parent.pop(key)
        elif what == 2 and isinstance(parent, list):
            parent.append(parent[key])
        else:
            parent[key] = _odd(rng, parent[key])
    return value if _can_be_written(value) else None


def _can_be_written(value: Any) -> bool:
    try:
        json.dumps(value)
    except RecursionError:
        return False
    return True


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _odd(rng: random.Random, old: Any) -> Any:
    nested: Any = []
    for _ in range(rng.choice([3, 900])):
        nested = [nested]
    texts = [
        "",
        "a",
        "../../etc/passwd",
        "/etc/passwd",
        "module:function",
        "os:system",
        "\0",
        "é\n",
        "x" * 3000,
    ]
    return rng.choice(
        [
            None, True, False, 0, -1, 1, 2, 3, 0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf"),
            10**30, -(10**30), 2**31, 2**40, 2**63, 2**64, [], {}, [old], {"a": old}, [old, old], str(old),
            nested, rng.choice(texts), rng.choice(NUMBERS), rng.choice([*SPLITS, "float16", "none", "avg"]),
        ]
    )  # fmt: skip


# Mutants of a model file.


def mutate_header(rng: random.Random, originals: Originals) -> bytes:
    """The safetensors header: its length, types, shapes and offsets; the digest is right if it can be."""
    header, rest = _split_model(originals.models[rng.choice(list(originals.models))])
    if rng.random() < 0.2:
        text = json.dumps(header).encode()
        length = rng.choice([*NUMBERS, len(text) - 1, len(text) + 1, len(text) + len(rest)])
        return length.to_bytes(8, "little")[:8] + text + rest
    name = rng.choice([name for name in header if name != "__metadata__"])
    what = rng.randrange(5)
    if what == 0:
        header[name]["dtype"] = rng.choice(
            ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "U8", "BOOL", "C64", "F4", "no", 1]
        )
    elif what == 1:
        header[name]["shape"] = mutate_json(rng, header[name]["shape"])
    elif what == 2:
        header[name]["data_offsets"] = mutate_json(rng, header[name]["data_offsets"])
    elif what == 3:
        header[rng.choice(["extra", "coef", "\n", "__metadata__2"])] = dict(header[name])
    else:
        header = mutate_json(rng, header)
    return _join_model(header, rest)


def mutate_arrays(rng: random.Random, originals: Originals) -> bytes:
    """Values, types and shapes of the arrays, as one array each."""
    metadata, arrays = model_parts(originals.models[rng.choice(list(originals.models))])
    name = rng.choice(list(arrays))
    array = arrays[name]
    arrays[name] = _odd_array(rng, array)
    return forge_model(arrays, metadata)


def _odd_array(rng: random.Random, array: np.ndarray) -> np.ndarray:
    what = rng.randrange(7)
    if what == 0:
        with np.errstate(over="ignore", invalid="ignore"):
            return array.astype(rng.choice(["f8", "f4", "f2", "i8", "i4", "u8", "u1", "?", "i1"]))
    if what == 1:
        return array.reshape(-1)
    if what == 2:
        return array[: rng.randrange(len(array) + 1)]
    if what == 3:
        return array[..., None]
    changed = np.array(array)
    flat = changed.reshape(-1)
    if flat.size:
        for _ in range(rng.choice([1, 3])):
            flat[rng.randrange(flat.size)] = rng.choice([0, 1, 2, 100, 127])
        if what > 4 and changed.dtype.kind == "f":
            with np.errstate(over="ignore"):
                flat[rng.randrange(flat.size)] = rng.choice([1e300, -1e300, np.nan, np.inf, 5e-324])
        elif what > 4 and changed.dtype == np.int64:
            flat[rng.randrange(flat.size)] = rng.choice([-1, -(2**63), 2**63 - 1, 1000])
    return changed


def mutate_description(rng: random.Random, originals: Originals) -> bytes:
    """The JSON that describes the model, with the fingerprint of what the spec has become."""
    metadata, arrays = model_parts(originals.models[rng.choice(list(originals.models))])
    about = json.loads(metadata["model"])
    if rng.random() < 0.4:
        part = rng.choice(["params", "rest", "head", "classes", "metrics", "chosen"])
        about[part] = mutate_json(rng, about[part])
        if rng.random() < 0.3:
            about["head"] = rng.choice([*HEAD_NAMES, "sklearn:NoSuch", "sklearn:", "sklearn", ""])
    else:
        about = mutate_json(rng, about)
    if isinstance(about, dict) and "spec" in about and rng.random() < 0.9:
        about["fingerprint"] = _fingerprint_of(json.dumps(about["spec"]).encode())
    metadata["model"] = json.dumps(about)
    return forge_model(arrays, metadata)


def mutate_payload(rng: random.Random, originals: Originals) -> bytes:
    """What skops wrote of a scikit-learn estimator: its schema and the arrays within its archive."""
    names = [name for name in originals.models if name.startswith("sklearn:")]
    metadata, arrays = model_parts(originals.models[rng.choice(names)])
    members = _unzip(arrays["skops"].tobytes())
    if rng.random() < 0.15:
        payload = bytearray(arrays["skops"].tobytes())
        for _ in range(rng.choice([1, 8])):
            payload[rng.randrange(len(payload))] = rng.choice([0, 1, 255, rng.randrange(256)])
    else:
        name = rng.choice(["schema.json", *members])
        members[name] = _odd_member(rng, name, members)
        payload = bytearray(_zip(members))
    arrays["skops"] = np.frombuffer(bytes(payload), dtype=np.uint8)
    return forge_model(arrays, metadata)


def _odd_member(rng: random.Random, name: str, members: Mapping[str, bytes]) -> bytes:
    data = members[name]
    if name.endswith(".json"):
        schema = json.loads(data)
        return json.dumps(mutate_json(rng, schema)).encode()
    if not data.startswith(b"\x93NUMPY"):
        return rng.randbytes(len(data))
    what = rng.randrange(4)
    if what == 0:  # a shape that would need more memory than there is
        shape = rng.choice([b"(1099511627776,)", b"(4611686018427387904,)", b"(2, 1073741824)", b"(-1,)"])
        return _npy_header(data, shape)
    if what == 1:
        return rng.choice([v for k, v in members.items() if k.endswith(".npy")])
    array = np.load(io.BytesIO(data), allow_pickle=False)
    out = io.BytesIO()
    if array.dtype.names is None:
        array = _odd_array(rng, array) if array.ndim else array
    else:  # the nodes of a tree
        array = np.array(array)
        field = rng.choice(array.dtype.names)
        odd = np.array(rng.choice([-2, -1, 0, 1, 2, 100]))
        array[field].reshape(-1)[rng.randrange(array[field].size)] = odd.astype(array.dtype[field])
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _npy_header(data: bytes, shape: bytes) -> bytes:
    length = int.from_bytes(data[8:10], "little")
    text = data[10 : 10 + length]
    start = text.index(b"'shape': ") + 9
    text = text[:start] + shape + text[text.index(b")", start) + 1 :]
    return data[:8] + len(text).to_bytes(2, "little") + text + data[10 + length :]


def _unzip(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zip(members: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def _split_model(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join_model(header: Any, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + rest
    try:
        arrays = load(data)
        header["__metadata__"]["digest"] = content_digest(header["__metadata__"]["model"], arrays)
    except (AttributeError, KeyError, SafetensorError, TypeError, ValueError):
        return data  # too odd to forge further
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def model_parts(data: bytes) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the arrays of a model file."""
    return _split_model(data)[0]["__metadata__"], dict(load(data))


def forge_model(arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """A model file of these, its digest included, as one writes it who knows the format."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    digest = content_digest(metadata["model"], arrays)
    return save(arrays, {**metadata, "digest": digest})


Mutate = Callable[[random.Random, Originals], bytes]
STORE_KINDS: Mapping[str, Mutate] = {
    "store: HDF5 structure": mutate_structure,
    "store: block records": mutate_records,
    "store: columns": mutate_columns,
    "store: attributes": mutate_attributes,
}
MODEL_KINDS: Mapping[str, Mutate] = {
    "model: header": mutate_header,
    "model: arrays": mutate_arrays,
    "model: description": mutate_description,
    "model: skops payload": mutate_payload,
}
KINDS: Mapping[str, Mutate] = {**STORE_KINDS, **MODEL_KINDS}


def try_mutant(
    seed: int, originals: Originals, path: Path, *, kinds: Sequence[str] = tuple(KINDS)
) -> Outcome:
    """Make the mutant of this seed at `path`, then open and use it in a child."""
    rng = random.Random(seed)
    kind = rng.choice(kinds)
    path.write_bytes(KINDS[kind](rng, originals))
    use = use_store if kind in STORE_KINDS else use_model
    return _in_child(kind, lambda: use(path))


def use_store(path: Path) -> str:
    """Open a store as a user does; its seal is first made right, as by one who knows how to compute it."""
    forge_seal(path)
    try:
        store = FeatureStore.open(path)
    except FeatcacheError as error:
        return _refusal(error)
    said = info(path)
    said.describe()
    json.dumps(said.to_json())
    if not set(store.row_status.tolist()) <= set(RowStatus):
        return "violation: a row status that does not exist"
    store.failed_rows()
    for node in store.spec.nodes:
        features = store.features(node.key, partial=True)
        n = len(features.ids)
        if features.X.shape != (n, node.num_features) or not len(features.y) == len(features.splits) == n:
            return "violation: columns of different lengths"
        if n and not -1 <= features.y.min() <= features.y.max() < len(features.classes):
            return "violation: a label without a class"
    store.features(partial=True)
    return "served"


def forge_seal(path: Path) -> None:
    """Write the seal that the reader will compute, wherever it looks for it."""
    compute = featcache.store.opening.compute_seal

    def write_it(source: Any, size: int, left_out: Any) -> str:
        regions = list(left_out)
        sealed = compute(source, size, regions)
        for region in regions:
            if region.dtype == SEAL_DTYPE and region.shape == (1,):
                with open(path, "r+b") as file:
                    os.pwrite(file.fileno(), sealed.encode(), region.offset)
        return sealed

    featcache.store.opening.compute_seal = write_it
    try:
        read_layout(path)
    except FeatcacheError:
        pass
    finally:
        featcache.store.opening.compute_seal = compute


def use_model(path: Path) -> str:
    """Load a model and predict with it, as a user does."""
    try:
        model = Model.load(path)
        said = info(path)
        said.describe()
        json.dumps(said.to_json())
        rows = gaussian_features({"test": 6}, d=model.num_features, k=2).X
        probabilities = model.predict_proba(rows)
        _ = model.request, model.weights
    except FeatcacheError as error:
        return _refusal(error)
    if probabilities.shape != (6, len(model.classes)):
        return f"violation: probabilities of shape {probabilities.shape} for {len(model.classes)} classes"
    if not np.isfinite(probabilities).all():
        return "violation: probabilities that are not finite"
    if probabilities.min() < 0 or not np.allclose(probabilities.sum(axis=1), 1, atol=1e-6):
        return "violation: probabilities that do not sum to 1"
    return "served"


def _refusal(error: FeatcacheError) -> str:
    if "\n" in str(error) or len(str(error)) > 3000:
        return "violation: a message of several lines, or of more than 3,000 characters"
    return f"refused {type(error).__name__}"


def _in_child(kind: str, use: Callable[[], str]) -> Outcome:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _report(use, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return Outcome(kind, name, f"the process died of {name}")
    if not said:
        return Outcome(kind, "exit", f"the process ended with status {os.WEXITSTATUS(status)}")
    result, _, details = said.partition("\n")
    is_violation = result.startswith(("violation", "raised"))
    return Outcome(kind, result, (details or result) if is_violation else None)


def _report(use: Callable[[], str], writing: int) -> None:
    """In the child: use the mutant under limits, say in the pipe how it went, and end."""
    code = 1
    try:
        _limit()
        try:
            said = use()
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is a finding
            said = f"raised {type(error).__name__}\n{_where(error)}"
        os.write(writing, said.encode("utf-8", "backslashreplace")[:8192])
        code = 0
    finally:
        os._exit(code)


def _where(error: BaseException) -> str:
    """The exception and the last places of featcache's that it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "featcache" in f.filename]
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames[-3:]))
    return f"{type(error).__name__}: {str(error)[:200]!r} at {places}"


def _limit() -> None:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(WALL_SECONDS)
    quiet = os.open(os.devnull, os.O_WRONLY)  # libhdf5 prints past Python
    os.dup2(quiet, 1)
    if not sys.flags.dev_mode:
        os.dup2(quiet, 2)
