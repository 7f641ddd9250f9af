"""The next step: a sentence that rests on a number of this run, and a command to paste."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.evaluate.learning import Limit
from featcache.evaluate.report import FEW_ERRORS
from featcache.heads import find_head
from featcache.images.paths import show_path
from featcache.words import plural, show_text, spell_options

if TYPE_CHECKING:
    from featcache.evaluate.report import Verdict
    from featcache.fitting.result import FitResult

SHOWN_CLASSES = 3
WIDE = 0.1  # an interval of accuracy wider than this hides what a better head would gain
# Before a command that embeds what is new and fits again, and changes nothing while nothing is.
_AFTER = (
    "After adding labelled images to those that were embedded, the command takes them in; until then it "
    "changes nothing"
)
_NEXT = {
    "fits": "score more rows, which are too few to tell what limits it",
    "overfits": "add images, or augmented views",
    "underfits": "try other nodes, another backbone or fine-tuning",
}
# What limits it, as far as errors tell where no curve was drawn.
_LIMIT: dict[str, Limit] = {"fits": "unsure", "overfits": "labels", "underfits": "features"}


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to do now and why, and how: one line of a shell."""

    why: str
    command: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def advise(result: FitResult) -> Advice:
    """What to do now."""
    m = result.metrics
    low, high = m.accuracy_ci95
    verdict = result.verdict
    if verdict is None:
        return _train_on_all(result)
    drift = verdict.drift
    if drift and drift.is_real and drift.difference < 0:
        return _explain_drift(result, points=-100 * drift.difference)
    if high - low > WIDE:
        why = (
            f"score more rows than {m.n:,}: an accuracy between {100 * low:.0f} and {100 * high:.0f} % does "
            f"not tell one head from another. {_AFTER}"
        )
        return Advice(why=why, command=_embed_and_fit(result))
    if 1 - m.accuracy <= FEW_ERRORS:
        why = f"use it: {100 * m.accuracy:.1f} % of {m.n:,} rows it had not seen are right"
        return Advice(why=why, command=predict_command(result))
    return _remedy(result, verdict)


def _train_on_all(result: FitResult) -> Advice:
    """Whatever else is wrong, a class that no training row has is never answered."""
    names = [show_text(name) for name in result.untrained]
    more = len(names) - SHOWN_CLASSES
    said = ", ".join(names[:SHOWN_CLASSES]) + (f" and {more:,} more" if more > 0 else "")
    why = (
        f"add labelled images of {said} to the training rows: {result.n_untrained:,} of the "
        f"{plural(result.metrics.n, 'row')} scored are of classes that were not trained on. {_AFTER}"
    )
    return Advice(why=why, command=_embed_and_fit(result))


def _explain_drift(result: FitResult, *, points: float) -> Advice:
    why = (
        "find out how the rows scored differ from the training rows, where "
        f"{points:.1f} points more were right in cross-validation"
    )
    if result.grouped_by is None:
        return Advice(
            why=f"{why}. Whether it had near-copies on both sides of its folds, this tells",
            command=_fit(result, "--group-by", "similar", name="grouped"),
        )
    table = str(Path(result.files.model).with_suffix(".csv"))
    return Advice(
        why=f"{why}. A table of these rows and their answers",
        command=_shell("featcache", "evaluate", result.files.model, result.files.store, "--csv", table),
    )


def _remedy(result: FitResult, verdict: Verdict) -> Advice:
    """For errors that are too many and surely there."""
    why = result.outlook.sentence()
    limit = result.outlook.limit or _LIMIT[verdict.fit]
    if why is None:
        errors, train_errors = 1 - result.metrics.accuracy, 1 - result.train_accuracy
        why = (
            f"{_NEXT[verdict.fit]}: {100 * errors:.1f} % of the {result.metrics.n:,} rows scored are "
            f"wrong, {100 * train_errors:.1f} % of those trained on"
        )
        if limit == "unsure":
            return Advice(why=f"{why}. {_AFTER}", command=_embed_and_fit(result))
    if limit in ("nothing", "unsure"):
        return Advice(why=why, command=predict_command(result))
    if result.other_nodes:
        more = plural(len(result.other_nodes), "more node")
        why += f". The store has {more}, which --nodes auto tries"
        return Advice(why=why, command=_fit(result, "--nodes", "auto", name="nodes"))
    if limit == "labels":
        return Advice(why=f"{why}. {_AFTER}", command=_embed_and_fit(result))
    return Advice(why=why, command=_finetune(result))


def predict_command(result: FitResult, *options: str) -> str:
    """What answers for the images there are, and for others in their place."""
    where = result.files
    return _shell("featcache", "predict", where.model, where.images, *options, *_allowed(result))


def _embed_and_fit(result: FitResult) -> str:
    return f"{_shell(*result.files.embed)} && {_fit(result, name=None)}"


def _fit(result: FitResult, *options: str, name: str | None) -> str:
    """Fit again, as this was. name: what the new model is told by; None: it takes the place of this one."""
    model = Path(result.files.model)
    output = model if name is None else model.with_name(f"{model.stem}.{name}{model.suffix}")
    head = () if result.asked == "auto" else ("--head", result.asked, *result.files.head_options)
    nodes = () if "--nodes" in options else _nodes(result)
    words = (*head, *nodes, *_groups(result), *result.files.fit_options, *options)
    return _shell("featcache", "fit", result.files.store, *words, "-o", str(output))


def _groups(result: FitResult) -> tuple[str, ...]:
    return spell_options({"--group-by": (result.grouped_by, None)})


def _nodes(result: FitResult) -> tuple[str, ...]:
    """How these nodes are asked for."""
    if result.node_choice is not None:
        return "--nodes", "auto"
    if len(result.nodes) == 1 and not result.other_nodes:
        return ()  # the only one
    return tuple(part for key in result.nodes for part in ("--node", key))


def _finetune(result: FitResult) -> str:
    from featcache.heads.base import LinearHead

    model, first = Path(result.files.model), ""
    output = model.with_name(f"{model.stem}.tuned{model.suffix}")
    if not issubclass(find_head(result.head).load(), LinearHead):  # fine-tuning begins with a linear head
        linear = model.with_name(f"{model.stem}.linear{model.suffix}")
        words = ("--head", "logistic", *_nodes(result), *_groups(result), *result.files.fit_options)
        fit = _shell("featcache", "fit", result.files.store, *words, "-o", str(linear))
        model, first = linear, f"{fit} && "
    tune = ("featcache", "finetune", str(model), result.files.data, "-o", str(output), *_groups(result))
    return first + _shell(*tune, *_allowed(result))


def _allowed(result: FitResult) -> tuple[str, ...]:
    return ("--backbone", result.files.own_code) if result.files.own_code else ()


def _shell(*words: str) -> str:
    return shlex.join(show_path(word) for word in words)
