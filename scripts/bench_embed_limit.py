"""How fast decoding and the forward pass are on a CPU, each alone: data in memory, every processor busy.

For `bench_embed_sides.py` and `bench_gpu.py`. Looks at every form of decoding and of calling a network that
it knows, featcache's and ones without featcache: a limit must not depend on who is measured against it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import os
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
IN_MEMORY = 1000  # encoded images
LOOK_SECONDS, TURN_SECONDS = 0.8, 1.5


def image_paths(folder: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).rglob("*.jpg"))


def with_comment(jpeg: bytes, number: int) -> bytes:
    """The same picture in other bytes."""
    comment = number.to_bytes(8, "big")
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]


def measure(job: Job) -> Job:
    """Images per second of decoding and of the forward pass; of all forms where none are named yet."""
    seconds = TURN_SECONDS if "forward" in job else LOOK_SECONDS
    paths, only = image_paths(job["all"]), job.get("decoding")
    random.Random(0).shuffle(paths)  # a turn sees a part of them
    forward = {
        name: rate(seconds) for name, rate in _forward_forms(job) if name in job.get("forward", [name])
    }
    decoding = decoding_rates(paths[:IN_MEMORY], job["preprocessing"], seconds=seconds, only=only)
    return {"decoding": decoding, "forward": forward}


def decoding_rates(
    paths: Sequence[str], how: Mapping[str, Any], *, seconds: float, only: Sequence[str] | None = None
) -> dict[str, float]:
    """Images per second by decoder, from encoded images in memory. how: values of `Preprocessing`."""
    import torch

    torch.set_num_threads(1)
    encoded = [(path, Path(path).read_bytes()) for path in paths]
    decoders = {name: decode for name, decode in _decoders(how).items() if name in (only or [name])}
    return {
        name: rate_of_calls(
            partial(_decode_next, decode, itertools.cycle(encoded)), calls=CORES, seconds=seconds
        )
        for name, decode in decoders.items()
    }


def _decode_next(decode: Callable[[Any], Any], images: Iterator[Any]) -> int:
    decode(next(images))  # of a cycle in C: a step that threads cannot interrupt
    return 1


def decoding_seconds(paths: Sequence[str], pictures: Sequence[Any]) -> float:
    """Of featcache making `pictures` of every file, all processors busy."""
    import torch

    from featcache.images.decode import load_pictures

    with ThreadPoolExecutor(CORES, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        begun = time.perf_counter()
        for _ in pool.map(partial(load_pictures, pictures=pictures, decoder="fast"), paths):
            pass
        return time.perf_counter() - begun


def rate_of_calls(one: Callable[[], int], *, calls: int, seconds: float) -> float:
    """What `one` gives a second, called from `calls` threads at once; first calls are not counted."""
    one()  # what it raises is to be seen here
    done, ends = [0] * calls, [0.0] * calls
    warm = threading.Barrier(calls + 1)

    def go(index: int) -> None:
        one()
        warm.wait()
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds:
            done[index] += one()
        ends[index] = time.perf_counter()

    threads = [threading.Thread(target=go, args=(index,)) for index in range(calls)]
    for thread in threads:
        thread.start()
    warm.wait()
    begun = time.perf_counter()
    for thread in threads:
        thread.join()
    return sum(done) / (max(ends) - begun)


def _decoders(how: Mapping[str, Any]) -> dict[str, Callable[[tuple[str, bytes]], Any]]:
    """{name: (path, bytes) to uint8 pixels (S, S, 3)}; all give the preset's to within 2 of 255."""
    resize, crop, mode = how["resize_size"], how["crop_size"], how["interpolation"]
    found: dict[str, Callable[[tuple[str, bytes]], Any]] = {
        "Pillow": lambda image: _with_pillow(_pillow(image[1]), resize, crop, mode),
        "Pillow + torch": lambda image: _with_torch(np.array(_pillow(image[1])), resize, crop, mode),
    }
    with contextlib.suppress(ImportError):
        import simplejpeg

        def simple(data: bytes) -> Any:
            return simplejpeg.decode_jpeg(data, colorspace="RGB")

        found["simplejpeg + torch"] = lambda image: _with_torch(simple(image[1]), resize, crop, mode)
    with contextlib.suppress(ImportError):
        from featcache.images.decode import load_pictures
        from featcache.spec import Picture, Preprocessing

        picture = [Picture(preprocessing=Preprocessing(**how))]

        def fast(path: str) -> Any:
            return load_pictures(path, picture, decoder="fast").pixels[0]

        found["featcache fast"] = lambda image: fast(image[0])
    return found


