"""`embed`: every image costs itself once, whatever happens to the files, the options or the process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache import pipeline
from featcache.commands.embed import EmbedResult, embed
from featcache.errors import DataError, ManifestError, SpecMismatch, StoreLocked, TooManyFailures
from featcache.images import identity, walk
from featcache.images.decode import Decoder, load_image, load_pictures
from featcache.images.identity import file_stat
from featcache.progress import SilentProgress
from featcache.records import FileStat, RowStatus
from featcache.spec import Picture, Preprocessing
from featcache.store.lock import write_lock
from featcache.store.opening import read_layout
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter

TOY = "channel_mean:channel_mean"
SIZE = Preprocessing(resize_size=8, crop_size=8)


@pytest.fixture
def photos(tmp_path: Path, save_image: Callable[..., Path]) -> Path:
    """Six images of two classes."""
    for i in range(6):
        save_image(tmp_path / "photos" / f"class{i % 2}" / f"{i}.png", seed=i)
    return tmp_path / "photos"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store.h5"


@pytest.fixture
def embedded(photos: Path, store: Path) -> EmbedResult:
    return embed(photos, store, backbone=TOY)


def counts(result: EmbedResult) -> dict[str, int]:
    names = ("rows", "embedded", "reused", "relabelled", "failed", "removed")
    return {name: getattr(result, name) for name in names if getattr(result, name)}


def by_id(path: Path) -> dict[str, tuple[list[float], str]]:
    features = FeatureStore.open(path).features()
    labels = [features.classes[label] for label in features.y]
    return dict(zip(features.ids, zip(features.X.tolist(), labels, strict=True), strict=True))


def by_hand(image: Path) -> list[float]:
    pixels = load_image(image, SIZE, decoder="fast").pixels.astype(np.float64) / 255  # type: ignore[union-attr]
    return list((pixels.mean((0, 1)) - 0.5) / 0.5)


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise AssertionError(f"{path} was decoded")

    monkeypatch.setattr(pipeline, "load_pictures", refuse)


def test_features_are_those_of_the_image_by_path(photos: Path, store: Path, embedded: EmbedResult) -> None:
    assert counts(embedded) == {"rows": 6, "embedded": 6}
    for path, (vector, label) in by_id(store).items():
        np.testing.assert_allclose(vector, by_hand(photos / path), atol=1e-6)
        assert path.startswith(label)


def test_the_same_again_decodes_nothing_and_says_how_it_knew(
    photos: Path, store: Path, embedded: EmbedResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_decoding(monkeypatch)
    before = store.read_bytes()
    again = embed(photos, store, backbone=TOY)
    assert counts(again) == {"rows": 6, "reused": 6}
    assert "6 files known by size, times and inode" in again.describe()
    assert store.read_bytes() == before


def test_the_same_again_needs_neither_torch_nor_an_open_image(photos: Path, store: Path) -> None:
    arguments = [
        "embed",
        str(photos),
        "-o",
        str(store),
        "--backbone",
        "resnet18",
        "--weights",
        "random",
        "-q",
    ]
    code = (
        "import sys; from featcache.cli import main\n"
        "try: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    )
    first = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert first.stdout.splitlines()[-1] == "True", first.stderr
    again = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert "nothing to embed: 6 files" in again.stdout
    assert again.stdout.splitlines()[-1] == "False"


def test_an_edited_an_added_and_a_deleted_image_cost_just_themselves(
    photos: Path, store: Path, embedded: EmbedResult, save_image: Callable[..., Path]
) -> None:
    save_image(photos / "class0" / "0.png", seed=100)
    save_image(photos / "class1" / "new.png", seed=101)
    (photos / "class1" / "5.png").unlink()
    result = embed(photos, store, backbone=TOY)
    assert counts(result) == {"rows": 6, "embedded": 2, "reused": 4, "removed": 1}
    rows = by_id(store)
    assert "class1/5.png" not in rows
    for path, (vector, _) in rows.items():
        np.testing.assert_allclose(vector, by_hand(photos / path), atol=1e-6)


def test_a_renamed_class_is_relabelled_without_decoding(
    photos: Path, store: Path, embedded: EmbedResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_decoding(monkeypatch)
    (photos / "class0").rename(photos / "aardvark")
    result = embed(photos, store, backbone=TOY)
    assert counts(result) == {"rows": 6, "reused": 6, "relabelled": 3}
    assert {label for _, label in by_id(store).values()} == {"aardvark", "class1"}
    assert embed(photos, store, backbone=TOY).relabelled == 0


def test_a_relabelled_manifest_costs_no_image(
    photos: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tmp_path / "all.csv"
    manifest.write_text("path,label,split\nclass0/0.png,cat,train\nclass1/1.png,dog,test\nclass0/2.png,,\n")
    first = embed(manifest, store, backbone=TOY, root=photos)
    assert counts(first) == {"rows": 3, "embedded": 3}
    manifest.write_text("path,label,split\nclass0/0.png,dog,train\nclass1/1.png,dog,val\nclass0/2.png,,\n")
    no_decoding(monkeypatch)
    assert counts(embed(manifest, store, backbone=TOY, root=photos)) == {
        "rows": 3, "reused": 3, "relabelled": 2,
    }  # fmt: skip
    features = FeatureStore.open(store).features()
    assert features.y.tolist() == [0, -1, 0]
    assert features.splits.tolist() == ["train", "", "val"]


@pytest.mark.parametrize("change", ["touched", "copied elsewhere", "renamed"])
def test_what_has_the_same_bytes_is_not_embedded_again(
    photos: Path, store: Path, embedded: EmbedResult, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    no_decoding(monkeypatch)
    if change == "touched":
        os.utime(photos / "class0" / "0.png", ns=(1, 1))
    elif change == "renamed":
        (photos / "class0" / "0.png").rename(photos / "class0" / "zero.png")
    else:
        photos = Path(shutil.copytree(photos, photos.parent / "elsewhere"))
    result = embed(photos, store, backbone=TOY)
    assert counts(result) == {"rows": 6, "reused": 6}
    assert "by the sha256 of their bytes" in result.describe()
    assert "sha256 of their bytes" not in embed(photos, store, backbone=TOY).describe()


def test_a_store_records_where_its_images_were(
    photos: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    embed(photos, store, backbone=TOY)
    assert FeatureStore.open(store).provenance["data"] == {
        "path": str(photos.absolute()), "root": None, "follow_links": False,
    }  # fmt: skip
    manifest = tmp_path / "all.csv"
    manifest.write_text("path,label\nclass0/0.png,a\n")
    other = tmp_path / "other.h5"
    embed("all.csv", other, backbone=TOY, root="photos", follow_links=True)
    assert FeatureStore.open(other).provenance["data"] == {
        "path": str(manifest), "root": str(photos), "follow_links": True,
    }  # fmt: skip


def test_a_moved_folder_is_the_same_data(photos: Path, store: Path, embedded: EmbedResult) -> None:
    moved = photos.rename(photos.parent / "moved")
    assert counts(embed(moved, store, backbone=TOY)) == {"rows": 6, "reused": 6}


def test_an_edit_that_keeps_size_and_mtime_is_found(photos: Path, store: Path, embedded: EmbedResult) -> None:
    path = photos / "class0" / "0.png"
    kept = path.stat()
    black = np.zeros((20, 24, 3), dtype=np.uint8)
    Image.fromarray(black).save(path)
    assert path.stat().st_size < kept.st_size
    path.write_bytes(path.read_bytes().ljust(kept.st_size, b"\0"))
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (kept.st_size, kept.st_mtime_ns)
    assert counts(embed(photos, store, backbone=TOY)) == {"rows": 6, "embedded": 1, "reused": 5}
    np.testing.assert_allclose(by_id(store)["class0/0.png"][0], [-1, -1, -1], atol=1e-6)


def test_two_folders_that_change_names_are_told_apart_by_inode(
    photos: Path, store: Path, save_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renaming a folder moves no time stamp of the files in it; those of one archive may all be equal."""
    same_times = [save_image(photos / name / "same.bmp", seed=seed) for name, seed in (("a", 70), ("b", 71))]

    def without_ctime(result: os.stat_result) -> FileStat:
        return file_stat(result)._replace(ctime_ns=0)

    monkeypatch.setattr(walk, "file_stat", without_ctime)
    monkeypatch.setattr(identity, "file_stat", without_ctime)
    for path in same_times:
        os.utime(path, ns=(10**18, 10**18))
    embed(photos, store, backbone=TOY)
    (photos / "a").rename(photos / "c")
    (photos / "b").rename(photos / "a")
    (photos / "c").rename(photos / "b")
    assert counts(embed(photos, store, backbone=TOY))["reused"] == 8
    for name in ("a", "b"):
        path = f"{name}/same.bmp"
        np.testing.assert_allclose(by_id(store)[path][0], by_hand(photos / path), atol=1e-6)


