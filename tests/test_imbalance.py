"""Classes of unequal size, of one image, missing on one side, few or very many."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gaussians import gaussian_features, take, write_store

from featcache import fitting
from featcache.cli import main
from featcache.commands.fit import fit
from featcache.errors import HeadError
from featcache.evaluate.abstain import choose_threshold
from featcache.evaluate.metrics import log_losses, score
from featcache.evaluate.splits import Groups
from featcache.fitting import FitResult, Wishes, fit_features, outlook
from featcache.fitting.choice import choose_head
from featcache.heads import HEADS
from featcache.heads.base import Head, class_weights
from featcache.model import Model
from featcache.store.features import FeatureSet

WEIGHTED = [name for name, kind in HEADS.items() if kind.weighted]
CHEAP = ["ncm", "lda", "ridge", "logistic", "knn"]


def uneven(n: int = 400, *, share: float = 0.06, gap: float = 1.2, seed: int = 0) -> FeatureSet:
    """Two classes that overlap, the second a small share of the training rows and half of the test rows."""
    features = gaussian_features({"train": n, "test": 400}, k=2, d=4, gap=gap, seed=seed)
    rare = np.flatnonzero((features.splits == "train") & (features.y == 1))
    keep = np.ones(len(features), dtype=bool)
    keep[rare[int(share * n) :]] = False
    return take(features, keep)


def run(features: FeatureSet, *, groups: Groups | None = None, **options: Any) -> tuple[FitResult, Model]:
    return fit_features(features, Wishes(**{"curve": False, **options}), groups=groups)


@pytest.mark.parametrize("head", WEIGHTED)
def test_balanced_weights_raise_the_accuracy_of_the_rare_class(head: str) -> None:
    params = {"epochs": 5} if head in ("linear", "mlp") else {}
    plain, weighted = (
        run(uneven(), head=head, params=params, class_weight=weight)[0] for weight in (None, "balanced")
    )
    assert weighted.metrics.per_class[1].accuracy > plain.metrics.per_class[1].accuracy + 0.1  # type: ignore[operator]
    assert weighted.metrics.mean_per_class_accuracy > plain.metrics.mean_per_class_accuracy


def test_with_balanced_weights_losses_are_weighted_in_the_choice_as_well() -> None:
    features = uneven()
    result, _ = run(features, head="ridge", class_weight="balanced")
    found = result.selection.out_of_fold
    assert found is not None
    counts = np.bincount(features.y[features.splits == "train"])
    weights = len(found.y) / (2 * counts[found.y])  # as scikit-learn has them
    np.testing.assert_allclose(found.weights, weights, rtol=1e-9)
    by_hand = np.mean([log_losses(found.y, found.probabilities)[found.y == k].mean() for k in (0, 1)])
    assert result.selection.best is not None
    assert result.selection.best.nll == pytest.approx(by_hand)


def test_weights_of_classes_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    y = np.array([0] * 7 + [1] * 2 + [2])
    theirs = compute_class_weight("balanced", classes=np.arange(3), y=y)
    np.testing.assert_allclose(class_weights("balanced", y, n_classes=3), theirs)
    np.testing.assert_array_equal(class_weights(None, y, n_classes=3), np.ones(3))


def test_all_heads_compete_by_weighted_losses_and_the_table_says_so() -> None:
    result, _ = run(uneven(), class_weight="balanced")
    assert result.competition is not None
    assert result.competition.weighted
    assert {"ncm", "knn"} <= {one.head for one in result.competition.contenders}
    header = next(line for line in result.describe().splitlines() if "above the best" in line)
    assert "mean per class" in header
    assert result.metrics.mean_per_class_accuracy > run(uneven())[0].metrics.mean_per_class_accuracy


def test_a_logit_adjustment_moves_the_log_odds_by_the_classes_shares() -> None:
    features = uneven()
    plain, model = run(features, head="logistic")
    adjusted, other = run(features, head="logistic", logit_adjustment=1.0)
    shares = np.bincount(features.y[features.splits == "train"]) / plain.n_train
    before, after = (np.log(some.predict_proba(features.X)) for some in (model, other))
    odds = (after[:, 1] - after[:, 0]) - (before[:, 1] - before[:, 0])
    np.testing.assert_allclose(odds, np.log(shares[0] / shares[1]), rtol=1e-6)
    assert adjusted.selection == plain.selection
    assert adjusted.metrics.mean_per_class_accuracy > plain.metrics.mean_per_class_accuracy + 0.05
    assert "logits adjusted by 1" in adjusted.describe()
    assert adjusted.cross_validated is not None
    assert plain.cross_validated is not None
    # What is said of cross-validation is of adjusted heads too.
    rare = [some.per_class[1].accuracy for some in (adjusted.cross_validated, plain.cross_validated)]
    assert rare[0] > rare[1]  # type: ignore[operator]


@pytest.mark.parametrize("head", CHEAP)
def test_a_logit_adjustment_is_taken_or_refused_by_every_head(head: str) -> None:
    able = HEADS[head].load().shift_scores is not Head.shift_scores
    if able:
        assert run(uneven(), head=head, logit_adjustment=0.5)[0].logit_adjustment == 0.5
        return
    with pytest.raises(HeadError, match=f"{head} has no intercept that a logit adjustment could move. Heads"):
        run(uneven(), head=head, logit_adjustment=0.5)


def test_heads_without_an_intercept_sit_out_a_competition_with_logit_adjustment() -> None:
    result, _ = run(uneven(), logit_adjustment=1.0)
    assert result.competition is not None
    assert {one.head: one.why for one in result.competition.left_out}[
        "knn"
    ] == "it has no intercept to adjust"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head": "knn", "class_weight": "balanced"}, "knn cannot weight classes. Heads that can: "),
        ({"head": "ridge", "class_weight": "even"}, "class_weight is 'balanced' or None, not 'even'"),
        ({"head": "ridge", "logit_adjustment": -1.0}, "number above 0, not -1.0"),
        ({"budget": 0.0}, "the budget is a number of seconds above 0"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(HeadError, match=words) as caught:
        run(uneven(), **options)
    assert "\n" not in str(caught.value)


def check(result: FitResult) -> None:
    """The report is whole, whatever there was to report."""
    report = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert 0 <= report["accuracy"] <= 1
    assert "next: " in result.describe()


@pytest.mark.parametrize(
    ("splits", "k"),
    [
        ({"train": 6, "test": 6}, 6),  # one image a class
        ({"": 12}, 6),  # two
        ({"": 7}, 3),
        ({"train": 40, "test": 10}, 2),
        ({"train": 7, "test": 1}, 6),
        ({"train": 2, "val": 1}, 2),
    ],
)
def test_heads_compete_however_few_the_images(splits: dict[str, int], k: int) -> None:
    check(run(gaussian_features(splits, k=k, d=8))[0])


def test_a_class_missing_on_either_side_is_counted_and_named() -> None:
    features = gaussian_features({"train": 90, "test": 30}, k=3)
    no_train = take(features, (features.splits == "test") | (features.y != 2))
    result, model = run(no_train)
    check(result)
    assert model.classes == ("class0", "class1")
    assert result.metrics.per_class[2].accuracy == 0
    assert any("not in the training rows" in note for note in result.notes)
    no_test = take(features, (features.splits == "train") | (features.y != 2))
    result, model = run(no_test)
    check(result)
    assert len(model.classes) == 3
    assert result.metrics.per_class[2].accuracy is None


def test_rows_without_a_label_take_no_part() -> None:
    features = gaussian_features({"train": 90, "test": 30})
    y = features.y.copy()
    y[::7] = -1
    result, _ = run(replace(features, y=y))
    expected, _ = run(take(features, y >= 0))
    assert result.competition == expected.competition
    assert result.metrics.n == expected.metrics.n


def test_a_class_whose_images_are_all_of_one_fold_is_scored_as_unknown_there() -> None:
    features = gaussian_features({"train": 60, "test": 30}, k=3)
    sha256 = features.sha256.copy()
    copies = np.flatnonzero((features.y == 2) & (features.splits == "train"))
    sha256[copies[1:]] = sha256[copies[0]]  # one image, many times: no fold may hold it out
    result, _ = run(replace(features, sha256=sha256))
    check(result)
    found = result.selection.out_of_fold
    assert found is not None
    assert 2 not in found.y


def test_a_thousand_classes() -> None:
    features = gaussian_features({"train": 3000, "test": 1000}, k=1000, d=24, gap=0)
    centres = np.random.default_rng(0).normal(size=(1000, 24)) * 4
    features = replace(features, X=(features.X + centres[features.y]).astype(np.float32))
    result, _ = run(features, budget=0.2)
    assert result.competition is not None
    assert "logistic" in {one.head for one in result.competition.left_out}
    assert result.metrics.accuracy > 0.5
    check(result)
    assert len(result.describe().splitlines()) < 60


def test_shots_precision_and_the_curve_are_in_the_report(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s.h5", gaussian_features({"train": 240, "test": 120}, gap=1.5))
    result = fit(path, head="ridge", shots=(1, 4, 16), tries=5, precision=0.9)
    report = json.loads((tmp_path / "s.model.json").read_text())
    shots = report["shots"]
    assert [row["shots"] for row in shots] == [1, 4, 16]
    assert shots[0]["mean"] < shots[2]["mean"]
    assert report["abstention"]["wish"] == 0.9
    assert report["learning_curve"]["points"][-1]["accuracy"] == pytest.approx(report["accuracy"])
    said = result.describe()
    for words in ("by labelled images a class", "in cross-validation", "accuracy by training rows"):
        assert words in said
    without = fit(path, head="ridge", curve=False)
    assert without.outlook.curve is None
    assert without.metrics == result.metrics


def test_the_command_line_takes_what_the_function_takes(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s.h5", gaussian_features({"": 240}, gap=1.5))
    options = (
        "--head ridge --class-weight balanced --logit-adjustment 0.5 --shots 1,2 --tries 3 "
        "--wish-precision 0.8 --no-curve --nodes all --group-by similar:0.999"
    )
    ran = CliRunner().invoke(main, f"fit {path} -q --json {options}")
    assert ran.exit_code == 0, ran.output
    expected = fit(
        path,
        head="ridge",
        class_weight="balanced",
        logit_adjustment=0.5,
        shots=(1, 2),
        tries=3,
        precision=0.8,
        curve=False,
        nodes="all",
        group_by="similar:0.999",
    )
    report = json.loads(ran.stdout)
    other = {"seconds": 0, "replaced": None}  # the second of them replaces the first
    assert {**report, **other} == json.loads(json.dumps({**expected.to_json(), **other}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shots", "1,x"], "not a list of numbers from 1"),
        (["--shots", "0"], "not a list of numbers from 1"),
        (["--budget", "0"], "not in the range"),
        (["--wish-precision", "1"], "not in the range"),
        (["--nodes", "some"], "not one of"),
        (["--class-weight", "even"], "not 'balanced'"),
    ],
)
def test_options_that_mean_nothing_are_a_usage_error(options: list[str], words: str) -> None:
    ran = CliRunner().invoke(main, ["fit", "s.h5", *options])
    assert ran.exit_code == 2
    assert words in ran.output


def as_fitted(features: FeatureSet, **options: Any) -> tuple[float, float]:
    """The accuracy of shots that are all rows there are, and that of the fit."""
    result, _ = run(features, shots=(10_000,), tries=1, **options)
    return result.outlook.shots[0].mean, result.metrics.accuracy


@pytest.mark.parametrize(
    "options",
    [
        {"head": "ridge", "logit_adjustment": 1.0},
        {"head": "knn", "class_weight": None},
        {"head": "ridge", "class_weight": "balanced"},
        {"head": "sklearn:LogisticRegression", "params": {"class_weight": "balanced"}},
        {"head": "auto", "class_weight": "balanced"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_as_many_shots_as_there_are_rows_are_the_head_that_was_fitted(options: dict[str, Any]) -> None:
    shots, reported = as_fitted(uneven(), **options)
    assert shots == reported


def test_shots_keep_groups_and_class_weights_where_parameters_are_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = uneven()
    keys = np.random.default_rng(0).integers(0, 256, size=(40, 32), dtype=np.uint8)
    groups = Groups(index=np.arange(len(features)) % 40, keys=keys, by="test")
    seen = []

    def record(wishes: Any, rows: Any, **more: Any) -> Any:
        seen.append(rows)
        return choose_head(wishes, rows, **more)

    monkeypatch.setattr(fitting, "choose_head", record)
    monkeypatch.setattr(outlook, "choose_head", record)
    shots, reported = as_fitted(features, head="ridge", class_weight="balanced", groups=groups)
    assert shots == reported
    fit_on, again = seen
    np.testing.assert_array_equal(again.folds.fold, fit_on.folds.fold)
    np.testing.assert_array_equal(again.weights, fit_on.weights)


def test_shots_see_the_augmented_views(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(wishes: Any, rows: Any, **more: Any) -> Any:
        seen.append(rows.views)
        return choose_head(wishes, rows, **more)

    monkeypatch.setattr(outlook, "choose_head", record)
    features = uneven()
    views = (features.X + np.float32(0.5),)
    shots, reported = as_fitted(replace(features, views=views), head="linear", params={"epochs": 2})
    assert shots == reported
    np.testing.assert_array_equal(seen[0][0], views[0][features.splits == "train"])


def test_class_weights_that_an_estimator_knows_itself_are_its_own() -> None:
    forest = {"n_estimators": 5, "class_weight": "balanced_subsample"}
    result, _ = run(uneven(), head="sklearn:RandomForestClassifier", params=forest)
    assert result.selection.out_of_fold is not None
    assert len(np.unique(result.selection.out_of_fold.weights)) == 2


@pytest.mark.parametrize(
    ("head", "weight"),
    [
        ("ridge", "foo"),
        ("ridge", 3),
        ("ridge", {0: -1.0}),
        ("sklearn:LogisticRegression", "foo"),
        ("sklearn:RandomForestClassifier", "foo"),
    ],
)
def test_class_weights_that_nobody_knows_are_one_line(head: str, weight: Any) -> None:
    with pytest.raises(HeadError, match="class_weight|weights of classes") as caught:
        run(uneven(), head=head, params={"class_weight": weight})
    assert "\n" not in str(caught.value)


def test_a_head_that_few_rows_do_not_suffice_for_is_a_note() -> None:
    head = "sklearn:LinearDiscriminantAnalysis"  # of more rows than classes
    features = gaussian_features({"train": 12, "test": 30}, k=2)
    result, _ = run(features, head=head, shots=(1, 5), tries=2, curve=True)
    assert [row.shots for row in result.outlook.shots] == [5]
    assert result.outlook.curve is None
    said = "; ".join(result.notes)
    assert f"no accuracy by 1 labelled image a class: {head} cannot be fitted" in said
    assert f"no accuracy by training rows: {head} cannot be fitted on fewer rows" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [({"shots": (0,)}, "from 1"), ({"tries": 0}, "from 1"), ({"precision": 1.5}, "between 0 and 1, not 1.5")],
)
def test_numbers_that_there_cannot_be_are_refused_before_any_work(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "choose_rows", lambda *_: pytest.fail("rows were chosen"))
    with pytest.raises(ValueError, match=words):
        run(uneven(), head="ncm", **options)


def test_a_threshold_is_chosen_by_images_not_by_their_copies() -> None:
    """Against the interval that `score` has of the rows accepted, for every threshold."""
    rng = np.random.default_rng(0)
    units = rng.integers(0, 60, size=400)
    confidence = rng.uniform(0.5, 1, 60)[units]
    right = (rng.random(60) < rng.uniform(0.7, 1, 60))[units] ^ (rng.random(400) < 0.05)
    y, p = np.where(right, 0, 1), np.stack([confidence, 1 - confidence], axis=1)
    lower = {
        t: score(y[kept], p[kept], ("a", "b"), units=units[kept], draws=0).accuracy_ci95[0]
        for t in np.unique(confidence)
        if (kept := confidence >= t).any()
    }
    wish = float(np.median(list(lower.values())))
    threshold, best = choose_threshold(y, p, wish, units=units)
    assert best == pytest.approx(max(lower.values()))
    assert threshold == min(t for t, low in lower.items() if low >= wish - 1e-12)
    assert choose_threshold(y, p, wish)[1] > best + 0.01


def test_the_copies_in_a_store_do_not_make_a_threshold_or_a_curve_surer() -> None:
    features = gaussian_features({"train": 200, "test": 200}, k=2, gap=1.5)
    five = take(features, np.repeat(np.arange(400), 5))
    one, other = (
        run(some, head="ncm", precision=0.8, shots=(2,), tries=3, curve=None)[0] for some in (features, five)
    )
    assert one.outlook.curve is not None
    assert other.outlook.curve is not None
    assert other.outlook.curve.n_scored == 200
    assert other.outlook.curve.gain_se == pytest.approx(one.outlook.curve.gain_se, rel=0.2)
    assert other.outlook.shots[0].mean == pytest.approx(one.outlook.shots[0].mean, abs=0.05)
    widths = []
    for found in (one, other):
        assert found.abstention is not None
        assert found.abstention.test is not None
        assert found.abstention.test.precision_ci95 is not None
        low, high = found.abstention.test.precision_ci95
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0], rel=0.2)
