"""A fit in one sentence: which head on which nodes, how good it is, and how sure that is the one to take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featcache.evaluate.compete import Competition, Contender
from featcache.words import plural, show_text

if TYPE_CHECKING:
    from featcache.fitting.result import FitResult

SHOWN_NODES = 3
SURE = 2.0  # standard errors, which chance exceeds one time in twenty
LEAST_SURE = 50  # rows held out in cross-validation: of fewer a standard error says little


def summarise(result: FitResult) -> str:
    """`ridge on penultimate: 79.4 % right (95 % interval 76.2 to 82.3) on 661 rows (test); tied with …`."""
    m = result.metrics
    low, high = (100 * end for end in m.accuracy_ci95)
    score = f"{100 * m.accuracy:.1f} % right (95 % interval {low:.1f} to {high:.1f})"
    rows = f"on {plural(m.n, 'row')} ({result.scored_on})"
    parts = [f"{result.head} on {_nodes(result.nodes)}: {score} {rows}"]
    if result.untrained:
        parts.append(f"{result.n_untrained:,} of them of classes that were not trained on, and so wrong")
    return "; ".join([*parts, _sureness(result)])


def _nodes(nodes: tuple[str, ...]) -> str:
    few = len(nodes) <= SHOWN_NODES
    return show_text(" + ".join(nodes)) if few else f"{len(nodes)} nodes"


def _sureness(result: FitResult) -> str:
    """How the head compares with the others in cross-validation."""
    competition = result.competition
    if competition is None:
        return "no other head was compared with it"
    chosen, runner_up = competition.chosen, competition.runner_up
    if chosen is None:
        return "heads could not be compared, so that it is but the simplest"
    if runner_up is None:
        return "no other head took part"
    if chosen is not competition.best:
        return f"tied in cross-validation with {_tied(competition)}, and simpler"
    # One farther behind than the runner-up may be tied where it is less sure how far.
    if tied := _tied(competition):
        return f"tied in cross-validation with {tied}, though ahead"
    held_out = result.cross_validated.n_units if result.cross_validated else 0
    return _ahead(runner_up, held_out)


def _tied(competition: Competition) -> str:
    """The best first."""
    others = [one for one in competition.contenders if one.is_tied and not one.chosen]
    return " and ".join(one.head for one in sorted(others, key=lambda one: (one.behind, one.simplicity)))


def _ahead(runner_up: Contender, held_out: int) -> str:
    if held_out < LEAST_SURE:
        few = f"{plural(held_out, 'row')} held out are too few to be sure"
        return f"ahead in cross-validation of {runner_up.head}, the runner-up; {few}"
    by = runner_up.behind / runner_up.behind_se if runner_up.behind_se > 0 else float("inf")
    surely = "surely" if by > SURE else "probably, not surely,"
    return (
        f"{surely} better in cross-validation than {runner_up.head}, the runner-up, by {by:.1f} standard "
        "errors of log-loss"
    )
