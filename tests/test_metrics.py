"""Scores with their intervals, what is confused, what the numbers say in words, and when to abstain."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score, top_k_accuracy_score

from featcache.evaluate.abstain import _shortest, accepted_at, choose_abstention, choose_threshold
from featcache.evaluate.bootstrap import (
    LEAST_UNITS,
    draws_for,
    interval,
    paired_means,
    resampled_sums,
    row_counts,
)
from featcache.evaluate.metrics import Metrics, expected_calibration_error, log_losses, score, wilson_interval
from featcache.evaluate.report import class_lines, difference_interval, judge, score_lines, verdict_lines


def world(n: int, k: int, *, pull: float = 1.5, seed: int = 0) -> tuple[Any, Any]:
    """Labels and calibrated-looking probabilities that are right more often than chance."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    scores = rng.normal(size=(n, k))
    scores[np.arange(n), y] += pull
    return y, softmax(scores, axis=1)


def names(k: int) -> tuple[str, ...]:
    return tuple(f"c{i}" for i in range(k))


def right(rate: float, n: int, *, k: int = 2) -> Metrics:
    """Metrics of n rows of which this share is right."""
    y, p = np.zeros(n, dtype=np.int64), np.zeros((n, k))
    hits = round(rate * n)
    p[:hits, 0], p[hits:, 1] = 1, 1
    return score(y, p, names(k), draws=0)


@pytest.mark.parametrize("k", [2, 7])
def test_class_scores_are_those_of_scikit_learn(k: int) -> None:
    y, p = world(400, k)
    m, said = score(y, p, names(k)), p.argmax(axis=1)
    for name, theirs in (("accuracy", recall_score), ("precision", precision_score), ("f1", f1_score)):
        ours = [getattr(row, name) for row in m.per_class]
        np.testing.assert_allclose(ours, theirs(y, said, average=None))
    if k > 5:
        assert m.top5 == pytest.approx(top_k_accuracy_score(y, p, k=5))
        assert m.auroc is None
    else:
        assert m.auroc == pytest.approx(roc_auc_score(y, p[:, 1]))


def test_the_area_under_the_curve_counts_equal_scores_half() -> None:
    y = np.array([0, 0, 1, 1, 1])
    second = np.array([0.2, 0.5, 0.5, 0.5, 0.9])
    m = score(y, np.stack([1 - second, second], axis=1), names(2))
    assert m.auroc == pytest.approx((3 * 1 + 2 * 0.5 + 1) / 6)
    assert score(np.zeros(5, dtype=int), np.full((5, 2), 0.5), names(2)).auroc is None


def test_the_top_five_is_that_of_a_stable_sort() -> None:
    y, p = world(300, 8)
    p = np.round(p, 1)  # many equal ones
    top = np.argsort(-p, axis=1, kind="stable")[:, :5]
    assert score(y, p, names(8)).top5 == ((top == y[:, None]).any(axis=1) & (p[range(300), y] > 0)).mean()


def test_a_drawing_has_as_many_rows_and_all_rows_are_drawn_alike() -> None:
    counts = np.concatenate(list(row_counts(50, draws=4000, seed=1)), axis=1)
    assert counts.shape == (50, 4000)
    assert (counts.sum(axis=0) == 50).all()
    # A count is binomial (50, 1/50): mean 1, variance 0.98, standard error of the mean 0.016.
    np.testing.assert_allclose(counts.mean(axis=1), 1, atol=5 * 0.016)
    np.testing.assert_allclose(counts.var(axis=1), 0.98, rtol=0.15)


def test_many_rows_are_drawn_less_often() -> None:
    assert draws_for(10_000) == 1000
    assert draws_for(200_000) == 500
    assert draws_for(10**8) == 200
    assert draws_for(10**8, draws=50) == 50


