"""The solvers behind the linear heads: moments, ridge for all penalties, softmax regression for all folds."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info, threadpool_limits

import featcache.heads.moments as moments
import featcache.heads.training as training
from featcache.evaluate.select import TrainingRows, select
from featcache.evaluate.splits import Folds
from featcache.heads import HEADS
from featcache.heads.base import Head
from featcache.heads.curvature import GramCurvature
from featcache.heads.lbfgs import minimise
from featcache.heads.lda import DiscriminantHead
from featcache.heads.logistic import LogisticHead
from featcache.heads.moments import take_moments
from featcache.heads.neighbors import _nearest
from featcache.heads.ridge import RidgeHead
from featcache.heads.standardize import Standardizer
from featcache.heads.threads import one_blas_thread
from featcache.heads.widen import centre_rows, finite, widen
from featcache.progress import TerminalProgress

MANY, FEW = (240, 9, 3), (60, 90, 4)  # more rows than features, and fewer


def blobs(n: int, d: int, k: int, *, seed: int = 0, gap: float = 0.7) -> tuple[Any, Any]:
    """Features of unequal scale and offset, one of them constant, and their labels."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % k)
    X = rng.normal(size=(k, d))[y] * gap + rng.normal(size=(n, d))
    X = X * 10.0 ** rng.uniform(-2, 2, size=d) + rng.uniform(-50, 50, size=d)
    X[:, -1] = 0.1
    return X, y


def uneven(X: Any, y: Any) -> tuple[Any, Any]:
    """Of the first class a third of the rows."""
    rows = np.flatnonzero((y > 0) | (np.cumsum(y == 0) % 3 == 0))
    return X[rows], y[rows]


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
    weights = np.array([1.0, 0.5, 4.0])
    part = np.where(fold < 0, 3, fold)
    plain = take_moments(X, y, n_classes=3, part=part, n_parts=4, cross=True)
    weighted = take_moments(X, y, n_classes=3, part=part, n_parts=4, cross=True, weights=weights)
    for f in range(3):
        rows = fold != f
        some, more = (taken.select(np.arange(4) != f) for taken in (plain, weighted))
        standardizer, expected = some.standardizer(), Standardizer.of(X[rows])
        np.testing.assert_allclose(standardizer.mean, expected.mean, rtol=1e-12)
        np.testing.assert_allclose(standardizer.scale, expected.scale, rtol=1e-9)
        np.testing.assert_allclose(more.standardizer().scale, expected.scale, rtol=1e-9)
        Z, of_row = expected.apply(X[rows]), weights[y[rows]]
        np.testing.assert_allclose(some.standardised_gram(standardizer), Z.T @ Z, atol=1e-8)
        centred = Z - np.average(Z, axis=0, weights=of_row)
        by_hand = (centred * of_row[:, None]).T @ centred
        np.testing.assert_allclose(more.standardised_gram(standardizer), by_hand, atol=1e-8)
        sums = [Z[y[rows] == k].sum(axis=0) for k in range(3)]
        np.testing.assert_allclose(some.standardised_sums(standardizer), sums, atol=1e-8)


@pytest.mark.parametrize("alpha", [1e-3, 1.0, 1e3])
def test_ridge_for_many_penalties_is_scikit_learns_for_each(alpha: float) -> None:
    X, y = blobs(*MANY)
    head = RidgeHead().fit_path(X, y, candidates=[{"alpha": alpha}, {"alpha": 7.0}])[0]
    Z, targets = StandardScaler().fit_transform(X), np.where(y[:, None] == np.arange(3), 1.0, -1.0)
    theirs = Ridge(alpha=alpha, solver="svd").fit(Z, targets)
    np.testing.assert_allclose(head.column_scores(X), theirs.predict(Z), rtol=1e-8, atol=1e-9)


