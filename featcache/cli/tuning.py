"""`finetune`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from featcache.cli.group import emit, main
from featcache.cli.options import (
    GROUPINGS,
    SEED,
    allowed_backbone_option,
    device_option,
    follow_links_option,
    json_option,
    max_failures_option,
    moved_weights_option,
    quiet_option,
    root_option,
    workers_option,
)
from featcache.tuning.settings import Settings

_DEFAULT = Settings()


class _Finite(click.FloatRange):
    """A number in a range: infinity and nan are in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def _setting(name: str, kind: Any, said: str, **more: Any) -> Any:
    """The option of a field of `Settings`, with its default."""
    return click.option(
        "--" + name.replace("_", "-"), name, type=kind, default=getattr(_DEFAULT, name), show_default=True,
        help=said, **more,
    )  # fmt: skip


SETTINGS = (
    _setting(
        "unfreeze", str, "Trained besides the head: all, the last K blocks, or a node and all after it.",
        metavar="all|last:K|NODE",
    ),
    _setting(
        "start", click.Choice(["refit", "model", "random"]),
        "The head to begin with: MODEL's fitted without the choice rows, MODEL's own, a random one.",
    ),
    _setting("epochs", click.IntRange(1), "Passes over the training rows, at most."),
    _setting(
        "patience", click.IntRange(1),
        "Epochs without gain on the choice rows, in accuracy or, where that is the same, in log-loss, after "
        "which training ends.",
    ),
    _setting("batch_size", click.IntRange(1, 65_536), "Rows in a step, of all ranks together."),
    _setting(
        "lr", _Finite(0),
        "Highest learning rate of the last block. The default was tried on convolutional networks only.",
    ),
    _setting("head_lr", _Finite(0), "Highest learning rate of the head."),
    _setting("layer_decay", _Finite(0, 1), "Its rate, from a block to the one before it."),
    _setting("warmup", _Finite(0, 1), "The share of steps on which the rates rise; then a cosine."),
    _setting("weight_decay", _Finite(0), "Of AdamW; norms and biases have none."),
    _setting("label_smoothing", _Finite(0, 1), "The share of a label spread over all classes."),
    _setting("mixup", _Finite(0), "Alpha of mixup at the cut; 0: none."),
    _setting("clip", _Finite(0), "The highest norm of the gradient; 0: any."),
    _setting("ema", _Finite(0, 1), "Decay of the weights' moving average, which is kept; 0: none."),
    _setting(
        "views", click.IntRange(1, 1000),
        "Pictures of each image to train on: the plain one and K - 1 augmented ones. Where activations are "
        "not cached, 2 or more: another augmented one every epoch.",
        metavar="K",
    ),
    click.option(
        "--trivial-augment", is_flag=True,
        help="Change each picture in a way drawn every epoch; activations cannot be cached then.",
    ),
    _setting("batch_norm", click.Choice(["frozen", "trained"]), "The statistics of batch norms."),
    _setting("precision", click.Choice(["float32", "bfloat16"]), "Of the arithmetic."),
    _setting(
        "seed", SEED,
        "Of all that is drawn at random; cached pictures are drawn by the seed that MODEL's store had.",
    ),
)  # fmt: skip


def _settings(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(SETTINGS):
        command = option(command)
    return command


@main.command(short_help="Train the last blocks of a model's network.")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), metavar="MODEL2",
    help="The model file to write; its report, curve and cached activations go beside it.",
)  # fmt: skip
@_settings
@click.option(
    "--group-by", metavar=GROUPINGS,
    help="As for fit: a group is trained on, chosen on or scored as a whole. similar: by what MODEL's head "
    "gets.",
)  # fmt: skip
@click.option(
    "--cache", type=click.Choice(["auto", "yes", "no"]), default="auto", show_default=True,
    help="Keep the activations at the cut in MODEL2.tail.h5, and train from there. auto: if that is faster.",
)  # fmt: skip
@click.option(
    "--store-dtype", type=click.Choice(["float32", "float16"]), default="float16", show_default=True,
    help="Of the cached activations.",
)  # fmt: skip
@click.option("--restart", is_flag=True, help="Begin again, whatever checkpoint or model there is.")
@click.option(
    "--forget", is_flag=True, help="Train though DATA lacks classes of MODEL, which MODEL2 will not know."
)
@max_failures_option
@root_option
@follow_links_option
@moved_weights_option
@allowed_backbone_option
@device_option
@workers_option
@json_option
@quiet_option
def finetune(model: Path, data: Path, *, as_json: bool, quiet: bool, **options: Any) -> None:
    """Fine-tune the network of MODEL on the images of DATA, from MODEL's fitted linear head.

    Which weights to keep is chosen on the choice rows: the val split where DATA has a test split as well,
    else about a fifth of the training rows, which are not trained on then. MODEL2 has the best there of the
    start, of what was trained and of weights between them, so that it is MODEL again where fine-tuning gains
    nothing. The rows scored (the test split, else val, else some held out) are looked at once, at the end, by
    MODEL and by MODEL2.

    The same command goes on after an interruption, and does nothing once it is done. Under torchrun the ranks
    train together.
    """
    from featcache.commands.finetune import finetune as run
    from featcache.images.decode import silence_pillow_warnings
    from featcache.progress import make_progress
    from featcache.tuning.launched import errors_told_once, is_first_rank

    silence_pillow_warnings()
    with errors_told_once():
        result = run(model, data, progress=make_progress(quiet=quiet), **options)
    if is_first_rank():
        emit(result, as_json=as_json)