def test_the_intervals_are_those_of_a_plain_loop() -> None:
    k, draws = 3, 300
    y, p = world(90, k)
    m = score(y, p, names(k), draws=draws, seed=5)
    drawn: dict[str, list[float]] = {"nll": [], "ece": [], "mean_per_class_accuracy": []}
    for counts in row_counts(90, draws=draws, seed=5):
        for column in counts.T.astype(int):
            rows = np.repeat(np.arange(90), column)
            there, confidence, hits = y[rows], p[rows].max(axis=1), p[rows].argmax(axis=1) == y[rows]
            drawn["nll"].append(log_losses(there, p[rows]).mean())
            drawn["ece"].append(expected_calibration_error(confidence, hits))
            recalls = [hits[there == c].mean() for c in range(k) if (there == c).any()]
            drawn["mean_per_class_accuracy"].append(np.mean(recalls))
    rate, variance = m.mean_per_class_accuracy, np.var(drawn.pop("mean_per_class_accuracy")) * 90 / 89
    n = rate * (1 - rate) / variance
    assert m.mean_per_class_accuracy_ci95 == pytest.approx(wilson_interval(rate * n, n))
    for name, values in drawn.items():
        found, expected = getattr(m, name), np.quantile(values, [0.025, 0.975])
        moved = expected - (np.mean(values) - found)
        np.testing.assert_allclose(getattr(m, f"{name}_ci95"), np.maximum(moved, 0), rtol=1e-9)


def test_the_interval_of_the_area_is_that_of_a_plain_loop() -> None:
    y, p = world(60, 2)
    p = np.round(p, 1)
    m = score(y, p, names(2), draws=100, seed=5)
    values = []
    for counts in row_counts(60, draws=100, seed=5):
        values += [roc_auc_score(y, p[:, 1], sample_weight=column) for column in counts.T]
    area = roc_auc_score(y, p[:, 1])
    n = area * (1 - area) / (np.var(values) * 60 / 59)
    assert m.auroc_ci95 == pytest.approx(wilson_interval(area * n, n))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """95 of 100, within what 300 repetitions can tell: 4 standard errors of 0.0126."""
    everything = world(400_000, 4, seed=99)
    truth = score(*everything, names(4), draws=0)
    held = {"nll": 0, "mean_per_class_accuracy": 0}
    for seed in range(300):
        m = score(*world(150, 4, seed=seed), names(4), draws=200, seed=seed)
        for name in held:
            low, high = getattr(m, f"{name}_ci95")
            held[name] += low <= getattr(truth, name) <= high
    assert min(held.values()) / 300 > 0.95 - 4 * 0.0126


@pytest.mark.parametrize(("k", "pull"), [(2, 1.0), (2, 3.0), (4, 3.0)])
@pytest.mark.parametrize("n", [4, 12, 40])
def test_intervals_of_few_rows_hold_the_truth_as_often_as_they_say(n: int, k: int, pull: float) -> None:
    """Where nearly all is right, quantiles of a bootstrap would hold it 1 to 60 times in 100."""
    truth = score(*world(400_000, k, pull=pull, seed=99), names(k), draws=0)
    held: dict[str, list[bool]] = {}
    for seed in range(300):
        m = score(*world(n, k, pull=pull, seed=seed), names(k), draws=200, seed=seed)
        for name in ("mean_per_class_accuracy", "auroc", "nll"):
            if ends := getattr(m, f"{name}_ci95"):
                held.setdefault(name, []).append(ends[0] <= getattr(truth, name) <= ends[1])
    assert ("nll" in held) == (n >= LEAST_UNITS)
    for name, hits in held.items():
        assert np.mean(hits) > 0.95 - 5 * 0.0126, name


def test_a_few_rows_that_are_all_right_are_no_certainty() -> None:
    y, p = np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]])
    m = score(y, p, names(2))
    assert m.accuracy_ci95 == wilson_interval(3, 3)
    # Of weights 1/4, 1/4 and 1/2: 8/3 rows of equal weight. Of pairs of which no row is in two there is one.
    assert m.mean_per_class_accuracy_ci95 == pytest.approx(wilson_interval(8 / 3, 8 / 3))
    assert m.auroc_ci95 == wilson_interval(1, 1)
    assert (m.nll_ci95, m.ece_ci95) == (None, None)
    lines = score_lines(m, on="test")
    assert lines[4].endswith("(too few rows for an interval)")
    assert lines[5].endswith("(too few rows for an interval)")
    assert json.loads(json.dumps(m.to_json()))["nll_ci95"] is None


