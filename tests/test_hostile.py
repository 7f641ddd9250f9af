"""Files that lie on purpose are refused in words that help; nothing is run, read elsewhere or waited for.

The stores here are edited by HDF5 itself; where a sound seal could be computed for them, it is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import make_toy_store, toy_spec, write_toy_blocks
from faults.mutants import forge_model, forge_seal, model_parts
from faults.structure import find_checked
from gaussians import PROVENANCE, gaussian_features, write_store

from featcache.commands.info import info
from featcache.commands.predict import predict
from featcache.commands.verify import verify
from featcache.errors import DamagedStore, FeatcacheError, ModelError, NotAStore
from featcache.fitting import Wishes, fit_features
from featcache.model import Model
from featcache.records import NO_FILE, ImageRecord
from featcache.store.creating import create_store
from featcache.store.layout import RowTable
from featcache.store.reader import FeatureStore

PATIENCE = 120  # seconds; nothing here may wait for anybody
MUTANTS = 250


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """End a test that waits for a pipe's writer or a device."""

    def give_up(*_: object) -> None:
        raise TimeoutError("still waiting")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def edit_store(path: Path, change: Callable[[h5py.File], object]) -> None:
    """Change a store as its forger would, who also computes the seal anew."""
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        change(file)
    forge_seal(path)


def edit_bytes(path: Path, old: bytes, new: bytes) -> None:
    """Put `new` where `old` is in the metadata, under right checksums."""
    data = bytearray(path.read_bytes())
    pieces = find_checked(bytes(data))
    at = data.index(old)
    data[at : at + len(new)] = new
    for piece in pieces:
        piece.repair(data)
    path.write_bytes(data)
    forge_seal(path)


def replaced(name: str, make: Callable[[h5py.File], object]) -> Callable[[h5py.File], object]:
    def change(file: h5py.File) -> None:
        if name in file:
            del file[name]
        make(file)

    return change


def labels(**options: Any) -> Callable[[h5py.File], object]:
    """`/labels` as another kind of dataset."""
    given = {"data": np.zeros(10, "<i8")} if not {"shape", "data"} & options.keys() else {}
    return replaced("labels", lambda file: file.create_dataset("labels", **given, **options))


def compact(file: h5py.File) -> None:
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple((10,))
    h5py.h5d.create(file.id, b"labels", h5py.h5t.STD_I64LE, space, creation)


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(shape=(10,), dtype="<i8")
    layout[:] = h5py.VirtualSource("/etc/passwd", "labels", shape=(10,))
    file.create_virtual_dataset("labels", layout)


def committed(file: h5py.File) -> None:
    file["kind"] = np.dtype("<i8")
    file["labels"] = file["kind"]


def lengthened(name: str, n: int) -> Callable[[h5py.File], object]:
    def change(file: h5py.File) -> None:
        kind = file[name].dtype
        del file[name]
        file.create_dataset(name, shape=(n,), dtype=kind)

    return change


