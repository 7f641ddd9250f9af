"""Which nodes of a store a head is fitted on: those asked for, all, or what inner validation chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from featcache.errors import HeadError
from featcache.evaluate.nodes import NodeChoice, choose_nodes
from featcache.evaluate.splits import Groups, make_folds
from featcache.fitting.choice import BALANCED
from featcache.fitting.rows import choose_rows, take_rows
from featcache.progress import Progress
from featcache.store.reader import FeatureStore

AUTO, ALL = "auto", "all"


def pick_nodes(
    store: FeatureStore,
    *,
    node: str | Sequence[str] | None,
    nodes: str | None,
    groups: Groups | None,
    seed: int,
    class_weight: Any = None,
    progress: Progress | None = None,
) -> tuple[tuple[str, ...], NodeChoice | None]:
    """The keys, and how they were chosen where they were: on the training rows alone.

    class_weight: where it is "balanced", every class counts alike; another one is of the head alone.
    """
    if nodes is None:
        wanted = (node or None,) if node is None or isinstance(node, str) else tuple(node) or (None,)
        return tuple(dict.fromkeys(store.node(key).key for key in wanted)), None
    if nodes not in (AUTO, ALL):
        raise HeadError(
            f"nodes are {AUTO!r} or {ALL!r}, not {nodes!r}. To name nodes: --node KEY, repeatable."
        )
    if node:
        raise HeadError(f"nodes are named, or {nodes}: leave one of the two options away.")
    keys = tuple(one.key for one in store.spec.nodes)
    if nodes == ALL or len(keys) == 1:
        return keys, None
    balanced = isinstance(class_weight, str) and class_weight == BALANCED
    return _choose(store, keys, groups=groups, seed=seed, balanced=balanced, progress=progress)


def _choose(
    store: FeatureStore,
    keys: tuple[str, ...],
    *,
    groups: Groups | None,
    seed: int,
    balanced: bool,
    progress: Progress | None,
) -> tuple[tuple[str, ...], NodeChoice | None]:
    from featcache.heads.base import class_weights

    sets = {key: store.features(key) for key in keys}
    first = sets[keys[0]]
    rows = choose_rows(first, groups)
    y = np.unique(first.y[rows.train], return_inverse=True)[1]
    some = groups.take(rows.train) if groups else None
    folds = make_folds(first.sha256[rows.train], y, seed=seed, groups=some)
    if not folds.n_folds or y.max() == 0:  # what is wrong with these rows is said where a head is fitted
        return keys[:1], None
    parts = {key: take_rows(one.X, rows.train) for key, one in sets.items()}
    weights = class_weights(BALANCED, y, n_classes=int(y.max()) + 1)[y] if balanced else None
    choice = choose_nodes(parts, y, folds, weights=weights, progress=progress)
    return choice.nodes, choice
