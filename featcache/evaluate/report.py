"""Metrics in words: the lines a person reads in a terminal, and what follows from the numbers.

Knows metrics; not which head or which rows they are of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from featcache.evaluate.bootstrap import LEAST_UNITS
from featcache.evaluate.metrics import ClassMetrics, Interval, Metrics, wilson_interval
from featcache.images.paths import show_path
from featcache.words import plural, show_text

SHOWN_CLASSES = 15  # up to so many, the report draws the confusion matrix
WORST_CLASSES = 10
SHOWN_PAIRS = 3
FEW_ERRORS = 0.03  # on rows not seen: fewer call for no remedy


def score_lines(
    m: Metrics,
    *,
    on: str,
    untrained: bool = False,
    train_accuracy: float | None = None,
    uncalibrated_ece: float | None = None,
) -> list[str]:
    """The scores with their intervals.

    untrained: some rows are of classes that were not trained on. uncalibrated_ece: of the same rows at a
    temperature of 1.
    """
    before = "" if uncalibrated_ece is None else f"; {uncalibrated_ece:.4f} before its temperature"
    few = "too few rows for an interval" if m.n_units < LEAST_UNITS else ""
    lines = [
        f"scored on {plural(m.n, 'row')}{_units(m)}: {on}",
        _line("accuracy", m.accuracy, m.accuracy_ci95, first=True),
        _line("mean per class", m.mean_per_class_accuracy, m.mean_per_class_accuracy_ci95, why_not=few),
        _line("in the top 5", m.top5, m.top5_ci95),
        _line("area under ROC", m.auroc, m.auroc_ci95, why_not=few),
        _line("log-loss", m.nll, m.nll_ci95, why_not=few) + _no_chance(m, untrained),
        _line("calibration error", m.ece, m.ece_ci95, why_not=few) + before,
        _line("accuracy on train", train_accuracy, None),
        "  (log-loss is 0 where the true class is given all probability, and large where a wrong one is;",
        "  the calibration error is how far probabilities are from the share that is right, on average)",
    ]
    return [line for line in lines if line]


def _no_chance(m: Metrics, untrained: bool) -> str:
    if not m.no_chance:
        return ""
    them = "it" if m.no_chance == 1 else "them"
    others = "" if m.nll_of_others is None else f"; {m.nll_of_others:.4f} without {them}"
    given = f"{plural(m.no_chance, 'row')} whose true class was given practically no probability"
    return f", with {given}{', such as of classes not trained on' if untrained else ''}{others}"


def _units(m: Metrics) -> str:
    return "" if m.n_units == m.n else f", of {m.n_units:,} different images or groups"


def _line(
    name: str, value: float | None, ends: Interval | None, *, first: bool = False, why_not: str = ""
) -> str:
    """why_not: why there is no interval, where there is none."""
    if value is None:
        return ""
    what = "95 % interval " if first else ""
    said = f"{what}{ends[0]:.4f} to {ends[1]:.4f}" if ends else why_not
    return f"  {name:<18}  {value:.4f}" + (f"  ({said})" if said else "")


def class_lines(m: Metrics) -> list[str]:
    """The confusion matrix of few classes, the worst of many, and what is confused most."""
    small = m.confusion is not None and len(m.classes) <= SHOWN_CLASSES
    lines = _matrix_lines(m) if small else _worst_lines(m)
    if m.confused:
        lines.append("most often confused")
        lines += [
            f"  {pair.n:,} of {show_text(pair.true)} taken for {show_text(pair.predicted)}"
            + (f", such as {show_path(pair.ids[0])}" if pair.ids else "")
            for pair in m.confused[:SHOWN_PAIRS]
        ]
    return lines


def _matrix_lines(m: Metrics) -> list[str]:
    table = m.confusion or ()
    width = 1 + max(len(str(count)) for row in table for count in row)
    lines = [
        "true class (rows) against predicted (columns, in the same order); recall: of its rows, found; "
        "precision: of what is called so, right; F1: between the two"
    ]
    for row, own in zip(table, m.per_class, strict=True):
        counts = "".join(f"{count:>{width}}" for count in row)
        lines.append(f"  {counts}   {_share(own.accuracy)} {_share(own.precision)} {_share(own.f1)}  "
                     f"{show_text(own.name)}")  # fmt: skip
    return lines


def _worst_lines(m: Metrics) -> list[str]:
    worst = sorted((_recall(row), row.name, row) for row in m.per_class if row.n)[:WORST_CLASSES]
    lines = [f"worst of {len(m.classes):,} classes: recall with its 95 % interval, precision, F1"]
    for recall, name, row in worst:
        low, high = wilson_interval(round(recall * row.n), row.n)
        lines.append(f"  {recall:.2f} ({low:.2f} to {high:.2f})  {_share(row.precision)}  {_share(row.f1)}  "
                     f"{show_text(name)} ({row.n:,} rows)")  # fmt: skip
    return lines


def _recall(row: ClassMetrics) -> float:
    return row.accuracy or 0.0


def _share(value: float | None) -> str:
    return "   -" if value is None else f"{value:.2f}"


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The accuracy on the rows scored less that of cross-validation, with the ends of its 95 % interval."""

    difference: float
    ci95: Interval

    @property
    def is_real(self) -> bool:
        """Whether the rows scored differ from the training rows by more than chance."""
        return not self.ci95[0] <= 0 <= self.ci95[1]

    def to_json(self) -> dict[str, Any]:
        return {"difference": self.difference, "ci95": list(self.ci95), "is_real": self.is_real}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How the errors on rows not seen compare with those on the rows trained on, and with what was expected.

    fit: "overfits": most errors are made on new rows only. "underfits": most are made on the training rows
    as well. "fits": there are few, or too few rows to tell them from few.
    drift: None where there was no cross-validation. lines: all of it in words.
    """

    fit: Literal["overfits", "underfits", "fits"]
    drift: Drift | None
    lines: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "fit": self.fit,
            "drift": self.drift.to_json() if self.drift else None,
            "lines": list(self.lines),
        }


def judge(train_accuracy: float, test: Metrics, *, held_out: Metrics | None = None) -> Verdict:
    """What the numbers say. held_out: of the predictions of cross-validation on the training rows."""
    fit = _judge_fit(train_accuracy, test)
    lines = [_fit_line(fit, train_accuracy, test)]
    if held_out is None:
        return Verdict(fit=fit, drift=None, lines=tuple(lines))
    drift = Drift(difference=test.accuracy - held_out.accuracy, ci95=difference_interval(test, held_out))
    lines.append(_drift_line(drift, test, held_out))
    return Verdict(fit=fit, drift=drift, lines=tuple(lines))


def verdict_lines(train_accuracy: float, test: Metrics, *, held_out: Metrics | None = None) -> list[str]:
    """`judge` in words."""
    return list(judge(train_accuracy, test, held_out=held_out).lines)


def _judge_fit(train_accuracy: float, test: Metrics) -> Literal["overfits", "underfits", "fits"]:
    errors, train_errors = 1 - test.accuracy, 1 - train_accuracy
    if errors <= FEW_ERRORS or 1 - test.accuracy_ci95[1] <= FEW_ERRORS:
        return "fits"
    if train_errors >= errors / 2:
        return "underfits"
    return "overfits" if train_accuracy > test.accuracy_ci95[1] else "fits"


def _fit_line(fit: str, train_accuracy: float, test: Metrics) -> str:
    errors, train_errors = 1 - test.accuracy, 1 - train_accuracy
    both = f"{_percent(train_errors)} of the rows trained on are wrong, {_percent(errors)} of those scored"
    unsure = "" if errors <= FEW_ERRORS else ", too few rows to tell more"
    return {
        "fits": f"fits: {both}{unsure}",
        "overfits": f"overfits: {both}. More images, or augmented views, narrow that",
        "underfits": f"underfits: {both}. These features do not tell the classes apart: other nodes, another "
        "backbone or fine-tuning may",
    }[fit]


def _drift_line(drift: Drift, test: Metrics, held_out: Metrics) -> str:
    both = (
        f"{_percent(held_out.accuracy)} were right in cross-validation, "
        f"{_percent(test.accuracy)} are on the rows scored"
    )
    low, high = (100 * end for end in drift.ci95)
    if not drift.is_real:
        return f"as expected: {both}"
    if drift.difference < 0:
        return (
            f"worse than expected: {both}, {-100 * drift.difference:.1f} points less ({-high:.1f} to "
            f"{-low:.1f}). The rows scored are drawn from other data than the training rows, or "
            "cross-validation had images of one series on both sides"
        )
    return (
        f"better than expected: {both}, {100 * drift.difference:.1f} points more ({low:.1f} to {high:.1f}). "
        "The rows scored are drawn from easier data than the training rows, or were trained on"
    )


def difference_interval(one: Metrics, other: Metrics) -> Interval:
    """The 95 % interval of the difference of two accuracies on different rows, from Wilson's of each.

    (Newcombe, "Interval estimation for the difference between independent proportions", 1998, method 10.)
    """
    difference = one.accuracy - other.accuracy
    (low, high), (other_low, other_high) = one.accuracy_ci95, other.accuracy_ci95
    below = math.hypot(one.accuracy - low, other_high - other.accuracy)
    above = math.hypot(high - one.accuracy, other.accuracy - other_low)
    return difference - below, difference + above


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def aligned_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns two spaces apart; a row may have fewer."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)).rstrip() for row in rows]