def test_rows_that_are_all_alike_are_no_certainty() -> None:
    y = np.repeat([0, 1], 30)
    m = score(y, np.eye(2)[y], names(2))
    assert (m.nll, m.nll_ci95, m.ece_ci95) == (pytest.approx(0), None, None)
    assert m.mean_per_class_accuracy_ci95 == pytest.approx(wilson_interval(60, 60))
    assert m.auroc_ci95 == pytest.approx(wilson_interval(30, 30))
    assert "too few" not in "\n".join(score_lines(m, on="test"))


def test_a_class_all_right_and_one_all_wrong_are_no_certainty() -> None:
    y, p = np.repeat([0, 1], 5), np.tile([0.9, 0.1], (10, 1))
    assert score(y, p, names(2)).mean_per_class_accuracy_ci95 == pytest.approx(wilson_interval(10, 20))


def test_the_share_in_the_top_five_has_the_interval_of_a_share() -> None:
    m = score(*world(50, 8, pull=0.5), names(8))
    assert m.top5 is not None
    assert m.top5_ci95 == pytest.approx(wilson_interval(m.top5 * 50, 50))


def test_intervals_hold_the_score_and_stay_in_their_range() -> None:
    for n, k, pull in ((20, 2, 9.0), (40, 6, 0.0), (500, 7, 2.0)):
        m = score(*world(n, k, pull=pull), names(k))
        for name in ("accuracy", "mean_per_class_accuracy", "nll", "ece", "top5", "auroc"):
            found, ends = getattr(m, name), getattr(m, f"{name}_ci95")
            assert (found is None) == (ends is None)
            if found is not None:
                assert 0 <= ends[0] <= found + 1e-12, name
                assert found - 1e-12 <= ends[1], name
                assert name == "nll" or ends[1] <= 1


def test_intervals_repeat_themselves_and_can_be_left_out() -> None:
    y, p = world(60, 3)
    assert score(y, p, names(3)) == score(y, p, names(3))
    assert score(y, p, names(3), seed=1) != score(y, p, names(3))
    without = score(y, p, names(3), draws=0)
    assert without.nll_ci95 is None
    assert without.accuracy_ci95 == wilson_interval(round(without.accuracy * 60), 60)


def test_copies_of_a_row_tell_nothing_new() -> None:
    """With every row three times, all intervals are those of the rows alone."""
    y, p = world(200, 2)
    alone = score(y, p, names(2), seed=1)
    copied = score(np.tile(y, 3), np.tile(p, (3, 1)), names(2), units=np.tile(np.arange(200), 3), seed=1)
    assert (copied.n, copied.n_units, alone.n_units) == (600, 200, 200)
    for name in ("mean_per_class_accuracy", "nll", "ece", "auroc"):
        assert getattr(alone, f"{name}_ci95") is not None
        assert getattr(copied, f"{name}_ci95") == pytest.approx(getattr(alone, f"{name}_ci95"))
    # The variance of 200 means has 199 degrees of freedom.
    hits = alone.accuracy * 199
    assert copied.accuracy_ci95 == pytest.approx(wilson_interval(hits, 199))
    assert "scored on 600 rows, of 200 different images or groups: test" in score_lines(copied, on="test")


def test_units_of_different_sizes_are_drawn_as_a_plain_loop_draws_them() -> None:
    y, p = world(60, 3)
    units = np.sort(np.random.default_rng(1).integers(0, 40, 60))
    m = score(y, p, names(3), units=units, draws=200, seed=5)
    values = []
    for counts in row_counts(60, draws=200, seed=5, units=units):
        values += [np.average(log_losses(y, p), weights=column) for column in counts.T]
        for unit in np.unique(units):
            assert (np.ptp(counts[units == unit], axis=0) == 0).all()  # all rows of a unit or none
    moved = np.quantile(values, [0.025, 0.975]) - (np.mean(values) - m.nll)
    assert m.nll_ci95 == pytest.approx(tuple(moved))


