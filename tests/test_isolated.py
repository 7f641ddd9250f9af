"""Decoding in processes: what `load_pictures` answers, and what an image that breaks its process costs."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.errors import DeviceError
from featcache.images import isolated
from featcache.images.decode import LoadedPictures, load_pictures
from featcache.images.identity import ImageFailure, file_stat
from featcache.images.isolated import IsolatedDecoder
from featcache.records import RowStatus
from featcache.spec import Picture, Preprocessing

PICTURE = Picture(preprocessing=Preprocessing(resize_size=12, crop_size=8))
LARGE = Picture(preprocessing=Preprocessing(resize_size=90, crop_size=80, interpolation="bicubic"))
VIEWS = tuple(replace(PICTURE, view=view, seed=7) for view in range(3))
BAD = "bad_decoders:load"
PATIENCE = 60.0  # seconds that nothing here takes


@pytest.fixture(scope="module")
def decoder() -> Iterator[IsolatedDecoder]:
    with IsolatedDecoder(seconds=PATIENCE, max_pixels=10_000) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def hardy() -> Iterator[IsolatedDecoder]:
    """Meets bad decoders, with patience."""
    with IsolatedDecoder(seconds=PATIENCE, load=BAD) as decoder:
        yield decoder


def bad_file(folder: Path, deed: str) -> Path:
    path = folder / f"{deed}.jpg"
    path.write_bytes(deed.encode() + b" is what this file does")
    return path


def process_of(decoder: IsolatedDecoder, folder: Path) -> int:
    answer = decoder.load(bad_file(folder, "state"), [PICTURE])
    assert isinstance(answer, ImageFailure)
    return int(answer.reason.split()[0])


def is_alive(process: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(is_so: Callable[[], bool], *, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def at_work(decoder: IsolatedDecoder, path: Path) -> Iterator[Future[LoadedPictures | ImageFailure]]:
    """The outcome to come of a bad file, once its deed has begun."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(decoder.load, path, [PICTURE])
        wait_until(Path(f"{path}.begun").exists)
        yield asked


def comparable(outcome: LoadedPictures | ImageFailure) -> object:
    """All of an outcome, to be compared."""
    if isinstance(outcome, ImageFailure):
        return outcome
    pixels = [(array.shape, array.dtype, array.tobytes()) for array in outcome.pixels]
    return pixels, outcome.sha256, outcome.stat, outcome.note


def encoded(image_format: str, *, mode: str = "RGB", size: tuple[int, int] = (31, 23)) -> bytes:
    rng = np.random.default_rng(len(image_format))
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
    frames = {"save_all": True, "append_images": [image.rotate(180)]} if image_format == "GIF" else {}
    file = io.BytesIO()
    image.save(file, image_format, **frames)
    return file.getvalue()


