"""Which weights are kept: those of the start, those that were trained, or some between them.

The choice is made on the choice rows, and the start is left only for what is clearly better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from featcache.progress import Progress
from featcache.tuning.average import ALPHAS, interpolate
from featcache.tuning.network import Weights
from featcache.tuning.scoring import Score
from featcache.tuning.train import Trainer


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """alpha: the share of the trained weights, 0 where the start is kept.

    scores: by alpha, on the choice rows.
    """

    weights: Weights
    alpha: float
    scores: dict[float, Score]

    @property
    def score(self) -> Score:
        return self.scores[self.alpha]

    def to_json(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "choice": [
                {"alpha": alpha, "accuracy": score.accuracy, "log_loss": score.nll}
                for alpha, score in self.scores.items()
                if math.isfinite(score.nll)  # weights between two that are sound may not be
            ],
        }


def choose_weights(trainer: Trainer, start: Weights, probe: Score, *, progress: Progress) -> Choice:
    """Weights on the line from the start to the best of training. probe: the score of the start.

    Of several that are looked at one is the best by chance, and the fitted head may have seen the choice
    rows: so the start is left only for weights that are better by more than one standard error.

    From a start of random weights there is no such line, and what was trained is kept.
    """
    state = trainer.state
    if state.best is None or state.best_score is None:
        return Choice(weights=start, alpha=0.0, scores={0.0: probe})
    if trainer.settings.start == "random":
        return Choice(weights=state.best, alpha=1.0, scores={0.0: probe, 1.0: state.best_score})
    scores = {0.0: probe}
    progress.start("weighing start and tuned", total=len(ALPHAS) - 1, unit="weights")
    for alpha in ALPHAS[1:]:
        scores[alpha] = trainer.score_weights(interpolate(start, state.best, alpha))
        progress.advance(1)
    progress.finish()
    best = 0.0
    for alpha, score in scores.items():
        if score.beats(scores[best]):
            best = alpha
    if best and not scores[best].clearly_beats(probe):
        best = 0.0
    weights = start if not best else interpolate(start, state.best, best)
    return Choice(weights=weights, alpha=best, scores=scores)