def test_rows_of_a_folder_that_cannot_be_listed_are_not_removed(
    photos: Path, store: Path, embedded: EmbedResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("class1"):
            raise PermissionError(13, "Permission denied")
        return plain(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="class1.* cannot be listed, and 3 rows of .* are of images in it"):
        embed(photos, store, backbone=TOY)
    monkeypatch.undo()
    assert counts(embed(photos, store, backbone=TOY)) == {"rows": 6, "reused": 6}


def test_rows_follow_their_image_when_others_are_inserted_before_them(
    photos: Path, store: Path, embedded: EmbedResult, save_image: Callable[..., Path]
) -> None:
    """Trap: features joined to labels by position."""
    for i in range(300):
        save_image(photos / "a_first_class" / f"{i:03d}.png", seed=1000 + i, size=(8, 8))
    result = embed(photos, store, backbone=TOY)
    assert counts(result) == {"rows": 306, "embedded": 300, "reused": 6}
    for path, (vector, label) in by_id(store).items():
        np.testing.assert_allclose(vector, by_hand(photos / path), atol=1e-6)
        assert path.startswith(label)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"precision": "bfloat16"}, "compute_dtype is float32, not bfloat16"),
        ({"store_dtype": "float16"}, "store_dtype is float32, not float16"),
        ({"backbone": "killed_backbone:backbone"}, "backbone is channel_mean:channel_mean, not killed"),
    ],
)
def test_another_spec_is_refused_naming_the_field(
    photos: Path, store: Path, embedded: EmbedResult, change: dict[str, str], field: str
) -> None:
    before = store.read_bytes()
    with pytest.raises(SpecMismatch, match=f"{field}.*Choose another --output"):
        embed(photos, store, **{"backbone": TOY, **change})  # type: ignore[arg-type]
    assert store.read_bytes() == before


