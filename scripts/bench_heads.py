"""Heads against scikit-learn and against the machine's rate of matrix products, side by side in one run.

    python scripts/bench_heads.py [--store FEATURES.h5] [--rows 10000 --features 1280 --classes 10]
        [--rounds 3] [--only fit --only search --only ridge --only memory] [--C 0.001 0.1]
        [--strengths 16] [--their-share 0.25 --their-folds 1 --solvers lbfgs newton-cg]
        [--penalties 20] [--scratch FOLDER] [--device cuda]

fit: one logistic regression at each C, ours stopped at the loosest tolerance whose objective is not above
that of the solver it is compared with. search: strengths x folds, and the best of them fitted on all rows,
against GridSearchCV(n_jobs=-1) with each of --solvers; with --their-share it tries that share of the
strengths, spread evenly, with --their-folds so many of the folds, and its time is scaled up. ridge:
penalties x folds against one product X^T X at the rate measured in the same round. memory: ridge and one
logistic regression on a map of 1,000,000 x 1,024 float16, 2 GB in --scratch; the memory is the largest
RssAnon, sampled, which leaves out pages of the map. --device is where ours does its products over rows; of a
card the rates of its own products are printed first, float32 and copies included.
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
OUR_TOLS = (1e-2, 3e-3, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
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
        f"{what:48} {statistics.median(ours):9.3f} {statistics.median(theirs):9.3f} "
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
            took, head = seconds(lambda tol=tol: LogisticHead(C=C, tol=tol, device=options.device).fit(X, y))
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
    tried = max(round(len(grid) * options.their_share), 1)
    some = [grid[i] for i in np.linspace(0, len(grid) - 1, tried + 2)[1:-1].round().astype(int)]
    some = list(grid) if tried == len(grid) else some
    # Rows of folds that they are not given are trained on, as -1 has it: their fits are as large.
    n_folds = min(options.their_folds or folds.n_folds, folds.n_folds)
    splits = PredefinedSplit(np.where(folds.fold < n_folds, folds.fold, -1))
    more = len(grid) * folds.n_folds / (len(some) * n_folds)
    ours: list[float] = []
    theirs: dict[str, list[float]] = {solver: [] for solver in options.solvers}
    said = {}
    for _ in range(options.rounds):

        def search() -> Any:
            rows = TrainingRows(X=X, y=y, folds=folds)
            chosen = select("logistic", kind, {"device": options.device}, rows=rows, seed=0)
            return chosen, chosen.refit(chosen.params)  # type: ignore[misc]

        took, (chosen, _) = seconds(search)
        ours.append(took)
        for solver, times in theirs.items():
            # Their features are standardised once, by all rows: less work for them, and a little leak.
            estimator = LogisticRegression(solver=solver, tol=options.tol, max_iter=10_000)
            other = GridSearchCV(
                estimator, {"C": some}, scoring="neg_log_loss", cv=splits, n_jobs=-1, refit=more == 1
            )
            took, other = seconds(lambda other=other: other.fit(Z, y))
            times.append(took * more)
            said[solver] = f"{other.best_params_['C']:.3g} at {-other.best_score_:.5f}"
    mine = min(c.nll for c in chosen.candidates)
    for solver, times in theirs.items():
        text = f"C {chosen.params['C']:.3g} at {mine:.5f} against {said[solver]}"
        if more > 1:
            text += f", of {len(some)} C in {n_folds} folds tried, time scaled by {more:g}"
        say(f"search, {len(grid)} C x {folds.n_folds} folds, against {solver}", ours, times, text)


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
            path = RidgeHead(device=options.device).start_search(
                X, y, fold=folds.fold, n_folds=folds.n_folds, searched=("alpha",)
            )
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
            command = [sys.executable, __file__, "--device", options.device]
            command += ["--measure", job, str(path), str(options.classes)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print(
                f"{job}: {said.strip()}; "
                f"one float32 product X^T by {columns} columns at its rate: {took:.2f} s"
            )


def measure(job: str, path: str, classes: str, *, device: str) -> None:
    """Fit in this process, on a map, and say what it took."""
    X = np.load(path, mmap_mode="r")
    y = np.arange(len(X)) % int(classes)
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak.append(max(peak.pop(), status("RssAnon")))

    before, watcher = status("RssAnon"), threading.Thread(target=watch)
    watcher.start()
    head: Any = LogisticHead(C=1e-4, tol=1e-6, device=device)
    head = RidgeHead(alpha=100.0, device=device) if job == "ridge" else head
    took, _ = seconds(lambda: head.fit(X, y))
    done.set()
    watcher.join()
    rest = "" if job == "ridge" else f", {head.n_iter_} iterations, gradient norm {head.gradient_norm_:.2g}"
    print(
        f"{took:.1f} s{rest}; memory {peak[0] / 2**20:.2f} GiB at most, {before / 2**20:.2f} before the fit "
        f"(VmHWM with pages of the map {status('VmHWM') / 2**20:.2f})"
    )


def say_rates(device: str, X: Any, classes: int) -> None:
    """What a card does at most: the products that fits are made of, and copies to it."""
    import torch

    def best(work: Callable[[], Any]) -> float:
        def whole() -> None:
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        whole()
        return min(seconds(whole)[0] for _ in range(5))

    where = torch.device("cuda" if device == "auto" else device)
    some = torch.from_numpy(np.ascontiguousarray(X[:65_536], dtype=np.float32))
    rows, d = some.to(where), some.shape[1]
    weights, n = torch.randn(classes, d, device=where), len(some)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
    gram = best(lambda: rows.T @ rows)
    narrow = best(lambda: rows @ weights.T)
    copied = best(lambda: some.to(where, copy=True))
    print(
        f"{name}: float32 X^T X {2 * n * d * d / gram / 1e9:,.0f} GFLOP/s, by {classes} columns "
        f"{2 * n * d * classes / narrow / 1e9:,.0f}; copied to it {some.nbytes / copied / 1e9:.1f} GB/s. "
        f"All rows: X^T X {gram * len(X) / n:.4f} s, a loss and gradient {2 * narrow * len(X) / n:.4f} s, "
        f"copied {copied * len(X) / n:.3f} s"
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
    parser.add_argument("--their-share", type=float, default=1.0, help="of the strengths")
    parser.add_argument("--their-folds", type=int, help="of the folds; default: all")
    parser.add_argument(
        "--solvers", nargs="+", default=["lbfgs", "newton-cg"], help="of scikit-learn's search"
    )
    parser.add_argument("--device", default="cpu", help="where ours does its products: cpu, cuda or auto")
    parser.add_argument("--scratch", help="folder for the 2 GB of --only memory")
    parser.add_argument("--only", action="append", choices=["fit", "search", "ridge", "memory"])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure, device=options.device)
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
    if options.device != "cpu":
        say_rates(options.device, X, len(np.unique(y)))
    print(f"{'':48} {'ours s':>9} {'other s':>9} {'ratio':>8}")
    if "fit" in only:
        bench_fit(X, y, options)
    if "ridge" in only:
        bench_ridge(X, y, folds, options)
    if "search" in only:
        bench_search(X, y, folds, options)


if __name__ == "__main__":
    main()
