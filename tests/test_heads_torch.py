"""Heads trained by minibatches: against a plain loop of torch, alone against side by side, views, seeds."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from torch import nn

from featcache.evaluate.select import TrainingRows, select
from featcache.evaluate.splits import make_folds
from featcache.heads import HEADS, trained
from featcache.heads.batches import Walk
from featcache.heads.linear import MinibatchHead
from featcache.heads.minibatch import Part, Rows, side_by_side
from featcache.heads.mlp import MLPHead
from featcache.heads.standardize import Standardizer

NAMES = ("linear", "mlp")
SMALL = {"linear": {"epochs": 3}, "mlp": {"epochs": 3, "width": 16}}
CANDIDATES = [{"lr": lr, "weight_decay": decay} for lr in (1e-3, 1e-2) for decay in (0.1, 10.0)]
EVERYTHING = {"mixup": 0.4, "label_smoothing": 0.1, "class_weight": "balanced"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of torch that meet after every short operation are slow where processors are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def blobs(n: int = 600, *, d: int = 9, k: int = 3, seed: int = 0) -> tuple[Any, Any]:
    """Features of unequal scale and offset, and their labels, more of the first."""
    rng = np.random.default_rng(seed)
    y = np.maximum(rng.integers(-1, k, size=n), 0)
    X = rng.normal(size=(k, d))[y] + rng.normal(size=(n, d))
    return (X * 10.0 ** rng.uniform(-2, 2, size=d) + rng.uniform(-50, 50, size=d)).astype(np.float32), y


def head_of(name: str, **params: Any) -> Any:
    return HEADS[name].load()(**{**SMALL[name], **params})


def plain_loop(
    X: Any,
    y: Any,
    *,
    layers: nn.Module,
    epochs: int,
    lr: float,
    weight_decay: float,
    smoothing: float = 0.0,
    alpha: float = 0.0,
    balanced: bool = False,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """The training as one would write it for a single network."""
    Z = torch.from_numpy(StandardScaler().fit_transform(X.astype(np.float64)).astype(np.float32))
    labels, n = torch.from_numpy(y), len(y)
    weight = torch.tensor(n / (3 * np.bincount(y)), dtype=torch.float32) if balanced else None
    share_of_class = np.full(3, 1 / 3) if balanced else np.bincount(y) / n
    with torch.no_grad():
        list(layers.parameters())[-1].copy_(torch.from_numpy(np.log(share_of_class)))
    decays = [p for p in layers.parameters() if p.ndim > 1]
    rest = [p for p in layers.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}], lr=lr
    )
    total = epochs * math.ceil(n / 256)
    rising = math.ceil(total / 20)
    t, rng = 0, np.random.default_rng(0)
    for _ in range(epochs):
        order = rng.permutation(n)
        for start in range(0, n, 256):
            index = order[start : start + 256]
            other, share = index, 1.0
            if alpha:
                other, share = index[rng.permutation(len(index))], rng.beta(alpha, alpha)
            hidden = share * Z[index] + (1 - share) * Z[other]
            for layer in layers.children():
                hidden = layer(hidden)
                if dropout and isinstance(layer, nn.ReLU):
                    kept = torch.rand(hidden.shape[1], 256, generator=generator)[:, : len(index)] >= dropout
                    hidden = hidden * kept.T / (1 - dropout)
            losses = [
                nn.functional.cross_entropy(
                    hidden, labels[some], weight=weight, label_smoothing=smoothing, reduction="sum"
                )
                for some in (index, other)
            ]
            at = (
                (t + 1) / rising
                if t < rising
                else (1 + math.cos(math.pi * (t - rising) / (total - rising))) / 2
            )
            for group in optimizer.param_groups:
                group["lr"] = lr * at
            optimizer.zero_grad()
            torch.autograd.backward((share * losses[0] + (1 - share) * losses[1]) / len(index))
            optimizer.step()
            t += 1
    return layers


VARIANTS = [{}, {"smoothing": 0.2}, {"alpha": 0.4}, {"balanced": True}, {"smoothing": 0.1, "alpha": 1.0}]


def as_params(variant: Any) -> dict[str, Any]:
    return {
        "label_smoothing": variant.get("smoothing", 0.0),
        "mixup": variant.get("alpha", 0.0),
        "class_weight": "balanced" if variant.get("balanced") else None,
    }


def scores_of(layers: nn.Module, X: Any) -> Any:
    Z = StandardScaler().fit_transform(X.astype(np.float64)).astype(np.float32)
    with torch.inference_mode():
        return layers(torch.from_numpy(Z)).numpy()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_linear_head_is_what_a_plain_loop_trains(variant: Any) -> None:
    X, y = blobs()
    layers = nn.Sequential(nn.Linear(9, 3))
    for parameter in layers.parameters():
        nn.init.zeros_(parameter)
    plain_loop(X, y, layers=layers, epochs=10, lr=1e-2, weight_decay=1.0, **variant)
    head = MinibatchHead(epochs=10, lr=1e-2, weight_decay=1.0, **as_params(variant)).fit(X, y)
    np.testing.assert_allclose(head.column_scores(X), scores_of(layers, X), atol=1e-5)


@pytest.mark.parametrize("variant", [{}, {"dropout": 0.3}, {"alpha": 0.4, "balanced": True}], ids=str)
def test_the_mlp_is_what_a_plain_loop_trains(variant: Any) -> None:
    X, y = blobs()
    layers = nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.zero_()
        layers[0].weight.copy_(torch.randn(16, 9, generator=generator) * math.sqrt(2 / 9))
    plain_loop(X, y, layers=layers, epochs=10, lr=1e-2, weight_decay=1.0, generator=generator, **variant)
    params = {**as_params(variant), "dropout": variant.get("dropout", 0.0)}
    head = MLPHead(epochs=10, lr=1e-2, weight_decay=1.0, width=16, **params).fit(X, y)
    np.testing.assert_allclose(head.column_scores(X), scores_of(layers, X), atol=1e-3)


def uneven_folds(n: int) -> Any:
    """Three folds, whose training parts take 3, 2 and 2 steps of 256 rows, and rows that none holds out."""
    fold = np.repeat([0, 1, 2, -1], [60, 200, 330, n - 590])
    return np.random.default_rng(3).permutation(fold)


@pytest.mark.parametrize("one_stack", [False, True], ids=["a stack a fold", "all in one stack"])
@pytest.mark.parametrize("name", NAMES)
def test_a_candidate_of_a_search_is_what_it_is_when_trained_alone(
    name: str, one_stack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if one_stack:
        monkeypatch.setattr(trained, "divide", lambda sets, some, _: [Part(range(sets), range(some))])
    X, y = blobs(640)
    views = [X + 0.1 * X.std(axis=0), X * np.float32(1.1)]
    fold, head = uneven_folds(len(y)), head_of(name, **EVERYTHING)
    search = head.start_search(X, y, fold=fold, n_folds=3, searched=("lr", "weight_decay"), views=views)
    for values, table in zip(CANDIDATES, search.scores(CANDIDATES), strict=True):
        for f in range(3):
            fitted = fold != f
            alone = head_of(name, **EVERYTHING, **values)
            alone.fit(X[fitted], y[fitted], views=[view[fitted] for view in views])
            np.testing.assert_allclose(table[~fitted], alone.column_scores(X[~fitted]), atol=1e-4)
    chosen = search.fit(CANDIDATES[1] | {"temperature": 2.0})
    whole = head_of(name, **EVERYTHING, **CANDIDATES[1], temperature=2.0).fit(X, y, views=views)
    np.testing.assert_allclose(chosen.predict_proba(X), whole.predict_proba(X), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_candidates_that_do_not_fit_in_memory_together_are_the_same_apart(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = blobs()
    fold = uneven_folds(len(y))
    search = head_of(name).start_search(X, y, fold=fold, n_folds=3, searched=("lr", "weight_decay"))
    together = list(search.scores(CANDIDATES))
    monkeypatch.setattr(trained, "STACK_VALUES", 1)
    for one, other in zip(together, search.scores(CANDIDATES), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_path_of_candidates_is_the_single_fits(name: str) -> None:
    X, y = blobs(300)
    for candidates in (CANDIDATES, [{"epochs": 1}, {"label_smoothing": 0.3}]):
        for values, head in zip(candidates, head_of(name).fit_path(X, y, candidates=candidates), strict=True):
            alone = head_of(name, **values).fit(X, y)
            np.testing.assert_allclose(head.column_scores(X), alone.column_scores(X), atol=1e-5)
            assert head.get_params() == alone.get_params()


@pytest.mark.parametrize("name", NAMES)
def test_a_fold_that_lacks_a_class_is_left_to_fits_fold_by_fold(name: str) -> None:
    X, y = blobs(90)
    y[:3], y[3:] = 2, y[3:] % 2
    fold = np.where(np.arange(90) < 3, 0, np.arange(90) % 3)
    assert head_of(name).start_search(X, y, fold=fold, n_folds=3, searched=("lr",)) is None
    assert head_of(name).start_search(X, y, fold=np.arange(90) % 3, n_folds=3, searched=("epochs",)) is None


@pytest.mark.parametrize("name", NAMES)
def test_selection_searches_learning_rate_and_decay_and_repeats_itself(name: str) -> None:
    X, y = blobs(150)
    digests = np.random.default_rng(0).integers(0, 256, size=(len(y), 32), dtype=np.uint8)
    rows = TrainingRows(X=X, y=y.astype(np.int64), folds=make_folds(digests, y.astype(np.int64), seed=0))
    found = [select(name, HEADS[name], SMALL[name], rows=rows, seed=0) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0].best is not None
    assert set(found[0].best.values) == {"lr", "weight_decay"}
    assert found[0].best.nll == min(candidate.nll for candidate in found[0].candidates)
    given = select(name, HEADS[name], {**SMALL[name], "lr": 1e-3}, rows=rows, seed=0)
    assert {tuple(candidate.values) for candidate in given.candidates} == {("weight_decay",)}


def shaken(n: int, *, seed: int) -> tuple[Any, Any, list[Any]]:
    """X, y and views: the first feature tells most of the class in X and nothing in the views."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    X = rng.normal(size=(n, 3)).astype(np.float32)
    X[:, 1:] += 0.7 * (2 * y - 1)[:, None]
    views = []
    for _ in range(4):
        view = X.copy()
        view[:, 0] = rng.normal(scale=6, size=n)
        views.append(view)
    X[:, 0] += 6 * (2 * y - 1)
    return X, y, views


