"""Choosing, fitting and scoring a head on features in memory: all of `fit` but the files.

The rows that are scored are looked at once, after everything was chosen on the training rows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from featcache.evaluate.splits import Groups
from featcache.fitting.choice import Choice, choose_head, fit_head
from featcache.fitting.outlook import look_ahead
from featcache.fitting.result import Files, FitResult
from featcache.fitting.rows import Rows, choose_rows, training_rows
from featcache.fitting.scoring import HeldOut, score_head
from featcache.fitting.wishes import Wishes
from featcache.model import Model, image_keys
from featcache.progress import Progress, SilentProgress
from featcache.store.features import FeatureSet

__all__ = ["Files", "FitResult", "HeldOut", "Rows", "Wishes", "choose_rows", "fit_features"]


def fit_features(
    features: FeatureSet,
    wishes: Wishes,
    *,
    groups: Groups | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[FitResult, Model]:
    """`fit` on features in memory, writing nothing.

    groups: of the rows of `features`, never split between what is fitted and what is scored. HeadError: what
    stands in the way, in one line.
    """
    started = time.perf_counter()
    rows = choose_rows(features, groups)
    known = np.unique(features.y[rows.train])
    training = training_rows(features, rows, wishes.loss_weights, seed=wishes.seed)
    choice = choose_head(wishes, training, progress=progress or SilentProgress())
    fitted = fit_head(choice, wishes, training)
    choice = choice.without_search()
    scored = score_head(fitted, choice, features, rows, training, known=known, precision=wishes.precision)
    outlook = look_ahead(
        choice,
        wishes,
        training,
        scored,
        features=features,
        rows=rows,
        left=wishes.budget - wishes.spent - (time.perf_counter() - started),
        progress=progress,
    )
    notes = [*rows.notes, *choice.selection.notes, *fitted.notes, *outlook.notes]
    if wishes.precision is not None and scored.abstention is None:
        notes.append(
            f"no threshold for a precision of {wishes.precision:g}: no row could be held out to choose it by"
        )
    result = FitResult(
        head=choice.head,
        asked=wishes.head,
        params=choice.selection.params,
        searched=choice.kind.searched,
        selection=choice.selection,
        competition=choice.competition,
        logit_adjustment=wishes.logit_adjustment,
        nodes=tuple(node.key for node in features.nodes),
        num_features=features.X.shape[1],
        n_train=len(rows.train),
        metrics=scored.test,
        train_accuracy=scored.train_accuracy,
        cross_validated=scored.cross_validated,
        uncalibrated_ece=scored.uncalibrated_ece,
        abstention=scored.abstention,
        outlook=outlook,
        scored_on=rows.scored_on,
        trained_on=rows.trained_on,
        seconds=time.perf_counter() - started,
        fingerprint=features.spec.fingerprint(),
        model=None,
        notes=tuple(notes),
        held_out=scored.held_out,
        untrained=tuple(features.classes[k] for k in np.setdiff1d(features.y[rows.test], known)),
        grouped_by=groups.by if groups else None,
    )
    model = _model(result, choice, fitted, features, known, provenance or {})
    return result, replace(model, trained_on=np.unique(image_keys(features.sha256[rows.train])))


def _model(
    result: FitResult, choice: Choice, fitted: Any, features: FeatureSet, known: Any, provenance: Any
) -> Model:
    arrays, rest = fitted.to_arrays()
    chosen: dict[str, Any] = {"by": result.chosen_by}
    chosen["candidates"] = [candidate.to_json() for candidate in choice.selection.candidates]
    if choice.competition:
        chosen["heads"] = [one.to_json() for one in choice.competition.contenders]
    return Model(
        head_name=choice.head,
        params=_json_able(fitted.get_params(deep=False)),
        arrays=arrays,
        rest=rest,
        classes=tuple(features.classes[k] for k in known),
        spec=features.spec,
        nodes=features.nodes,
        provenance=dict(provenance),
        metrics={
            **result.metrics.to_json(),
            "scored_on": result.scored_on,
            "train_accuracy": result.train_accuracy,
        },
        chosen=chosen,
    )


def _json_able(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in params.items()}
