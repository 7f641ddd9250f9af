"""`fit`: honest splits, choices made without the test rows, a report and a model that say the same."""

from __future__ import annotations

import errno
import inspect
import json
import os
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import toy_spec
from gaussians import gaussian_features, take, write_store
from safetensors.numpy import save as save_arrays

from featcache.cli import main
from featcache.commands import fit as fit_module
from featcache.commands.fit import fit
from featcache.errors import (
    DamagedStore,
    DataError,
    DiskError,
    HeadError,
    IncompleteStore,
    NotAStore,
    StoreError,
)
from featcache.fitting import FitResult, Wishes, fit_features, outlook, scoring
from featcache.fitting import rows as rows_module
from featcache.fitting.rows import take_rows
from featcache.heads import HEADS
from featcache.heads.parameters import parse_params
from featcache.model import Model
from featcache.spec import FeatureNode
from featcache.store.features import FeatureSet
from featcache.store.reader import FeatureStore

NAMES = [*(name for name in HEADS if name != "sklearn"), "sklearn:LogisticRegression"]
QUICK: dict[str, dict[str, Any]] = {
    "linear": {"epochs": 2},
    "sklearn:RandomForestClassifier": {"n_estimators": 5},
}
KEYS = {
    "head", "params", "n_train", "n_test", "accuracy", "accuracy_ci95", "mean_per_class_accuracy",
    "top5", "nll", "ece", "train_accuracy", "candidates", "chosen_by", "trained_on", "scored_on",
    "seconds", "fingerprint", "model", "notes", "classes", "confusion", "per_class",
    "mean_per_class_accuracy_ci95", "top5_ci95", "nll_ci95", "ece_ci95", "auroc", "auroc_ci95",
    "confusion_counts", "confused",
}  # fmt: skip


def run(features: FeatureSet, head: str = "ncm", **options: Any) -> tuple[FitResult, Model]:
    params = parse_params(options.pop("params", QUICK.get(head)))
    return fit_features(features, Wishes(head=head, params=params, **options))


def notes_of(features: FeatureSet) -> str:
    return "; ".join(run(features)[0].notes)


@pytest.mark.parametrize(
    ("splits", "trained_on", "scored_on", "n_train", "n_test"),
    [
        ({"train": 30, "test": 12}, "train", "test", 30, 12),
        ({"train": 30, "val": 12}, "train", "val", 30, 12),
        ({"train": 30, "val": 12, "test": 9}, "train and val", "test", 42, 9),
        ({"train": 30, "test": 9, "": 6}, "train", "test", 30, 9),
    ],
)
def test_the_splits_of_the_data_are_kept(
    splits: dict[str, int], trained_on: str, scored_on: str, n_train: int, n_test: int
) -> None:
    result, _ = run(gaussian_features(splits))
    assert (result.trained_on, result.scored_on) == (trained_on, scored_on)
    assert (result.n_train, result.metrics.n) == (n_train, n_test)
    assert result.metrics.accuracy > 0.9


@pytest.mark.parametrize("split", ["train", ""])
def test_without_a_split_to_score_a_fifth_is_held_out_by_content(split: str) -> None:
    features = gaussian_features({split: 300})
    result, model = run(features)
    held = features.sha256[:, 0] < 0.2 * 256
    assert 40 <= result.metrics.n <= 80
    assert abs(result.metrics.n - held.sum()) <= 2
    assert "held out by content" in result.scored_on
    assert ("train split" in result.scored_on) == (split == "train")
    again = run(take(features, slice(None, None, -1)))[1]
    np.testing.assert_allclose(again.arrays["coef"], model.arrays["coef"], rtol=1e-9)


@pytest.mark.parametrize(("n", "k", "part"), [(300, 3, "a fifth"), (40, 20, "50 %")])
def test_what_is_held_out_is_called_a_fifth_where_it_is(n: int, k: int, part: str) -> None:
    result, _ = run(gaussian_features({"": n}, k=k, d=k))
    assert result.scored_on == f"{part} of the images, held out by content"