@pytest.mark.parametrize("knob", [{"batch_size": 1}, {"batch_size": 5}, {"workers": 1}, {"workers": 7}])
def test_features_do_not_depend_on_batches_or_workers(
    photos: Path, tmp_path: Path, store: Path, knob: dict[str, int]
) -> None:
    first = embed(photos, store, backbone="killed_backbone:backbone")
    other = embed(photos, tmp_path / "other.h5", backbone="killed_backbone:backbone", **knob)  # type: ignore[arg-type]
    assert other.fingerprint == first.fingerprint
    assert by_id(tmp_path / "other.h5").keys() == by_id(store).keys()
    for path, (vector, _) in by_id(store).items():
        np.testing.assert_allclose(by_id(tmp_path / "other.h5")[path][0], vector, rtol=1e-6, atol=1e-7)


def test_a_dry_run_counts_and_writes_nothing(
    photos: Path, store: Path, save_image: Callable[..., Path]
) -> None:
    assert counts(embed(photos, store, backbone=TOY, dry_run=True)) == {"rows": 6, "embedded": 6}
    assert not store.exists()
    embed(photos, store, backbone=TOY)
    save_image(photos / "class0" / "0.png", seed=100)
    before = store.read_bytes()
    dry = embed(photos, store, backbone=TOY, dry_run=True)
    assert counts(dry) == {"rows": 6, "embedded": 1, "reused": 5}
    assert "nothing was written" in dry.describe()
    assert store.read_bytes() == before
    assert sorted(p.name for p in store.parent.iterdir()) == ["photos", "store.h5"]


def test_json_has_just_the_documented_keys(embedded: EmbedResult) -> None:
    assert list(embedded.to_json()) == [
        "rows", "embedded", "reused", "relabelled", "failed", "removed",
        "seconds", "images_per_second", "fingerprint", "store", "dry_run",
        "engine", "device", "batch_size", "decoder",
    ]  # fmt: skip
    assert embedded.to_json()["engine"] == "torch-eager"


