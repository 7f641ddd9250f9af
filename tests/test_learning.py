"""Few shots and learning curves: whose rows are drawn, what is averaged, and what is said of it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from featcache.evaluate.learning import (
    CurvePoint,
    LearningCurve,
    few_shot,
    learning_curve,
    shots_lines,
    transfer_line,
)

Y = np.repeat([0, 1, 2], [40, 20, 3])


class Recorder:
    """A caller's function that keeps what it was given, and is right on a share of 100 rows."""

    def __init__(self, share: Any = lambda rows: 0.5) -> None:
        self.given: list[Any] = []
        self.share = share

    def __call__(self, rows: Any) -> Any:
        self.given.append(rows)
        return np.arange(100) < round(100 * self.share(rows))


def curve(
    accuracy: tuple[float, ...], *, se: float, a_class: float = 50, n_scored: int = 1000
) -> LearningCurve:
    n = [1000 // 2**i for i in range(len(accuracy))][::-1]
    points = tuple(
        CurvePoint(fraction=rows / 1000, n=rows, accuracy=value)
        for rows, value in zip(n, accuracy, strict=True)
    )
    return LearningCurve(
        points=points, gain=accuracy[-1] - accuracy[-2], gain_se=se, rows_a_class=a_class, n_scored=n_scored
    )


def test_so_many_rows_of_every_class_are_drawn_and_those_of_one_try_are_nested() -> None:
    record = Recorder()
    found = few_shot(Y, record, shots=[4, 1, 2, 4], tries=3, seed=7)
    assert [row.shots for row in found] == [1, 2, 4]
    assert len(record.given) == 9
    for start in range(0, 9, 3):
        one, two, four = (set(rows.tolist()) for rows in record.given[start : start + 3])
        assert one < two < four
        assert [np.bincount(Y[list(rows)]).tolist() for rows in (one, two, four)] == [
            [1, 1, 1],
            [2, 2, 2],
            [4, 4, 3],
        ]
    assert {tuple(rows) for rows in record.given[::3]} != {tuple(record.given[0])}


def test_the_mean_and_spread_are_over_the_drawings_and_short_classes_are_counted() -> None:
    shares = iter([0.5, 0.7, 0.6, 0.9])
    found = few_shot(Y, Recorder(lambda rows: next(shares)), shots=[2, 8], tries=2)
    assert [(row.mean, row.short) for row in found] == [
        (pytest.approx(0.55), 0),
        (pytest.approx(0.8), 1),
    ]
    assert [row.sd for row in found] == [pytest.approx(0.1 / 2**0.5), pytest.approx(0.2 / 2**0.5)]
    lines = shots_lines(found)
    assert "over 2 drawings" in lines[0]
    assert lines[2] == "       8  0.8000 ± 0.1414  (1 class has fewer)"
    assert few_shot(Y, Recorder(), shots=[1], tries=1)[0].sd is None
    json.dumps([row.to_json() for row in found], allow_nan=False)


def test_the_seed_draws_the_rows() -> None:
    first, second, other = Recorder(), Recorder(), Recorder()
    for record, seed in ((first, 0), (second, 0), (other, 1)):
        few_shot(Y, record, shots=[2], tries=2, seed=seed)
    np.testing.assert_array_equal(first.given, second.given)
    assert (np.array(first.given) != np.array(other.given)).any()


@pytest.mark.parametrize(("shots", "tries"), [([], 1), ([0], 1), ([1], 0)])
def test_shots_and_tries_are_from_one(shots: list[int], tries: int) -> None:
    with pytest.raises(ValueError, match="from 1"):
        few_shot(Y, Recorder(), shots=shots, tries=tries)


def test_a_part_keeps_the_share_of_every_class_and_no_class_vanishes() -> None:
    record = Recorder()
    found = learning_curve(Y, record, fractions=(0.125, 0.25, 0.5, 1), tries=2)
    assert found is not None
    assert [point.n for point in found.points] == [5 + 2 + 1, 10 + 5 + 1, 20 + 10 + 2, 63]
    whole, *parts = record.given
    assert whole.tolist() == list(range(63))
    for small, middle, half in (parts[:3], parts[3:]):
        assert set(small) < set(middle) < set(half)
    assert np.bincount(Y[parts[0]]).tolist() == [5, 2, 1]
    with pytest.raises(ValueError, match="end with 1/2 and 1"):
        learning_curve(Y, Recorder(), fractions=(0.25, 1))


def test_the_gain_of_the_last_doubling_has_the_error_of_the_rows_they_share() -> None:
    rng = np.random.default_rng(0)
    half = [rng.random(400) < 0.6 for _ in range(2)]
    whole = rng.random(400) < 0.8
    answers = iter([whole, *half])
    found = learning_curve(Y, lambda rows: next(answers), fractions=(0.5, 1), tries=2)
    assert found is not None
    gained = whole - np.mean(half, axis=0)
    assert found.gain == pytest.approx(gained.mean())
    rows, drawings = gained.var(ddof=1) / 400, np.var([h.mean() for h in half], ddof=1) / 2
    assert found.gain_se == pytest.approx((rows + drawings) ** 0.5)
    assert found.points[0].accuracy == pytest.approx(np.mean(half))


def test_copies_of_an_image_are_drawn_and_count_as_one() -> None:
    rng = np.random.default_rng(0)
    half, whole = rng.random(100) < 0.6, rng.random(100) < 0.8
    images = np.repeat(np.arange(63), 5)
    draws: list[Any] = []

    def five(rows: Any) -> Any:
        draws.append(rows)
        return np.repeat(whole if len(rows) == 315 else half, 5)

    one = learning_curve(Y, lambda rows: whole if len(rows) == 63 else half, fractions=(0.5, 1), tries=2)
    units = np.repeat(np.arange(100), 5)
    other = learning_curve(np.repeat(Y, 5), five, fractions=(0.5, 1), tries=2, images=images, units=units)
    assert one is not None
    assert other is not None
    assert other.gain_se == pytest.approx(one.gain_se)
    assert (other.n_scored, other.rows_a_class) == (100, 21)
    for rows in draws[1:]:  # all copies or none
        assert set(np.bincount(images[rows], minlength=63).tolist()) == {0, 5}
    record = Recorder()
    few = few_shot(np.repeat(Y, 5), record, shots=[4], tries=1, images=images)
    assert np.bincount(np.repeat(Y, 5)[record.given[0]]).tolist() == [20, 20, 15]
    assert few[0].short == 1


def test_what_belongs_together_is_drawn_together_and_images_are_counted() -> None:
    """8 groups of 6 images, half of each in either class."""
    y, group = np.arange(48) % 2, np.arange(48) // 6
    record = Recorder()
    found = learning_curve(y, record, together=group, tries=3)
    assert found is not None
    assert [point.n for point in found.points] == [6, 12, 24, 48]
    for rows in record.given:
        assert set(np.bincount(group[rows], minlength=8).tolist()) <= {0, 6}
    assert found.rows_a_class == 24
    uneven = learning_curve(
        np.zeros(10, dtype=np.int64), Recorder(), together=np.repeat([0, 1, 2, 3], [7, 1, 1, 1])
    )
    assert uneven is not None
    assert 2 <= uneven.points[-2].n <= 8  # two groups of four, the mean over the drawings


def test_parts_that_are_no_smaller_than_the_next_one_are_left_out() -> None:
    found = learning_curve(np.repeat([0, 1], 3), Recorder())
    assert found is not None
    assert [point.n for point in found.points] == [2, 4, 6]
    assert learning_curve(np.array([0, 1]), Recorder()) is None


def test_few_rows_that_do_not_differ_do_not_make_a_curve_flat() -> None:
    few = learning_curve(Y, lambda rows: np.arange(20) < 15)
    assert (few.gain, few.gain_se, few.trend) == (0, 1 / 22, "unclear")
    assert learning_curve(Y, lambda rows: np.arange(2000) < 1500).trend == "flat"


@pytest.mark.parametrize(
    ("accuracy", "se", "trend", "words"),
    [
        (
            (0.60, 0.70, 0.75),
            0.010,
            "rising",
            "500 to 1,000 training rows gained 5.0 points (3.0 to 7.0); as",
        ),
        ((0.70, 0.701, 0.702), 0.002, "flat", "more labels would hardly help"),
        ((0.80, 0.78, 0.77), 0.004, "flat", "more labels would hardly help"),
        ((0.70, 0.71, 0.72), 0.020, "unclear", "cannot be told from the rows scored"),
        ((0.70, 0.71, 0.711), 0.0001, "flat", "hardly"),  # sure, and not worth it
    ],
)
def test_whether_more_labels_would_help_is_said(
    accuracy: tuple[float, ...], se: float, trend: str, words: str
) -> None:
    found = curve(accuracy, se=se)
    assert found.trend == trend
    assert words in found.says()
    assert found.to_json()["says"] == found.lines()[-1]
    json.dumps(found.to_json(), allow_nan=False)


def test_the_next_doubling_is_that_of_a_power_law() -> None:
    """With errors of a + b n^-c, the gains of doublings are a geometric series."""
    n = np.array([250, 500, 1000, 2000])
    accuracy = 1 - (0.1 + 3 * n**-0.5)
    found = curve(tuple(accuracy[:3].tolist()), se=0.001)
    assert found.next_gain == pytest.approx(accuracy[3] - accuracy[2])
    assert curve((0.7, 0.72, 0.8), se=0.01).next_gain == pytest.approx(0.08)  # no faster than the last
    assert curve((0.7, 0.8, 0.79), se=0.01).next_gain == 0


def test_a_real_curve_rises_where_rows_are_few_and_is_flat_where_they_suffice() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 30))

    def draw(n: int) -> tuple[Any, Any]:
        y = np.arange(n) % 4
        return centres[y] + 1.5 * rng.normal(size=(n, 30)), y

    X_test, y_test = draw(1000)
    trends = []
    for n in (16, 4000):
        X, y = draw(n)

        def nearest_mean(rows: Any, X: Any = X, y: Any = y) -> Any:
            means = np.stack([X[rows][y[rows] == k].mean(axis=0) for k in range(4)])
            return ((X_test[:, None] - means) ** 2).sum(axis=2).argmin(axis=1) == y_test

        trends.append(learning_curve(y, nearest_mean).trend)
    assert trends == ["rising", "flat"]