REFUSED: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "chunked": (labels(chunks=(5,)), "/labels is chunked, virtual or stored outside"),
    "filtered": (labels(compression="gzip"), "/labels is chunked"),
    "checksummed by a filter": (labels(fletcher32=True), "/labels is chunked"),
    "extendible": (labels(maxshape=(None,)), "/labels is chunked"),
    "compact": (replaced("labels", compact), "/labels is chunked"),
    "virtual": (replaced("labels", virtual), "/labels is chunked, virtual"),
    "external storage": (
        labels(shape=(10,), dtype="<i8", external=[("/etc/passwd", 0, 80)]),
        "/labels is chunked, virtual or stored outside the file",
    ),
    "an external link": (
        replaced("labels", lambda f: f.__setitem__("labels", h5py.ExternalLink("other.h5", "/labels"))),
        "/labels is a link that may lead elsewhere",
    ),
    "a soft link": (
        replaced("labels", lambda f: f.__setitem__("labels", h5py.SoftLink("/splits"))),
        "/labels is a link that may lead elsewhere",
    ),
    "a soft link to the features": (
        lambda f: (f.move("features", "other"), f.__setitem__("features", h5py.SoftLink("/other"))),
        "is a link that may lead elsewhere",
    ),
    "a soft link to itself": (
        replaced("labels", lambda f: f.__setitem__("labels", h5py.SoftLink("/labels"))),
        "is a link that may lead elsewhere",
    ),
    "a named datatype": (replaced("labels", committed), "/labels is not a dataset"),
    "big endian": (labels(data=np.zeros(10, ">i8")), "/labels is not of type int64"),
    "unsigned": (labels(data=np.zeros(10, "<u8")), "/labels is not of type int64"),
    "object references": (labels(shape=(10,), dtype=h5py.ref_dtype), "/labels is not of type int64"),
    "text of any length": (labels(shape=(10,), dtype=h5py.string_dtype()), "/labels is not of type int64"),
    "arrays of any length": (
        labels(shape=(10,), dtype=h5py.vlen_dtype("i8")),
        "/labels is not of type int64",
    ),
    "ids of any length": (
        replaced("ids", lambda f: f.create_dataset("ids", data=["a"] * 10, dtype=h5py.string_dtype())),
        "/ids is not fixed-length text",
    ),
    "ids that are numbers": (
        replaced("ids", lambda f: f.create_dataset("ids", data=np.arange(10))),
        "/ids is not fixed-length text",
    ),
    "no shape at all": (labels(data=h5py.Empty("<i8")), "/labels has|structure cannot be read"),
    "a scalar": (labels(data=np.int64(3)), "/labels has shape"),
    "two dimensions": (labels(data=np.zeros((10, 1), "<i8")), "/labels has shape"),
    "another length": (labels(data=np.zeros(9, "<i8")), "has shape"),
    "other ids than labels": (lengthened("ids", 9), "/ids has shape"),
    "a shape bomb": (labels(shape=(1 << 40,), dtype="<i8"), "has shape|within the file"),
    "the largest shape": (labels(shape=(1 << 60,), dtype="<i8"), "has shape|within the file"),
    "a bomb of classes": (lengthened("classes", 1 << 50), "/classes does not lie within the file"),
    "a group": (replaced("labels", lambda f: f.create_group("labels")), "/labels is not a dataset"),
    "nothing": (replaced("labels", lambda f: None), "/labels is missing"),
    "no features": (replaced("features", lambda f: None), "/features/penultimate is missing"),
    "features that are a dataset": (
        replaced("features", lambda f: f.create_dataset("features", data=np.zeros(3))),
        "/features|structure cannot be read",
    ),
    "one dataset twice": (
        replaced("splits", lambda f: f.__setitem__("splits", f["row_status"])),
        "overlaps",
    ),
    "no seal": (replaced("seal", lambda f: None), "/seal is missing"),
}  # fmt: skip


@pytest.mark.parametrize("trick", REFUSED)
def test_a_dataset_no_store_has_is_refused(toy_store: Path, trick: str) -> None:
    change, words = REFUSED[trick]
    edit_store(toy_store, change)
    with pytest.raises((NotAStore, DamagedStore), match=words):
        FeatureStore.open(toy_store)


def test_a_link_of_a_users_own_kind_is_refused(toy_store: Path) -> None:
    edit_store(
        toy_store,
        replaced("labels", lambda f: f.__setitem__("labels", h5py.ExternalLink("o.h5", "/labels"))),
    )
    data = toy_store.read_bytes()
    at = data.index(b"o.h5\0/labels") - 3  # length of the value, its version and flags
    name = data.rindex(b"labels", 0, at)
    kind = data.rindex(bytes([64]), 0, name)  # the type of an external link
    edit_bytes(toy_store, data[kind : at + 8], b"\x48" + data[kind + 1 : at + 8])
    with pytest.raises((NotAStore, DamagedStore), match="/labels is a link|structure"):
        FeatureStore.open(toy_store)


