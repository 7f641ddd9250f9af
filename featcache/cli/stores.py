"""`verify`, `repair`, `merge`, `explain` and `info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache.cli.group import DONE_WITH_SKIPS, emit, main
from featcache.cli.options import (
    SEED,
    allowed_backbone_option,
    batch_size_option,
    device_option,
    dry_run_option,
    follow_links_option,
    json_option,
    max_failures_option,
    moved_data_option,
    moved_weights_option,
    quiet_option,
    root_option,
    seed_option,
    workers_option,
)


@main.command(short_help="Compare a store with its checksums and images.")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--sources", is_flag=True, help="Compare every image with the bytes that were embedded.")
@click.option(
    "--recompute", type=click.IntRange(0), default=0, metavar="K",
    help="Embed K rows, drawn at random, again and compare them.",
)  # fmt: skip
@moved_data_option
@root_option
@allowed_backbone_option
@moved_weights_option
@seed_option
@device_option
@batch_size_option
@workers_option
@json_option
@quiet_option
@click.pass_context
def verify(ctx: click.Context, /, store: Path, *, as_json: bool, quiet: bool, **options: Any) -> None:
    """Compare every byte of STORE with its checksums, and with its images and backbone if asked to.

    Exit code 1: something is damaged, or images or features are not what they were. Exit code 3: all agrees,
    but some rows are not embedded yet.
    """
    from featcache.commands.verify import verify as run
    from featcache.images.decode import silence_pillow_warnings
    from featcache.progress import make_progress

    silence_pillow_warnings()
    result = run(store, progress=make_progress(quiet=quiet), **options)
    emit(result, as_json=as_json)
    if not result.sound:
        ctx.exit(1)
    if result.pending:
        ctx.exit(DONE_WITH_SKIPS)


@main.command(short_help="Embed damaged, failed and pending rows again.")
@click.argument("store", type=click.Path(path_type=Path))
@moved_data_option
@root_option
@allowed_backbone_option
@moved_weights_option
@device_option
@batch_size_option
@workers_option
@max_failures_option
@dry_run_option
@json_option
@quiet_option
@click.pass_context
def repair(ctx: click.Context, /, store: Path, *, as_json: bool, quiet: bool, **options: Any) -> None:
    """Embed the rows of STORE again that are damaged, failed or not embedded yet, and no others.

    The images are found by the store's own ids where they were embedded from, or in --data. Rows that are
    sound stay as they are, whatever became of their images. Exit code 3: done, but some images still fail.
    """
    from featcache.commands.repair import repair as run
    from featcache.images.decode import silence_pillow_warnings
    from featcache.progress import make_progress

    silence_pillow_warnings()
    result = run(store, progress=make_progress(quiet=quiet), **options)
    emit(result, as_json=as_json)
    if result.failed:
        ctx.exit(DONE_WITH_SKIPS)


@main.command(short_help="Join stores of one spec, such as shards, into one.")
@click.argument("stores", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="STORE.h5...")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), metavar="STORE.h5",
    help="The feature store to make; it may be one of those to join.",
)  # fmt: skip
@json_option
@click.pass_context
def merge(ctx: click.Context, /, stores: tuple[Path, ...], *, output: Path, as_json: bool) -> None:
    """Join complete stores of one spec by the ids of their images. Needs neither torch nor the images.

    For shards that were embedded on machines without a common disk; on one disk `embed --shard` joins them
    itself. Stores that disagree on an image, or lack a shard, are refused. Exit code 3: done, but some rows
    have no features.
    """
    from featcache.commands.merge import merge as run

    result = run(stores, output)
    emit(result, as_json=as_json)
    if result.failed:
        ctx.exit(DONE_WITH_SKIPS)


@main.command(short_help="Say what features are of, and what is reused.")
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("other", required=False, type=click.Path(path_type=Path), metavar="[OTHER.h5]")
@click.option(
    "--data", type=click.Path(path_type=Path), metavar="DATA",
    help="Say why each image of this folder or CSV would be reused or embedded.",
)  # fmt: skip
@click.option(
    "--row", metavar="PATH", help="Tell all there is to one row, by its path below the data's root."
)
@root_option
@follow_links_option
@click.option(
    "--backbone", metavar="NAME", help="Compare with what `embed --backbone NAME` asks for, and so on below."
)
@click.option("--weights", metavar="FILE|random", help="As for embed; by default as the store was made.")
@click.option(
    "--seed", type=SEED,
    help="Of random weights; by default as the store was made.",
)  # fmt: skip
@click.option(
    "--node", "nodes", multiple=True, metavar="NAME[:avg|max|cls|flat]",
    help="As for embed, repeatable; by default as the store was made.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the forward pass; by default as the store was made.",
)  # fmt: skip
@click.option(
    "--store-dtype", type=click.Choice(["float32", "float16"]),
    help="Of the stored features; by default as the store was made.",
)  # fmt: skip
@workers_option
@json_option
@quiet_option
def explain(store: Path, other: Path | None, *, as_json: bool, quiet: bool, **options: Any) -> None:
    """Say what determines the features of STORE, or how it differs from OTHER.h5 or from embed's options.

    \b
    featcache explain a.h5                       what makes the fingerprint, and what does not
    featcache explain a.h5 b.h5                  which fields and rows differ
    featcache explain a.h5 --backbone resnet50   what that would change
    featcache explain a.h5 --data photos/        why each image would be reused or embedded

    Exit code 0 whether or not anything differs.
    """
    from featcache.commands.explain import explain as run
    from featcache.images.decode import silence_pillow_warnings
    from featcache.progress import make_progress

    silence_pillow_warnings()
    others = (value for name, value in options.items() if name != "workers")
    if other is not None and any(value not in (None, ()) and value is not False for value in others):
        raise click.UsageError("OTHER.h5 excludes --data, --row and the options of embed.")
    emit(run(store, other, progress=make_progress(quiet=quiet), **options), as_json=as_json)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def info(file: Path, *, as_json: bool) -> None:
    """Say what a store or model FILE is. Needs neither torch nor the images."""
    from featcache.commands.info import info as run

    emit(run(file), as_json=as_json)