def test_units_of_one_row_change_nothing() -> None:
    y, p = world(100, 3)
    assert score(y, p, names(3), units=np.arange(100)[::-1]).n_units == 100
    alone, ones = score(y, p, names(3)), score(y, p, names(3), units=np.arange(100))
    assert ones.nll_ci95 == alone.nll_ci95
    assert ones.accuracy_ci95 == pytest.approx(alone.accuracy_ci95, abs=1e-3)


def test_the_interval_of_accuracy_holds_the_truth_where_rows_come_in_groups() -> None:
    """Groups of 10 rows that are right or wrong together 8 times in 10: rows alone would hold it far less."""
    held = {True: 0, False: 0}
    for seed in range(300):
        rng = np.random.default_rng(seed)
        unit = np.repeat(np.arange(40), 10)
        together = np.repeat(rng.random(40) < 0.7, 10)
        hits = np.where(rng.random(400) < 0.8, together, rng.random(400) < 0.7)
        p = np.where(hits[:, None], [1.0, 0.0], [0.0, 1.0])
        for known in held:
            units = unit if known else None
            low, high = score(np.zeros(400, int), p, names(2), units=units, draws=0).accuracy_ci95
            held[known] += low <= 0.7 <= high
    assert held[True] / 300 > 0.95 - 4 * 0.0126
    assert held[False] / 300 < 0.75


def test_all_rows_right_are_as_many_as_their_units() -> None:
    y, p = np.zeros(40, int), np.tile([1.0, 0.0], (40, 1))
    m = score(y, p, names(2), units=np.repeat(np.arange(10), 4))
    assert m.accuracy_ci95 == pytest.approx(wilson_interval(10, 10))


def test_a_single_row_has_no_interval_but_wilsons() -> None:
    m = score(np.array([0]), np.array([[0.9, 0.1]]), names(2))
    assert (m.nll_ci95, m.accuracy_ci95) == (None, wilson_interval(1, 1))
    assert score_lines(m, on="test")[3] == "  log-loss            0.1054  (too few rows for an interval)"


def test_the_most_confused_pairs_are_named_with_their_surest_rows() -> None:
    y = np.array([0, 0, 0, 0, 1, 1, 2, -1])
    p = np.array(
        [[0.9, 0.1, 0], [0.4, 0.6, 0], [0.2, 0.8, 0], [0.3, 0, 0.7], [0, 1, 0], [0.5, 0.4, 0.1],
         [0, 0, 1], [0, 1, 0]]
    )  # fmt: skip
    m = score(y, p, ("a", "b", "c"), [f"{i}.jpg" for i in range(8)])
    assert [(pair.true, pair.predicted, pair.n) for pair in m.confused] == [
        ("a", "b", 2),
        ("a", "c", 1),
        ("b", "a", 1),
    ]
    assert m.confused[0].ids == ("2.jpg", "1.jpg")
    assert score(y, p, ("a", "b", "c")).confused[0].ids == ()
    assert any("2 of a taken for b, such as 2.jpg" in line for line in class_lines(m))


@pytest.mark.parametrize(("k", "whole"), [(100, True), (101, False)])
def test_the_confusion_of_many_classes_is_kept_as_what_is_not_zero(k: int, whole: bool) -> None:
    y, p = world(300, k)
    m = score(y, p, names(k), draws=10)
    table = np.zeros((k, k), dtype=int)
    np.add.at(table, (y, p.argmax(axis=1)), 1)
    assert (m.confusion is not None) == whole
    if m.confusion is not None:
        np.testing.assert_array_equal(m.confusion, table)
        assert m.confusion_counts == ()
    else:
        assert {(t, s): n for t, s, n in m.confusion_counts} == {
            (int(t), int(s)): int(table[t, s]) for t, s in zip(*table.nonzero(), strict=True)
        }
    assert len(json.dumps(m.to_json(), allow_nan=False)) < 60_000


def test_a_thousand_classes_make_a_report_of_a_screen() -> None:
    m = score(*world(3000, 1000), names(1000), draws=10)
    lines = class_lines(m)
    assert len(lines) < 20
    assert lines[0].startswith("worst of 1,000 classes")


