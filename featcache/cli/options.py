"""Options that several verbs share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

SEED = click.IntRange(0, (1 << 63) - 1)  # what torch draws by

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
    type=SEED,
    default=0,
    show_default=True,
    help="Of all that is drawn at random: random weights, augmented views, splits.",
)
no_check_option = click.option(
    "--no-check", "check", is_flag=True, flag_value=False, default=True,
    help="Do not compare stores with their checksums first.",
)  # fmt: skip
root_option = click.option(
    "--root", type=click.Path(path_type=Path, file_okay=False), help="What a CSV's paths are relative to."
)
max_failures_option = click.option(
    "--max-failures", type=click.FloatRange(0, 1), default=0.01, show_default=True,
    help="The fraction of images that may fail before the run stops.",
)  # fmt: skip
prune_option = click.option(
    "--prune", is_flag=True,
    help="Remove rows of images that are gone even where they are half of the store or more; without it "
    "that is refused, for it is what another folder looks like.",
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


GROUPINGS = "folder|folder:N|FILE.csv:COLUMN|similar[:COSINE]"


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


_OWN = "Default: the store's own; of a new store"

# What determines features and how they are computed, the same for `embed` and `plan`.
EMBED_OPTIONS = (
    click.option(
        "--weights", metavar="FILE|random",
        help="A .safetensors or .pth file, for where there is no internet, or seeded random ones. "
        f"{_OWN} the pretrained ones; `featcache backbones NAME` says where they are from.",
    ),
    click.option(
        "--seed", type=SEED,
        help=f"Of random weights and of augmented views. {_OWN} 0.",
    ),
    click.option(
        "--node", "nodes", multiple=True, metavar="NAME[:avg|max|cls|flat]",
        help=f"A node of the backbone's graph; repeatable. {_OWN} the penultimate features.",
    ),
    click.option(
        "--views", type=click.IntRange(1, 1000), metavar="K",
        help=f"Vectors of each image: of the plain one and of K - 1 augmented ones. {_OWN} 1.",
    ),
    root_option,
    follow_links_option,
    device_option,
    click.option(
        "--precision", type=click.Choice(["float32", "bfloat16", "float16"]),
        help=f"Of the forward pass. {_OWN} float32.",
    ),
    click.option(
        "--store-dtype", type=click.Choice(["float32", "float16"]),
        help=f"Of the stored features. {_OWN} float32.",
    ),
    click.option(
        "--jpeg-scaled", "jpeg", is_flag=True, flag_value="scaled", default=None,
        help="Let the decoder shrink large JPEGs: faster, and other features. Default: as the store has it.",
    ),
    click.option(
        "--engine", type=click.Choice(["auto", "torch-eager", "torch-compiled", "onnx"]), default="auto",
        show_default=True,
        help="What runs the backbone. auto: the store's own; for a new store the fastest that proves itself.",
    ),
    click.option(
        "--decoder", type=click.Choice(["auto", "exact", "fast"]), default="auto", show_default=True,
        help="What resizes images: exactly as torchvision on PIL images, or within 2 of 255 of it. auto: the "
        "store's own; for a new store fast, if its features agree.",
    ),
    batch_size_option,
    workers_option,
)  # fmt: skip


def embed_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(EMBED_OPTIONS):
        command = option(command)
    return command
