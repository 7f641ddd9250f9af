"""`finetune`: it begins as the fitted head, pays for the tail only, and keeps what is better on val rows."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_network
from click.testing import CliRunner
from PIL import Image

from featcache import embedder
from featcache.backbones.weights import LICENCES
from featcache.cli import main
from featcache.commands.embed import embed
from featcache.commands.evaluate import evaluate_model
from featcache.commands.finetune import FinetuneResult, finetune
from featcache.commands.fit import fit
from featcache.commands.info import info
from featcache.commands.predict import predict
from featcache.errors import (
    BackboneError,
    DataError,
    DiskError,
    HeadError,
    ModelError,
    SpecMismatch,
    StoreError,
    TooManyFailures,
    UnknownNode,
)
from featcache.images import decode
from featcache.model import Model
from featcache.progress import SilentProgress
from featcache.store.reader import FeatureStore
from featcache.tuning import activations, job, sources
from featcache.tuning.scoring import Score
from featcache.tuning.train import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "small_network:small"
TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Work:
    """Pictures of three kinds under train/ and test/, and a model fitted on them."""

    photos: Path
    model: Path


def stripes(path: Path, *, kind: int, seed: int) -> None:
    """Stripes across, along or aslant in noise, of any colour: hard for random features, learnable."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:16, :16]
    phase = (x, y, x + y)[kind] * 2.0 + rng.uniform(0, 6)
    pixels = 128 + 50 * np.sin(phase)[..., None] * rng.uniform(0.3, 1, 3) + rng.normal(0, 35, (16, 16, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def make_photos(folder: Path, splits: dict[str, int], kinds: str = "abc") -> Path:
    for s, (split, count) in enumerate(splits.items()):
        for i in range(count):
            kind = i % len(kinds)
            stripes(folder / split / kinds[kind] / f"{i:03d}.png", kind=kind, seed=1000 * s + i)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("work")
    photos = make_photos(folder / "photos", {"train": 90, "test": 45})
    embed(photos, folder / "s.h5", backbone=NAME)
    fit(folder / "s.h5", folder / "m.model", head="logistic", params={"C": 1.0})
    return Work(photos, folder / "m.model")


QUICK: dict[str, Any] = {
    "backbone": NAME, "device": "cpu", "workers": 1, "epochs": 2, "batch_size": 16, "unfreeze": "last:2",
    "lr": 3e-3, "head_lr": 3e-3, "cache": "yes", "engine": "torch-eager",
}  # fmt: skip


def tune(work: Work, output: Path, **options: Any) -> FinetuneResult:
    return finetune(work.model, work.photos, output, **{**QUICK, **options})


def fail(*_: Any, **__: Any) -> None:
    raise AssertionError("this is not to be called")


class Told(SilentProgress):
    """Keeps the notes; at the step `stop_at` it is as if Ctrl-C were pressed."""

    def __init__(self, stop_at: int = 0) -> None:
        self.notes: list[str] = []
        self.stop_at, self.steps, self.label = stop_at, 0, ""

    def start(self, label: str, *, total: int, unit: str) -> None:
        self.label = label

    def advance(self, count: int, *, stages: Any = None) -> None:
        if self.label == "fine-tuning":
            self.steps += 1
            if self.steps - 1 == self.stop_at and self.stop_at:  # the first tells where the run begins
                signal.raise_signal(signal.SIGINT)

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_it_learns_what_the_frozen_features_lack(work: Work, tmp_path: Path) -> None:
    result = tune(work, tmp_path / "t.model", epochs=12, unfreeze="all", ema=0.5, seed=1)
    probe, kept = (next(row for row in result.choice if row["alpha"] == a) for a in (0.0, result.alpha))
    assert result.alpha > 0
    assert kept["accuracy"] > probe["accuracy"]
    assert result.metrics is not None
    assert result.metrics.accuracy > 0.8
    assert "MODEL2 beats MODEL: fine-tuning helped" in result.describe()


def scored_again(work: Work, model: Path) -> float:
    """The log-loss on the test images of what `predict` says."""
    answers = predict(model, [work.photos / "test"], backbone=NAME).predictions
    return float(np.mean([-np.log(dict(p.topk)[Path(p.path).parent.name]) for p in answers]))


@pytest.mark.parametrize("unfreeze", ["all", "last:1", "layers.2"])
def test_what_is_predicted_is_what_was_scored(work: Work, tmp_path: Path, unfreeze: str) -> None:
    result = tune(work, tmp_path / "t.model", unfreeze=unfreeze, store_dtype="float32", start="random")
    assert result.alpha == 1
    assert result.metrics is not None
    assert scored_again(work, tmp_path / "t.model") == pytest.approx(result.metrics.nll, abs=1e-5)
    tuned, old = Model.load(tmp_path / "t.model"), Model.load(work.model)
    assert tuned.spec.weights_sha256 != old.spec.weights_sha256
    changed = {
        name.partition(".")[0] + "." + name.split(".")[1]
        for name, array in tuned.network.items()
        if not np.array_equal(array, small_network.small().module.state_dict()[name].numpy())
    }
    last = {"last.0", "last.1"}
    whole = {"stem.weight", "stem.bias", "norm.weight", "norm.bias", "layers.0", "layers.1", "layers.2"}
    assert changed == {"last:1": last, "layers.2": last | {"layers.2"}, "all": last | whole}[unfreeze]


def test_cached_and_live_take_the_same_steps(work: Work, tmp_path: Path) -> None:
    cached = tune(work, tmp_path / "c.model", store_dtype="float32")
    live = tune(work, tmp_path / "l.model", cache="no")
    assert (cached.cached, live.cached) == (True, False)
    assert not (tmp_path / "l.model.tail.h5").exists()
    assert len(cached.losses) == 2 * -(-cached.n_train // 16)
    np.testing.assert_allclose(cached.losses, live.losses, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        [row["log_loss"] for row in cached.choice], [row["log_loss"] for row in live.choice], rtol=1e-4
    )


def test_from_the_cache_no_image_is_opened_and_no_frozen_layer_runs(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tune(work, tmp_path / "t.model", views=3)

    monkeypatch.setattr(decode, "OpenImage", fail)
    monkeypatch.setattr(sources, "load_pictures", fail)
    small_network.stem_passes.clear()
    again = tune(work, tmp_path / "t.model", views=3, restart=True)
    assert set(small_network.stem_passes) <= {1, 2}  # which probe for shapes
    assert again.losses == first.losses
    store = FeatureStore.open(tmp_path / "t.model.tail.h5")
    (node,) = store.spec.nodes
    assert (node.key, node.num_features, store.spec.views) == ("layers.1:flat", 12 * 4 * 4, 3)


def test_images_that_cannot_be_used_cost_their_own_row(work: Work, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", {"train": 120, "test": 9})
    (photos / "train" / "a" / "0000.png").write_bytes(b"")  # the first of all rows
    found = {
        cache: finetune(work.model, photos, tmp_path / cache, **{**QUICK, "cache": cache, "epochs": 1})
        for cache in ("yes", "no", "auto")
    }
    assert found["auto"].n_train == found["no"].n_train
    assert found["yes"].n_train + found["yes"].n_choice == 120
    np.testing.assert_allclose(found["yes"].losses, found["no"].losses, rtol=0.02)
    for result in found.values():
        assert any(note.startswith("failed: train/a/0000.png: ") for note in result.notes)
    (photos / "train" / "b" / "0001.png").write_bytes(b"")
    for cache in ("yes", "no"):
        with pytest.raises(TooManyFailures, match=r"2 of 131 images .* 1.0% allowed.*--max-failures"):
            finetune(work.model, photos, tmp_path / f"2{cache}", **{**QUICK, "cache": cache})


def test_a_tuned_model_is_tuned_further(work: Work, tmp_path: Path) -> None:
    first = tune(work, tmp_path / "1.model", epochs=8, unfreeze="all", seed=1)
    assert first.alpha > 0
    second = finetune(
        tmp_path / "1.model", work.photos, tmp_path / "2.model", **{**QUICK, "lr": 0.0, "head_lr": 0.0}
    )
    assert second.choice[0]["accuracy"] == max(row["accuracy"] for row in first.choice)
    assert second.settings["start"] == "model"
    assert second.probe_kept
    one, two = arrays_of(tmp_path / "1.model"), arrays_of(tmp_path / "2.model")
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_what_the_first_fine_tuning_began_with_is_known_ever_after(work: Work, tmp_path: Path) -> None:
    paths = [work.model, *(tmp_path / f"{i}.model" for i in (1, 2, 3))]
    for begin, output in pairwise(paths):
        still = {"lr": 0.0, "head_lr": 0.0} if output == paths[3] else {"start": "random"}
        finetune(begin, work.photos, output, **{**QUICK, "epochs": 1, **still})
    old, *_, last = models = [Model.load(path) for path in paths]
    assert [len(model.tunings) for model in models] == [0, 1, 2, 3]
    assert [one["from"] for one in last.tunings] == [path.name for path in paths[:3]]
    assert [one["weights"] for one in last.tunings] == [model.weights for model in models[:3]]
    assert [one["probe_kept"] for one in last.tunings] == [False, False, True]
    assert last.weights == models[2].weights
    for model in models:
        assert model.first_weights == old.weights
    facts = [info(path).facts for path in paths]
    assert facts[3]["weights at first"] == facts[0]["weights"]
    assert "weights at first" not in facts[0]
    assert [one["fine-tuned from"] for one in facts[2:]] == [[path.name for path in paths[:2]]] * 2
    assert facts[3]["licence of the weights"] == LICENCES[str(old.weights["source"])]
    named = [{**one, "weights": {"source": "torchvision", "label": "X"}} for one in models[2].tunings[:1]]
    replace(models[2], provenance={**models[2].provenance, "tuned_before": named}).save(tmp_path / "n.model")
    said = info(tmp_path / "n.model").describe()
    assert f"`featcache backbones {old.spec.backbone}` names it" in said
    assert f"fine-tuned from: {paths[0].name}, {paths[1].name}" in " ".join(said.split())


def test_augmented_views_are_trained_on_and_plain_ones_scored(work: Work, tmp_path: Path) -> None:
    plain = tune(work, tmp_path / "p.model", lr=0.0, head_lr=0.0, batch_size=90)
    several = tune(work, tmp_path / "v.model", lr=0.0, head_lr=0.0, batch_size=90, views=3)
    fresh = tune(work, tmp_path / "f.model", lr=0.0, head_lr=0.0, batch_size=90, views=2, cache="no")
    assert plain.losses[0] == pytest.approx(plain.losses[1], rel=1e-5)  # nothing moves, nothing is drawn
    for result in (several, fresh):
        assert result.losses[0] != pytest.approx(result.losses[1], rel=1e-3)
        assert result.choice[0]["log_loss"] == pytest.approx(plain.choice[0]["log_loss"], rel=1e-3)


def test_trivial_augment_draws_every_epoch_and_cannot_be_cached(work: Work, tmp_path: Path) -> None:
    still = {"lr": 0.0, "head_lr": 0.0, "batch_size": 90, "cache": "auto", "trivial_augment": True}
    result = tune(work, tmp_path / "t.model", **still)
    assert not result.cached
    assert result.losses[0] != pytest.approx(result.losses[1], rel=1e-3)
    assert result.losses == tune(work, tmp_path / "u.model", **still).losses
    with pytest.raises(DataError, match="activations cannot be cached"):
        tune(work, tmp_path / "v.model", **{**still, "cache": "yes"})


def test_the_probe_is_kept_where_tuning_does_not_beat_it(work: Work, tmp_path: Path) -> None:
    result = tune(work, tmp_path / "t.model", lr=0.0, head_lr=0.0)
    assert result.probe_kept
    assert "MODEL2 is MODEL, since nothing that was trained was better by more than" in result.describe()
    why = "(the start is kept unless another is right on more rows, beyond one standard error)"
    assert why not in result.describe()
    worse = {"accuracy": 0.5, "log_loss": 0.0610}
    others = (({"log_loss": 0.0576}, True), ({"accuracy": 0.6}, True), ({"log_loss": 0.06099}, False))
    for better, said in others:
        choice = ({"alpha": 0.0, **worse}, {"alpha": 0.25, **worse, **better})
        assert (why in replace(result, choice=choice).describe()) == said
    kept, old = Model.load(tmp_path / "t.model"), Model.load(work.model)
    assert not kept.network
    assert [one["probe_kept"] for one in kept.tunings] == [True]
    assert kept.first_weights == kept.weights == old.weights
    np.testing.assert_array_equal(kept.arrays["coef"], old.arrays["coef"])
    assert result.metrics is not None
    answers = predict(work.model, [work.photos / "test"], backbone=NAME).predictions
    right = np.mean([p.label == Path(p.path).parent.name for p in answers])
    assert result.metrics.accuracy == pytest.approx(right)


def test_batch_norm_statistics_move_only_when_asked(work: Work, tmp_path: Path) -> None:
    old = small_network.small().module.state_dict()["last.1.running_mean"].numpy()
    for how, same in (("frozen", True), ("trained", False)):
        result = tune(work, tmp_path / how, batch_norm=how, start="random", epochs=1, store_dtype="float32")
        assert result.metrics is not None
        now = Model.load(tmp_path / how).network["last.1.running_mean"]
        assert np.array_equal(now, old) == same
        assert scored_again(work, tmp_path / how) == pytest.approx(result.metrics.nll, abs=1e-5)


def test_the_options_of_training_change_it(work: Work, tmp_path: Path) -> None:
    losses = {
        str(more): tune(work, tmp_path / "t.model", epochs=1, **more).losses
        for more in (
            {}, {"mixup": 0.4}, {"label_smoothing": 0.2}, {"clip": 1e-6}, {"layer_decay": 0.1}, {"seed": 3},
            {"weight_decay": 5.0}, {"warmup": 1.0}, {"start": "model"},
            {"precision": "bfloat16", "cache": "no"},
        )
    }  # fmt: skip
    assert len(set(losses.values())) == len(losses)


def test_the_moving_average_is_validated_and_not_trained_on(work: Work, tmp_path: Path) -> None:
    plain, averaged = tune(work, tmp_path / "p.model"), tune(work, tmp_path / "a.model", ema=0.5)
    assert averaged.losses == plain.losses
    assert averaged.choice[-1] != plain.choice[-1]


def test_the_curve_is_a_table_and_a_picture(work: Work, tmp_path: Path) -> None:
    result = tune(work, tmp_path / "t.model", epochs=3)
    rows = list(csv.DictReader((tmp_path / "t.model.curve.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    steps = len(result.losses) // 3
    weights = np.full(steps, 16.0)
    weights[-1] = result.n_train - 16 * (steps - 1)
    assert float(rows[0]["loss"]) == pytest.approx(
        np.average(result.losses[:steps], weights=weights), rel=1e-4
    )
    with Image.open(tmp_path / "t.model.curve.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 4
    report = json.loads((tmp_path / "t.model.json").read_text())
    assert report["epochs"] == 3
    assert report["settings"]["batch_size"] == 16


def test_both_models_are_scored_on_the_same_rows_and_compared(work: Work, tmp_path: Path) -> None:
    result = tune(work, tmp_path / "t.model", epochs=12, unfreeze="all", ema=0.5, seed=1)
    before, after = (
        evaluate_model(model, work.photos, backbone=NAME).metrics
        for model in (work.model, tmp_path / "t.model")
    )
    found = result.comparison
    assert found is not None
    assert (found.before.confusion, found.kept.confusion) == (before.confusion, after.confusion)
    assert found.difference is not None
    assert found.difference.points == pytest.approx(100 * (after.accuracy - before.accuracy))
    low, high = found.difference.ci95
    assert low < found.difference.points < high
    assert found.verdict == "beats"
    last = result.describe().splitlines()[-7:]
    assert last[0] == "MODEL2 against MODEL on these 45 rows: accuracy with its 95 % interval"
    assert last[1].split()[:2] == ["MODEL2", f"{after.accuracy:.4f}"]
    assert last[2].split()[:2] == ["MODEL", f"{before.accuracy:.4f}"]
    assert last[4:6] == ["verdict: MODEL2 beats MODEL: fine-tuning helped", "next, to use MODEL2:"]
    assert last[6] == f"  featcache predict {tmp_path}/t.model {work.photos} --backbone {NAME}"
    seen = finetune(work.model, work.photos / "train", tmp_path / "s.model", **QUICK)
    assert any(
        re.match(r"\d+ of the \d+ rows scored are images that MODEL was fitted", n) for n in seen.notes
    )


def test_the_same_run_again_is_done_at_once(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_photos(tmp_path / "photos", {"train": 45, "test": 15})
    shutil.copyfile(work.model, tmp_path / "m.model")
    again = replace(work, photos=photos, model=tmp_path / "m.model")
    options = {"epochs": 1, "start": "random"}
    first = tune(again, tmp_path / "t.model", **options)
    left = (tmp_path / "t.model").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(job, "load_network", fail)
        done = tune(again, tmp_path / "t.model", **options)
    assert done == replace(first, done_before=True, losses=())
    assert done.describe().startswith(f"nothing to do: {tmp_path}/t.model is what this command made")
    assert (tmp_path / "t.model").read_bytes() == left

    def trains(**more: Any) -> bool:
        return not tune(again, tmp_path / "t.model", **{**options, **more}).done_before

    assert first.replaced is None
    assert f"written to {tmp_path}/t.model\n" in first.describe()
    assert trains(restart=True)
    other = tune(again, tmp_path / "t.model", **options, seed=1)
    assert not other.done_before
    assert f"written to {tmp_path}/t.model, where another model was\n" in other.describe()
    assert not trains(seed=1)
    (tmp_path / "t.model").write_bytes(left)  # which is not what seed 1 left
    assert trains(seed=1)
    (photos / "train" / "a" / "000.png").rename(photos / "train" / "b" / "900.png")
    assert trains(seed=1)
    loaded = Model.load(again.model)
    replace(loaded, classes=("a", "c", "b")).save(again.model)
    assert trains(seed=1)
    report = tmp_path / "t.model.json"
    known = json.loads(report.read_text())
    report.write_text(json.dumps({name: known[name] for name in known if name != "run"}))
    assert trains(seed=1)


def test_the_log_says_what_decides(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([(0.5, 1.0), (0.4, 0.9), (0.6, 2.0), (0.6, 1.5), (0.6, 1.7), *[(0.1, 1.0)] * 4])
    monkeypatch.setattr(
        Trainer,
        "score",
        lambda self: Score(
            **dict(zip(("accuracy", "nll"), next(scores), strict=True)), hits=np.zeros(1, bool)
        ),
    )
    told = Told()
    tune(work, tmp_path / "t.model", epochs=4, progress=told)
    assert any("accuracy decides, and where it is the same, log-loss" in note for note in told.notes)
    said = [note for note in told.notes if note.startswith("epoch")]
    assert ["best epoch so far by accuracy" in note for note in said] == [False, True, False, False]
    assert ["best epoch so far by log-loss at the same accuracy" in note for note in said] == [
        False,
        False,
        True,
        False,
    ]


# Stopping and going on


RUN = """
import json, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_finetune as t
from pathlib import Path
from featcache.tuning.ranks import joined_ranks
work, output = t.Work(Path(sys.argv[2]), Path(sys.argv[3])), Path(sys.argv[4])
with joined_ranks(torch.device("cpu")) as ranks:
    plain = t.tune(work, output, checkpoint_seconds=0.0, start="random")
    if ranks.count > 1:
        moving = t.tune(work, output.with_suffix(".moving"), batch_norm="trained", start="random",
                        store_dtype="float32", cache="no")
        if ranks.is_first:
            print(json.dumps([plain.losses, moving.metrics.nll]))
"""


@dataclass(frozen=True)
class Started:
    """A run in a process of its own, which computes beside other tests."""

    output: Path
    process: subprocess.Popen[str]

    @classmethod
    def start(cls, work: Work, output: Path, env: dict[str, str], *launcher: str) -> Started:
        script = output.with_suffix(".py")
        script.write_text(RUN)
        with output.with_suffix(".out").open("w") as said, output.with_suffix(".err").open("w") as told:
            process = subprocess.Popen(
                [sys.executable, *launcher, *map(str, [script, TESTS, work.photos, work.model, output])],
                env={**os.environ, **env}, cwd=TESTS, text=True, stdout=said, stderr=told,
            )  # fmt: skip
        return cls(output, process)

    def ended(self, code: int) -> str:
        """What it printed, once it has ended with this code."""
        found = self.process.wait(timeout=300)
        assert found == code, self.output.with_suffix(".err").read_text()[-2000:]
        return self.output.with_suffix(".out").read_text()


LONG_RUNS = {
    "killed_run": ({"FAIL_AT": "8"}, ()),
    "run_of_two_ranks": (
        {"OMP_NUM_THREADS": "1"},
        ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _long_runs(
    request: pytest.FixtureRequest, work: Work, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Started]]:
    """Those that are asked for by any test, begun with the first test."""
    asked = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    started = {
        name: Started.start(work, tmp_path_factory.mktemp(name) / "t.model", env, *launcher)
        for name, (env, launcher) in LONG_RUNS.items()
        if name in asked
    }
    yield started
    for run in started.values():
        run.process.kill()


@pytest.fixture
def killed_run(_long_runs: dict[str, Started]) -> Started:
    return _long_runs["killed_run"]


@pytest.fixture
def run_of_two_ranks(_long_runs: dict[str, Started]) -> Started:
    return _long_runs["run_of_two_ranks"]


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    model = Model.load(path)
    return {**model.arrays, **model.network}


def curve_of(model: Path) -> list[dict[str, str]]:
    """All of it but the seconds."""
    rows = csv.DictReader(model.with_name(model.name + ".curve.csv").open())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(
    work: Work, tmp_path: Path, killed_run: Started
) -> None:
    tune(work, tmp_path / "whole.model", start="random")
    killed_run.ended(-signal.SIGKILL)
    assert not killed_run.output.exists()
    told = Told()
    tune(work, killed_run.output, start="random", progress=told)
    assert any("goes on after step 7," in note for note in told.notes)
    expected, found = arrays_of(tmp_path / "whole.model"), arrays_of(killed_run.output)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(array, found[name])


def test_activations_of_the_network_before_are_not_taken_for_those_of_the_tuned_one(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder, "prove_weights", lambda *_: "the weights are those that the request names")
    tune(work, tmp_path / "1.model", epochs=1, unfreeze="all", start="random")
    tune(work, tmp_path / "t.model", epochs=1)
    with pytest.raises(SpecMismatch, match=r"tail\.h5 holds activations for another model .*weights_sha256"):
        finetune(tmp_path / "1.model", work.photos, tmp_path / "t.model", **QUICK, restart=True)


def test_activations_of_another_cut_are_refused(work: Work, tmp_path: Path) -> None:
    tune(work, tmp_path / "t.model", epochs=1)
    with pytest.raises(SpecMismatch, match=r"tail\.h5 holds activations for .*nodes is .* Or remove"):
        tune(work, tmp_path / "t.model", epochs=1, unfreeze="last:1")


def test_ctrl_c_keeps_the_best_so_far_and_goes_on(work: Work, tmp_path: Path) -> None:
    options = {"start": "random", "epochs": 3, "ema": 0.5, "mixup": 0.3, "views": 2}
    whole = tune(work, tmp_path / "w.model", **options)
    steps = len(whole.losses) // 3
    told = Told(stop_at=steps + 2)
    with pytest.raises(KeyboardInterrupt):
        tune(work, tmp_path / "t.model", progress=told, **options)
    assert any("has the best so far; the same command goes on" in note for note in told.notes)
    assert Model.load(tmp_path / "t.model").network
    assert (tmp_path / "t.model.checkpoint").exists()
    told = Told()
    result = tune(work, tmp_path / "t.model", progress=told, **options)
    assert result.replaced is None  # what was there is its own
    assert any(f"goes on after step {steps + 3}" in note for note in told.notes)
    assert result.losses == whole.losses
    assert curve_of(tmp_path / "t.model") == curve_of(tmp_path / "w.model")
    assert not (tmp_path / "t.model.checkpoint").exists()
    for name, array in arrays_of(tmp_path / "w.model").items():
        np.testing.assert_array_equal(array, arrays_of(tmp_path / "t.model")[name])


def test_before_the_first_epoch_ends_ctrl_c_writes_no_model(work: Work, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(work, tmp_path / "t.model", progress=Told(stop_at=2))
    assert not (tmp_path / "t.model").exists()
    assert (tmp_path / "t.model.checkpoint").exists()
    with pytest.raises(ModelError, match=r"is of another run: lr was 0.003, not 0.1\. .* --restart"):
        tune(work, tmp_path / "t.model", lr=0.1)
    fit(work.model.with_name("s.h5"), tmp_path / "o.model", head="logistic", params={"C": 0.1})
    with pytest.raises(ModelError, match="is of another run: model was .*…, not .*…"):
        finetune(tmp_path / "o.model", work.photos, tmp_path / "t.model", **QUICK)
    assert tune(work, tmp_path / "t.model", lr=0.1, restart=True).epochs == 2


def test_a_damaged_checkpoint_is_one_line(work: Work, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(work, tmp_path / "t.model", progress=Told(stop_at=2))
    checkpoint = tmp_path / "t.model.checkpoint"
    sound = checkpoint.read_bytes()
    checkpoint.write_bytes(sound[:-5] + bytes([sound[-5] ^ 1]) + sound[-4:])
    with pytest.raises(ModelError, match=r"checkpoint is damaged\. Begin again with --restart"):
        tune(work, tmp_path / "t.model")
    for content in (b"", b"\x10" + bytes(7) + b"{}"):
        (tmp_path / "t.model.checkpoint").write_bytes(content)
        with pytest.raises(ModelError, match=r"is no checkpoint, or damaged\. Begin again with --restart"):
            tune(work, tmp_path / "t.model")


def test_ranks_together_take_the_steps_of_one(work: Work, tmp_path: Path, run_of_two_ranks: Started) -> None:
    alone = tune(work, tmp_path / "a.model", start="random")
    losses, moving_nll = json.loads(run_of_two_ranks.ended(0).strip().splitlines()[-1])
    np.testing.assert_allclose(losses, alone.losses, rtol=1e-4)
    one, two = arrays_of(tmp_path / "a.model"), arrays_of(run_of_two_ranks.output)
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_allclose(array, two[name], atol=1e-4)
    # Each rank has scored some rows: by the statistics that are kept, which are those of both.
    assert scored_again(work, run_of_two_ranks.output.with_suffix(".moving")) == pytest.approx(
        moving_nll, abs=1e-5
    )


# What is refused, and what is said


def test_classes_the_model_does_not_know_are_added(work: Work, tmp_path: Path) -> None:
    more = make_photos(tmp_path / "more", {"train": 40, "test": 20}, kinds="bcd")
    with pytest.raises(HeadError, match=r"no training image of a, which the model knows .*--forget"):
        finetune(work.model, more, tmp_path / "t.model", **QUICK)
    for start in ("model", "refit"):
        options = {**QUICK, "start": start, "epochs": 8, "forget": True}
        result = finetune(work.model, more, tmp_path / "t.model", **options)
        assert "classes that the model did not know: d" in result.notes
        assert "no training row has the class a: it may be forgotten" in result.notes
        assert Model.load(tmp_path / "t.model").classes == ("a", "b", "c", "d")
        assert result.metrics is not None
        assert scored_again(replace(work, photos=more), tmp_path / "t.model") == pytest.approx(
            result.metrics.nll, abs=1e-3
        )


def test_a_class_without_training_rows_counts_as_errors(work: Work, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", {"train": 30, "test": 9})
    stripes(photos / "test" / "z" / "1.png", kind=0, seed=5)
    result = finetune(work.model, photos, tmp_path / "t.model", **QUICK)
    assert "no training row has the class z, so its rows count as errors" in result.notes
    assert result.metrics is not None
    assert result.metrics.n == 10
    assert result.metrics.per_class[result.metrics.classes.index("z")].accuracy == 0


def test_no_class_in_common_is_refused_before_a_network_is_loaded(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "load_network", fail)
    other = make_photos(tmp_path / "other", {"train": 12, "test": 6}, kinds="xyz")
    with pytest.raises(HeadError, match="the model knows a, b, c; the data has x, y, z: no class in common"):
        finetune(work.model, other, tmp_path / "t.model", **QUICK)


def test_a_head_that_is_not_linear_is_refused(work: Work, tmp_path: Path) -> None:
    fit(work.model.with_name("s.h5"), tmp_path / "k.model", head="knn", params={"k": 3})
    with pytest.raises(
        ModelError,
        match="has the head knn, .*: fit a linear head first: featcache fit STORE --head logistic -o",
    ):
        finetune(tmp_path / "k.model", work.photos, tmp_path / "t.model", **QUICK)


def test_a_truncated_model_another_backbone_and_a_store_are_one_line(work: Work, tmp_path: Path) -> None:
    (tmp_path / "cut.model").write_bytes(work.model.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged or cut short"):
        finetune(tmp_path / "cut.model", work.photos, tmp_path / "t.model", **QUICK)
    loaded = Model.load(work.model)
    replace(loaded, spec=replace(loaded.spec, weights_sha256="0" * 64)).save(tmp_path / "other.model")
    with pytest.raises(BackboneError, match="was fitted on features of .* with weights 0000"):
        finetune(tmp_path / "other.model", work.photos, tmp_path / "t.model", **QUICK)


def test_what_cannot_be_written_is_refused_first(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "load_network", fail)
    store = work.model.with_name("s.h5")
    with pytest.raises(StoreError, match="is a feature store, which would be replaced"):
        tune(work, store)
    with pytest.raises(DataError, match="is the model to begin with, which would be replaced"):
        tune(work, work.model)
    photo = next(work.photos.rglob("*.png"))
    before = photo.read_bytes()
    with pytest.raises(DataError, match=r"\.png is there already and is no model of featcache's"):
        tune(work, photo)
    assert photo.read_bytes() == before
    (tmp_path / "own.json").write_text("[]")
    with pytest.raises(DataError, match=r"own\.json is there already and is no report of featcache's"):
        tune(work, tmp_path / "own")
    with pytest.raises(DiskError, match="is a folder"):
        tune(work, tmp_path)
    with pytest.raises(DiskError, match="there is no folder .*elsewhere"):
        tune(work, tmp_path / "elsewhere" / "t.model")


def test_an_unknown_block_names_the_nearest(work: Work, tmp_path: Path) -> None:
    with pytest.raises(UnknownNode, match=r"has no node 'layer\.2'; try layers\.2") as error:
        tune(work, tmp_path / "t.model", unfreeze="layer.2")
    assert "last:K" in error.value.__notes__[0]


def test_a_loss_that_is_no_number_is_one_line(work: Work, tmp_path: Path) -> None:
    with pytest.raises(
        HeadError, match=r"the loss is (nan|inf) at step \d+ of \d+, with --lr 1e\+30 and --head-lr .*: pass"
    ):
        tune(work, tmp_path / "t.model", lr=1e30, clip=0.0)
    assert not (tmp_path / "t.model").exists()


def test_later_it_keeps_the_best_so_far(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featcache.tuning.schedule import Schedule

    rate = Schedule.factor
    late = -(-tune(work, tmp_path / "u.model", epochs=1).n_train // 16) + 1
    monkeypatch.setattr(Schedule, "factor", lambda self, step: rate(self, step) if step < late else 1e38)
    result = tune(work, tmp_path / "t.model", start="random", epochs=3, clip=0.0)
    assert "pass lower ones" in result.why_ended
    assert result.best_epoch == 1
    assert all(np.isfinite(array).all() for array in arrays_of(tmp_path / "t.model").values())


def test_a_log_loss_that_is_no_number_ends_the_training(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nlls = iter([1.0, 0.9, float("inf")])
    score = Trainer.score
    monkeypatch.setattr(Trainer, "score", lambda self: replace(score(self), nll=next(nlls, 1.0)))
    result = tune(work, tmp_path / "t.model", epochs=3)
    assert "the log-loss on the choice rows is inf at step" in result.why_ended
    assert (result.epochs, result.best_epoch) == (1, 1)
    assert len(list(csv.DictReader((tmp_path / "t.model.curve.csv").open()))) == 1


@pytest.mark.parametrize(
    ("write", "read", "free", "cached", "words"),
    [
        (1e12, 1e12, 1e12, True, "MB in .*tail.h5, 1,000.0 GB are free"),
        (1e12, 1e2, 1e12, False, "s with a cache, .* s without"),
        (1e12, 1e12, 1e3, False, "not cached: it would take 0.1 MB"),
    ],
)
def test_whether_to_cache_is_measured_and_said(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: float, read: float, free: float,
    cached: bool, words: str,
) -> None:  # fmt: skip
    speed = activations.DiskSpeed(write=write, read=read)
    monkeypatch.setattr(activations, "disk_speed", lambda *_, **__: speed)
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(activations.shutil, "disk_usage", lambda path: usage)
    told = Told()
    result = tune(work, tmp_path / "t.model", cache="auto", epochs=4, progress=told)
    assert result.cached == cached
    assert any(re.search(words, note) for note in told.notes)


def test_the_command_says_what_it_did(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TESTS)
    arguments = ["finetune", work.model, work.photos, "-o", tmp_path / "t.model", "--backbone", NAME]
    ran = CliRunner().invoke(
        main, [*map(str, arguments), "--epochs", "1", "--unfreeze", "last:1", "--json", "-q"]
    )
    assert ran.exit_code == 0, ran.output
    said = json.loads(ran.stdout)
    assert (said["epochs"], said["blocks"], said["n_choice"] + said["n_train"]) == (1, ["last.0"], 90)
    for number in ("nan", "inf"):
        ran = CliRunner().invoke(main, [*map(str, arguments), "--lr", number])
        assert (ran.exit_code, f"{number} is not a finite number" in ran.output) == (2, True)
    ran = CliRunner().invoke(main, [*map(str, arguments), "--unfreeze", "nothing"])
    assert ran.exit_code == 1
    assert "has no node 'nothing'" in ran.output


def test_near_copies_are_on_one_side(tmp_path: Path) -> None:
    """Each picture four times, a little brighter each time: similar to one another and to nothing else."""
    photos = tmp_path / "photos"
    for i in range(24):
        first = photos / "abc"[i % 3] / f"{i:02d}-0.png"
        stripes(first, kind=i % 3, seed=i)
        pixels = np.asarray(Image.open(first)).astype(np.int16)
        for copy in (1, 2, 3):
            Image.fromarray((pixels + copy).clip(0, 255).astype(np.uint8)).save(
                first.with_name(f"{i:02d}-{copy}.png")
            )
    embed(photos, tmp_path / "s.h5", backbone=NAME)
    fit(tmp_path / "s.h5", tmp_path / "m.model", head="logistic", group_by="similar:0.9999")
    work = Work(photos, tmp_path / "m.model")
    found = tune(work, tmp_path / "t.model", epochs=1, group_by="similar:0.9999")
    assert "in whole groups of similar:0.9999" in found.chosen_on
    (count,) = [note for note in found.notes if "groups of similar:0.9999, the largest of" in note]
    assert count.startswith("24 groups of similar:0.9999, the largest of 4 rows")
    assert tune(work, tmp_path / "t.model", epochs=1, group_by="similar:0.9999").done_before
    with pytest.raises(HeadError, match="there is no grouping by colour"):
        tune(work, tmp_path / "t2.model", group_by="colour")