@pytest.mark.parametrize("name", NAMES)
def test_views_teach_what_the_plain_vectors_do_not(name: str) -> None:
    X, y, views = shaken(600, seed=0)
    unseen, labels, _ = shaken(400, seed=1)
    unseen[:, 0] *= -1  # what an augmentation may change may be otherwise in a new image
    params = {"lr": 3e-2, "epochs": 60}
    assert head_of(name, **params).fit(X, y).score(unseen, labels) < 0.5
    assert head_of(name, **params).fit(X, y, views=views).score(unseen, labels) > 0.75


def test_every_epoch_draws_a_view_of_each_row_and_the_plain_one_is_among_them() -> None:
    walk = Walk(parts=[np.arange(300), np.arange(20)], epochs=8, seed=0, n_views=3)
    seen = np.zeros((2, 300, 3), dtype=int)
    for step in walk.steps():
        for f in range(2):
            used = step.used[f]
            np.add.at(seen[f], (step.index[f][used], step.view[f][used]), 1)
    assert (seen[0].sum(axis=1) == 8).all()
    assert (seen[1, :20].sum(axis=1) == 8).all()
    assert not seen[1, 20:].any()
    assert (seen[0].sum(axis=0) > 700).all()


def test_rows_kept_on_a_device_are_those_read_where_they_are() -> None:
    X, _ = blobs(40)
    arrays, device = [X, X + 1], torch.device("cpu")
    index, view = np.array([[3, 7, 7], [39, 0, 1]]), np.array([[0, 1, 0], [1, 1, 0]])
    rows = Rows(arrays, [Standardizer.of(X), Standardizer.of(X[:20])], device)
    read = rows.take(index, view)
    rows.table = torch.from_numpy(np.stack(arrays))  # as a CUDA device with room for them keeps them
    assert torch.equal(rows.take(index, view), read)
    expected = [Standardizer.of(part).apply((X + v)[i]) for part, i, v in ((X, 7, 1), (X[:20], 39, 1))]
    np.testing.assert_allclose(read[[0, 1], [1, 0]], expected, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_everything_and_nothing_global_is_touched(name: str) -> None:
    torch.set_num_threads(3)
    X, y = blobs()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second, other = (head_of(name, seed=seed, mixup=0.3).fit(X, y) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.column_scores(X), second.column_scores(X))
    assert not np.array_equal(first.column_scores(X), other.column_scores(X))
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])
    assert torch.get_num_threads() == 3


