"""`featcache embed`: a data set of images in, feature stores out, computing only what the cache lacks."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from featcache.engines import AUTO
from featcache.images import scan_images
from featcache.options import EmbedOptions
from featcache.progress import Progress
from featcache.sharding import Shard
from featcache.spec import JpegScale, Precision, StoreDtype
from featcache.together import carry_out_together
from featcache.update import EmbedResult, EmbedResults, preview_update, update_shard, update_store

__all__ = ["EmbedResult", "EmbedResults", "embed", "embed_together"]


def embed(
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    backbone: str | None = None,
    weights: str | None = None,
    seed: int | None = None,
    nodes: Sequence[str] | None = None,
    views: int | None = None,
    root: str | os.PathLike[str] | None = None,
    follow_links: bool = False,
    device: str = "auto",
    precision: Precision | None = None,
    store_dtype: StoreDtype | None = None,
    jpeg: JpegScale | None = None,
    engine: str = AUTO,
    decoder: str = AUTO,
    isolate: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    max_failures: float = 0.01,
    prune: bool = False,
    shard: Shard | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> EmbedResult:
    """Embed the images of `data` with a frozen backbone into the feature store `output`.

    What determines the features and is None is what the store at `output` has; for a new store it is the
    backbone resnet18 with its pretrained weights, the seed 0, the penultimate node, one view, float32 as
    precision and store_dtype, and the jpeg "full".

    data: a folder of class folders, the same under train/ val/ test/, or a CSV `path,label[,split]` with
        paths relative to `root` (default: the CSV's folder).
    backbone, weights, seed: see `featcache.backbones.load_backbone`. nodes: see `make_extractor`.
    views: vectors of each image: of the plain picture, and of so many less one that are augmented, drawn by
        `seed` and the bytes of the image alone.
    jpeg: "scaled" lets the JPEG decoder shrink large images, which is faster and changes the features.
    engine: the name of one in `featcache.engines.ENGINES`, or "auto": the one the store was begun with; for a
        new store the fastest that agrees with PyTorch's eager one, where looking for it pays.
    decoder: "exact" is bit for bit torchvision's preset on PIL images, "fast" within 2 of 255 of it; "auto"
        is the one the store was begun with, and for a new store the fast one if its features agree.
    isolate: decode in processes, so that an image that crashes its decoder costs its row and not the run.
    workers: threads that decode, and on the CPU compute. batch_size: see `make_engine`.
    max_failures: the fraction of images that may fail before the run stops with TooManyFailures; one image
        may always fail.
    prune: remove rows of images that are no longer in `data` even where they are half of the rows that have
        features, or more, which is DataError otherwise: it is what another folder looks like.
    shard: embed these images only, into a store beside `output`, and make `output` of all shards once they
        are complete. The result is then that of `output`, otherwise that of the shard.

    Images whose row is in the store already are not opened. Raises DataError, BackboneError, DeviceError,
    SpecMismatch (the store holds features of another spec), StoreLocked, DiskError; whatever is raised,
    every acknowledged block is kept and the same call goes on from there.
    """
    options = EmbedOptions(
        weights=weights,
        seed=seed,
        nodes=nodes,
        views=views,
        root=root,
        follow_links=follow_links,
        device=device,
        precision=precision,
        store_dtype=store_dtype,
        jpeg=jpeg,
        engine=engine,
        decoder=decoder,
        isolate=isolate,
        batch_size=batch_size,
        workers=workers,
        max_failures=max_failures,
        prune=prune,
        shard=shard,
        dry_run=dry_run,
        progress=progress,
    )
    return _embed(Path(data), {backbone: output}, options)[0]


def embed_together(
    data: str | os.PathLike[str], outputs: Mapping[str, str | os.PathLike[str]], **options: Any
) -> tuple[EmbedResult, ...]:
    """Embed with several backbones in one pass over the images: each is read and decoded once for all.

    outputs: {backbone: its feature store}. options: those of `embed`, each for all of them; `weights` that
    are a file can be of one backbone only. Whatever is raised for one store ends the run of all.
    """
    return _embed(Path(data), dict(outputs.items()), EmbedOptions(**options))


def _embed(
    data: Path, outputs: Mapping[str | None, str | os.PathLike[str]], options: EmbedOptions
) -> tuple[EmbedResult, ...]:
    begun = time.perf_counter()
    if not outputs or len({os.path.realpath(output) for output in outputs.values()}) < len(outputs):
        raise ValueError("every backbone needs a store of its own")
    if len(outputs) > 1 and options.has_weights_file:
        raise ValueError("a weights file is of one backbone; embed it in a run of its own")
    runs = [options.run(backbone, data=data, output=output) for backbone, output in outputs.items()]
    scan = partial(scan_images, data, root=options.root_path, follow_links=options.follow_links)
    shard, dry_run = options.shard, options.dry_run
    if shard is not None and not shard.is_everything:
        results = carry_out_together([update_shard(run, shard, scan, dry_run=dry_run) for run in runs])
    elif dry_run:
        results = [preview_update(run, scan) for run in runs]
    else:
        results = carry_out_together([update_store(run, scan) for run in runs])
    seconds = round(time.perf_counter() - begun, 3)
    return tuple(replace(result, seconds=seconds) for result in results)
