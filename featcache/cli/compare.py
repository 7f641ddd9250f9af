"""`compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache.cli.group import emit, main
from featcache.cli.heads import seed_option
from featcache.cli.options import GROUPINGS, json_option, no_check_option, quiet_option


@main.command(short_help="Say which store, nodes or head is better, and how surely.")
@click.argument("stores", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="STORE.h5...")
@click.option(
    "--node", "nodes", multiple=True, metavar="KEY[+KEY...]|all",
    help="Nodes to compare, several joined by +; repeatable. Default: the first node of each store.",
)  # fmt: skip
@click.option(
    "--head", "heads", multiple=True, default=("auto",), show_default="auto", metavar="NAME",
    help="A head, as for fit; repeatable.",
)  # fmt: skip
@click.option(
    "--budget", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True, metavar="SECONDS",
    help="For the choice of each automatic head, as for fit.",
)  # fmt: skip
@click.option(
    "--group-by", metavar=GROUPINGS, help="As for fit, by the rows of the first store.",
)  # fmt: skip
@no_check_option
@seed_option(
    "Of the folds of cross-validation, of heads that draw, and of the bootstrap. Which rows are scored does "
    "not depend on it."
)
@json_option
@quiet_option
def compare(stores: tuple[Path, ...], *, as_json: bool, quiet: bool, **options: Any) -> None:
    """Fit every head on every set of nodes of every STORE, and compare them on the images all stores have.

    \b
    featcache compare resnet18.h5 vit_b_16.h5            which backbone
    featcache compare a.h5 --node layer3 --node layer4   which nodes
    featcache compare a.h5 --head ridge --head logistic  which head

    Rows are joined by the bytes of their images, and split as fit splits them. Candidates are ranked by
    accuracy in cross-validation on the training rows, where fit chooses a head by its log-loss; of those
    within one standard error of the first there, the cheapest is taken. A paired bootstrap on the rows scored
    says whether the first beats each of the others or is tied with it; its intervals hold for all candidates
    together. To pick one by its score on the rows scored is to choose on them: the score of what was picked
    so is too high.
    """
    from featcache.commands.compare import compare as run
    from featcache.progress import make_progress

    emit(run(stores, progress=make_progress(quiet=quiet), **options), as_json=as_json)
