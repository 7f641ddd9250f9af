"""`featcache fit`: choose, fit and score a head on cached features, and write one model file.

The test rows are scored once, after everything was chosen on the training rows.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.disk import open_regular, write_atomically
from featcache.errors import HeadError
from featcache.evaluate.metrics import Metrics, score
from featcache.evaluate.select import Selection, select
from featcache.evaluate.splits import hold_out, make_folds
from featcache.heads import build_head, find_head
from featcache.heads.parameters import parse_params
from featcache.model import Model
from featcache.progress import Progress, SilentProgress
from featcache.store.features import FeatureSet
from featcache.store.reader import FeatureStore

SHOWN_CLASSES = 15  # up to so many, the report draws the confusion matrix


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What was fitted, how it was chosen and how good it is on rows it has not seen."""

    head: str
    params: Mapping[str, Any]
    searched: str | None
    selection: Selection
    n_train: int
    metrics: Metrics  # of the rows held out
    train_accuracy: float
    scored_on: str
    trained_on: str
    seconds: float
    fingerprint: str
    model: str | None  # path of the model file
    notes: tuple[str, ...]

    @property
    def chosen_by(self) -> str | None:
        """How the searched parameter was chosen; None when nothing was searched."""
        if not self.selection.candidates:
            return None
        what = "mean log-loss" if self.selection.criterion == "nll" else "accuracy"
        return f"{what} in {self.selection.n_folds}-fold cross-validation on the training rows"

    def to_json(self) -> dict[str, Any]:
        metrics = self.metrics.to_json()
        return {
            "head": self.head,
            "params": {name: _finite_or_text(value) for name, value in self.params.items()},
            "n_train": self.n_train,
            "n_test": metrics.pop("n"),
            **metrics,
            "train_accuracy": self.train_accuracy,
            "candidates": [candidate.to_json() for candidate in self.selection.candidates],
            "chosen_by": self.chosen_by,
            "trained_on": self.trained_on,
            "scored_on": self.scored_on,
            "seconds": self.seconds,
            "fingerprint": self.fingerprint,
            "model": self.model,
            "notes": list(self.notes),
        }

    def describe(self) -> str:
        """The report a person reads in a terminal."""
        parts = [*_head_lines(self), "", *_score_lines(self), "", *_class_lines(self.metrics)]
        parts += [f"note: {note}" for note in self.notes]
        if self.model:
            parts += ["", f"written to {self.model}; next: featcache predict {self.model} IMAGES"]
        return "\n".join(parts)


def fit(
    store: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    head: str = "logistic",
    params: Mapping[str, Any] | None = None,
    node: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    check: bool = True,
) -> FitResult:
    """Fit a head on a store's features; write the model to `output` and its report beside it.

    output: the store's name with the ending `.model` by default. params: of the head, values or their text;
    giving the searched one ends the search. check: compare the store with its checksums first.
    HeadError, StoreError, DiskError: what stands in the way, in one line.
    """
    with FeatureStore.open(store, check=check) as opened:
        path = Path(output) if output is not None else Path(store).with_suffix(".model")
        report_path = path.with_name(path.name + ".json")
        _keep_stores(path, report_path)
        features, provenance = opened.features(node), dict(opened.provenance)
        result, model = fit_features(
            features, head=head, params=params, seed=seed, provenance=provenance, progress=progress
        )
    model.save(path)
    result = replace(result, model=str(path))
    report = json.dumps(result.to_json(), indent=2) + "\n"
    write_atomically(report_path, report.encode())
    return result


def _keep_stores(*written: Path) -> None:
    """HeadError when a file to be written is a feature store now: features cost more than a head."""
    for path in written:
        try:
            with open_regular(path) as file:
                is_store = file.read(4) == b"\x89HDF"
        except OSError:
            continue  # nothing of ours; writing will say what is wrong with it
        if is_store:
            raise HeadError(f"{path} is a feature store, which would be replaced. Choose another --output.")


