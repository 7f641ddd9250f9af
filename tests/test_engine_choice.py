"""Which engine a run takes: the store's own, and for a new one the fastest that proves itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.commands.embed import EmbedResult, embed
from featcache.commands.repair import repair
from featcache.commands.verify import verify
from featcache.engines import DEFAULT_ENGINE, ENGINES, Engine, choice
from featcache.engines.agreement import LARGEST_DIFFERENCE, compare_engines
from featcache.engines.choice import choose_engine, is_worth_looking, measure_speeds
from featcache.errors import DeviceError
from featcache.progress import SilentProgress
from featcache.spec import FeatureNode
from featcache.store.layout import read_layout
from featcache.store.reader import FeatureStore

SIZE = 4
CONVOLUTION = "killed_backbone:backbone"  # never killed here


class Fake:
    """The mean of each colour, after `seconds`, and then spoilt."""

    device = "cpu"
    nodes = (FeatureNode(name="penultimate", num_features=3),)

    def __init__(
        self,
        name: str,
        *,
        spoil: Callable[[np.ndarray], np.ndarray] = lambda vectors: vectors,
        seconds: float = 0.0,
        batch_size: int = 2,
    ) -> None:
        self.name, self.batch_size = name, batch_size
        self.calls = 0
        self._spoil, self._seconds = spoil, seconds

    def embed(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        self.calls += 1
        time.sleep(self._seconds)
        return {"penultimate": self._spoil(pixels.mean((1, 2)).astype(np.float32))}


def choose(
    monkeypatch: pytest.MonkeyPatch, speeds: dict[str, float], *engines: Fake, worth: bool = True
) -> choice.Choice:
    """`choose_engine` among `engines`, the first being the reference, as if they ran at `speeds`."""
    monkeypatch.setattr(choice, "is_worth_looking", lambda *_, **__: worth)
    monkeypatch.setattr(
        choice,
        "measure_speeds",
        lambda measured, **_: {engine.name: speeds[engine.name] for engine in measured},
    )
    reference, others = engines[0], {engine.name: engine for engine in engines[1:]}

    def make(name: str) -> Engine:
        if name not in others:
            raise DeviceError(f"no {name} here")
        return others[name]

    return choose_engine(
        reference, names=list(speeds)[1:], make=make, images=1000, weights_bytes=0, crop_size=SIZE
    )


@pytest.mark.parametrize(
    ("speeds", "best"),
    [
        ({"eager": 10, "b": 20, "c": 15}, "b"),
        ({"eager": 10, "b": 15, "c": 20}, "c"),
        ({"eager": 10, "b": 9, "c": 8}, "eager"),
        ({"eager": 10, "b": 10.4}, "eager"),  # within what so short a timing can tell
    ],
)
def test_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch, speeds: dict[str, float], best: str) -> None:
    found = choose(monkeypatch, speeds, *(Fake(name) for name in speeds))
    assert found.engine.name == best
    assert found.said.startswith(f"engine {best}, {speeds[best]:,.1f} images/s")
    assert found.record["images_per_second"] == speeds
    assert {
        name for name, look in found.record["agreement"].items() if look["lowest_cosine"] > 0.9999
    } == set(speeds) - {"eager"}


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
    found = choose(monkeypatch, {"eager": 10, "wrong": 90}, Fake("eager"), Fake("wrong", spoil=spoil))
    assert found.engine.name == "eager"
    assert "wrong: disagrees with eager: lowest cosine" in found.said
    assert "disagrees" in found.record["passed_over"]["wrong"]


def test_an_engine_that_cannot_be_had_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    found = choose(monkeypatch, {"eager": 10, "gone": 90, "b": 15}, Fake("eager"), Fake("b"))
    assert found.engine.name == "b"
    assert found.record["passed_over"] == {"gone": "no gone here"}


def test_where_it_does_not_pay_nothing_is_made_or_said(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, other = Fake("eager"), Fake("b")
    found = choose(monkeypatch, {"eager": 10, "b": 90}, reference, other, worth=False)
    assert (found.engine, found.said, reference.calls, other.calls) == (reference, "", 0, 0)


@pytest.mark.parametrize(
    ("images", "batch_seconds", "weights_bytes", "worth"),
    [
        # Looking takes 2 s, 12 s a GB and ten batches of two images; it may take a quarter of the run.
        (2 * 40, 10.0, 0, False),  # 400 s against 4 * 102
        (2 * 41, 10.0, 0, True),
        (2 * 119, 0.1, 0, False),  # 11.9 s against 4 * 3
        (2 * 121, 0.1, 0, True),
        (2 * 121, 0.1, 10**9, False),
        (2 * 601, 0.1, 10**9, True),  # 60.1 s against 4 * 15
    ],
)
def test_looking_pays_for_long_runs(
    monkeypatch: pytest.MonkeyPatch, images: int, batch_seconds: float, weights_bytes: int, worth: bool
) -> None:
    monkeypatch.setattr(choice, "_seconds", lambda *_: batch_seconds)
    found = is_worth_looking(Fake("eager"), images=images, weights_bytes=weights_bytes, size=SIZE)
    assert found is worth


def test_few_images_are_not_even_worth_a_measurement() -> None:
    reference = Fake("eager")
    assert not is_worth_looking(reference, images=2 * 40, weights_bytes=0, size=SIZE)
    assert reference.calls == 0


def test_speeds_are_images_a_second() -> None:
    speeds = measure_speeds([Fake("slow", seconds=0.04), Fake("fast", seconds=0.01, batch_size=4)], size=SIZE)
    assert 25 < speeds["slow"] <= 50
    assert 100 < speeds["fast"] <= 400


def test_the_difference_is_that_of_the_farthest_row() -> None:
    far = Fake("far", spoil=lambda vectors: vectors * [[1.0], [1.01]][: len(vectors)])
    agreement = compare_engines(far, Fake("eager"), np.full((3, SIZE, SIZE, 3), 7, dtype=np.uint8))
    assert agreement.difference == pytest.approx(0.01, rel=1e-4)
    assert agreement.cosine == pytest.approx(1)
    assert agreement.passed
    assert pytest.approx(0.014142, rel=1e-3) == LARGEST_DIFFERENCE


def test_zero_vectors_agree_with_each_other() -> None:
    black = np.zeros((2, SIZE, SIZE, 3), dtype=np.uint8)
    assert compare_engines(Fake("a"), Fake("b"), black).passed


@pytest.fixture
def photos(tmp_path: Path, save_image: Callable[..., Path]) -> Path:
    """80 images of two classes."""
    for i in range(80):
        save_image(tmp_path / "photos" / f"class{i % 2}" / f"{i:02d}.png", seed=i)
    return tmp_path / "photos"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store.h5"


def onnx_is_fastest(measured: Sequence[Engine], **_: object) -> dict[str, float]:
    return {engine.name: 200.0 if engine.name == "onnx" else 100.0 for engine in measured}


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every run were worth looking for an engine, and ONNX Runtime twice as fast."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(choice, "is_worth_looking", lambda *_, **__: True)
    monkeypatch.setattr(choice, "measure_speeds", onnx_is_fastest)


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
    assert notes.said[0].startswith(
        "engine onnx, 200.0 images/s where torch-eager does 100.0; against it over 8"
    )
    recorded = provenance(store)
    assert recorded["engine"] == "onnx"
    assert recorded["engine_choice"]["asked"] == "auto"
    assert recorded["engine_choice"]["images_per_second"] == {"torch-eager": 100.0, "onnx": 200.0}
    assert recorded["engine_choice"]["agreement"]["onnx"]["lowest_cosine"] > 0.9999
    eager = store.with_name("eager.h5")
    embed(photos, eager, backbone=CONVOLUTION, engine="torch-eager")
    assert provenance(eager)["engine"] == "torch-eager"
    np.testing.assert_allclose(rows(store), rows(eager), rtol=0, atol=1e-5)
    assert FeatureStore.open(store).fingerprint == FeatureStore.open(eager).fingerprint


def test_auto_without_the_library_is_as_before(
    photos: Path, store: Path, looking: None, not_installed: Callable[[], None]
) -> None:
    not_installed()
    notes = Notes()
    embed(photos, store, backbone=CONVOLUTION, progress=notes)
    assert (provenance(store)["engine"], notes.said) == (DEFAULT_ENGINE, [])


def test_auto_at_another_precision_looks_at_nothing(photos: Path, store: Path, looking: None) -> None:
    notes = Notes()
    embed(photos, store, backbone=CONVOLUTION, precision="bfloat16", progress=notes)
    assert (provenance(store)["engine"], notes.said) == (DEFAULT_ENGINE, [])


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
    with pytest.raises(DeviceError, match="there is no engine 'steam'; there are torch-eager, onnx"):
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

    assert run("calm.h5", "--engine", "onnx", "--batch-size", "4") == 0
    assert run("store.h5", "--engine", "onnx", "--batch-size", "4", batches=80) == -signal.SIGKILL
    assert FeatureStore.open(tmp_path / "store.h5").done.sum() == 256
    assert run("store.h5", batches=70) == -signal.SIGKILL
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
