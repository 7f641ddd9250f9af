"""`merge`: stores joined by the ids of their images; what does not agree is refused, naming it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gaussians import PROVENANCE, gaussian_features, take, write_store

from featcache.cli import main
from featcache.commands.embed import embed
from featcache.commands.fit import fit
from featcache.commands.merge import MergeResult, merge
from featcache.commands.verify import verify
from featcache.errors import DamagedStore, IncompleteStore, NotAStore, SpecMismatch, StoreError, StoreLocked
from featcache.records import NO_FILE, ImageRecord, RowStatus
from featcache.sharding import Shard
from featcache.spec import FeatureNode, FeatureSpec, Preprocessing
from featcache.store.creating import create_store
from featcache.store.files import StoreFiles
from featcache.store.layout import SOURCE_DTYPE, RowTable
from featcache.store.lock import write_lock
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter

TOY = "channel_mean:channel_mean"
SPEC = FeatureSpec(
    backbone="toy",
    weights_sha256="0" * 64,
    nodes=(FeatureNode(name="penultimate", num_features=2), FeatureNode(name="stem", num_features=3)),
    preprocessing=Preprocessing(resize_size=8, crop_size=8),
)
OK, MISSING = RowStatus.OK, RowStatus.MISSING


class Row:
    """An image's row: `sha` stands for its bytes, 0 for none read; its features are `value` everywhere."""

    def __init__(
        self, sha: int, *, value: float = 0.0, status: RowStatus = OK, label: str | None = "a",
        split: str | None = None,
    ) -> None:  # fmt: skip
        self.sha, self.value, self.status, self.label, self.split = (
            sha,
            value or float(sha),
            status,
            label,
            split,
        )


def make(
    path: Path, rows: Mapping[str, Row], *, spec: FeatureSpec = SPEC, fill: bool = True, **recorded: object
) -> Path:
    """A store of these rows in blocks of two."""
    records = tuple(
        ImageRecord(path=p, stat=NO_FILE, label=r.label, split=r.split) for p, r in sorted(rows.items())
    )
    classes = tuple(sorted({row.label for row in rows.values() if row.label}))
    table = RowTable.from_records(records, classes)
    create_store(path, spec=spec, table=table, provenance={**PROVENANCE, **recorded}, block_rows=2)
    store = FeatureStore.open(path, check=False)
    with StoreWriter(store.layout) as writer:
        for block in range(store.layout.n_blocks if fill else 0):
            inside = [row for _, row in sorted(rows.items())][store.layout.rows_of(block)]
            sources = np.zeros(len(inside), SOURCE_DTYPE)
            sources["sha256"][:, 0] = [row.sha for row in inside]
            values = np.array([[row.value if row.status == OK else np.nan] for row in inside])
            writer.write_block(
                block,
                features={
                    key: np.repeat(values, region.shape[1], axis=1).astype(region.dtype)
                    for key, region in store.layout.features.items()
                },
                row_status=np.array([row.status for row in inside], dtype=np.uint8),
                sources=sources,
            )
    return path


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return make(tmp_path / "a.h5", {"x/1": Row(1), "z/3": Row(3), "z/5": Row(5, label="c")})


@pytest.fixture
def b(tmp_path: Path) -> Path:
    return make(tmp_path / "b.h5", {"x/2": Row(2, label="b"), "z/4": Row(4, label=None, split="test")})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.h5"


def contents(path: Path) -> dict[str, tuple[float, str, str]]:
    """{id: (value, label, split)} of all rows with features, each node checked to say the same."""
    store = FeatureStore.open(path)
    both = [store.features(node.key) for node in store.spec.nodes]
    assert both[0].X[:, 0].tolist() == both[1].X[:, -1].tolist()
    features = both[0]
    labels = ["" if label < 0 else features.classes[label] for label in features.y]
    return {
        path: (float(value), label, str(split))
        for path, value, label, split in zip(
            features.ids, features.X[:, 1], labels, features.splits, strict=True
        )
    }


