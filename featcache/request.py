"""What features are asked for, and what files record of it. Knows backbones; no images, no engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self, get_args

from featcache.backbones import Backbone, load_backbone
from featcache.backbones.weights import RANDOM, file_sha256, require_file
from featcache.engines import MAX_BATCH_SIZE
from featcache.errors import BackboneError, FeatcacheError, StoreError
from featcache.images.decode import Decoder
from featcache.images.paths import show_path
from featcache.spec import PENULTIMATE, FeatureSpec, JpegScale, Precision, StoreDtype
from featcache.store.reader import FeatureStore
from featcache.words import spell_options

SEEDS = 1 << 63  # from 0 on: what torch draws by, and a store can record


@dataclass(frozen=True, kw_only=True)
class EmbedRequest:
    """What the user asked for, as far as it determines the features. Recorded in the store's provenance.

    TypeError or ValueError for what there cannot be; names of backbones and nodes are looked at later.
    """

    backbone: str
    weights: str | None
    seed: int
    nodes: tuple[str, ...]
    precision: Precision
    store_dtype: StoreDtype
    views: int = 1
    jpeg: JpegScale = "full"

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < SEEDS:
            raise ValueError(f"a seed is a whole number from 0 to {SEEDS - 1:,}, not {self.seed!r}")
        for name, kind in (("precision", Precision), ("store_dtype", StoreDtype), ("jpeg", JpegScale)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is one of {get_args(kind)}, not {getattr(self, name)!r}")

    @classmethod
    def of_store(cls, store: FeatureStore) -> Self:
        """What was asked for when `store` was made; StoreError when it does not say."""
        backbone = RecordedBackbone.of_store(store)
        nodes = store.provenance["request"].get("nodes")
        if not isinstance(nodes, list) or not all(isinstance(node, str) for node in nodes):
            nodes = [node.key for node in store.spec.nodes]
        try:
            return replace(
                cls.of_spec(store.spec),
                backbone=backbone.name,
                weights=backbone.asked_weights,
                seed=backbone.seed,
                nodes=tuple(nodes),
            )
        except ValueError as exc:
            raise StoreError(f"{store.path} holds what no request makes: {exc}. Make it anew.") from exc

    @classmethod
    def of_spec(cls, spec: FeatureSpec) -> Self:
        """What asks for such features of the pretrained weights: a spec does not say where its own are from.

        ValueError where none does.
        """
        return cls(
            backbone=spec.backbone,
            weights=None,
            seed=spec.views_seed,
            nodes=tuple(node.key for node in spec.nodes),
            precision=spec.compute_dtype,
            store_dtype=spec.store_dtype,
            views=spec.views,
            jpeg=spec.preprocessing.jpeg,
        )

    def spell(self) -> tuple[str, ...]:
        """The options of `featcache embed` that ask for this: the backbone, and what a new store has not."""
        said = {
            "--" + name.replace("_", "-"): (getattr(self, name), getattr(DEFAULT_REQUEST, name))
            for name in ("weights", "seed", "views", "precision", "store_dtype")
        }
        plain = self.nodes == DEFAULT_REQUEST.nodes
        nodes = () if plain else tuple(word for node in self.nodes for word in ("--node", node))
        scaled = ("--jpeg-scaled",) if self.jpeg == "scaled" else ()
        return "--backbone", self.backbone, *nodes, *spell_options(said), *scaled

    def as_json(self) -> dict[str, Any]:
        """Without what has no effect, as stores recorded it before there was such a thing."""
        raw = {**asdict(self), "nodes": list(self.nodes)}
        unused = [name for name, default in (("views", 1), ("jpeg", "full")) if raw[name] == default]
        return {name: value for name, value in raw.items() if name not in unused}


# What is asked for where nothing is named and there is no store to go on with.
DEFAULT_REQUEST = EmbedRequest(
    backbone="resnet18",
    weights=None,
    seed=0,
    nodes=(PENULTIMATE,),
    precision="float32",
    store_dtype="float32",
)


def require_sizes(*, workers: int, batch_size: int | None) -> None:
    """ValueError for a number of threads or images that there cannot be."""
    if workers < 1 or not 1 <= (1 if batch_size is None else batch_size) <= MAX_BATCH_SIZE:
        raise ValueError(f"workers are at least 1, batch_size is 1 to {MAX_BATCH_SIZE:,}")


def absolute_weights(weights: str | None) -> str | None:
    """A weights file by its absolute path, so that a request means the same from every directory."""
    if not weights or weights == RANDOM:
        return weights
    try:
        return str(Path(weights).expanduser().absolute())
    except RuntimeError:  # of a home that is nobody's: who opens the file says so
        return weights


def require_weights_there(weights: str | None, *, where: str) -> None:
    """BackboneError where the weights file that the file `where` was made with is not there any more."""
    if weights is None or weights == RANDOM:
        return
    try:
        require_file(weights)
    except BackboneError as error:
        why = getattr(error.__cause__, "strerror", None) or error.__cause__
        raise BackboneError(
            f"{where} was made with the weights file {show_path(weights)}, which is not there ({why}): "
            "pass --weights FILE with the place where it is now."
        ) from error


def place_weights(recorded: Mapping[str, Any], asked: str | None) -> Mapping[str, Any]:
    """What a store records of its weights, with the file where it is asked for."""
    if asked is None or asked == RANDOM:
        return recorded
    return {**recorded, "path": asked, "label": Path(asked).name}


def left_place(recorded: Any, now: Mapping[str, Any]) -> str:
    """The place where a store says that its weights file is, where it is there no more and `now` elsewhere.

    recorded: the weights of its provenance, which may be anything. "" where it is still there, or no file.
    """
    if not isinstance(recorded, Mapping) or not recorded.get("source") == now.get("source") == "file":
        return ""
    place = recorded.get("path")
    if not isinstance(place, str) or place == now["path"]:
        return ""
    try:
        return "" if file_sha256(Path(place)) == recorded.get("file_sha256") else place
    except (BackboneError, ValueError):  # a path that is none, such as one with a zero byte
        return place


@dataclass(frozen=True, kw_only=True)
class RecordedBackbone:
    """The backbone a file says its features are of. `name` decides which code runs, not the spec's name."""

    where: str  # the file
    kind: str  # of file, in words
    says: str  # what the file does, in words, before "features of …"
    error: type[FeatcacheError]
    name: str
    asked_weights: str | None  # as they were asked for
    weights_path: str | None  # of the file they were read from, where the user named one
    weights_sha256: str
    transform: str  # of its preprocessing, where that is the user's own
    seed: int

    @classmethod
    def from_records(
        cls,
        request: Mapping[str, Any],
        weights: Mapping[str, Any],
        spec: FeatureSpec,
        *,
        where: str,
        kind: str,
        says: str,
        error: type[FeatcacheError],
    ) -> Self:
        """From the provenance of a file; `error` when it is not what featcache records."""
        asked, seed = request.get("weights"), request.get("seed", 0)
        path = weights.get("path") if weights.get("source") == "file" else None
        if (
            not isinstance(request.get("backbone"), str)
            or not isinstance(seed, int)
            or not 0 <= seed < SEEDS
            or isinstance(seed, bool)
            or not all(isinstance(text, str | None) for text in (asked, path))
        ):
            raise error(f"{where} does not say which backbone and weights it is of. Make it anew.")
        return cls(
            where=where,
            kind=kind,
            says=says,
            error=error,
            name=request["backbone"],
            asked_weights=asked,
            weights_path=path,
            weights_sha256=spec.weights_sha256,
            transform=spec.preprocessing.transform,
            seed=seed,
        )

    @classmethod
    def of_store(cls, store: FeatureStore) -> Self:
        """The backbone of the features in `store`; StoreError when it does not say which."""
        request, weights = (store.provenance.get(name) for name in ("request", "weights"))
        return cls.from_records(
            request if isinstance(request, Mapping) else {},
            weights if isinstance(weights, Mapping) else {},
            store.spec,
            where=str(store.path),
            kind="store",
            says="holds",
            error=StoreError,
        )

    def require_permission(self, allowed: str | None) -> None:
        """Refuse code of the user's own unless `allowed` repeats its name."""
        if ":" in self.name and allowed != self.name:
            raise self.error(
                f"{self.where} needs the code of its own backbone {self.name!r}, and a {self.kind} is not "
                f"trusted to name code to run: repeat it as --backbone {self.name} to allow it."
            )

    def load(self, *, weights: str | None = None, allowed: str | None = None) -> Backbone:
        """The network with the recorded weights; BackboneError when those found are others.

        weights: their file, where it is not where it was. allowed: must repeat a `module:function`.
        """
        self.require_permission(allowed)
        found = weights or self.weights_path or self.asked_weights
        if not weights:
            require_weights_there(found, where=self.where)
        loaded = load_backbone(self.name, weights=found, seed=self.seed)
        if loaded.weights.sha256 != self.weights_sha256:
            raise BackboneError(
                f"{self.where} {self.says} features of {self.name} with weights {self.weights_sha256[:12]}…; "
                f"the weights here ({loaded.weights.label}) are {loaded.weights.sha256[:12]}…. Pass the file "
                "it was made with as --weights FILE, or embed and fit again with the weights that are here."
            )
        self.require_transform(loaded)
        return loaded

    def require_transform(self, loaded: Backbone) -> None:
        """BackboneError where pictures would be made by other code than the recorded one."""
        if loaded.preprocessing.transform != self.transform:
            raise BackboneError(
                f"{self.where} {self.says} features of pictures made by "
                f"{self.transform or 'no transform'}; here it is {loaded.preprocessing.transform or 'none'}. "
                "Use the code it was made with, or embed and fit again."
            )


def recorded_batch_size(provenance: Mapping[str, Any]) -> int | None:
    """Of a store's provenance, which may hold anything."""
    recorded = provenance.get("batch_size")
    return recorded if isinstance(recorded, int) and 1 <= recorded <= MAX_BATCH_SIZE else None


def recorded_decoder(provenance: Mapping[str, Any]) -> Decoder:
    """Of a store's provenance, which may hold anything; before it was recorded there was one."""
    return "fast" if provenance.get("decoder") == "fast" else "exact"
