"""All that `embed` can be told besides images, backbones and stores, in one type; and a run made from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featcache.backbones.weights import RANDOM
from featcache.embedder import Embedder
from featcache.embedding import Embedding
from featcache.engines import AUTO, require_engine
from featcache.origin import describe_origin
from featcache.processors import usable_processors
from featcache.progress import Progress, SilentProgress
from featcache.request import EmbedRequest, absolute_weights, require_sizes
from featcache.sharding import Shard, processors_of_rank
from featcache.spec import PENULTIMATE, JpegScale, Precision, StoreDtype
from featcache.store.files import StoreFiles


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """The options of `featcache.embed`, which says what each is, with the same defaults.

    ValueError or TypeError for what there cannot be, DeviceError for an engine that is not here.
    """

    # What determines the features
    weights: str | None = None
    seed: int = 0
    nodes: Sequence[str] = (PENULTIMATE,)
    views: int = 1
    precision: Precision = "float32"
    store_dtype: StoreDtype = "float32"
    jpeg: JpegScale = "full"
    # Where the images are
    root: str | os.PathLike[str] | None = None
    follow_links: bool = False
    # How features are computed
    device: str = "auto"
    engine: str = AUTO
    decoder: str = AUTO
    isolate: bool = False
    batch_size: int | None = None
    workers: int | None = None
    # What else the run does
    max_failures: float = 0.01
    prune: bool = False
    shard: Shard | None = None
    dry_run: bool = False
    progress: Progress | None = None

    def __post_init__(self) -> None:
        require_sizes(workers=self.threads, batch_size=self.batch_size)
        if isinstance(self.nodes, str):
            raise TypeError(f"nodes are a sequence of names, such as [{self.nodes!r}]")
        if self.engine != AUTO:
            require_engine(self.engine)

    @property
    def threads(self) -> int:
        """`workers`, or as many as there are processors for this process."""
        if self.workers is not None:
            return self.workers
        return processors_of_rank(usable_processors()) if self.shard else usable_processors()

    @property
    def has_weights_file(self) -> bool:
        return self.weights not in (None, RANDOM)

    @property
    def root_path(self) -> Path | None:
        return None if self.root is None else Path(self.root)

    def request(self, backbone: str) -> EmbedRequest:
        return EmbedRequest(
            backbone=backbone,
            weights=absolute_weights(self.weights),
            seed=self.seed,
            nodes=tuple(self.nodes),
            precision=self.precision,
            store_dtype=self.store_dtype,
            views=self.views,
            jpeg=self.jpeg,
        )

    def run(self, backbone: str, *, data: Path, output: str | os.PathLike[str]) -> Embedding:
        """The run that brings the store `output` up to date with the images of `data`."""
        embedder = Embedder(
            self.request(backbone),
            device=self.device,
            batch_size=self.batch_size,
            engine=self.engine,
            decoder=self.decoder,
            workers=self.threads,
        )
        return Embedding(
            files=StoreFiles.at(output),
            embedder=embedder,
            data=describe_origin(data, self.root_path, follow_links=self.follow_links),
            workers=self.threads,
            isolate=self.isolate,
            prune=self.prune,
            max_failures=self.max_failures,
            progress=self.progress or SilentProgress(),
        )
