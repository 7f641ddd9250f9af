"""Images that belong together stay on one side of every split that is drawn."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gaussians import gaussian_features, take, write_store

from featcache.commands.fit import fit
from featcache.errors import HeadError
from featcache.evaluate import groups as groups_module
from featcache.evaluate.groups import find_groups
from featcache.evaluate.splits import Groups, hold_out, make_folds
from featcache.fitting import Wishes, choose_rows, fit_features, outlook
from featcache.store.features import FeatureSet


def in_series(splits: dict[str, int], *, series: int = 20, k: int = 3, **options: Any) -> FeatureSet:
    """Images in folders class/series, the series going through all classes."""
    features = gaussian_features(splits, k=k, **options)
    ids = tuple(
        f"{features.classes[y]}/s{row // k % series:02d}/{row:05d}.png"
        for row, y in enumerate(features.y.tolist())
    )
    return replace(features, ids=ids)


def sides(groups: Groups, side: Any) -> list[set[Any]]:
    """For each group, on which sides its rows are."""
    return [set(np.asarray(side)[groups.index == g].tolist()) for g in range(len(groups.keys))]


def test_folders_are_counted_from_the_root_and_go_by_their_own_name() -> None:
    features = replace(
        gaussian_features({"": 4}, k=2),
        ids=("a/p1/x/1.png", "a/p2/x/2.png", "b/p1/y/3.png", "b/p1/x/4.png"),
    )
    assert find_groups("folder", features).index.tolist() == [0, 1, 3, 2]
    assert find_groups("folder:1", features).index.tolist() == [0, 0, 1, 1]
    assert find_groups("folder:2", features).index.tolist() == [0, 1, 0, 0]
    assert find_groups("folder:3", features).index.tolist() == [0, 0, 1, 0]


def test_a_column_of_a_csv_is_joined_by_path_in_any_order(tmp_path: Path) -> None:
    features = replace(gaussian_features({"": 3}), ids=("a/1.png", "a/2.png", "b/é.png"))
    table = tmp_path / "who.csv"
    table.write_text("patient,path,age\nP1,b/é.png,3\nP2,./a/2.png,4\nP1,a/1.png,5\nP9,other.png,1\n")
    assert find_groups(f"{table}:patient", features).index.tolist() == [0, 1, 0]
    assert find_groups(f"{table}:age", features).index.tolist() == [2, 1, 0]


def test_rows_of_a_csv_that_contradict_one_another_are_refused(tmp_path: Path) -> None:
    features = replace(gaussian_features({"": 3}), ids=("a/1.png", "a/2.png", "b/3.png"))
    table = tmp_path / "who.csv"
    table.write_text("path,who\na/1.png,P1\na/2.png,P1\n./a/1.png,P2\nb/3.png, P1 \nb/3.png,P1\n")
    with pytest.raises(HeadError, match=r"^1 image has several who in .*who\.csv: a/1\.png\.") as caught:
        find_groups(f"{table}:who", features)
    assert "a/2.png" not in str(caught.value)
    assert "b/3.png" not in str(caught.value)  # the same but for spaces
    with pytest.raises(HeadError, match="no column of .*who.csv is named"):
        find_groups(f"{table}:", features)


def test_a_row_without_a_label_needs_no_group_and_ties_no_others(tmp_path: Path) -> None:
    features = replace(gaussian_features({"": 4}), ids=("a/1.png", "a/2.png", "3.png", "4.png"))
    features = replace(features, y=np.array([0, 1, -1, -1]))
    table = tmp_path / "who.csv"
    table.write_text("path,who\na/1.png,P1\na/2.png,P1\n3.png,\n")
    for by in (f"{table}:who", "folder:1"):
        found = find_groups(by, features).index.tolist()
        assert found[0] == found[1]
        assert len(set(found)) == 3


def test_a_group_is_told_by_its_name_so_that_new_images_move_none() -> None:
    features = in_series({"": 300})
    groups = find_groups("folder:2", features)
    some = np.random.default_rng(0).random(300) < 0.8
    fewer = take(features, some)
    again = find_groups("folder:2", fewer)
    test = hold_out(features.sha256, features.y, groups)
    np.testing.assert_array_equal(hold_out(fewer.sha256, fewer.y, again), test[some])
    moved = replace(fewer, sha256=np.random.default_rng(3).integers(0, 256, (len(fewer), 32), dtype=np.uint8))
    np.testing.assert_array_equal(hold_out(moved.sha256, moved.y, again), test[some])


@pytest.mark.parametrize("split", ["", "train"])
def test_no_group_is_on_both_sides_of_a_split_that_is_drawn(split: str) -> None:
    features = in_series({split: 360}, series=60)
    groups = find_groups("folder:2", features)
    rows = choose_rows(features, groups)
    side = np.zeros(360)
    side[rows.test] = 1
    assert all(len(found) == 1 for found in sides(groups, side))
    assert 0.05 < side.mean() < 0.5
    assert "whole groups of folder:2" in rows.scored_on
    folds = make_folds(
        features.sha256[rows.train], features.y[rows.train], seed=0, groups=groups.take(rows.train)
    )
    assert all(len(found) == 1 for found in sides(groups.take(rows.train), folds.fold))


def test_folds_of_groups_are_balanced_in_size_and_classes() -> None:
    rng = np.random.default_rng(0)
    index = np.repeat(np.arange(60), rng.integers(1, 30, size=60))
    y = (index + (rng.random(len(index)) < 0.3)) % 3
    sha = rng.integers(0, 256, size=(len(y), 32), dtype=np.uint8)
    keys = rng.integers(0, 256, size=(60, 32), dtype=np.uint8)
    folds = make_folds(sha, y, seed=0, groups=Groups(index=index, keys=keys, by="test"))
    assert folds.n_folds == 5
    counts = np.array([np.bincount(folds.fold[y == k], minlength=5) for k in range(3)])
    assert (np.ptp(counts, axis=1) < 0.1 * counts.sum(axis=1)).all()
    assert (make_folds(sha, y, seed=1, groups=Groups(index=index, keys=keys, by="")).fold != folds.fold).any()


def test_groups_that_share_an_image_are_one() -> None:
    features = in_series({"": 300})
    sha256 = features.sha256.copy()
    sha256[5] = sha256[40]
    groups = find_groups("folder:2", replace(features, sha256=sha256))
    fold = make_folds(sha256, features.y, seed=0, groups=groups).fold
    both = np.isin(groups.index, groups.index[[5, 40]])
    assert len(set(fold[both].tolist())) == 1
    test = hold_out(sha256, features.y, groups)
    assert len(set(test[both].tolist())) == 1


def test_a_group_that_alone_has_a_class_is_always_trained_on() -> None:
    features = in_series({"": 300})
    ids = tuple(
        f"class0/only/{i}.png" if y == 0 else ids
        for i, (y, ids) in enumerate(zip(features.y, features.ids, strict=True))
    )
    features = replace(features, ids=ids)
    groups = find_groups("folder:2", features)
    rows = choose_rows(features, groups)
    assert 0 not in features.y[rows.test]
    folds = make_folds(features.sha256, features.y, seed=0, groups=groups)
    assert (folds.fold[features.y == 0] == -1).all()
    assert (folds.fold[features.y == 1] >= 0).all()


def test_where_every_class_is_one_group_nothing_can_be_held_out() -> None:
    with pytest.raises(HeadError, match="every class lies in a single group of folder:1"):
        choose_rows(in_series({"": 60}), find_groups("folder:1", in_series({"": 60})))


@pytest.mark.parametrize("by", ["folder", "folder:1"])
def test_one_group_a_class_is_refused_with_splits_of_the_data_as_well(by: str) -> None:
    features = gaussian_features({"train": 60, "test": 30})
    ids = tuple(f"{features.classes[y]}/{i}.png" for i, y in enumerate(features.y))
    features = replace(features, ids=ids)
    with pytest.raises(
        HeadError, match=f"every class of the training rows lies in a single group of {by}: .* Group by"
    ):
        fit_features(features, Wishes(head="ncm"), groups=find_groups(by, features))
    single = take(features, [0, 1, 2, *range(60, 90)])  # where no other grouping could hold anything out
    assert fit_features(single, Wishes(head="ncm"), groups=find_groups(by, single))[0].n_train == 3


def test_parts_of_the_rows_are_drawn_by_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 series of 4 images of one class each: none is in a part in part."""
    features = gaussian_features({"": 240})
    series = np.arange(240) // 4
    features = replace(features, y=series % 3, ids=tuple(f"s{s:02d}/{i}.png" for i, s in enumerate(series)))
    groups = find_groups("folder", features)
    rows = choose_rows(features, groups)
    drawn = []
    real = outlook.learning_curve

    def record(y: Any, fit_and_score: Any, **options: Any) -> Any:
        def watch(kept: Any) -> Any:
            drawn.append(kept)
            return fit_and_score(kept)

        return real(y, watch, **options)

    monkeypatch.setattr(outlook, "learning_curve", record)
    result, _ = fit_features(features, Wishes(head="ncm"), groups=groups)
    assert result.outlook.curve is not None
    assert len(drawn) == 10
    for kept in drawn:
        assert set(np.bincount(series[rows.train][kept], minlength=60).tolist()) <= {0, 4}
    # Labelled images a class are images all the same.
    assert result.outlook.curve.rows_a_class == pytest.approx(result.n_train / 3)


