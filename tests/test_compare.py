"""`compare`: the same images in every store, ranked without the rows scored, differences told for sure."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gaussians import PROVENANCE, gaussian_features, take, write_store

from featcache.cli import main
from featcache.commands import compare as module
from featcache.commands.compare import CompareResult, compare
from featcache.commands.fit import fit
from featcache.errors import HeadError, StoreError
from featcache.evaluate.comparison import Difference, Pair, take_cheapest
from featcache.fitting.wishes import Wishes
from featcache.joining import join_rows
from featcache.records import NO_FILE, ImageRecord, RowStatus
from featcache.spec import FeatureNode
from featcache.store.creating import create_store
from featcache.store.features import FeatureSet
from featcache.store.layout import SOURCE_DTYPE, RowTable
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter

SPLITS = {"train": 120, "test": 300}
HEADS = ("ncm", "ridge")


def noisy(features: FeatureSet, *, sd: float, seed: int = 5) -> FeatureSet:
    """The same images by a worse backbone: normal noise on every feature."""
    noise = np.random.default_rng(seed).normal(size=features.X.shape) * sd
    return replace(
        features,
        X=(features.X + noise).astype(np.float32),
        spec=replace(features.spec, backbone="toy:worse"),
    )


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    return lambda name, features: write_store(tmp_path / f"{name}.h5", features)


@pytest.fixture
def good() -> FeatureSet:
    features = gaussian_features(SPLITS, gap=3)
    return replace(features, spec=replace(features.spec, backbone="toy:good"))


def run(*stores: Path, **options: Any) -> CompareResult:
    return compare(stores, **{"heads": ("ncm",), **options})


def invoke(*args: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, args)])


def test_a_better_backbone_wins_and_a_candidate_is_scored_as_fit_scores_it(
    save: Callable[..., Path], good: FeatureSet, tmp_path: Path
) -> None:
    worse, better = save("worse", noisy(good, sd=3)), save("better", good)
    result = run(worse, better)
    assert [c.name for c in result.candidates] == ["better", "worse"]
    (pair,) = result.pairs
    assert (pair.best, pair.other, pair.test.verdict) == ("better", "worse", "beats")
    for candidate, path in zip(result.candidates, (better, worse), strict=True):
        alone = fit(path, tmp_path / "m.model", head="ncm")
        assert candidate.test == alone.metrics
        assert candidate.params == alone.params
        assert candidate.cv == alone.cross_validated
    first, second = (c.test.accuracy for c in result.candidates)
    assert pair.test.points == pytest.approx(100 * (first - second))
    assert pair.cv is not None
    assert pair.cv.verdict == "beats"


def test_the_order_of_rows_and_other_names_do_not_matter(save: Callable[..., Path], good: FeatureSet) -> None:
    order = np.random.default_rng(0).permutation(len(good))
    moved = take(good, order)
    moved = replace(moved, ids=tuple(sorted(f"x{i}.png" for i in range(len(good)))))
    result = run(save("a", good), save("b", moved))
    assert result.left_out == {str(c.store): 0 for c in result.candidates}
    one, other = result.candidates
    assert one.test == replace(other.test, confused=one.test.confused)
    (pair,) = result.pairs
    assert (pair.test.points, pair.test.verdict) == (0, "is tied with")
    assert 0.5 < pair.test.ci95[1] == -pair.test.ci95[0] < 0.8  # of 300 rows


def test_rows_that_not_every_store_has_are_left_out_and_counted(
    save: Callable[..., Path], good: FeatureSet
) -> None:
    a, b, c = save("a", good), save("b", take(good, slice(4, None))), save("c", take(good, slice(0, -6)))
    result = run(a, b, c)
    assert list(result.left_out.values()) == [10, 6, 4]
    assert (result.n_train, result.candidates[0].test.n) == (116, 294)
    assert f"10 rows of {a} not in every store, and left out" in result.describe()


def test_an_image_that_is_there_several_times_is_joined_as_often_as_all_have_it(good: FeatureSet) -> None:
    sha = good.sha256.copy()
    sha[1] = sha[2] = sha[0]
    twice, thrice = take(replace(good, sha256=sha), [0, 1, 3]), take(replace(good, sha256=sha), [0, 1, 2, 3])
    same = np.zeros(4, dtype=np.int64)
    shared = join_rows([replace(twice, y=same[:3]), replace(thrice, y=same)], ["a", "b"])
    assert [rows.tolist() for rows in shared.rows] == [[0, 1, 2], [0, 1, 3]]
    assert shared.left_out == (0, 1)


def test_copies_of_an_image_do_not_make_a_difference_surer(
    save: Callable[..., Path], good: FeatureSet
) -> None:
    def copied(features: FeatureSet) -> FeatureSet:
        more = take(features, [*range(420), *range(120, 420), *range(120, 420)])
        return replace(more, ids=tuple(f"{i:05d}.png" for i in range(1020)))

    worse = noisy(good, sd=1)
    (once,) = run(save("a", good), save("b", worse)).pairs
    (thrice,) = run(save("a3", copied(good)), save("b3", copied(worse))).pairs
    assert thrice.test.points == pytest.approx(once.test.points)
    assert thrice.test.ci95 == pytest.approx(once.test.ci95)


def test_groups_stay_together_and_count_once(save: Callable[..., Path], good: FeatureSet) -> None:
    """Without splits, 42 folders of ten images of one class: what is scored is whole folders."""
    series = np.arange(420) // 10
    y = series % 3
    ids = tuple(f"{folder:02d}/{row:05d}.png" for row, folder in enumerate(series))
    by_class = np.argsort(good.y, kind="stable")[np.argsort(np.argsort(y, kind="stable"))]
    grouped = replace(good, X=good.X[by_class], y=y, ids=ids)
    grouped = replace(grouped, splits=np.full(420, ""))
    a, b = save("a", grouped), save("b", noisy(grouped, sd=1))
    result = run(a, b, group_by="folder")
    m = result.candidates[0].test
    assert m.n == 10 * m.n_units
    assert m.accuracy > 0.8
    assert "groups of folder" in result.scored_on
    assert run(a, b).candidates[0].test.n_units > 42
    assert invoke(a, b, "--head", "ncm", "--group-by", "folder", "--quiet").exit_code == 0


def test_an_unknown_head_is_refused_before_any_is_fitted(
    save: Callable[..., Path], good: FeatureSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "fit_features", lambda *_, **__: pytest.fail("a head was fitted"))
    with pytest.raises(HeadError, match="Did you mean ridge"):
        run(save("a", good), heads=("ncm", "ridg"))
    for name, words in (("GaussianProcessClassifier", "may not contain"), ("SVCC", "Did you mean SVC")):
        with pytest.raises(HeadError, match=words):
            run(save("a", good), heads=("ncm", f"sklearn:{name}"))


def test_stores_that_cannot_be_compared_are_refused_in_one_line(
    save: Callable[..., Path], good: FeatureSet
) -> None:
    a = save("a", good)
    other_classes = replace(good, classes=("class0", "class2", "class1"))
    other_splits = replace(good, splits=np.where(good.splits == "train", "val", good.splits))
    others = gaussian_features(SPLITS, seed=1)
    for name, features, words in (
        (
            "classes",
            other_classes,
            "disagree on the class of 280 of 420 images; 00001.png is in class1 and class2",
        ),
        ("splits", other_splits, "disagree on the split of 120 of 420 images; 00000.png is in train and val"),
        ("images", others, "no image is in all of"),
    ):
        b = save(name, features)
        with pytest.raises(StoreError, match=words) as caught:
            run(a, b)
        assert "\n" not in str(caught.value)
        ran = invoke(a, b, "--head", "ncm", "--quiet")
        assert ran.exit_code == 1
        assert words in ran.output
    with pytest.raises(StoreError, match="nothing to compare with: name another store"):
        run(a, a)
    with pytest.raises(
        StoreError, match=r"no store has 'layer9'; there are penultimate, joined by \+, and all"
    ):
        run(a, nodes=["layer9"])


def test_other_names_of_the_same_classes_in_another_order_are_no_disagreement(
    save: Callable[..., Path], good: FeatureSet
) -> None:
    turned = replace(good, classes=good.classes[::-1], y=2 - good.y)
    one, other = run(save("a", good), save("b", turned)).candidates
    assert one.test.accuracy == other.test.accuracy > 0.8
    assert one.test.per_class == other.test.per_class


def test_heads_compete_on_one_store(save: Callable[..., Path], good: FeatureSet) -> None:
    result = run(save("a", good), heads=("ncm", "knn", "ncm"))
    assert {c.name for c in result.candidates} == {"ncm", "knn"}
    assert {c.head for c in result.candidates} == {"ncm", "knn"}


def test_nodes_compete_alone_and_together(tmp_path: Path, good: FeatureSet) -> None:
    store = two_nodes(tmp_path / "two.h5", good)
    result = run(store, nodes=["useless", "penultimate", "penultimate+useless", "all"])
    named = {c.name: c for c in result.candidates}
    assert set(named) == {"useless", "penultimate", "all"}  # the last two are the same set of nodes
    assert result.candidates[-1].name == "useless"
    assert named["all"].num_features == 7
    assert named["all"].nodes == ("penultimate", "useless")
    assert abs(named["useless"].test.accuracy - 1 / 3) < 0.15


def test_the_order_in_which_nodes_are_named_makes_no_other_set(tmp_path: Path, good: FeatureSet) -> None:
    store = two_nodes(tmp_path / "two.h5", good)
    result = run(store, nodes=["penultimate", "penultimate+useless", "useless+penultimate"])
    assert {frozenset(c.nodes) for c in result.candidates} == {
        frozenset({"penultimate"}),
        frozenset({"penultimate", "useless"}),
    }
    assert len(result.candidates) == 2


def two_nodes(path: Path, features: FeatureSet) -> Path:
    """A store with the features and a node of noise beside them."""
    useless = FeatureNode(name="useless", num_features=2)
    spec = replace(features.spec, nodes=(*features.nodes, useless))
    records = tuple(
        ImageRecord(path=name, stat=NO_FILE, label=features.classes[label], split=split)
        for name, label, split in zip(features.ids, features.y, features.splits.tolist(), strict=True)
    )
    n = len(features)
    table = RowTable.from_records(records, features.classes)
    create_store(path, spec=spec, table=table, provenance=PROVENANCE, block_rows=n)
    sources = np.zeros(n, SOURCE_DTYPE)
    sources["sha256"] = features.sha256
    noise = np.random.default_rng(3).normal(size=(n, 2)).astype(np.float32)
    with StoreWriter(FeatureStore.open(path, check=False).layout) as writer:
        writer.write_block(
            0,
            features={"penultimate": features.X, "useless": noise},
            row_status=np.full(n, RowStatus.OK, dtype=np.uint8),
            sources=sources,
        )
    return path


def test_a_store_without_the_nodes_takes_part_with_its_first(
    tmp_path: Path, save: Callable[..., Path], good: FeatureSet
) -> None:
    plain, both = save("plain", good), two_nodes(tmp_path / "two.h5", good)
    result = run(plain, both, nodes=["useless"])
    assert {(Path(c.store).stem, c.nodes) for c in result.candidates} == {
        ("plain", ("penultimate",)),
        ("two", ("useless",)),
    }


def test_the_ranking_does_not_depend_on_the_rows_scored(save: Callable[..., Path], good: FeatureSet) -> None:
    test = good.splits == "test"
    X = np.where(test[:, None], np.random.default_rng(1).normal(size=good.X.shape), good.X)
    worse = noisy(good, sd=1.5)
    spoilt = run(save("a", replace(good, X=X.astype(np.float32))), save("b", worse))
    assert [c.name for c in spoilt.candidates] == ["a", "b"]
    (pair,) = spoilt.pairs
    assert pair.test.verdict == "is beaten by"
    assert pair.cv is not None
    assert pair.cv.verdict == "beats"
    assert spoilt.take is not None
    assert (spoilt.cheapest, spoilt.take.name) == (None, "a")
    assert "Beyond chance, b did better on the rows scored" in spoilt.take.why


def test_what_to_take_does_not_depend_on_the_rows_scored(save: Callable[..., Path], good: FeatureSet) -> None:
    """Two that are tied in cross-validation: the cheaper one is taken, whatever the test rows say of it."""
    test = good.splits == "test"
    X = np.where(test[:, None], np.random.default_rng(1).normal(size=good.X.shape), good.X)
    narrow = replace(good, X=X.astype(np.float32))
    wide = widened(good)
    result = run(save("wide", wide), save("narrow", narrow))
    assert result.pairs[0].test.verdict == "beats"
    assert result.take is not None
    assert result.take.name == "narrow"
    assert "Beyond chance, wide did better on the rows scored" in result.take.why


def difference(points: float, se: float) -> Difference:
    return Difference(points=points, ci95=(points - 2.5 * se, points + 2.5 * se), se=se)


@pytest.mark.parametrize(
    ("cv", "costs", "taken", "words"),
    [
        ([(0.9, 1.0)], [2.0, 1.0], 1, "cheaper: 1 ms an image, not 2 ms an image"),
        (
            [(1.1, 1.0)],
            [2.0, 1.0],
            0,
            "the most accurate in cross-validation, though c1 may be as good",
        ),
        ([(3.0, 1.0)], [2.0, 1.0], 0, "the most accurate in cross-validation, beyond chance"),
        ([(0.9, 1.0)], [2.0, 1.9], 0, "the most accurate"),  # about the same
        ([(0.9, 1.0)], [2.0, None], 0, "the most accurate"),
        ([(0.5, 1.0), (0.9, 1.0), (2.0, 1.0)], [4.0, 3.0, 2.0, 1.0], 2, "2 ms an image, not 4 ms"),
    ],
)
def test_the_cheapest_within_one_standard_error_of_the_most_accurate_is_taken(
    cv: list[tuple[float, float]], costs: list[float | None], taken: int, words: str
) -> None:
    pairs = [
        Pair(best="c0", other=f"c{i}", test=difference(0, 1), cv=difference(*one))
        for i, one in enumerate(cv, start=1)
    ]
    found, why = take_cheapest(pairs, [{"ms_per_image": cost} for cost in costs])
    assert found == taken
    assert words in why


def test_a_head_that_augmented_views_help_gets_them_as_in_fit(
    save: Callable[..., Path], good: FeatureSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = FeatureStore.features

    def watch(self: Any, *args: Any, with_views: bool = False, **options: Any) -> FeatureSet:
        asked.append(with_views)
        return real(self, *args, with_views=with_views, **options)

    store = save("a", take(good, slice(90, 150)))
    monkeypatch.setattr(FeatureStore, "features", watch)
    run(store, heads=("ncm", "linear"), budget=60)
    assert asked[-2:] == [False, True]


def test_without_cross_validation_nothing_is_said_to_be_the_one_to_take(
    save: Callable[..., Path], good: FeatureSet
) -> None:
    few = take(good, [*range(3), *range(120, 420)])
    result = run(save("a", few), save("b", noisy(few, sd=6)))
    assert result.pairs[0].test.verdict == "beats"
    assert result.take is None
    assert "nothing could be held out to choose by" in result.describe().splitlines()[-1]


def widened(features: FeatureSet) -> FeatureSet:
    """With constant features, which change no distance between standardised means: right on the same rows."""
    return replace(
        features,
        X=np.concatenate([features.X, np.zeros((len(features), 3), np.float32)], axis=1),
        nodes=(node := FeatureNode(name="penultimate", num_features=8),),
        spec=replace(features.spec, nodes=(node,)),
    )


def test_what_costs_least_of_what_is_tied_is_named(save: Callable[..., Path], good: FeatureSet) -> None:
    result = run(save("wide", widened(good)), save("narrow", good))
    assert result.pairs[0].test.points == 0
    assert result.candidates[0].name == "wide"
    assert result.cheapest == "narrow"
    assert result.take is not None
    *_, said, command = result.describe().splitlines()
    assert said == (
        "take narrow: within one standard error of wide, the most accurate in cross-validation, and cheaper: "
        "5 features, not 8 features"
    )
    assert command == f"  featcache fit {result.candidates[1].store} --node penultimate --head ncm"
    assert result.to_json()["take"]["name"] == result.cheapest


def test_the_command_fits_the_one_to_take_as_it_was_fitted(
    save: Callable[..., Path], good: FeatureSet
) -> None:
    a, b = save("a", good), save("b", noisy(good, sd=6))
    result = compare([a, b], seed=3, budget=5.5, group_by="similar:0.999")
    assert result.take is not None
    chosen = result.candidates[0]
    assert result.take.command == (
        f"featcache fit {a} --node penultimate --head {chosen.head} --group-by similar:0.999 --budget 5.5 "
        "--seed 3"
    )


def test_a_shell_finds_the_store_of_the_command_whatever_it_is_called(
    save: Callable[..., Path], good: FeatureSet
) -> None:
    result = run(save("two\nlines", good), save("it's", noisy(good, sd=6)))
    assert result.take is not None
    assert "\n" not in result.take.command
    printed = result.take.command.replace("featcache fit", "printf '%s\\0'", 1)
    ran = subprocess.run(["bash", "-c", printed], capture_output=True, check=True)
    assert ran.stdout.split(b"\0")[0].decode() == result.candidates[0].store


def test_the_cost_of_an_image_is_what_the_store_recorded(
    save: Callable[..., Path], good: FeatureSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = save("a", good)
    assert {c.ms_per_image for c in run(a, heads=HEADS).candidates} == {None}
    speeds = {"toy in batches of 4": 250.0, "toy in batches of 8": 500.0}
    measured = {**PROVENANCE, "engine_choice": {"images_per_second": speeds}}
    monkeypatch.setattr("gaussians.PROVENANCE", measured)
    lite = replace(good, spec=replace(good.spec, backbone="efficientnet_lite0"))
    result = run(save("b", lite), heads=HEADS)
    assert {c.ms_per_image for c in result.candidates} == {4.0}
    assert {c.num_params for c in result.candidates} == {4_652_008}


def test_one_image_a_class_is_compared_without_cross_validation(
    save: Callable[..., Path], good: FeatureSet
) -> None:
    few = take(good, [*range(3), *range(120, 420)])
    result = run(save("a", few), save("b", noisy(few, sd=1)))
    assert [c.cv for c in result.candidates] == [None, None]
    assert result.pairs[0].cv is None
    assert "-" in result.describe()


def test_the_shell_prints_a_table_and_json(save: Callable[..., Path], good: FeatureSet) -> None:
    stores = save("good", good), save("bad", noisy(good, sd=6))
    ran = invoke(*stores, "--head", "ncm", "--head", "ridge", "--quiet")
    assert ran.exit_code == 0, ran.output
    lines = ran.output.splitlines()
    assert lines[0] == "trained on 120 rows: train; scored on 300: test"
    assert lines[2].split() == ["cross-validation", "rows", "scored"]
    assert {line.split("  ")[0] for line in lines[4:8]} == {"good ncm", "good ridge", "bad ncm", "bad ridge"}
    assert sum(line.startswith("  beats") for line in lines) == 2
    assert "ranked by accuracy in cross-validation" in lines[-3]
    assert "where fit chooses a head by its log-loss" in lines[-3]
    assert "what is picked by its score on the rows scored has a score that is too high" in lines[-3]
    assert lines[-2].startswith("take good ")
    assert lines[-1].startswith(f"  featcache fit {stores[0]} --node penultimate --head ")
    ran = invoke(*stores, "--head", "ncm", "--json")
    report = json.loads(ran.stdout)
    assert [c["name"] for c in report["candidates"]] == ["good", "bad"]
    assert report["pairs"][0]["verdict"] == "beats"
    assert set(report["candidates"][0]) == {
        "name", "store", "backbone", "nodes", "head", "params", "cv", "test", "num_features", "num_params",
        "ms_per_image", "fit_seconds", "notes",
    }  # fmt: skip
    assert report["n_test"] == report["candidates"][0]["test"]["n"] == 300


def test_the_automatic_head_is_named_by_what_it_chose(
    save: Callable[..., Path], good: FeatureSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = take(good, slice(90, 150))
    seen: list[Any] = []
    real = module.fit_features

    def watch(features: FeatureSet, wishes: Wishes, **options: Any) -> Any:
        seen.append(wishes.head)
        quick = replace(wishes, head="ncm") if wishes.head == "auto" else wishes
        return real(features, quick, **options)

    monkeypatch.setattr(module, "fit_features", watch)
    result = compare([save("a", small)], heads=("auto", "knn"))
    assert seen == ["auto", "knn"]
    assert {c.name for c in result.candidates} == {"auto: ncm", "knn"}