FILES: dict[str, bytes] = {
    **{image_format: encoded(image_format) for image_format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF")},
    "grey": encoded("JPEG", mode="L"),
    "transparent": encoded("PNG", mode="RGBA"),
    "tiny": encoded("PNG", size=(1, 3)),
    "too large": encoded("PNG", size=(200, 100)),
    "truncated": encoded("JPEG")[:300],
    "empty": b"",
    "no image": b"<html>\nnot found</html>",
    "line\nbreak \\ \u00e9.jpg": encoded("JPEG"),
    os.fsdecode(b"\xff\xfe not utf-8.jpg"): encoded("PNG"),
}


# --- the same answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES, ids=ascii)
@pytest.mark.parametrize("pictures", [(PICTURE,), (PICTURE, LARGE, *VIEWS), (LARGE,), ()], ids=len)
def test_the_outcome_is_that_of_threads(
    decoder: IsolatedDecoder, tmp_path: Path, name: str, pictures: tuple[Picture, ...]
) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    ours = decoder.load(path, pictures)
    assert comparable(ours) == comparable(load_pictures(path, pictures, max_pixels=10_000))


def test_what_is_no_file_is_what_it_is_for_threads(decoder: IsolatedDecoder, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "loop", Path(os.devnull)):
        assert decoder.load(path, [PICTURE]) == load_pictures(path, [PICTURE])


def test_a_relative_path_is_relative_to_where_the_caller_is(
    decoder: IsolatedDecoder,
    tmp_path: Path,
    save_image: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = save_image(tmp_path / "there" / "a.png")
    decoder.load(path, [PICTURE])
    monkeypatch.chdir(path.parent)
    for named in ("a.png", Path("a.png"), "../there/a.png"):
        assert isinstance(decoder.load(named, [PICTURE]), LoadedPictures)


def test_pixels_are_the_callers_own_and_alike_pictures_one_array(
    decoder: IsolatedDecoder, tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    first, other = (save_image(tmp_path / f"{seed}.png", seed=seed) for seed in range(2))
    normalised = replace(PICTURE.preprocessing, mean=(0.1, 0.2, 0.3))
    held = decoder.load(first, [PICTURE, replace(PICTURE, preprocessing=normalised)])
    assert isinstance(held, LoadedPictures)
    assert held.pixels[0] is held.pixels[1]
    before = held.pixels[0].copy()
    decoder.load(other, [PICTURE, PICTURE])
    assert np.array_equal(held.pixels[0], before)


def test_a_fast_decoder_is_fast_in_its_process(tmp_path: Path, save_image: Callable[..., Path]) -> None:
    path = save_image(tmp_path / "a.png", size=(64, 48))
    with IsolatedDecoder(decoder="fast", seconds=PATIENCE, load=BAD) as fast:
        state = fast.load(bad_file(tmp_path, "state"), [PICTURE])
        assert isinstance(state, ImageFailure)
        assert "with torch" in state.reason, "importing it is not on an image's time"
        ours = fast.load(path, [LARGE])
    assert comparable(ours) == comparable(load_pictures(path, [LARGE], decoder="fast"))
    assert comparable(ours) != comparable(load_pictures(path, [LARGE]))


def test_preprocessing_that_is_refused_is_the_callers_mistake(
    decoder: IsolatedDecoder, tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    blunt = Picture(preprocessing=replace(PICTURE.preprocessing, antialias=False))
    path = save_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="antialias=False is not available"):
        decoder.load(path, [blunt])
    assert isinstance(decoder.load(path, [PICTURE]), LoadedPictures)


# --- what an image does to its process ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("crash", "its decoder died (SIGSEGV)"),
        ("leave", "its decoder died (exit status 3)"),
        ("run_out_of_memory", "not enough memory to decode it"),
    ],
)
def test_an_image_that_ends_its_process_costs_itself(
    hardy: IsolatedDecoder, tmp_path: Path, save_image: Callable[..., Path], deed: str, reason: str
) -> None:
    path = bad_file(tmp_path, deed)
    failure = hardy.load(path, [PICTURE])
    assert failure == ImageFailure(
        status=RowStatus.UNDECODABLE,
        reason=reason,
        stat=file_stat(path.stat()),
        sha256=sha256(path.read_bytes()).digest(),
    )
    assert isinstance(hardy.load(save_image(tmp_path / "next.png"), [PICTURE]), LoadedPictures)


@pytest.mark.parametrize("deed", ["sleep", "keep_the_interpreter_lock"])
def test_an_image_that_takes_too_long_costs_itself(
    tmp_path: Path, save_image: Callable[..., Path], deed: str
) -> None:
    path = bad_file(tmp_path, deed)
    with IsolatedDecoder(seconds=0.5, load=BAD) as hasty:
        process = process_of(hasty, tmp_path)
        begun = time.monotonic()
        failure = hasty.load(path, [PICTURE])
        assert 0.4 < time.monotonic() - begun < 10
        assert failure == ImageFailure(
            status=RowStatus.TOO_SLOW,
            reason="took more than 0.5 s to decode",
            stat=file_stat(path.stat()),
            sha256=sha256(path.read_bytes()).digest(),
        )
        assert not is_alive(process)
        assert isinstance(hasty.load(save_image(tmp_path / "next.png"), [PICTURE]), LoadedPictures)


def test_a_process_killed_between_two_images_costs_none(hardy: IsolatedDecoder, tmp_path: Path) -> None:
    process = process_of(hardy, tmp_path)
    os.kill(process, signal.SIGKILL)
    assert process_of(hardy, tmp_path) != process


def test_a_process_killed_at_work_costs_its_image(hardy: IsolatedDecoder, tmp_path: Path) -> None:
    process = process_of(hardy, tmp_path)
    with at_work(hardy, bad_file(tmp_path, "sleep")) as asked:
        os.kill(process, signal.SIGKILL)
        failure = asked.result(PATIENCE)
    assert isinstance(failure, ImageFailure)
    assert (failure.status, failure.reason) == (RowStatus.UNDECODABLE, "its decoder died (SIGKILL)")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_the_image_in_hand_alone(
    hardy: IsolatedDecoder, tmp_path: Path, signum: signal.Signals
) -> None:
    process = process_of(hardy, tmp_path)
    assert os.getpgid(process) != os.getpgrp(), "Ctrl-C of a terminal must not come there"
    with at_work(hardy, bad_file(tmp_path, "doze")) as asked:
        os.kill(process, signum)
        failure = asked.result(PATIENCE)
    assert isinstance(failure, ImageFailure)
    assert failure.reason == "not an image: begins with 'doze is what this file d'"
    assert process_of(hardy, tmp_path) == process


def test_a_bug_keeps_its_traceback(hardy: IsolatedDecoder, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="decoding raised KeyError") as caught:
        hardy.load(bad_file(tmp_path, "have_a_bug"), [PICTURE])
    assert 'raise KeyError("a bug of ours")' in caught.value.__notes__[0]


@pytest.mark.parametrize("action", ["ignore", "error"])
def test_a_warning_is_there_what_it_is_here(tmp_path: Path, action: str) -> None:
    path = bad_file(tmp_path, "warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error" if action == "ignore" else "ignore")
        warnings.filterwarnings(action, message="an ODD", module="bad_")  # type: ignore[arg-type]
        with IsolatedDecoder(seconds=PATIENCE, load=BAD) as decoder:
            if action == "ignore":
                assert isinstance(decoder.load(path, [PICTURE]), ImageFailure)
            else:
                with pytest.raises(RuntimeError, match="decoding raised UserWarning"):
                    decoder.load(path, [PICTURE])


def test_a_process_has_what_it_needs_and_no_more(tmp_path: Path) -> None:
    cores = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (cores[1], cores[1]))
    try:
        with IsolatedDecoder(seconds=PATIENCE, load=BAD) as decoder:
            state = decoder.load(bad_file(tmp_path, "state"), [PICTURE])
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, cores)
    assert isinstance(state, ImageFailure)
    assert "without torch, core 0, oom 500" in state.reason


