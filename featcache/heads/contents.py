"""What a scikit-learn estimator out of a file holds, where compiled code would follow it without looking.

skops refuses types that are not trusted. Trees, neighbours and support vectors, whose types are, may still
hold indices and sizes that lead outside of their arrays.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import ModelError

LEAVES = (type, ModuleType, FunctionType, BuiltinFunctionType, str, bytes, int, float)


def check_contents(estimator: Any, *, n_features: int) -> None:
    """ModelError for a part, however deep, whose numbers lead outside of it."""
    checks = _checks()
    for part in _parts(estimator):
        for kind, check in checks:
            if isinstance(part, kind):
                check(part, n_features)


def _checks() -> tuple[tuple[type, Callable[[Any, int], None]], ...]:
    from sklearn.ensemble._hist_gradient_boosting.predictor import TreePredictor
    from sklearn.neighbors._base import NeighborsBase
    from sklearn.svm._base import BaseLibSVM
    from sklearn.tree import BaseDecisionTree
    from sklearn.tree._tree import Tree

    return (
        (Tree, check_tree),
        (BaseDecisionTree, _check_tree_of),
        (TreePredictor, check_predictor),
        (NeighborsBase, _check_neighbors),
        (BaseLibSVM, _check_support),
    )


def _parts(root: Any) -> Iterator[Any]:
    """An object and all that it holds, but for code."""
    left, seen = [root], set()
    while left:
        part = left.pop()
        if id(part) in seen or isinstance(part, LEAVES):
            continue
        seen.add(id(part))
        yield part
        left += gc.get_referents(part)
        if isinstance(part, np.ndarray) and part.dtype == object:
            left += part.ravel().tolist()


def check_tree(tree: Any, n_features: int) -> None:
    """ModelError for a `Tree` that is no tree on so many features."""
    left, right, feature = tree.children_left, tree.children_right, tree.feature
    inner = left != -1
    _require_forward(left[inner], right[inner], np.flatnonzero(inner), tree.node_count)
    _require_features(feature[inner], min(n_features, tree.n_features))
    if tree.n_features > n_features:
        raise ModelError("a decision tree of this model has indices that lead outside of its features")


def check_predictor(predictor: Any, n_features: int) -> None:
    """ModelError for a `TreePredictor` of histograms that is no tree on so many features."""
    nodes = predictor.nodes
    if (
        not isinstance(nodes, np.ndarray)
        or nodes.ndim != 1
        or not len(nodes)
        or nodes["is_categorical"].any()
    ):
        raise ModelError("a decision tree of this model is not one that featcache writes")
    inner = nodes["is_leaf"] == 0
    left, right = (nodes[side][inner].astype(np.int64) for side in ("left", "right"))
    _require_forward(left, right, np.flatnonzero(inner), len(nodes))
    _require_features(nodes["feature_idx"][inner], n_features)


def _require_forward(left: NDArray[Any], right: NDArray[Any], node: NDArray[np.intp], count: int) -> None:
    """Children come after their parent, as scikit-learn writes them: so no walk is endless."""
    for child in (left, right):
        if not np.all((child > node) & (child < count)):
            raise ModelError("a decision tree of this model has indices that lead outside of it")


def _require_features(feature: NDArray[Any], n_features: int) -> None:
    if not np.all((feature >= 0) & (feature < n_features)):
        raise ModelError("a decision tree of this model has indices that lead outside of its features")


def _check_tree_of(estimator: Any, n_features: int) -> None:
    """Rows are compared with what the estimator says it takes, and given to its tree."""
    if hasattr(estimator, "tree_") and estimator.tree_.n_features != estimator.n_features_in_:
        raise ModelError("a decision tree of this model takes other features than it says")


def _check_neighbors(estimator: Any, n_features: int) -> None:
    if not hasattr(estimator, "_fit_X"):
        return  # not fitted: what others were made by
    rows, labels = estimator._fit_X, getattr(estimator, "_y", None)
    fits = rows.ndim == 2 and rows.shape[1] == estimator.n_features_in_
    if not fits or (labels is not None and not _are_labels(labels, len(rows), len(estimator.classes_))):
        raise ModelError("the neighbours of this model have other sizes than it says")


def _are_labels(labels: NDArray[Any], n: int, n_classes: int) -> bool:
    inside = labels.dtype.kind in "iu" and np.all((labels >= 0) & (labels < n_classes))
    return labels.shape == (n,) and bool(inside)


def _check_support(estimator: Any, n_features: int) -> None:
    """K classes, S vectors: each has a weight for each other class, and each pair of classes an intercept."""
    if not hasattr(estimator, "_n_support"):
        return
    S, K = int(estimator._n_support.sum()), len(estimator._n_support)
    pairs = K * (K - 1) // 2
    expected = {
        "support_": (S,),
        "support_vectors_": (S, estimator.n_features_in_),
        "_dual_coef_": (K - 1, S),
        "_intercept_": (pairs,),
    }
    wrong = [name for name, shape in expected.items() if getattr(estimator, name).shape != shape]
    calibration = {len(estimator._probA), len(estimator._probB)}
    if wrong or (estimator._n_support < 0).any() or calibration not in ({0}, {pairs}):
        raise ModelError("the support vectors of this model have other sizes than it says")
