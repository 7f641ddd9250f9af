"""Which engine a run takes: the store's own, and for a new one the fastest that proves itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_engine import SIZE, FakeEngine

from featcache import embedder
from featcache.commands.embed import EmbedResult, embed
from featcache.commands.repair import repair
from featcache.commands.verify import verify
from featcache.engines import DEFAULT_ENGINE, ENGINES, Engine, choice, other_engines
from featcache.engines.agreement import LARGEST_DIFFERENCE, compare_engines
from featcache.engines.choice import Candidate, choose_engine, measure_speeds, worth_looking_at
from featcache.engines.replicas import threads_of_torch_kept
from featcache.errors import DeviceError
from featcache.progress import SilentProgress
from featcache.store.opening import read_layout
from featcache.store.reader import FeatureStore

CONVOLUTION = "killed_backbone:backbone"  # never killed here


def choose(
    monkeypatch: pytest.MonkeyPatch,
    speeds: dict[str, float],
    *engines: FakeEngine,
    worth: bool = True,
    exact: FakeEngine | None = None,
) -> choice.Choice:
    """`choose_engine` among `engines`, the first being the reference, as if they ran at `speeds`.

    speeds: by name, or by name and batch size.
    """
    monkeypatch.setattr(choice, "worth_looking_at", lambda found, *_, **__: found if worth else [])

    def speed(candidate: Candidate) -> float:
        return speeds.get(str(candidate), speeds.get(candidate.name, 0.0))

    monkeypatch.setattr(
        choice,
        "measure_speeds",
        lambda measured, **_: {candidate: speed(candidate) for candidate in measured},
    )
    reference, others = engines[0], {(engine.name, engine.batch_size): engine for engine in engines[1:]}
    candidates = [Candidate(*key) for key in others]
    candidates += [Candidate(name, 2) for name in speeds if name not in {engine.name for engine in engines}]

    def make(candidate: Candidate) -> Engine:
        if (candidate.name, candidate.batch_size) not in others:
            raise DeviceError(f"no {candidate.name} here")
        return others[candidate.name, candidate.batch_size]

    return choose_engine(
        reference,
        candidates=candidates,
        make=make,
        exact=lambda: exact or reference,
        images=1000,
        crop_size=SIZE,
        threads=1,
    )


@pytest.mark.parametrize(
    ("speeds", "best"),
    [
        ({"eager": 10, "b": 20, "c": 15}, "b"),
        ({"eager": 10, "b": 15, "c": 20}, "c"),
        ({"eager": 10, "b": 9, "c": 8}, "eager"),
        ({"eager": 10, "b": 11.2}, "b"),
        ({"eager": 10, "b": 10.9}, "eager"),  # within what so short a timing can tell
    ],
)
def test_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch, speeds: dict[str, float], best: str) -> None:
    found = choose(monkeypatch, speeds, *(FakeEngine(name) for name in speeds))
    assert found.engine.name == best
    assert found.said.startswith(f"engine {best} in batches of 2, {speeds[best]:,.1f} images/s")
    assert found.record["images_per_second"] == {
        f"{name} in batches of 2": value for name, value in speeds.items()
    }
    assert {
        name for name, look in found.record["agreement"].items() if look["lowest_cosine"] > 0.9999
    } == set(speeds) - {"eager"}


def test_an_engine_is_taken_at_the_batch_size_at_which_it_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = [FakeEngine(name, batch_size=size) for name in ("eager", "b") for size in (2, 1, 8)]
    speeds = {"eager in batches of 2": 10.0, "b in batches of 1": 30.0, "b in batches of 8": 31.0}
    found = choose(monkeypatch, speeds, *engines)
    assert (found.engine.name, found.engine.batch_size) == ("b", 8)
    assert len(found.record["images_per_second"]) == 6


def test_its_own_batch_size_is_exchanged_for_any_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = [FakeEngine("eager", batch_size=size) for size in (2, 8)]
    found = choose(monkeypatch, {"eager in batches of 2": 10.0, "eager in batches of 8": 10.1}, *engines)
    assert found.engine.batch_size == 8


def _off_by(fraction: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda vectors: vectors * [1 + fraction, 1 - fraction, 1]


@pytest.mark.parametrize(("off", "taken"), [(0.0, True), (0.019, True), (0.03, False)])
def test_in_a_lower_precision_it_must_be_as_near_to_float32_as_the_eager_one(
    monkeypatch: pytest.MonkeyPatch, off: float, taken: bool
) -> None:
    eager, other = FakeEngine("eager", spoil=_off_by(0.02)), FakeEngine("b", spoil=_off_by(off))
    assert not compare_engines(eager, FakeEngine(), np.full((1, SIZE, SIZE, 3), 9, dtype=np.uint8)).passed, (
        "float32 would not do for this test"
    )
    found = choose(monkeypatch, {"eager": 10, "b": 90}, eager, other, exact=FakeEngine("exact"))
    assert (found.engine is other) is taken
    assert ("b" in found.record["passed_over"]) is not taken


@pytest.mark.parametrize(
    "spoil",
    [
        lambda vectors: vectors[::-1],
        lambda vectors: vectors * 2,  # whose cosine is 1
        lambda vectors: vectors + np.array([5, 0, 0]),
        lambda vectors: np.where(np.arange(3) == 1, np.nan, vectors),
        lambda vectors: np.zeros_like(vectors),
        lambda vectors: np.concatenate([vectors[:1] + np.array([9, 0, 0]), vectors[1:]]),  # one row of them
    ],
)
def test_a_faster_engine_that_computes_something_else_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[np.ndarray], np.ndarray]
) -> None:
    found = choose(
        monkeypatch, {"eager": 10, "wrong": 90}, FakeEngine("eager"), FakeEngine("wrong", spoil=spoil)
    )
    assert found.engine.name == "eager"
    assert "wrong: disagrees with eager: lowest cosine" in found.said
    assert "disagrees" in found.record["passed_over"]["wrong"]


def test_an_engine_that_cannot_be_had_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    found = choose(monkeypatch, {"eager": 10, "gone": 90, "b": 15}, FakeEngine("eager"), FakeEngine("b"))
    assert found.engine.name == "b"
    assert found.record["passed_over"] == {"gone": "no gone here"}


def test_where_it_does_not_pay_nothing_is_made_or_said(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, other = FakeEngine("eager"), FakeEngine("b")
    found = choose(monkeypatch, {"eager": 10, "b": 90}, reference, other, worth=False)
    assert (found.engine, found.said, reference.calls, other.calls) == (reference, "", 0, 0)


@pytest.mark.parametrize(
    ("images", "batch_seconds", "setup_seconds", "threads", "worth"),
    [
        # Looking takes the set-up, 16 images and five turns of each of the two; a third of the run at most.
        (109, 10.0, 2.0, 1, False),  # 545 s against 3 * (50 + 2 + 80 + 50)
        (110, 10.0, 2.0, 1, True),
        (227, 0.1, 2.0, 1, False),  # 11.35 s against 3 * (0.5 + 2 + 0.8 + 0.5)
        (229, 0.1, 2.0, 1, True),
        (229, 0.1, 14.0, 1, False),
        (949, 0.1, 14.0, 1, True),  # 47.45 s against 3 * 15.8
        (455, 0.1, 2.0, 2, False),  # two calls at once: 11.375 s
        (457, 0.1, 2.0, 2, True),
    ],
)
def test_looking_pays_for_long_runs(
    monkeypatch: pytest.MonkeyPatch,
    images: int,
    batch_seconds: float,
    setup_seconds: float,
    threads: int,
    worth: bool,
) -> None:
    monkeypatch.setattr(choice, "_seconds", lambda *_: batch_seconds)
    other = Candidate("b", 2, setup_seconds)
    found = worth_looking_at([other], FakeEngine("eager"), images=images, size=SIZE, threads=threads)
    assert found == ([other] if worth else [])


@pytest.mark.parametrize(
    ("images", "looked_at"), [(227, [1]), (229, [0]), (257, [0]), (259, [0, 1]), (1057, [0, 1, 2])]
)
def test_as_many_are_looked_at_as_pay_together(
    monkeypatch: pytest.MonkeyPatch, images: int, looked_at: list[int]
) -> None:
    """The first takes 2 + 0.8 + 0.5 s; the second, another batch size, 5 * 0.1 s; the third 12 + 0.8 + 0.5 s.

    One that would take too long does not keep those behind it from being looked at.
    """
    monkeypatch.setattr(choice, "_seconds", lambda *_: 0.1)
    others = [Candidate("b", 2, 2.0), Candidate("eager", 1), Candidate("c", 2, 12.0)]
    found = worth_looking_at(others, FakeEngine("eager"), images=images, size=SIZE, threads=1)
    assert found == [others[i] for i in looked_at]


def test_the_reference_is_timed_on_one_thread_as_a_run_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def seconds(*_: object) -> float:
        seen.append(torch.get_num_threads())
        return 0.1

    monkeypatch.setattr(choice, "_seconds", seconds)
    with threads_of_torch_kept():
        torch.set_num_threads(3)
        for callers in (0, 2):
            reference = FakeEngine("eager", callers=callers)
            worth_looking_at([Candidate("b", 2, 2.0)], reference, images=1000, size=SIZE, threads=2)
        assert torch.get_num_threads() == 3
    assert seen == [1, 1, 3, 3]


def test_few_images_are_not_even_worth_a_measurement() -> None:
    reference = FakeEngine("eager")
    others = [Candidate("b", 2, 2.0)]
    assert worth_looking_at(others, reference, images=108, size=SIZE, threads=1) == []
    assert reference.calls == 0


def test_speeds_are_images_a_second_of_as_many_calls_at_once_as_in_a_run() -> None:
    engines = {
        Candidate("slow", 2): FakeEngine("slow", seconds=0.04),
        Candidate("fast", 4): FakeEngine("fast", seconds=0.02, batch_size=4),
        Candidate("three", 2): FakeEngine("three", seconds=0.04, callers=3),
    }
    speeds = measure_speeds(engines, size=SIZE, threads=2)
    for name, limit in {"slow": 100, "fast": 400, "three": 150}.items():
        (speed,) = [speed for candidate, speed in speeds.items() if candidate.name == name]
        assert 0.5 * limit < speed <= limit


def test_the_difference_is_that_of_the_farthest_row() -> None:
    far = FakeEngine("far", spoil=lambda vectors: vectors * [[1.0], [1.01]][: len(vectors)])
    agreement = compare_engines(far, FakeEngine("eager"), np.full((3, SIZE, SIZE, 3), 7, dtype=np.uint8))
    assert agreement.difference == pytest.approx(0.01, rel=1e-4)
    assert agreement.cosine == pytest.approx(1)
    assert agreement.passed
    assert pytest.approx(0.014142, rel=1e-3) == LARGEST_DIFFERENCE


def test_zero_vectors_agree_with_each_other() -> None:
    black = np.zeros((2, SIZE, SIZE, 3), dtype=np.uint8)
    assert compare_engines(FakeEngine("a"), FakeEngine("b"), black).passed


@pytest.fixture
def photos(tmp_path: Path, save_image: Callable[..., Path]) -> Path:
    """80 images of two classes."""
    for i in range(80):
        save_image(tmp_path / "photos" / f"class{i % 2}" / f"{i:02d}.png", seed=i)
    return tmp_path / "photos"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store.h5"


def onnx_is_fastest(measured: Mapping[Candidate, Engine], **_: object) -> dict[Candidate, float]:
    return {candidate: 200.0 if candidate.name == "onnx" else 100.0 for candidate in measured}


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every run were worth looking for an engine, and ONNX Runtime twice as fast."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(choice, "worth_looking_at", lambda found, *_, **__: found)
    monkeypatch.setattr(choice, "measure_speeds", onnx_is_fastest)
    # Others would be compiled and looked at as well, for longer than the tests have.
    monkeypatch.setattr(embedder, "other_engines", lambda precision: set(other_engines(precision)) & {"onnx"})


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and ONNX Runtime is not installed any more."""
    return lambda: monkeypatch.setattr("featcache.engines.find_spec", lambda name: None)


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


