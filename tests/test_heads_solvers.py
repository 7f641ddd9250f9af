"""The solvers behind the linear heads: moments, ridge for all penalties, softmax regression for all folds."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

import featcache.heads.logistic as logistic
from featcache.evaluate.select import select
from featcache.evaluate.splits import Folds
from featcache.heads import HEADS
from featcache.heads.base import Head
from featcache.heads.lbfgs import minimise
from featcache.heads.logistic import LogisticHead
from featcache.heads.moments import take_moments
from featcache.heads.ridge import RidgeHead
from featcache.heads.standardize import Standardizer

MANY, FEW = (240, 9, 3), (60, 90, 4)  # more rows than features, and fewer


def blobs(n: int, d: int, k: int, *, seed: int = 0, gap: float = 0.7) -> tuple[Any, Any]:
    """Features of unequal scale and offset, one of them constant, and their labels."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % k)
    X = rng.normal(size=(k, d))[y] * gap + rng.normal(size=(n, d))
    X = X * 10.0 ** rng.uniform(-2, 2, size=d) + rng.uniform(-50, 50, size=d)
    X[:, -1] = 0.1
    return X, y


def folds_of(n: int, n_folds: int = 3) -> Any:
    """The fold of each row, some of them always trained on."""
    fold = np.random.default_rng(5).permutation(np.arange(n) % n_folds)
    fold[:4] = -1
    return fold


def log_loss(scores: Any, y: Any) -> float:
    log_p = scores - np.logaddexp.reduce(scores.astype(np.float64), axis=1, keepdims=True)
    return float(-log_p[np.arange(len(y)), y].mean())


def test_the_moments_of_a_folds_training_rows_are_those_of_the_rows_themselves() -> None:
    X, y = blobs(*MANY)
    fold = folds_of(len(y))
    X[fold != 1, 2] = 7.0  # constant in the training rows of fold 1 and nowhere else
    moments = take_moments(X, y, n_classes=3, part=np.where(fold < 0, 3, fold), n_parts=4, cross=True)
    for f in range(3):
        rows = fold != f
        some = moments.select(np.arange(4) != f)
        standardizer, expected = some.standardizer(), Standardizer.of(X[rows])
        np.testing.assert_allclose(standardizer.mean, expected.mean, rtol=1e-12)
        np.testing.assert_allclose(standardizer.scale, expected.scale, rtol=1e-9)
        Z = expected.apply(X[rows])
        np.testing.assert_allclose(some.standardised_gram(standardizer), Z.T @ Z, atol=1e-8)
        sums = [Z[y[rows] == k].sum(axis=0) for k in range(3)]
        np.testing.assert_allclose(some.standardised_sums(standardizer), sums, atol=1e-8)


@pytest.mark.parametrize("alpha", [1e-3, 1.0, 1e3])
def test_ridge_for_many_penalties_is_scikit_learns_for_each(alpha: float) -> None:
    X, y = blobs(*MANY)
    head = RidgeHead().fit_path(X, y, name="alpha", values=[alpha, 7.0])[0]
    Z, targets = StandardScaler().fit_transform(X), np.where(y[:, None] == np.arange(3), 1.0, -1.0)
    theirs = Ridge(alpha=alpha, solver="svd").fit(Z, targets)
    np.testing.assert_allclose(head.column_scores(X), theirs.predict(Z), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("name", "parameter"), [("logistic", "C"), ("ridge", "alpha")])
@pytest.mark.parametrize("shape", [MANY, FEW])
def test_the_batched_search_scores_each_row_as_a_head_fitted_without_its_fold(
    shape: tuple[int, int, int], name: str, parameter: str, dtype: Any
) -> None:
    X, y = blobs(*shape)
    X, fold, values = (X / 100).astype(dtype), folds_of(len(y)), [0.3, 0.01, 3.0]
    given = {"tol": 1e-12} if name == "logistic" else {}
    head: Any = HEADS[name].load()(**given)
    path = head.start_search(X, y, fold=fold, n_folds=3, name=parameter)
    if path is None:  # the ridge has no need of it with few rows
        assert (name, shape) == ("ridge", FEW)
        return
    for value, scores in zip(values, path.scores(values), strict=True):
        for f in range(3):
            alone = type(head)(value, **given).fit(X[fold != f], y[fold != f])
            expected = alone.column_scores(X[fold == f])
            np.testing.assert_allclose(scores[fold == f], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [MANY, FEW])
