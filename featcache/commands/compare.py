"""`featcache compare`: which of several stores, nodes and heads is better on the same images, and how surely.

Every candidate is chosen and fitted as `featcache fit` does, on the same rows and folds, and scored once.
Candidates are ranked by cross-validation on the training rows; what the rows scored say of the differences
is told with intervals that hold for all of them at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.backbones import bundled, list_backbones
from featcache.errors import StoreError
from featcache.evaluate.comparison import COSTS, Answers, Pair, compare_pairs, pair_lines, take_cheapest
from featcache.evaluate.groups import find_groups
from featcache.evaluate.metrics import Metrics
from featcache.evaluate.report import aligned_lines
from featcache.evaluate.select import OutOfFold
from featcache.evaluate.splits import Groups, number_units
from featcache.fitting import FitResult, HeldOut, choose_rows, fit_features
from featcache.fitting.wishes import AUTO, BUDGET, Wishes
from featcache.images.paths import show_path
from featcache.joining import join_rows
from featcache.progress import Progress, SilentProgress
from featcache.store.features import FeatureSet
from featcache.store.reader import FeatureStore
from featcache.words import plural, shell_command, show_text, spell_options

ALL_NODES = "all"  # a set of nodes: all of the store
_HEADLINE = (
    "n", "accuracy", "accuracy_ci95", "mean_per_class_accuracy", "mean_per_class_accuracy_ci95", "top5",
    "top5_ci95", "nll", "nll_ci95", "ece", "ece_ci95",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A head on some nodes of a store.

    name: what tells it from the others. cv: of the training rows, each predicted by a head fitted without it;
    None where nothing could be held out. test: of the rows scored.
    ms_per_image: of embedding, as measured when the store was made, and num_params of the whole network; None
    where they are not known. num_features: of the vector that the head gets.
    """

    name: str
    store: str
    backbone: str
    nodes: tuple[str, ...]
    head: str
    params: Mapping[str, Any]
    cv: Metrics | None
    test: Metrics
    num_features: int
    num_params: int | None
    ms_per_image: float | None
    fit_seconds: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.__annotations__ if name not in ("cv", "test")}
        own["params"] = {name: str(value) for name, value in self.params.items()}
        scores = {"cv": _headline(self.cv), "test": _headline(self.test)}
        return {**own, "nodes": list(self.nodes), **scores, "notes": list(self.notes)}


def _headline(m: Metrics | None) -> dict[str, Any] | None:
    return None if m is None else {name: getattr(m, name) for name in _HEADLINE}


@dataclass(frozen=True, kw_only=True)
class Take:
    """The candidate to take, why, and the command that fits it."""

    name: str
    why: str
    command: str


@dataclass(frozen=True, kw_only=True)
class CompareResult:
    """Candidates, best first by accuracy in cross-validation; the first one against each of the others.

    left_out: rows of each store that are not in all of them. take: the one to take, of the first and what is
    within one standard error of it in cross-validation; None where there was none.
    """

    candidates: tuple[Candidate, ...]
    pairs: tuple[Pair, ...]
    n_train: int
    trained_on: str
    scored_on: str
    left_out: Mapping[str, int]
    take: Take | None

    @property
    def cheapest(self) -> str | None:
        """The one to take, where it is not the most accurate."""
        return None if self.take is None or self.take.name == self.candidates[0].name else self.take.name

    def to_json(self) -> dict[str, Any]:
        return {
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "pairs": [pair.to_json() for pair in self.pairs],
            "n_train": self.n_train,
            "n_test": self.candidates[0].test.n,
            "trained_on": self.trained_on,
            "scored_on": self.scored_on,
            "left_out": dict(self.left_out),
            "cheapest": self.cheapest,
            "take": asdict(self.take) if self.take else None,
        }

    def describe(self) -> str:
        """The table and what follows from it."""
        n = self.candidates[0].test.n
        lines = [f"trained on {self.n_train:,} rows: {self.trained_on}; scored on {n:,}: {self.scored_on}"]
        lines += [
            f"{plural(count, 'row')} of {show_path(store)} not in every store, and left out"
            for store, count in self.left_out.items()
            if count
        ]
        lines += ["", *_table(self.candidates), ""]
        lines += [*pair_lines(self.pairs), ""]
        lines += _note_lines(self.candidates)
        lines.append(
            "ranked by accuracy in cross-validation on the training rows, where fit chooses a head by its "
            "log-loss; what is picked by its score on the rows scored has a score that is too high"
        )
        if self.take is None:
            return "\n".join([*lines, "nothing could be held out to choose by: take what costs least"])
        return "\n".join([*lines, f"take {self.take.name}: {self.take.why}", f"  {self.take.command}"])


