"""`featcache finetune`: train the last blocks of a model's network and its head, from the fitted head on.

The start and all weights on the way are compared on the choice rows; the rows scored are looked at once, at
the end. Torch is imported once it is known that there is something to do.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from featcache.engines import AUTO
from featcache.model import Model
from featcache.progress import Progress, SilentProgress
from featcache.spec import StoreDtype
from featcache.tuning.asked import Asked, Cache
from featcache.tuning.dataset import DataSet
from featcache.tuning.files import TuningFiles
from featcache.tuning.finished import look_first
from featcache.tuning.launched import launched_ranks
from featcache.tuning.result import FinetuneResult
from featcache.tuning.settings import Settings

__all__ = ["FinetuneResult", "finetune"]

CHECKPOINT_SECONDS = 60.0


def finetune(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    follow_links: bool = False,
    weights: str | None = None,
    backbone: str | None = None,
    group_by: str | None = None,
    cache: Cache = "auto",
    store_dtype: StoreDtype = "float16",
    engine: str = AUTO,
    device: str = "auto",
    workers: int | None = None,
    max_failures: float = 0.01,
    forget: bool = False,
    restart: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    progress: Progress | None = None,
    **settings: Any,
) -> FinetuneResult:
    """Fine-tune the network of `model` on the images of `data`; `output` is the better of it and `model`.

    model: of a linear head. data, root, follow_links: as for `embed`. weights, backbone: as for `predict`.
    settings: the fields of `featcache.tuning.settings.Settings`.
    group_by: as for `fit`; "similar" by the features that the model's head gets. No group is on both sides of
        training, choosing and scoring, but for splits that the data has.
    cache: "yes" keeps the activations at the cut in `output`.tail.h5, in `store_dtype`, and trains on them;
        "no" decodes and computes them every epoch; "auto" does what is measured to be faster.
    engine: of the frozen part while it is cached. max_failures: the share of images that may be unusable.
    forget: train though classes of the model have no images, and will not be known any more.
    checkpoint_seconds: between two checkpoints in an epoch.
    restart: begin again, though a checkpoint of this or another run is there, or the model of this one.

    Beside `output` come its report (.json), its curve (.curve.csv, .curve.png), and while it is trained a
    checkpoint from which the same call goes on. Where it came to its end before, and model, images and
    settings are the same, nothing is done. Under torchrun the ranks train together.
    ModelError, HeadError, DataError, BackboneError, DiskError: what stands in the way, in one line.
    """
    begun = time.perf_counter()
    asked = Asked(
        model=Path(model),
        data=Path(data),
        output=Path(output),
        settings=Settings(**settings),
        root=None if root is None else Path(root),
        follow_links=follow_links,
        weights=weights,
        backbone=backbone,
        group_by=group_by,
        cache=cache,
        store_dtype=store_dtype,
        engine=engine,
        max_failures=max_failures,
        forget=forget,
    )
    images = DataSet(path=asked.data, root=asked.root, follow_links=asked.follow_links)
    files, fitted, looked = TuningFiles(asked.output), Model.load(asked.model), None
    if launched_ranks() == 1:
        looked = look_first(asked, fitted, images, files, restart=restart)
        if looked["report"] is not None:
            return FinetuneResult.found(looked["report"])

    from featcache.tuning.job import Job

    return Job(
        asked=asked,
        fitted=fitted,
        data=images,
        files=files,
        progress=progress or SilentProgress(),
        device=device,
        workers=workers,
        restart=restart,
        checkpoint_seconds=checkpoint_seconds,
        begun=begun,
    ).carry_out(looked)
