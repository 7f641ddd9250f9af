"""Images per second of embedding a folder of JPEGs on the CPU, side by side in one run.

    python scripts/bench_embed.py FOLDER [--networks efficientnet_lite0,resnet18] [--rounds 3] [--images N]
        [--peer-python PEERS/bin/python]... [--engine fastest] [--precision float32,bfloat16]
    python scripts/bench_embed.py FOLDER --three [--rounds 3] [--engine auto]

FOLDER has folders of classes with .jpg files, under train/ and val/ or not; they are copied to a scratch one.
The sides take turns, each turn in a process of its own, with the same weights: ImageNet's for
EfficientNet-Lite0, seeded ones for the others. Loading networks is not in the times.

  loop       PyTorch's transfer learning tutorial: ImageFolder, transforms, DataLoader, eager float32,
             no_grad; the number of workers is found first, the batches are of 4 (the tutorial's) and of 32
  peers      packages from pip, in the interpreters of --peer-python; those that are absent are skipped
  limit      1 / (seconds of decoding + seconds of the forward pass) an image, each alone with the data in
             memory and all processors busy, in the fastest form of a look at many
  featcache  `featcache embed` into a new store: the pass itself, and the wall of the whole command

The slower sides get fewer images of the same set. Lowest cosines are against the loop: PIL and float32.
--precision: of featcache, each with a limit of its own, in the fastest form at that precision.
--three: EfficientNet-Lite0, ResNet-18 and ResNet-50 in one pass against three runs, and what decoding costs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from bench_embed_limit import with_comment

SIDES = Path(__file__).with_name("bench_embed_sides.py")
LOOP_BATCHES = (4, 32)
REFERENCE = "loop, batch 32"
# The engine and batch size that win the look, which --engine auto finds where runs are long enough to look.
FASTEST = "fastest"
CLOSE = 2  # forms of the look that are measured again in every round; the faster counts


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network in the words of each side, and how many images make turns of some seconds."""

    name: str  # featcache's
    images: int
    loop_images: int  # of the loop and the peers
    timm: str
    module: str  # whose output thingsvision takes
    classifier: str = ""  # of torchvision's network
    img2vec: str = ""
    torchvision: bool = True
    tokens: bool = False
    forward_batches: tuple[int, ...] = (1, 4, 16)  # of the libraries alone, in the look


NETWORKS = {
    "efficientnet_lite0": Network(
        name="efficientnet_lite0", images=1200, loop_images=120, timm="tf_efficientnet_lite0",
        module="global_pool", torchvision=False,
    ),
    "resnet18": Network(
        name="resnet18", images=600, loop_images=120, timm="resnet18", module="avgpool", classifier="fc",
        img2vec="resnet18",
    ),
    "resnet50": Network(
        name="resnet50@IMAGENET1K_V1", images=240, loop_images=64, timm="resnet50", module="avgpool",
        classifier="fc", img2vec="resnet50",
    ),
    "vit_b_16": Network(
        name="vit_b_16", images=120, loop_images=32, timm="vit_base_patch16_224", module="encoder.ln",
        classifier="heads", tokens=True, forward_batches=(1, 4),
    ),
}  # fmt: skip


@dataclass
class Side:
    """What one side did, turn by turn."""

    speeds: list[float] = field(default_factory=list)
    walls: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)  # bytes
    vectors: str = ""


@dataclass
class Own:
    """featcache and its limit at one precision: the job of both, and what came of the limit's parts."""

    precision: str
    job: dict[str, Any]
    engine: tuple[str, ...]  # and more options of the command
    decoding: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)

    def name(self, side: str) -> str:
        return side if self.precision == "float32" else f"{side} {self.precision}"


@dataclass
class Bench:
    """One network on one machine: the job every side is handed, and what came of each."""

    network: Network
    job: dict[str, Any]
    scratch: Path
    owns: list[Own]
    sides: dict[str, Side] = field(default_factory=dict)

    def side(self, name: str) -> Side:
        vectors = self.scratch / f"{self.network.timm}-{len(self.sides)}.npz"
        return self.sides.setdefault(name, Side(vectors=str(vectors)))


