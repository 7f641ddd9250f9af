"""Splits by content, metrics by hand, and selection that sees training rows only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import log_loss

from featcache.errors import HeadError
from featcache.evaluate.metrics import expected_calibration_error, score, wilson_interval
from featcache.evaluate.select import TrainingRows, _Search, select
from featcache.evaluate.splits import NEVER, Groups, hold_out, make_folds
from featcache.heads import HEADS
from featcache.heads.temperature import fit_temperature


def digests(n: int, *, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, size=(n, 32), dtype=np.uint8)


def test_the_hold_out_is_a_fifth_and_neither_order_nor_new_images_move_an_image() -> None:
    sha, y = digests(2000), np.arange(2000) % 4
    test = hold_out(sha, y)
    assert 0.17 < test.mean() < 0.23
    order = np.random.default_rng(1).permutation(2000)
    np.testing.assert_array_equal(hold_out(sha[order], y[order]), test[order])
    np.testing.assert_array_equal(hold_out(sha[:1000], y[:1000]), test[:1000])
    np.testing.assert_array_equal(test, sha[:, 0].astype(int) * 256 + sha[:, 1] < 0.2 * 65536)


@pytest.mark.parametrize("first_byte", [0, 255])
def test_a_class_of_two_images_has_one_on_each_side(first_byte: int) -> None:
    sha = digests(4)
    sha[:, 0] = first_byte
    y = np.array([0, 0, 1, 1])
    test = hold_out(sha, y)
    assert [test[y == k].sum() for k in (0, 1)] == [1, 1]


def test_identical_images_stay_on_one_side_and_in_one_fold() -> None:
    sha, y = np.repeat(digests(40), 3, axis=0), np.repeat(np.arange(40) % 2, 3)
    for side in (hold_out(sha, y), make_folds(sha, y, seed=0).fold):
        assert all(len(set(three)) == 1 for three in side.reshape(-1, 3).tolist())


def test_folds_spread_every_class_and_follow_the_seed_not_the_order() -> None:
    sha, y = digests(103), np.arange(103) % 3
    folds = make_folds(sha, y, seed=0)
    counts = np.array([np.bincount(folds.fold[y == k], minlength=5) for k in range(3)])
    assert folds.n_folds == 5
    assert (np.ptp(counts, axis=1) <= 1).all()
    assert np.ptp(counts.sum(axis=0)) <= 1
    np.testing.assert_array_equal(make_folds(sha[::-1], y[::-1], seed=0).fold[::-1], folds.fold)
    assert (make_folds(sha, y, seed=1).fold != folds.fold).any()


def test_small_classes_lower_the_folds_and_single_images_are_never_held_out() -> None:
    y = np.array([0] * 9 + [1] * 3 + [2])
    folds = make_folds(digests(13), y, seed=0)
    assert folds.n_folds == 3
    assert folds.fold[-1] == NEVER
    assert make_folds(digests(3), np.arange(3), seed=0).n_folds == 0


def test_metrics_are_what_one_counts_by_hand() -> None:
    y = np.array([0, 0, 0, 1, -1])
    p = np.array([[0.8, 0.2, 0], [0.6, 0.4, 0], [0.3, 0.7, 0], [0.1, 0.9, 0], [1, 0, 0]])
    m = score(y, p, ("a", "b", "c"))
    assert (m.n, m.accuracy, m.top5) == (4, 0.75, None)
    assert m.mean_per_class_accuracy == pytest.approx((2 / 3 + 1) / 2)
    assert m.nll == pytest.approx(log_loss(y[:4], p[:4, :2]))
    assert m.confusion == ((2, 1, 0), (0, 1, 0), (0, 0, 0))
    assert m.per_class[1].precision == 0.5
    assert m.per_class[2].accuracy is None


def test_a_class_the_head_does_not_know_counts_as_an_error() -> None:
    p = np.tile([0.5, 0.5, 0, 0, 0, 0], (2, 1))
    m = score(np.array([0, 5]), p, tuple("abcdef"))
    assert (m.accuracy, m.top5) == (0.5, 0.5)
    assert np.isfinite(m.nll)


def test_the_interval_is_wilsons() -> None:
    assert wilson_interval(145, 153) == pytest.approx((0.9002, 0.9733), abs=1e-4)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)


def test_the_calibration_error_weighs_the_gap_of_each_bin() -> None:
    confidence, correct = np.array([1.0, 1.0, 0.5, 0.5]), np.array([True, False, True, True])
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.5)


def noisy(n: int = 120) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    y = np.arange(n) % 3
    return rng.normal(size=(3, 6))[y] * 0.7 + rng.normal(size=(n, 6)), y


def choose(name: str, params: Any = None, *, kind: Any = None) -> Any:
    X, y = noisy()
    rows = TrainingRows(X=X, y=y, folds=make_folds(digests(len(y)), y, seed=0))
    return select(name, kind or HEADS[name], params or {}, rows=rows, seed=0)


@pytest.mark.parametrize("name", [n for n in HEADS if HEADS[n].searched and n != "linear"])
def test_selection_takes_the_best_candidate_and_repeats_itself(name: str) -> None:
    kind, found = HEADS[name], choose(name)
    cost = [c.nll if kind.criterion == "nll" else -c.accuracy for c in found.candidates]
    chosen = {parameter: found.params[parameter] for parameter in kind.searched}
    assert min(cost) == cost[[c.values for c in found.candidates].index(chosen)]
    assert found.best.values == chosen
    assert found == choose(name)


def test_a_grid_grows_until_its_best_is_inside() -> None:
    import dataclasses

    kind = dataclasses.replace(HEADS["logistic"], grid={"C": (1e-4, 1e-3)})
    values = [c.values["C"] for c in choose("logistic", kind=kind).candidates]
    chosen = choose("logistic", kind=kind).params["C"]
    assert len(values) > 2
    assert values[0] < chosen < values[-1]


def test_the_best_inside_a_grid_gets_a_value_beside_it() -> None:
    values = np.array([c.values["C"] for c in choose("logistic").candidates])
    grid = np.array([C for C in HEADS["logistic"].grid["C"] if C in values])
    (new,) = [value for value in values if np.abs(value / grid - 1).min() > 1e-9]
    by_value = {c.values["C"]: c.nll for c in choose("logistic").candidates}
    below, above = grid[grid < new].max(), grid[grid > new].min()
    assert new == pytest.approx((below * above) ** 0.5)
    first, second = sorted(grid, key=lambda value: by_value[value])[:2]
    assert {first, second} == {below, above}


@pytest.mark.parametrize(
    ("told", "best", "tried"),
    [
        ((0.4, 0.6, 0.9, 0.5, 0.3), 1e-2, {1e-4, 1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1}),
        ((0.5, 0.4, 0.6, 0.9, 0.7), 1e-1, {1e-4, 1e-3, 1e-2, 10**-1.5, 1e-1, 10**-0.5, 1.0}),
    ],
    ids=["a valley", "a rise before the valley"],
)
def test_a_search_ends_where_it_rises_after_a_fall(
    told: Any, best: float, tried: set[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """told: the probability of the right class at each decade, as heavy tails of the features can have it."""

    def tables(self: Any, candidates: Any) -> Any:
        for values in candidates:
            p = np.interp(np.log10(values["C"]), np.arange(-4, 1), told)
            yield np.log(2 * p / (1 - p)) * np.eye(3)[self.rows.y]

    monkeypatch.setattr(_Search, "_tables", tables)
    found = choose("logistic", {"temperature": 1.0})
    on_grid = [c for c in found.candidates if c.values["C"] in HEADS["logistic"].grid["C"]]
    assert min(on_grid, key=lambda c: c.nll).values["C"] == best
    assert {c.values["C"] for c in on_grid} == tried


def test_a_grid_does_not_grow_where_all_is_flat() -> None:
    import dataclasses

    kind = dataclasses.replace(HEADS["ridge"], grid={"alpha": (1e-6, 1e-5, 1e-4)})
    found = choose("ridge", kind=kind)
    assert [c.values["alpha"] for c in found.candidates] == [1e-6, 1e-5, 1e-4]
    assert found.notes == ()


def test_the_temperature_of_rows_that_were_all_right_leaves_room_for_an_error() -> None:
    """By the rule of succession: with a share of 1 / (n + 2) spread over K classes."""
    n, K = 18, 4
    y = np.arange(n) % K
    scores = 3.0 * np.eye(K)[y]
    p = np.exp(3.0 / fit_temperature(scores, y))
    assert p / (p + K - 1) == pytest.approx(1 - 1 / (n + 2) * (K - 1) / K, rel=1e-4)
    weights = np.where(y == 0, 0.0, 1.0)
    scores[y == 0] = 0.0  # wrong as can be, and of no weight
    p = np.exp(3.0 / fit_temperature(scores, y, weights=weights))
    assert p / (p + K - 1) == pytest.approx(1 - 1 / (n + 2) * (K - 1) / K, rel=1e-4)


def test_giving_the_searched_parameter_ends_the_search_but_not_the_calibration() -> None:
    assert choose("logistic", {"C": 1}).candidates == ()
    found = choose("ridge", {"alpha": 2.0})
    assert found.candidates == ()
    assert found.params["alpha"] == 2.0
    assert found.params["temperature"] != 1.0


def test_ties_go_to_the_stronger_regularisation() -> None:
    X = np.repeat(np.eye(2), 40, axis=0)
    y = np.repeat([0, 1], 40)
    folds = make_folds(digests(80), y, seed=0)
    found = select("knn", HEADS["knn"], {}, rows=TrainingRows(X=X, y=y, folds=folds), seed=0)
    best = max(c.accuracy for c in found.candidates)
    assert found.params["k"] == max(c.values["k"] for c in found.candidates if c.accuracy == best)


def test_the_temperature_of_many_rows_does_not_hang_on_their_order() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(40_000) % 2
    told = np.where((y == 1) & (rng.random(len(y)) < 0.4), 0, y)  # of class 1 many are wrong
    scores = 5.0 * np.eye(2)[told]
    order = rng.permutation(len(y))
    T = fit_temperature(scores, y)
    assert fit_temperature(scores[order], y[order]) == pytest.approx(T, rel=0.05)
    assert np.exp(5 / T) == pytest.approx(0.8 / 0.2, rel=0.05)  # a fifth of the rows are wrong


def grouped(labels: Any, groups: Any) -> Any:
    y, index = np.array(labels), np.array(groups)
    of = Groups(index=index, keys=digests(int(index.max()) + 1, seed=5), by="g")
    return y, make_folds(digests(len(y)), y, seed=0, groups=of)


@pytest.mark.parametrize(
    ("labels", "groups", "why"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], "every class lies in a single group"),
        ([0, 0, 1, 1], [0, 1, 0, 0], "fewer than two groups could be held out without the loss of a class"),
        ([0, 1, 2], [0, 1, 2], "every class lies in a single group"),
    ],
)
def test_where_less_than_two_groups_can_be_held_out_there_are_no_folds(
    labels: Any, groups: Any, why: str
) -> None:
    y, folds = grouped(labels, groups)
    assert (folds.n_folds, folds.held_out.any()) == (0, False)
    rows = TrainingRows(X=np.eye(len(y)), y=y, folds=folds)
    (note,) = select("ncm", HEADS["ncm"], {}, rows=rows, seed=0).notes
    assert note == f"{why}: nothing could be held out, so nothing was chosen"


def test_single_images_are_why_nothing_is_held_out_without_groups() -> None:
    rows = TrainingRows(X=np.eye(3), y=np.arange(3), folds=make_folds(digests(3), np.arange(3), seed=0))
    (note,) = select("ncm", HEADS["ncm"], {}, rows=rows, seed=0).notes
    assert note.startswith("every class has a single image: ")


def test_classes_that_no_fold_holds_out_are_noted() -> None:
    X, y = noisy()
    y = np.r_[y[:-1], 3]
    rows = TrainingRows(X=X, y=y, folds=make_folds(digests(len(y)), y, seed=0))
    notes = select("ncm", HEADS["ncm"], {}, rows=rows, seed=0).notes
    assert notes == ("no row of 1 of the 4 classes could be held out in cross-validation",)


def spoil(monkeypatch: pytest.MonkeyPatch, *, most: int = 10**6, head: str | None = None) -> None:
    """The first `most` candidates of each round get a score that is not a number."""
    tables = _Search._tables

    def spoiled(self: Any, candidates: Any) -> Any:
        for index, table in enumerate(tables(self, candidates)):
            bad = index < most and head in (None, self.name)
            yield np.where(np.arange(len(table))[:, None] == 7, np.nan, table) if bad else table

    monkeypatch.setattr(_Search, "_tables", spoiled)


def test_a_candidate_without_finite_scores_is_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    kind = dataclasses.replace(HEADS["lda"], factor=None)
    spoil(monkeypatch, most=3)
    with np.errstate(all="raise"):
        found = choose("lda", kind=kind)
    assert [np.isfinite(c.nll) for c in found.candidates] == [False] * 3 + [True] * 5
    assert found.best.nll == min(c.nll for c in found.candidates)
    assert found.candidates[0].to_json()["nll"] is None
    assert found.candidates[0].to_json()["nll_se"] is None


@pytest.mark.parametrize("name", ["ncm", "ridge", "knn"])
def test_a_head_without_finite_scores_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    spoil(monkeypatch)
    with pytest.raises(HeadError, match=f"^{name} cannot be fitted: its scores .* are not finite[^\n]*$"):
        choose(name)
