"""`featcache fit`: choose, fit and score a head on cached features, and write one model file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from featcache.disk import open_regular, write_atomically
from featcache.errors import HeadError
from featcache.evaluate.groups import find_groups
from featcache.fitting import AUTO, BUDGET, FitResult, fit_features
from featcache.fitting.nodes import pick_nodes
from featcache.heads import HEADS, find_head
from featcache.heads.parameters import parse_params
from featcache.images.paths import show_path
from featcache.progress import Progress
from featcache.store.reader import FeatureStore


def fit(
    store: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    head: str = AUTO,
    params: Mapping[str, Any] | None = None,
    node: str | Sequence[str] | None = None,
    nodes: str | None = None,
    budget: float = BUDGET,
    class_weight: str | None = None,
    logit_adjustment: float | None = None,
    group_by: str | None = None,
    precision: float | None = None,
    shots: Sequence[int] = (),
    tries: int = 10,
    curve: bool | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    check: bool = True,
) -> FitResult:
    """Fit a head on a store's features; write the model to `output` and its report beside it.

    output: the store's name with the ending `.model` by default. head: "auto" lets heads compete for about
    `budget` seconds. params: of the head, values or their text; giving a searched one ends its search.
    node: a key or several, whose vectors are put one after the other; by default the first. nodes: "all", or
    "auto" for those that inner validation chooses. class_weight: "balanced" counts every class alike.
    logit_adjustment: tau, scores are lowered by tau times the logarithm of the class's share of the training
    rows. group_by: "folder", "folder:N", "FILE.csv:COLUMN" or "similar[:COSINE]"; rows of a group stay on one
    side. precision: what rows above a threshold shall be right by. shots, tries: accuracy by images a class.
    curve: accuracy by parts of the training rows. check: compare the store with its checksums first.
    HeadError, StoreError, DiskError: what stands in the way, in one line.
    """
    with FeatureStore.open(store, check=check) as opened:
        path = Path(output) if output is not None else Path(store).with_suffix(".model")
        report_path = path.with_name(path.name + ".json")
        _keep_stores(path, report_path)
        groups = find_groups(group_by, opened.features(), progress=progress) if group_by else None
        keys, choice = pick_nodes(
            opened,
            node=node,
            nodes=nodes,
            groups=groups,
            seed=seed,
            class_weight=class_weight or parse_params(params).get("class_weight"),
            progress=progress,
        )
        features = opened.features(keys, with_views=_wants_views(head))
        result, model = fit_features(
            features,
            head=head,
            params=params,
            seed=seed,
            budget=budget,
            class_weight=class_weight,
            logit_adjustment=logit_adjustment,
            groups=groups,
            precision=precision,
            shots=shots,
            tries=tries,
            curve=curve,
            provenance=dict(opened.provenance),
            progress=progress,
        )
    model.save(path)
    others = () if nodes else tuple(one.key for one in opened.spec.nodes if one.key not in keys)
    result = replace(result, model=str(path), node_choice=choice, other_nodes=others)
    report = json.dumps(result.to_json(), indent=2) + "\n"
    write_atomically(report_path, report.encode())
    return result


def _wants_views(head: str) -> bool:
    """Whether augmented vectors are of use: they are read where the store has them."""
    kinds = [kind for kind in HEADS.values() if kind.entry] if head == AUTO else [find_head(head)]
    return any(kind.uses_views for kind in kinds)


def _keep_stores(*written: Path) -> None:
    """HeadError when a file to be written is a feature store now: features cost more than a head."""
    for path in written:
        try:
            with open_regular(path) as file:
                is_store = file.read(4) == b"\x89HDF"
        except OSError:
            continue  # nothing of ours; writing will say what is wrong with it
        if is_store:
            raise HeadError(
                f"{show_path(path)} is a feature store, which would be replaced. Choose another --output."
            )
