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
from featcache.heads.entry import Entry, all_pairs, class_means, closed_form, minibatches, softmax_path
from featcache.heads.parameters import did_you_mean, require_known

if TYPE_CHECKING:
    from featcache.heads.base import Head

SKLEARN = "sklearn:"  # prefix of the heads that are classifiers of scikit-learn


@dataclass(frozen=True, kw_only=True)
class HeadKind:
    """A row of the registry: what selection needs to know of a head, and where its class is.

    `arrays` gives the shape of every array of a fitted head in a model file, in K classes, D features, and H
    and N of anything; loading a model checks them before any head is built.
    """

    name: str
    module: str
    class_name: str
    summary: str
    arrays: Mapping[str, tuple[str, ...]]
    searched: tuple[str, ...] = ()  # the parameters that cross-validation chooses
    # Their first values, ascending; candidates are all combinations.
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    search_params: Mapping[str, Any] = field(
        default_factory=dict
    )  # others while searching, unless the user's
    # Where one parameter is searched, its grid grows by this factor while its edge is best; None: it stays.
    factor: float | None = None
    # The log-loss falls and rises again along its grid, and values are dear: not all of them are tried.
    is_valley: bool = False
    # Which values of a searched parameter regularise more, where it is not the low ones: these win ties.
    strong_end: Mapping[str, Literal["low", "high"]] = field(default_factory=dict)
    criterion: Literal["nll", "accuracy"] = "nll"  # what the candidates are compared by
    weighted: bool = False  # has the parameter `class_weight`
    has_device: bool = False  # has the parameter `device`
    uses_views: bool = False  # `fit` and `start_search` take augmented feature vectors of the rows
    seeded: bool = False  # takes the seed of the run
    entry: Entry | None = None  # in the competition of `--head auto`; None: it takes no part

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
            searched=("C",),
            grid={"C": tuple(10.0**e for e in (-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0))},
            factor=10**0.5,
            is_valley=True,
            search_params={"tol": 1e-5},
            weighted=True,
            has_device=True,
            entry=Entry(simplicity=4, operations=softmax_path),
        ),
        HeadKind(
            name="ridge",
            module="featcache.heads.ridge",
            class_name="RidgeHead",
            summary="least squares on one-vs-rest targets, closed form",
            arrays=LINEAR_ARRAYS,
            searched=("alpha",),
            grid={"alpha": tuple(10.0**e for e in (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5))},
            factor=10**0.5,
            strong_end={"alpha": "high"},
            weighted=True,
            has_device=True,
            entry=Entry(simplicity=3, operations=closed_form),
        ),
        HeadKind(
            name="lda",
            module="featcache.heads.lda",
            class_name="DiscriminantHead",
            summary="linear discriminant analysis with a shrunk covariance, closed form",
            arrays=LINEAR_ARRAYS,
            searched=("shrinkage",),
            grid={"shrinkage": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6, 0.9)},
            strong_end={"shrinkage": "high"},
            weighted=True,
            has_device=True,
            entry=Entry(simplicity=2, operations=closed_form),
        ),
        HeadKind(
            name="knn",
            module="featcache.heads.neighbors",
            class_name="NeighborsHead",
            summary="k nearest neighbours by cosine similarity",
            arrays={"vectors": ("N", "D"), "labels": ("N",)},
            searched=("k",),
            grid={"k": (1, 5, 10, 20, 50, 100)},
            strong_end={"k": "high"},
            criterion="accuracy",
            entry=Entry(simplicity=6, operations=all_pairs),
        ),
        HeadKind(
            name="ncm",
            module="featcache.heads.means",
            class_name="NearestMeanHead",
            summary="nearest class mean",
            arrays=LINEAR_ARRAYS,
            entry=Entry(simplicity=1, operations=class_means),
        ),
        HeadKind(
            name="linear",
            module="featcache.heads.linear",
            class_name="MinibatchHead",
            summary="linear layer trained by minibatches of AdamW (imports torch)",
            arrays=LINEAR_ARRAYS,
            searched=("lr", "weight_decay"),
            grid={"lr": (3e-4, 1e-3, 3e-3, 1e-2), "weight_decay": (0.1, 10.0)},
            strong_end={"weight_decay": "high"},
            weighted=True,
            has_device=True,
            uses_views=True,
            seeded=True,
            entry=Entry(
                simplicity=5,
                operations=minibatches(epochs=30, candidates=8),
                start=1.5,
                least_rows=500,
                needs_views=True,
            ),
        ),
        HeadKind(
            name="mlp",
            module="featcache.heads.mlp",
            class_name="MLPHead",
            summary="network of one hidden layer trained by minibatches of AdamW (imports torch)",
            arrays={
                "hidden": ("H", "D"),
                "hidden_bias": ("H",),
                "output": ("K", "H"),
                "output_bias": ("K",),
            },
            searched=("lr", "weight_decay"),
            grid={"lr": (1e-3, 3e-3), "weight_decay": (1.0, 10.0)},
            strong_end={"weight_decay": "high"},
            weighted=True,
            has_device=True,
            uses_views=True,
            seeded=True,
            entry=Entry(
                simplicity=7,
                operations=minibatches(epochs=20, candidates=4, hidden=256),
                start=1.5,
                least_rows=1000,
            ),
        ),
        HeadKind(
            name="sklearn",
            module="featcache.heads.estimators",
            class_name="EstimatorHead",
            summary="a classifier of scikit-learn, as sklearn:CLASSNAME, with the parameters you give it",
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
    hint = f"Did you mean {known[-1]}?" if name == "sklearn" else did_you_mean(name, known)
    said = (f"there is no head {name!r}.", hint, f"Heads: {', '.join(known)}.")
    raise HeadError(" ".join(filter(None, said)))


def build_head(name: str, params: Mapping[str, Any], *, seed: int) -> Head:
    """The unfitted head of this name with these parameters; HeadError for one it does not have."""
    kind = find_head(name)
    head_class = kind.load()
    if kind is HEADS["sklearn"]:
        own = {"temperature": params["temperature"]} if "temperature" in params else {}
        rest = {key: value for key, value in params.items() if key not in own}
        return head_class(estimator=name.removeprefix(SKLEARN), params=rest, seed=seed, **own)
    known = inspect.signature(head_class).parameters
    require_known(params, known, what=name)
    seeds = {"seed": seed} if kind.seeded and "seed" not in params else {}
    return head_class(**params, **seeds)