@pytest.mark.parametrize(
    ("offset", "words"),
    [
        ("splits", "overlaps"),
        (1 << 40, "within the file|structure cannot be read"),
        (-8, "within the file|structure cannot be read"),
        (2**64 - 1, "within the file"),
        (2**63, "within the file|structure cannot be read"),
    ],
)
def test_a_dataset_that_claims_other_bytes_is_refused(toy_store: Path, offset: Any, words: str) -> None:
    with h5py.File(toy_store) as file:
        have = file["labels"].id.get_offset()
        if isinstance(offset, str):
            offset = file[offset].id.get_offset() - 8
    if offset == -8:
        offset = toy_store.stat().st_size - 8
    edit_bytes(toy_store, struct.pack("<QQ", have, 80), struct.pack("<QQ", offset, 80))
    with pytest.raises((NotAStore, DamagedStore), match=words):
        FeatureStore.open(toy_store)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("encoding-version", b"2", "format 2.*Upgrade featcache"),
        ("encoding-version", b"10", "format 10.*Upgrade featcache"),
        ("encoding-version", b"\xff", "structure cannot be read"),
        ("encoding-type", b"anndata", "holds 'anndata', not 'featcache-store'"),
        ("spec", b"{", "structure cannot be read"),
        ("spec", b"[]", "spec is a JSON object"),
        ("spec", b"[" * 50_000, "structure cannot be read"),
        ("spec", b'{"backbone": "toy"}', "structure cannot be read"),
        ("fingerprint", b"0" * 64, "spec does not match its fingerprint"),
        ("provenance", b"[1]", "structure cannot be read|provenance"),
        ("provenance", b"\xff", "structure cannot be read"),
    ],
)
def test_an_attribute_no_store_has_is_refused(toy_store: Path, name: str, text: bytes, words: str) -> None:
    def change(file: h5py.File) -> None:
        file.attrs.create(name, np.bytes_(text), dtype=h5py.string_dtype("utf-8", len(text)))

    edit_store(toy_store, change)
    with pytest.raises((NotAStore, DamagedStore), match=words) as caught:
        FeatureStore.open(toy_store)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("views", "words"),
    [(10**9, "at most 1,000 views"), (1000, "has not 2 nodes of every view"), (3, "no dataset|/features")],
)
def test_views_that_a_file_cannot_have_are_not_looked_for(toy_store: Path, views: int, words: str) -> None:
    """Trap: a name made for each of a thousand million datasets takes all memory there is."""
    spec = toy_spec(views=2).to_json().replace('"views":2', f'"views":{views}')
    digest = hashlib.sha256(spec.encode()).hexdigest()

    def change(file: h5py.File) -> None:
        for name, text in (("spec", spec), ("fingerprint", digest)):
            file.attrs.create(name, np.bytes_(text), dtype=h5py.string_dtype("utf-8", len(text)))

    edit_store(toy_store, change)
    begun = time.monotonic()
    with pytest.raises((NotAStore, DamagedStore), match=words):
        FeatureStore.open(toy_store)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("value", ["of any length", np.arange(4), np.zeros(3, "S9"), h5py.Empty("S3"), 1.5])
def test_an_attribute_that_is_not_fixed_text_is_refused(toy_store: Path, value: Any) -> None:
    edit_store(toy_store, lambda file: file.attrs.__setitem__("spec", value))
    with pytest.raises((NotAStore, DamagedStore), match="not fixed-length text|shape or size|structure"):
        FeatureStore.open(toy_store)


@pytest.mark.parametrize("rows", [0, -1, 1 << 40, 1.5])
def test_blocks_of_an_impossible_size_are_refused(toy_store: Path, rows: Any) -> None:
    edit_store(toy_store, lambda file: file.attrs.__setitem__("block-rows", rows))
    with pytest.raises((NotAStore, DamagedStore), match="structure cannot be read|/blocks has shape"):
        FeatureStore.open(toy_store)


def test_a_file_of_a_few_kilobytes_cannot_claim_terabytes(tmp_path: Path) -> None:
    small = make_toy_store(tmp_path / "s.h5", n=1)

    def inflate(file: h5py.File) -> None:
        n = 1 << 40
        for name in ("labels", "splits", "ids", "row_status", "sources", "blocks"):
            lengthened(name, n)(file)
        for key, width in (("penultimate", 3), ("stem:max", 2)):
            del file["features"][key]
            file["features"].create_dataset(key, shape=(n, width), dtype="<f4")

    edit_store(small, inflate)
    assert small.stat().st_size < 20_000
    with pytest.raises(NotAStore, match="within the file|has shape"):
        FeatureStore.open(small)