def test_a_head_from_the_search_is_the_head_fitted_alone(shape: tuple[int, int, int]) -> None:
    X, y = blobs(*shape)
    path = LogisticHead(tol=1e-12).start_search(X, y, fold=folds_of(len(y)), n_folds=3, name="C")
    assert path is not None
    list(path.scores([0.01, 0.1]))
    for C in (0.1, 0.5):  # one that was searched, one that was not
        found, alone = path.fit({"C": C, "tol": 1e-12}), LogisticHead(C=C, tol=1e-12).fit(X, y)
        np.testing.assert_allclose(found.column_scores(X), alone.column_scores(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["logistic", "ridge"])
def test_the_search_chooses_what_the_fold_by_fold_path_chooses(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = blobs(*MANY, gap=0.4)
    folds = Folds(fold=folds_of(len(y)), n_folds=3)

    def choose() -> Any:
        return select(
            name, HEADS[name], {"tol": 1e-9} if name == "logistic" else {}, X=X, y=y, folds=folds, seed=0
        )

    batched = choose()
    assert batched.refit is not None
    monkeypatch.setattr(HEADS[name].load(), "start_search", Head.start_search)
    alone = choose()
    assert alone.refit is None
    assert batched.params == pytest.approx(alone.params, rel=1e-3)
    for one, other in zip(batched.candidates, alone.candidates, strict=True):
        assert (one.value, one.nll) == pytest.approx((other.value, other.nll), rel=1e-4)


def test_a_fold_that_misses_a_class_is_left_to_the_general_way() -> None:
    X, y = blobs(*MANY)
    fold = np.where(y == 0, 0, 1)
    for head, name in ((LogisticHead(), "C"), (RidgeHead(), "alpha")):
        assert head.start_search(X, y, fold=fold, n_folds=2, name=name) is None


def test_float32_products_reach_the_optimum_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = blobs(400, 30, 5)
    exact = LogisticRegression(C=0.3, tol=1e-10, max_iter=100_000).fit(StandardScaler().fit_transform(X), y)
    logits = exact.decision_function(StandardScaler().fit_transform(X))
    best = 0.5 * np.sum(exact.coef_**2) + 0.3 * len(y) * log_loss(logits, y)
    monkeypatch.setattr(logistic, "FLOAT64_VALUES", 0)
    head = LogisticHead(C=0.3).fit(X, y)
    assert head.converged_
    assert head.objective_ == pytest.approx(best, rel=1e-5)
    residual = 0.3 * (head.predict_proba(X) - (y[:, None] == np.arange(5)))
    weights = head.coef_ * Standardizer.of(X).scale + residual.T @ StandardScaler().fit_transform(X)
    by_hand = np.linalg.norm(np.concatenate([weights.ravel(), residual.sum(axis=0)]))
    assert head.gradient_norm_ == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("shape", [MANY, FEW])
def test_two_searches_give_the_same_bytes(shape: tuple[int, int, int]) -> None:
    X, y = blobs(*shape)
    tables = [
        [scores.tobytes() for scores in LogisticHead(tol=1e-5)
         .start_search(X, y, fold=folds_of(len(y)), n_folds=3, name="C").scores([0.1, 1.0])]  # type: ignore[union-attr]
        for _ in range(2)
    ]  # fmt: skip
    assert tables[0] == tables[1]


class _Quadratics:
    """1/2 x . A_j x - b_j . x for several j, with no preconditioner at all."""

    noise = 1e-15

    def __init__(self, n: int) -> None:
        rng = np.random.default_rng(0)
        root = rng.normal(size=(3, n, n))
        self.A, self.b = root @ root.transpose(0, 2, 1) + np.eye(n), rng.normal(size=(3, n))

    def evaluate(self, which: Any, x: Any) -> Any:
        Ax = np.einsum("jmn,jn->jm", self.A[which], x)
        return np.sum(x * (0.5 * Ax - self.b[which]), axis=1), Ax - self.b[which]

    def precondition(self, which: Any, gradient: Any) -> Any:
        return gradient


def test_problems_minimised_side_by_side_end_at_their_own_minima() -> None:
    problems = _Quadratics(6)
    found = minimise(problems, np.zeros((3, 6)), tol=1e-13, max_iter=500)
    assert found.converged.all()
    np.testing.assert_allclose(found.x, np.linalg.solve(problems.A, problems.b[..., None])[..., 0], atol=1e-5)
    short = minimise(problems, np.zeros((3, 6)), tol=1e-13, max_iter=1)
    assert not short.converged.any()


@pytest.mark.parametrize("job", ["ridge", "ridge path", "logistic", "logistic path"])
def test_features_on_disk_are_never_copied_whole(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, d = 60_000, 64
    y, rng = np.arange(n) % 3, np.random.default_rng(0)
    fold = np.arange(n) // 3 % 3
    X = np.memmap(tmp_path / "X", dtype=np.float16, mode="w+", shape=(n, d))
    X[:] = rng.normal(size=(n, d)).astype(np.float16) + (y == 0)[:, None] * 0.1
    for module in ("logistic", "moments", "closed", "softmax"):
        for name in ("BLOCK_VALUES", "CHUNK_VALUES", "TILE_VALUES"):
            monkeypatch.setattr(f"featcache.heads.{module}.{name}", 100_000, raising=False)
    monkeypatch.setattr(logistic, "CACHE_BYTES", 0)
    head: Any = RidgeHead() if "ridge" in job else LogisticHead(C=1e-3, tol=1e-3)
    tracemalloc.start()
    try:
        if "path" in job:
            name = "alpha" if "ridge" in job else "C"
            path = head.start_search(X, y, fold=fold, n_folds=3, name=name)
            for _ in path.scores([1e-3]):
                pass
        else:
            head.fit(X, y)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A copy of the features in float32 has n d 4 bytes; labels and scores have a few for each row and class.
    assert peak < 0.5 * n * d * 4 + 120 * n


def test_a_sweep_over_random_labels_leaves_the_score_at_chance() -> None:
    """Trap: a score that was also what the choice was made by."""
    from dataclasses import replace

    from gaussians import gaussian_features

    from featcache.commands.fit import fit_features

    right = total = chosen_right = 0.0
    for seed in range(6):
        features = gaussian_features({"": 500}, seed=seed)
        y = np.random.default_rng(200 + seed).integers(0, 3, size=500)
        for head in ("logistic", "ridge", "knn"):
            result = fit_features(replace(features, y=y), head=head)[0]
            right += result.metrics.accuracy * result.metrics.n
            total += result.metrics.n
            chosen_right += max(c.accuracy for c in result.selection.candidates) * result.metrics.n
    # The heads share rows, so that the runs of one seed count as one: 3 standard deviations of a binomial.
    assert abs(right / total - 1 / 3) < 3 * (2 / 9 / (total / 3)) ** 0.5
    assert chosen_right > right  # the best of a sweep is above chance on the rows it was chosen by
