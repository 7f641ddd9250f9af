"""Embedding on one GPU against the slower of two limits: decoding on the processors, and the forward pass.

    python scripts/bench_gpu.py [--networks resnet50,vit_b_16] [--precisions bfloat16,float32] [--images N]
    python scripts/bench_gpu.py --device cpu        # the same, small, to see that it runs

Needs torch, torchvision, featcache and no files: weights are drawn from a seed, and so are the JPEGs of 500 x
375, with the spectrum and the edges of photographs. Every image is a file of its own in a scratch folder; one
in some hundreds shows the same picture in other bytes.

  decoding   encoded images in memory to pixels, all processors busy, by decoder
  forward    pixels on the device, by form and batch size, timed by CUDA events
  engine     featcache's engines: pixels from memory to the device, features back, called as in a run
  featcache  `featcache.embed` into a new store; how busy its stages and the GPU were during the pass
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_embed_limit import CORES, decoding_rates, image_paths, rate_of_calls, with_comment
from PIL import Image

from featcache import embed, load_backbone
from featcache.engines import DEFAULT_ENGINE, batch_sizes, make_engine, other_engines
from featcache.engines.agreement import noise
from featcache.errors import DeviceError
from featcache.progress import SilentProgress

WIDTH, HEIGHT, CLASSES = 500, 375, 10
SCENES = {"cuda": 256, "cpu": 16}  # different pictures
IMAGES = {"cuda": 16_384, "cpu": 48}
BATCHES = {"cuda": (32, 64, 128, 256, 512, 1024), "cpu": (1, 4)}
COMPILED_BATCH = 256  # the only one: compiling takes long
SECONDS = {"cuda": 2.0, "cpu": 0.5}  # of each measurement
NAMES = {"resnet50": "resnet50@IMAGENET1K_V1"}

# What torch raises where memory does not suffice, and its compiler where it cannot compile.
COMPILE_ERRORS = (RuntimeError, ImportError, OSError)


# JPEGs


def scene(seed: int) -> bytes:
    """A JPEG of some 100 KB: noise whose spectrum falls like that of photographs, and shapes with edges."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None] * HEIGHT, np.fft.rfftfreq(WIDTH)[None] * WIDTH)
    spectrum = 1 / np.maximum(frequency, 1) ** 1.2
    planes = []
    for weight in (1.0, 0.5, 0.3):  # brightness, and two planes of colour
        phases = np.exp(2j * np.pi * rng.random(spectrum.shape))
        plane = np.fft.irfft2(spectrum * phases, s=(HEIGHT, WIDTH))
        planes.append(weight * plane / plane.std())
    light, red, blue = planes
    pixels = 128 + 45 * np.stack([light + red, light - red / 2 - blue / 2, light + blue], axis=-1)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for _ in range(6):
        centre, radii = rng.random(2) * (HEIGHT, WIDTH), rng.uniform(15, 90, 2)
        inside = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1
        pixels[inside] += rng.uniform(-60, 60, 3)
    encoded = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def write_images(folder: Path, *, images: int, scenes: int) -> None:
    """Class folders of `images` files, no two of the same bytes."""
    made = [scene(seed) for seed in range(min(scenes, images))]
    for index in range(images):
        target = folder / f"class-{index % CLASSES}" / f"{index:06}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(with_comment(made[index % len(made)], index))


# The forward pass alone


def forward_rates(backbone: Any, *, device: torch.device, precision: str, compiled: bool) -> dict[str, float]:
    """{form and batch size: images per second} of the network alone."""
    dtype = getattr(torch, precision)
    network = backbone.module.eval().to(device).to(memory_format=torch.channels_last)
    forms: dict[str, Callable[..., Any]] = {"eager": network}
    if precision != "float32":
        forms = {"autocast": _autocast(network, device, dtype), "cast": _cast(network, dtype)}
    plain = list(itertools.product(forms, BATCHES[device.type]))
    if compiled:
        last = next(reversed(forms.values()))
        forms["compiled"] = torch.compile(last, dynamic=False)
        plain.append(("compiled", COMPILED_BATCH))
    rates = {}
    # The library's best algorithms, but float32 as featcache means it.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        for name, batch in plain:
            try:
                rates[f"{name}, batch {batch}"] = forward_rate(
                    forms[name], _normalised(backbone, batch, device)
                )
            except COMPILE_ERRORS as error:  # too large a batch is one of them
                print(f"    {name}, batch {batch}: {type(error).__name__}, left out")
    return rates