def test_splits_of_the_data_are_kept_and_what_they_share_is_counted() -> None:
    features = in_series({"train": 150, "test": 60}, series=60)  # series 00 to 49 and 50 to 59, 00 to 09
    result, _ = fit_features(features, Wishes(head="ncm"), groups=find_groups("folder:2", features))
    assert (result.n_train, result.metrics.n) == (150, 60)
    assert result.notes[:2] == (
        "60 groups of folder:2, the largest of 6 rows",
        "30 of the 60 rows scored share a group of folder:2 with rows trained on: 10 groups cross the splits "
        "of the data, which are kept as they are",
    )
    without, _ = fit_features(features, Wishes(head="ncm"))
    assert "share a group" not in "; ".join(without.notes)


def near_copies(n: int = 60, *, seed: int = 0) -> FeatureSet:
    """Threes of nearly equal vectors."""
    features = gaussian_features({"": 3 * n}, d=40, gap=0, seed=seed)
    rng = np.random.default_rng(seed)
    X = np.repeat(rng.normal(size=(n, 40)), 3, axis=0) + rng.normal(size=(3 * n, 40)) * 0.05
    return replace(features, X=X.astype(np.float32), y=np.repeat(np.arange(n) % 3, 3))


def test_similar_images_are_groups_and_what_they_tie_together(monkeypatch: pytest.MonkeyPatch) -> None:
    features = near_copies()
    found = find_groups("similar", features)
    expected = np.arange(180) // 3
    assert len(found.keys) == 60
    assert all(len(set(found.index[expected == g].tolist())) == 1 for g in range(60))
    monkeypatch.setattr(groups_module, "BLOCK", 7)
    np.testing.assert_array_equal(find_groups("similar", features).index, found.index)
    assert len(find_groups("similar:0.9999", features).keys) == 180
    angles = np.arange(20) * 0.1  # cos 0.1 = 0.995: a chain, whose ends are far apart
    chain = replace(
        features, X=np.stack([np.cos(angles), np.sin(angles)], axis=1), sha256=features.sha256[:20]
    )
    assert len(find_groups("similar:0.99", chain).keys) == 1
    assert len(find_groups("similar:0.999", chain).keys) == 20


