"""`fit`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from featcache.cli.group import emit, main
from featcache.cli.options import (
    GROUPINGS,
    json_option,
    no_check_option,
    quiet_option,
)

SEEDS = (1 << 32) - 1  # the highest that scikit-learn draws by


def seed_option(of: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--seed, and what it is of."""
    return click.option("--seed", type=click.IntRange(0, SEEDS), default=0, show_default=True, help=of)


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in value.split(",")) if value else ()
    except ValueError:
        found = (0,)
    if any(number < 1 for number in found):
        raise click.BadParameter(f"{value!r} is not a list of numbers from 1, such as 1,2,4,8,16.")
    return found


@main.command(short_help="Choose, fit and score a head on cached features.")
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="MODEL",
    help="The model file to write; its report goes to MODEL.json. Default: the name of STORE, with .model. A "
    "model that is there is replaced, and named.",
)  # fmt: skip
@click.option(
    "--head", default="auto", show_default=True, metavar="NAME",
    help="auto: heads compete. Or one: ncm, lda, ridge, logistic, linear, knn, mlp, or sklearn:CLASS, for "
    "most of scikit-learn's classifiers; the others are refused before any work.",
)  # fmt: skip
@click.option(
    "--budget", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True, metavar="SECONDS",
    help="For choosing nodes, the competition of heads and the curve: what would take longer is left out, "
    "and named. One head is always fitted; --shots come on top.",
)  # fmt: skip
@click.option(
    "--param", "params", multiple=True, metavar="KEY=VALUE",
    help="A parameter of the head; repeatable. Giving one that is searched ends its search.",
)  # fmt: skip
@click.option(
    "--node", multiple=True, metavar="KEY",
    help="The node of the store to use; repeatable, vectors are put one after the other. Default: its first.",
)  # fmt: skip
@click.option(
    "--nodes", type=click.Choice(["auto", "all"]),
    help="All nodes of the store, or those that cross-validation on the training rows chooses.",
)  # fmt: skip
@click.option(
    "--class-weight", type=click.Choice(["balanced"]),
    help="Let every class count alike, however many images it has.",
)  # fmt: skip
@click.option(
    "--logit-adjustment", type=click.FloatRange(0, min_open=True), metavar="TAU",
    help="Lower the score of a class by TAU times the logarithm of its share of the training rows.",
)  # fmt: skip
@click.option(
    "--group-by", metavar=GROUPINGS,
    help="Images of a group, such as a series or near-copies, stay on one side of every split.",
)  # fmt: skip
@click.option(
    "--wish-precision", "precision", metavar="SHARE",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Say from which probability on answers are right that often, and how to get those alone.",
)  # fmt: skip
@click.option(
    "--shots", callback=_numbers, metavar="N,N,…",
    help="Also say how accurate the head is with so many labelled images a class.",
)  # fmt: skip
@click.option(
    "--tries", type=click.IntRange(1), default=10, show_default=True, help="Drawings for each of --shots."
)
@click.option(
    "--curve/--no-curve", default=None,
    help="Fit on parts of the training rows, too, to see whether more would help. Default: where --budget "
    "leaves time.",
)  # fmt: skip
@click.option(
    "--device", metavar="auto|cpu|cuda",
    help="Where logistic, ridge, lda, linear and mlp compute. Default: linear and mlp on a CUDA device "
    "where there is one, the others on the processors.",
)  # fmt: skip
@no_check_option
@seed_option(
    "Of the folds of cross-validation, of heads that draw, and of the rows of the curve and --shots. Which "
    "rows are scored does not depend on it."
)
@json_option
@quiet_option
def fit(store: Path, *, as_json: bool, quiet: bool, params: tuple[str, ...], **options: Any) -> None:
    """Choose and fit a head on the cached features of STORE, and score it once on held-out images.

    Everything is chosen by cross-validation on the training rows. The test split is scored, or val where
    there is no test; without splits a fifth of the images is held out by the hash of their bytes.
    """
    from featcache.commands.fit import fit as run
    from featcache.progress import make_progress

    pairs = [param.partition("=") for param in params]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise click.BadParameter(f"{wrong[0]!r} is not KEY=VALUE.", param_hint="--param")
    given = Counter(key for key, _, _ in pairs)
    if twice := [key for key, times in given.items() if times > 1]:
        raise click.BadParameter(f"{twice[0]} is given more than once.", param_hint="--param")
    result = run(
        store, params={key: value for key, _, value in pairs}, progress=make_progress(quiet=quiet), **options
    )
    emit(result, as_json=as_json)
