"""Heads that compete: on the same rows, by the same measure, in a budget, and never by the rows scored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_toy_store, toy_spec
from gaussians import gaussian_features
from scipy.stats import binom

from featcache import fitting
from featcache.errors import HeadError
from featcache.evaluate import compete
from featcache.evaluate.compete import competition_lines, paired_difference
from featcache.evaluate.metrics import Z95
from featcache.evaluate.select import Selection, _Search
from featcache.fitting import Wishes, fit_features
from featcache.fitting.choice import Choice
from featcache.fitting.rows import choose_rows
from featcache.heads import HEADS, build_head
from featcache.heads.entry import RATE, Entry, Size
from featcache.model import Model
from featcache.processors import usable_processors
from featcache.records import RowStatus
from featcache.store.features import FeatureSet
from featcache.store.layout import SOURCE_DTYPE
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter

NAMES = {name for name, kind in HEADS.items() if kind.entry}


def run(features: FeatureSet, **options: Any) -> Any:
    return fit_features(features, Wishes(curve=False, **options))[0]


def run_model(features: FeatureSet, **options: Any) -> Model:
    return fit_features(features, Wishes(curve=False, **options))[1]


def heads_of(result: Any) -> list[str]:
    return [one.head for one in result.competition.contenders]


def test_by_default_heads_compete_in_the_order_of_their_simplicity() -> None:
    result = run(gaussian_features({"train": 90, "test": 30}, gap=2))
    assert result.asked == "auto"
    assert {"ncm", "ridge", "logistic", "knn"} <= set(heads_of(result)) <= NAMES
    order = [HEADS[name].entry.simplicity for name in heads_of(result)]  # type: ignore[union-attr]
    assert order == sorted(order)
    assert result.head == result.competition.chosen.head
    assert set(heads_of(result)) | {one.head for one in result.competition.left_out} == NAMES


def test_no_two_heads_are_equally_simple() -> None:
    simplicity = [kind.entry.simplicity for kind in HEADS.values() if kind.entry]
    assert len(set(simplicity)) == len(simplicity)


def test_the_simplest_within_one_standard_error_of_the_best_is_taken() -> None:
    # One spherical cloud a class: the nearest mean is the best there is, and the others come near it.
    result = run(gaussian_features({"train": 240, "test": 30}, gap=2, d=5))
    for one in result.competition.contenders:
        simpler = one.simplicity < result.competition.chosen.simplicity
        assert not (one.is_tied and simpler)
    assert result.competition.chosen.is_tied
    assert result.head == "ncm"


def crossed(n: int = 400, *, seed: int = 0) -> FeatureSet:
    """Classes that are equal in each feature alone: the sign of the product of the first two."""
    features = gaussian_features({"train": n, "test": 200}, k=2, d=5, gap=0, seed=seed)
    y = (features.X[:, 0] * features.X[:, 1] > 0).astype(np.int64)
    return replace(features, y=y)


def test_a_head_that_is_surely_better_wins_however_simple_the_others_are() -> None:
    result = run(crossed())
    assert result.head == "knn"
    assert result.metrics.accuracy > 0.8
    by_name = {one.head: one for one in result.competition.contenders}
    assert by_name["logistic"].behind > 3 * by_name["logistic"].behind_se
    assert "knn is taken: it has the lowest log-loss, beyond its standard error" in result.describe()


def test_heads_that_differ_by_next_to_nothing_are_tied_however_surely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compete, "NEGLIGIBLE", 10.0)
    result = run(crossed())
    assert result.head == "ncm"
    assert all(one.is_tied for one in result.competition.contenders)
    assert "ncm is taken: the simplest within 0.1 % of the lowest log-loss, that of knn" in result.describe()


def test_the_table_is_of_the_rows_that_folds_held_out() -> None:
    result = run(gaussian_features({"train": 90, "test": 30}, gap=1.5))
    for one in result.competition.contenders:
        alone = run(gaussian_features({"train": 90, "test": 30}, gap=1.5), head=one.head)
        assert alone.selection.best == one.best
        assert one.best.nll == pytest.approx(alone.cross_validated.nll)
        assert one.best.accuracy == pytest.approx(alone.cross_validated.accuracy)


def test_a_paired_difference_is_that_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=4000) * 10  # what both heads share
    one, other = hard + rng.normal(size=4000) + 0.1, hard + rng.normal(size=4000)
    found = paired_difference(one, other, weights=np.ones(4000))
    assert found.mean == pytest.approx((one - other).mean())
    assert found.se == pytest.approx((one - other).std(ddof=1) / 4000**0.5)
    assert found.se < 0.15 * one.std() / 4000**0.5


def test_rows_of_one_unit_count_as_one() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 300))
    alone = paired_difference(one, other, weights=np.ones(300))
    four, unit = np.repeat(one, 4), np.repeat(np.arange(300), 4)
    copied = paired_difference(four, np.repeat(other, 4), weights=np.ones(1200), unit=unit)
    assert (copied.mean, copied.se) == pytest.approx((alone.mean, alone.se))


def test_weights_of_rows_weigh_their_differences() -> None:
    one, weights = np.array([1.0, 0.0, 0.0, 4.0]), np.array([2.0, 2.0, 2.0, 0.0])
    found = paired_difference(one, np.zeros(4), weights=weights)
    assert found.mean == pytest.approx(1 / 3)


@pytest.mark.parametrize("seed", range(3))
def test_the_standard_error_covers(seed: int) -> None:
    """The interval of a difference of two heads holds the difference on endless rows, most of the time."""
    rng = np.random.default_rng(seed)
    covered = 0
    for _ in range(400):
        gap = rng.exponential(size=60) - 1 + 0.2
        found = paired_difference(gap, np.zeros(60), weights=np.ones(60))
        covered += abs(found.mean - 0.2) < Z95 * found.se
    assert covered / 400 > 0.88


def test_what_would_take_longer_than_the_budget_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = Entry(simplicity=4, operations=lambda size: 61.0 * RATE * usable_processors())
    monkeypatch.setitem(HEADS, "logistic", replace(HEADS["logistic"], entry=slow))  # type: ignore[misc]
    result = run(gaussian_features({"train": 90, "test": 30}))
    assert "logistic" not in heads_of(result)
    assert "knn" in heads_of(result)  # which comes after it, and is cheap
    why = {one.head: one.why for one in result.competition.left_out}["logistic"]
    assert why == "about 61 s, more than is left of the 60 s of --budget"
    assert f"logistic ({why})" in result.describe()
    assert "logistic" in heads_of(run(gaussian_features({"train": 90, "test": 30}), budget=100))


def test_one_head_is_tried_whatever_the_budget() -> None:
    assert heads_of(run(gaussian_features({"train": 90, "test": 30}), budget=1e-9)) == ["ncm"]


def test_a_head_that_comes_after_the_budget_is_left_out_for_that() -> None:
    result = run(gaussian_features({"train": 90, "test": 30}), budget=0.01 * 1e-6)
    why = {one.head: one.why for one in result.competition.left_out}
    assert why["ridge"] == "the 1e-08 s of --budget were spent"


def test_a_single_unit_does_not_tell_heads_apart() -> None:
    found = paired_difference(np.ones(5), np.zeros(5), weights=np.ones(5), unit=np.zeros(5, dtype=np.int64))
    assert (found.mean, found.se) == (1.0, np.inf)
    contender = run(gaussian_features({"train": 90, "test": 30})).competition.contenders[0]
    said = replace(contender, behind_se=found.se, ahead_se=np.nan).to_json()
    assert (said["behind_se"], said["ahead_se"]) == (None, None)


@pytest.mark.parametrize("spoiled", [{"ncm"}, {"knn", "logistic"}, NAMES])
def test_heads_without_finite_scores_are_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, spoiled: set[str]
) -> None:
    tables = _Search._tables

    def spoil(self: Any, candidates: Any) -> Any:
        for table in tables(self, candidates):
            yield table * (np.nan if self.name in spoiled else 1.0)

    monkeypatch.setattr(_Search, "_tables", spoil)
    features = gaussian_features({"train": 90, "test": 30})
    if spoiled == NAMES:
        with pytest.raises(HeadError, match="no head can be fitted: ncm cannot be fitted: its scores"):
            run(features)
        return
    result = run(features)
    why = {one.head: one.why for one in result.competition.left_out}
    assert all("not finite" in why[name] for name in spoiled)
    assert not spoiled & set(heads_of(result))


def test_the_cost_of_a_head_is_its_arithmetic_at_a_fixed_rate() -> None:
    entry = Entry(simplicity=1, operations=lambda size: 6.0 * size.n * size.d, start=2.0)
    expected = 2.0 + 6 * 1000 * 10 / (RATE * usable_processors())
    assert entry.seconds(Size(n=1000, d=10, k=2, folds=5)) == pytest.approx(expected)


def test_heads_for_many_rows_or_views_are_left_out_where_there_are_few_or_none() -> None:
    result = run(gaussian_features({"train": 90, "test": 30}))
    why = {one.head: one.why for one in result.competition.left_out}
    assert "views" in why["linear"]
    assert all("tried from" in why[name] for name in {"mlp"} & NAMES)


def test_a_head_that_cannot_be_fitted_leaves_the_others_to_compete(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(HEADS["ridge"], grid={"alpha": (-1.0, 1.0)})
    monkeypatch.setitem(HEADS, "ridge", broken)  # type: ignore[misc]
    result = run(gaussian_features({"train": 90, "test": 30}))
    assert "ridge" not in heads_of(result)
    why = {one.head: one.why for one in result.competition.left_out}["ridge"]
    assert "alpha is a number above 0" in why


def test_where_nothing_can_be_held_out_the_simplest_head_is_taken() -> None:
    result = run(gaussian_features({"train": 6, "test": 6}, k=6))
    assert result.head == "ncm"
    assert result.competition.contenders == ()
    assert "could not be compared" in result.describe()
    assert competition_lines(result.competition)[0].startswith("nothing could be held out")


def test_parameters_belong_to_a_head() -> None:
    with pytest.raises(HeadError, match="'C' is a parameter of one head.*--head logistic"):
        run(gaussian_features(), params={"C": 1})


@pytest.mark.parametrize("splits", [{"train": 60, "val": 20, "test": 24}, {"": 120}])
def test_the_choice_of_a_head_does_not_depend_on_the_rows_that_are_scored(splits: dict[str, int]) -> None:
    features = gaussian_features(splits, gap=1.5)
    scored = choose_rows(features).test
    X = features.X.copy()
    X[scored] = np.random.default_rng(9).normal(size=X[scored].shape) * 100
    first, second = run(features), run(replace(features, X=X))
    assert second.head == first.head
    assert second.competition == first.competition
    assert second.metrics != first.metrics


def test_the_report_says_which_head_how_sure_and_what_next() -> None:
    features = gaussian_features({"train": 300, "test": 200}, gap=2.5)
    result, _ = fit_features(features, Wishes())
    said = result.describe()
    lines = said.splitlines()
    assert lines[0].startswith(f"{result.head} on penultimate: ")
    assert lines[2].startswith(f"head {result.head} (")
    assert sum(line.startswith("> ") for line in lines) == 1
    for words in (
        "95 % interval",
        "before its temperature",
        " is taken: ",
        "accuracy by training rows",
        "next: ",
    ):
        assert words in said
    assert lines[-1].startswith("  featcache ")
    assert max(map(len, lines)) < 400
    assert len(lines) < 55


SWEEP = {
    "ridge": {"alpha": tuple(np.logspace(-2, 6, 250).tolist())},
    "lda": {"shrinkage": tuple(np.linspace(0.01, 0.99, 200).tolist())},
    "knn": {"k": (1, 2, 3, 5, 8, 13, 21, 34, 55, 89)},
    "logistic": {"C": tuple(np.logspace(-5, 0, 40).tolist())},
}


def by_the_rows_scored(features: FeatureSet) -> Any:
    """A choice that leaks: of all configurations, the one that gets most of the test rows right."""
    test = features.splits == "test"
    X, y = features.X[test], features.y[test]

    def choose(wishes: Any, rows: Any, *, progress: Any) -> Choice:
        found = []
        for name, grid in SWEEP.items():
            ((parameter, values),) = grid.items()
            candidates = [{parameter: value} for value in values]
            heads = build_head(name, {}, seed=0).fit_path(rows.X, rows.y, candidates=candidates)
            right = [(head.column_scores(X).argmax(axis=1) == y).sum() for head in heads]
            found += list(zip(right, [name] * len(right), candidates, strict=True))
        assert len(found) == 500
        _, name, values = max(found, key=lambda one: one[0])
        selection = Selection(
            params={**values, "temperature": 1.0}, candidates=(), criterion="nll", n_folds=0
        )
        return Choice(head=name, kind=HEADS[name], selection=selection, competition=None, offsets=None)

    return choose


@pytest.mark.parametrize("leak", [False, True])
def test_500_configurations_on_random_labels_leave_the_score_at_chance(
    leak: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: a score that the choice was made by. With that leak put in, the same bound does not hold."""
    for name, grid in SWEEP.items():
        monkeypatch.setitem(HEADS, name, replace(HEADS[name], grid=grid, factor=None))  # type: ignore[misc]
    right = total = 0
    for seed in range(8):
        features = gaussian_features({"train": 100, "test": 100}, k=2, d=40, gap=0, seed=seed)
        y = np.random.default_rng(900 + seed).integers(0, 2, size=200)
        features = replace(features, y=y)
        if leak:
            monkeypatch.setattr(fitting, "choose_head", by_the_rows_scored(features))
        metrics = run(features).metrics
        right, total = right + round(metrics.accuracy * metrics.n), total + metrics.n
    # Given the heads, each row scored is a toss of its own: its label was drawn after all else.
    low, high = map(int, binom.interval(0.95, total, 0.5))
    assert right >= low
    assert (right > high) is leak