def test_many_images_that_are_all_alike_take_no_memory_for_their_pairs() -> None:
    features = gaussian_features({"": 6000}, d=3, gap=0)
    features = replace(features, X=np.ones((6000, 3), np.float32))
    tracemalloc.start()
    found = find_groups("similar", features)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.keys) == 1
    assert peak < 150e6  # all pairs are 18 million, of 16 bytes


@pytest.mark.parametrize("splits", [{"": 60}, {"train": 40, "test": 20}])
def test_features_that_are_all_alike_are_told_from_groups_that_are_too_coarse(splits: dict[str, int]) -> None:
    features = gaussian_features(splits)
    features = replace(features, X=np.ones_like(features.X))
    words = "similar finds 60 of the 60 rows alike: these features do not tell the images apart. Embed with"
    with pytest.raises(HeadError, match=words):
        choose_rows(features, find_groups("similar", features))


@pytest.mark.parametrize(("alike", "said"), [(57, True), (56, False)])
def test_one_group_of_nearly_all_rows_is_a_note(alike: int, said: bool) -> None:
    features = gaussian_features({"train": 40, "test": 20}, d=60)
    X = np.eye(60, dtype=np.float32)
    X[:alike] = X[0]
    features = replace(features, X=np.roll(X, 10, axis=0))
    notes = "; ".join(choose_rows(features, find_groups("similar", features)).notes)
    assert (f"similar finds {alike} of the 60 rows alike" in notes) == said


