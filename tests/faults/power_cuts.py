"""Power cuts on a real ext4, and what must hold of a store once the file system is mounted again.

The file system lies in an image on a loop device. At a random instant of an `embed` its shutdown ioctl stops
it: whatever was not written to the device by then never will be, and usually nor is the journal. It is
unmounted, mounted again, which replays the journal, and judged as in `kills`. Further runs on it are cut in
turn, or killed with the power on; the last ends by itself.

What this cut does: dirty pages and transactions that nobody synced are gone, and a sync under way is torn
between two requests. What it does not do: a request that reached the device is never lost, reordered or torn
at a sector, as a disk's own cache may do; that is for simulated crash states. That something is lost at all
is measured by two controls: a plain h5py file that is flushed and not synced, and featcache with its syncs
taken out.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import h5py
import numpy as np
import torch

from faults.kills import (
    FINISHED,
    HANG_SECONDS,
    Bench,
    Moment,
    Outcome,
    Round,
    Run,
    columns_of,
    draw_knobs,
    draw_round,
    has_name,
    leave_signals_to_the_owner,
    run_to_the_end,
    wait,
)
from featcache.backbones import Backbone, make_backbone
from featcache.errors import FeatcacheError
from featcache.spec import Preprocessing
from featcache.store.reader import FeatureStore

BACKBONE = "faults.power_cuts:pixels"
IMAGE_BYTES = 24 << 20
GROUP_BYTES = (2_000, 10_000, 40_000, 1 << 24)
SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32)
FLAGS = {"all written": 0, "journal written": 1, "nothing written": 2}  # before the end: EXT4_GOING_FLAGS_*
MODES = ("data=ordered", "data=writeback", "data=journal")
UNSYNCED_EVERY = 10  # one round in so many is a control without syncs
CONTROLS = (
    ("control, h5py flushed only: cuts", "control, h5py flushed only: cuts that lost rows"),
    ("control, no syncs: rounds", "control, no syncs: rounds that broke a promise"),
)
KILLED = "runs killed with the power on"

_CLONE_NEWNS = 0x00020000
_PR_SET_PDEATHSIG = 1


class Pixels(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)  # (B, 3, 8, 8) -> (B, 192)


def pixels() -> Backbone:
    """A backbone whose feature is the image: wide enough that a store has pages to lose."""
    return make_backbone(
        Pixels(), preprocessing=Preprocessing(resize_size=8, crop_size=8), label="no weights"
    )


class CutDisk:
    """An ext4 of its own, whose power can be cut."""

    def __init__(self, folder: Path, mode: str) -> None:
        self._image, self.path, self._options = folder / "disk.img", folder / "disk", f"loop,{mode}"
        self.path.mkdir()
        with open(self._image, "wb") as file:
            file.truncate(IMAGE_BYTES)
        _command("mkfs.ext4", "-q", "-F", str(self._image))
        self.mount()

    def mount(self) -> None:
        _command("mount", "-o", self._options, str(self._image), str(self.path))

    def cut(self, flag: int) -> None:
        """The file system ends here; what uses it gets I/O errors until it is mounted again."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", flag))
        finally:
            os.close(fd)

    def unmount(self) -> None:
        gc.collect()  # a map of a store keeps the file system busy
        _command("umount", str(self.path))


@contextmanager
def cut_disk(folder: Path, mode: str) -> Iterator[CutDisk]:
    """A new disk, unmounted and removed whatever happens."""
    folder.mkdir()
    try:
        yield CutDisk(folder, mode)
    finally:
        if os.path.ismount(folder / "disk"):
            _command("umount", "--lazy", str(folder / "disk"))
        shutil.rmtree(folder)


def _command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


def own_mounts() -> None:
    """From now on this process mounts for itself and its children only: the kernel unmounts when they end."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "a mount namespace of its own was refused")
    _command("mount", "--make-rprivate", "/")


def why_not(folder: str) -> str | None:
    """Why power cannot be cut on this machine; None where it can. Mounts, so `own_mounts` first."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "mounting needs root"
    for program in ("mkfs.ext4", "mount", "umount"):
        if shutil.which(program) is None:
            return f"there is no {program}"
    try:
        own_mounts()
        with tempfile.TemporaryDirectory(dir=folder) as own, cut_disk(Path(own, "trial"), MODES[0]) as disk:
            disk.cut(FLAGS["nothing written"])
            disk.unmount()
    except OSError as exc:
        return str(exc)
    return None


def flush_forever(path: Path) -> Callable[[Callable[..., None]], None]:
    """The control: a plain h5py file that grows by rows and is flushed, which is not a sync."""

    def work(tell: Callable[..., None]) -> None:
        with h5py.File(path, "w", libver="latest") as file:
            rows = file.create_dataset("rows", (0, 192), maxshape=(None, 192), chunks=(8, 192), dtype="f4")
            for n in range(1, 10_000):
                rows.resize(n, axis=0)
                rows[n - 1] = n
                file.flush()
                tell("flushed", rows=n)
                time.sleep(0.002)

    return work


def lost_rows(path: Path, control: Run) -> bool:
    """Whether the control's file has lost or spoiled a row that was flushed."""
    n = sum(report["say"] == "flushed" for report in control.reports)
    try:
        with h5py.File(path, "r", locking=False) as file:
            rows = file["rows"][:n]
    except (OSError, KeyError, RuntimeError):
        return n > 0
    return len(rows) < n or not np.array_equal(rows[:, 0], np.arange(1, n + 1))