def test_rows_are_joined_by_id_with_their_labels_and_splits(a: Path, b: Path, out: Path) -> None:
    result = merge([b, a], out)
    assert contents(out) == {
        "x/1": (1, "a", ""),
        "x/2": (2, "b", ""),
        "z/3": (3, "a", ""),
        "z/4": (4, "", "test"),
        "z/5": (5, "c", ""),
    }
    assert (result.rows, result.stores, result.shared, result.failed, result.written) == (5, 2, 0, 0, True)
    assert "5 rows of 2 stores" in result.describe()
    made = FeatureStore.open(out)
    assert made.table.ids == tuple(sorted(made.table.ids))
    assert made.classes == ("a", "b", "c")
    assert made.provenance["merged"] == [FeatureStore.open(path).layout.uuid for path in (b, a)]
    assert verify(out).sound


def test_the_order_of_the_stores_does_not_matter(a: Path, b: Path, tmp_path: Path) -> None:
    merge([a, b], tmp_path / "ab.h5")
    merge([b, a], tmp_path / "ba.h5")
    assert contents(tmp_path / "ab.h5") == contents(tmp_path / "ba.h5")


def test_an_image_in_several_stores_is_taken_once_and_where_it_has_features(
    tmp_path: Path, out: Path
) -> None:
    failed = make(
        tmp_path / "f.h5", {"1": Row(0, status=MISSING), "2": Row(2, value=20), "3": Row(0, status=MISSING)}
    )
    good = make(tmp_path / "g.h5", {"1": Row(1), "2": Row(2, value=21), "4": Row(4)})
    result = merge([failed, good, failed], out)
    assert {path: value for path, (value, *_) in contents(out).items()} == {"1": 1, "2": 20, "4": 4}
    assert FeatureStore.open(out).failed_rows() == [("3", MISSING)]
    assert (result.stores, result.shared, result.failed) == (2, 2, 1)
    assert "2 of them in more than one, 1 without features" in result.describe()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Row(9), r"z/3 has the sha256 0300\w+ in \S+a.h5 and 0900\w+ in \S+other.h5"),
        (Row(9, status=RowStatus.UNDECODABLE), "z/3 has the sha256"),
        (Row(3, label="dog"), r"z/3 has the label a in \S+a.h5 and dog in \S+other.h5"),
        (Row(3, label=None), "z/3 has the label a in .* and none in"),
        (Row(3, split="val"), "z/3 has the split none in .* and val in"),
        (Row(0, status=MISSING, label="dog"), "z/3 has the label"),
    ],
)
def test_stores_that_disagree_on_an_image_are_refused(
    a: Path, out: Path, tmp_path: Path, other: Row, said: str
) -> None:
    with pytest.raises(StoreError, match=said):
        merge([a, make(tmp_path / "other.h5", {"z/3": other})], out)
    assert not out.exists()


def test_an_image_that_changed_while_it_was_read_says_nothing_of_its_bytes(
    a: Path, out: Path, tmp_path: Path
) -> None:
    other = make(tmp_path / "other.h5", {"z/3": Row(9, status=RowStatus.CHANGED)})
    merge([other, a], out)
    assert contents(out)["z/3"][0] == 3


