"""Classifiers on feature vectors. Knows nothing of images, files or stores: arrays in, labels out.

`HEADS` has one row a head. Importing this package imports neither scikit-learn nor torch: a row names the
module of its class, and `HeadKind.load` imports it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from featcache.errors import HeadError
from featcache.heads.parameters import nearest, require_known

if TYPE_CHECKING:
    from featcache.heads.base import Head

SKLEARN = "sklearn:"  # prefix of the heads that are any scikit-learn classifier


@dataclass(frozen=True, kw_only=True)
class HeadKind:
    """A row of the registry: what selection needs to know of a head, and where its class is.

    `arrays` gives the shape of every array of a fitted head in a model file, in K classes, D features and N
    of anything; loading a model checks them before any head is built.
    """

    name: str
    module: str
    class_name: str
    summary: str
    arrays: Mapping[str, tuple[str, ...]]
    searched: str | None = None  # the parameter that cross-validation chooses
    grid: tuple[float, ...] = ()  # its first candidates, ascending
    search_params: Mapping[str, Any] = field(
        default_factory=dict
    )  # others while searching, unless the user's
    factor: float | None = None  # the grid grows by this factor while its edge is best; None: it stays
    strong_end: Literal["low", "high"] = "low"  # which values regularise more: these win ties
    criterion: Literal["nll", "accuracy"] = "nll"  # what the candidates are compared by
    calibrated: bool = False  # probabilities need a temperature fitted on held-out scores
    seeded: bool = False  # takes the seed of the run

    def load(self) -> type[Head]:
        """The class, imported now."""
        found: type[Head] = getattr(importlib.import_module(self.module), self.class_name)
        return found


LINEAR_ARRAYS = {"coef": ("K", "D"), "intercept": ("K",)}


HEADS: Mapping[str, HeadKind] = {
    kind.name: kind
    for kind in (
        HeadKind(
            name="logistic",
            module="featcache.heads.logistic",
            class_name="LogisticHead",
            summary="multinomial logistic regression",
            arrays=LINEAR_ARRAYS,
            searched="C",
            grid=tuple(10.0**e for e in (-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0)),
            factor=10**0.5,
            search_params={"tol": 1e-5},
        ),
        HeadKind(
            name="ridge",
            module="featcache.heads.ridge",
            class_name="RidgeHead",
            summary="least squares on one-vs-rest targets, closed form",
            arrays=LINEAR_ARRAYS,
            searched="alpha",
            grid=tuple(10.0**e for e in (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5)),
            factor=10**0.5,
            strong_end="high",
            calibrated=True,
        ),
        HeadKind(
            name="knn",
            module="featcache.heads.neighbors",
            class_name="NeighborsHead",
            summary="k nearest neighbours by cosine similarity",
            arrays={"vectors": ("N", "D"), "labels": ("N",)},
            searched="k",
            grid=(1, 5, 10, 20, 50, 100),
            strong_end="high",
            criterion="accuracy",
        ),
        HeadKind(
            name="ncm",
            module="featcache.heads.means",
            class_name="NearestMeanHead",
            summary="nearest class mean",
            arrays=LINEAR_ARRAYS,
            calibrated=True,
        ),
        HeadKind(
            name="linear",
            module="featcache.heads.linear",
            class_name="MinibatchHead",
            summary="linear layer trained by minibatches of AdamW (imports torch)",
            arrays=LINEAR_ARRAYS,
            searched="weight_decay",
            grid=(0.1, 1.0, 10.0),
            strong_end="high",
            seeded=True,
        ),
        HeadKind(
            name="sklearn",
            module="featcache.heads.estimators",
            class_name="EstimatorHead",
            summary="any scikit-learn classifier, as sklearn:CLASSNAME, with the parameters you give it",
            arrays={"skops": ("N",)},
            seeded=True,
        ),
    )
}


def find_head(name: str) -> HeadKind:
    """The row of a head, also for `sklearn:CLASSNAME`; HeadError naming the nearest for an unknown name."""
    if name.startswith(SKLEARN):
        return HEADS["sklearn"]
    if name in HEADS and name != "sklearn":
        return HEADS[name]
    known = [*(kind for kind in HEADS if kind != "sklearn"), "sklearn:CLASSNAME"]
    hint = known[-1] if name == "sklearn" else nearest(name, known)
    raise HeadError(f"there is no head {name!r}. Did you mean {hint}? Heads: {', '.join(known)}.")


def build_head(name: str, params: Mapping[str, Any], *, seed: int) -> Head:
    """The unfitted head of this name with these parameters; HeadError for one it does not have."""
    kind = find_head(name)
    head_class = kind.load()
    if kind is HEADS["sklearn"]:
        return head_class(estimator=name.removeprefix(SKLEARN), params=dict(params), seed=seed)
    known = inspect.signature(head_class).parameters
    require_known(params, known, what=name)
    seeds = {"seed": seed} if kind.seeded and "seed" not in params else {}
    return head_class(**params, **seeds)
