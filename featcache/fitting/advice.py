"""The next step, in a sentence that rests on a number of this run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featcache.evaluate.report import FEW_ERRORS

if TYPE_CHECKING:
    from featcache.fitting.result import FitResult

WIDE = 0.1  # an interval of accuracy wider than this hides what a better head would gain
_NEXT = {
    "fits": "score more rows, which are too few to tell what limits it",
    "overfits": "add images, or augmented views",
    "underfits": "try other nodes, another backbone or fine-tuning",
}


def advise(result: FitResult) -> str:
    """What to do now."""
    m = result.metrics
    low, high = m.accuracy_ci95
    drift = result.verdict.drift
    if drift and drift.is_real and drift.difference < 0:
        return (
            f"find out how the rows scored differ from the training rows, where "
            f"{-100 * drift.difference:.1f} points more were right in cross-validation"
        )
    if high - low > WIDE:
        return (
            f"score more rows than {m.n:,}: an accuracy between {100 * low:.0f} and {100 * high:.0f} % does "
            "not tell one head from another"
        )
    if 1 - m.accuracy <= FEW_ERRORS:
        return f"use it: {100 * m.accuracy:.1f} % of {m.n:,} rows it had not seen are right"
    return _remedy(result)


def _remedy(result: FitResult) -> str:
    """For errors that are too many and surely there."""
    sentence = result.outlook.sentence()
    if sentence is None:
        errors, train_errors = 1 - result.metrics.accuracy, 1 - result.train_accuracy
        sentence = (
            f"{_NEXT[result.verdict.fit]}: {100 * errors:.1f} % of the {result.metrics.n:,} rows scored are "
            f"wrong, {100 * train_errors:.1f} % of those trained on"
        )
    if result.other_nodes:
        sentence += f". The store has {len(result.other_nodes)} more nodes: --nodes auto tries them"
    return sentence
