"""Heads against scikit-learn and against the machine's rate of matrix products, side by side in one run.

    python scripts/bench_heads.py [--store FEATURES.h5] [--rows 10000 --features 1280 --classes 10]
        [--rounds 3] [--only fit --only search --only ridge --only memory] [--C 0.001 0.1]
        [--strengths 16] [--their-share 0.25] [--penalties 20] [--scratch FOLDER]

fit: one logistic regression at each C, ours stopped at the loosest tolerance whose objective is not above
that of the solver it is compared with. search: strengths x folds, and the best of them fitted on all rows,
against GridSearchCV(n_jobs=-1); with --their-share it tries that share of the strengths, spread evenly, and
its time is scaled up. ridge: penalties x folds against one product X^T X at the rate measured in the same
round. memory: ridge and one logistic regression on a map of 1,000,000 x 1,024 float16, 2 GB in --scratch; the
memory is the largest RssAnon, sampled, which leaves out pages of the map.
The sides take turns; the table has medians and the ratios, their range in brackets. scikit-learn gets
standardised float32 features, and stops at --tol (1e-4 is its default); the objectives say what it reached.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.preprocessing import StandardScaler

from featcache.evaluate.select import TrainingRows, select
from featcache.evaluate.splits import Folds, make_folds
from featcache.fitting import choose_rows
from featcache.heads import HEADS
from featcache.heads.logistic import LogisticHead
from featcache.heads.ridge import RidgeHead
from featcache.store.reader import FeatureStore

NEWTON_UNKNOWNS = 5_000  # of newton-cholesky, whose Hessian is dense: beyond, it is not a fair opponent


OUR_TOLS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
MEMORY_SHAPE = (1_000_000, 1024)


def synthetic(rows: int, features: int, classes: int, out: Any = None) -> tuple[Any, Any]:
    """Rectified features with a spectrum that falls like those of a network, and their labels."""
    rng = np.random.default_rng(0)
    y = np.arange(rows) % classes
    mix = rng.normal(size=(features, features)) * (np.arange(1, features + 1) ** -0.7)[:, None]
    centres = rng.normal(size=(classes, features)) * 0.6
    X = np.empty((rows, features), dtype=np.float32) if out is None else out
    scale: Any = None
    for start in range(0, rows, 8192):
        of = y[start : start + 8192]
        some = (centres[of] + rng.standard_normal((len(of), features), dtype=np.float32)) @ mix
        scale = some.std(axis=0) if scale is None else scale
        X[start : start + 8192] = np.maximum(some / scale + 0.3, 0)
    return X, y


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
    Z = StandardScaler().fit_transform(X)
    solvers = ["lbfgs", "newton-cg"]
    if Z.shape[1] * len(np.unique(y)) <= NEWTON_UNKNOWNS:
        solvers.append("newton-cholesky")
    for C in options.C:
        for solver in solvers:
            compare_fits(X, Z, y, C, solver, options)


def compare_fits(X: Any, Z: Any, y: Any, C: float, solver: str, options: argparse.Namespace) -> None:
    scaler = StandardScaler().fit(X)
    ours: list[float] = []
    theirs: list[float] = []
    tols = iter(OUR_TOLS)
    mine, tol = np.inf, next(tols)
    for _ in range(options.rounds):
        # Standardising is part of ours, so it is part of theirs.
        model = LogisticRegression(C=C, solver=solver, tol=options.tol, max_iter=10_000)
        took, model = seconds(lambda model=model: model.fit(StandardScaler().fit_transform(X), y))
        theirs.append(took)
        reached = objective(Z, y, model.coef_, model.intercept_, C)
        while True:
            took, head = seconds(lambda tol=tol: LogisticHead(C=C, tol=tol).fit(X, y))
            weights = head.coef_ * scaler.scale_
            mine = objective(Z, y, weights, head.intercept_ + head.coef_ @ scaler.mean_, C)
            if mine <= reached or (further := next(tols, None)) is None:
                break
            tol = further
        ours.append(took)
    rest = f"objective {mine:.6f} at tol {tol:g} against {reached:.6f}, {(reached - mine) / mine:+.1e}; "
    say(
        f"fit, C={C:g}, against {solver}",
        ours,
        theirs,
        rest + f"{head.n_iter_} iterations, {head.converged_=}",
    )


def bench_search(X: Any, y: Any, folds: Folds, options: argparse.Namespace) -> None:
    grid = tuple(np.logspace(-4, 1, options.strengths).tolist())
    kind = HEADS["logistic"]
    kind = replace(kind, grid={"C": grid}, factor=None)
    Z = StandardScaler().fit_transform(X)
    estimator = LogisticRegression(tol=options.tol, max_iter=10_000)
    splits = PredefinedSplit(folds.fold)
    ours: list[float] = []
    theirs: list[float] = []
    tried = max(round(len(grid) * options.their_share), 1)
    some = [grid[i] for i in np.linspace(0, len(grid) - 1, tried + 2)[1:-1].round().astype(int)]
    some = list(grid) if tried == len(grid) else some
    for _ in range(options.rounds):

        def search() -> Any:
            chosen = select("logistic", kind, {}, rows=TrainingRows(X=X, y=y, folds=folds), seed=0)
            return chosen, chosen.refit(chosen.params)  # type: ignore[misc]

        took, (chosen, _) = seconds(search)
        ours.append(took)
        # Their features are standardised once, by all rows: less work for them, and a little leak.
        other = GridSearchCV(
            estimator, {"C": some}, scoring="neg_log_loss", cv=splits, n_jobs=-1, refit=tried == len(grid)
        )
        took, other = seconds(lambda other=other: other.fit(Z, y))
        theirs.append(took * len(grid) / len(some))
    mine = min(c.nll for c in chosen.candidates)
    theirs_best = f"{other.best_params_['C']:.3g} at {-other.best_score_:.5f}"
    text = f"C {chosen.params['C']:.3g} at {mine:.5f} against {theirs_best}"
    if tried < len(grid):
        text += f", of {len(some)} C tried, time scaled by {len(grid) / len(some):g}"
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
            path = RidgeHead().start_search(X, y, fold=folds.fold, n_folds=folds.n_folds, searched=("alpha",))
            return list(path.scores([{"alpha": alpha} for alpha in penalties]))  # type: ignore[union-attr]

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


def bench_memory(options: argparse.Namespace) -> None:
    rows, features = MEMORY_SHAPE
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        path = Path(folder) / "X.npy"
        X = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=MEMORY_SHAPE)
        synthetic(rows, features, options.classes, out=X)
        X.flush()
        read = min(seconds(lambda: [X[i : i + 8192].view(np.uint16).max() for i in range(0, rows, 8192)])[0]
                   for _ in range(2))  # fmt: skip
        some = np.ascontiguousarray(X[:8192], dtype=np.float32)
        print(
            f"{rows:,} x {features:,} float16, {options.classes} classes, on a map; "
            f"one thread reads it in {read:.2f} s"
        )
        for job, columns in (("ridge", features), ("logistic", options.classes)):
            other = np.ascontiguousarray(some[:, :columns])
            took = min(seconds(lambda other=other: other.T @ some)[0] for _ in range(5)) * rows / len(some)
            command = [sys.executable, __file__, "--measure", job, str(path), str(options.classes)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print(
                f"{job}: {said.strip()}; "
                f"one float32 product X^T by {columns} columns at its rate: {took:.2f} s"
            )


def measure(job: str, path: str, classes: str) -> None:
    """Fit in this process, on a map, and say what it took."""
    X = np.load(path, mmap_mode="r")
    y = np.arange(len(X)) % int(classes)
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak.append(max(peak.pop(), status("RssAnon")))

    before, watcher = status("RssAnon"), threading.Thread(target=watch)
    watcher.start()
    head: Any = RidgeHead(alpha=100.0) if job == "ridge" else LogisticHead(C=1e-4, tol=1e-6)
    took, _ = seconds(lambda: head.fit(X, y))
    done.set()
    watcher.join()
    rest = "" if job == "ridge" else f", {head.n_iter_} iterations, gradient norm {head.gradient_norm_:.2g}"
    print(
        f"{took:.1f} s{rest}; memory {peak[0] / 2**20:.2f} GiB at most, {before / 2**20:.2f} before the fit "
        f"(VmHWM with pages of the map {status('VmHWM') / 2**20:.2f})"
    )


def status(field: str) -> int:
    """KiB of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--store")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--C", type=float, nargs="+", default=[0.001, 0.01, 0.1])
    parser.add_argument("--strengths", type=int, default=16)
    parser.add_argument("--penalties", type=int, default=20)
    parser.add_argument("--tol", type=float, default=1e-4, help="of scikit-learn")
    parser.add_argument("--their-share", type=float, default=1.0)
    parser.add_argument("--scratch", help="folder for the 2 GB of --only memory")
    parser.add_argument("--only", action="append", choices=["fit", "search", "ridge", "memory"])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
        return
    only = options.only or ["fit", "search", "ridge"]
    if "memory" in only:
        bench_memory(options)
        only = [name for name in only if name != "memory"]
    if not only:
        return
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
    if "fit" in only:
        bench_fit(X, y, options)
    if "ridge" in only:
        bench_ridge(X, y, folds, options)
    if "search" in only:
        bench_search(X, y, folds, options)


if __name__ == "__main__":
    main()
