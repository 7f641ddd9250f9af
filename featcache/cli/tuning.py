"""`finetune`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from featcache.cli.group import emit, main
from featcache.cli.options import (
    allowed_backbone_option,
    device_option,
    follow_links_option,
    json_option,
    moved_weights_option,
    quiet_option,
    root_option,
    workers_option,
)
from featcache.tuning.settings import Settings

_DEFAULT = Settings()


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
        "The head to begin with: MODEL's kind, fitted without the val rows; MODEL's own; random weights.",
    ),
    _setting("epochs", click.IntRange(1), "Passes over the training rows, at most."),
    _setting("patience", click.IntRange(1), "Epochs without gain on val after which training ends."),
    _setting("batch_size", click.IntRange(1, 65_536), "Rows in a step, of all ranks together."),
    _setting("lr", click.FloatRange(0), "Highest learning rate of the last block."),
    _setting("head_lr", click.FloatRange(0), "Highest learning rate of the head."),
    _setting("layer_decay", click.FloatRange(0, 1), "Its rate, from a block to the one before it."),
    _setting("warmup", click.FloatRange(0, 1), "The share of steps on which the rates rise; then a cosine."),
    _setting("weight_decay", click.FloatRange(0), "Of AdamW; norms and biases have none."),
    _setting("label_smoothing", click.FloatRange(0, 1), "The share of a label spread over all classes."),
    _setting("mixup", click.FloatRange(0), "Alpha of mixup at the cut; 0: none."),
    _setting("clip", click.FloatRange(0), "The highest norm of the gradient; 0: any."),
    _setting("ema", click.FloatRange(0, 1), "Decay of the weights' moving average, which is kept; 0: none."),
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
    _setting("seed", click.IntRange(0), "Of all that is drawn at random."),
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
    "--cache", type=click.Choice(["auto", "yes", "no"]), default="auto", show_default=True,
    help="Keep the activations at the cut in MODEL2.tail.h5, and train from there. auto: if that is faster.",
)  # fmt: skip
@click.option(
    "--store-dtype", type=click.Choice(["float32", "float16"]), default="float16", show_default=True,
    help="Of the cached activations.",
)  # fmt: skip
@click.option("--restart", is_flag=True, help="Begin again, whatever checkpoint there is.")
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

    MODEL2 is the best of the start, of what was trained and of weights between them on the val rows, so that
    it is MODEL again where fine-tuning gains nothing; the test rows are scored once. The same command goes on
    after an interruption. Under torchrun the ranks train together.
    """
    from featcache.commands.finetune import finetune as run
    from featcache.images.decode import silence_pillow_warnings
    from featcache.progress import make_progress
    from featcache.tuning.ranks import is_first_rank

    silence_pillow_warnings()
    result = run(model, data, progress=make_progress(quiet=quiet), **options)
    if is_first_rank():
        emit(result, as_json=as_json)