@pytest.mark.parametrize("head", ["ncm", "ridge"])
def test_the_next_step_is_a_sentence_of_its_own(head: str) -> None:
    features = gaussian_features({"train": 60, "test": 2000}, k=2, d=20, gap=2.5)
    result, _ = run(features, head=head, curve=False)
    assert result.metrics.accuracy < 0.97
    *_, said, command = result.describe().splitlines()
    assert said.startswith("next: ")
    assert result.verdict.lines[0] not in said
    assert said.count(": ") == 2
    assert f"of the {result.metrics.n:,} rows scored are wrong" in said
    assert command.startswith("  featcache ")


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"test": 12}, "no train rows, only test"),
        ({"val": 6, "test": 6}, "only val and test"),
        ({"val": 6, "": 6}, "only val"),
    ],
)
def test_there_must_be_rows_to_train_on(splits: dict[str, int], words: str) -> None:
    with pytest.raises(HeadError, match=words):
        run(gaussian_features(splits))


def test_there_must_be_labels_and_two_classes() -> None:
    features = gaussian_features()
    with pytest.raises(HeadError, match="no row has a label"):
        run(replace(features, y=np.full(len(features), -1)))
    with pytest.raises(HeadError, match=r"one class only \(class1\)"):
        run(replace(features, y=np.where(features.splits == "train", 1, features.y)))


def test_rows_without_a_label_take_no_part() -> None:
    features = gaussian_features()
    y = features.y.copy()
    y[:6] = y[-3:] = -1
    with_gaps, model = run(replace(features, y=y))
    expected = run(take(features, y >= 0))[1]
    assert (with_gaps.n_train, with_gaps.metrics.n) == (30, 21)
    np.testing.assert_array_equal(model.arrays["coef"], expected.arrays["coef"])


@pytest.mark.parametrize("head", ["logistic", "knn"])
def test_a_class_that_is_only_in_the_test_rows_counts_as_errors_and_is_named(head: str) -> None:
    features = gaussian_features({"train": 60, "test": 30})
    keep = (features.splits == "test") | (features.y != 2)
    result, model = run(take(features, keep), head)
    assert result.metrics.accuracy == pytest.approx(20 / 30)
    assert result.metrics.per_class[2].accuracy == 0
    assert model.classes == ("class0", "class1")
    assert "not in the training rows, so counted as errors: class2" in result.notes
    assert np.isfinite(result.metrics.nll)


def test_a_class_that_is_only_in_the_training_rows_keeps_its_name() -> None:
    features = gaussian_features()
    keep = (features.splits == "train") | (features.y != 0)
    result, model = run(take(features, keep), "logistic")
    assert model.classes == ("class0", "class1", "class2")
    assert result.metrics.accuracy == 1
    assert result.metrics.per_class[0].accuracy is None


def test_classes_without_any_training_row_leave_the_names_in_step() -> None:
    features = gaussian_features(k=4)
    some = take(features, features.y != 1)
    result, model = run(some, "logistic")
    assert model.classes == ("class0", "class2", "class3")
    predicted = [model.classes[k] for k in model.predict_proba(some.X).argmax(axis=1)]
    assert predicted == [features.classes[k] for k in some.y]
    assert result.metrics.accuracy == 1


def test_what_makes_a_score_mean_less_is_noted() -> None:
    features = gaussian_features({"train": 30, "test": 12})
    sha256 = features.sha256.copy()
    sha256[30:33] = sha256[:3]
    assert notes_of(features) == ""
    assert "3 of the 12 rows scored are images that were also trained on" in notes_of(
        replace(features, sha256=sha256)
    )
    assert "6 labelled rows without a split were left out" in notes_of(
        gaussian_features({"train": 30, "test": 9, "": 6})
    )
    assert "val rows joined the training rows" in notes_of(
        gaussian_features({"train": 30, "val": 9, "test": 9})
    )