def run(command: Sequence[str], *, scratch: Path) -> tuple[dict[str, Any], float, int]:
    """(what the last line printed says, wall seconds, peak resident bytes) of a process of its own."""
    environment = {**os.environ, "TORCH_HOME": str(scratch / "weights"), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment, cwd=scratch)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)[:200]} failed:\n{errors.read()[-3000:]}")
        text = out.read()
    kibibytes = usage.ru_maxrss if sys.platform != "darwin" else usage.ru_maxrss // 1024
    return _json_at_the_end(text), wall, kibibytes * 1024


def _json_at_the_end(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return json.loads(text.strip().splitlines()[-1])


def turn(side: str, job: dict[str, Any], *, scratch: Path, python: str = sys.executable) -> dict[str, Any]:
    return run([python, str(SIDES), side, json.dumps(job)], scratch=scratch)[0]


def copy_images(source: Path, target: Path, count: int) -> Path:
    """`count` of the JPEGs in class folders, evenly from all; where they are fewer, again in other bytes."""
    found = sorted(path for path in source.rglob("*/*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise SystemExit(f"{source} has no .jpg files in folders of classes")
    chosen = found[:: max(1, len(found) // count)]
    for index, path in enumerate(islice(cycle(chosen), count)):
        *above, label, name = path.relative_to(source).parts
        again = index // len(chosen)
        stem = "-".join([*above, Path(name).stem, *([str(again)] if again else [])])
        data = path.read_bytes()
        (target / label).mkdir(parents=True, exist_ok=True)
        (target / label / f"{stem}.jpg").write_bytes(with_comment(data, index) if again else data)
    return target


def prepare(network: Network, options: argparse.Namespace, scratch: Path) -> Bench:
    source = options.folder.resolve()
    images = options.images or network.images
    loop_images = min(network.loop_images, images)
    folder = copy_images(source, scratch / f"{network.timm}-all", images)
    some = copy_images(folder, scratch / f"{network.timm}-some", loop_images)
    job = {**asdict(network), "weights": str(scratch / "weights"), "scratch": str(scratch)}
    job |= turn("prepare", job, scratch=scratch)
    job |= {"folder": str(some), "all": str(folder), "batches": LOOP_BATCHES}
    owns = [
        Own(precision, {**job, "precision": precision}, (options.engine,))
        for precision in options.precision.split(",")
    ]
    return Bench(network=network, job=job, scratch=scratch, owns=owns)


def find_peers(pythons: Sequence[str], *, scratch: Path) -> dict[str, tuple[str, str]]:
    """{peer: (the interpreter that has it, its version)}."""
    found: dict[str, tuple[str, str]] = {}
    for python in pythons:
        there = turn("peers", {}, scratch=scratch, python=python)
        found |= {name: (python, version) for name, version in there.items()}
    for name in ("embetter", "img2vec_pytorch", "thingsvision"):
        if name not in found:
            print(f"{name} is not installed in any --peer-python: skipped")
    return found


def look(bench: Bench) -> None:
    """Find the loop's number of workers, and the forms of decoding and forward pass that are the fastest."""
    bench.job["workers"] = turn("tune_loop", bench.job, scratch=bench.scratch)
    print(f"\n{bench.network.name}")
    for own in bench.owns:
        look_at_forms(own, scratch=bench.scratch)


def look_at_forms(own: Own, *, scratch: Path) -> None:
    rates = turn("limit", own.job, scratch=scratch)
    for name in ("decoding", "forward"):
        ranked = sorted(rates[name].items(), key=lambda item: -item[1])
        own.job[name] = [form for form, _ in ranked[:CLOSE]]
        said = "; ".join(f"{form} {rate:.0f}" for form, rate in ranked)
        print(f"{own.name(name)}, images/s: {said}", flush=True)
    if own.engine[0] == FASTEST:
        fastest = next(form for form, _ in ranked if " alone" not in form)
        name, _, batch = fastest.partition(", batch ")
        own.engine = (name, "--batch-size", batch)


def play_round(bench: Bench, peers: dict[str, tuple[str, str]], *, first: int) -> None:
    """Every side once; each round begins with another of them."""
    turns = [partial(_take_loop, bench, batch) for batch in LOOP_BATCHES]
    for peer, (python, version) in peers.items():
        if peer != "img2vec_pytorch" or bench.network.img2vec:
            turns.append(partial(_take_peer, bench, peer, python, version))
    for own in bench.owns:
        turns += [partial(_take_limit, bench, own), partial(_take_featcache, bench, own)]
    first %= len(turns)
    for take in turns[first:] + turns[:first]:
        take()


def _take_loop(bench: Bench, batch: int) -> None:
    side = bench.side(f"loop, batch {batch}")
    how = {"batch": batch, "workers": bench.job["workers"][str(batch)], "vectors": side.vectors}
    said = turn("loop", {**bench.job, **how}, scratch=bench.scratch)
    side.speeds.append(said["images_per_second"])


def _take_peer(bench: Bench, peer: str, python: str, version: str) -> None:
    side = bench.side(f"{peer} {version}")
    said = turn(peer, {**bench.job, "vectors": side.vectors}, scratch=bench.scratch, python=python)
    side.speeds.append(said["images_per_second"])


def _take_limit(bench: Bench, own: Own) -> None:
    rates = turn("limit", own.job, scratch=bench.scratch)
    decoding, forward = (max(rates[name].values()) for name in ("decoding", "forward"))
    own.decoding.append(decoding)
    own.forward.append(forward)
    bench.side(own.name("limit")).speeds.append(1 / (1 / decoding + 1 / forward))


def _take_featcache(bench: Bench, own: Own) -> None:
    side = bench.side(own.name("featcache"))
    store = bench.scratch / "bench.h5"
    store.unlink(missing_ok=True)
    said, wall, peak = embed_alone(own.job, store, engine=own.engine, scratch=bench.scratch)
    side.speeds.append(said["images_per_second"])
    side.walls.append(wall)
    side.peaks.append(peak)
    job = {"store": str(store), "vectors": side.vectors}
    own.job |= turn("read_store", job, scratch=bench.scratch)


def embed_alone(
    job: dict[str, Any], store: Path, *, engine: Sequence[str], scratch: Path
) -> tuple[dict[str, Any], float, int]:
    """The command as anyone gives it."""
    command = [sys.executable, "-m", "featcache", "embed", job["all"], "-o", str(store), "--json"]
    command += ["--backbone", job["name"], "--device", "cpu", "--engine", *engine]
    command += ["--precision", job["precision"]]
    command += ["--weights", job["file"]] if job["file"] else []
    return run(command, scratch=scratch)


def report(bench: Bench) -> None:
    ours = bench.sides[bench.owns[0].name("featcache")]
    every = _count(bench.job["all"])
    print(f"\n| {bench.network.name} | images | images/s, median (range) | featcache × | lowest cosine |")
    print("|---|---:|---:|---:|---:|")
    for name, side in bench.sides.items():
        limited = next((own for own in bench.owns if own.name("limit") == name), None)
        mine = bench.sides[limited.name("featcache")] if limited else ours
        count = "" if limited else every if side.walls else _count(bench.job["folder"])
        ratios = [own / its for its, own in zip(side.speeds, mine.speeds, strict=True)]
        ratio, cosine = "" if side is ours else spread(ratios), _cosine(bench, name)
        print(f"| {_label(bench, name)} | {count} | {spread(side.speeds)} | {ratio} | {cosine} |")
    for own in bench.owns:
        report_own(bench, own, images=every)


def report_own(bench: Bench, own: Own, *, images: int) -> None:
    side = bench.sides[own.name("featcache")]
    print()
    for name, rates in (("decoding", own.decoding), ("forward", own.forward)):
        forms = " and ".join(own.job[name])
        print(f"{own.name('limit')}: {name} {spread(rates)} images/s, the faster of {forms}")
    print(f"the whole command, started and ended: {spread(side.walls)} s for {images} images")
    peak = statistics.median(side.peaks)
    _, _, alone = run(
        [sys.executable, str(SIDES), "network_alone", json.dumps(own.job)], scratch=bench.scratch
    )
    print(f"peak memory {peak / 1e6:,.0f} MB, of which the network in its engine alone {alone / 1e6:,.0f} MB")
    sys.stdout.flush()


def _count(folder: str) -> int:
    return sum(1 for _ in Path(folder).rglob("*.jpg"))


def _label(bench: Bench, name: str) -> str:
    for own in bench.owns:
        if name == own.name("featcache"):
            return f"{name}, {own.job['engine']}, batch {own.job['batch_size']}"
    if name.startswith("loop"):
        workers = bench.job["workers"][name.rpartition(" ")[2]]
        return f"{name}, {workers} worker{'s' if workers != 1 else ''}"
    return name


def _cosine(bench: Bench, name: str) -> str:
    vectors, reference = bench.sides[name].vectors, bench.sides[REFERENCE].vectors
    if name == REFERENCE or not Path(vectors).exists():
        return ""
    job = {"vectors": vectors, "reference": reference}
    cosine = turn("lowest_cosine", job, scratch=bench.scratch)["cosine"]
    return "other vectors" if cosine is None else f"{cosine:.7f}"


def spread(values: Sequence[float]) -> str:
    """The median and the range, with three digits."""
    return f"{_short(statistics.median(values))} ({_short(min(values))}–{_short(max(values))})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def bench_networks(options: argparse.Namespace, scratch: Path) -> None:
    peers = find_peers(options.peer_python, scratch=scratch)
    for name in options.networks.split(","):
        bench = prepare(NETWORKS[name], options, scratch)
        look(bench)
        for index in range(options.rounds):
            play_round(bench, peers, first=index)
        report(bench)


# Three backbones in one pass.

THREE = ("efficientnet_lite0", "resnet18", "resnet50")


def bench_three(options: argparse.Namespace, scratch: Path) -> None:
    """Seconds of the passes, apart and in one, and of decoding: what one pass is to save."""
    folder = copy_images(options.folder.resolve(), scratch / "three", options.images or 200)
    job = {"folder": str(folder), "all": str(folder), "names": THREE, "scratch": str(scratch)}
    engine = "auto" if options.engine == FASTEST else options.engine
    seconds: dict[str, list[float]] = {"three runs": [], "one pass": [], "decoding saved": []}
    for index in range(options.rounds):
        for what in sorted(seconds, reverse=bool(index % 2)):
            said = turn(what.replace(" ", "_"), {**job, "engine": engine}, scratch=scratch)
            seconds[what].append(said["seconds"])
    print(f"{', '.join(THREE)}; {_count(str(folder))} images; seconds, median (range)")
    for what, values in seconds.items():
        print(f"  {what:24} {spread(values)}")
    saved = [a - b for a, b in zip(seconds["three runs"], seconds["one pass"], strict=True)]
    print(f"  {'saved, round by round':24} {spread(saved)}")


def machine() -> str:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    python, date = platform.python_version(), time.strftime("%Y-%m-%d %H:%M")
    return f"{platform.machine()}, {os.cpu_count()} processors, Python {python}, load {load}; {date}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, help="of featcache, and of the others at most")
    parser.add_argument("--engine", default=FASTEST, help="of featcache: a name, auto, or fastest")
    parser.add_argument("--precision", default="float32", help="of featcache: one or more, with commas")
    parser.add_argument("--peer-python", action="append", default=[])
    parser.add_argument("--three", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.networks.split(",")) - set(NETWORKS):
        parser.error(f"there is no network {sorted(unknown)[0]}; there are {', '.join(NETWORKS)}")
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-embed-") as scratch:
        (bench_three if options.three else bench_networks)(options, Path(scratch))


if __name__ == "__main__":
    main()
