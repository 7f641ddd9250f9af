"""The report of a fit for someone who reads only the terminal: which head, how sure, what next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from featcache.evaluate.abstain import Abstention
from featcache.evaluate.compete import Competition, competition_lines
from featcache.evaluate.nodes import choice_lines
from featcache.evaluate.report import class_lines, score_lines
from featcache.evaluate.select import Candidate, Selection
from featcache.fitting.advice import advise, predict_command
from featcache.fitting.summary import summarise
from featcache.images.paths import show_path

if TYPE_CHECKING:
    from featcache.fitting.result import FitResult


def report_lines(result: FitResult) -> list[str]:
    """From the choice to the next step."""
    advice = advise(result)
    nodes = choice_lines(result.node_choice) if result.node_choice else []
    parts = [[summarise(result)], _head_lines(result), nodes, _choice_lines(result), _score_lines(result)]
    parts.append(class_lines(result.metrics))
    if more := result.outlook.lines():
        parts.append(more)
    if result.abstention:
        parts.append(_abstention_lines(result, result.abstention))
    lines = [line for part in parts if part for line in (*part, "")]
    lines += [f"note: {note}" for note in result.notes]
    if result.model:
        replaced = f", where {result.replaced} was" if result.replaced else ""
        lines.append(f"written to {show_path(result.model)}{replaced}")
        if advice.command != predict_command(result):
            lines.append(f"to use it: {predict_command(result)}")
    return [*lines, f"next: {advice.why}", f"  {advice.command}"]


def _abstention_lines(result: FitResult, abstention: Abstention) -> list[str]:
    lines = abstention.lines()
    if abstention.threshold is not None:
        below = str(abstention.threshold)
        lines.append("  to leave the others without an answer:")
        lines.append(f"  {predict_command(result, '--abstain-below', below)}")
    return lines


def _head_lines(result: FitResult) -> list[str]:
    said = ", ".join(f"{name}={_short(value)}" for name, value in result.params.items())
    adjusted = f", logits adjusted by {result.logit_adjustment:g}" if result.logit_adjustment else ""
    lines = [f"head {result.head}" + (f" ({said})" if said else "") + f"{adjusted}, {result.seconds:.1f} s"]
    if "temperature" in result.params:
        lines.append(
            "  (the temperature divides its scores, so that of answers given with 80 % some 80 % are right)"
        )
    lines.append(f"trained on {result.n_train:,} rows: {result.trained_on}")
    lines.append(f"on {result.num_features:,} features: {', '.join(result.nodes)}")
    return lines


def _choice_lines(result: FitResult) -> list[str]:
    if result.competition:
        return _heads_lines(result.competition, result.selection)
    if result.chosen_by is None:
        return []
    names = tuple(result.selection.candidates[0].values)
    lines = [f"{' and '.join(names)} chosen by {result.chosen_by}:"]
    columns = "".join(f"  {name:>12}" for name in names)
    lines.append(f"{columns}  {'log-loss':>17}  {'accuracy':>17}")
    lines += [_candidate_line(c, result.selection.best) for c in result.selection.candidates]
    return [
        *lines,
        "  (log-loss is 0 where the true class is given all probability; ± is one standard error)",
    ]


def _heads_lines(competition: Competition, selection: Selection) -> list[str]:
    lines = competition_lines(competition)
    if competition.contenders:
        lines.insert(
            0,
            f"heads compared in {selection.n_folds}-fold cross-validation on the training rows, each row "
            "asked of heads fitted without it:",
        )
    return lines


def _candidate_line(c: Candidate, chosen: Candidate | None) -> str:
    values = "".join(f"{value:>12.4g}  " for value in c.values.values())
    return (
        f"{'>' if c == chosen else ' '} {values}{c.nll:>8.4f} ± {c.nll_se:.4f}"
        f"  {c.accuracy:>8.4f} ± {c.accuracy_se:.4f}"
    )


def _score_lines(result: FitResult) -> list[str]:
    lines = score_lines(
        result.metrics,
        on=result.scored_on,
        untrained=bool(result.untrained),
        train_accuracy=result.train_accuracy,
        uncalibrated_ece=result.uncalibrated_ece,
    )
    return [*lines, *(result.verdict.lines if result.verdict else ())]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
