"""Which nodes of a store a head is fitted on: those asked for, all, or what inner validation chooses."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.errors import HeadError, StoreError
from featcache.evaluate.compete import QUICK
from featcache.evaluate.nodes import NodeChoice, choice_seconds, choose_nodes, rows_within
from featcache.evaluate.splits import Groups, make_folds
from featcache.fitting.rows import choose_rows
from featcache.fitting.wishes import BALANCED, BUDGET
from featcache.heads.parameters import did_you_mean
from featcache.images.paths import show_path
from featcache.progress import Progress, SilentProgress
from featcache.store.reader import FeatureStore

AUTO, ALL = "auto", "all"


@dataclass(frozen=True, kw_only=True)
class PickedNodes:
    """The keys of nodes. choice: None where they were asked for. seconds: that it took, or was to take."""

    keys: tuple[str, ...]
    choice: NodeChoice | None = None
    seconds: float = 0.0


def pick_nodes(
    store: FeatureStore,
    *,
    node: str | Sequence[str] | None,
    nodes: str | None,
    groups: Groups | None,
    seed: int,
    class_weight: Any = None,
    budget: float = BUDGET,
    progress: Progress | None = None,
) -> PickedNodes:
    """The nodes that are named, all, or those that are chosen on the training rows.

    class_weight: where it is "balanced", every class counts alike; another one is of the head alone. budget:
    seconds for the choice of nodes and of a head, of which the nodes take half at most where they can.
    """
    if nodes is None:
        return PickedNodes(keys=_named(store, node))
    if nodes not in (AUTO, ALL):
        raise HeadError(
            f"nodes are {AUTO!r} or {ALL!r}, not {nodes!r}. To name nodes: --node KEY, repeatable."
        )
    if node:
        raise HeadError(f"nodes are named, or {nodes}: leave one of the two options away.")
    keys = tuple(one.key for one in store.spec.nodes)
    if nodes == ALL or len(keys) == 1:
        return PickedNodes(keys=keys)
    balanced = isinstance(class_weight, str) and class_weight == BALANCED
    return _choose(
        store,
        keys,
        groups=groups,
        seed=seed,
        balanced=balanced,
        budget=budget,
        progress=progress or SilentProgress(),
    )


def _named(store: FeatureStore, node: str | Sequence[str] | None) -> tuple[str, ...]:
    """Each once; the first of the store where none is named."""
    there = [one.key for one in store.spec.nodes]
    wanted = ([node] if isinstance(node, str) else list(node or ())) or there[:1]
    wanted = [store.spec.find_node(key) for key in wanted]
    for key in wanted:
        if key not in there:
            parts = key.split("+")
            hint = did_you_mean(key, there) or "Name one of these."
            if len(parts) > 1:
                joined = " ".join(f"--node {shlex.quote(part)}" for part in parts)
                hint = f"Several nodes are given one by one: {joined}."
            raise StoreError(
                f"{show_path(store.path)} has no node {key!r}; it holds {', '.join(there)}. {hint}"
            )
    return tuple(dict.fromkeys(wanted))


def _choose(
    store: FeatureStore,
    keys: tuple[str, ...],
    *,
    groups: Groups | None,
    seed: int,
    balanced: bool,
    budget: float,
    progress: Progress,
) -> PickedNodes:
    from featcache.heads.base import class_weights

    sets = {key: store.features(key) for key in keys}
    first = sets[keys[0]]
    rows = choose_rows(first, groups)
    y = np.unique(first.y[rows.train], return_inverse=True)[1]
    some = groups.take(rows.train) if groups else None
    folds = make_folds(first.sha256[rows.train], y, seed=seed, groups=some)
    if not folds.n_folds or y.max() == 0:  # what is wrong with these rows is said where a head is fitted
        return PickedNodes(keys=keys[:1])
    k = int(y.max()) + 1
    widths = [one.X.shape[1] for one in sets.values()]
    most = rows_within(budget / 2, widths, n=len(y), k=k)
    planned = choice_seconds(widths, n=most, k=k)
    if planned >= QUICK:
        within = "of the" if planned <= budget else "though fewer would not tell them apart, more than the"
        progress.note(
            f"choosing among {len(keys)} nodes by {most:,} rows takes about {planned:,.0f} s, {within} "
            f"{budget:g} s of --budget"
        )
    weights = class_weights(BALANCED, y, n_classes=k)[y] if balanced else None
    started = time.perf_counter()
    choice = choose_nodes(
        {key: one.X for key, one in sets.items()},
        y,
        folds,
        rows=rows.train,
        weights=weights,
        most=most,
        progress=progress if planned >= QUICK else None,
    )
    seconds = max(planned, time.perf_counter() - started)
    return PickedNodes(keys=choice.nodes, choice=choice, seconds=seconds)