SEARCHED: Any = {
    "logistic": [{"C": C} for C in (0.3, 0.01, 3.0)],
    "ridge": [{"alpha": alpha} for alpha in (0.3, 0.01, 3.0)],
    "lda": [{"shrinkage": shrinkage} for shrinkage in (0.3, 0.01, 1.0)],
    "ncm": [{}],
    "knn": [{"k": 3}, {"k": 200}, {"k": 1, "T": 0.5}],
}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("shape", [MANY, FEW])
def test_the_batched_search_scores_each_row_as_a_head_fitted_without_its_fold(
    shape: tuple[int, int, int], name: str, dtype: Any
) -> None:
    X, y = blobs(*shape)
    X, fold, candidates = (X / 100).astype(dtype), folds_of(len(y)), SEARCHED[name]
    given = {"tol": 1e-14} if name == "logistic" else {}
    head: Any = HEADS[name].load()(**given)
    searched = tuple({parameter for values in candidates for parameter in values})
    path = head.start_search(X, y, fold=fold, n_folds=3, searched=searched)
    for values, scores in zip(candidates, path.scores(candidates), strict=True):
        for f in range(3):
            alone = type(head)(**values, **given).fit(X[fold != f], y[fold != f])
            expected = alone.column_scores(X[fold == f])
            np.testing.assert_allclose(scores[fold == f], expected, rtol=1e-4, atol=1e-4)
    assert list(path.scores([])) == []
    found, alone = path.fit(candidates[0] | given), type(head)(**candidates[0], **given).fit(X, y)
    np.testing.assert_allclose(found.column_scores(X), alone.column_scores(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("shrinkage", [0.01, 0.4, 1.0])
@pytest.mark.parametrize(("n", "d", "k"), [MANY, FEW, (40, 1, 2), (50, 6, 2)])
def test_lda_is_scikit_learns(n: int, d: int, k: int, shrinkage: float, balanced: bool) -> None:
    X, y = uneven(*blobs(n, d, k))
    Z = StandardScaler().fit_transform(X)
    priors = np.full(k, 1 / k) if balanced else None
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=priors).fit(Z, y)
    ours = DiscriminantHead(shrinkage, class_weight="balanced" if balanced else None).fit(X, y)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(Z), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_lda_tells_classes_whose_rows_are_alike(shape: tuple[int, int]) -> None:
    X = np.random.default_rng(0).normal(size=shape)
    X, y = np.concatenate([X, X]), np.tile(np.arange(len(X)), 2)
    for shrinkage in (1e-3, 0.5):
        assert DiscriminantHead(shrinkage).fit(X, y).score(X, y) == 1.0


@pytest.mark.parametrize("weight", ["balanced", {0: 3.0, 1: 0.5}])
@pytest.mark.parametrize("shape", [MANY, FEW])
def test_weights_of_classes_are_scikit_learns(shape: tuple[int, int, int], weight: Any) -> None:
    X, y = uneven(*blobs(*shape))
    Z = StandardScaler().fit_transform(X)
    ridge = RidgeClassifier(alpha=3.0, class_weight=weight).fit(Z, y)
    ours = RidgeHead(3.0, class_weight=weight).fit(X, y)
    np.testing.assert_allclose(ours.column_scores(X), ridge.decision_function(Z), rtol=1e-6, atol=1e-8)
    exact = LogisticRegression(C=0.3, class_weight=weight, tol=1e-10, max_iter=100_000).fit(Z, y)
    head = LogisticHead(0.3, class_weight=weight, tol=1e-12).fit(X, y)
    np.testing.assert_allclose(head.predict_proba(X), exact.predict_proba(Z), atol=2e-4)


@pytest.mark.parametrize("shape", [MANY, FEW])
def test_a_fold_of_the_logistic_search_is_balanced_by_its_own_rows(shape: tuple[int, int, int]) -> None:
    X, y = uneven(*blobs(*shape))
    fold = np.where(np.arange(len(y)) % 7 < 3, np.where(y == 0, 1, 0), 1)  # class 0 is rarer without fold 1
    fold[y == 0] = np.arange(np.sum(y == 0)) % 5 // 4
    head = LogisticHead(class_weight="balanced", tol=1e-12)
    path = head.start_search(X, y, fold=fold, n_folds=2, searched=("C",))
    assert path is not None
    (scores,) = path.scores([{"C": 0.1}])
    for f in range(2):
        alone = clone(head).set_params(C=0.1).fit(X[fold != f], y[fold != f])
        expected = alone.column_scores(X[fold == f])
        np.testing.assert_allclose(scores[fold == f], expected, rtol=1e-4, atol=1e-4)


def test_float32_cross_products_solve_the_ridge_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = blobs(4000, 60, 5)
    X = (X + 1000).astype(np.float32)  # a mean far above the deviations
    expected = RidgeHead(10.0).fit(X.astype(np.float64), y).column_scores(X)
    monkeypatch.setattr(moments, "FLOAT64_VALUES", 0)
    monkeypatch.setattr(moments, "CHUNK_VALUES", 30_000)
    found = RidgeHead(10.0).fit(X, y)
    np.testing.assert_allclose(found.column_scores(X), expected, atol=2e-5)
    assert take_moments(X, y, n_classes=5, cross=True).noise > 1e-8  # that float32 was used at all
    monkeypatch.setattr(moments, "usable_processors", lambda: 1)
    np.testing.assert_array_equal(RidgeHead(10.0).fit(X, y).coef_, found.coef_)


@pytest.mark.parametrize("n", [40, 403, 4096])
def test_the_nearest_rows_are_found_among_groups(n: int) -> None:
    similarities = np.random.default_rng(n).normal(size=(30, n)).astype(np.float32)
    top, found = _nearest(similarities, 7)
    expected = np.argsort(-similarities, axis=1)[:, :7]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(top, np.take_along_axis(similarities, expected, axis=1))


@pytest.mark.parametrize("gap", [0.15, 0.5, 5.0])
def test_strengths_that_cannot_win_are_left_out(gap: float) -> None:
    X, y = blobs(600, 40, 3, gap=gap)
    rows = TrainingRows(X=X, y=y, folds=Folds(fold=folds_of(len(y)), n_folds=3))
    grid = tuple((10.0 ** np.arange(-4, 2.1, 0.5)).tolist())
    kind = replace(HEADS["logistic"], grid={"C": grid}, factor=None)
    found, whole = (
        select("logistic", replace(kind, is_valley=left_out), {}, rows=rows, seed=0)
        for left_out in (True, False)
    )
    assert [candidate.values["C"] for candidate in whole.candidates] == list(grid)
    tried = [candidate.values["C"] for candidate in found.candidates]
    assert set(tried) < set(grid)
    assert len(tried) <= 9
    C = found.params["C"]
    assert whole.params["C"] == C
    assert {grid[0], C} <= set(tried)
    at = grid.index(C)
    assert set(grid[max(at - 1, 0) : at + 2]) <= set(tried)
    assert found.best is not None
    assert whole.best is not None
    assert found.best.nll == pytest.approx(whole.best.nll, rel=1e-3)


def test_the_bar_of_a_search_that_leaves_some_out_ends_full() -> None:
    X, y = blobs(600, 40, 3, gap=0.15)
    rows = TrainingRows(X=X, y=y, folds=Folds(fold=folds_of(len(y)), n_folds=3))
    kind = replace(HEADS["logistic"], grid={"C": tuple((10.0 ** np.arange(-4, 2.1, 0.5)).tolist())})
    screen = StringIO()
    found = select("logistic", kind, {}, rows=rows, seed=0, progress=TerminalProgress(screen))
    assert max(candidate.values["C"] for candidate in found.candidates) < 100
    assert "7/7 candidates" in screen.getvalue().split("\r")[-1]


@pytest.mark.parametrize("shape", [MANY, FEW])
def test_a_head_from_the_search_is_the_head_fitted_alone(shape: tuple[int, int, int]) -> None:
    X, y = blobs(*shape)
    path = LogisticHead(tol=1e-12).start_search(X, y, fold=folds_of(len(y)), n_folds=3, searched=("C",))
    assert path is not None
    list(path.scores([{"C": 0.01}, {"C": 0.1}]))
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
        given = {"tol": 1e-9} if name == "logistic" else {}
        return select(name, HEADS[name], given, rows=TrainingRows(X=X, y=y, folds=folds), seed=0)

    batched = choose()
    assert batched.refit is not None
    monkeypatch.setattr(HEADS[name].load(), "start_search", Head.start_search)
    alone = choose()
    assert alone.refit is None
    assert batched.params == pytest.approx(alone.params, rel=1e-3)
    for one, other in zip(batched.candidates, alone.candidates, strict=True):
        assert one.values == other.values
        assert one.nll == pytest.approx(other.nll, rel=1e-4)


def test_a_fold_that_misses_a_class_is_left_to_the_general_way() -> None:
    X, y = blobs(*MANY)
    fold = np.where(y == 0, 0, 1)
    for head, name in ((LogisticHead(), "C"), (RidgeHead(), "alpha")):
        assert head.start_search(X, y, fold=fold, n_folds=2, searched=(name,)) is None


def test_float32_products_reach_the_optimum_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = blobs(400, 30, 5)
    exact = LogisticRegression(C=0.3, tol=1e-10, max_iter=100_000).fit(StandardScaler().fit_transform(X), y)
    logits = exact.decision_function(StandardScaler().fit_transform(X))
    best = 0.5 * np.sum(exact.coef_**2) + 0.3 * len(y) * log_loss(logits, y)
    monkeypatch.setattr(training, "FLOAT64_VALUES", 0)
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
    tables = []
    for _ in range(2):
        head, folds = LogisticHead(tol=1e-5), folds_of(len(y))
        path = head.start_search(X, y, fold=folds, n_folds=3, searched=("C",))
        assert path is not None
        tables.append([scores.tobytes() for scores in path.scores([{"C": 0.1}, {"C": 1.0}])])
    assert tables[0] == tables[1]


def test_fits_side_by_side_leave_the_matrix_library_its_threads() -> None:
    def threads() -> set[int]:
        return {info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"}

    with threadpool_limits(limits=2, user_api="blas"):
        first, second = one_blas_thread(), one_blas_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert threads() == {1}  # the second is not done
        second.__exit__(None, None, None)
        assert threads() == {2}


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


class _Rounded(_Quadratics):
    """Values and gradients that are never quite the same twice, as those of float32 sums."""

    noise = 1e-7

    def evaluate(self, which: Any, x: Any) -> Any:
        value, gradient = super().evaluate(which, x)
        self.calls = getattr(self, "calls", 0) + 1
        rng = np.random.default_rng(self.calls)
        shaken = 2e-4 * rng.normal(size=gradient.shape)
        return value * (1 + self.noise * rng.uniform(-1, 1, size=value.shape)), gradient + shaken


def test_a_minimum_blurred_by_rounding_ends_the_steps() -> None:
    problems = _Rounded(6)
    found = minimise(problems, np.zeros((3, 6)), tol=1e-12, max_iter=1000)
    assert found.converged.all()
    assert found.n_iter.max() < 200
    exact = -0.5 * np.sum(problems.b * np.linalg.solve(problems.A, problems.b[..., None])[..., 0], axis=1)
    np.testing.assert_allclose(found.value, exact, rtol=1e-4)


@pytest.mark.parametrize("class_weight", [None, {0: 0.5, 1: 2.0, 2: 1.0}])
def test_the_losses_of_sure_rows_are_more_than_the_rounding_of_one(class_weight: Any) -> None:
    n, d = 6_000, 40
    y, rng = np.arange(n) % 3, np.random.default_rng(0)
    X = (rng.normal(size=(n, d)) + 8 * np.eye(3, d)[y]).astype(np.float32)
    head = LogisticHead(C=1.0, class_weight=class_weight).fit(X, y)
    problems = training.all_rows(X, y, weigh=head._weigh)
    assert problems.dtype is np.float32
    weights, bias = problems.from_raw(3 * head.coef_, 3 * head.intercept_)
    found, exact = (rows.evaluate(np.zeros(1, int), weights[None], bias[None])
                    for rows in (problems.rows, problems.exact))  # fmt: skip
    assert exact.loss[0] / n < 1e-6
    for name in ("loss", "weights", "bias", "variance"):
        of, expected = getattr(found, name), getattr(exact, name)
        np.testing.assert_allclose(of, expected, atol=1e-3 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("job", ["ridge", "ridge path", "logistic", "logistic path"])
def test_features_on_disk_are_never_copied_whole(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, d = 60_000, 64
    y, rng = np.arange(n) % 3, np.random.default_rng(0)
    fold = np.arange(n) // 3 % 3
    X = np.memmap(tmp_path / "X", dtype=np.float16, mode="w+", shape=(n, d))
    X[:] = rng.normal(size=(n, d)).astype(np.float16) + (y == 0)[:, None] * 0.1
    for module in ("training", "moments", "closed", "softmax"):
        for name in ("BLOCK_VALUES", "CHUNK_VALUES", "TILE_VALUES"):
            monkeypatch.setattr(f"featcache.heads.{module}.{name}", 100_000, raising=False)
    monkeypatch.setattr(training, "CACHE_BYTES", 0)
    head: Any = RidgeHead() if "ridge" in job else LogisticHead(C=1e-3, tol=1e-3)
    tracemalloc.start()
    try:
        if "path" in job:
            name = "alpha" if "ridge" in job else "C"
            path = head.start_search(X, y, fold=fold, n_folds=3, searched=(name,))
            for _ in path.scores([{name: 1e-3}]):
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

    from featcache.fitting import Wishes, fit_features

    right = total = chosen_right = 0.0
    for seed in range(6):
        features = gaussian_features({"": 500}, seed=seed)
        y = np.random.default_rng(200 + seed).integers(0, 3, size=500)
        for head in ("logistic", "ridge", "knn"):
            result = fit_features(replace(features, y=y), Wishes(head=head))[0]
            right += result.metrics.accuracy * result.metrics.n
            total += result.metrics.n
            chosen_right += max(c.accuracy for c in result.selection.candidates) * result.metrics.n
    # The heads share rows, so that the runs of one seed count as one: 3 standard deviations of a binomial.
    assert abs(right / total - 1 / 3) < 3 * (2 / 9 / (total / 3)) ** 0.5
    assert chosen_right > right  # the best of a sweep is above chance on the rows it was chosen by


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("float64_values", [0, 200_000])
@pytest.mark.parametrize("scale", [1e-42, 1e37])
def test_features_near_the_ends_of_float32_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, scale: float, float64_values: int
) -> None:
    monkeypatch.setattr(training, "FLOAT64_VALUES", float64_values)
    rng = np.random.default_rng(0)
    y = np.arange(240) % 3
    X = 4.0 * np.eye(3, 5)[y] + rng.normal(size=(240, 5))
    X[:, 4] = np.where(np.arange(240) < 120, 9.0, -9.0)  # parts of their sum are infinite either way
    extreme = (X * scale).astype(np.float32)
    folds = Folds(fold=np.arange(240) // 3 % 4, n_folds=4)
    found, plain = (
        select(
            "logistic", HEADS["logistic"], {"C": 0.01}, rows=TrainingRows(X=some, y=y, folds=folds), seed=0
        )
        for some in (extreme, X)
    )
    assert found.best is not None
    assert plain.best is not None
    assert found.best.nll == pytest.approx(plain.best.nll, rel=0.1)
    for name in ("ncm", "ridge", "lda", "logistic", "knn"):
        head = HEADS[name].load()().fit(extreme, y)
        assert head.score(extreme, y) > 0.95


def test_rows_that_are_not_finite_are_refused_in_training_and_in_prediction() -> None:
    X, y = blobs(60, 4, 3)
    head = RidgeHead().fit(X, y)
    for dtype in (np.float64, np.float32, np.float16):
        bad = np.where(np.arange(60)[:, None] == 7, np.inf, X).astype(dtype)
        with pytest.raises(ValueError, match="infinity"):
            RidgeHead().fit(bad, y)
        with pytest.raises(ValueError, match="infinity"):
            head.predict(bad)


@pytest.mark.filterwarnings("error")
def test_many_classes_of_two_rows_are_classes() -> None:
    X, y = np.repeat(np.eye(40), 2, axis=0)[:-3], np.repeat(np.arange(40), 2)[:-3]
    assert RidgeHead().fit(X[::2], y[::2]).score(X, y) == 1.0
    with pytest.raises(ValueError, match="Unknown label type"):
        RidgeHead().fit(X, y + 0.5)


def test_every_float16_becomes_the_float32_of_the_same_value() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    some = every[np.isfinite(every)].reshape(-1, 16)
    out = np.empty(some.shape, dtype=np.float32)
    found = widen(some, out=out)
    assert found.tobytes() == some.astype(np.float32).tobytes()
    mean, reciprocal = np.float32([0.5] * 16), np.float32([3] * 16)
    centre_rows(some, mean, reciprocal, out=out)
    np.testing.assert_array_equal(out, (some.astype(np.float32) - mean) * reciprocal)
    assert [finite(np.array([[value]])) for value in every] == np.isfinite(every).tolist()


def test_the_curvature_is_the_hessian_where_classes_and_features_come_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The inverse by a vector, against the Hessian of two classes written out, bias and all."""
    monkeypatch.setattr("featcache.heads.curvature.GRAM_ROWS", 1500)
    monkeypatch.setattr("featcache.heads.curvature.SPACING", 1.001)
    rng = np.random.default_rng(0)
    n, d = 8000, 5
    sample = (rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 1).astype(np.float32)
    curvature = GramCurvature(sample, np.array([n]), 2)
    weights, bias = np.stack([np.full(d, 0.5), np.full(d, -0.5)]), np.array([0.3, -0.3])
    curvature.look(weights, bias)
    p = 1 / (1 + np.exp(-(sample.astype(np.float64) @ (weights[0] - weights[1]) + bias[0] - bias[1])))
    rows = np.concatenate([sample, np.ones((n, 1))], axis=1)
    apart = (rows * (p * (1 - p))[:, None]).T @ rows  # p (1 - p) times 1 and -1 for each pair of classes
    hessian = np.kron([[1, -1], [-1, 1]], apart) + np.diag(([1.0] * d + [0.0]) * 2)
    v, c = rng.normal(size=(1, 2, d)), np.array([[0.7, -0.7]])
    w, b = curvature.solve(np.array([0]), np.full((1, 2), 2 * np.mean(p * (1 - p))), v, c)
    right = np.concatenate([v[0, 0], c[0, :1], v[0, 1], c[0, 1:]])
    expected = np.linalg.lstsq(hessian, right, rcond=None)[0]
    found = np.concatenate([w[0, 0], b[0, :1], w[0, 1], b[0, 1:]])
    # The axis of the sum of both classes has no curvature but the penalty's, and is given a hundredth.
    difference, along = (x.reshape(2, -1)[0] - x.reshape(2, -1)[1] for x in (found, expected))
    np.testing.assert_allclose(difference, along, rtol=0.01, atol=0.01 * np.abs(along).max())
    assert found @ right > 0  # a direction of descent


def test_features_that_repeat_one_another_are_fitted_at_a_strength_beyond_rounding() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 6)).astype(np.float32)
    curvature = GramCurvature(np.concatenate([rows, rows, rows], axis=1), np.array([300]), 3)
    vectors = rng.normal(size=(1, 3, 18))
    found, _ = curvature.solve(np.array([0]), np.full((1, 3), 1e15), vectors, np.zeros((1, 3)))
    assert np.isfinite(found).all()
    assert np.all(np.einsum("jkr,jkr->jk", found, vectors) > 0)  # a direction of descent


def test_a_constant_column_of_a_huge_value_says_nothing() -> None:
    X, y = blobs(300, 5, 3)
    huge = np.column_stack([X, np.full(len(X), 2.8e22)])
    for head in (LogisticHead(tol=1e-12), RidgeHead()):
        alone, beside = clone(head).fit(X, y), clone(head).fit(huge, y)
        np.testing.assert_allclose(beside.column_scores(huge), alone.column_scores(X), atol=1e-3)


def test_a_look_where_all_rows_are_sure_leaves_the_axes_as_they_are() -> None:
    sample = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    curvature = GramCurvature(sample, np.array([200]), 3)
    curvature.look(np.zeros((3, 4)), np.array([1e6, 0.0, 0.0]))
    assert curvature.axes is None
    vector = np.ones((1, 3, 4)), np.ones((1, 3))
    for part in curvature.solve(np.zeros(1, int), np.full((1, 3), 1e-6), *vector):
        assert np.isfinite(part).all()


def test_a_fit_starts_near_weights_that_have_to_be_long() -> None:
    X, y = blobs(6000, 60, 60, gap=1.5)
    problems = training.all_rows(X, y, weigh=lambda codes: np.ones(60))
    read = []
    for first in (problems.first, None):
        problems.first, problems.evaluations = first, 0
        problems.solved.clear()
        (found,) = problems.solve([(0, 0.1)], tol=1e-4, max_iter=500)
        assert found.converged
        read.append(problems.evaluations)
    assert read[0] < 0.9 * read[1]


def test_a_fit_of_classes_that_overlap_starts_from_zero() -> None:
    X, y = blobs(3000, 40, 30, gap=0.3)
    problems = training.all_rows(X, y, weigh=lambda codes: np.ones(30))
    assert not np.any(problems._start(0, 1.0).weights)
