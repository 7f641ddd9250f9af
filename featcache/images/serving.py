"""The process that decodes for another one: answers its requests until there is no one to ask.

It lives as long as the one that asks it (`isolated`): it ignores Ctrl-C and SIGTERM, for the images in hand
are still wanted then, and it ends when its standard input closes, which is when the other end is no more.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import resource
import signal
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from featcache.images.decode import LoadedPictures
from featcache.images.exchange import SharedPixels, as_line, pictures_from_json, transforms_of
from featcache.images.identity import ImageFailure
from featcache.interrupts import STOPPING
from featcache.records import RowStatus
from featcache.spec import Picture, Preprocessing
from featcache.transforms import import_transform

Load = Callable[[str, Sequence[Picture]], LoadedPictures | ImageFailure]

# As if half of the memory were its own: the kernel ends it before the process that holds the network.
_OOM_SCORE = "500"


def serve(settings: dict[str, Any]) -> None:
    """Answer requests until there is no one to ask. Owns its process."""
    _obey_the_near_end()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    module, _, name = settings["load"].partition(":")
    load = getattr(importlib.import_module(module), name)
    _filter_warnings(settings["warnings"])
    load = partial(load, **settings["options"])
    _warm_up(load)
    pixels = SharedPixels(settings["pixels"])
    with socket.socket(fileno=settings["socket"]) as near, near.makefile("rb") as requests:
        # From here on an end is told by its cause; what libraries write is nobody's to read.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        near.sendall(as_line({"ready": True}))
        for request in requests:
            try:
                answer = _answer(json.loads(request), load, pixels)
            except BaseException as error:
                near.sendall(as_line(_raised(error)))
                raise
            near.sendall(as_line(answer))


def _obey_the_near_end() -> None:
    """Let only the near end end this process, also where a decoder never comes back to Python."""
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    # When the last descriptor of the other end closes, Linux sends SIGIO, which ends a process. Elsewhere it
    # is ignored, and the process ends after the image in hand.
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGIO])
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, os.O_RDONLY | os.O_ASYNC)


def _filter_warnings(filters: Sequence[tuple[str, str, str, str, int]]) -> None:
    warnings.resetwarnings()
    for action, message, named, module, line in filters:
        home, _, name = named.partition(":")
        # A category of a module that is not here cannot be met here.
        category = getattr(sys.modules.get(home), name, None)
        if category is not None:
            warnings.filterwarnings(action, message, category, module, line, append=True)  # type: ignore[arg-type]


def _warm_up(load: Load) -> None:
    """Decode something harmless: importing what that takes is not on the first image's time."""
    with suppress(OSError), tempfile.NamedTemporaryFile() as file:  # on a full disk it can do without
        Image.new("RGB", (1, 1)).save(file, "JPEG")
        file.flush()
        load(file.name, (Picture(preprocessing=Preprocessing(resize_size=1, crop_size=1)),))


def _answer(request: Mapping[str, str], load: Load, pixels: SharedPixels) -> dict[str, Any]:
    pictures = pictures_from_json(request["pictures"])
    shared = pixels.hold(pictures)
    for name in transforms_of(pictures):
        import_transform(name)
    pixels.taken_up = True
    outcome = load(os.fsdecode(request["path"].encode("latin-1")), pictures)
    answer = {"sha256": outcome.sha256 and outcome.sha256.hex(), "stat": outcome.stat._asdict()}
    if isinstance(outcome, ImageFailure):
        return answer | {"status": outcome.status, "said": outcome.reason}
    firsts: dict[int, int] = {}  # of each array, the first picture that has it: alike pictures share one
    for place, (target, source) in enumerate(zip(shared, outcome.pixels, strict=True)):
        if firsts.setdefault(id(source), place) == place:
            target[:] = source
    places = [firsts[id(source)] for source in outcome.pixels]
    return answer | {"status": RowStatus.OK, "said": outcome.note, "pixels": places}


def _raised(error: BaseException) -> dict[str, Any]:
    return {"raised": type(error).__name__, "said": str(error), "trace": traceback.format_exc()}