def test_more_in_the_file_than_a_store_has_is_not_followed(toy_store: Path, tmp_path: Path) -> None:
    """Groups that contain each other, scales, references and links beside the datasets stay unread."""
    expected = FeatureStore.open(toy_store).features().X.copy()
    os.mkfifo(tmp_path / "pipe")

    def add(file: h5py.File) -> None:
        file["features/loop"] = file["/"]
        file["loop"] = file["/features"]
        file["elsewhere"] = h5py.ExternalLink(str(tmp_path / "pipe"), "/x")
        file["splits"].make_scale("scale")
        file["labels"].dims[0].attach_scale(file["splits"])
        file.attrs["reference"] = file["labels"].ref

    edit_store(toy_store, add)
    try:
        served = FeatureStore.open(toy_store).features().X
    except FeatcacheError as error:
        assert "\n" not in str(error)  # noqa: PT017  # a stricter reader may refuse all of it
    else:
        np.testing.assert_array_equal(served, expected)


def test_whatever_is_added_afterwards_breaks_the_seal(toy_store: Path) -> None:
    with h5py.File(toy_store, "r+") as file:
        file.attrs["note"] = "harmless"
    with pytest.raises((NotAStore, DamagedStore), match="seal|structure"):
        FeatureStore.open(toy_store)