def test_similar_images_are_told_by_their_digests_not_by_their_order() -> None:
    features = near_copies()
    order = np.random.default_rng(1).permutation(180)
    test = hold_out(features.sha256, features.y, find_groups("similar", features))
    turned = take(features, order)
    np.testing.assert_array_equal(
        hold_out(turned.sha256, turned.y, find_groups("similar", turned)), test[order]
    )


def test_near_copies_on_both_sides_flatter_and_groups_do_not() -> None:
    """Labels at random: only copies of rows trained on can be told, and by groups there are none."""
    right = {True: 0.0, False: 0.0}
    held = {True: 0.0, False: 0.0}
    n = {True: 0, False: 0}
    nearest = Wishes(head="knn", params={"k": 1}, curve=False)
    for seed in range(4):
        features = near_copies(120, seed=seed)
        y = np.repeat(np.random.default_rng(seed).integers(0, 2, size=120), 3)
        features = replace(features, y=y, classes=("a", "b"))
        for grouped in (True, False):
            groups = find_groups("similar", features) if grouped else None
            result, _ = fit_features(features, nearest, groups=groups)
            right[grouped] += result.metrics.accuracy * result.metrics.n
            assert result.cross_validated is not None
            held[grouped] += result.cross_validated.accuracy / 4
            n[grouped] += result.metrics.n
    assert right[False] / n[False] > 0.9
    assert held[False] > 0.9
    assert held[True] < 0.6  # and in the folds as well
    # A group of three counts as one: 3 standard deviations of a binomial with p = 1/2.
    assert abs(right[True] / n[True] - 0.5) < 3 * (0.25 / (n[True] / 3)) ** 0.5


@pytest.mark.parametrize(
    ("by", "words"),
    [
        ("patient", "no grouping by patient. Group by folder, folder:N, FILE.csv:COLUMN, similar"),
        ("folder:0", "from 1, not 0"),
        ("folder:x", "from 1, not x"),
        (
            "folder:3",
            "60 images lie in fewer than 3 folders: class0/s00/00000.png, .* and 57 more. Group by a folder",
        ),
        ("similar:2", "between 0 and 1, not 2"),
        ("similar:much", "between 0 and 1, not much"),
        ("none.csv:who", "none.csv cannot be read: No such file"),
        ("who.csv:whom", "who.csv has no column whom; it has path, who"),
        ("nopath.csv:who", "nopath.csv has no column path; it has file, who"),
        (
            "who.csv:who",
            "58 images have no who in who.csv: class2/s00/00002.png, .* and 55 more. Its column path",
        ),
        ("bad.csv:who", "bad.csv is not a CSV in UTF-8"),
    ],
)
def test_groupings_that_cannot_be_are_refused_in_one_line(
    by: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("who.csv").write_text(
        "path,who\nclass0/s00/00000.png,A\nclass1/s00/00001.png,B\nclass2/s00/00002.png,\n"
    )
    Path("nopath.csv").write_text("file,who\na,b\n")
    Path("bad.csv").write_bytes(b"path,who\n\xff\xfe,b\n")
    with pytest.raises(HeadError, match=words) as caught:
        find_groups(by, in_series({"": 60}))
    assert "\n" not in str(caught.value)


def test_groups_from_a_store(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s.h5", in_series({"": 300}))
    result = fit(path, head="ridge", group_by="folder:2")
    assert "held out by whole groups of folder:2" in result.describe()