def test_a_process_that_does_not_start_is_a_known_failure() -> None:
    with (
        IsolatedDecoder(seconds=1, load="no_such_module:load") as decoder,
        pytest.raises(DeviceError, match="does not start: ModuleNotFoundError: No module named 'no_such_m"),
    ):
        decoder.load("a.jpg", [PICTURE])


def test_where_there_can_be_no_process_it_is_said_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(isolated.subprocess, "Popen", refuse)
    before = os.listdir("/proc/self/fd")
    with (
        IsolatedDecoder(seconds=1) as decoder,
        pytest.raises(DeviceError, match="cannot be started: Resource temporarily unavailable. Use fewer"),
    ):
        decoder.load("a.jpg", [PICTURE])
    assert os.listdir("/proc/self/fd") == before


def test_an_interrupted_caller_leaves_no_answer_to_the_next(
    hardy: IsolatedDecoder, tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    slow, path = bad_file(tmp_path, "doze"), save_image(tmp_path / "next.png")

    def interrupt() -> None:
        wait_until(Path(f"{slow}.begun").exists)
        os.kill(os.getpid(), signal.SIGINT)

    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(interrupt)
            with pytest.raises(KeyboardInterrupt):
                hardy.load(slow, [PICTURE])
    finally:
        signal.signal(signal.SIGINT, former)
    assert comparable(hardy.load(path, [PICTURE])) == comparable(load_pictures(path, [PICTURE]))


def test_a_time_of_nothing_is_refused() -> None:
    for seconds in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="a positive number of seconds"):
            IsolatedDecoder(seconds=seconds)


# --- many threads, and the end --------------------------------------------------------------------------


