"""The command line: options in, one call, text or --json out. Nothing else.

Exit codes: 0 done, 1 a known failure (one line on stderr), 2 wrong usage, 3 done but some images failed,
130 and 143 interrupted by Ctrl-C or SIGTERM. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from featcache.disk import keep_standard_streams
from featcache.errors import FeatcacheError

DONE_WITH_SKIPS = 3


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C but for the exit code."""


def _terminate(signum: int, frame: object) -> NoReturn:
    raise _Terminated


class _Verbs(click.Group):
    """Turns what is known into one line and an exit code, once for all commands."""

    def invoke(self, ctx: click.Context) -> Any:
        keep_standard_streams()
        signal.signal(signal.SIGTERM, _terminate)
        try:
            _require_folder()
            return super().invoke(ctx)
        except FeatcacheError as exc:
            _say_lines(f"Error: {exc}", exc)
            ctx.exit(1)
        except KeyboardInterrupt as exc:
            _say_lines("Interrupted.", exc)
            ctx.exit(143 if isinstance(exc, _Terminated) else 130)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _require_folder() -> None:
    try:
        os.getcwd()
    except OSError as exc:
        raise FeatcacheError(
            f"the current folder cannot be found ({exc.strerror}): go to another one."
        ) from exc


def _say_lines(first: str, exc: BaseException) -> None:
    click.echo("\n".join([first, *(f"  {note}" for note in getattr(exc, "__notes__", ()))]), err=True)


def _emit(result: Any, *, as_json: bool) -> None:
    text = json.dumps(result.to_json(), allow_nan=False) if as_json else result.describe()
    try:
        click.echo(text)
    except BrokenPipeError:
        raise  # click ends quietly when nobody reads on
    except OSError as exc:
        raise FeatcacheError(
            f"all is done, but the answer cannot be written: {exc.strerror}. Say where to with `> FILE`."
        ) from exc


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON on stdout and nothing else there."
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress.")
follow_links_option = click.option(
    "--follow-links", is_flag=True, help="Follow symbolic links that lead out of the folder."
)
device_option = click.option(
    "--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda, cuda:1 or mps."
)
batch_size_option = click.option(
    "--batch-size", type=click.IntRange(1, 65_536), help="Images in one forward pass; by default by device."
)
workers_option = click.option(
    "--workers", type=click.IntRange(1, 1024), help="Decoding threads; by default one a processor."
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of all that is drawn at random: random weights, augmented views, splits.",
)
root_option = click.option(
    "--root", type=click.Path(path_type=Path, file_okay=False), help="What a CSV's paths are relative to."
)
max_failures_option = click.option(
    "--max-failures", type=click.FloatRange(0, 1), default=0.01, show_default=True,
    help="The fraction of images that may fail before the run stops.",
)  # fmt: skip
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")
moved_data_option = click.option(
    "--data", type=click.Path(path_type=Path), metavar="DATA",
    help="The folder or CSV of the images, where they are not where they were embedded from.",
)  # fmt: skip
moved_weights_option = click.option(
    "--weights", metavar="FILE", help="The backbone's weights file, where it has moved."
)
allowed_backbone_option = click.option(
    "--backbone", metavar="module:function", help="Allow the backbone code that the file names to be run."
)


def _choose_shard(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    from featcache.sharding import Shard, shard_of_environment

    if value is None:
        return shard_of_environment(os.environ)
    try:
        return Shard.parse(value)
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from exc


shard_option = click.option(
    "--shard", metavar="INDEX/COUNT", callback=_choose_shard,
    help="Embed this part of the images, and join all parts once they are there. 0/1: all of them. "
    "Default: as torchrun or Slurm says.",
)  # fmt: skip


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="featcache")
def main() -> None:
    """Embed an image data set once with a frozen backbone; train heads on the cached features in seconds.

    \b
    featcache embed photos/ -o photos.h5 --backbone resnet18
    featcache fit photos.h5 -o photos.model
    featcache predict photos.model new/*.jpg
    """


# What determines features and how they are computed, the same for `embed` and `plan`.
_EMBED_OPTIONS = (
    click.option(
        "--weights", metavar="FILE|random",
        help="A .safetensors or .pth file instead of the pretrained weights, or seeded random ones.",
    ),
    seed_option,
    click.option(
        "--node", "nodes", multiple=True, metavar="NAME[:avg|max|cls]",
        help="A node of the backbone's graph; repeatable. Default: the penultimate features.",
    ),
    click.option(
        "--views", type=click.IntRange(1, 1000), default=1, show_default=True, metavar="K",
        help="Vectors of each image: of the plain one and of K - 1 augmented ones.",
    ),
    root_option,
    follow_links_option,
    device_option,
    click.option(
        "--precision", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32",
        show_default=True, help="Of the forward pass.",
    ),
    click.option(
        "--store-dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True,
        help="Of the stored features.",
    ),
    click.option(
        "--jpeg-scaled", "jpeg", is_flag=True, flag_value="scaled", default="full",
        help="Let the decoder shrink large JPEGs: faster, and other features.",
    ),
    click.option(
        "--engine", type=click.Choice(["auto", "torch-eager", "torch-compiled", "onnx"]), default="auto",
        show_default=True,
        help="What runs the backbone. auto: the store's own; for a new store the fastest that proves itself.",
    ),
    click.option(
        "--decoder", type=click.Choice(["auto", "exact", "fast"]), default="auto", show_default=True,
        help="What resizes images: exactly as torchvision on PIL images, or within 2 of 255 of it.",
    ),
    batch_size_option,
    workers_option,
)  # fmt: skip