def _pillow(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def _resized(width: int, height: int, resize: int) -> tuple[int, int]:
    return (
        (resize, int(resize * height / width)) if width <= height else (int(resize * width / height), resize)
    )


def _with_pillow(image: Any, resize: int, crop: int, mode: str) -> Any:
    from PIL import Image

    image = image.resize(_resized(*image.size, resize), Image.Resampling[mode.upper()])
    left, top = round((image.width - crop) / 2), round((image.height - crop) / 2)
    return np.array(image.crop((left, top, left + crop, top + crop)))


def _with_torch(pixels: Any, resize: int, crop: int, mode: str) -> Any:
    import torch

    width, height = _resized(pixels.shape[1], pixels.shape[0], resize)
    images = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # so torch sees channels last
    images = torch.nn.functional.interpolate(
        images, size=(height, width), mode=mode, antialias=True, align_corners=False
    )
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    return images[0].permute(1, 2, 0)[top : top + crop, left : left + crop].contiguous().numpy()


def _forward_forms(job: Job) -> Iterable[tuple[str, Callable[[float], float]]]:
    """(form, its images per second): every engine here as it is to be called, and the libraries alone.

    Several calls of one thread at once, or one call that uses all processors. At a lower precision those that
    compute in it.
    """
    from featcache.backbones import load_backbone
    from featcache.engines import DEFAULT_ENGINE, batch_sizes, other_engines

    backbone = load_backbone(job["name"], weights=job["file"])
    precision = job.get("precision", "float32")
    for name in (DEFAULT_ENGINE, *other_engines(precision)):
        for batch in batch_sizes(name, "cpu"):
            yield f"{name}, batch {batch}", partial(_engine_rate, backbone, name, batch, precision)
    for calls, batch in itertools.product(sorted({1, CORES}), job["forward_batches"]):
        how = f"{calls} calls at once" if calls > 1 else "one call"
        yield f"torch alone, {how}, batch {batch}", partial(_module_rate, backbone, batch, calls, precision)
        if precision == "float32" and find_spec("onnxruntime"):
            form = f"ONNX Runtime alone, {how}, batch {batch}"
            yield form, partial(_session_rate, backbone, batch, calls)


def _engine_rate(backbone: Any, name: str, batch: int, precision: Any, seconds: float) -> float:
    import torch

    from featcache.engines import make_engine
    from featcache.engines.agreement import noise

    torch.set_num_threads(1)
    engine = make_engine(backbone, device="cpu", precision=precision, batch_size=batch, engine=name)
    pixels = noise(batch, backbone.preprocessing.crop_size)

    def one() -> int:
        torch.set_num_threads(1)  # it is each thread's own
        engine.embed(pixels)
        return batch

    return rate_of_calls(one, calls=engine.callers or CORES, seconds=seconds)


def _module_rate(backbone: Any, batch: int, calls: int, precision: str, seconds: float) -> float:
    """Of the bare network, its weights cast as a whole, whose images are normalised already."""
    import torch

    dtype = getattr(torch, precision)
    network = copy.deepcopy(backbone.module).eval().to(dtype=dtype, memory_format=torch.channels_last)
    images = torch.from_numpy(_normalised(batch, backbone))
    images = images.to(dtype=dtype, memory_format=torch.channels_last)

    def one() -> int:
        torch.set_num_threads(CORES // calls)
        with torch.inference_mode():
            network(images)
        return batch

    return rate_of_calls(one, calls=calls, seconds=seconds)


def _session_rate(backbone: Any, batch: int, calls: int, seconds: float) -> float:
    """Of a session with nothing around it, whose images are normalised already."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = CORES // calls, 3
    model = _export(backbone, batch)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    images = _normalised(batch, backbone)

    def one() -> int:
        session.run(None, {"images": images})
        return batch

    return rate_of_calls(one, calls=calls, seconds=seconds)


def _normalised(batch: int, backbone: Any) -> Any:
    size = backbone.preprocessing.crop_size
    return np.random.default_rng(0).normal(size=(batch, 3, size, size)).astype(np.float32)


@cache
def _export(backbone: Any, batch: int) -> bytes:
    import torch

    size = backbone.preprocessing.crop_size
    torch.backends.mha.set_fastpath_enabled(False)
    model = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            backbone.module.eval(),
            (torch.zeros(batch, 3, size, size),),
            model,  # type: ignore[arg-type]
            input_names=["images"],
            opset_version=17,
            dynamo=False,
        )
    return model.getvalue()