# Files of another kind, and what is no file.


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's whole path may not be longer than 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": make_fifo,
    "a socket": make_socket,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "the empty device": lambda path: path.symlink_to("/dev/null"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "an empty file": Path.touch,
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    NO_FILES[kind](path)
    words = "not a regular file|cannot be opened|cannot be read|is not an? |neither"
    with pytest.raises(NotAStore, match=words):
        FeatureStore.open(path)
    with pytest.raises(ModelError, match=words):
        Model.load(path)
    with pytest.raises((NotAStore, ModelError), match=words):
        info(path)


def test_a_file_without_permission_says_so(toy_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.open

    def refuse(path: Any, *more: Any, **named: Any) -> int:  # as for everybody but root, who reads every file
        if Path(path) == toy_store:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return plain(path, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    for opening in (FeatureStore.open, Model.load, info):
        with pytest.raises(FeatcacheError, match="Permission denied"):
            opening(toy_store)


class Planted:
    """Would leave a file behind if anything unpickled it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("planted"),))


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Planted()))


def write_torch(path: Path) -> None:
    torch.save({"it": Planted()}, path)


def write_npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([Planted()], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("write", [write_pickle, write_torch, write_npy])
@pytest.mark.parametrize("name", ["m.safetensors", "m.h5", "m.model", "m.pt"])
def test_a_pickle_under_any_name_is_refused_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    with pytest.raises(ModelError, match="pickles are never opened"):
        Model.load(name)
    with pytest.raises(NotAStore, match="not an HDF5 file; a store is made by `featcache embed"):
        FeatureStore.open(name)
    with pytest.raises(ModelError, match="neither a feature store"):
        info(name)
    assert not (tmp_path / "planted").exists()


def save_model(path: Path, head: str = "ncm", **options: Any) -> Path:
    fit_features(gaussian_features(**options), Wishes(head=head), provenance=PROVENANCE)[1].save(path)
    return path


def test_a_store_in_place_of_a_model_and_a_model_in_place_of_a_store(tmp_path: Path) -> None:
    store, model = make_toy_store(tmp_path / "s.h5", n=4), save_model(tmp_path / "m.model")
    with pytest.raises(ModelError, match="is a feature store, not a model.*featcache fit"):
        Model.load(store)
    with pytest.raises(NotAStore, match="is a model, not a feature store; `featcache info"):
        FeatureStore.open(model)


def test_a_head_made_for_other_features_or_classes_is_refused(tmp_path: Path) -> None:
    path, other = save_model(tmp_path / "m.model"), save_model(tmp_path / "o.model", d=4)
    metadata, _ = model_parts(path.read_bytes())
    path.write_bytes(forge_model(model_parts(other.read_bytes())[1], metadata))
    with pytest.raises(
        ModelError, match=r"coef has shape \(3, 4\), but 3 classes of 5 features need \(3, 5\)"
    ):
        Model.load(path)
    save_model(other, k=4)
    path.write_bytes(forge_model(model_parts(other.read_bytes())[1], metadata))
    with pytest.raises(ModelError, match=r"coef has shape \(4, 5\), but 3 classes of 5 features"):
        Model.load(path)


def test_code_that_a_model_names_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planted_code.py").write_text("raise SystemExit('the code of a model file was run')")
    path = save_model(tmp_path / "m.model")
    metadata, arrays = model_parts(path.read_bytes())
    about = json.loads(metadata["model"])
    about["provenance"]["request"]["backbone"] = "planted_code:make"
    path.write_bytes(forge_model(arrays, {**metadata, "model": json.dumps(about)}))
    (tmp_path / "a.png").touch()
    with pytest.raises(ModelError, match="not trusted to name code.*--backbone planted_code:make"):
        predict(path, [tmp_path / "a.png"])
    info(path)


def test_code_that_a_store_names_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planted_code.py").write_text("raise SystemExit('the code of a store was run')")
    path = write_store(tmp_path / "s.h5", gaussian_features())
    text = json.dumps({**PROVENANCE, "request": {**PROVENANCE["request"], "backbone": "planted_code:make"}})
    edit_store(
        path,
        lambda f: f.attrs.create(
            "provenance", np.bytes_(text.encode()), dtype=h5py.string_dtype("utf-8", len(text))
        ),
    )
    with pytest.raises(FeatcacheError, match="not trusted to name code.*planted_code:make"):
        verify(path, recompute=2, data=tmp_path)


# A store is data: where its ids lead is not for it to decide.


@pytest.mark.parametrize(
    "name", ["{outside}", "../outside.png", "a/../../outside.png", "a\0b.png", "a\\b.png"]
)
def test_ids_that_lead_out_of_the_folder_are_not_followed(tmp_path: Path, name: str) -> None:
    outside, data = tmp_path / "outside.png", tmp_path / "data"
    outside.write_bytes(b"a secret")
    data.mkdir()
    path = tmp_path / "s.h5"
    record = ImageRecord(path=name.format(outside=outside), stat=NO_FILE)
    table = RowTable.from_records((record,), ())
    create_store(path, spec=toy_spec(), table=table, provenance=PROVENANCE, block_rows=4)
    write_toy_blocks(path)
    rng = np.random.default_rng(0)
    with h5py.File(path) as file:
        assert file["ids"].shape == (1,)
    forge_sources(path, rng.bytes(32))
    opened: list[Any] = []
    opening = os.open

    def watch(file: Any, *arguments: Any, **options: Any) -> int:
        opened.append(os.path.realpath(os.fsdecode(file)))
        return opening(file, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", watch)
        with pytest.raises(FeatcacheError, match="its image is not read"):
            verify(path, sources=True, data=data)
    assert str(outside) not in opened


def forge_sources(path: Path, sha256: bytes) -> None:
    """Give every row this sha256, under right checksums."""
    from featcache.records import RowStatus
    from featcache.store.layout import SOURCE_DTYPE
    from featcache.store.writer import StoreWriter

    store = FeatureStore.open(path)
    sources = np.zeros(len(store), SOURCE_DTYPE)
    sources["sha256"] = np.frombuffer(sha256, np.uint8)
    with StoreWriter(store.layout) as writer:
        writer.write_block(
            0,
            features={key: np.array(store.map(key)) for key in store.layout.features},
            row_status=np.full(len(store), RowStatus.OK, dtype=np.uint8),
            sources=sources,
        )


def test_a_few_hundred_forged_files_neither_crash_nor_hang_nor_deceive() -> None:
    """Briefly what `scripts/fault_mutants.py` does for long; in a process of its own, for it forks."""
    script = Path(__file__).parent.parent / "scripts" / "fault_mutants.py"
    command = [sys.executable, str(script), "--rounds", str(MUTANTS), "--seed", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{MUTANTS} mutants, 0 violations" in ran.stdout