def provenance(path: Path) -> dict[str, Any]:
    return dict(FeatureStore.open(path).provenance)


def rows(path: Path) -> np.ndarray:
    return np.array(FeatureStore.open(path).features().X)


def damage(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(read_layout(path).features["penultimate"].offset)
        file.write(b"\xff\x00\xff")


@pytest.fixture
def by_onnx(photos: Path, store: Path, looking: None) -> EmbedResult:
    return embed(photos, store, backbone=CONVOLUTION, engine="onnx")


def test_auto_takes_what_it_measured_and_says_and_records_why(
    photos: Path, store: Path, looking: None
) -> None:
    notes = Notes()
    embed(photos, store, backbone=CONVOLUTION, progress=notes)
    recorded = provenance(store)
    assert notes.said[0].startswith(
        "engine onnx in batches of 2, 200.0 images/s where torch-eager in batches of 8 does 100.0"
    )
    assert "; against torch-eager in float32 over 8 images: lowest cosine" in notes.said[0]
    assert recorded["decoder"] == "fast"
    assert recorded["engine_choice"]["decoder"]["agreement"]["lowest_cosine"] > 0.9999
    assert recorded["engine"] == "onnx"
    assert recorded["engine_choice"]["asked"] == "auto"
    speeds = recorded["engine_choice"]["images_per_second"]
    assert (speeds["torch-eager in batches of 8"], speeds["onnx in batches of 2"]) == (100.0, 200.0)
    assert recorded["engine_choice"]["agreement"]["onnx"]["lowest_cosine"] > 0.9999
    eager = store.with_name("eager.h5")
    embed(photos, eager, backbone=CONVOLUTION, engine="torch-eager")
    assert provenance(eager)["engine"] == "torch-eager"
    np.testing.assert_allclose(rows(store), rows(eager), rtol=0, atol=1e-5)
    assert FeatureStore.open(store).fingerprint == FeatureStore.open(eager).fingerprint


def test_auto_without_the_library_looks_at_batch_sizes(
    photos: Path, store: Path, looking: None, not_installed: Callable[[], None]
) -> None:
    not_installed()
    notes = Notes()
    embed(photos, store, backbone=CONVOLUTION, progress=notes)
    recorded = provenance(store)
    assert (recorded["engine"], recorded["batch_size"]) == (DEFAULT_ENGINE, 8)
    assert {name.split()[0] for name in recorded["engine_choice"]["images_per_second"]} == {DEFAULT_ENGINE}
    assert notes.said[0].startswith("engine torch-eager in batches of 8, 100.0 images/s")


def test_auto_at_another_precision_passes_over_what_does_not_compute_in_it(
    photos: Path, store: Path, looking: None
) -> None:
    embed(photos, store, backbone=CONVOLUTION, precision="bfloat16")
    recorded = provenance(store)
    assert recorded["engine"] == DEFAULT_ENGINE
    assert {name.split()[0] for name in recorded["engine_choice"]["images_per_second"]} == {DEFAULT_ENGINE}
    assert recorded["engine_choice"]["agreement"][DEFAULT_ENGINE]["lowest_cosine"] < 1, "against float32"


def test_an_engine_by_name_must_agree_too(
    photos: Path, store: Path, looking: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcache.engines.onnx_runtime import OnnxRuntime

    plain = OnnxRuntime.embed
    monkeypatch.setattr(
        OnnxRuntime, "embed", lambda self, pixels: {key: -v for key, v in plain(self, pixels).items()}
    )
    with pytest.raises(DeviceError, match=r"the engine onnx does not compute here what torch-eager does"):
        embed(photos, store, backbone=CONVOLUTION, engine="onnx")
    assert not store.exists()


def test_an_unknown_engine_is_one_line(photos: Path, store: Path) -> None:
    with pytest.raises(DeviceError, match="there is no engine 'steam'; there are torch-eager, .*onnx"):
        embed(photos, store, backbone=CONVOLUTION, engine="steam")


def test_a_growth_uses_the_engine_of_the_store(
    photos: Path, store: Path, by_onnx: EmbedResult, save_image: Callable[..., Path]
) -> None:
    before = rows(store)
    save_image(photos / "class1" / "new.png", seed=1000)
    assert embed(photos, store, backbone=CONVOLUTION).embedded == 1
    recorded = provenance(store)
    assert (recorded["engine"], recorded["earlier_engines"]) == ("onnx", [])
    assert "agreement" in recorded["engine_choice"]
    fresh = store.with_name("fresh.h5")
    embed(photos, fresh, backbone=CONVOLUTION, engine="onnx")
    np.testing.assert_array_equal(rows(store), rows(fresh))
    np.testing.assert_array_equal(rows(store)[:80], before)


def test_a_growth_without_a_row_to_compute_keeps_what_the_store_says(
    photos: Path, store: Path, by_onnx: EmbedResult
) -> None:
    before = provenance(store)
    (photos / "class0" / "00.png").unlink()
    assert embed(photos, store, backbone=CONVOLUTION).removed == 1
    after = provenance(store)
    assert [after[name] for name in ("engine", "engine_choice", "earlier_engines")] == [
        before[name] for name in ("engine", "engine_choice", "earlier_engines")
    ]


def test_a_store_whose_engine_is_gone_says_what_to_do_and_goes_on_with_another_by_name(
    photos: Path,
    store: Path,
    by_onnx: EmbedResult,
    save_image: Callable[..., Path],
    not_installed: Callable[[], None],
) -> None:
    not_installed()
    before = store.read_bytes()
    assert embed(photos, store, backbone=CONVOLUTION).embedded == 0
    save_image(photos / "class1" / "new.png", seed=1000)
    with pytest.raises(DeviceError, match=r"goes on with the engine it was begun with") as raised:
        embed(photos, store, backbone=CONVOLUTION)
    said = str(raised.value)
    assert "pip install 'featcache[onnx]'. Or pass --engine torch-eager" in said
    assert store.read_bytes() == before
    assert [path.name for path in store.parent.iterdir() if path.name.startswith("store")] == ["store.h5"]
    result = embed(photos, store, backbone=CONVOLUTION, engine="torch-eager")
    assert "rows embedded before are by onnx, those of now by torch-eager" in result.describe()
    recorded = provenance(store)
    assert (recorded["engine"], recorded["earlier_engines"]) == ("torch-eager", ["onnx"])
    save_image(photos / "class1" / "newer.png", seed=1001)
    embed(photos, store, backbone=CONVOLUTION)
    assert provenance(store)["earlier_engines"] == ["onnx"]


def test_verify_and_repair_take_the_engine_of_the_store_or_the_default_one(
    photos: Path, store: Path, by_onnx: EmbedResult, not_installed: Callable[[], None]
) -> None:
    good = rows(store)
    again = verify(store, recompute=10, backbone=CONVOLUTION).recomputed
    assert again is not None
    assert (again.rows, again.largest_difference) == (10, 0.0)
    damage(store)
    assert repair(store, backbone=CONVOLUTION).embedded
    np.testing.assert_array_equal(rows(store), good)
    not_installed()
    again = verify(store, recompute=10, backbone=CONVOLUTION).recomputed
    assert again is not None
    assert again.disagree == ()
    damage(store)
    repaired = repair(store, backbone=CONVOLUTION)
    assert repaired.embedded
    assert "by onnx on cpu, these by torch-eager on cpu" in repaired.describe()
    np.testing.assert_allclose(rows(store), good, rtol=0, atol=1e-5)


# Runs `featcache embed` and dies, as by `kill -9`, in the forward pass after so many.
DYING = """
import os, signal, sys
from featcache.cli import main
from featcache.engines.onnx_runtime import OnnxRuntime
plain, left = OnnxRuntime.embed, [int(sys.argv.pop(1))]
def embed(self, pixels):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, pixels)
OnnxRuntime.embed = embed
main()
"""


# Two workers compute twelve batches ahead at most. Four passes go into comparisons, in a resumed run two.
SMALL = ("--batch-size", "4", "--workers", "2")


def test_a_run_killed_and_resumed_gives_the_bytes_of_an_undisturbed_one(
    tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    pytest.importorskip("onnxruntime")
    for i in range(600):
        save_image(tmp_path / "many" / f"{i:03d}.png", seed=i, size=(20, 20))

    def run(store: str, *options: str, batches: int = 0) -> int:
        arguments = [str(batches), "embed", "many", "-o", store, "--backbone", CONVOLUTION, "-q", *options]
        return subprocess.run(
            [sys.executable, "-c", DYING, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            check=False,
        ).returncode

    assert run("calm.h5", "--engine", "onnx", *SMALL) == 0
    assert run("store.h5", "--engine", "onnx", *SMALL, batches=84) == -signal.SIGKILL
    assert FeatureStore.open(tmp_path / "store.h5").done.sum() == 256
    assert run("store.h5", "--workers", "2", batches=82) == -signal.SIGKILL
    assert FeatureStore.open(tmp_path / "store.h5").done.sum() == 512
    assert run("store.h5") == 0
    assert rows(tmp_path / "store.h5").tobytes() == rows(tmp_path / "calm.h5").tobytes()
    assert provenance(tmp_path / "store.h5")["engine"] == "onnx"


def test_the_same_again_loads_no_engine(photos: Path, store: Path) -> None:
    pytest.importorskip("onnxruntime")
    arguments = ["embed", str(photos), "-o", str(store), "--backbone", "squeezenet1_1", "--weights", "random"]
    code = (
        "import sys; from featcache.cli import main\n"
        "try: main(sys.argv[1:])\nfinally: print([name in sys.modules for name in ('torch', 'onnxruntime')])"
    )
    for options, loaded in ((("--engine", "onnx"), "[True, True]"), ((), "[False, False]")):
        ran = subprocess.run(
            [sys.executable, "-c", code, *arguments, *options, "-q"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.stdout.splitlines()[-1] == loaded, ran.stderr


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_can_be_asked_for_by_name(photos: Path, store: Path, name: str) -> None:
    for library in ENGINES[name].needs:
        pytest.importorskip(library)
    assert embed(photos, store, backbone=CONVOLUTION, engine=name).embedded == 80
    recorded = provenance(store)
    assert (recorded["engine"], recorded["engine_choice"]["asked"]) == (name, name)