@pytest.mark.parametrize("splits", [{"train": 36, "val": 9, "test": 24}, {"": 90}])
@pytest.mark.parametrize("head", NAMES)
def test_nothing_that_is_chosen_or_learned_depends_on_the_rows_that_are_scored(
    head: str, splits: dict[str, int]
) -> None:
    features = gaussian_features(splits, gap=1.5)
    first, model = run(features, head)
    # The rows scored, found without `fit`: the test split, or by the rule that is documented for digests.
    scored = features.splits == "test"
    if "" in splits:
        scored = np.ascontiguousarray(features.sha256[:, :8]).view(">u8").ravel() < 0.2 * 2.0**64
    assert scored.sum() == first.metrics.n
    X = features.X.copy()
    X[scored] = np.random.default_rng(9).normal(size=(int(scored.sum()), X.shape[1])) * 100
    y = np.where(scored, 1, features.y) if "test" in splits else features.y
    second, other = run(replace(features, X=X, y=y), head)
    assert second.params == first.params
    assert second.selection == first.selection
    assert second.train_accuracy == first.train_accuracy
    assert second.metrics != first.metrics
    assert model_bytes(other) == model_bytes(model)


def model_bytes(model: Model) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in model.arrays.items() if name != "skops"}


@pytest.mark.parametrize("head", [*NAMES, "sklearn:RandomForestClassifier"])
def test_the_same_seed_gives_the_same_model(head: str) -> None:
    features = gaussian_features(gap=1.5)
    first, second = (run(features, head, seed=3) for _ in range(2))
    assert model_bytes(first[1]) == model_bytes(second[1])
    np.testing.assert_array_equal(first[1].predict_proba(features.X), second[1].predict_proba(features.X))
    assert replace(first[0], seconds=0) == replace(second[0], seconds=0)


@pytest.mark.parametrize("head", ["linear", "sklearn:RandomForestClassifier"])
def test_the_seed_reaches_the_heads_that_draw(head: str) -> None:
    features = gaussian_features({"train": 300, "test": 30}, gap=1)
    params = {"linear": {"epochs": 1, "weight_decay": 0.1}}.get(head, QUICK.get(head))
    first, second = (run(features, head, params=params, seed=seed)[1] for seed in (0, 1))
    assert (first.predict_proba(features.X) != second.predict_proba(features.X)).any()


def test_a_folder_that_nothing_can_be_written_to_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*, dir: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    store = write_store(tmp_path / "s.h5", gaussian_features())
    monkeypatch.setattr("featcache.outputs.TemporaryFile", read_only)
    monkeypatch.setattr("featcache.commands.fit.fit_features", None)
    with pytest.raises(DiskError, match=r"x\.model cannot be written: Read-only file system\. Choose"):
        fit(store, tmp_path / "x.model")


def test_a_node_is_found_by_its_name_where_it_is_pooled_in_one_way() -> None:
    spec = toy_spec()
    assert [spec.find_node(name) for name in ("stem", "stem:max", "penultimate", "layer9")] == [
        "stem:max", "stem:max", "penultimate", "layer9",
    ]  # fmt: skip
    twice = toy_spec(nodes=(*spec.nodes, FeatureNode(name="stem", pooling="avg", num_features=2)))
    assert twice.find_node("stem") == "stem"


def test_a_parameter_given_twice_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s.h5", gaussian_features())
    command = ["fit", str(store), "--head", "ridge", "--param", "alpha=1", "--param", "alpha=2"]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2
    assert "alpha is given more than once" in refused.stderr


@pytest.mark.parametrize(("head", "gap"), [("logistic", 60.0), ("ridge", 0.0)])
def test_a_grid_extends_beyond_its_edge(head: str, gap: float) -> None:
    kind, result = HEADS[head], run(gaussian_features(gap=gap), head)[0]
    (name,) = kind.searched
    values = np.array([candidate.values[name] for candidate in result.selection.candidates])
    assert kind.is_valley or set(values) > set(kind.grid[name])
    steps = np.diff(2 * np.log10(values))
    # Half steps beside the best alone; a decade where what lies between cannot win.
    assert set(steps.round(6).tolist()) <= {1.0, 0.5, *([2.0] if kind.is_valley else [])}
    assert (steps < 0.6).sum() in (0, 2)
    assert not min(kind.grid[name]) <= result.params[name] <= max(kind.grid[name])


