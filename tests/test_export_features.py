"""`export --to features`: the vectors of a store for other tools, read back and equal, or no file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from conftest import make_toy_store, toy_spec
from gaussians import gaussian_features, write_store
from test_export import full_disk, photos_in
from test_predict import TOY

import featcache.exporting.features
from featcache.commands.embed import embed
from featcache.commands.export import export
from featcache.errors import DataError, DiskError, ExportError, IncompleteStore
from featcache.spec import FeatureSpec
from featcache.store.reader import FeatureStore


def npz_columns(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as found:
        return dict(found)


def parquet_columns(path: Path) -> dict[str, Any]:
    """The columns of a Parquet file as those of a .npz are."""
    table = parquet.read_table(path)
    classes = json.loads(table.schema.metadata[b"classes"])
    assert [classes[code] if code >= 0 else None for code in table["y"].to_pylist()] == table[
        "label"
    ].to_pylist()
    small = {
        "y": np.array(table["y"]),
        "ids": np.array(table["id"].to_pylist()),
        "classes": np.array(classes),
        "splits": np.array([split or "" for split in table["split"].to_pylist()]),
        "sha256": np.array([list(digest) for digest in table["sha256"].to_pylist()], dtype=np.uint8),
        "spec": np.array(table.schema.metadata[b"spec"].decode()),
    }
    vectors = {
        name: np.array(table[name].to_pylist(), dtype=np.float32)
        for name in table.column_names
        if ":" in name
    }
    return {**small, **vectors}


READERS: Sequence[tuple[str, Callable[[Path], dict[str, Any]]]] = (
    (".npz", npz_columns),
    (".parquet", parquet_columns),
)


@pytest.mark.parametrize(("suffix", "read"), READERS)
def test_features_are_those_of_the_store(
    tmp_path: Path, suffix: str, read: Callable[[Path], dict[str, Any]]
) -> None:
    features = gaussian_features({"train": 30, "test": 12, "": 3})
    features.y[4] = 1
    result = export(write_store(tmp_path / "s.h5", features), tmp_path / f"x{suffix}", to="features")
    assert result.rows == 45
    found = read(tmp_path / f"x{suffix}")
    assert set(found) == {"X:penultimate", "y", "ids", "classes", "splits", "sha256", "spec"}
    np.testing.assert_array_equal(found["X:penultimate"], features.X)
    np.testing.assert_array_equal(found["y"], features.y)
    np.testing.assert_array_equal(found["sha256"], features.sha256)
    assert found["ids"].tolist() == list(features.ids)
    assert found["classes"].tolist() == list(features.classes)
    assert found["splits"].tolist() == features.splits.tolist()
    assert FeatureSpec.from_json(str(found["spec"])) == features.spec


@pytest.mark.parametrize(("suffix", "read"), READERS)
def test_rows_that_failed_are_left_out_and_views_are_columns(
    tmp_path: Path,
    suffix: str,
    read: Callable[[Path], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("featcache.exporting.features._BLOCK_VALUES", 30)  # blocks of 5 rows
    photos = photos_in(tmp_path, 14)
    (photos / "red" / "03.png").write_bytes(b"no picture")
    embed(photos, tmp_path / "s.h5", backbone=TOY, views=2, max_failures=1.0)
    assert export(tmp_path / "s.h5", tmp_path / f"x{suffix}", to="features").rows == 13
    found = read(tmp_path / f"x{suffix}")
    store = FeatureStore.open(tmp_path / "s.h5")
    for view, column in enumerate(("X:penultimate", "X:penultimate@1")):
        expected = store.features(view=view)
        assert found["ids"].tolist() == list(expected.ids)
        np.testing.assert_array_equal(found[column], expected.X)


@pytest.mark.parametrize(("suffix", "name"), [(".npz", "_differing_npz"), (".parquet", "_differing_parquet")])
def test_features_that_are_read_back_otherwise_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, name: str
) -> None:
    store = write_store(tmp_path / "s.h5", gaussian_features())
    path = tmp_path / f"x{suffix}"
    true, calls = featcache.exporting.features.Table.vectors, []

    def once_otherwise(self: Any, column: str, rows: slice = slice(None)) -> Any:
        calls.append(column)
        return true(self, column, rows) + (len(calls) == 1)

    monkeypatch.setattr("featcache.exporting.features.Table.vectors", once_otherwise)
    with pytest.raises(ExportError, match="X:penultimate read from it are not the store's"):
        export(store, path, to="features")
    assert [file.name for file in tmp_path.iterdir()] == ["s.h5"]


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path, suffix: str) -> None:
    store, path = write_store(tmp_path / "s.h5", gaussian_features()), tmp_path / f"x{suffix}"
    export(store, path, to="features")
    former = path.read_bytes()
    with (
        full_disk(),
        pytest.raises(DiskError, match=r"writing \S+ failed: File too large\. .*another --output"),
    ):
        export(store, path, to="features")
    assert {file.name for file in tmp_path.iterdir()} == {"s.h5", path.name}
    assert path.read_bytes() == former


def own_tables(folder: Path, suffix: str) -> list[bytes]:
    """Files of the user's own: one with other columns, and an export with one more."""
    path, exported = folder / f"own{suffix}", folder / f"exported{suffix}"
    export(write_store(folder / "own.h5", gaussian_features()), exported, to="features")
    found: list[bytes] = []
    for more in (False, True):
        if suffix == ".npz":
            np.savez(path, mine=np.zeros(3), **(npz_columns(exported) if more else {}))
        else:
            table = parquet.read_table(exported)
            mine = table.append_column("mine", table["id"])
            parquet.write_table(mine if more else table.select(["id", "y"]), path)
        found.append(path.read_bytes())
    return found


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_only_an_export_is_replaced(tmp_path: Path, suffix: str) -> None:
    store, path = write_store(tmp_path / "s.h5", gaussian_features()), tmp_path / f"x{suffix}"
    for own in (b"my notes", b"PK\x03\x04", b"PAR1", *own_tables(tmp_path, suffix)):
        path.write_bytes(own)
        with pytest.raises(
            DataError, match=rf"is no \{suffix} export of .*would be replaced. Choose another --output"
        ):
            export(store, path, to="features")
        assert path.read_bytes() == own
    path.write_bytes(b"")
    for _ in range(2):
        assert export(store, path, to="features").rows == len(gaussian_features().y)


def test_a_store_in_progress_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompleteStore, match="rows are pending"):
        export(make_toy_store(tmp_path / "s.h5", n=10, fill=False, spec=toy_spec()), to="features")