def test_threads_get_their_own_pictures_from_as_many_processes(
    tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    paths = [save_image(tmp_path / f"{seed}.png", seed=seed) for seed in range(40)]
    wanted = [comparable(load_pictures(path, [PICTURE, LARGE])) for path in paths]
    bad = bad_file(tmp_path, "crash")
    with IsolatedDecoder(seconds=PATIENCE, load=BAD) as decoder:
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(decoder.load, path, [PICTURE, LARGE]) for path in [*paths, bad, *paths]]
            outcomes = [comparable(each.result(PATIENCE)) for each in asked]
        assert outcomes[:40] == outcomes[41:] == wanted
        assert len(decoder._workers) <= 4


def test_one_thread_is_served_by_one_process(hardy: IsolatedDecoder, tmp_path: Path) -> None:
    def ask_in_another_thread() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(process_of, hardy, tmp_path).result(PATIENCE)

    assert ask_in_another_thread() == ask_in_another_thread() == process_of(hardy, tmp_path)


def test_closing_ends_what_is_decoding(tmp_path: Path) -> None:
    decoder = IsolatedDecoder(seconds=PATIENCE, load=BAD)
    process = process_of(decoder, tmp_path)
    with at_work(decoder, bad_file(tmp_path, "sleep")) as asked:
        decoder.close()
        with pytest.raises(RuntimeError, match="the decoder is closed"):
            asked.result(PATIENCE / 4)
    assert not is_alive(process)
    with pytest.raises(RuntimeError, match="the decoder is closed"):
        decoder.load("a.jpg", [PICTURE])
    decoder.close()


LEAVES_NOTHING = """
import os, sys, threading
from featcache.images.isolated import IsolatedDecoder
from test_isolated import BAD, PICTURE, bad_file
from pathlib import Path
folder = Path(sys.argv[1])
before = os.listdir("/proc/self/fd"), os.listdir("/dev/shm")
with IsolatedDecoder(seconds=1.5, load=BAD) as decoder:
    outcomes = [
        decoder.load(bad_file(folder, deed), [PICTURE]).status.name
        for deed in ("crash", "sleep", "write", "warn")
    ]
assert outcomes == ["UNDECODABLE", "TOO_SLOW", "UNDECODABLE", "UNDECODABLE"], outcomes
assert (os.listdir("/proc/self/fd"), os.listdir("/dev/shm")) == before
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    sys.exit(7)
"""


def test_no_zombie_no_descriptor_and_no_noise_is_left(tmp_path: Path) -> None:
    ran = run_python(LEAVES_NOTHING, tmp_path)
    out, err = ran.communicate(timeout=PATIENCE)
    assert (out, err, ran.returncode) == ("", "", 7)


AT_WORK = """
import sys, threading
from featcache.images.isolated import IsolatedDecoder
from test_isolated import BAD, PATIENCE, PICTURE, process_of
from pathlib import Path
decoder = IsolatedDecoder(seconds=PATIENCE, load=BAD)
barrier = threading.Barrier(3)
def work(path):
    barrier.wait()
    print(process_of(decoder, path.parent), flush=True)
    barrier.wait()
    if path.name != "idle.jpg":
        decoder.load(path, [PICTURE])
for path in sys.argv[1:]:
    threading.Thread(target=work, args=(Path(path),)).start()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing ends a process that hangs in C")
def test_processes_end_with_the_one_that_asks_them(tmp_path: Path) -> None:
    deeds = ("sleep", "keep_the_interpreter_lock", "idle")
    folders = [tmp_path / deed for deed in deeds]
    for folder in folders:
        folder.mkdir()
    paths = [bad_file(folder, folder.name) for folder in folders]
    ran = run_python(AT_WORK, *paths)
    assert ran.stdout is not None
    processes = {int(ran.stdout.readline()) for _ in deeds}
    for path in paths[:2]:
        wait_until(Path(f"{path}.begun").exists)
    assert [process for process in processes if is_alive(process)] == list(processes)
    assert len(processes) == 3
    ran.kill()
    ran.communicate(timeout=PATIENCE)
    wait_until(lambda: not any(is_alive(process) for process in processes), seconds=1)


def run_python(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """The code, where it can import what is here; every warning shows."""
    return subprocess.Popen(
        [sys.executable, "-W", "default", "-c", code, *arguments],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
