"""Whether the model that is kept is right more often than the one it began from, on the same rows.

Knows what both say of these rows; not how they came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.answers import spread
from featcache.evaluate.comparison import Answers, Difference
from featcache.evaluate.metrics import Metrics, score
from featcache.evaluate.report import aligned_lines
from featcache.evaluate.splits import Groups, number_units
from featcache.images.paths import show_path
from featcache.model import Model, image_keys
from featcache.store.features import FeatureSet


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Scores of the model to begin with and of the one that is kept, on rows that nothing was chosen on.

    difference: accuracy of the one that is kept less that of the other; None where it is the other.
    seen: rows that are images the first model was fitted on, as far as its file says.
    """

    before: Metrics
    kept: Metrics
    difference: Difference | None
    seen: int

    @property
    def verdict(self) -> str:
        """In a word or two, as in "MODEL2 beats MODEL"."""
        return self.difference.verdict if self.difference else "is the same as"

    def to_json(self) -> dict[str, Any]:
        return {
            "accuracy": self.before.accuracy,
            "accuracy_ci95": list(self.before.accuracy_ci95),
            "difference": asdict(self.difference) if self.difference else None,
            "verdict": self.verdict,
        }

    def lines(self, *, model: str, output: str) -> list[str]:
        """Both models and their difference, below a line that says on which rows."""
        named = ((output, "MODEL2", self.kept), (model, "MODEL", self.before))
        rows = [
            [f"  {name}", f"{m.accuracy:.4f}", "({:.4f} to {:.4f})".format(*m.accuracy_ci95), show_path(path)]
            for path, name, m in named
        ]
        lines = [f"MODEL2 against MODEL on these {self.kept.n:,} rows: accuracy with its 95 % interval"]
        lines += aligned_lines(rows)
        if self.difference:
            lines.append(f"  difference {self.difference.describe()}, 95 % by paired bootstrap")
        return lines


@dataclass(frozen=True, eq=False)
class Said:
    """What a model says of rows: probabilities (n, its classes)."""

    model: Model
    probabilities: NDArray[np.float64]

    def right(self, y: NDArray[np.int64], classes: Sequence[str]) -> NDArray[np.bool_]:
        right: NDArray[np.bool_] = self.over(classes).argmax(axis=1) == y
        return right

    def over(self, classes: Sequence[str]) -> NDArray[np.float64]:
        """(n, len(classes)), 0 where the model does not know a class."""
        return spread(self.model, self.probabilities, classes)


class Examination:
    """The rows to be scored, and what models say of them."""

    def __init__(self, images: FeatureSet, rows: NDArray[np.int64], groups: Groups | None = None) -> None:
        """rows: of `images`, as are `groups`."""
        self._y, self._digests = images.y[rows], images.sha256[rows]
        self._ids = [images.ids[row] for row in rows.tolist()]
        self._classes = images.classes
        # Copies of an image say no more than one.
        self._units = number_units(self._digests, groups.take(rows) if groups else None)

    def compare(self, before: Said, kept: Said | None) -> Comparison:
        """kept: None where that is the model before."""
        seen = int(np.isin(image_keys(self._digests), before.model.trained_on).sum())
        of_before = self._score(before)
        if kept is None:
            return Comparison(before=of_before, kept=of_before, difference=None, seen=seen)
        right = [said.right(self._y, self._classes_with(said)) for said in (kept, before)]
        answers = Answers(right=np.stack(right, axis=1), units=self._units)
        (difference,) = answers.differences(seed=0)
        return Comparison(before=of_before, kept=self._score(kept), difference=difference, seen=seen)

    def _score(self, said: Said) -> Metrics:
        classes = self._classes_with(said)
        return score(self._y, said.over(classes), classes, self._ids, units=self._units)

    def _classes_with(self, said: Said) -> tuple[str, ...]:
        """Those of the data and those that the model knows besides."""
        own = set(self._classes)
        return (*self._classes, *(name for name in said.model.classes if name not in own))
