"""What surrounds a run: closed streams, an output that is full, a folder that is gone, a store moved away."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from featcache import update
from featcache.commands.embed import embed
from featcache.errors import StoreError
from featcache.progress import SilentProgress, make_progress
from featcache.store.reader import FeatureStore

TOY = "channel_mean:channel_mean"
LOUD = """
import os
from channel_mean import ChannelMean, channel_mean
from featcache.backbones import make_backbone
from featcache.spec import Preprocessing

class Loud(ChannelMean):
    def forward(self, images):
        os.write(2, b"[W] as a library in C would warn\\n")
        return super().forward(images)

def loud():
    return make_backbone(Loud(), preprocessing=Preprocessing(resize_size=8, crop_size=8), label="none")
"""


@pytest.fixture
def photos(save_images: Callable[..., Path]) -> Path:
    return save_images(6, lambda i: f"c{i % 2}/{i}.png")


def shell(command: str, *, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parent), str(cwd)])
    return subprocess.run(
        ["/bin/sh", "-c", command.replace("featcache", f"{sys.executable} -m featcache", 1)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_is_written_to_a_closed_stderr_does_not_land_in_the_store(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "loud_mean.py").write_text(LOUD)
    ran = shell("featcache embed photos -o s.h5 --backbone loud_mean:loud -q >&- 2>&-", cwd=tmp_path)
    assert ran.returncode == 0
    assert len(FeatureStore.open(tmp_path / "s.h5").features()) == 6


def test_without_stderr_there_is_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert isinstance(make_progress(), SilentProgress)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_an_answer_that_cannot_be_written_is_one_line(photos: Path, tmp_path: Path) -> None:
    ran = shell(f"featcache embed photos -o s.h5 --backbone {TOY} -q > /dev/full", cwd=tmp_path)
    assert ran.returncode == 1
    assert ran.stderr.startswith("Error: all is done, but the answer cannot be written: No space left")
    assert len(ran.stderr.splitlines()) == 1
    assert len(FeatureStore.open(tmp_path / "s.h5").features()) == 6


def test_a_folder_that_is_gone_is_one_line(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    ran = shell(f"cd gone && rmdir ../gone && featcache embed {photos} -o s.h5 -q", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("Error: the current folder cannot be found (No such file or directory)")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_store_moved_away_during_the_run_is_said(photos: Path, tmp_path: Path, replaced: bool) -> None:
    store, elsewhere = tmp_path / "s.h5", tmp_path / "t.h5"

    class Mover(SilentProgress):
        def advance(self, count: int, **_: object) -> None:
            store.rename(elsewhere)
            if replaced:
                store.write_bytes(b"another file")

    with pytest.raises(StoreError, match=r"s\.h5 was moved or replaced while it was written.*move it back"):
        embed(photos, store, backbone=TOY, batch_size=8, progress=Mover())
    assert len(FeatureStore.open(elsewhere).features()) == 6


@pytest.mark.parametrize("batch_size", [0, 65_537])
def test_batches_of_a_size_no_store_can_keep_are_refused(
    photos: Path, tmp_path: Path, batch_size: int
) -> None:
    with pytest.raises(ValueError, match="batch_size is 1 to 65,536"):
        embed(photos, tmp_path / "s.h5", backbone=TOY, batch_size=batch_size)
    assert not (tmp_path / "s.h5").exists()


def test_a_caller_with_a_long_command_line_or_none_can_embed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, argv in (("long.h5", ["prog", *(["argument"] * 20_000)]), ("none.h5", [])):
        monkeypatch.setattr(sys, "argv", argv)
        embed(photos, tmp_path / name, backbone=TOY)
        assert len(FeatureStore.open(tmp_path / name).provenance["command"]) <= 2000


def test_images_that_come_while_another_run_is_waited_for_are_not_taken_for_removed(
    photos: Path, tmp_path: Path, save_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing is made under the lock: what was added before the lock was had is in it."""
    store, plain = tmp_path / "s.h5", update.write_lock
    embed(photos, store, backbone=TOY)

    def lock_after_another_run(path: Path) -> object:
        monkeypatch.undo()
        save_image(photos / "c0" / "new.png", seed=99)
        embed(photos, store, backbone=TOY)
        return plain(path)

    monkeypatch.setattr(update, "write_lock", lock_after_another_run)
    result = embed(photos, store, backbone=TOY)
    assert (result.rows, result.removed) == (7, 0)
    assert np.isfinite(FeatureStore.open(store).features().X).all()
