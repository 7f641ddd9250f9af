"""`predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache.cli.group import DONE_WITH_SKIPS, emit, main
from featcache.cli.options import (
    allowed_backbone_option,
    batch_size_option,
    device_option,
    follow_links_option,
    json_option,
    moved_weights_option,
    quiet_option,
    workers_option,
)


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument(
    "images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE_OR_FOLDER..."
)
@click.option(
    "--top-k", type=click.IntRange(1), default=5, show_default=True, help="Classes listed per image."
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV: path,label,probability,error.")
@json_option
@moved_weights_option
@allowed_backbone_option
@follow_links_option
@device_option
@batch_size_option
@workers_option
@quiet_option
@click.pass_context
def predict(
    ctx: click.Context,
    /,
    model: Path,
    images: tuple[Path, ...],
    *,
    as_json: bool,
    as_csv: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Predict the class of images with a fitted MODEL.

    Images are preprocessed as the model's store was, and embedded by the same backbone with the same
    weights, or refused. Exit code 3: done, but some images could not be read.
    """
    from featcache.commands.predict import predict as run
    from featcache.images.decode import silence_pillow_warnings
    from featcache.progress import make_progress

    silence_pillow_warnings()
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other.")
    result = run(model, images, progress=make_progress(quiet=quiet), **options)
    if as_csv:
        click.echo(result.to_csv(), nl=False)
    else:
        emit(result, as_json=as_json)
    if result.failed:
        ctx.exit(DONE_WITH_SKIPS)
