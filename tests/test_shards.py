"""Shards: each image is embedded once, whoever is killed, and the store is the one a single run makes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from featcache.cli import main
from featcache.commands.embed import EmbedResult, embed
from featcache.commands.verify import verify
from featcache.errors import DataError, SpecMismatch, StoreLocked
from featcache.sharding import Shard, processors_of_rank, remove_shards, shard_of_environment
from featcache.store.files import StoreFiles
from featcache.store.lock import write_lock
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter

TOY = "channel_mean:channel_mean"
KILLED = "killed_backbone:backbone"
MANY = 600  # images; so many that a third of them is several blocks
BATCH = 8


@pytest.fixture
def photos(save_images: Callable[..., Path]) -> Path:
    """24 images of two classes."""
    return save_images(24, lambda i: f"class{i % 2}/{i}.png")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store.h5"


@pytest.fixture
def single(photos: Path, tmp_path: Path) -> Path:
    """What one run makes of the photos."""
    embed(photos, tmp_path / "single.h5", backbone=TOY)
    return tmp_path / "single.h5"


def rank(photos: Path, store: Path, index: int, count: int, **options: object) -> EmbedResult:
    return embed(photos, store, backbone=TOY, shard=Shard(index=index, count=count), **options)  # type: ignore[arg-type]


def ranks(photos: Path, store: Path, count: int) -> list[EmbedResult]:
    return [rank(photos, store, index, count) for index in range(count)]


def left_beside(store: Path) -> list[str]:
    """The names of what is there besides the store: shards, growths, locks."""
    return sorted(path.name for path in store.parent.iterdir() if path.name.startswith(store.name + "."))


def assert_same(store: Path, expected: Path) -> None:
    """The same rows with the same bytes, and sound."""
    found, wanted = FeatureStore.open(store), FeatureStore.open(expected)
    assert found.table.equals(wanted.table)
    assert found.map().tobytes() == wanted.map().tobytes()
    assert found.row_status.tobytes() == wanted.row_status.tobytes()
    assert found.sources.tobytes() == wanted.sources.tobytes()
    assert verify(store).sound


@contextmanager
def stopped_at(monkeypatch: pytest.MonkeyPatch, method: str) -> Iterator[None]:
    """As if the process were killed where it calls this method of `StoreFiles`."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StoreFiles, method, stop)
        with pytest.raises(KeyboardInterrupt):
            yield


# --- which images


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_image_is_in_one_shard_by_the_sha256_of_its_id(count: int) -> None:
    ids = [f"class{i % 3}/é{i}.jpg" for i in range(300)]
    shards = [Shard(index=index, count=count) for index in range(count)]
    for path in ids:
        (owner,) = (shard.index for shard in shards if shard.owns(path))
        assert owner == int(hashlib.sha256(path.encode()).hexdigest()[:16], 16) % count
    sizes = Counter(shard.index for shard in shards for path in ids if shard.owns(path))
    assert min(sizes.values()) > 300 / count / 2


def test_a_shard_is_its_number_and_how_many_there_are() -> None:
    assert Shard.parse("2/8") == Shard(index=2, count=8)
    assert str(Shard.parse("0/1")) == "0/1"


@pytest.mark.parametrize(
    "text", ["8/8", "-1/8", "1", "1/", "/2", "1/0", "a/b", "1/2/3", "1.0/2", "0/99999999", "¹/2"]
)
def test_what_is_no_shard_is_wrong_usage(text: str, tmp_path: Path) -> None:
    ran = CliRunner().invoke(main, ["embed", str(tmp_path), "-o", str(tmp_path / "s.h5"), "--shard", text])
    assert ran.exit_code == 2
    assert "INDEX/COUNT, such as 2/8" in ran.stderr or "shards are 0/N to N-1/N" in ran.stderr


ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "10"}
TASKS = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({}, None),
        ({"RANK": "2", "WORLD_SIZE": "3"}, "2/3"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "3", "WORLD_SIZE": "3"}, None),
        ({"RANK": "2"}, None),
        ({"RANK": "", "WORLD_SIZE": "3"}, None),
        ({"RANK": "one", "WORLD_SIZE": "3"}, None),
        (ARRAY, "6/10"),
        ({**ARRAY, "SLURM_ARRAY_TASK_STEP": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, "2/4"),
        ({**ARRAY, "SLURM_ARRAY_TASK_STEP": "4"}, None),  # 1, 5, 9: there is no 7
        ({**ARRAY, "SLURM_ARRAY_TASK_COUNT": "3"}, None),  # 1, 7, 10: which of them is not said
        ({**ARRAY, "SLURM_ARRAY_TASK_MAX": "6"}, None),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "10"}, None),
        (TASKS, "3/4"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),  # a batch script: one process, before its steps
        ({"RANK": "5", "WORLD_SIZE": "8", **TASKS}, "5/8"),  # torchrun started by srun
        ({"RANK": "1", "WORLD_SIZE": "2", **ARRAY}, "13/20"),  # torchrun in each task of an array
    ],
)  # fmt: skip
def test_the_environment_says_which_shard_where_it_is_consistent(
    environment: Mapping[str, str], shard: str | None
) -> None:
    found = shard_of_environment(environment)
    assert (None if found is None else str(found)) == shard
    assert found is None or found.taken_from