def test_bad_images_cost_their_own_row_and_are_named(
    photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "class0" / "empty.jpg").write_bytes(b"")
    (photos / "class1" / "page.jpg").write_text("<!DOCTYPE html><title>404</title>")
    os.mkfifo(photos / "class1" / "pipe.jpg")
    result = embed(photos, store, backbone=TOY, max_failures=0.5)
    assert counts(result) == {"rows": 9, "embedded": 6, "failed": 3}
    said = result.describe()
    for name in (
        "class0/empty.jpg: empty",
        "class1/page.jpg: not an image",
        "class1/pipe.jpg: not a regular",
    ):
        assert name in said
    features = FeatureStore.open(store).features()
    assert len(features) == 6
    raw = FeatureStore.open(store)
    failed = raw.row_status != RowStatus.OK
    assert np.isnan(raw.map()[failed]).all()
    no_decoding(monkeypatch)
    assert counts(embed(photos, store, backbone=TOY, max_failures=0.5)) == {
        "rows": 9, "reused": 6, "failed": 3,
    }  # fmt: skip


def test_a_mended_image_is_embedded_by_the_same_command(
    photos: Path, store: Path, save_image: Callable[..., Path]
) -> None:
    broken = photos / "class0" / "x.png"
    broken.write_bytes(b"not yet")
    assert embed(photos, store, backbone=TOY).failed == 1
    save_image(broken, seed=9)
    assert counts(embed(photos, store, backbone=TOY)) == {"rows": 7, "embedded": 1, "reused": 6}


def test_too_many_failures_stop_with_a_report_and_keep_the_rest(photos: Path, store: Path) -> None:
    for i in range(3):
        (photos / "class0" / f"bad{i}.jpg").write_bytes(b"")
    with pytest.raises(
        TooManyFailures, match="3 of 9 images failed, more than the 1.0%.*bad0.jpg.*--max-fail"
    ):
        embed(photos, store, backbone=TOY)
    result = embed(photos, store, backbone=TOY, max_failures=0.4)
    assert counts(result) == {"rows": 9, "reused": 6, "failed": 3}


