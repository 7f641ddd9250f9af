"""`backbones` and `demo`."""

from __future__ import annotations

from pathlib import Path

import click

from featcache.cli.group import emit, main
from featcache.cli.options import (
    json_option,
    quiet_option,
)


@main.command(short_help="List the networks, or the nodes of one.")
@click.argument("name", required=False)
@json_option
def backbones(name: str | None, *, as_json: bool) -> None:
    """List the backbones: dimension, parameters, where their weights come from and whether they are here.

    With the NAME of one: its nodes, which `embed --node` takes, and each set of weights with its licence.
    Downloads nothing.
    """
    from featcache.commands.backbones import backbones as run
    from featcache.commands.backbones import describe_backbone

    emit(run() if name is None else describe_backbone(name), as_json=as_json)


@main.command(short_help="Show the whole way on photographs of fruit.")
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), default=Path("featcache-demo"),
    show_default=True, help="Where the photographs, the store and the model go.",
)  # fmt: skip
@quiet_option
def demo(folder: Path, *, quiet: bool) -> None:
    """Show the whole way on real photographs of 14 kinds of fruit: embed, fit, predict."""
    from featcache.demo import demo as run
    from featcache.progress import make_progress

    run(folder, progress=make_progress(quiet=quiet), say=click.echo)