def embed_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_EMBED_OPTIONS):
        command = option(command)
    return command


@main.command(short_help="Embed images into feature stores, only what they lack.")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(dir_okay=False), metavar="STORE.h5",
    help="The feature store to make or to bring up to date; with {backbone} in it, one for each backbone.",
)  # fmt: skip
@click.option(
    "--backbone", "backbones", multiple=True, default=("resnet18",), show_default=True, metavar="NAME",
    help="A name of `featcache backbones`, NAME@WEIGHTS, or your own module:function; repeatable: each has a "
    "store, and images are decoded once.",
)  # fmt: skip
@embed_options
@click.option(
    "--isolate", is_flag=True,
    help="Decode in processes, so that an image that crashes its decoder costs its row and not the run.",
)  # fmt: skip
@max_failures_option
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
    from featcache.images.decode import silence_pillow_warnings
    from featcache.progress import make_progress
    from featcache.spec import PENULTIMATE

    silence_pillow_warnings()
    options["nodes"] = options["nodes"] or (PENULTIMATE,)
    outputs = _store_names(output, backbones)
    if len(outputs) > 1 and options["weights"] not in (None, "random"):
        raise click.UsageError("--weights FILE is of one backbone: embed it in a run of its own.")
    results = embed_together(data, outputs, progress=make_progress(quiet=quiet), **options)
    _emit(results[0] if len(results) == 1 else EmbedResults(results), as_json=as_json)
    if any(result.failed for result in results):
        ctx.exit(DONE_WITH_SKIPS)


def _store_names(output: str, backbones: tuple[str, ...]) -> dict[str, Path]:
    """{backbone: its store}; usage errors where two of them would have one."""
    names = dict.fromkeys(backbones)
    for other in set(re.findall(r"\{\w*\}", output)) - {"{backbone}"}:
        raise click.UsageError(f"{other} in --output is not known; {{backbone}} is where the name goes.")
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
    return stores


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
    _emit(result, as_json=as_json)
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
    _emit(result, as_json=as_json)
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
    _emit(result, as_json=as_json)
    if result.failed:
        ctx.exit(DONE_WITH_SKIPS)


@main.command(short_help="Say what embedding will take, and what is the wall.")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="STORE.h5",
    help="A store, there or not: what it has is not embedded again.",
)  # fmt: skip
@click.option(
    "--backbone", "backbones", multiple=True, default=("resnet18",), show_default=True, metavar="NAME",
    help="As for embed, but one of them.",
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
    from featcache.spec import PENULTIMATE

    silence_pillow_warnings()
    options["nodes"] = options["nodes"] or (PENULTIMATE,)
    if len(backbones) > 1:
        raise click.UsageError(
            "plan takes one --backbone: plan each by itself. In one pass together they take less than the "
            "sum, by what decoding takes."
        )
    options["backbone"] = backbones[0]
    if output is not None:
        options["output"] = _store_names(str(output), backbones)[backbones[0]]
    _emit(run(data, progress=make_progress(quiet=quiet), **options), as_json=as_json)


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
@click.option("--seed", type=click.IntRange(0), help="Of random weights; by default as the store was made.")
@click.option(
    "--node", "nodes", multiple=True, metavar="NAME[:avg|max|cls]",
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
    _emit(run(store, other, progress=make_progress(quiet=quiet), **options), as_json=as_json)


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
    _emit(result, as_json=as_json)


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
        _emit(result, as_json=as_json)
    if result.failed:
        ctx.exit(DONE_WITH_SKIPS)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def info(file: Path, *, as_json: bool) -> None:
    """Say what a store or model FILE is. Needs neither torch nor the images."""
    from featcache.commands.info import info as run

    _emit(run(file), as_json=as_json)


@main.command(short_help="List the networks, and whose weights are here.")
@json_option
def backbones(*, as_json: bool) -> None:
    """List the backbones: dimension, parameters, where their weights come from and whether they are here."""
    from featcache.commands.backbones import backbones as run

    _emit(run(), as_json=as_json)


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