def test_torchruns_ranks_on_one_machine_share_its_processors() -> None:
    assert processors_of_rank(8, {"LOCAL_WORLD_SIZE": "3"}) == 2
    assert processors_of_rank(2, {"LOCAL_WORLD_SIZE": "8"}) == 1
    assert processors_of_rank(8, {}) == 8


# --- ranks one after another, on one disk


def test_the_last_rank_joins_and_the_store_is_that_of_a_single_run(
    photos: Path, store: Path, single: Path
) -> None:
    first, second, third = ranks(photos, store, 3)
    assert "2 of 3 shards not complete: 1/3 (not begun), 2/3 (not begun)" in first.describe()
    assert "1 of 3 shards not complete: 2/3 (not begun)" in second.describe()
    assert first.store.endswith("store.h5.shard-0-of-3")
    assert first.rows + second.rows + third.embedded == 24
    assert (third.rows, third.reused, third.store) == (24, 24 - third.embedded, str(store))
    assert "3 shards joined into" in third.describe()
    assert_same(store, single)
    assert "shard" not in FeatureStore.open(store).provenance
    assert left_beside(store) == []


def test_a_rank_without_images_counts(tmp_path: Path, save_image: Callable[..., Path], store: Path) -> None:
    save_image(tmp_path / "photos" / "a" / "0.png")
    results = ranks(tmp_path / "photos", store, 4)
    assert sorted(result.embedded for result in results[:3]) in ([0, 0, 0], [0, 0, 1])
    assert (results[3].rows, FeatureStore.open(store).complete) == (1, True)
    assert "shard" not in FeatureStore.open(store).provenance  # made anew, not the one shard renamed
    assert left_beside(store) == []