def compare(
    stores: Sequence[str | os.PathLike[str]],
    *,
    nodes: Sequence[str] = (),
    heads: Sequence[str] = (AUTO,),
    seed: int = 0,
    budget: float = BUDGET,
    group_by: str | None = None,
    progress: Progress | None = None,
    check: bool = True,
) -> CompareResult:
    """Fit every head on every set of nodes of every store, on the images that all stores have.

    nodes: sets of them, as "layer3", "layer3+layer4" or "all"; each counts for the stores that have all its
    nodes, and a store that has none of the sets takes part with its first node. check: compare the stores
    with their checksums first. budget: seconds for the choice of an automatic head. group_by: as for `fit`,
    of the first store's rows.
    StoreError: stores that cannot be compared, or a single candidate. HeadError: a head that cannot be
    fitted.
    """
    progress = progress or SilentProgress()
    wishes = {head: Wishes(head=head, budget=budget, seed=seed, curve=False) for head in heads}
    for wish in wishes.values():
        wish.require_savable()  # before hours of work
    opened = [FeatureStore.open(path, check=check) for path in _once_each(stores)]
    asked = [
        _Asked(which=which, store=store, text=text, nodes=keys, head=head)
        for which, store in enumerate(opened)
        for keys, text in _sets_of(store, nodes).items()
        for head in dict.fromkeys(heads)
    ]
    _require_known_sets(opened, nodes)
    if len(asked) < 2:
        raise StoreError(
            "there is nothing to compare with: name another store, another --node or another --head."
        )
    shared = join_rows([store.features() for store in opened], [show_path(store.path) for store in opened])
    groups = None
    if group_by is not None:
        groups = find_groups(group_by, shared.of(opened[0].features(), 0), progress=progress)
    fitted = []
    for one in asked:
        with_views = wishes[one.head].uses_views  # as `fit` has it
        features = shared.of(one.store.features(one.nodes, with_views=with_views), one.which)
        result, _ = fit_features(features, wishes[one.head], groups=groups, progress=progress)
        fitted.append(_Fitted(asked=one, result=result, units=_Units.of(features, groups)))
    options = spell_options(
        {"--group-by": (group_by, None), "--budget": (budget, BUDGET), "--seed": (seed, 0)}
    )
    left_out = dict(zip([str(s.path) for s in opened], shared.left_out, strict=True))
    return _result(fitted, left_out, seed=seed, options=options)