def test_the_scores_are_listed_with_their_intervals() -> None:
    m = score(*world(200, 7), names(7))
    lines = score_lines(m, on="test", train_accuracy=0.9, uncalibrated_ece=0.25)
    assert lines[0] == "scored on 200 rows: test"
    low, high = m.accuracy_ci95
    assert lines[1] == f"  accuracy            {m.accuracy:.4f}  (95 % interval {low:.4f} to {high:.4f})"
    text = "\n".join(lines)
    for words in ("mean per class", "in the top 5", "log-loss", "0.2500 before its temperature", "0.9000"):
        assert words in text
    assert "ROC" not in text
    assert "on train" not in "\n".join(score_lines(m, on="test"))


def test_the_matrix_of_few_classes_shows_counts_and_shares() -> None:
    y, p = np.array([0, 0, 1]), np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0]])
    lines = class_lines(score(y, p, ("ant", "bee\n", "fly")))
    assert lines[1:4] == [
        "   1 1 0   0.50 1.00 0.67  ant",
        "   0 1 0   1.00 0.50 0.67  bee\\n",
        "   0 0 0      -    -    -  fly",
    ]


@pytest.mark.parametrize(
    ("train", "test", "n", "fit", "words"),
    [
        (
            1.0,
            0.80,
            500,
            "overfits",
            "0.0 % of the rows trained on are wrong, 20.0 % of those scored. More im",
        ),
        (0.82, 0.80, 500, "underfits", "other nodes, another backbone or fine-tuning"),
        (0.99, 0.98, 5000, "fits", "1.0 % of the rows trained on are wrong"),
        (1.0, 0.9, 10, "fits", "fits"),  # ten rows cannot tell
        (0.9, 0.9, 10, "fits", "fits"),
        (1.0, 0.9, 1000, "overfits", "overfits"),
    ],
)
def test_under_and_overfitting_are_told_from_the_errors(
    train: float, test: float, n: int, fit: str, words: str
) -> None:
    verdict = judge(train, right(test, n))
    assert verdict.fit == fit
    assert words in verdict.lines[0]
    assert verdict.drift is None


@pytest.mark.parametrize(
    ("cv", "test", "n", "words"),
    [
        (0.95, 0.85, 500, "worse than expected.*10.0 points less.*other data than the training rows"),
        (0.85, 0.95, 500, "better than expected.*10.0 points more.*easier"),
        (
            0.90,
            0.89,
            500,
            "as expected: 90.0 % were right in cross-validation, 89.0 % are on the rows scored",
        ),
        (1.0, 0.9, 10, "as expected"),
    ],
)
def test_a_test_score_that_cross_validation_did_not_promise_is_said(
    cv: float, test: float, n: int, words: str
) -> None:
    import re

    lines = verdict_lines(1.0, right(test, n), held_out=right(cv, n))
    assert re.search(words, lines[1])
    report = judge(1.0, right(test, n), held_out=right(cv, n)).to_json()
    assert report["drift"]["is_real"] == ("as expected" not in words)
    json.dumps(report, allow_nan=False)


def test_the_interval_of_a_difference_is_newcombes() -> None:
    # Newcombe 1998, table II, method 10: 56/70 against 48/80 gives 0.0524 to 0.3339.
    low, high = difference_interval(right(56 / 70, 70), right(48 / 80, 80))
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_paired_intervals_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    columns = rng.random((40, 3))
    found = paired_means(columns, draws=200, seed=3)
    means = []
    for counts in row_counts(40, draws=200, seed=3):
        for column in counts.T.astype(int):
            means.append(columns[np.repeat(np.arange(40), column)].mean(axis=0))
    drawn = np.array(means)
    pairs = [(0, 1), (0, 2), (1, 2)]
    errors = [np.std(drawn[:, a] - drawn[:, b], ddof=1) for a, b in pairs]
    observed = columns.mean(axis=0)
    largest = [
        max(
            abs((row[a] - row[b]) - (observed[a] - observed[b])) / error
            for (a, b), error in zip(pairs, errors, strict=True)
        )
        for row in drawn
    ]
    assert found.factor == pytest.approx(np.quantile(largest, 0.95))
    assert [found.errors[pair] for pair in pairs] == pytest.approx(errors)
    difference, low, high = found.difference(2, 0)
    assert difference == pytest.approx(observed[2] - observed[0])
    assert high - difference == pytest.approx(found.factor * errors[1]) == difference - low


