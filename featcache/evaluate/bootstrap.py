"""How far a mean over rows may be from the truth, found by drawing the rows again, with replacement.

Knows columns of numbers, a row each; not what was measured. (Efron & Tibshirani, "An introduction to the
bootstrap", 1993.) All that is compared is drawn together, so that differences keep what their rows share.
Rows that are not independent, such as copies of an image or pictures of one patient, are a unit, and units
are drawn: rows alone would make every interval too narrow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

DRAWS = 1000
LEAST_UNITS = 20  # fewer show too little: of 10, an interval of 95 % holds a log-loss 85 times in 100
_FEWEST_DRAWS = 200
_NUMBERS = 100_000_000  # rows times draws, at most, while there are enough draws: about a second
_BLOCK = 500_000  # rows times draws held at once


def draws_for(n: int, *, draws: int = DRAWS) -> int:
    """Fewer draws where the rows are many: their quantiles are steady sooner than their sums are cheap."""
    return draws if n * draws <= _NUMBERS else max(min(_FEWEST_DRAWS, draws), _NUMBERS // n)


def row_counts(
    n: int, *, draws: int, seed: int, units: NDArray[np.integer[Any]] | None = None
) -> Iterator[NDArray[np.float64]]:
    """How often each of n rows is drawn: blocks of shape (n, some draws), `draws` columns in all.

    A column is multinomial: it adds up to n. units: of the rows, (n,), drawn as often as there are units,
    each with all of its rows.
    """
    unit = None if units is None else np.unique(units, return_inverse=True)[1].ravel()
    drawn_from = n if unit is None else int(unit.max()) + 1
    rng = np.random.default_rng(seed)
    width = max(_BLOCK // n, 1)
    for start in range(0, draws, width):
        drawn = rng.integers(0, drawn_from, size=(min(width, draws - start), drawn_from), dtype=np.int32)
        counts = np.stack([np.bincount(row, minlength=drawn_from) for row in drawn], axis=1)
        yield (counts if unit is None else counts[unit]).astype(np.float64)


def resampled_sums(
    columns: Any, *, draws: int, seed: int, units: NDArray[np.integer[Any]] | None = None
) -> NDArray[np.float64]:
    """The sum of every column over each drawing of the rows or of their units, (draws, n_columns).

    columns: an ndarray or a scipy sparse array of shape (n_samples, n_columns).
    """
    blocks = row_counts(columns.shape[0], draws=draws, seed=seed, units=units)
    sums: NDArray[np.float64] = np.concatenate([(columns.T @ counts).T for counts in blocks])
    return sums


def interval(
    estimate: float, drawn: NDArray[np.float64], *, low: float = 0.0, high: float = np.inf
) -> tuple[float, float] | None:
    """The middle 95 % of what was drawn, moved so that its mean is the estimate, within [low, high].

    Moved because some scores, such as the calibration error, are larger on rows drawn again than on the rows
    themselves by about as much as they are too large on these; others move by nothing to speak of. None where
    no drawing differs from another: rows that are all alike do not say how far others are from them.
    """
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn) or np.ptp(drawn) <= 1e-12 * max(abs(estimate), 1.0):
        return None
    below, above = np.quantile(drawn, [0.025, 0.975]) - (drawn.mean() - estimate)
    return float(max(below, low)), float(min(above, high))


@dataclass(frozen=True, kw_only=True, eq=False)
class PairedMeans:
    """Means over the same rows of several candidates, and how sure their differences are.

    means: (n_candidates,). errors: (n_candidates, n_candidates), the standard error of each difference.
    factor: how many standard errors to either side hold all differences at once with 95 % confidence.
    """

    means: NDArray[np.float64]
    errors: NDArray[np.float64]
    factor: float

    def difference(self, one: int, other: int) -> tuple[float, float, float]:
        """How much higher the mean of `one` is, and the ends of its interval."""
        found = float(self.means[one] - self.means[other])
        half = self.factor * float(self.errors[one, other])
        return found, found - half, found + half


def paired_means(
    columns: NDArray[Any],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    units: NDArray[np.integer[Any]] | None = None,
) -> PairedMeans:
    """Means of columns, (n_samples, n_candidates), and intervals that hold for all differences together.

    Of each drawing, the largest difference between a drawn and a found difference, in standard errors, is
    kept; `factor` is the 0.95 quantile of these. So 95 times in 100 no interval at all misses, however many
    candidates there are and whichever is looked at because it came out best. (Romano & Wolf, "Exact and
    approximate stepdown methods for multiple hypothesis testing", JASA 2005, the single step.)
    """
    n, n_candidates = columns.shape
    n_units = n if units is None else len(np.unique(units))
    means = columns.mean(axis=0, dtype=np.float64)
    counted = np.concatenate([columns, np.ones((n, 1))], axis=1).astype(np.float64)
    sums = resampled_sums(counted, draws=draws_for(n, draws=draws), seed=seed, units=units)
    drawn = sums[:, :-1] / sums[:, -1:] - means  # (B, C)
    errors, largest = np.zeros((n_candidates, n_candidates)), np.zeros(len(drawn))
    for one in range(n_candidates):
        moved = drawn[:, one, None] - drawn[:, one + 1 :]  # (B, candidates after it)
        error = moved.std(axis=0, ddof=1)
        least = _least_errors(columns[:, one, None], columns[:, one + 1 :], n_units)
        errors[one, one + 1 :] = errors[one + 1 :, one] = np.maximum(error, least)
        differing = error > 1e-12  # rounding, where two candidates are right on the same rows
        if differing.any():
            np.maximum(largest, np.abs(moved[:, differing] / error[differing]).max(axis=1), out=largest)
    # Student's quantile: no fewer standard errors for a single difference, and many more for very few rows.
    factor = max(float(np.quantile(largest, 0.95)), float(stdtrit(max(n_units - 1, 1), 0.975)))
    return PairedMeans(means=means, errors=errors, factor=factor)


def _least_errors(one: NDArray[Any], others: NDArray[Any], n_units: int) -> NDArray[np.float64]:
    """Standard errors of differences between right and wrong that hold where hardly any rows differ.

    Drawing rows again cannot bring up a difference that no row shows. So half a row is added to each of the
    four cells of right and wrong. (Agresti & Min, "Simple improved confidence intervals for comparing matched
    proportions", Statistics in Medicine 2005.) 0 for columns that are not bool.
    """
    if one.dtype != bool:
        return np.zeros(others.shape[1])
    n = n_units + 2
    differing = (n_units * (one != others).mean(axis=0) + 1) / n
    difference = n_units * (one.mean(axis=0) - others.mean(axis=0)) / n
    errors: NDArray[np.float64] = np.sqrt((differing - difference**2) / n)
    return errors