def _normalised(backbone: Any, batch: int, device: torch.device) -> torch.Tensor:
    size = backbone.preprocessing.crop_size
    return torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)


def _autocast(network: Any, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    def forward(images: torch.Tensor) -> Any:
        with torch.autocast(device.type, dtype=dtype):
            return network(images)

    return forward


def _cast(network: Any, dtype: torch.dtype) -> Callable[..., Any]:
    lowered = copy.deepcopy(network).to(dtype)

    def forward(images: torch.Tensor) -> Any:
        return lowered(images.to(dtype))

    return forward


def forward_rate(form: Callable[..., Any], images: torch.Tensor) -> float:
    """Images per second of one batch again and again, between two events of its stream."""
    with torch.inference_mode():
        for _ in range(3):
            form(images)
        seconds = _seconds_of(partial(form, images), 1, images.device)
        times = max(1, round(SECONDS[images.device.type] / seconds))
        return times * len(images) / _seconds_of(partial(form, images), times, images.device)


def _seconds_of(call: Callable[[], Any], times: int, device: torch.device) -> float:
    if device.type != "cuda":
        begun = time.perf_counter()
        for _ in range(times):
            call()
        return time.perf_counter() - begun
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(times):
        call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def engine_rates(backbone: Any, *, device: torch.device, precision: str) -> dict[str, float]:
    """Images per second of featcache's engines, from pixels in memory to features in memory."""
    rates = {}
    for name in (DEFAULT_ENGINE, *other_engines(precision)):  # type: ignore[arg-type]
        for batch in batch_sizes(name, device.type):
            try:
                engine = make_engine(
                    backbone,
                    device=str(device),
                    precision=precision,  # type: ignore[arg-type]
                    batch_size=batch,
                    engine=name,
                )
                rates[f"{name}, batch {batch}"] = _engine_rate(engine, backbone, device)
            except DeviceError as error:
                print(f"    {name}, batch {batch}: {error}")
                break
    return rates


def _engine_rate(engine: Any, backbone: Any, device: torch.device) -> float:
    local = threading.local()

    def one() -> int:
        if not hasattr(local, "pixels"):
            local.pixels = engine.allocate()
            local.pixels[:] = noise(engine.batch_size, backbone.preprocessing.crop_size)
            if device.type == "cpu":
                torch.set_num_threads(1)
        engine.embed(local.pixels)
        return int(engine.batch_size)

    return rate_of_calls(one, calls=engine.callers or CORES, seconds=SECONDS[device.type])


# The whole


class Watch(SilentProgress):
    """Notes the stage times of a pass, and asks how busy the GPU is while it lasts."""

    def __init__(self) -> None:
        self.stages: Mapping[str, float] = {}
        self.notes: list[str] = []
        self.running = False

    def start(self, label: str, *, total: int, unit: str) -> None:
        self.running = True

    def advance(self, count: int, *, stages: Mapping[str, float] | None = None) -> None:
        self.stages = stages or self.stages

    def finish(self) -> None:
        self.running = False

    def note(self, message: str) -> None:
        self.notes.append(message)


@contextmanager
def utilisation(watch: Watch, device: torch.device) -> Iterator[list[tuple[float, float]]]:
    """While entered, (percent busy, MiB in use) of the GPU ten times a second while the pass runs."""
    samples: list[tuple[float, float]] = []
    program = shutil.which("nvidia-smi") if device.type == "cuda" else None
    if program is None:
        yield samples
        return
    query = ["--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "100"]
    command = [program, *query, f"--id={device.index or 0}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def read() -> None:
        for line in process.stdout or ():
            values = [value.strip() for value in line.split(",")]
            if watch.running and all(value.isdigit() for value in values):
                samples.append((float(values[0]), float(values[1])))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield samples
    finally:
        process.terminate()
        process.wait()
        reader.join()


def bench_whole(
    folder: Path, name: str, *, device: torch.device, precision: str, rounds: int
) -> tuple[list[float], str]:
    """Images per second of each round, and words on the last."""
    speeds, words = [], ""
    for index in range(rounds):
        store, watch = folder.parent / f"{name}-{precision}-{index}.h5", Watch()
        with utilisation(watch, device) as samples:
            result = embed(
                folder,
                store,
                backbone=NAMES.get(name, name),
                weights="random",
                device=str(device),
                precision=precision,  # type: ignore[arg-type]
                progress=watch,
            )
        store.unlink()
        speeds.append(result.images_per_second)
        seconds = result.embedded / result.images_per_second
        stages = ", ".join(f"{stage} {busy / seconds:.0%}" for stage, busy in watch.stages.items())
        words = f"stages busy: {stages}; {_busy(samples)}; {result.seconds:.1f} s in all"
        words += "".join(f"\n      {note}" for note in watch.notes)
    return speeds, words


def _busy(samples: Sequence[tuple[float, float]]) -> str:
    if not samples:
        return "the GPU's utilisation is not known here"
    busy = [percent for percent, _ in samples]
    most = max(used for _, used in samples)
    return (
        f"GPU busy {statistics.mean(busy):.0f} % (median {statistics.median(busy):.0f} % of {len(busy)}), "
        f"{most:,.0f} MiB"
    )


def bench(folder: Path, options: argparse.Namespace, device: torch.device) -> None:
    for name in options.networks.split(","):
        backbone = load_backbone(NAMES.get(name, name), weights="random")
        decoding = decoding_rates(
            image_paths(str(folder))[:512], vars(backbone.preprocessing), seconds=SECONDS[device.type]
        )
        print(f"\n{name}\n  decoding, images/s: {_ranked(decoding)}", flush=True)
        for precision in options.precisions.split(","):
            forward = forward_rates(backbone, device=device, precision=precision, compiled=options.compile)
            print(f"  {precision}\n    forward, images/s: {_ranked(forward)}", flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            # Loaded anew: the network has been moved about.
            backbone = load_backbone(NAMES.get(name, name), weights="random")
            engines = engine_rates(backbone, device=device, precision=precision)
            print(f"    engine, images/s: {_ranked(engines)}", flush=True)
            speeds, words = bench_whole(
                folder, name, device=device, precision=precision, rounds=options.rounds
            )
            fastest = max(*forward.values(), *engines.values())
            limit = limit_of(max(decoding.values()), fastest, device)
            speed = statistics.median(speeds)
            print(
                f"    featcache {speed:,.0f} images/s ({min(speeds):,.0f}–{max(speeds):,.0f}), "
                f"{speed / limit:.2f} of the limit {limit:,.0f}\n    {words}",
                flush=True,
            )


def limit_of(decoding: float, forward: float, device: torch.device) -> float:
    """The slower of the two; where both are the processors' work, one after the other."""
    return min(decoding, forward) if device.type != "cpu" else 1 / (1 / decoding + 1 / forward)


def _ranked(rates: Mapping[str, float]) -> str:
    ranked = sorted(rates.items(), key=lambda item: -item[1])
    return "; ".join(f"{name} {rate:,.0f}" for name, rate in ranked)


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{name}, {CORES} processors, {versions}, load {load}; {time.strftime('%Y-%m-%d %H:%M')}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--networks", default="resnet50,vit_b_16")
    parser.add_argument("--precisions", default="bfloat16,float32")
    parser.add_argument("--images", type=int)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no GPU for torch: pass --device cpu to see that the script runs")
    options.compile = device.type == "cuda" if options.compile is None else options.compile
    print(machine(device), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as scratch:
        folder, begun = Path(scratch) / "images", time.perf_counter()
        images = options.images or IMAGES[device.type]
        write_images(folder, images=images, scenes=SCENES[device.type])
        size = sum(path.stat().st_size for path in folder.rglob("*.jpg")) / images
        print(f"{images:,} JPEGs of {size / 1e3:.0f} KB written in {time.perf_counter() - begun:.1f} s")
        bench(folder, options, device)


if __name__ == "__main__":
    main()