def test_giving_the_searched_parameter_ends_the_search() -> None:
    result, model = run(gaussian_features(), "logistic", params={"C": "1"})
    assert result.selection.candidates == ()
    assert result.chosen_by is None
    assert model.params["C"] == result.params["C"] == 1
    searched, model = run(gaussian_features(gap=1), "logistic")
    assert len(searched.selection.candidates) >= len(HEADS["logistic"].grid)
    assert model.params["C"] == searched.params["C"]
    assert "5-fold cross-validation on the training rows" in str(searched.chosen_by)


def test_false_is_false() -> None:
    with_it, without = (
        run(gaussian_features(gap=1), "sklearn:LogisticRegression", params={"fit_intercept": text})[1]
        for text in ("True", "False")
    )
    assert with_it.head.pipeline_[-1].intercept_.any()  # type: ignore[attr-defined]
    assert not without.head.pipeline_[-1].intercept_.any()  # type: ignore[attr-defined]
    assert without.params["params"] == {"fit_intercept": False}


@pytest.mark.parametrize(
    ("head", "params", "words"),
    [
        ("logistik", {}, "no head 'logistik'. Did you mean logistic"),
        ("sklearn:LogisticRegresion", {}, "Did you mean LogisticRegression"),
        ("ridge", {"alfa": "1"}, "ridge has no parameter 'alfa'. Did you mean alpha"),
        ("sklearn:SVC", {"gama": "1"}, "Did you mean gamma"),
        ("logistic", {"C": "many"}, "C is a number above 0, not 'many'"),
        ("logistic", {"C": "NaN"}, "C is a number above 0"),
        ("logistic", {"C": "true"}, "C is a number above 0"),
        ("knn", {"k": "2.5"}, "k is a whole number"),
        ("ridge", {"temperature": "0"}, "temperature is a number above 0"),
        ("sklearn:SVC", {"kernel": "best"}, "cannot be fitted: The 'kernel' parameter of SVC must be"),
        ("sklearn:MultinomialNB", {}, "takes counts"),
        (
            "sklearn:LogisticRegression",
            {"C": "-1"},
            "sklearn:LogisticRegression cannot be fitted: The 'C' parameter of LogisticRegression must be",
        ),
    ],
)
def test_heads_and_parameters_that_do_not_go_are_refused_in_one_line(
    head: str, params: dict[str, str], words: str
) -> None:
    with pytest.raises(HeadError, match=words) as caught:
        run(gaussian_features(), head, params=params)
    assert "\n" not in str(caught.value)


def test_what_is_wrong_with_a_head_is_said_before_the_store_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureStore, "open", lambda *_, **__: pytest.fail("the store was opened"))
    for head, params in (("sklearn:SVCC", {}), ("ridge", {"alfa": 1}), ("auto", {"C": 1})):
        with pytest.raises(HeadError):
            fit(tmp_path / "s.h5", head=head, params=params)


@pytest.mark.parametrize("scale", [1e4, 1e-4])
@pytest.mark.parametrize("head", ["logistic", "ridge", "ncm"])
def test_the_scale_of_a_feature_does_not_matter(head: str, scale: float) -> None:
    features = gaussian_features(gap=1.5)
    X = features.X.astype(np.float64)
    scaled = X * np.array([scale, 1, 1, 1, 1])
    first, second = (run(replace(features, X=values), head) for values in (X, scaled))
    np.testing.assert_allclose(
        first[1].predict_proba(X), second[1].predict_proba(scaled), rtol=1e-3, atol=1e-4
    )
    assert first[0].params == pytest.approx(second[0].params, rel=1e-3)