def fit_features(
    features: FeatureSet,
    *,
    head: str = "logistic",
    params: Mapping[str, Any] | None = None,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[FitResult, Model]:
    """`fit` on features in memory, writing nothing."""
    started = time.perf_counter()
    progress = progress or SilentProgress()
    kind, given = find_head(head), parse_params(params)
    build_head(head, given, seed=seed)  # unknown parameters are refused before any work
    rows = choose_rows(features)
    known, y = np.unique(features.y[rows.train], return_inverse=True)
    if len(known) < 2:
        raise HeadError(
            f"the training rows hold one class only ({features.classes[known[0]]}). A head tells classes "
            "apart: embed images of another class as well."
        )
    X, sha256 = _take(features.X, rows.train), features.sha256[rows.train]
    folds = make_folds(sha256, y, seed=seed)
    selection = select(head, kind, given, X=X, y=y, folds=folds, seed=seed, progress=progress)
    with _head_errors(head, doing="fitted"):
        if selection.refit:
            fitted = selection.refit(selection.params)
        else:
            fitted = build_head(head, selection.params, seed=seed).fit(X, y)
    arrays, rest = fitted.to_arrays()

    def metrics_of(where: NDArray[np.int64]) -> Metrics:
        table = np.zeros((len(where), len(features.classes)))
        with _head_errors(head, doing="scored"):
            table[:, known] = fitted.predict_proba(_take(features.X, where))
        return score(features.y[where], table, features.classes)

    test, train = metrics_of(rows.test), metrics_of(rows.train)
    result = FitResult(
        head=head,
        params=selection.params,
        searched=kind.searched,
        selection=selection,
        n_train=len(rows.train),
        metrics=test,
        train_accuracy=train.accuracy,
        scored_on=rows.scored_on,
        trained_on=rows.trained_on,
        seconds=time.perf_counter() - started,
        fingerprint=features.spec.fingerprint(),
        model=None,
        notes=(*rows.notes, *selection.notes, *fitted.notes),
    )
    model = Model(
        head_name=head,
        params=_json_able(fitted.get_params(deep=False)),
        arrays=arrays,
        rest=rest,
        classes=tuple(features.classes[k] for k in known),
        spec=features.spec,
        nodes=features.nodes,
        provenance=dict(provenance or {}),
        metrics={**test.to_json(), "scored_on": rows.scored_on, "train_accuracy": train.accuracy},
        chosen={"by": result.chosen_by, "candidates": [c.to_json() for c in selection.candidates]},
    )
    return result, model


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Which rows a head is fitted on and which it is scored on, as indices, and how they are called."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    trained_on: str
    scored_on: str
    notes: tuple[str, ...]


def choose_rows(features: FeatureSet) -> Rows:
    """The splits of the data where it has them, else a fifth of the images held out by content.

    With both a val and a test split, val rows join the training rows, and test is scored. Rows without a
    label are left out, and so are rows without a split where others have one.
    """
    labelled = features.y >= 0
    if not labelled.any():
        raise HeadError(
            "no row has a label, so there is nothing to learn. Embed a folder with one folder a class."
        )
    splits = {name: labelled & (features.splits == name) for name in ("train", "val", "test", "")}
    has = {name: bool(rows.any()) for name, rows in splits.items()}
    notes = []
    if not has["train"] and (has["val"] or has["test"]):
        raise HeadError(
            "the data has no train rows, only "
            f"{' and '.join(name for name in ('val', 'test') if has[name])}. Embed the training images too."
        )
    if not (has["val"] or has["test"]):
        name = "train" if has["train"] else ""
        pool = np.flatnonzero(splits[name])
        held = hold_out(features.sha256[pool], features.y[pool])
        train, test = pool[~held], pool[held]
        what = "a fifth of the train split" if name else "a fifth of the images"
        trained_on, scored_on = (
            f"the rest of the {'train split' if name else 'images'}",
            (f"{what}, held out by content"),
        )
        if not len(test) or not len(train):
            raise HeadError(
                "every class has a single image, or there is but one: nothing can be held out to score the "
                "head. Embed more images, or give them train and test splits."
            )
    else:
        both = has["val"] and has["test"]
        train = np.flatnonzero(splits["train"] | splits["val"] if both else splits["train"])
        scored_on = "test" if has["test"] else "val"
        trained_on = "train and val" if both else "train"
        test = np.flatnonzero(splits[scored_on])
        if both:
            notes.append("val rows joined the training rows; test was scored")
    if has["train"] and has[""]:
        notes.append(f"{int(splits[''].sum())} labelled rows without a split were left out")
    notes += _warn_of(features, train, test)
    return Rows(train=train, test=test, trained_on=trained_on, scored_on=scored_on, notes=tuple(notes))


def _warn_of(features: FeatureSet, train: NDArray[np.int64], test: NDArray[np.int64]) -> list[str]:
    """What makes the score on `test` mean less than it seems."""
    notes = []
    digests = np.ascontiguousarray(features.sha256).view("V32").ravel()
    shared = int(np.isin(digests[test], digests[train]).sum())
    if shared:
        notes.append(f"{shared} of the {len(test)} rows scored are images that were also trained on")
    missing = np.setdiff1d(features.y[test], features.y[train])
    if len(missing):
        names = ", ".join(features.classes[k] for k in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        notes.append(f"not in the training rows, so counted as errors: {names}{more}")
    return notes


def _take(X: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[Any]:
    """These rows of X, ascending: a view where they follow one another, else a copy."""
    together = len(rows) and rows[-1] - rows[0] + 1 == len(rows)
    taken: NDArray[Any] = X[rows[0] : rows[-1] + 1] if together else X[rows]
    return taken


def _json_able(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in params.items()}


def _finite_or_text(value: Any) -> Any:
    """JSON has no infinity, which some of scikit-learn's parameters take."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _head_errors(head: str, *, doing: str) -> Iterator[None]:
    """One line for what scikit-learn says of parameters and features that do not go together."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise HeadError(f"{head} cannot be {doing}: {' '.join(str(error).split())}") from error


def _head_lines(result: FitResult) -> list[str]:
    said = ", ".join(f"{name}={_short(value)}" for name, value in result.params.items())
    lines = [f"head {result.head}" + (f" ({said})" if said else "") + f", {result.seconds:.1f} s"]
    lines.append(f"trained on {result.n_train:,} rows: {result.trained_on}")
    if result.chosen_by:
        lines += [f"{result.searched} chosen by {result.chosen_by}:", ""]
        lines.append(f"  {result.searched:>12}  {'log-loss':>17}  {'accuracy':>17}")
        chosen = result.params[result.searched] if result.searched else None
        lines += [
            f"{'>' if c.value == chosen else ' '} {c.value:>12.4g}  {c.nll:>8.4f} ± {c.nll_se:.4f}"
            f"  {c.accuracy:>8.4f} ± {c.accuracy_se:.4f}"
            for c in result.selection.candidates
        ]
    return lines


def _score_lines(result: FitResult) -> list[str]:
    m = result.metrics
    low, high = m.accuracy_ci95
    lines = [
        f"scored on {m.n:,} rows: {result.scored_on}",
        f"  accuracy            {m.accuracy:.4f}  (95 % interval {low:.4f} to {high:.4f})",
        f"  mean per class      {m.mean_per_class_accuracy:.4f}",
        f"  log-loss            {m.nll:.4f}",
        f"  calibration error   {m.ece:.4f}",
        f"  accuracy on train   {result.train_accuracy:.4f}",
    ]
    if m.top5 is not None:
        lines.insert(3, f"  in the top 5        {m.top5:.4f}")
    return lines


def _class_lines(m: Metrics) -> list[str]:
    if len(m.classes) <= SHOWN_CLASSES:
        width = max(len(str(count)) for row in m.confusion for count in row) + 1
        width = max(width, len(str(len(m.classes))) + 1)
        lines = ["true class (rows) against predicted (columns, in the same order)"]
        return lines + [
            "  " + "".join(f"{count:>{width}}" for count in row) + f"  {name}"
            for name, row in zip(m.classes, m.confusion, strict=True)
        ]
    scored = [row for row in m.per_class if row.accuracy is not None]
    worst = sorted(scored, key=lambda row: (row.accuracy, row.name))[:10]
    return ["worst classes", *(f"  {row.accuracy:.4f}  {row.name} ({row.n} rows)" for row in worst)]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
