"""`embed` and `plan`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click

from featcache.cli.group import DONE_WITH_SKIPS, emit, main
from featcache.cli.options import (
    dry_run_option,
    embed_options,
    json_option,
    max_failures_option,
    prune_option,
    quiet_option,
    shard_option,
)

_DEFAULT = "resnet18"


@main.command(short_help="Embed images into feature stores, only what they lack.")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(dir_okay=False), metavar="STORE.h5",
    help="The feature store to make or to bring up to date. {backbone} in it, as in 'photos.{backbone}.h5', "
    "stands for the name of each --backbone, which then has a store of its own.",
)  # fmt: skip
@click.option(
    "--backbone", "backbones", multiple=True, metavar="NAME",
    help="A name of `featcache backbones`, NAME@WEIGHTS, or your own module:function; repeatable: each has a "
    f"store, and images are decoded once. Default: the store's own; of a new store {_DEFAULT}, whose weights "
    "are downloaded (45 MB) unless they are here.",
)  # fmt: skip
@embed_options
@click.option(
    "--isolate", is_flag=True,
    help="Decode in processes, so that an image that crashes its decoder costs its row and not the run.",
)  # fmt: skip
@max_failures_option
@prune_option
@shard_option
@dry_run_option
@json_option
@quiet_option
@click.pass_context
def embed(
    ctx: click.Context,
    /,
    data: Path,
    *,
    output: str,
    backbones: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Embed the images of DATA into a feature store, computing only what is not there yet.

    DATA is a folder of class folders, the same under train/ val/ test/, or a CSV with the columns
    path,label[,split]. The same command again goes on where a run stopped and embeds only images that are
    new or changed. Exit code 3: done, but some images failed.
    """
    from featcache.commands.embed import EmbedResults, embed_together
    from featcache.commands.embed import embed as run
    from featcache.images.decode import silence_pillow_warnings
    from featcache.progress import make_progress
    from featcache.update import EmbedResult

    silence_pillow_warnings()
    options["nodes"] = options["nodes"] or None
    outputs = _store_names(output, backbones)
    if len(outputs) > 1 and options["weights"] not in (None, "random"):
        raise click.UsageError("--weights FILE is of one backbone: embed it in a run of its own.")
    options["progress"] = make_progress(quiet=quiet)
    if len(outputs) == 1:
        ((name, store),) = outputs.items()
        results: tuple[EmbedResult, ...] = (run(data, store, backbone=name, **options),)
    else:
        results = embed_together(data, {str(name): store for name, store in outputs.items()}, **options)
    emit(results[0] if len(results) == 1 else EmbedResults(results), as_json=as_json)
    if any(result.failed for result in results):
        ctx.exit(DONE_WITH_SKIPS)


def _store_names(output: str, backbones: tuple[str, ...]) -> dict[str | None, Path]:
    """{backbone: its store}, None where none is named; usage errors where two of them would have one."""
    for other in set(re.findall(r"\{\w*\}", output)) - {"{backbone}"}:
        raise click.UsageError(f"{other} in --output is not known; {{backbone}} is where the name goes.")
    if not backbones and "{backbone}" not in output:
        return {None: Path(output)}
    names = dict.fromkeys(backbones or (_DEFAULT,))
    if len(names) > 1 and "{backbone}" not in output:
        raise click.UsageError(
            f"{len(names)} backbones need a store each: write {{backbone}} where their names go, "
            "such as -o 'photos.{backbone}.h5'."
        )
    # A name may hold what a file name cannot.
    stores = {name: Path(output.replace("{backbone}", re.sub(r"[/:\\]", ".", name))) for name in names}
    if len({os.path.realpath(store) for store in stores.values()}) < len(stores):
        raise click.UsageError(
            "two of the backbones would have one store: " + ", ".join(map(str, stores.values()))
        )
    return dict(stores.items())


@main.command(short_help="Say what embedding will take, and what is the wall.")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="STORE.h5",
    help="A store, there or not: what it has is not embedded again.",
)  # fmt: skip
@click.option(
    "--backbone", "backbones", multiple=True, metavar="NAME", help="As for embed, but one of them.",
)  # fmt: skip
@embed_options
@json_option
@quiet_option
def plan(
    data: Path,
    *,
    output: Path | None,
    backbones: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Say what `embed` with the same options will take: time, disk, memory, and the stage that is the wall.

    Does what embed does, but embeds images from all over DATA for about two seconds only, and writes nothing.
    """
    from featcache.commands.plan import plan as run
    from featcache.images.decode import silence_pillow_warnings
    from featcache.progress import make_progress

    silence_pillow_warnings()
    options["nodes"] = options["nodes"] or None
    if len(backbones) > 1:
        raise click.UsageError(
            "plan takes one --backbone: plan each by itself. In one pass together they take less than the "
            "sum, by what decoding takes."
        )
    options["backbone"] = backbones[0] if backbones else None
    if output is not None:
        ((options["backbone"], options["output"]),) = _store_names(str(output), backbones).items()
    emit(run(data, progress=make_progress(quiet=quiet), **options), as_json=as_json)