def test_the_training_rows_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without splits they lie apart, so that to take them is to copy them."""
    copied = []

    def counted(X: Any, rows: Any) -> Any:
        found = take_rows(X, rows)
        copied.append(0 if np.shares_memory(found, X) else len(found))
        return found

    for module in (rows_module, scoring, outlook):
        monkeypatch.setattr(module, "take_rows", counted)
    result, _ = run(gaussian_features({"": 300}), "ridge", curve=False)
    assert copied.count(result.n_train) == 1
    assert sum(copied) <= result.n_train + 2 * result.metrics.n  # and those scored, to look ahead


@pytest.mark.parametrize("head", ["logistic", "ridge", "knn", "ncm"])
def test_random_labels_are_predicted_by_chance(head: str) -> None:
    right = total = 0
    for seed in range(3):
        features = gaussian_features({"": 400}, seed=seed)
        y = np.random.default_rng(100 + seed).integers(0, 3, size=400)
        metrics = run(replace(features, y=y), head)[0].metrics
        right, total = right + metrics.accuracy * metrics.n, total + metrics.n
    # Three standard deviations of a binomial with p = 1/3 around chance.
    assert abs(right / total - 1 / 3) < 3 * (2 / 9 / total) ** 0.5


@pytest.mark.parametrize(
    ("splits", "k"),
    [
        ({"train": 36, "test": 24}, 3),
        ({"": 6}, 3),  # two images a class
        ({"": 4}, 2),
        ({"train": 6, "test": 6}, 6),  # one image a class
        ({"train": 7, "test": 1}, 6),
        ({"train": 2, "val": 1}, 2),
        ({"train": 36, "val": 12, "test": 24}, 12),
    ],
)
@pytest.mark.parametrize("head", NAMES)
def test_the_report_is_complete_and_valid_json_however_few_the_images(
    head: str, splits: dict[str, int], k: int
) -> None:
    result, _ = run(gaussian_features(splits, k=k), head)
    report = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(report) >= KEYS
    assert report["n_test"] == sum(map(sum, report["confusion"]))
    low, high = report["accuracy_ci95"]
    assert 0 <= low <= report["accuracy"] <= high <= 1
    rows = f"{report['n_test']} {'row' if report['n_test'] == 1 else 'rows'}"
    assert f"scored on {rows}" in result.describe()
    assert f"on {rows} (" in report["summary"] == result.describe().splitlines()[0]
    assert report["next"]["command"].startswith("featcache ")


def test_one_image_a_class_without_splits_is_an_error() -> None:
    with pytest.raises(HeadError, match=r"single image.*Embed more images|one class only"):
        run(gaussian_features({"": 3}))


def test_an_infinite_parameter_is_still_json() -> None:
    result, _ = run(gaussian_features(), "sklearn:LogisticRegression", params={"C": "Infinity"})
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["params"]["C"] == "inf"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "s.h5", gaussian_features())


def test_a_store_gives_a_model_and_a_report_beside_it(store: Path) -> None:
    result = fit(store, head="logistic")
    path = store.with_suffix(".model")
    assert result.model == str(path)
    assert json.loads((store.parent / "s.model.json").read_text()) == json.loads(json.dumps(result.to_json()))
    model = Model.load(path)
    expected = run(gaussian_features(), "logistic")[1]
    np.testing.assert_array_equal(model.arrays["coef"], expected.arrays["coef"])
    assert model.provenance == FeatureStore.open(store).provenance
    assert model.fingerprint == result.fingerprint == FeatureStore.open(store).fingerprint
    assert model.metrics["accuracy"] == result.metrics.accuracy
    assert sorted(p.name for p in store.parent.iterdir()) == ["s.h5", "s.model", "s.model.json"]


def test_an_incomplete_store_is_not_trained_on(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s.h5", gaussian_features(), fill=False)
    with pytest.raises(IncompleteStore, match="not complete: 60 of 60 rows are pending"):
        fit(path)
    assert [p.name for p in tmp_path.iterdir()] == ["s.h5"]


def test_a_damaged_store_is_not_trained_on(store: Path) -> None:
    features = FeatureStore.open(store).layout.features["penultimate"]
    data = bytearray(store.read_bytes())
    data[features.offset + 7] ^= 1
    store.write_bytes(data)
    with pytest.raises(DamagedStore, match="rows 0-59 do not match their checksums"):
        fit(store)
    assert [p.name for p in store.parent.iterdir()] == ["s.h5"]


def test_what_is_no_store_or_no_node_is_refused(store: Path) -> None:
    with pytest.raises(NotAStore):
        fit(store.parent)
    with pytest.raises(NotAStore):
        fit(store.parent / "none.h5")
    with pytest.raises(StoreError, match="no node 'layer3'; it holds penultimate. Name one of these"):
        fit(store, node="layer3")
    with pytest.raises(StoreError, match="given one by one: --node penultimate --node layer3"):
        fit(store, node="penultimate+layer3")
    with pytest.raises(DiskError, match=r"x\.model cannot be written: there is no folder .*nowhere\. Make"):
        fit(store, store.parent / "nowhere" / "x.model")
    with pytest.raises(DiskError, match="is a folder"):
        fit(store, store.parent)


@pytest.mark.parametrize("output", ["s.h5", "./s.h5", "other.h5", "report"])
def test_a_store_is_never_replaced_by_a_model(
    store: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.parent)
    write_store(Path("other.h5"), gaussian_features())
    write_store(Path("report.json"), gaussian_features())
    before = {path.name: path.read_bytes() for path in store.parent.iterdir()}
    with pytest.raises(StoreError, match="is a feature store, which would be replaced"):
        fit(store, output)
    assert {path.name: path.read_bytes() for path in store.parent.iterdir()} == before


def test_a_model_is_replaced_by_the_next(store: Path) -> None:
    former = fit(store, head="ncm")
    assert former.replaced is None
    result = fit(store, head="ridge")
    assert Model.load(store.with_suffix(".model")).head_name == "ridge"
    assert result.replaced == f"ncm on penultimate ({100 * former.metrics.accuracy:.1f} % right on 24 rows)"
    assert f"written to {store.with_suffix('.model')}, where {result.replaced} was" in result.describe()
    torn = store.with_suffix(".model").read_bytes()[:-9]
    store.with_suffix(".model").write_bytes(torn)
    assert fit(store, head="ridge").replaced == "a damaged model"
    (store.parent / "empty").touch()
    assert fit(store, store.parent / "empty", head="ncm").replaced is None


def test_what_is_no_model_and_no_report_is_never_replaced(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store.parent
    (folder / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0 a photograph")
    (folder / "own.json").write_text('{"mine": 1}')
    (folder / "weights.safetensors").write_bytes(save_arrays({"w": np.zeros(3)}))
    os.mkfifo(folder / "pipe")
    monkeypatch.setattr(FeatureStore, "open", lambda *_, **__: pytest.fail("work was begun"))
    for name, what in (
        ("photo.jpg", r"photo\.jpg is there already and is no model"),
        ("own", r"own\.json is there already and is no report"),
        ("weights.safetensors", "is there already and is no model"),
        ("pipe", "pipe is there already and is no model"),
    ):
        with pytest.raises(DataError, match=f"{what} of featcache's: it would be replaced. Choose another"):
            fit(store, folder / name)
    assert (folder / "own.json").read_text() == '{"mine": 1}'
    assert not (folder / "own").exists()


def test_the_seconds_are_those_of_all_that_was_done(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fit_module.find_groups

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(0.2)
        return real(*args, **options)

    monkeypatch.setattr(fit_module, "find_groups", slowly)
    assert fit(store, head="ncm", group_by="similar:0.9999").seconds >= 0.2


def test_the_wishes_are_options_of_fit_with_the_same_defaults() -> None:
    documented = {name: one.default for name, one in inspect.signature(fit).parameters.items()}
    plain = Wishes()
    ours = {
        one.name: getattr(plain, one.name) for one in fields(Wishes) if one.name not in ("params", "spent")
    }
    assert ours == {name: documented[name] for name in ours}
    assert (documented["params"], plain.params, plain.spell()) == (None, {}, ())


def test_a_device_is_for_the_heads_that_take_one() -> None:
    features = gaussian_features({"train": 30, "test": 9})
    _, model = run(features, "ridge", device="cpu")
    assert model.params["device"] == "cpu"
    with pytest.raises(HeadError, match="knn is fitted on the processor. Heads that take a device: logistic"):
        run(features, "knn", device="cpu")
    with pytest.raises(HeadError, match="device is auto, cpu or cuda, not 'gpu'"):
        run(features, "auto", device="gpu")
    with pytest.raises(HeadError, match="torch has .* CUDA devices here"):
        run(features, "ridge", device="cuda:99")
