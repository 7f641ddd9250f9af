"""Which nodes are put together: chosen on the training rows, by a judge that is ridge regression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gaussians import PROVENANCE, gaussian_features
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from featcache.commands.fit import fit
from featcache.errors import HeadError
from featcache.evaluate.nodes import PENALTIES, _Judge, choice_seconds, choose_nodes, rows_within
from featcache.evaluate.splits import Folds
from featcache.fitting import nodes as nodes_module
from featcache.fitting.rows import choose_rows
from featcache.heads.ridge import RidgeHead
from featcache.model import Model
from featcache.progress import SilentProgress
from featcache.records import NO_FILE, ImageRecord, RowStatus
from featcache.spec import FeatureNode
from featcache.store.creating import create_store
from featcache.store.features import FeatureSet
from featcache.store.layout import SOURCE_DTYPE, RowTable
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter


def write_nodes(path: Path, features: FeatureSet, columns: Mapping[str, Any]) -> Path:
    """A store whose nodes are some of the columns of `features` each."""
    nodes = tuple(FeatureNode(name=name, num_features=len(taken)) for name, taken in columns.items())
    spec = replace(features.spec, nodes=nodes)
    records = tuple(
        ImageRecord(path=name, stat=NO_FILE, label=features.classes[label], split=split or None)
        for name, label, split in zip(
            features.ids, features.y.tolist(), features.splits.tolist(), strict=True
        )
    )
    n = len(features)
    table = RowTable.from_records(records, features.classes)
    create_store(path, spec=spec, table=table, provenance=PROVENANCE, block_rows=n)
    sources = np.zeros(n, SOURCE_DTYPE)
    sources["sha256"] = features.sha256
    with StoreWriter(FeatureStore.open(path, check=False).layout) as writer:
        vectors = {node.key: features.X[:, columns[node.name]] for node in nodes}
        status = np.full(n, RowStatus.OK, dtype=np.uint8)
        writer.write_block(0, features=vectors, row_status=status, sources=sources)
    return path


def three_parts(n: int = 300, *, seed: int = 0) -> tuple[dict[str, Any], Any, Folds]:
    """Node b tells classes 0 and 1 apart, node c tells 2 from the others, node a nothing."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    parts = {
        "a": rng.normal(size=(n, 6)),
        "b": rng.normal(size=(n, 4)) + 2.5 * np.array([-1, 1, 0])[y, None],
        "c": rng.normal(size=(n, 3)) + 2.5 * np.array([0, 0, 1])[y, None],
    }
    fold = rng.permutation(n) % 3
    return parts, y, Folds(fold=fold, n_folds=3)


def test_nodes_that_add_something_are_taken_and_others_are_not() -> None:
    parts, y, folds = three_parts()
    choice = choose_nodes(parts, y, folds)
    assert set(choice.nodes) == {"b", "c"}
    assert choice.refused is not None
    assert choice.refused.nodes == (*choice.nodes, "a")
    assert choice.steps[-1].nll < choice.steps[0].nll
    assert choice.steps[0].num_features == len(parts[choice.nodes[0]][0])
    assert choice == choose_nodes(parts, y, folds)


@pytest.mark.parametrize("n", [300, 12])
def test_the_judge_is_ridge_regression_without_the_fold(n: int) -> None:
    parts, y, folds = three_parts(n)
    judge = _Judge(parts, y, folds)
    penalty = PENALTIES[2]
    scores = judge._scores(("b",), ("a", "c"), penalty)
    Z = {key: StandardScaler().fit_transform(X) for key, X in parts.items()}  # on all rows, as the judge
    sign = np.where(y[:, None] == np.arange(3), 1.0, -1.0)
    for key, found in scores.items():
        both = np.concatenate([Z["b"], Z[key]], axis=1)
        for fold in range(3):
            held = folds.fold == fold
            theirs = Ridge(alpha=penalty * (~held).sum()).fit(both[~held], sign[~held])
            np.testing.assert_allclose(found[held], theirs.predict(both[held]), atol=2e-4)


def test_a_node_wider_than_there_are_rows_is_judged_on_axes_of_its_own() -> None:
    rng = np.random.default_rng(0)
    y, fold = np.arange(40) % 2, np.arange(40) // 2 % 3
    X = rng.normal(size=(40, 200)) + 0.5 * y[:, None]
    judge = _Judge({"wide": X}, y, Folds(fold=fold, n_folds=3))
    assert judge.Z[0].shape[1] == 39
    found = judge._scores((), ("wide",), 0.1)["wide"]
    held = fold == 0
    Z = StandardScaler().fit_transform(X)
    head = Ridge(alpha=0.1 * (~held).sum()).fit(Z[~held], np.where(y[~held, None] == [0, 1], 1.0, -1.0))
    np.testing.assert_allclose(found[held], head.predict(Z[held]), atol=2e-4)


