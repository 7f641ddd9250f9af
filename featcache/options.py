"""All that `embed` can be told besides images, backbones and stores, in one type; and a run made from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from featcache.backbones.weights import RANDOM
from featcache.embedder import Embedder
from featcache.embedding import Embedding
from featcache.engines import AUTO, require_engine
from featcache.errors import FeatcacheError, StoreError
from featcache.images.paths import show_path
from featcache.origin import describe_origin
from featcache.processors import usable_processors
from featcache.progress import Progress, SilentProgress
from featcache.request import (
    DEFAULT_REQUEST,
    EmbedRequest,
    RecordedBackbone,
    absolute_weights,
    require_sizes,
    require_weights_there,
)
from featcache.sharding import Shard, processors_of_rank
from featcache.spec import FeatureSpec, JpegScale, Precision, StoreDtype
from featcache.store.files import StoreFiles
from featcache.store.reader import FeatureStore
from featcache.words import shell_command, show_text


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """The options of `featcache.embed`, which says what each is, with the same defaults.

    Of what determines the features, None is what the store has that goes on, and in a new one the default.
    ValueError or TypeError for what there cannot be, DeviceError for an engine that is not here.
    """

    # What determines the features
    weights: str | None = None
    seed: int | None = None
    nodes: Sequence[str] | None = None
    views: int | None = None
    precision: Precision | None = None
    store_dtype: StoreDtype | None = None
    jpeg: JpegScale | None = None
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

    def request(self, backbone: str | None, files: StoreFiles | None) -> EmbedRequest:
        """What is named, and for the rest what the store of these files, if any, was made with.

        Where that has another backbone than the one that is named, and where there is no store, the rest is
        the default. StoreError: the store's own backbone is code, which has to be named, or the store does
        not say what it was made with.
        """
        asked = {
            "backbone": backbone,
            "weights": absolute_weights(self.weights),
            "nodes": None if self.nodes is None else tuple(self.nodes),
            **{name: getattr(self, name) for name in ("seed", "views", "precision", "store_dtype", "jpeg")},
        }
        named = {name: value for name, value in asked.items() if value is not None}
        own = None if files is None else _recorded_request(files, backbone)
        if files and own and self.weights is None:
            require_weights_there(own.weights, where=show_path(files.output))
        request = replace(own or DEFAULT_REQUEST, **named)
        if files and self.progress and request == own != replace(DEFAULT_REQUEST, **named):
            words = shell_command(request.spell())
            self.progress.note(f"{show_path(files.output)} goes on as it was made: {words}")
        return request

    def run(
        self, backbone: str | None, *, data: Path, output: str | os.PathLike[str], anew: bool = False
    ) -> Embedding:
        """The run that brings the store `output` up to date with the images of `data`.

        anew: as if there were no store.
        """
        files = StoreFiles.at(output)
        embedder = Embedder(
            self.request(backbone, None if anew else files),
            device=self.device,
            batch_size=self.batch_size,
            engine=self.engine,
            decoder=self.decoder,
            workers=self.threads,
        )
        return Embedding(
            files=files,
            embedder=embedder,
            data=describe_origin(data, self.root_path, follow_links=self.follow_links),
            workers=self.threads,
            isolate=self.isolate,
            prune=self.prune,
            max_failures=self.max_failures,
            progress=self.progress or SilentProgress(),
        )


def _recorded_request(files: StoreFiles, backbone: str | None) -> EmbedRequest | None:
    """What the store, or where there is none its newest growth, was made with.

    None where that cannot be told, or is another backbone than the one that is named. StoreError: it cannot
    be told, none is named, and the default is another one.
    """
    unread: list[FeatureStore] = []
    for path in (files.output, *reversed(files.growths)):
        try:
            store = FeatureStore.salvage(path)
        except (FeatcacheError, OSError):
            continue  # whoever opens it to go on says what is wrong with it
        try:
            recorded = EmbedRequest.of_store(store)
        except FeatcacheError:
            unread.append(store)
            continue
        if backbone not in (None, recorded.backbone):
            return None
        RecordedBackbone.of_store(store).require_permission(backbone)
        return recorded
    if backbone is None:
        _require_default(unread)
    return None


def _require_default(unread: Sequence[FeatureStore]) -> None:
    """StoreError where a store that does not say what it was made with is not of the default backbone."""
    for store in unread:
        own = store.spec.backbone
        if own != DEFAULT_REQUEST.backbone:
            damage = "" if store.sealed else " is damaged: its seal is broken, and it"
            raise StoreError(
                f"{show_path(store.path)}{damage} does not say what it was made with, but that its features "
                f"are of {show_text(own)}. To go on with them, pass {_spell(store.spec)}, and the --weights, "
                "--seed or NAME@WEIGHTS of then where they were not the default."
            )


def _spell(spec: FeatureSpec) -> str:
    """The options of `featcache embed` that ask for features of this spec, but for their weights."""
    try:
        return shell_command(EmbedRequest.of_spec(spec).spell())
    except ValueError:  # of a forged file
        return shell_command(["--backbone", spec.backbone])