def test_the_first_weights_of_the_mlp_follow_the_seed() -> None:
    X, y = blobs(100)  # one step an epoch, so that the order of the rows says nothing
    first, second, other = (MLPHead(epochs=1, dropout=0.0, seed=seed).fit(X, y).hidden_ for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - other).max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_the_batch_size_decides_memory_and_not_the_result(name: str) -> None:
    X, y = blobs()
    small, large = (head_of(name, batch_size=size, mixup=0.3).fit(X, y) for size in (30, 512))
    np.testing.assert_allclose(small.column_scores(X), large.column_scores(X), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_float64_features_far_from_zero_keep_their_differences(name: str) -> None:
    X, y = blobs(200)
    X = X.astype(np.float64)
    near, far = head_of(name).fit(X, y), head_of(name).fit(X + 1e7, y)
    np.testing.assert_allclose(near.column_scores(X), far.column_scores(X + 1e7), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_scores_shift_by_just_the_log_odds_asked_for(name: str) -> None:
    X, y = blobs(100)
    head = head_of(name, temperature=3.0).fit(X, y)
    before, offsets = np.log(head.predict_proba(X)), np.array([0.5, -1.0, 2.0])
    head.shift_scores(offsets)
    moved = np.log(head.predict_proba(X)) - before
    np.testing.assert_allclose(moved - moved[:, :1], np.tile(offsets - offsets[0], (len(X), 1)), atol=1e-9)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing is a number below 1"),
        ({"mixup": -1}, "mixup is a number of at least 0"),
        ({"class_weight": "even"}, "class_weight is 'balanced'"),
        ({"device": "abacus"}, "device is auto, cpu or cuda, not 'abacus'"),
        ({"device": "meta"}, "device is auto, cpu or cuda"),
        ({"lr": 1e38, "weight_decay": 1e30, "epochs": 10}, "diverged at lr = 1e\\+38; take a smaller one"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_trained_is_refused_in_a_line(name: str, params: Any, words: str) -> None:
    X, y = blobs(60)
    with pytest.raises(ValueError, match=words):
        head_of(name, **params).fit(X, y)


def test_parameters_of_the_mlp_alone_are_checked() -> None:
    X, y = blobs(60)
    with pytest.raises(ValueError, match="width is a whole number"):
        MLPHead(width=0).fit(X, y)
    with pytest.raises(ValueError, match="dropout is a number below 1"):
        MLPHead(dropout=1.0).fit(X, y)


def test_a_view_of_other_rows_is_refused() -> None:
    X, y = blobs(60)
    with pytest.raises(ValueError, match=r"a view has shape \(59, 9\), but the rows it shows have \(60, 9\)"):
        MinibatchHead().fit(X, y, views=[X[1:]])


def test_a_view_that_is_not_finite_is_not_taken_for_a_training_that_diverged() -> None:
    X, y = blobs(60)
    view = np.where(np.arange(60)[:, None] == 7, np.nan, X).astype(np.float32)
    with pytest.raises(ValueError, match="a view holds values that are not finite"):
        MinibatchHead().fit(X, y, views=[view])


def test_a_candidate_that_diverges_loses_the_search() -> None:
    X, y = blobs(120)
    search = head_of("linear", epochs=10).start_search(
        X, y, fold=np.arange(120) % 3, n_folds=3, searched=("lr", "weight_decay")
    )
    wild, tame = search.scores([{"lr": 1e38, "weight_decay": 1e30}, {"lr": 1e-2, "weight_decay": 0.1}])
    assert not wild.any()
    assert np.isfinite(tame).all()
    assert tame.any()


def test_when_one_part_fails_the_others_stop() -> None:
    stopped = []

    def work(part: Part, stop: Event) -> None:
        if part.sets.start:
            raise RuntimeError("as from torch")
        stopped.append(stop.wait(timeout=20))

    with pytest.raises(RuntimeError, match="as from torch"):
        side_by_side(work, [Part(range(f, f + 1), range(1)) for f in range(2)])
    assert all(stopped)


def test_a_fitted_mlp_predicts_without_torch() -> None:
    code = (
        "import sys, numpy as np; from featcache.heads.mlp import MLPHead; "
        "e, z = np.eye(4), np.zeros(4); "
        "a = {'hidden': e, 'hidden_bias': z, 'output': e, 'output_bias': z}; "
        "h = MLPHead.from_arrays(a, {}, params={}); assert h.predict(np.eye(4)).tolist() == [0, 1, 2, 3]; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
