"""What decoders do to the process they run in, on demand: the first word of a file says what."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from featcache.images.decode import Decoder, LoadedPictures, load_pictures
from featcache.images.identity import ImageFailure
from featcache.records import NO_FILE, RowStatus
from featcache.spec import Picture


def crash() -> None:
    ctypes.string_at(0)


def leave() -> None:
    os._exit(3)


def sleep() -> None:
    time.sleep(600)


def doze() -> None:
    time.sleep(0.5)


def keep_the_interpreter_lock() -> None:
    ctypes.PyDLL(None).sleep(600)


def run_out_of_memory() -> None:
    raise MemoryError


def have_a_bug() -> None:
    raise KeyError("a bug of ours")


def warn() -> None:
    warnings.warn("an odd picture", UserWarning, stacklevel=1)


def write() -> None:
    for descriptor in (1, 2):
        os.write(descriptor, b"noise of a library\n" * 10_000)


DEEDS: Mapping[bytes, Callable[[], None]] = {
    deed.__name__.encode(): deed
    for deed in (
        *(crash, leave, sleep, doze, keep_the_interpreter_lock, run_out_of_memory),
        *(have_a_bug, warn, write),
    )
}


def load(
    path: str | Path, pictures: Sequence[Picture], *, decoder: Decoder, max_pixels: int
) -> LoadedPictures | ImageFailure:
    """`load_pictures`, after the deed that the file asks for; beside it `.begun` appears as that begins."""
    word = Path(path).read_bytes().split(b" ")[0] if os.path.isfile(path) else b""
    if word == b"state":
        return ImageFailure(status=RowStatus.UNDECODABLE, reason=_state(), stat=NO_FILE)
    if word in DEEDS:
        Path(f"{path}.begun").touch()
        DEEDS[word]()
    return load_pictures(path, pictures, decoder=decoder, max_pixels=max_pixels)


def _state() -> str:
    torch = "with" if "torch" in sys.modules else "without"
    core, _ = resource.getrlimit(resource.RLIMIT_CORE)
    return f"{os.getpid()} {torch} torch, core {core}, oom {Path('/proc/self/oom_score_adj').read_text()}"
