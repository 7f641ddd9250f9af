"""`fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache.cli.group import emit, main
from featcache.cli.options import (
    json_option,
    quiet_option,
    seed_option,
)


@main.command(short_help="Choose, fit and score a head on cached features.")
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="MODEL",
    help="The model file to write; the report goes to MODEL.json beside it.",
)  # fmt: skip
@click.option(
    "--head", default="logistic", show_default=True, metavar="NAME",
    help="logistic, ridge, knn, ncm, linear, or sklearn:CLASS for any scikit-learn classifier.",
)  # fmt: skip
@click.option(
    "--param", "params", multiple=True, metavar="KEY=VALUE",
    help="A parameter of the head; repeatable. Giving the one that is searched ends the search.",
)  # fmt: skip
@click.option("--node", metavar="KEY", help="The node of the store to use; by default its first.")
@click.option(
    "--no-check", "check", is_flag=True, flag_value=False, default=True,
    help="Do not compare the store with its checksums first.",
)  # fmt: skip
@seed_option
@json_option
@quiet_option
def fit(store: Path, *, as_json: bool, quiet: bool, params: tuple[str, ...], **options: Any) -> None:
    """Choose and fit a head on the cached features of STORE, and score it once on held-out images.

    The regularisation is chosen by cross-validation on the training rows. The test split is scored, or val
    where there is no test; without splits a fifth of the images is held out by the hash of their bytes.
    """
    from featcache.commands.fit import fit as run
    from featcache.progress import make_progress

    pairs = [param.partition("=") for param in params]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise click.BadParameter(f"{wrong[0]!r} is not KEY=VALUE.", param_hint="--param")
    result = run(
        store, params={key: value for key, _, value in pairs}, progress=make_progress(quiet=quiet), **options
    )
    emit(result, as_json=as_json)
