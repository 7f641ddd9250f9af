"""Heads against scikit-learn and against the machine's rate of matrix products, side by side in one run.

    python scripts/bench_heads.py [--store FEATURES.h5] [--rows 10000 --features 1280 --classes 10]
        [--rounds 3] [--only fit --only search --only ridge] [--C 0.1] [--strengths 16] [--penalties 20]

fit: one logistic regression. search: strengths x folds, and the best of them fitted on all rows, against
GridSearchCV(n_jobs=-1). ridge: penalties x folds against one product X^T X at the rate measured in the same
round. The sides take turns; the table has medians and the ratios, their range in brackets. scikit-learn gets
standardised float32 features, and stops at --tol (1e-4 is its default); the objectives say what it reached.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.preprocessing import StandardScaler

from featcache.commands.fit import choose_rows
from featcache.evaluate.select import select
from featcache.evaluate.splits import Folds, make_folds
from featcache.heads import HEADS
from featcache.heads.logistic import LogisticHead
from featcache.heads.ridge import RidgeHead
from featcache.store.reader import FeatureStore

NEWTON_UNKNOWNS = 5_000  # of newton-cholesky, whose Hessian is dense: beyond, it is not a fair opponent


def synthetic(rows: int, features: int, classes: int) -> tuple[Any, Any]:
    """Rectified features with a spectrum that falls like those of a network, and their labels."""
    rng = np.random.default_rng(0)
    y = np.arange(rows) % classes
    mix = rng.normal(size=(features, features)) * (np.arange(1, features + 1) ** -0.7)[:, None]
    centres = rng.normal(size=(classes, features)) * 0.6
    X = np.empty((rows, features), dtype=np.float32)
    for start in range(0, rows, 8192):
        of = y[start : start + 8192]
        X[start : start + 8192] = (centres[of] + rng.normal(size=(len(of), features))) @ mix
    X /= X[:8192].std(axis=0)
    return np.maximum(X + 0.3, 0, out=X), y


def stored(path: str) -> tuple[Any, Any]:
    features = FeatureStore.open(path).features()
    rows = choose_rows(features).train
    return features.X[rows].astype(np.float32), np.unique(features.y[rows], return_inverse=True)[1]


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def objective(Z: Any, y: Any, weights: Any, bias: Any, C: float) -> float:
    """The logistic objective in float64, on standardised features."""
    logits = Z.astype(np.float64) @ weights.T + bias
    logits -= logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]
    return float(0.5 * np.sum(weights * weights) + C * losses.sum())


def say(what: str, ours: list[float], theirs: list[float], rest: str = "") -> None:
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    print(
        f"{what:42} {statistics.median(ours):9.3f} {statistics.median(theirs):9.3f} "
        f"{statistics.median(ratios):8.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})  {rest}",
        flush=True,
    )


def bench_fit(X: Any, y: Any, options: argparse.Namespace) -> None:
    Z, C = StandardScaler().fit_transform(X), options.C
    solvers = ["lbfgs"]
    if Z.shape[1] * len(np.unique(y)) <= NEWTON_UNKNOWNS:
        solvers.append("newton-cholesky")
    ours: list[float] = []
    theirs: dict[str, list[float]] = {solver: [] for solver in solvers}
    found: dict[str, float] = {}
    for _ in range(options.rounds):
        took, head = seconds(lambda: LogisticHead(C=C, tol=options.our_tol).fit(X, y))
        ours.append(took)
        for solver in solvers:
            model = LogisticRegression(C=C, solver=solver, tol=options.tol, max_iter=10_000)
            # Standardising is part of ours, so it is part of theirs.
            took, model = seconds(lambda model=model: model.fit(StandardScaler().fit_transform(X), y))
            theirs[solver].append(took)
            found[solver] = objective(Z, y, model.coef_, model.intercept_, C)
    scaler = StandardScaler().fit(X)
    weights = head.coef_ * scaler.scale_
    mine = objective(Z, y, weights, head.intercept_ + head.coef_ @ scaler.mean_, C)
    for solver in solvers:
        gap = f"objective {mine:.6f} against {found[solver]:.6f}, {(found[solver] - mine) / mine:+.1e}"
        say(f"fit, C={C:g}, against {solver}", ours, theirs[solver], gap)
    print(f"    {head.n_iter_} iterations, gradient norm {head.gradient_norm_:.3g}, {head.converged_=}")


def bench_search(X: Any, y: Any, folds: Folds, options: argparse.Namespace) -> None:
    grid = tuple(np.logspace(-4, 1, options.strengths).tolist())
    kind = HEADS["logistic"]
    kind = type(kind)(**{**vars(kind), "grid": grid, "factor": None})
    Z = StandardScaler().fit_transform(X)
    estimator = LogisticRegression(tol=options.tol, max_iter=10_000)
    splits = PredefinedSplit(folds.fold)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(options.rounds):

        def search() -> Any:
            chosen = select("logistic", kind, {}, X=X, y=y, folds=folds, seed=0)
            return chosen, chosen.refit(chosen.params)  # type: ignore[misc]

        took, (chosen, _) = seconds(search)
        ours.append(took)
        # Their features are standardised once, by all rows: less work for them, and a little leak.
        other = GridSearchCV(estimator, {"C": list(grid)}, scoring="neg_log_loss", cv=splits, n_jobs=-1)
        took, other = seconds(lambda other=other: other.fit(Z, y))
        theirs.append(took)
    mine = min(c.nll for c in chosen.candidates)
    theirs_best = f"{other.best_params_['C']:.3g} at {-other.best_score_:.5f}"
    text = f"C {chosen.params['C']:.3g} at {mine:.5f} against {theirs_best}"
    say(f"search, {len(grid)} C x {folds.n_folds} folds", ours, theirs, text)


def bench_ridge(X: Any, y: Any, folds: Folds, options: argparse.Namespace) -> None:
    penalties = np.logspace(1, 5, options.penalties).tolist()
    ours: list[float] = []
    limit: dict[Any, list[float]] = {np.float64: [], np.float32: []}
    for _ in range(options.rounds):
        for dtype in limit:
            some = X[:4096].astype(dtype)
            square = np.ascontiguousarray(some[:, ::-1])
            some.T @ square
            took = min(seconds(lambda a=some, b=square: a.T @ b)[0] for _ in range(3))
            limit[dtype].append(took * len(X) / len(some))

        def search() -> Any:
            path = RidgeHead().start_search(X, y, fold=folds.fold, n_folds=folds.n_folds, name="alpha")
            return list(path.scores(penalties))  # type: ignore[union-attr]

        ours.append(seconds(search)[0])
    for dtype, pass_seconds in limit.items():
        rate = 2 * len(X) * X.shape[1] ** 2 / statistics.median(pass_seconds) / 1e9
        name = np.dtype(dtype).name
        say(
            f"ridge, {len(penalties)} alpha x {folds.n_folds} folds",
            pass_seconds,
            ours,
            f"x one {name} pass at {rate:.0f} GFLOP/s",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--store")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--C", type=float, default=0.1)
    parser.add_argument("--strengths", type=int, default=16)
    parser.add_argument("--penalties", type=int, default=20)
    parser.add_argument("--tol", type=float, default=1e-4, help="of scikit-learn")
    parser.add_argument("--our-tol", type=float, default=1e-8)
    parser.add_argument("--only", action="append", choices=["fit", "search", "ridge"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    X, y = (
        stored(options.store) if options.store else synthetic(options.rows, options.features, options.classes)
    )
    digests = np.random.default_rng(0).integers(0, 256, (len(y), 32), dtype=np.uint8)
    folds = make_folds(digests, y, seed=0, n_folds=options.folds)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{platform.machine()}, {os.cpu_count()} processors, load {load}, {options.rounds} rounds")
    print(
        f"{len(X):,} x {X.shape[1]:,} {X.dtype}, {len(np.unique(y))} classes: {options.store or 'synthetic'}"
    )
    print(f"{'':42} {'ours s':>9} {'other s':>9} {'ratio':>8}")
    only = options.only or ["fit", "search", "ridge"]
    if "fit" in only:
        bench_fit(X, y, options)
    if "ridge" in only:
        bench_ridge(X, y, folds, options)
    if "search" in only:
        bench_search(X, y, folds, options)


if __name__ == "__main__":
    main()