def test_candidates_right_on_the_same_rows_may_differ_on_others() -> None:
    """Agresti & Min 2005: half a row in each cell, so a standard error of 1 / (n + 2)."""
    hits = np.random.default_rng(0).random(200) < 0.8
    found = paired_means(np.stack([hits, hits], axis=1))
    assert found.errors[0, 1] == pytest.approx(1 / 202)
    assert found.factor == pytest.approx(1.972, abs=1e-3)  # Student's, of 199 degrees of freedom
    assert found.difference(0, 1) == pytest.approx((0, -1.972 / 202, 1.972 / 202), abs=1e-5)
    copied = paired_means(np.tile(np.stack([hits, hits], 1), (5, 1)), units=np.tile(np.arange(200), 5))
    assert copied.errors[0, 1] == pytest.approx(1 / 202)


def test_a_handful_of_rows_proves_nothing() -> None:
    for n in (1, 2, 3):
        hits = np.ones(n, dtype=bool)
        assert paired_means(np.stack([hits, ~hits], axis=1)).difference(0, 1)[1] < 0
    hits = np.ones(30, dtype=bool)
    assert paired_means(np.stack([hits, ~hits], axis=1)).difference(0, 1)[1] > 0.5


def test_what_rows_share_cancels_in_a_paired_difference() -> None:
    """One candidate is right on every row that the other is, and on 20 of 1,000 more."""
    hits = np.random.default_rng(0).random(1000) < 0.6
    better = hits.copy()
    better[np.flatnonzero(~hits)[:20]] = True
    difference, low, high = paired_means(np.stack([better, hits], axis=1)).difference(0, 1)
    assert difference == pytest.approx(0.02)
    assert 0.008 < low < high < 0.032
    unpaired = difference_interval(right(better.mean(), 1000), right(hits.mean(), 1000))
    assert unpaired[0] < 0 < unpaired[1]


def test_a_paired_difference_counts_copies_once() -> None:
    columns = np.random.default_rng(0).random((100, 2)) < [0.8, 0.6]
    alone = paired_means(columns, seed=2)
    copied = paired_means(np.tile(columns, (4, 1)), seed=2, units=np.tile(np.arange(100), 4))
    assert copied.difference(0, 1) == pytest.approx(alone.difference(0, 1))


def test_many_equal_candidates_are_seldom_told_apart() -> None:
    """All 45 differences of ten equal candidates at once: wrong 1 time in 20, within 3 standard errors."""
    wrong = 0
    for seed in range(100):
        columns = np.random.default_rng(seed).random((150, 10)) < 0.7
        found = paired_means(columns, draws=200, seed=seed)
        apart = np.abs(found.means[:, None] - found.means) > found.factor * found.errors
        wrong += bool(apart[np.triu_indices(10, 1)].any())
    assert wrong <= 5 + 3 * 2.2


def test_sums_of_sparse_columns_are_those_of_dense_ones() -> None:
    from scipy.sparse import csr_array

    columns = np.random.default_rng(0).random((30, 4)) * (np.arange(30) % 3 == 0)[:, None]
    dense = resampled_sums(columns, draws=20, seed=1)
    np.testing.assert_allclose(resampled_sums(csr_array(columns), draws=20, seed=1), dense)
    assert dense.shape == (20, 4)


def test_an_interval_is_moved_by_what_drawing_again_adds() -> None:
    drawn = np.linspace(0.3, 0.5, 1001)  # its mean is 0.4, the estimate 0.2
    assert interval(0.2, drawn) == pytest.approx((0.105, 0.295))
    assert interval(0.05, drawn) == pytest.approx((0, 0.145))
    assert interval(0.95, drawn, high=1.0) == pytest.approx((0.855, 1))
    assert interval(0.5, np.array([np.nan])) is None
    assert interval(0.5, np.full(9, 0.5)) is None


def sure(confidence: Any, correct: Any) -> tuple[Any, Any]:
    """Labels and probabilities of two classes with these confidences, right where `correct`."""
    p = np.stack([confidence, 1 - confidence], axis=1)
    return np.where(correct, 0, 1), p