@pytest.mark.parametrize(
    ("accuracy", "train", "a_class", "words"),
    [
        ((0.97, 0.98, 0.985), 1.0, 50, "a head on these features is enough: 1.5 % of new rows are wrong"),
        ((0.70, 0.701, 0.702), 0.72, 50, "the features are the limit: 29.8 %"),
        ((0.60, 0.65, 0.70), 0.72, 50, "features and labels both limit"),
        (
            (0.60, 0.70, 0.78),
            1.0,
            50,
            "labels are the limit.*Label more images, use augmented views, or fine-tune$",
        ),
        ((0.60, 0.70, 0.78), 1.0, 5000, "or fine-tune, for which 5,000 images a class are plenty"),
        ((0.80, 0.801, 0.801), 1.0, 50, "learns its rows by heart, and more of them would hardly help"),
    ],
)
def test_whether_a_head_on_frozen_features_is_enough_is_answered(
    accuracy: tuple[float, ...], train: float, a_class: float, words: str
) -> None:
    import re

    assert re.search(words, transfer_line(curve(accuracy, se=0.002, a_class=a_class), train_accuracy=train))


def test_few_scored_rows_do_not_call_for_a_remedy() -> None:
    found = curve((0.94, 0.95, 0.96), se=0.02, n_scored=100)
    assert "may be enough" in transfer_line(found, train_accuracy=1.0)
    assert "100 rows cannot tell more" in transfer_line(found, train_accuracy=1.0)
    unclear = curve((0.70, 0.72, 0.73), se=0.03, n_scored=100)
    assert "Label more images, to train on and to score" in transfer_line(unclear, train_accuracy=1.0)