def test_after_that_the_same_command_makes_nothing(photos: Path, store: Path) -> None:
    ranks(photos, store, 3)
    before = store.stat()
    for result in ranks(photos, store, 3):
        assert (result.rows, result.reused, result.store) == (24, 24, str(store))
        assert "nothing to embed: 24 files" in result.describe()
    assert (store.stat().st_ino, store.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert left_beside(store) == []


def test_only_new_images_are_embedded_beside_a_store(
    photos: Path, store: Path, save_image: Callable[..., Path], tmp_path: Path
) -> None:
    embed(photos, store, backbone=TOY)
    for i in range(8):
        save_image(photos / "class0" / f"new{i}.png", seed=100 + i)
    save_image(photos / "class1" / "1.png", seed=200)
    (photos / "class1" / "3.png").unlink()
    results = ranks(photos, store, 2)
    assert results[0].embedded + results[1].embedded == 9
    assert results[0].rows == results[0].embedded  # the others stay where they are
    assert results[0].removed + Shard(index=1, count=2).owns("class1/3.png") == 1
    assert results[1].removed == 1  # of the whole
    embed(photos, tmp_path / "again.h5", backbone=TOY)
    assert_same(store, tmp_path / "again.h5")


def test_a_dry_run_of_a_shard_writes_nothing(photos: Path, store: Path) -> None:
    planned = rank(photos, store, 0, 2, dry_run=True)
    assert planned.embedded == planned.rows == rank(photos, store, 0, 2).embedded
    assert "nothing was written" in planned.describe()
    left = left_beside(store)
    assert rank(photos, store, 1, 2, dry_run=True).embedded == 24 - planned.rows
    assert left_beside(store) == left == ["store.h5.shard-0-of-2"]


def test_another_number_of_ranks_goes_on(photos: Path, store: Path, single: Path) -> None:
    done = rank(photos, store, 0, 3).embedded + rank(photos, store, 2, 3).embedded
    results = ranks(photos, store, 2)
    assert results[0].embedded + results[1].embedded == 24 - done
    assert_same(store, single)
    assert left_beside(store) == []


def test_a_run_without_shards_takes_over_what_they_have(photos: Path, store: Path, single: Path) -> None:
    done = rank(photos, store, 0, 3).embedded
    result = embed(photos, store, backbone=TOY)
    assert (result.embedded, result.reused) == (24 - done, done)
    assert_same(store, single)
    assert left_beside(store) == []


def test_a_shard_that_is_being_written_is_left_to_its_rank(
    photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank(photos, store, 0, 2)
    shard = StoreFiles.at(store).shard(0, 2).output
    with write_lock(shard):
        embed(photos, store, backbone=TOY)
        assert shard.exists()
        monkeypatch.setattr("featcache.update.OWN_PATIENCE", 0.1)
        with pytest.raises(StoreLocked, match="shard-0-of-2 is being written"):
            rank(photos, store, 0, 2)
    assert left_beside(store) == ["store.h5.shard-0-of-2"]
    assert rank(photos, store, 0, 2).reused == 24
    assert left_beside(store) == []


def test_a_shard_that_was_left_behind_because_its_rank_looked_is_removed_by_it(
    photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank(photos, store, 0, 2)
    with write_lock(StoreFiles.at(store).shard(0, 2).output):
        assert rank(photos, store, 1, 2).store == str(store)
    assert left_beside(store) == ["store.h5.shard-0-of-2"]
    # It had looked at the store before the other rank made it.
    monkeypatch.setattr("featcache.update.holds_just", lambda *_: False)
    late = rank(photos, store, 0, 2)
    assert (late.rows, late.embedded, late.store) == (24, 0, str(store))
    assert left_beside(store) == []


def test_a_shard_that_has_become_another_since_it_was_read_is_kept(
    photos: Path, store: Path, save_image: Callable[..., Path]
) -> None:
    rank(photos, store, 0, 2)
    files = StoreFiles.at(store)
    read = files.open_all()
    for i in range(8):
        save_image(photos / "class0" / f"new{i}.png", seed=100 + i)
    assert rank(photos, store, 0, 2).embedded > 0
    remove_shards(files, read)
    assert left_beside(store) == ["store.h5.shard-0-of-2"]
    remove_shards(files, files.open_all())
    assert left_beside(store) == []


@pytest.mark.parametrize("next_run", ["a rank", "a single run"])
def test_shards_left_by_a_kill_after_the_join_are_removed(
    photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch, next_run: str
) -> None:
    rank(photos, store, 0, 2)
    with stopped_at(monkeypatch, "remove"):
        rank(photos, store, 1, 2)
    assert left_beside(store) == ["store.h5.shard-0-of-2", "store.h5.shard-1-of-2"]
    inode = store.stat().st_ino
    result = rank(photos, store, 0, 2) if next_run == "a rank" else embed(photos, store, backbone=TOY)
    assert result.reused == 24
    assert store.stat().st_ino == inode
    assert left_beside(store) == []


def test_a_killed_join_is_gone_on_with(
    photos: Path, store: Path, single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_block = StoreWriter.write_block

    def stop_in_the_join(self: StoreWriter, block: int, **columns: Any) -> None:
        if self._layout.path == store:
            raise KeyboardInterrupt
        write_block(self, block, **columns)

    rank(photos, store, 0, 2)
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write_block", stop_in_the_join)
        with pytest.raises(KeyboardInterrupt):
            rank(photos, store, 1, 2)
    assert not FeatureStore.open(store).complete
    assert left_beside(store) == ["store.h5.shard-0-of-2", "store.h5.shard-1-of-2"]
    assert rank(photos, store, 0, 2).embedded == 0
    assert_same(store, single)
    assert left_beside(store) == []


def test_shards_of_another_spec_are_refused(photos: Path, store: Path) -> None:
    rank(photos, store, 0, 2)
    for shard in (Shard(index=0, count=2), Shard(index=1, count=3), None):
        with pytest.raises(SpecMismatch, match="shard-0-of-2 holds .* store_dtype is float32, not float16"):
            embed(photos, store, backbone=TOY, store_dtype="float16", shard=shard)
    said = rank(photos, store, 1, 2, store_dtype="float16").describe()
    assert "0/2 (of another spec)" in said


def test_an_image_edited_before_the_join_is_embedded_as_it_is_now(
    photos: Path, store: Path, save_image: Callable[..., Path], tmp_path: Path
) -> None:
    rank(photos, store, 0, 2)
    edited = next(
        f"class0/{i}.png" for i in range(0, 24, 2) if Shard(index=0, count=2).owns(f"class0/{i}.png")
    )
    save_image(photos / edited, seed=300)
    rank(photos, store, 1, 2)
    embed(photos, tmp_path / "again.h5", backbone=TOY)
    assert_same(store, tmp_path / "again.h5")


def test_a_damaged_block_of_a_shard_is_computed_anew(photos: Path, store: Path, single: Path) -> None:
    rank(photos, store, 0, 2)
    shard = FeatureStore.open(StoreFiles.at(store).shard(0, 2).output)
    with open(shard.path, "r+b") as file:
        file.seek(shard.layout.features["penultimate"].offset)
        file.write(b"\xff\x00\xff")
    assert rank(photos, store, 1, 2).embedded == 24
    assert_same(store, single)


def test_a_failed_image_costs_its_row_in_the_joined_store(photos: Path, store: Path) -> None:
    (photos / "class0" / "bad.png").write_bytes(b"no picture")
    results = ranks(photos, store, 2)
    assert (results[1].rows, results[1].failed) == (25, 1)
    assert FeatureStore.open(store).failed_rows()[0][0] == "class0/bad.png"


# --- ranks that see different images


@pytest.fixture
def manifests(photos: Path, tmp_path: Path) -> dict[str, Path]:
    """All images but one, and all; the one is of shard 0 or of shard 1 of two."""
    ids = [f"class{i % 2}/{i}.png" for i in range(24)]
    made = {"all": ids}
    for index in (0, 1):
        one = next(path for path in ids if Shard(index=index, count=2).owns(path))
        made[f"without one of {index}"] = [path for path in ids if path != one]
    for name, paths in made.items():
        (tmp_path / f"{name}.csv").write_text(
            "path,label\n" + "".join(f"{path},{path[:6]}\n" for path in paths)
        )
    return {name: tmp_path / f"{name}.csv" for name in made}


def test_an_image_its_rank_did_not_see_is_embedded_by_who_joins(
    manifests: dict[str, Path], photos: Path, store: Path
) -> None:
    rank(manifests["without one of 0"], store, 0, 2, root=photos)
    joined = rank(manifests["all"], store, 1, 2, root=photos)
    assert (joined.rows, joined.failed) == (24, 0)
    assert FeatureStore.open(store).complete
    assert left_beside(store) == []


def test_a_rank_does_not_drop_images_that_it_does_not_see(
    manifests: dict[str, Path], photos: Path, store: Path
) -> None:
    rank(manifests["all"], store, 1, 2, root=photos)
    said = rank(manifests["without one of 1"], store, 0, 2, root=photos).describe()
    assert "1 image of the shards, first class" in said
    assert "cannot be seen from here" in said
    assert not store.exists()
    joined = rank(manifests["all"], store, 1, 2, root=photos)
    assert (joined.rows, joined.embedded) == (24, 0)


def test_an_image_removed_meanwhile_is_left_out_when_the_ranks_run_again(photos: Path, store: Path) -> None:
    rank(photos, store, 0, 2)
    gone = next(
        path
        for path in photos.rglob("*.png")
        if Shard(index=0, count=2).owns(f"{path.parent.name}/{path.name}")
    )
    gone.unlink()
    assert "cannot be seen from here" in rank(photos, store, 1, 2).describe()
    last = ranks(photos, store, 2)[0]
    assert (last.rows, last.embedded, last.store) == (23, 0, str(store))


def test_shards_with_images_of_a_folder_that_cannot_be_listed_are_kept(
    photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank(photos, store, 0, 2)
    ids = [f"class{i % 2}/{i}.png" for i in range(24)]
    empty = next(i for i in range(97) if not any(Shard(index=i, count=97).owns(path) for path in ids))
    rank(
        photos, store, empty, 97
    )  # the last store there is, so that it is not this one that has rows to lose
    plain = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("class1"):
            raise PermissionError(13, "Permission denied")
        return plain(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="class1/ cannot be listed, and .* rows of .* are of images in it"):
        embed(photos, store, backbone=TOY)
    monkeypatch.undo()
    assert left_beside(store) == ["store.h5.shard-0-of-2", f"store.h5.shard-{empty}-of-97"]


# --- real processes, started as torchrun starts them


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 images of few pixels: they are here to be counted."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("many")
    for name in ("a", "b"):
        (folder / name).mkdir()
    for i in range(MANY):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i}.bmp")
    return folder


@pytest.fixture(scope="module")
def single_of_many(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("single") / "single.h5"
    embed(many, store, backbone=KILLED, batch_size=BATCH)
    return store


@pytest.fixture(scope="module")
def launcher() -> multiprocessing.context.ForkServerContext:
    """Forks ranks from a process that has imported all and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["featcache.commands.embed", "featcache.engines.torch_eager", "killed_backbone"]
    )
    return context


def _be_rank(arguments: Sequence[str], environment: Mapping[str, str], said: str) -> None:
    os.environ.update(environment)
    with open(said, "w") as file, contextlib.redirect_stdout(file):
        main(list(arguments))


class Job:
    """`torchrun --nproc-per-node COUNT -m featcache embed …`, without its waiting for all to end well."""

    def __init__(self, launcher: multiprocessing.context.ForkServerContext, data: Path, store: Path) -> None:
        self._launcher, self._data, self._store = launcher, data, store

    def start(self, index: int, count: int, *, kill_at: int = 0) -> BaseProcess:
        arguments = ["embed", str(self._data), "-o", str(self._store), "--backbone", KILLED]
        arguments += ["--batch-size", str(BATCH), "--workers", "1", "--json", "-q"]
        environment = {"RANK": str(index), "WORLD_SIZE": str(count), "KILL_AT": str(kill_at)}
        process = self._launcher.Process(
            target=_be_rank, args=(arguments, environment, self._said(index, count))
        )
        process.start()
        return process

    def run(self, count: int, *, kill: Mapping[int, int] | None = None) -> list[int | None]:
        """The exit codes of so many ranks at once; kill: {rank: in which forward pass}."""
        processes = [self.start(i, count, kill_at=(kill or {}).get(i, 0)) for i in range(count)]
        for process in processes:
            process.join(60)
        return [process.exitcode for process in processes]

    def said(self, index: int, count: int) -> dict[str, object]:
        return dict(json.loads(Path(self._said(index, count)).read_text()))

    def embedded(self, count: int) -> int:
        return sum(int(str(self.said(index, count)["embedded"])) for index in range(count))

    def _said(self, index: int, count: int) -> str:
        return str(self._store.with_name(f"said-{index}-of-{count}"))


@pytest.fixture
def job(launcher: multiprocessing.context.ForkServerContext, many: Path, store: Path) -> Job:
    return Job(launcher, many, store)


def test_three_ranks_at_once(job: Job, store: Path, single_of_many: Path) -> None:
    assert job.run(3) == [0, 0, 0]
    assert job.embedded(3) == MANY
    assert_same(store, single_of_many)
    assert left_beside(store) == []


@pytest.mark.parametrize("then", [3, 2])
def test_a_killed_rank_is_gone_on_with(job: Job, store: Path, single_of_many: Path, then: int) -> None:
    """By the same number of ranks, or by another."""
    assert job.run(3, kill={1: 22}) == [0, -signal.SIGKILL, 0]
    assert not store.exists()
    killed = FeatureStore.open(StoreFiles.at(store).shard(1, 3).output)
    kept = int(killed.done.sum())
    assert 0 < kept < len(killed)
    assert job.run(then) == [0] * then
    assert job.embedded(then) == len(killed) - kept
    assert_same(store, single_of_many)
    assert left_beside(store) == []


def test_ranks_that_finish_together_join_once(
    launcher: multiprocessing.context.ForkServerContext, photos: Path, store: Path
) -> None:
    """Each has one batch or two, and there are more of them than processors."""
    embed(photos, store.with_name("single.h5"), backbone=KILLED, batch_size=BATCH)
    job = Job(launcher, photos, store)
    for _ in range(3):
        assert job.run(4) == [0, 0, 0, 0]
        assert str(store) in [job.said(index, 4)["store"] for index in range(4)]
        assert_same(store, store.with_name("single.h5"))
        assert left_beside(store) == []
        store.unlink()
