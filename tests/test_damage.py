"""Damage at rest: whatever chance changes in a store is found, in the right rows, and not served."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import make_toy_store, write_toy_blocks
from faults.damage import KINDS, Damaged, Truth, choose_change, find_fault, make_versions, parts_of

from featcache.errors import DamagedStore
from featcache.store import reader
from featcache.store.blocks import BlockCheck, BlockState
from featcache.store.opening import read_layout
from featcache.store.reader import FeatureStore

ROUNDS = 24  # of every kind in a run of the tests; `scripts/fault_damage.py` makes thousands


@dataclass(frozen=True)
class Bench:
    """A store to damage, and what is true of it."""

    path: Path
    truth: Truth
    parts: dict[str, list[range]]

    def faults(self, kind: str, *, seeds: range, within: tuple[str, ...] = ()) -> list[str]:
        """What featcache gets wrong in a round of this kind a seed, the parts in turn."""
        found, names = [], within or tuple(self.parts)
        for seed in seeds:
            rng, part = random.Random(f"{kind}{seed}"), names[seed % len(names)]
            change = choose_change(rng, self.parts[part], kind, self.truth.versions)
            if change is None:
                continue
            with Damaged(self.path, change, self.truth.versions.now):
                fault = find_fault(self.path, self.truth, change)
            if fault is not None:
                found.append(f"seed {seed}, {part} at {change.offset}: {fault}")
        return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    path = tmp_path_factory.mktemp("damage") / "store.h5"
    versions = make_versions(path)
    return Bench(path, Truth.of(path, versions), parts_of(path, versions.now))


@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_every_kind_in_every_part_is_found_and_not_served(bench: Bench, kind: str) -> None:
    assert bench.faults(kind, seeds=range(ROUNDS)) == []
    assert bench.path.read_bytes() == bench.truth.versions.now


def test_every_byte_of_the_file_belongs_to_a_part(bench: Bench) -> None:
    size = len(bench.truth.versions.now)
    assert sum(len(place) for places in bench.parts.values() for place in places) == size
    assert {"superblock", "metadata", "gaps", "features/stem:max", "ids", "seal"} <= bench.parts.keys()


@pytest.mark.parametrize(
    "part", ["superblock", "metadata", "gaps", "labels", "splits", "ids", "classes", "seal"]
)
def test_one_flipped_bit_anywhere_but_in_rows_is_refused_as_such(bench: Bench, part: str) -> None:
    assert bench.faults("one bit", seeds=range(40), within=(part,)) == []


@pytest.mark.parametrize("check", ["has_sound_columns", "has_sound_features"])
def test_a_reader_without_a_check_is_caught(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    """The rounds above can fail: they find a reader that takes rows for sound without looking."""
    monkeypatch.setattr(BlockCheck, check, lambda *_: True)
    parts = ("features/penultimate",) if check == "has_sound_features" else ("row_status", "sources")
    faults = bench.faults("one bit", seeds=range(5), within=parts)
    assert len(faults) == 5
    assert all("not detected" in fault for fault in faults)


def test_a_reader_without_a_seal_is_caught(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed = bench.truth.versions.now[bench.parts["seal"][0].start :][:64].decode()
    monkeypatch.setattr("featcache.store.opening.compute_seal", lambda *_: sealed)
    assert bench.faults("one bit", seeds=range(5), within=("ids",))
    assert len(bench.faults("one bit", seeds=range(5), within=("gaps",))) == 5


def test_a_reader_that_serves_damaged_rows_is_caught(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader.FeatureStore, "inspect", lambda self: BlockCheck(self.layout).states())
    faults = bench.faults("one bit", seeds=range(8), within=("features/penultimate", "features/stem:max"))
    assert any("other rows" in fault for fault in faults)


def test_the_bytes_of_rows_still_to_come_are_nobodys(tmp_path: Path) -> None:
    """A store in progress: what lies in pending rows is not damage, what lies in the others is."""
    path = make_toy_store(tmp_path / "s.h5", n=10, fill=False)
    write_toy_blocks(path, range(1, 2))
    region = read_layout(path).features["penultimate"]
    with path.open("r+b") as file:
        file.seek(region.offset)
        file.write(b"\xff" * 4 * region.row_bytes)
    np.testing.assert_array_equal(
        FeatureStore.open(path).features(partial=True).X, np.arange(4, 8)[:, None] + np.arange(3)
    )
    with path.open("r+b") as file:
        file.seek(region.offset + 7 * region.row_bytes)
        file.write(b"\xff")
    with pytest.raises(DamagedStore, match="rows 4-7 do not match"):
        FeatureStore.open(path)


def test_a_part_of_another_store_is_not_taken_for_its_own(tmp_path: Path) -> None:
    """The same images under other features: every page of it is refused in place of ours."""
    path, other = tmp_path / "s.h5", tmp_path / "other.h5"
    now = make_versions(path).now
    make_versions(other)
    theirs = other.read_bytes()
    assert len(theirs) == len(now)
    differing = [at for at in range(0, len(now), 4096) if now[at : at + 4096] != theirs[at : at + 4096]]
    assert differing
    for at in differing:
        path.write_bytes(now[:at] + theirs[at : at + 4096] + now[at + 4096 :])
        with pytest.raises(DamagedStore):
            FeatureStore.open(path)


def test_the_order_of_blocks_cannot_change(bench: Bench, tmp_path: Path) -> None:
    """Two whole blocks exchanged, records included: each record says which rows it is of."""
    path = shutil.copy(bench.path, tmp_path / "s.h5")
    layout = read_layout(path)
    data = bytearray(path.read_bytes())
    for region in (*layout.features.values(), layout.row_status, layout.sources, layout.blocks):
        array = np.frombuffer(data, np.uint8, region.row_bytes * region.shape[0], region.offset)
        per_block = array.reshape(layout.n_blocks, -1)
        per_block[[3, 7]] = per_block[[7, 3]]
    path.write_bytes(data)
    states = FeatureStore.open(path, check=False).inspect()
    damaged = [i for i, state in enumerate(states) if state is not BlockState.DONE]
    assert damaged == [3, 7]
