"""What to do once a model was scored on labelled rows, as a command to paste.

Knows what the scores say and the verbs' options; runs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.answers import ALL_WORDS, LabelledRows
from featcache.evaluate.metrics import Metrics
from featcache.evaluate.report import FEW_ERRORS
from featcache.fitting.advice import WIDE
from featcache.heads import LINEAR_ARRAYS, find_head
from featcache.model import Model
from featcache.spec import PENULTIMATE
from featcache.words import name_some, plural, shell_command

_UNSEEN = ("test", "val")  # in this order
_TO_TRAIN_ON = ("train", "")

Word = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command, and why it is the next."""

    why: str
    command: str

    def to_json(self) -> dict[str, Any]:
        return {"why": self.why, "command": self.command}

    def lines(self) -> list[str]:
        """The command on a line of its own."""
        return [f"next, {self.why}:", f"  {self.command}"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """A model and the rows it was scored on.

    rows: all of the data; scored_on: which of them. trained_on: how many of those the model was fitted on.
    unknown: classes of them that the model does not know. source: the options with which the images of
    `data` are found, weights: the one given for those of the network. listed: the answers were written, too.
    """

    model: Path
    fitted: Model
    data: Path
    is_store: bool
    rows: LabelledRows
    scored_on: str
    metrics: Metrics
    trained_on: int
    unknown: Collection[str]
    source: tuple[Word, ...] = ()
    weights: str | None = None
    listed: bool = False

    @property
    def backbone(self) -> str:
        """As it was asked for."""
        request = self.fitted.provenance.get("request")
        name = request.get("backbone") if isinstance(request, dict) else None
        return name if isinstance(name, str) else self.fitted.spec.backbone

    @property
    def network(self) -> tuple[Word, ...]:
        """The options with which the network is found."""
        own = ("--backbone", self.backbone) if ":" in self.backbone else ()
        return (*own, *(("--weights", self.weights) if self.weights else ()))

    @property
    def has_training_rows(self) -> bool:
        return bool({*self.rows.splits[self.rows.y >= 0].tolist()} & {*_TO_TRAIN_ON})

    def free_name(self) -> Path:
        """A name for another model: the model's own with the first number that is not taken."""
        taken = 2
        while (path := self.model.with_name(f"{self.model.stem}{taken}{self.model.suffix}")).exists():
            taken += 1
        return path


def next_step(scored: Scored) -> Step | None:
    """The most useful command; None where there is none, as where more images are wanted."""
    m = scored.metrics
    if scored.trained_on > FEW_ERRORS * m.n:  # the score is no measure, and nothing follows from it
        return _score_unseen(scored)
    if scored.unknown:
        return _fit_all_classes(scored)
    low, high = m.accuracy_ci95
    if 1 - m.accuracy <= FEW_ERRORS:
        return _ship(scored) if high - low <= WIDE else None
    return (None if _is_worse_than_fitted(scored) else _tune(scored)) or _list_answers(scored)


def _score_unseen(scored: Scored) -> Step | None:
    there = set(scored.rows.splits[scored.rows.y >= 0].tolist())
    split = next((name for name in _UNSEEN if name in there), None)
    if split is None or scored.scored_on == split:
        return None
    return Step(
        why=f"to score it on the images of {split} alone",
        command=_command("evaluate", scored.model, *_data_of(scored), "--split", split),
    )


def _fit_all_classes(scored: Scored) -> Step | None:
    """None where no row of these classes is there to be trained on, or their features cannot be made."""
    rows = scored.rows
    new = [index for index, name in enumerate(rows.classes) if name in scored.unknown]
    of_new = {*rows.splits[[label in new for label in rows.y.tolist()]].tolist()}
    if not of_new & {*_TO_TRAIN_ON} or (scored.fitted.network and not scored.is_store):
        return None
    nodes = [node.key for node in scored.fitted.nodes]
    chosen = [word for key in nodes for word in ("--node", key)] if nodes != [PENULTIMATE] else []
    why = f"to fit a head that knows {name_some(sorted(scored.unknown), limit=3)} as well"
    if scored.is_store:
        fit = _command("fit", scored.data, "-o", scored.free_name(), *chosen)
        return Step(why=why, command=fit)
    store = Path(f"{scored.data.stem or 'all'}.h5")
    embed = _command("embed", scored.data, "-o", store, *_asked(scored), *chosen, *scored.source)
    fit = _command("fit", store, "-o", scored.free_name(), *chosen)
    return Step(why=why, command=f"{embed} && {fit}")


def _asked(scored: Scored) -> list[Word]:
    """The options of `embed` for features as the model has them, but for their nodes."""
    request, spec = scored.fitted.provenance.get("request"), scored.fitted.spec
    asked = request if isinstance(request, dict) else {}
    weights = scored.weights or asked.get("weights")
    options: list[Word] = ["--backbone", scored.backbone]
    options += ["--weights", str(weights)] if weights else []
    options += ["--seed", str(asked["seed"])] if asked.get("seed") else []
    options += ["--precision", spec.compute_dtype] if spec.compute_dtype != "float32" else []
    options += ["--store-dtype", spec.store_dtype] if spec.store_dtype != "float32" else []
    return options + (["--jpeg-scaled"] if spec.preprocessing.jpeg == "scaled" else [])


def _ship(scored: Scored) -> Step:
    m = scored.metrics
    return Step(
        why=f"for {100 * m.accuracy:.1f} % of {plural(m.n, 'row')} are right, to use it without featcache",
        command=_command("export", scored.model, "--to", "onnx", *scored.network),
    )


def _tune(scored: Scored) -> Step | None:
    """None where there is nothing to train on, or no linear head to begin with, or that was done."""
    is_linear = find_head(scored.fitted.head_name).arrays == LINEAR_ARRAYS
    if scored.is_store or scored.fitted.network or not is_linear or not scored.has_training_rows:
        return None
    return Step(
        why="to train the last blocks of the network as well",
        command=_command(
            "finetune", scored.model, scored.data, "-o", scored.free_name(), *scored.source, *scored.network
        ),
    )


def _list_answers(scored: Scored) -> Step | None:
    if scored.listed:
        return None
    split = () if scored.scored_on == ALL_WORDS else ("--split", scored.scored_on)
    table = Path(f"{scored.model.stem}.answers.csv")
    return Step(
        why="to see which rows are wrong",
        command=_command("evaluate", scored.model, *_data_of(scored), *split, "--csv", table),
    )


def _is_worse_than_fitted(scored: Scored) -> bool:
    """Whether the accuracy is below that of the rows held out at the fit, by more than both are unsure."""
    ends = scored.fitted.metrics.get("accuracy_ci95")
    if not isinstance(ends, list | tuple) or len(ends) != 2 or not isinstance(ends[0], float):
        return False
    return scored.metrics.accuracy_ci95[1] < ends[0]


def _data_of(scored: Scored) -> tuple[Word, ...]:
    return (scored.data,) if scored.is_store else (scored.data, *scored.source, *scored.network)


def _command(verb: str, *words: Word) -> str:
    arguments: Iterable[Word] = words
    return shell_command(["featcache", verb, *arguments])