def test_augmented_vectors_reach_the_heads_that_use_them_and_no_others() -> None:
    features = gaussian_features({"train": 60, "test": 30}, gap=1)
    rng = np.random.default_rng(0)
    views = tuple(features.X + rng.normal(size=features.X.shape).astype(np.float32) for _ in range(2))
    augmented = replace(features, views=views)
    given = {"lr": 1e-2, "weight_decay": 0.1, "epochs": 3}
    plain, more = (run_model(some, head="linear", params=given) for some in (features, augmented))
    assert not np.array_equal(plain.arrays["coef"], more.arrays["coef"])
    first, second = (run_model(some, head="ridge") for some in (features, augmented))
    np.testing.assert_array_equal(first.arrays["coef"], second.arrays["coef"])
    scored = np.flatnonzero(features.splits == "test")
    for view in views:
        view[scored] = np.nan  # of rows that are scored, no view is looked at
    again = run_model(replace(features, views=views), head="linear", params=given)
    np.testing.assert_array_equal(again.arrays["coef"], more.arrays["coef"])


@pytest.mark.parametrize("nodes", [["penultimate"], ["stem:max", "penultimate"]])
def test_a_store_gives_the_other_views_of_the_same_rows(tmp_path: Path, nodes: list[str]) -> None:
    path = make_toy_store(tmp_path / "s.h5", n=10, fill=False, spec=toy_spec(views=3, views_seed=0))
    store = FeatureStore.open(path, check=False)
    with StoreWriter(store.layout) as writer:
        for block in range(store.layout.n_blocks):
            rows = store.layout.rows_of(block)
            n = rows.stop - rows.start
            drawn = {
                key: np.random.default_rng([block, i]).normal(size=(n, region.shape[1])).astype(np.float32)
                for i, (key, region) in enumerate(sorted(store.layout.features.items()))
            }
            status = np.full(n, RowStatus.OK, dtype=np.uint8)
            writer.write_block(block, features=drawn, row_status=status, sources=np.zeros(n, SOURCE_DTYPE))
    opened = FeatureStore.open(path)
    found = opened.features(nodes, with_views=True)
    assert len(found.views) == 2
    for view, vectors in enumerate(found.views, start=1):
        np.testing.assert_array_equal(vectors, opened.features(nodes, view=view).X)
    assert not np.array_equal(found.views[0], found.views[1])
    assert opened.features(nodes).views == ()