def test_a_file_that_vanishes_during_the_run_is_a_row_not_a_crash(
    photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish(path: Path, pictures: Sequence[Picture], *, decoder: Decoder) -> object:
        if path.name == "3.png":
            path.unlink()
        return load_pictures(path, pictures, decoder=decoder)

    monkeypatch.setattr(pipeline, "load_pictures", vanish)
    result = embed(photos, store, backbone=TOY)
    assert counts(result) == {"rows": 6, "embedded": 5, "failed": 1}
    assert FeatureStore.open(store).failed_rows() == [("class1/3.png", RowStatus.MISSING)]


def test_an_image_missing_from_a_manifest_is_embedded_once_it_is_there(
    photos: Path, store: Path, tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    manifest = tmp_path / "all.csv"
    manifest.write_text("path,label\nclass0/0.png,a\nclass0/later.png,b\n")
    assert counts(embed(manifest, store, backbone=TOY, root=photos)) == {
        "rows": 2, "embedded": 1, "failed": 1,
    }  # fmt: skip
    assert embed(manifest, store, backbone=TOY, root=photos).failed == 1
    save_image(photos / "class0" / "later.png", seed=50)
    assert counts(embed(manifest, store, backbone=TOY, root=photos)) == {
        "rows": 2, "embedded": 1, "reused": 1,
    }  # fmt: skip


def test_a_bad_manifest_stops_before_anything_is_written(photos: Path, store: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "all.csv"
    manifest.write_text("path,label\n../outside.png,a\n")
    with pytest.raises(ManifestError, match="line 2"):
        embed(manifest, store, backbone=TOY, root=photos)
    assert not store.exists()


def test_a_folder_without_images_is_one_line(tmp_path: Path, store: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        embed(tmp_path / "empty", store, backbone=TOY)


def test_features_beyond_float16_are_rows_that_failed_not_infinities(
    photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcache.engines.torch_eager import TorchEager

    plain = TorchEager.embed

    def huge(self: TorchEager, pixels: np.ndarray) -> dict[str, np.ndarray]:
        features = plain(self, pixels)
        features["penultimate"][0] = 1e6
        return features

    monkeypatch.setattr(TorchEager, "embed", huge)
    result = embed(photos, store, backbone=TOY, store_dtype="float16")
    assert counts(result) == {"rows": 6, "embedded": 5, "failed": 1}
    assert "--store-dtype float32" in result.describe()
    assert np.isfinite(FeatureStore.open(store).features().X).all()


def test_two_runs_at_once_are_refused(photos: Path, store: Path, embedded: EmbedResult) -> None:
    with write_lock(store), pytest.raises(StoreLocked, match="is being written"):
        embed(photos, store, backbone=TOY)


def test_a_damaged_block_is_embedded_again_by_the_same_command(
    photos: Path, store: Path, embedded: EmbedResult
) -> None:
    good = by_id(store)
    with open(store, "r+b") as file:
        file.seek(read_layout(store).features["penultimate"].offset)
        file.write(b"\xff\x00\xff")
    assert embed(photos, store, backbone=TOY).embedded == 6
    assert by_id(store) == good


# By name, so that no forward pass goes into choosing an engine: in a run that makes a store two compare the
# decoders, and the n-th after them is about the n-th batch's. Two workers are at most five batches ahead.
PLAIN = ("--batch-size", "4", "--engine", "torch-eager", "--workers", "2", "-q")


def run_embed(
    *arguments: str, kill_at: int = 0, kill_with: str = "SIGKILL"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "featcache", "embed", *arguments, *PLAIN],
        env={**os.environ, "KILL_AT": str(kill_at), "KILL_WITH": kill_with},
        cwd=Path(__file__).parent,
        # A shell that starts the tests in the background has Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def many(tmp_path: Path, save_image: Callable[..., Path]) -> Path:
    """600 images: more than two blocks."""
    for i in range(600):
        save_image(tmp_path / "many" / f"class{i % 3}" / f"{i:03d}.png", seed=i, size=(20, 20))
    return tmp_path / "many"


def features_bytes(path: Path) -> bytes:
    return FeatureStore.open(path).features().X.tobytes()


# A kill comes in a batch that leaves room for 60 images that are computed and not yet written. Two passes of
# a new store go into a comparison.


def test_a_run_killed_twice_resumes_to_the_very_bytes_of_an_undisturbed_one(
    many: Path, tmp_path: Path
) -> None:
    backbone = ("--backbone", "killed_backbone:backbone")
    calm, store = tmp_path / "calm.h5", tmp_path / "killed.h5"
    assert run_embed(str(many), "-o", str(calm), *backbone).returncode == 0
    assert run_embed(str(many), "-o", str(store), *backbone, kill_at=82).returncode == -signal.SIGKILL
    assert FeatureStore.open(store).done.sum() == 256
    assert run_embed(str(many), "-o", str(store), *backbone, kill_at=80).returncode == -signal.SIGKILL
    assert FeatureStore.open(store).done.sum() == 512
    last = run_embed(str(many), "-o", str(store), *backbone, "--json")
    assert last.returncode == 0, last.stderr
    assert '"embedded": 88, "reused": 512' in last.stdout
    assert features_bytes(store) == features_bytes(calm)


def test_a_killed_growth_keeps_the_old_store_and_goes_on(
    many: Path, tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    backbone = ("--backbone", "killed_backbone:backbone")
    store = tmp_path / "store.h5"
    assert run_embed(str(many), "-o", str(store), *backbone).returncode == 0
    old = features_bytes(store)
    for i in range(400):
        save_image(many / "class9" / f"{i:03d}.png", seed=5000 + i, size=(20, 20))
    assert run_embed(str(many), "-o", str(store), *backbone, kill_at=58).returncode == -signal.SIGKILL
    assert features_bytes(store) == old
    last = run_embed(str(many), "-o", str(store), *backbone, "--json")
    assert '"rows": 1000, "embedded": 232, "reused": 768' in last.stdout, last
    fresh = tmp_path / "fresh.h5"
    assert run_embed(str(many), "-o", str(fresh), *backbone).returncode == 0
    assert features_bytes(store) == features_bytes(fresh)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh.h5", "many", "store.h5"]


@contextmanager
def default_ctrl_c() -> Iterator[None]:
    """A shell that starts the tests in the background has Ctrl-C ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Ctrl-C in the forward pass after so many."""
    from featcache.engines.torch_eager import TorchEager

    plain, calls = TorchEager.embed, iter(range(batches))

    def embed_or_stop(self: TorchEager, pixels: np.ndarray) -> dict[str, np.ndarray]:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return plain(self, pixels)

    monkeypatch.setattr(TorchEager, "embed", embed_or_stop)


def test_rows_of_a_growth_that_no_longer_fits_are_kept_until_they_are_copied(
    many: Path, store: Path, save_image: Callable[..., Path]
) -> None:
    embed(many, store, backbone=TOY)
    for i in range(600):
        save_image(many / "class9" / f"{i:03d}.png", seed=5000 + i, size=(20, 20))
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 60)
        with pytest.raises(KeyboardInterrupt):
            embed(many, store, backbone=TOY)
    before = embed(many, store, backbone=TOY, dry_run=True)
    assert before.embedded < 600
    for i in range(300):
        save_image(many / "a_first_class" / f"{i:03d}.png", seed=9000 + i, size=(20, 20))
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            embed(many, store, backbone=TOY)
    assert embed(many, store, backbone=TOY, dry_run=True).embedded <= before.embedded + 300
    assert embed(many, store, backbone=TOY).rows == 1500
    for path, (vector, _) in list(by_id(store).items())[::97]:
        np.testing.assert_allclose(vector, by_hand(many / path), atol=1e-6)
    assert sorted(p.name for p in store.parent.iterdir()) == ["many", "store.h5"]


def test_a_growth_of_other_weights_is_never_taken_for_the_store(
    photos: Path, store: Path, tmp_path: Path
) -> None:
    def embed_seed(path: Path, seed: int) -> EmbedResult:
        return embed(photos, path, backbone="resnet18", weights="random", seed=seed)

    embed_seed(store, 1)
    mine = by_id(store)
    embed_seed(tmp_path / "other.h5", 0)
    (tmp_path / "other.h5").rename(tmp_path / "store.h5.growing")
    assert counts(embed_seed(store, 1)) == {"rows": 6, "reused": 6}
    assert by_id(store) == mine


def test_a_linked_store_is_the_store_it_links_to(
    photos: Path, store: Path, save_image: Callable[..., Path]
) -> None:
    embed(photos, store, backbone=TOY)
    link = store.with_name("link.h5")
    link.symlink_to(store.name)
    save_image(photos / "class0" / "new.png", seed=77)
    assert counts(embed(photos, link, backbone=TOY)) == {"rows": 7, "embedded": 1, "reused": 6}
    assert link.is_symlink()
    assert len(by_id(store)) == 7


def test_another_backbone_is_refused_before_its_weights_are_looked_for(
    photos: Path, store: Path, embedded: EmbedResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        SpecMismatch, match="channel_mean.* features.*not resnet18.*pass --backbone channel_mean"
    ):
        embed(photos, store, backbone="resnet18")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize(
    ("kill_at", "least", "most"),
    [(3, 0, 0), (72, 256, 320), (152, 576, 600)],
    ids=["before a row", "in the fifth block", "in the last block"],
)
def test_an_interrupted_run_finishes_its_block_and_says_what_is_kept(
    many: Path, tmp_path: Path, name: str, code: int, kill_at: int, least: int, most: int
) -> None:
    """600 rows in blocks of 64, in batches of 4, of which two are for the decoders.

    A block in progress is finished; none is begun, and which is in progress depends on how far ahead of it
    the signal came.
    """
    store = tmp_path / "s.h5"
    arguments = (str(many), "-o", str(store), "--backbone", "killed_backbone:backbone")
    stopped = run_embed(*arguments, kill_at=kill_at, kill_with=name)
    assert stopped.returncode == code
    done = np.flatnonzero(FeatureStore.open(store).done)
    kept = len(done)
    assert least <= kept <= most
    assert kept % 64 == 0 or kept == 600, "whole blocks"
    assert done.tolist() == list(range(kept))
    said = f"{kept} of 600 rows are kept; run the same command again" if kept else "none of 600 rows is kept"
    assert said in stopped.stderr
    assert "Traceback" not in stopped.stderr


def test_an_interrupt_while_decoders_are_compared_leaves_nothing(many: Path, tmp_path: Path) -> None:
    arguments = (str(many), "-o", str(tmp_path / "s.h5"), "--backbone", "killed_backbone:backbone")
    stopped = run_embed(*arguments, kill_at=1, kill_with="SIGINT")
    assert (stopped.returncode, stopped.stderr) == (130, "Interrupted.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["many"]


def test_an_interrupt_says_once_what_it_waits_for(many: Path, store: Path) -> None:
    said = []

    class Notes(SilentProgress):
        def note(self, message: str) -> None:
            said.append(message)

        def advance(self, count: int, **_: object) -> None:
            if not said:
                signal.raise_signal(signal.SIGINT)

    with default_ctrl_c(), pytest.raises(KeyboardInterrupt):
        embed(many, store, backbone=TOY, batch_size=8, progress=Notes())
    (words,) = said
    match = re.fullmatch(
        r"stopping after (\d+) more images, when this block is written; Ctrl-C again stops at once and "
        r"loses (\d+)",
        words,
    )
    assert match
    # How many images had come is the pipeline's affair; with those to come they fill a block.
    assert int(match[1]) + int(match[2]) == 64
    assert FeatureStore.open(store).done.sum() == 64


def test_a_second_interrupt_stops_at_once(many: Path, store: Path) -> None:
    class Twice(SilentProgress):
        rows, signals = 0, 0

        def advance(self, count: int, **_: object) -> None:
            self.rows += count
            if self.rows > 256:  # in the fifth block of 64 rows, of which no more than 48 come together
                for self.signals in (1, 2):
                    signal.raise_signal(signal.SIGINT)

    progress = Twice()
    with default_ctrl_c(), pytest.raises(KeyboardInterrupt) as stopped:
        embed(many, store, backbone=TOY, batch_size=2, progress=progress)
    assert progress.signals == 2
    assert stopped.value.__notes__ == ["256 of 600 rows are kept; run the same command again to go on"]
    assert FeatureStore.open(store).done.sum() == 256


def test_a_copy_is_interrupted_between_two_blocks(
    many: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(many, store, backbone=TOY, batch_size=8)
    (many / "class0").rename(many / "aardvark")
    plain = StoreWriter.write_block

    def interrupted(self: StoreWriter, block: int, **columns: np.ndarray) -> None:
        plain(self, block, **columns)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(StoreWriter, "write_block", interrupted)
    with default_ctrl_c(), pytest.raises(KeyboardInterrupt) as stopped:
        embed(many, store, backbone=TOY)
    monkeypatch.undo()
    assert stopped.value.__notes__ == ["64 of 600 rows are kept; run the same command again to go on"]
    assert counts(embed(many, store, backbone=TOY)) == {"rows": 600, "reused": 600, "relabelled": 200}
    assert FeatureStore.open(store).complete


def test_a_run_that_was_asked_to_stop_never_names_an_unfinished_store(
    many: Path, store: Path, save_image: Callable[..., Path]
) -> None:
    """Trap: a host's own handler that returns, after which the run would go on as if it were done."""
    embed(many, store, backbone=TOY, batch_size=8)
    before = store.read_bytes()
    for i in range(300):
        save_image(many / "class9" / f"{i:03d}.png", seed=5000 + i, size=(20, 20))

    class Once(SilentProgress):
        def advance(self, count: int, **_: object) -> None:
            if not seen:
                signal.raise_signal(signal.SIGINT)

    seen: list[int] = []
    former = signal.signal(signal.SIGINT, lambda signum, frame: seen.append(signum))
    try:
        with pytest.raises(KeyboardInterrupt):
            embed(many, store, backbone=TOY, progress=Once())
    finally:
        signal.signal(signal.SIGINT, former)
    assert seen == [signal.SIGINT]
    assert store.read_bytes() == before


def test_the_summary_tells_speed_and_size(embedded: EmbedResult) -> None:
    stages = {"decoding": 0.2, "forward": 0.7}
    said = replace(embedded, seconds=2.0, images_per_second=3.0, stages=stages).describe()
    assert "6 rows: 6 embedded, 0 reused, 0 failed" in said
    assert "in 2.0 s in all, embedding at 3.0 images/s; fingerprint" in said
    assert "the network is the wall: 70% of its threads' time; decoding 20%" in said
