"""`evaluate` and `predict`."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterable
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
    root_option,
    seed_option,
    workers_option,
)
from featcache.errors import FeatcacheError

engine_option = click.option(
    "--engine", type=click.Choice(["auto", "torch-eager", "torch-compiled", "onnx"]), default="auto",
    show_default=True, help="What runs the backbone. auto: for a long run, the fastest that proves itself.",
)  # fmt: skip


views_option = click.option(
    "--views", type=click.IntRange(1, 1000), default=1, show_default=True, metavar="K",
    help="Average over the plain picture of each image and K - 1 augmented ones.",
)  # fmt: skip


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path), metavar="DATA_OR_STORE")
@click.option(
    "--split",
    type=click.Choice(["test", "val", "train", "all"]),
    help="The rows that are scored. Default: test where there is one, else val, else all.",
)
@click.option(
    "--abstain-below",
    type=click.FloatRange(0, 1),
    metavar="P",
    help="Also say how often, and how rightly, answers of at least this probability are given.",
)
@click.option(
    "--csv",
    "csv_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write path,label,predicted,probability,correct of every image to FILE. Of files that are "
    "there only such a table is replaced.",
)
@views_option
@json_option
@moved_weights_option
@allowed_backbone_option
@root_option
@follow_links_option
@seed_option
@device_option
@engine_option
@batch_size_option
@workers_option
@quiet_option
@click.pass_context
def evaluate(
    ctx: click.Context, /, model: Path, data: Path, *, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Score a fitted MODEL on labelled images, or on a store of their features.

    Images are a folder or a CSV, as embed takes them, and are embedded on the way. A store must hold the
    features that the model was fitted on. Classes are compared by name. Exit code 3: done, but some images
    could not be read.
    """
    from featcache.commands.evaluate import evaluate_model
    from featcache.images.decode import silence_pillow_warnings
    from featcache.progress import make_progress

    if options["csv_file"] == Path("-"):
        raise click.UsageError("evaluate prints scores: --csv takes the name of a file, not -.")
    silence_pillow_warnings()
    result = evaluate_model(model, data, progress=make_progress(quiet=quiet), **options)
    emit(result, as_json=as_json)
    if result.failed:
        ctx.exit(DONE_WITH_SKIPS)


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument(
    "images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE_OR_FOLDER..."
)
@click.option(
    "--top-k", type=click.IntRange(1), default=5, show_default=True, help="Classes listed per image."
)
@views_option
@click.option(
    "--abstain-below",
    type=click.FloatRange(0, 1),
    default=0.0,
    metavar="P",
    help="Give no label to an image whose most probable class is less probable.",
)
@click.option(
    "--csv", "csv_file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True), metavar="FILE",
    help="Also write path,label,guess,probability,error of every image to FILE, or print them alone: -. The "
    "label is empty below --abstain-below, the guess stays. Of files that are there only such a table is "
    "replaced.",
)  # fmt: skip
@json_option
@click.option("--jsonl", "as_jsonl", is_flag=True, help="Print a JSON object a line, whole at any moment.")
@moved_weights_option
@allowed_backbone_option
@follow_links_option
@seed_option
@device_option
@engine_option
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
    as_jsonl: bool,
    csv_file: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Predict the class of images with a fitted MODEL.

    Images are preprocessed as the model's store was, and embedded by the same backbone with the same
    weights, or refused. Answers are printed as they come. Exit code 3: done, but some images could not be
    read.
    """
    from featcache.commands import predict as verb
    from featcache.images.decode import silence_pillow_warnings
    from featcache.outputs import require_csv
    from featcache.progress import make_progress

    silence_pillow_warnings()
    as_csv = csv_file == Path("-")
    if as_json + as_jsonl + as_csv > 1:
        raise click.UsageError("--json, --jsonl and --csv - exclude one another.")
    if csv_file is not None and not as_csv:
        require_csv(csv_file, verb.CSV_HEADER, option="--csv", needed={"the model": model})
    # On a terminal the answers are the progress.
    progress = make_progress(quiet=quiet or sys.stdout.isatty())
    stream = verb.iter_predictions(model, images, progress=progress, **options)
    told = stream if csv_file is None or as_csv else verb.written_to_csv(stream, csv_file)
    if as_csv:
        _write_pieces(verb.csv_lines(told))
    elif as_json:
        _write_pieces(verb.json_list(told))
    elif as_jsonl:
        _write_pieces(verb.json_lines(told))
    else:
        _write_pieces(verb.text_lines(told, width=stream.width))
    for note in stream.notes:
        click.echo(note, err=as_json or as_jsonl or as_csv)
    if stream.failed:
        ctx.exit(DONE_WITH_SKIPS)


def _write_pieces(pieces: Iterable[str]) -> None:
    """Print pieces of text as they come; FeatcacheError where there is no room for one."""
    for number, piece in enumerate(pieces):
        try:
            click.echo(piece, nl=False)
        except OSError as exc:
            if exc.errno == errno.EPIPE:
                raise  # click ends quietly when nobody reads on
            raise FeatcacheError(
                f"the answer cannot be written beyond line {number:,}: {exc.strerror}. "
                "Say where to with `> FILE`."
            ) from exc