def _once_each(stores: Sequence[str | os.PathLike[str]]) -> list[Path]:
    if not stores:
        raise ValueError("there is nothing to compare")
    return list({os.path.realpath(path): Path(path) for path in stores}.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """What is to be fitted, on the store of this number."""

    which: int
    store: FeatureStore
    text: str  # the nodes as they were asked for
    nodes: tuple[str, ...]
    head: str


@dataclass(frozen=True, kw_only=True, eq=False)
class _Units:
    """Which rows are of one image or group: those trained on and those scored, in their order."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]

    @classmethod
    def of(cls, features: FeatureSet, groups: Groups | None) -> _Units:
        rows, units = choose_rows(features, groups), number_units(features.sha256, groups)
        return cls(train=units[rows.train], test=units[rows.test])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Fitted:
    asked: _Asked
    result: FitResult
    units: _Units


def _sets_of(store: FeatureStore, sets: Sequence[str]) -> dict[tuple[str, ...], str]:
    """The sets of nodes that the store has, with their text; its first node where it has none of them."""
    there = tuple(node.key for node in store.spec.nodes)
    asked = [(there if text == ALL_NODES else _keys(store, text), text) for text in sets]
    # Once each, in whatever order its nodes are named.
    once = {frozenset(keys): (keys, text) for keys, text in asked if set(keys) <= set(there)}
    return dict(once.values()) or {there[:1]: there[0]}


def _keys(store: FeatureStore, text: str) -> tuple[str, ...]:
    """Of a set of nodes, joined by +, each once."""
    return tuple(dict.fromkeys(store.spec.find_node(part) for part in text.split("+")))


def _require_known_sets(stores: Sequence[FeatureStore], sets: Sequence[str]) -> None:
    for text in sets:
        if text != ALL_NODES and not any(
            set(_keys(store, text)) <= {node.key for node in store.spec.nodes} for store in stores
        ):
            known = ", ".join(dict.fromkeys(node.key for store in stores for node in store.spec.nodes))
            raise StoreError(f"no store has {text!r}; there are {known}, joined by +, and {ALL_NODES}.")


def _result(
    fitted: Sequence[_Fitted], left_out: Mapping[str, int], *, seed: int, options: Sequence[str]
) -> CompareResult:
    """options: of `featcache fit`, those that all candidates were fitted with."""
    candidates = [_candidate(one, name) for one, name in zip(fitted, _names(fitted), strict=True)]
    order = sorted(range(len(fitted)), key=lambda i: _rank(candidates[i]))
    candidates, fitted = [candidates[i] for i in order], [fitted[i] for i in order]
    pairs = _pairs(candidates, fitted, seed=seed)
    first = fitted[0].result
    return CompareResult(
        candidates=tuple(candidates),
        pairs=tuple(pairs),
        n_train=first.n_train,
        trained_on=first.trained_on,
        scored_on=first.scored_on,
        left_out=left_out,
        take=_take(candidates, fitted, pairs, options=options),
    )


def _rank(candidate: Candidate) -> tuple[float, float]:
    return (-candidate.cv.accuracy, candidate.cv.nll) if candidate.cv else (0.0, 0.0)


def _names(fitted: Sequence[_Fitted]) -> list[str]:
    """What tells each from the others: of store, nodes and head those that are not the same for all."""
    several = len({one.asked.head for one in fitted}) > 1
    parts = [
        (show_path(one.asked.store.path.stem), one.asked.text, _head_name(one, several=several))
        for one in fitted
    ]
    varying = [column for column in range(3) if len({part[column] for part in parts}) > 1]
    names = [" ".join(show_text(part[column]) for column in varying) for part in parts]
    if len(set(names)) == len(names):
        return names
    return [f"{show_path(one.asked.store.path)} {name}" for one, name in zip(fitted, names, strict=True)]


def _head_name(one: _Fitted, *, several: bool) -> str:
    """The chosen one, and what was asked for where that is another one and not the same for all."""
    asked, chosen = one.asked.head, one.result.head
    return f"{asked}: {chosen}" if several and asked != chosen else chosen


def _candidate(one: _Fitted, name: str) -> Candidate:
    store, result = one.asked.store, one.result
    backbone = store.spec.backbone
    return Candidate(
        name=name,
        store=str(store.path),
        backbone=backbone,
        nodes=one.asked.nodes,
        head=result.head,
        params=result.params,
        cv=result.cross_validated,
        test=result.metrics,
        num_features=result.num_features,
        num_params=_num_params(backbone),
        ms_per_image=_ms_per_image(store.provenance),
        fit_seconds=round(result.seconds, 3),
        notes=result.notes,
    )


def _num_params(backbone: str) -> int | None:
    """Of the network of this name; those that pip brings are asked first, since the others import torch."""
    name = backbone.partition("@")[0]
    if ":" in name:
        return None
    infos = bundled.infos() if bundled.owns(name) else list_backbones()
    return next((info.num_params for info in infos if info.name == name), None)


def _ms_per_image(provenance: Mapping[str, Any]) -> float | None:
    """Milliseconds for an image, from the speed of the engine that made the store where that was measured."""
    choice = provenance.get("engine_choice")
    speeds = choice.get("images_per_second") if isinstance(choice, Mapping) else None
    if not isinstance(speeds, Mapping):
        return None
    speed = speeds.get(f"{provenance.get('engine')} in batches of {provenance.get('batch_size')}")
    return round(1000 / speed, 3) if isinstance(speed, int | float) and speed > 0 else None


def _pairs(candidates: Sequence[Candidate], fitted: Sequence[_Fitted], *, seed: int) -> list[Pair]:
    """The first candidate against each of the others."""
    results, units = [one.result for one in fitted], fitted[0].units
    held = [result.held_out for result in results]
    outs = [out for result in results if (out := result.selection.out_of_fold) is not None]
    cv = None
    if len(outs) == len(results) and all(np.array_equal(out.rows, outs[0].rows) for out in outs):
        cv = Answers(right=_right(outs), units=units.train[outs[0].rows])
    test = Answers(right=_right(held), units=units.test)
    return compare_pairs([candidate.name for candidate in candidates], test=test, cv=cv, seed=seed)


def _right(answers: Sequence[HeldOut | OutOfFold]) -> NDArray[np.bool_]:
    """(n_rows, n_candidates)"""
    return np.stack([one.probabilities.argmax(axis=1) == one.y for one in answers], axis=1)


def _take(
    candidates: Sequence[Candidate],
    fitted: Sequence[_Fitted],
    pairs: Sequence[Pair],
    *,
    options: Sequence[str],
) -> Take | None:
    if candidates[0].cv is None:
        return None
    costs = [{name: getattr(candidate, name) for name in COSTS} for candidate in candidates]
    taken, why = take_cheapest(pairs, costs)
    return Take(name=candidates[taken].name, why=why, command=_fit_command(fitted[taken], options))


def _fit_command(one: _Fitted, options: Sequence[str]) -> str:
    """Of the head that was taken, which another competition, of other rows, might not choose."""
    asked = one.asked
    nodes = [part for key in asked.nodes for part in ("--node", key)]
    head = one.result.head if asked.head == AUTO else asked.head
    return shell_command(["featcache", "fit", asked.store.path, *nodes, "--head", head, *options])


def _table(candidates: Sequence[Candidate]) -> list[str]:
    groups = ("", "cross-validation", "", "rows scored")
    heading = ("", "accuracy", "log-loss", "accuracy", "log-loss", "dim", "ms/image", "params", "fit s")
    return aligned_lines([groups, heading, *(_cells(candidate) for candidate in candidates)])


def _cells(c: Candidate) -> tuple[str, ...]:
    low, high = c.test.accuracy_ci95
    return (
        c.name,
        f"{c.cv.accuracy:.4f}" if c.cv else "-",
        f"{c.cv.nll:.4f}" if c.cv else "-",
        f"{c.test.accuracy:.4f} ({low:.4f} to {high:.4f})",
        f"{c.test.nll:.4f}",
        f"{c.num_features:,}",
        f"{c.ms_per_image:.2f}" if c.ms_per_image else "-",
        f"{c.num_params / 1e6:.1f} M" if c.num_params else "-",
        f"{c.fit_seconds:.1f}",
    )


def _note_lines(candidates: Sequence[Candidate]) -> list[str]:
    """Notes on all of them once, others with the name of the candidate."""
    shared = [note for note in candidates[0].notes if all(note in c.notes for c in candidates)]
    own = [f"{c.name}: {note}" for c in candidates for note in c.notes if note not in shared]
    return [f"note: {note}" for note in [*shared, *own]]