def test_another_spec_is_refused_naming_the_field(a: Path, out: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other.h5", {"q": Row(1)}, spec=replace(SPEC, compute_dtype="bfloat16"))
    with pytest.raises(SpecMismatch, match=r"other.h5 holds other .* compute_dtype is bfloat16, not float32"):
        merge([a, other], out)


def test_an_unfinished_store_is_refused(a: Path, out: Path, tmp_path: Path) -> None:
    with pytest.raises(IncompleteStore, match=r"half.h5 is not complete: 1 of 1 rows .* Run the .*embed"):
        merge([a, make(tmp_path / "half.h5", {"q": Row(1)}, fill=False)], out)


def test_damage_and_other_files_are_refused(a: Path, b: Path, out: Path, tmp_path: Path) -> None:
    with pytest.raises(NotAStore, match="cannot be opened"):
        merge([a, tmp_path / "none.h5"], out)
    with open(b, "r+b") as file:
        file.seek(FeatureStore.open(b).layout.features["stem"].offset)
        file.write(b"\x01")
    with pytest.raises(DamagedStore, match="rows 0-1 do not match"):
        merge([a, b], out)
    assert not out.exists()


# --- shards


def shards(
    tmp_path: Path, ids: list[str], count: int, elsewhere: Mapping[int, int] | None = None
) -> list[Path]:
    made = []
    for index in range(count):
        shard = Shard(index=index, count=count)
        rows = {path: Row(i + 1) for i, path in enumerate(ids) if shard.owns(path)}
        record = shard.record(elsewhere=(elsewhere or {}).get(index, 0))
        made.append(make(tmp_path / f"{index}-of-{count}.h5", rows, **record))
    return made


def test_all_shards_of_a_run_make_a_store_that_is_none(tmp_path: Path, out: Path) -> None:
    ids = [f"{i:02d}" for i in range(20)]
    merge(shards(tmp_path, ids, 3), out)
    assert [int(value) for value, *_ in contents(out).values()] == list(range(1, 21))
    assert "shard" not in FeatureStore.open(out).provenance


def test_a_missing_shard_is_named(tmp_path: Path, out: Path) -> None:
    made = shards(tmp_path, [f"{i:02d}" for i in range(20)], 4)
    with pytest.raises(StoreError, match="2 of 4 shards are missing: 0/4, 2/4. Name them too"):
        merge([made[1], made[3]], out)


def test_a_shard_without_images_counts(tmp_path: Path, out: Path) -> None:
    assert merge(shards(tmp_path, ["only"], 3), out).rows == 1


def test_shards_of_what_a_store_lacked_need_that_store(tmp_path: Path, out: Path) -> None:
    ids = [f"{i:02d}" for i in range(20)]
    owned = [
        sum(Shard(index=index, count=2).owns(path) for path in ("old1", "old2", "old3")) for index in (0, 1)
    ]
    made = shards(tmp_path, ids, 2, elsewhere=dict(enumerate(owned)))
    with pytest.raises(StoreError, match=r"left \d rows? in other stores .* Name the store"):
        merge(made, out)
    old = make(tmp_path / "old.h5", {f"old{i}": Row(100 + i) for i in (1, 2, 3)})
    assert merge([old, *made], out).rows == 23


def test_shards_of_real_ranks_on_separate_disks(tmp_path: Path, save_image: Callable[..., Path]) -> None:
    """Each rank sees a copy of the images, with other times and inodes, and no other rank."""
    for i in range(12):
        for disk in ("disk0", "disk1"):
            save_image(tmp_path / disk / "photos" / f"class{i % 2}" / f"{i}.png", seed=i)
    parts = []
    for index in (0, 1):
        disk = tmp_path / f"disk{index}"
        said = embed(disk / "photos", disk / "s.h5", backbone=TOY, shard=Shard(index=index, count=2))
        parts.append(Path(said.store))
    out, single = tmp_path / "out.h5", tmp_path / "single.h5"
    merge(parts, out)
    embed(tmp_path / "disk0" / "photos", single, backbone=TOY)
    merged, alone = FeatureStore.open(out), FeatureStore.open(single)
    assert merged.map().tobytes() == alone.map().tobytes()
    assert merged.table.equals(alone.table)
    assert merged.provenance["data"] == {}  # they were in two places
    again = embed(tmp_path / "disk1" / "photos", out, backbone=TOY)
    assert (again.embedded, again.reused) == (0, 12)


def test_where_the_images_are_is_kept_if_all_stores_say_the_same(tmp_path: Path, out: Path) -> None:
    where = {"path": "/photos", "root": None, "follow_links": False}
    merge([make(tmp_path / f"{i}.h5", {str(i): Row(i + 1)}, data=where) for i in range(2)], out)
    assert FeatureStore.open(out).provenance["data"] == where


# --- an output that is there


def test_the_same_again_writes_nothing(a: Path, b: Path, out: Path) -> None:
    merge([a, b], out)
    before = out.stat()
    again = merge([a, b], out)
    assert not again.written
    assert "has them already" in again.describe()
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_store_can_take_the_others_in(a: Path, b: Path) -> None:
    result = merge([a, b], a)
    assert (result.rows, result.written) == (5, True)
    assert len(contents(a)) == 5
    assert not merge([a, b], a).written
    assert sorted(path.name for path in a.parent.iterdir()) == ["a.h5", "b.h5"]


def test_an_output_with_other_rows_is_not_replaced(a: Path, b: Path, out: Path) -> None:
    make(out, {"precious": Row(7)})
    with pytest.raises(StoreError, match=r"out.h5 exists, and is neither one of the stores .* --output"):
        merge([a, b], out)
    assert list(contents(out)) == ["precious"]


def test_an_output_that_is_being_written_is_refused(a: Path, b: Path, out: Path) -> None:
    with write_lock(out), pytest.raises(StoreLocked):
        merge([a, b], out)


@pytest.mark.parametrize("into_one_of_them", [False, True])
def test_a_killed_merge_is_gone_on_with(
    a: Path, b: Path, out: Path, monkeypatch: pytest.MonkeyPatch, into_one_of_them: bool
) -> None:
    out = a if into_one_of_them else out
    write_block, written = StoreWriter.write_block, []

    def stop_at_the_second(self: StoreWriter, block: int, **columns: object) -> None:
        if len(written) == stop_after:
            raise KeyboardInterrupt
        written.append(block)
        write_block(self, block, **columns)  # type: ignore[arg-type]

    monkeypatch.setattr("featcache.embedding.BLOCK_ROWS", 2)
    monkeypatch.setattr(StoreWriter, "write_block", stop_at_the_second)
    stop_after = 1
    with pytest.raises(KeyboardInterrupt):
        merge([a, b], out)
    stop_after = -1
    assert merge([a, b], out).written
    assert len(written) == len(set(written)) == FeatureStore.open(out).layout.n_blocks
    assert len(contents(out)) == 5
    assert StoreFiles.at(out).growths == []


# --- the command line


def run(*arguments: str | Path) -> tuple[int, str, str]:
    ran = CliRunner().invoke(main, ["merge", *map(str, arguments)])
    return ran.exit_code, ran.stdout, ran.stderr


def test_the_command_prints_one_json_document(a: Path, b: Path, out: Path) -> None:
    code, said, _ = run(a, b, "-o", out, "--json")
    assert code == 0
    assert json.loads(said).items() >= {"rows": 5, "stores": 2, "store": str(out), "written": True}.items()
    assert set(json.loads(said)) == set(MergeResult.__annotations__)


def test_rows_without_features_are_exit_code_3(tmp_path: Path, out: Path) -> None:
    failed = make(tmp_path / "f.h5", {"1": Row(0, status=MISSING), "2": Row(2)})
    assert run(failed, "-o", out)[0] == 3


def test_a_refusal_is_one_line(a: Path, tmp_path: Path, out: Path) -> None:
    code, said, error = run(a, make(tmp_path / "o.h5", {"z/3": Row(9)}), "-o", out)
    assert (code, said, len(error.splitlines())) == (1, "", 1)
    assert run("-o", out)[0] == 2


def test_torch_is_not_loaded(a: Path, b: Path, out: Path) -> None:
    code = (
        "import sys; from featcache.commands.merge import merge\n"
        "merge(sys.argv[1:3], sys.argv[3]); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code, a, b, out], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_a_merged_store_can_be_fitted(tmp_path: Path, out: Path) -> None:
    features = gaussian_features()
    half = len(features) // 2
    parts = [
        write_store(tmp_path / f"{i}.h5", take(features, rows))
        for i, rows in enumerate((slice(half), slice(half, None)))
    ]
    merge(parts, out)
    assert FeatureStore.open(out).features().X.tolist() == features.X.tolist()
    assert fit(out, head="ncm").metrics.accuracy > 0.9