def test_of_many_rows_the_training_rows_are_told_by_their_numbers() -> None:
    parts, y, folds = three_parts()
    rows = np.sort(np.random.default_rng(1).permutation(1000)[:300])
    among = {key: np.full((1000, X.shape[1]), np.nan) for key, X in parts.items()}
    for key, X in parts.items():
        among[key][rows] = X
    assert choose_nodes(among, y, folds, rows=rows) == choose_nodes(parts, y, folds)
    assert choose_nodes(parts, y, folds, most=120).n_rows == 120


def test_less_time_judges_nodes_by_fewer_rows() -> None:
    widths = [1280, 320, 112]
    seconds = choice_seconds(widths, n=20_000, k=10)
    assert rows_within(seconds, widths, n=10**6, k=10) == 20_000
    fewer = rows_within(0.9 * seconds, widths, n=10**6, k=10)
    assert 2_000 < fewer < 20_000
    assert choice_seconds(widths, n=fewer, k=10) <= 0.9 * seconds
    assert rows_within(1e-9, widths, n=10**6, k=10) == 2_000
    assert rows_within(1e-9, widths, n=300, k=10) == 300
    assert rows_within(1e9, widths, n=10**6, k=5000) == 2_000  # rows x classes are bounded as well
    # Wider nodes than there are rows are turned onto as many axes.
    assert choice_seconds([50_000], n=100, k=2) == choice_seconds([100], n=100, k=2)


def test_without_folds_nodes_cannot_be_compared() -> None:
    parts, y, _ = three_parts()
    with pytest.raises(ValueError, match="no row could be held out"):
        choose_nodes(parts, y, Folds(fold=np.full(300, -1), n_folds=0))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    features = gaussian_features({"train": 240, "test": 60}, k=4, d=9, gap=2.5)
    columns = {"first": [0, 4, 5], "second": [1, 2, 3], "noise": [6, 7, 8]}
    return write_nodes(tmp_path / "s.h5", features, columns)


def test_nodes_of_a_store_are_chosen_named_or_all_and_the_model_remembers_them(store: Path) -> None:
    chosen = fit(store, head="ridge", nodes="auto", curve=False)
    assert set(chosen.nodes) == {"first", "second"}
    assert chosen.node_choice is not None
    assert chosen.num_features == 6
    assert (
        "nodes chosen by ridge regression in 3-fold cross-validation on 240 training rows"
        in chosen.describe()
    )
    model = Model.load(store.with_suffix(".model"))
    assert tuple(node.key for node in model.nodes) == chosen.nodes
    everything = fit(store, head="ridge", nodes="all", curve=False)
    assert everything.nodes == ("first", "second", "noise")
    named = fit(store, head="ridge", node=["second", "first", "second"], curve=False)
    assert named.nodes == ("second", "first")
    assert named.metrics.accuracy == pytest.approx(chosen.metrics.accuracy, abs=0.05)
    one = fit(store, head="ridge", curve=False)
    assert (one.nodes, one.other_nodes) == (("first",), ("second", "noise"))
    assert chosen.metrics.accuracy > one.metrics.accuracy + 0.1


