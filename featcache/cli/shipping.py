"""`export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache.cli.group import emit, main
from featcache.cli.options import allowed_backbone_option, json_option, moved_weights_option, quiet_option


@main.command(short_help="Write a model, or a store's features, for other tools.")
@click.argument("source", type=click.Path(path_type=Path), metavar="MODEL_OR_STORE")
@click.option(
    "--to", required=True, metavar="FORMAT",
    help="torchvision, onnx, torch or safetensors for a model; features for a store.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="The file to write; a model's card goes to FILE.md beside it. For features .npz or .parquet.",
)  # fmt: skip
@click.option(
    "--input", "pixels", type=click.Choice(["uint8", "float"]),
    help="What an onnx or torch graph takes: uint8 pixels, channels last (the default), or floats from 0 to "
    "1, channels first. Normalisation is in the graph.",
)  # fmt: skip
@click.option(
    "--images", multiple=True, type=click.Path(path_type=Path), metavar="PATH",
    help="Images, files or folders, to check the file on; repeatable. Default: some it was made from.",
)  # fmt: skip
@moved_weights_option
@allowed_backbone_option
@json_option
@quiet_option
def export(source: Path, *, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write a fitted model, or the features of a store, in a file that others read without featcache.

    The file is read back by the tools it is for and compared with featcache on real images: where a
    probability is more than 1e-4 apart, or another class is named, there is no file.
    """
    from featcache.commands.export import export as run
    from featcache.images.decode import silence_pillow_warnings
    from featcache.progress import make_progress

    silence_pillow_warnings()
    emit(run(source, progress=make_progress(quiet=quiet), **options), as_json=as_json)