def sync_nothing() -> None:
    """The fault of the second control."""
    os.fsync = os.fdatasync = lambda _: None  # type: ignore[assignment]


def cut_round(bench: Bench, number: int, *, seed: str = "0") -> Outcome:
    """One round: runs that are cut off, then one that is not; its violations are in the outcome."""
    begun = time.monotonic()
    unsynced = number % UNSYNCED_EVERY == UNSYNCED_EVERY - 1
    rng = Random(f"disk {seed} {number}")
    mode = rng.choices(MODES, weights=(60, 25, 15))[0]
    with cut_disk(bench.folder / f"round{number}", mode) as disk:
        folder = disk.path / "stores"
        folder.mkdir()
        this = draw_round(
            bench,
            number,
            seed=seed,
            folder=folder,
            keeps_unsynced=False,
            sabotage=sync_nothing if unsynced else None,
        )
        this.knobs = draw_knobs(rng, GROUP_BYTES[:1] if unsynced else GROUP_BYTES)
        this.prepare()
        _sync_all(disk.path)
        try:
            _cut_and_resume(this, disk, rng)
        except (OSError, RuntimeError, FeatcacheError) as exc:
            if not unsynced:
                raise
            this.blame(f"the round cannot go on: {exc}")
        outcome = this.outcome
        outcome.figures[f"rounds on {mode}"] = 1
        del this
    if unsynced:
        broken = bool(outcome.violations)
        figures = dict(zip(CONTROLS[1], (1, int(broken)), strict=True))
        outcome = Outcome(round=number, kind=outcome.kind, figures=figures)
    outcome.seconds = time.monotonic() - begun
    return outcome


def _cut_and_resume(this: Round, disk: CutDisk, rng: Random) -> None:
    outcome = this.outcome
    control_file = disk.path / "control.h5"
    for attempt in range(rng.choice((1, 1, 1, 2, 2, 3))):
        moment = this.draw_moment()
        flag = rng.choices(tuple(FLAGS), weights=(0, 0, 1) if this.sabotage else (8, 12, 80))[0]
        if this.rng.random() < 0.2 and not this.sabotage:
            _kill_only(this, moment)
            continue
        log = this.bench.logs / "control.log"
        control = Run(flush_forever(control_file), log=log) if rng.random() < 0.3 else None
        if control:
            control.wait_for("flushed", HANG_SECONDS)
        run = _start_until(this, moment)
        disk.cut(FLAGS[flag])
        run.kill()
        outcome.phases.append(this.phase(run))
        outcome.figures[f"cuts, {flag}"] = outcome.figures.get(f"cuts, {flag}", 0) + 1
        outcome.resumes += attempt > 0
        outcome.recoveries_stopped += attempt > 0 and outcome.phases[-1] != FINISHED
        this.hear(run)
        if control:
            control.kill()
        disk.unmount()
        disk.mount()
        if control and FLAGS[flag] != 0:
            _count_control(outcome, lost=lost_rows(control_file, control))
        control_file.unlink(missing_ok=True)
        if not this.folder.exists():  # nothing synced the folder of the stores: only without syncs
            raise OSError("the folder of the stores is lost")
        this.judge(run)
        if outcome.phases[-1] == FINISHED:
            _judge_acknowledged_end(this)
            break
        if this.kind == "grow" and rng.random() < 0.2 and not has_name(this):
            this.change_tree()
    run_to_the_end(this)


def _start_until(this: Round, moment: Moment) -> Run:
    run = this.start()
    # A cut comes from outside, at no step of the child's own.
    if run.wait_for("total" if moment.step else moment.event, HANG_SECONDS):
        wait(moment.delay)
    return run


def _kill_only(this: Round, moment: Moment) -> None:
    """A kill leaves in memory what is not on the disk: the next run must not take it for safe."""
    run = _start_until(this, moment)
    run.kill()
    this.hear(run)
    this.outcome.figures[KILLED] = this.outcome.figures.get(KILLED, 0) + 1


def _count_control(outcome: Outcome, *, lost: bool) -> None:
    for name, more in zip(CONTROLS[0], (1, int(lost)), strict=True):
        outcome.figures[name] = outcome.figures.get(name, 0) + more


def _judge_acknowledged_end(this: Round) -> None:
    """The run said that it was done before the power went: all of it must be there."""
    store = FeatureStore.open(this.store, check=False) if this.store.exists() else None
    if store is None or columns_of(store) != this.tree.columns:
        this.blame("the run had ended, and its store is not there whole")


def _sync_all(folder: Path) -> None:
    """What was there before the round is on the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


_benches: dict[str, Bench] = {}  # of this process


def cut_rounds(folder: str, seed: str, numbers: range) -> list[Outcome]:
    """Some rounds, in a process of a pool; its data sets are kept from one call to the next."""
    if folder not in _benches:
        leave_signals_to_the_owner()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # with the owner, and the mounts with us
        own_mounts()
        own = Path(tempfile.mkdtemp(dir=folder))
        _benches[folder] = Bench(own, seed=seed, rows=(40, 80), backbone=BACKBONE)
    return [cut_round(_benches[folder], number, seed=seed) for number in numbers]
