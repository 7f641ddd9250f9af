"""`evaluate`: the scores of any model on labelled images or a store, with rows and classes joined by name."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gaussians import gaussian_features, take, write_store
from PIL import Image

from featcache import answers
from featcache.cli import main
from featcache.commands.embed import embed
from featcache.commands.evaluate import EvaluateResult, evaluate_model
from featcache.commands.fit import fit
from featcache.errors import DataError, DiskError, ModelError, SpecMismatch, StoreError
from featcache.fitting import FitResult, Wishes, fit_features
from featcache.model import Model
from featcache.store.features import FeatureSet
from featcache.store.reader import FeatureStore

TOY = "channel_mean:channel_mean"
COLOURS = ("red", "green", "blue")


@dataclass(frozen=True, kw_only=True)
class Work:
    """Pictures in which one channel tends to be the brightest, their store, and a model fitted on it."""

    photos: Path
    store: Path
    model: Path
    fitted: FitResult


def paint(path: Path, *, channel: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 120, (20, 24, 3))
    pixels[..., channel] += rng.integers(0, 20)  # so little that some are taken for others
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def paint_all(root: Path, splits: dict[str, int], *, seed: int = 0) -> Path:
    """So many pictures a split, the colours in turn."""
    for split, count in splits.items():
        for i in range(count):
            seed += 1
            paint(root / split / COLOURS[i % 3] / f"{i:02d}.png", channel=i % 3, seed=seed)
    return root


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("evaluate")
    photos = paint_all(folder / "photos", {"train": 30, "val": 12, "test": 24})
    embed(photos, folder / "s.h5", backbone=TOY, views=3)
    fitted = fit(folder / "s.h5", folder / "s.model", head="ridge")
    return Work(photos=photos, store=folder / "s.h5", model=folder / "s.model", fitted=fitted)


def ask(work: Work, data: Path, **options: Any) -> EvaluateResult:
    return evaluate_model(work.model, data, **{"backbone": TOY, **options})


def same_scores(one: Any, other: Any) -> bool:
    """Counts are equal and numbers close: of the same rows, whose features may be rounded otherwise."""
    a, b = one.to_json(), other.to_json()
    counts = [(said["n"], said["confusion"], said["classes"]) for said in (a, b)]
    numbers = ("accuracy", "mean_per_class_accuracy", "nll", "ece")
    return counts[0] == counts[1] and np.allclose(
        [a[name] for name in numbers], [b[name] for name in numbers], rtol=0, atol=1e-6
    )


def test_images_and_their_store_are_scored_as_fit_scored_its_test_rows(work: Work) -> None:
    on_images, on_store = ask(work, work.photos), ask(work, work.store)
    assert 0.4 < work.fitted.metrics.accuracy < 1
    for result in (on_images, on_store):
        assert same_scores(result.metrics, work.fitted.metrics)
        assert (result.scored_on, result.metrics.n) == ("test", 24)
        assert (result.failed, result.unknown_classes) == ({}, {})
    assert any("its accuracy was" in note and "on test" in note for note in on_store.notes)


@pytest.mark.parametrize(("splits", "expected", "n"), [
    ({"train": 9, "val": 6, "test": 3}, "test", 3),
    ({"train": 9, "val": 6}, "val", 6),
    ({"train": 9}, "all that have a label", 9),
    ({"": 12}, "all that have a label", 12),
])  # fmt: skip
def test_the_rows_are_those_of_test_or_of_val_or_all(
    work: Work, tmp_path: Path, splits: dict[str, int], expected: str, n: int
) -> None:
    result = ask(work, paint_all(tmp_path / "photos", splits))
    assert (result.scored_on, result.metrics.n) == (expected, n)


def test_another_split_is_scored_on_request(work: Work) -> None:
    train = ask(work, work.store, split="train")
    assert (train.scored_on, train.metrics.n) == ("train", 30)
    assert any("30 of the 30 rows scored are images it was fitted on" in note for note in train.notes)
    everything = ask(work, work.photos, split="all")
    assert everything.metrics.n == 66
    # With a test split, val rows are trained on as well.
    assert any("42 of the 66 rows scored are images it was fitted on" in note for note in everything.notes)
    assert ask(work, work.store).trained_on == 0


def test_an_image_trained_on_is_known_by_its_bytes_under_any_name(work: Work, tmp_path: Path) -> None:
    photos = paint_all(tmp_path / "photos", {"": 9}, seed=1000)
    shutil.copy(work.photos / "train" / "red" / "00.png", photos / "red" / "a copy.png")
    assert ask(work, photos).trained_on == 1
    model = Model.load(work.model)
    replace(model, trained_on=np.zeros(0, np.uint64)).save(tmp_path / "old.model")
    old = evaluate_model(tmp_path / "old.model", work.store, split="train")
    assert (old.trained_on, Model.load(tmp_path / "old.model").trained_on.size) == (0, 0)
    assert any("30 rows of the train split" in note for note in old.notes)


def test_copies_of_an_image_count_once_in_every_interval(tmp_path: Path) -> None:
    features = gaussian_features({"train": 60, "test": 60}, gap=1.0)
    five = take(features, np.repeat(np.arange(120), 5))
    five = replace(five, ids=tuple(f"{i:05d}.png" for i in range(600)))
    for name, some in (("one", features), ("five", five)):
        fit(write_store(tmp_path / f"{name}.h5", some), tmp_path / f"{name}.model", head="ncm", curve=False)
    one, other = (
        evaluate_model(tmp_path / "one.model", tmp_path / f"{name}.h5", abstain_below=0.4)
        for name in ("one", "five")
    )
    assert (other.metrics.n, other.metrics.n_units) == (300, 60)
    np.testing.assert_allclose(other.metrics.accuracy_ci95, one.metrics.accuracy_ci95, atol=3e-3)
    assert one.abstained is not None
    assert other.abstained is not None
    assert 0 < one.abstained.coverage < 1
    assert one.abstained.precision_ci95 is not None
    np.testing.assert_allclose(other.abstained.precision_ci95, one.abstained.precision_ci95, atol=3e-3)
    everything = evaluate_model(tmp_path / "one.model", tmp_path / "five.h5", abstain_below=0)
    assert everything.abstained is not None
    np.testing.assert_allclose(everything.abstained.precision_ci95, other.metrics.accuracy_ci95, rtol=1e-9)


@pytest.mark.parametrize("split", ["train", "val", "test", "all"])
def test_the_rows_scored_are_those_of_the_split(
    work: Work, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_ROWS_AT_ONCE", 7)
    features, model = FeatureStore.open(work.store).features(), Model.load(work.model)
    rows = features.splits == split if split != "all" else np.ones(len(features), dtype=bool)
    probabilities = model.predict_proba(features.X[rows])
    y = features.y[rows]
    for data in (work.store, work.photos):
        metrics = ask(work, data, split=split).metrics
        assert metrics.accuracy == pytest.approx((probabilities.argmax(axis=1) == y).mean())
        assert metrics.nll == pytest.approx(-np.log(probabilities[np.arange(len(y)), y]).mean(), abs=1e-6)


def test_a_split_that_is_not_there_is_refused_with_those_that_are(work: Work, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"in the split val \(9 in train\): choose another --split"):
        ask(work, paint_all(tmp_path / "photos", {"train": 9}), split="val")
    with pytest.raises(DataError, match="it has no splits"):
        ask(work, paint_all(tmp_path / "flat", {"": 6}), split="test")


def relabelled(features: FeatureSet, *, renamed: dict[str, str]) -> FeatureSet:
    """The same rows with other names of classes, numbered in the order of those names."""
    names = [renamed.get(name, name) for name in features.classes]
    classes = tuple(sorted(names))
    y = np.array([classes.index(names[label]) for label in features.y.tolist()])
    return replace(features, y=y, classes=classes)


@pytest.fixture
def clouds(tmp_path: Path) -> tuple[FeatureSet, Path]:
    """Features of three classes, two of them near one another, and a model fitted on them."""
    features = gaussian_features(gap=1.5)
    _, model = fit_features(features, Wishes(head="ncm"))
    model.save(tmp_path / "m.model")
    return features, tmp_path / "m.model"


def test_a_class_the_model_does_not_know_counts_as_errors(
    clouds: tuple[FeatureSet, Path], tmp_path: Path
) -> None:
    features, model = clouds
    # The new name is the first of all, so that every class has another number than in the model.
    other = relabelled(features, renamed={"class2": "a new one"})
    assert other.classes == ("a new one", "class0", "class1")
    result = evaluate_model(model, write_store(tmp_path / "s.h5", other))
    test = features.splits == "test"
    predicted = Model.load(model).predict_proba(features.X[test]).argmax(axis=1)
    right = (predicted == features.y[test]) & (features.y[test] < 2)
    assert result.metrics.n == 24
    assert result.metrics.accuracy == pytest.approx(right.mean())
    assert result.unknown_classes == {"a new one": 8}
    assert result.metrics.classes == ("a new one", "class0", "class1", "class2")
    assert any("8 rows of classes the model does not know" in note for note in result.notes)
    assert "given practically no probability, such as of classes not trained on" in result.describe()
    # A class of the model that the data lacks is no error, but an answer that can be given.
    by_name = {row.name: row for row in result.metrics.per_class}
    assert by_name["class2"].n == 0
    assert by_name["class2"].precision == 0.0


def test_no_class_in_common_is_refused(clouds: tuple[FeatureSet, Path], tmp_path: Path) -> None:
    features, model = clouds
    other = relabelled(features, renamed={f"class{k}": f"Class{k}" for k in range(3)})
    with pytest.raises(DataError, match=r"knows class0, class1, class2, and the data has Class0.*by name"):
        evaluate_model(model, write_store(tmp_path / "s.h5", other))


def test_rows_without_a_label_are_left_out_and_counted(
    clouds: tuple[FeatureSet, Path], work: Work, tmp_path: Path
) -> None:
    photos = paint_all(tmp_path / "photos", {"": 9})
    paint(photos / "0.png", channel=0, seed=1)
    result = ask(work, photos)
    assert result.metrics.n == 9
    assert any("1 image without a label left out" in note for note in result.notes)
    bare = tmp_path / "bare" / "0.png"
    paint(bare, channel=0, seed=1)
    with pytest.raises(DataError, match="no labels.*featcache predict"):
        ask(work, bare.parent)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backbone": "other"}, "backbone is other, not toy"),
        ({"weights_sha256": "1" * 64}, "weights_sha256 is 1{12}…, not 0{12}…"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype is bfloat16, not float32"),
    ],
)
def test_other_features_are_refused_naming_what_differs(
    clouds: tuple[FeatureSet, Path], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    features, model = clouds
    store = write_store(tmp_path / "s.h5", replace(features, spec=replace(features.spec, **changes)))
    with pytest.raises(SpecMismatch, match=rf"s\.h5 holds other features than .*m\.model.*: {said}\. Give"):
        evaluate_model(model, store)


def test_a_store_of_more_nodes_and_views_serves_and_one_without_the_node_does_not(
    work: Work, clouds: tuple[FeatureSet, Path], tmp_path: Path
) -> None:
    few = tmp_path / "few.h5"
    embed(work.photos, few, backbone=TOY)  # the model's store has 3 views
    assert same_scores(ask(work, few).metrics, work.fitted.metrics)
    features, model = clouds
    loaded = Model.load(model)
    node = replace(loaded.nodes[0], name="stem")
    spec = replace(loaded.spec, nodes=(node, *loaded.spec.nodes))
    replace(loaded, spec=spec, nodes=(node,)).save(tmp_path / "stem.model")
    with pytest.raises(SpecMismatch, match="nodes is penultimate, not stem"):
        evaluate_model(tmp_path / "stem.model", write_store(tmp_path / "s.h5", features))


def test_an_unreadable_image_is_named_and_in_no_score(work: Work, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(work.photos, photos)
    (photos / "test" / "red" / "00.png").write_bytes(b"no picture")
    (photos / "train" / "red" / "00.png").write_bytes(b"no picture, and not asked for")
    asked = ["evaluate", str(work.model), str(photos), "--backbone", TOY, "-q"]
    result = CliRunner().invoke(main, [*asked, "--json"])
    assert result.exit_code == 3
    said = json.loads(result.stdout)
    assert (said["n_test"], said["scored_on"]) == (23, "test")
    assert [failed["path"] for failed in said["failed"]] == ["test/red/00.png"]
    assert "failed: test/red/00.png: " in CliRunner().invoke(main, asked).stdout
    for path in (photos / "test").rglob("*.png"):
        path.write_bytes(b"no picture")
    failed = CliRunner().invoke(main, asked)
    assert failed.exit_code == 1
    assert "none of the images can be read" in failed.stderr


def test_the_csv_has_a_row_an_image(work: Work, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(work.photos, photos)
    (photos / "test" / "red" / "00.png").write_bytes(b"no picture")
    result = ask(work, photos, csv_file=tmp_path / "rows.csv")
    rows = list(csv.DictReader((tmp_path / "rows.csv").open(newline="")))
    assert list(rows[0]) == ["path", "label", "predicted", "probability", "correct"]
    assert sorted(row["path"] for row in rows) == sorted(
        str(path.relative_to(photos)) for path in (photos / "test").rglob("*.png")
    )
    answered = [row for row in rows if row["predicted"]]
    assert len(answered) == result.metrics.n == 23
    assert all(row["label"] == row["path"].split("/")[1] for row in rows)
    right = [row for row in answered if row["correct"] == "true"]
    assert len(right) / 23 == pytest.approx(result.metrics.accuracy)
    assert all((row["predicted"] == row["label"]) == (row in right) for row in answered)


def test_a_csv_replaces_no_store_and_no_model(work: Work, tmp_path: Path) -> None:
    store, model = (shutil.copy(path, tmp_path) for path in (work.store, work.model))
    other = shutil.copy(work.model, tmp_path / "other.model")
    rows = tmp_path / "rows.csv"
    rows.write_text("path,label\n" + "".join(f"test/{name}/00.png,{name}\n" for name in COLOURS))
    for taken, data, kind in (
        (store, store, DataError),
        (model, store, DataError),
        (work.store, work.photos, StoreError),
        (other, store, ModelError),
        (rows, rows, DataError),
    ):
        before = Path(taken).read_bytes()
        with pytest.raises(kind, match="would be replaced. Choose another --csv"):
            evaluate_model(model, data, csv_file=taken, backbone=TOY)
        assert Path(taken).read_bytes() == before
    with pytest.raises(DiskError, match="there is no folder"):
        evaluate_model(model, store, csv_file=tmp_path / "none" / "rows.csv")


def test_a_csv_replaces_only_a_table_of_before(work: Work, tmp_path: Path) -> None:
    photo = paint(tmp_path / "a.png", channel=0, seed=1)
    (tmp_path / "m.model.json").write_text("{}")
    (tmp_path / "labels.csv").write_text("path,label\na.png,red\n")
    for taken in (photo, tmp_path / "m.model.json", tmp_path / "labels.csv"):
        before = taken.read_bytes()
        with pytest.raises(
            DataError,
            match=r"is no CSV of this command's, which begins with path,label,predicted.*be replaced",
        ):
            ask(work, work.store, csv_file=taken)
        assert taken.read_bytes() == before
    with pytest.raises(DiskError, match=r"is a folder. Name a file in it as --csv"):
        ask(work, work.store, csv_file=tmp_path)
    for name in ("rows.CSV", "rows.txt"):  # one that is there, and one that is not
        (tmp_path / "rows.CSV").write_text("path,label,predicted,probability,correct\nof before")
        ask(work, work.store, csv_file=tmp_path / name)
        assert (tmp_path / name).read_text().startswith("path,label,")


def test_a_csv_is_a_file_with_a_name(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(main, ["evaluate", str(work.model), str(work.store), "--csv", "-"])
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert ran.stderr.splitlines()[-1] == (
        "Error: evaluate prints scores: --csv takes the name of a file, not -."
    )
    assert list(tmp_path.iterdir()) == []


def test_the_scores_are_not_lost_with_a_csv_that_cannot_be_written(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise DiskError(f"writing {path} failed: No space left on device")

    monkeypatch.setattr("featcache.commands.evaluate.write_atomically", full)
    asked = ["evaluate", str(work.model), str(work.store), "--csv", str(tmp_path / "rows.csv")]
    failed = CliRunner().invoke(main, asked)
    assert failed.exit_code == 1
    assert "No space left" in failed.stderr
    assert f"accuracy            {work.fitted.metrics.accuracy:.4f}" in failed.stderr


def test_a_store_has_no_root_and_no_links(work: Work) -> None:
    with pytest.raises(DataError, match="is a store, which reads no images: leave --root away"):
        ask(work, work.store, root=work.photos)
    with pytest.raises(DataError, match="is a store, which reads no images: leave --follow-links away"):
        ask(work, work.store, follow_links=True)


def test_abstaining_is_counted_by_hand(work: Work) -> None:
    features, model = FeatureStore.open(work.store).features(), Model.load(work.model)
    test = features.splits == "test"
    probabilities = model.predict_proba(features.X[test])
    threshold = float(np.median(probabilities.max(axis=1)))
    result = ask(work, work.store, abstain_below=threshold)
    kept = probabilities.max(axis=1) >= threshold
    right = probabilities.argmax(axis=1) == features.y[test]
    assert result.abstained is not None
    assert result.abstained.coverage == pytest.approx(kept.mean())
    assert result.abstained.precision == pytest.approx(right[kept].mean())
    assert result.to_json()["abstain"]["below"] == threshold
    assert "answering from a probability of" in result.describe()
    assert ask(work, work.store).to_json()["abstain"] is None


def test_views_are_averaged_alike_from_images_and_from_the_store(work: Work, tmp_path: Path) -> None:
    store, model = FeatureStore.open(work.store), Model.load(work.model)
    test = store.features().splits == "test"
    said = np.mean([model.predict_proba(store.features(view=v).X[test]) for v in range(3)], axis=0)
    by_id = dict(zip(np.array(store.table.ids)[test], said, strict=True))
    for data in (work.store, work.photos):
        ask(work, data, views=3, csv_file=tmp_path / "rows.csv")
        for row in csv.DictReader((tmp_path / "rows.csv").open(newline="")):
            expected = by_id[row["path"]]
            assert row["predicted"] == model.classes[int(expected.argmax())]
            assert float(row["probability"]) == pytest.approx(expected.max(), abs=2e-6)
    plain = ask(work, work.store).metrics.nll
    assert ask(work, work.store, views=3).metrics.nll != pytest.approx(plain, abs=1e-4)
    with pytest.raises(StoreError, match="has no view 3; it holds 3 views"):
        ask(work, work.store, views=4)


def test_a_manifest_is_data_too(work: Work, tmp_path: Path) -> None:
    images = sorted((work.photos / "test").rglob("*.png"))
    lines = [f"{path.relative_to(work.photos)},{path.parent.name},test" for path in images]
    (tmp_path / "m.csv").write_text("\n".join(["path,label,split", *lines]) + "\n")
    result = ask(work, tmp_path / "m.csv", root=work.photos)
    assert same_scores(result.metrics, work.fitted.metrics)


def test_the_report_ends_with_a_command_that_runs(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["evaluate", str(work.model), str(work.photos), "--backbone", TOY, "-q", "--split", "all"]
    said = CliRunner().invoke(main, asked)
    command = said.stdout.splitlines()[-1]
    again = [*asked[:5], "--split", "test"]
    assert shlex.split(command) == ["featcache", *again]
    assert CliRunner().invoke(main, shlex.split(command)[1:]).exit_code == 0
    on_store = ask(work, work.store)
    assert on_store.next is not None
    ran = CliRunner().invoke(main, shlex.split(on_store.next.command)[1:])
    assert (ran.exit_code, ran.stdout.splitlines()[-1].startswith("note: ")) == (0, True)
    (table,) = tmp_path.iterdir()
    assert len(table.read_text().splitlines()) == 25
    assert on_store.to_json()["next"]["command"] == on_store.next.command


def test_what_is_no_model_or_no_data_is_one_line(work: Work, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a feature store, not a model"):
        evaluate_model(work.store, work.store)
    with pytest.raises(DataError, match="is not there"):
        ask(work, tmp_path / "none")
    with pytest.raises(ModelError, match="repeat it as --backbone"):
        evaluate_model(work.model, work.photos)


def test_a_store_is_scored_without_torch(work: Work) -> None:
    code = (
        "import sys; from featcache.cli import main\n"
        f"main(['evaluate', {str(work.model)!r}, {str(work.store)!r}, '--json'], standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, loaded = ran.stdout.splitlines()
    assert json.loads(said)["n_test"] == 24
    assert loaded == "False"