def test_the_budget_covers_the_choice_of_nodes(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Progress(SilentProgress):
        def note(self, message: str) -> None:
            said.append(message)

    monkeypatch.setattr(nodes_module, "choice_seconds", lambda *_, **__: 45.0)
    result = fit(store, nodes="auto", budget=45.0, curve=False, progress=Progress())
    assert said == ["choosing among 3 nodes by 240 rows takes about 45 s, of the 45 s of --budget"]
    assert result.competition is not None
    assert [one.head for one in result.competition.contenders] == ["ncm"]  # one is tried whatever is left
    why = {one.head: one.why for one in result.competition.left_out}
    assert why["ridge"] == "the 45 s of --budget were spent"
    enough = fit(store, nodes="auto", budget=400.0, curve=False)
    assert enough.competition is not None
    assert len(enough.competition.contenders) > 3


def test_a_store_of_one_node_has_nothing_to_choose(tmp_path: Path) -> None:
    path = write_nodes(tmp_path / "s.h5", gaussian_features(), {"only": [0, 1, 2, 3, 4]})
    result = fit(path, head="ncm", nodes="auto")
    assert (result.nodes, result.node_choice) == (("only",), None)


def test_nodes_are_named_or_chosen_not_both(store: Path) -> None:
    with pytest.raises(HeadError, match="nodes are named, or auto"):
        fit(store, node="first", nodes="auto")
    with pytest.raises(HeadError, match="'auto' or 'all', not 'some'"):
        fit(store, nodes="some")


def test_the_nodes_that_are_chosen_do_not_depend_on_the_rows_that_are_scored(tmp_path: Path) -> None:
    features = gaussian_features({"train": 240, "test": 60}, k=4, d=9, gap=1)
    columns = {"first": [0, 4, 5], "second": [1, 2, 3], "noise": [6, 7, 8]}
    X = features.X.copy()
    X[240:] = np.random.default_rng(0).normal(size=(60, 9)) * 50
    paths = [
        write_nodes(tmp_path / f"{i}.h5", replace(features, X=values), columns)
        for i, values in enumerate((features.X, X))
    ]
    first, second = (fit(path, head="ncm", nodes="auto") for path in paths)
    assert first.node_choice == second.node_choice


def test_the_best_of_many_nodes_on_random_labels_is_at_chance(tmp_path: Path) -> None:
    """Trap: a score that was chosen by. Picked by their score, the same nodes are far above chance."""
    right, best_right, total = 0.0, 0.0, 0
    columns = {f"n{i}": list(range(3 * i, 3 * i + 3)) for i in range(60)}
    for seed in range(4):
        features = gaussian_features({"": 450}, k=3, d=180, gap=0, seed=seed)
        features = replace(features, y=np.random.default_rng(50 + seed).integers(0, 3, size=450))
        path = write_nodes(tmp_path / f"{seed}.h5", features, columns)
        result = fit(path, nodes="auto", curve=False)
        assert result.node_choice is not None
        n = result.metrics.n
        right, total = right + result.metrics.accuracy * n, total + n
        best_right += best_on_test(features, columns) * n
    bound = 3 * (2 / 9 / total) ** 0.5  # three standard deviations of a binomial with p = 1/3
    assert abs(right / total - 1 / 3) < bound
    assert best_right / total - 1 / 3 > bound


def best_on_test(features: FeatureSet, columns: Mapping[str, list[int]]) -> float:
    rows = choose_rows(features)
    hits = [
        RidgeHead().fit(features.X[rows.train][:, taken], features.y[rows.train]).score(
            features.X[rows.test][:, taken], features.y[rows.test]
        )
        for taken in columns.values()
    ]  # fmt: skip
    return float(max(hits))


def test_the_nodes_of_many_rows_do_not_hang_on_the_order_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(40_000) % 2
    parts = {
        "noise": rng.normal(size=(len(y), 2)).astype(np.float32),
        "told": (rng.normal(size=(len(y), 2)) + 2.0 * y[:, None]).astype(np.float32),
    }
    choice = choose_nodes(parts, y, Folds(fold=rng.integers(0, 3, size=len(y)), n_folds=3))
    assert choice.nodes == ("told",)
    assert choice.n_rows == 20_000
    assert choice.steps[0].accuracy == pytest.approx(0.921, abs=0.01)  # of the normal, at the root of 2


def test_a_small_fold_is_never_left_out_of_many_rows() -> None:
    fold = np.r_[np.zeros(30_000, dtype=np.int64), 1]
    y = np.arange(len(fold)) % 2
    judge = _Judge({"a": np.random.default_rng(0).normal(size=(len(y), 1))}, y, Folds(fold=fold, n_folds=2))
    assert (judge.n_folds, len(judge.held[1])) == (2, 1)


def test_the_judge_weights_rows_as_ridge_regression_does() -> None:
    parts, y, folds = three_parts()
    weights = np.array([0.2, 1.0, 5.0])[y]
    judge = _Judge(parts, y, folds, weights)
    scores = judge._scores(("b",), ("a",), PENALTIES[3])["a"]
    both = np.concatenate([StandardScaler().fit_transform(parts[key]) for key in ("b", "a")], axis=1)
    sign = np.where(y[:, None] == np.arange(3), 1.0, -1.0)
    weights /= weights.mean()
    for fold in range(3):
        held = folds.fold == fold
        theirs = Ridge(alpha=PENALTIES[3] * weights[~held].sum())
        theirs.fit(both[~held], sign[~held], sample_weight=weights[~held])
        np.testing.assert_allclose(scores[held], theirs.predict(both[held]), atol=2e-4)


@pytest.mark.parametrize("given", [{"class_weight": "balanced"}, {"params": {"class_weight": "balanced"}}])
def test_with_class_weights_nodes_are_chosen_by_what_counts_every_class_alike(
    tmp_path: Path, given: Any
) -> None:
    features = gaussian_features({"train": 400, "test": 60}, k=2, d=4, gap=0)
    rare = np.arange(len(features)) % 10 == 0
    X = features.X.copy()
    X[:, 0] += 1.5 * rare
    features = replace(features, X=X, y=rare.astype(np.int64))
    path = write_nodes(tmp_path / "s.h5", features, {"first": [0, 1], "second": [2, 3]})
    plain = fit(path, head="ridge", nodes="auto", curve=False).node_choice
    even = fit(path, head="ridge", nodes="auto", curve=False, **given).node_choice
    assert plain is not None
    assert even is not None
    assert plain.steps[0].accuracy > 0.88  # of calling all of them the common class
    assert even.steps[0].accuracy < 0.85