def test_the_lowest_threshold_that_keeps_the_precision_for_sure_is_chosen() -> None:
    confidence = np.linspace(0.99, 0.51, 400)
    y, p = sure(confidence, np.arange(400) < 300)  # right while confidence is high
    threshold, _ = choose_threshold(y, p, 0.9)
    assert threshold is not None
    by_hand = max(k for k in range(1, 401) if wilson_interval(min(k, 300), k)[0] >= 0.9)
    assert threshold == confidence[by_hand - 1]
    accepted = accepted_at(y, p, threshold)
    assert (accepted.accepted, accepted.correct) == (by_hand, 300)
    assert accepted.precision_ci95 is not None
    assert accepted.precision_ci95[0] >= 0.9


def test_the_threshold_to_be_typed_is_the_shortest_that_accepts_the_same_rows() -> None:
    confidence = np.array([0.99, 0.97312, 0.97301, 0.9, 0.6])
    for threshold, shortest in ((0.97312, 0.9731), (0.97301, 0.95), (0.6, 0.6), (0.99, 0.98)):
        found = _shortest(threshold, confidence)
        np.testing.assert_array_equal(confidence >= found, confidence >= threshold)
        assert len(str(found)) <= len(str(shortest))
    assert _shortest(1.0, np.array([1.0, 1 - 1e-16])) == 1.0


def test_equal_confidences_are_accepted_together() -> None:
    confidence = np.repeat([0.9, 0.8, 0.6], [100, 100, 100])
    correct = np.concatenate([np.ones(100), np.arange(100) < 90, np.zeros(100)]).astype(bool)
    y, p = sure(confidence, correct)
    threshold, _ = choose_threshold(y, p, 0.9)
    assert threshold == 0.8
    assert accepted_at(y, p, 0.8).accepted == 200


def test_a_precision_that_no_threshold_reaches_is_said() -> None:
    y, p = sure(np.full(50, 0.9), np.arange(50) < 45)
    assert choose_threshold(y, p, 0.95) == (None, wilson_interval(45, 50)[0])
    found = choose_abstention(0.95, held_out=(y, p), test=(y, p))
    assert (found.threshold, found.test) == (None, None)
    assert "no threshold gives a precision of 0.95 with confidence" in found.lines()[0]
    assert choose_threshold(*sure(np.empty(0), np.empty(0, dtype=bool)), 0.9) == (None, 0.0)
    with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.5"):
        choose_threshold(y, p, 1.5)


def test_the_threshold_is_chosen_without_the_rows_that_are_scored() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 1000)
    held = sure(confidence, rng.random(1000) < confidence)
    good, bad = (sure(confidence, np.full(1000, hit)) for hit in (True, False))
    one, other = (choose_abstention(0.85, held_out=held, test=test) for test in (good, bad))
    assert one.threshold == other.threshold
    assert one.test is not None
    assert other.test is not None
    assert one.held_out is not None
    assert (one.test.precision, other.test.precision) == (1, 0)
    assert one.test.coverage == one.held_out.coverage == (confidence >= one.threshold).mean()
    assert len(one.lines()) == 3
    json.dumps(one.to_json(), allow_nan=False)


def test_a_chosen_threshold_keeps_its_promise_on_new_rows() -> None:
    """The precision of calibrated rows above a threshold t in [0.5, 1] is (1 + t) / 2: it is known."""
    missed = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        confidence = rng.uniform(0.5, 1, 400)
        threshold, _ = choose_threshold(*sure(confidence, rng.random(400) < confidence), 0.85)
        missed += threshold is not None and (1 + threshold) / 2 < 0.85
    assert missed / 200 < 0.1


def test_rows_without_a_label_and_nothing_accepted_are_no_trouble() -> None:
    y, p = sure(np.array([0.9, 0.8]), np.array([True, True]))
    assert accepted_at(np.array([0, -1]), p, 0.5).n == 1
    nothing = accepted_at(y, p, 0.95)
    assert (nothing.coverage, nothing.precision) == (0, None)
    assert nothing.describe() == "0.0 % of 2 rows answered"
