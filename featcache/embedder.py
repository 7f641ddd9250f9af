"""From a request to a spec and an engine. Knows backbones and engines; no images and no rows.

A spec is settled without torch where the weights can be proven to be the recorded ones; the engine is made
when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self, cast, get_args

import numpy as np
from numpy.typing import NDArray

from featcache.backbones import Backbone, load_backbone, prove_weights
from featcache.engines import (
    AUTO,
    DEFAULT_ENGINE,
    Engine,
    batch_sizes,
    device_kind,
    make_engine,
    other_engines,
    setup_seconds,
)
from featcache.engines.agreement import compare_pixels, probe_pixels, require_agreement
from featcache.engines.choice import Candidate, choose_engine
from featcache.errors import DeviceError, SpecMismatch
from featcache.images.decode import Decoder
from featcache.images.paths import show_path
from featcache.processors import usable_processors
from featcache.request import (
    EmbedRequest,
    RecordedBackbone,
    absolute_weights,
    left_place,
    place_weights,
    recorded_batch_size,
    recorded_decoder,
)
from featcache.spec import FeatureSpec, describe_differences, require_same_spec
from featcache.store.reader import FeatureStore

# Some pictures of the run as a decoder gives them, (any number, S, S, 3).
Samples = Callable[[Decoder], NDArray[np.uint8]]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadyEngine:
    """An engine with the spec of what it computes, and what decodes its pictures."""

    engine: Engine
    decoder: Decoder = "exact"
    spec: FeatureSpec
    backbone: Backbone
    batch_size: int | None  # as asked for or recorded; None where it is the engine's own affair
    why: Mapping[str, Any]  # it is this engine, for the provenance of a store
    said: str = ""  # the same in words, where there was a choice

    @property
    def weights(self) -> Mapping[str, Any]:
        """`WeightsIdentity` as a dict."""
        return asdict(self.backbone.weights)

    @property
    def weights_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.backbone.module.state_dict().values())


class Embedder:
    """A request on its way to features: its spec, and the engine that computes them once it is needed.

    backbone: where it is here already, whatever weights the request would load. engine, decoder: a name, or
    "auto": that of the store to go on with, and for a new one the fastest that proves itself.
    """

    def __init__(
        self,
        request: EmbedRequest,
        *,
        backbone: Backbone | None = None,
        device: str = "auto",
        batch_size: int | None = None,
        engine: str = AUTO,
        decoder: str = AUTO,
        workers: int | None = None,
    ) -> None:
        self.request = request
        self.ready: ReadyEngine | None = None
        self.weights: Mapping[str, Any] | None = None  # `WeightsIdentity` as a dict, once a spec is settled
        self._backbone = backbone
        self._device, self._batch_size, self._engine = device, batch_size, engine
        self._decoder = decoder
        self._workers = workers or usable_processors()

    @classmethod
    def of_store(
        cls,
        store: FeatureStore,
        *,
        weights: str | None = None,
        allowed: str | None = None,
        device: str = "auto",
        batch_size: int | None = None,
    ) -> Self:
        """With the engine that computes rows of `store` as they were computed, and in the same batches.

        Where the recorded engine cannot be had it is the default one, which agrees with it but for rounding.
        weights, allowed: see `RecordedBackbone.load`. Raises StoreError, BackboneError, DeviceError.
        """
        request = EmbedRequest.of_store(store)
        if weights:
            request = replace(request, weights=absolute_weights(weights))
        backbone = RecordedBackbone.of_store(store).load(weights=weights, allowed=allowed)
        embedder = cls(request, device=device, batch_size=batch_size)
        ready = embedder._use(backbone, batch_size=embedder._recorded_batch_size([store]))
        if said := describe_differences(store.spec, ready.spec):
            raise SpecMismatch(
                f"{store.path} holds {store.spec.backbone} features that are not computed here: {said}. "
                "Use the library versions it was made with (`featcache info`), or embed to another --output."
            )
        with suppress(DeviceError):
            ready = embedder._switch(ready, str(store.provenance.get("engine")), None)
        embedder._engine = ready.engine.name
        embedder.ready = replace(ready, decoder=recorded_decoder(store.provenance))
        return embedder

    def settle_spec(self, stores: Sequence[FeatureStore], *, output: Path) -> tuple[FeatureSpec, str]:
        """The spec asked for and how it is known; SpecMismatch when the store at `output` holds another."""
        for store in reversed(stores):
            # What the request names says nothing of a backbone that was handed over.
            proof = "" if self._backbone else prove_weights(store.provenance, self.request.as_json())
            if proof:
                _require_same(stores, store.spec, output=output)
                self.weights = place_weights(store.provenance.get("weights", {}), self.request.weights)
                return store.spec, proof
        for store in stores:
            self._require_same_backbone(store)
        ready = self.load(batch_size=self._recorded_batch_size(stores))
        for store in stores:
            if store.path == output:
                _require_same_file(store, ready.weights)
        _require_same(stores, ready.spec, output=output)
        self.weights = ready.weights
        return ready.spec, f"weights {ready.spec.weights_sha256[:12]} loaded and compared"

    def left_place(self, store: FeatureStore) -> str:
        """Where `store` says that its weights file is, where the settled spec has it elsewhere; "" else."""
        return left_place(store.provenance.get("weights"), self.weights) if self.weights else ""

    def choose_engine(self, *, images: int, samples: Samples) -> ReadyEngine:
        """The engine and decoder asked for, or the fastest, for a new store of so many images to be embedded.

        samples: some of them, for both to prove themselves on.
        """
        ready = self.ready or self.load(batch_size=self._batch_size)
        if self._engine != AUTO:
            return self._with_decoder(self._switch(ready, self._engine, samples), samples)
        choice = choose_engine(
            ready.engine,
            candidates=self._candidates(ready),
            make=lambda candidate: self._make(
                ready.backbone, engine=candidate.name, batch_size=candidate.batch_size
            ),
            exact=lambda: self._in_float32(ready),
            images=images,
            crop_size=ready.spec.preprocessing.crop_size,
            threads=self._workers,
            samples=lambda: samples("exact"),
        )
        why = {"asked": AUTO, **choice.record}
        return self._with_decoder(replace(ready, engine=choice.engine, why=why, said=choice.said), samples)

    def _with_decoder(self, ready: ReadyEngine, samples: Samples) -> ReadyEngine:
        """With the decoder asked for, or the fast one if its features are those of the exact one."""
        if self._decoder != AUTO:
            self.ready = replace(ready, decoder=_decoder_named(self._decoder))
            return self.ready
        exact, fast = samples("exact"), samples("fast")
        if not len(exact) or len(exact) != len(fast):
            self.ready = replace(ready, decoder="exact")
            return self.ready
        agreement = compare_pixels(ready.engine, fast, exact)
        said = ""
        if not agreement.passed:
            said = f"decoder exact; fast differs over {len(exact)} images: {agreement.describe()}"
        self.ready = replace(
            ready,
            decoder="fast" if agreement.passed else "exact",
            why={**ready.why, "decoder": {"agreement": agreement.to_json()}},
            said="; ".join(filter(None, [ready.said, said])),
        )
        return self.ready

    def _candidates(self, ready: ReadyEngine) -> list[Candidate]:
        """The other engines, the soonest made first; then each in other batches, if none was asked for."""
        kind = device_kind(ready.engine.device)
        here = Candidate(ready.engine.name, ready.engine.batch_size)
        ranked = [
            (rank, Candidate(name, size, setup_seconds(name, weights_bytes=ready.weights_bytes)))
            for name in (DEFAULT_ENGINE, *other_engines(self.request.precision))
            for rank, size in enumerate([ready.batch_size] if ready.batch_size else batch_sizes(name, kind))
        ]
        ranked.sort(key=lambda found: (found[0] > 0, found[1].setup_seconds))
        return [candidate for _, candidate in ranked if candidate != here]

    def _in_float32(self, ready: ReadyEngine) -> Engine:
        if self.request.precision == "float32":
            return ready.engine
        return make_engine(
            ready.backbone,
            nodes=self.request.nodes,
            device=self._device,
            batch_size=ready.engine.batch_size,
        )

    def engine_for(
        self, target: FeatureStore, *, output: Path, samples: Samples | None = None
    ) -> ReadyEngine:
        """The engine `target` was begun with, unless another was asked for, in batches of the same size."""
        ready = self.ready
        if ready is None:
            ready = self.load(batch_size=self._recorded_batch_size([target]))
            require_same_spec(target.spec, ready.spec, where=str(output))
        if self._decoder == AUTO and not target.sealed and samples is not None:
            ready = self._with_decoder(ready, samples)  # nothing says how its rows were decoded
        elif self._decoder == AUTO:
            ready = replace(ready, decoder=recorded_decoder(target.provenance))
        else:
            ready = replace(ready, decoder=_decoder_named(self._decoder))
        if self._engine != AUTO:
            return self._switch(ready, self._engine, samples)
        recorded = target.provenance.get("engine")
        try:
            return self._switch(ready, recorded if isinstance(recorded, str) else DEFAULT_ENGINE, samples)
        except DeviceError as error:
            raise DeviceError(
                f"{output} goes on with the engine it was begun with, and {error}. "
                f"Or pass --engine {DEFAULT_ENGINE}: the last digits of its features may differ."
            ) from error

    def _switch(self, ready: ReadyEngine, name: str, samples: Samples | None) -> ReadyEngine:
        """With the engine of that name in place of the one there is, once they are seen to agree."""
        self.ready = replace(ready, why={"asked": self._engine, **ready.why})
        if ready.engine.name == name:
            return self.ready
        engine = self._make(ready.backbone, engine=name, batch_size=ready.batch_size)
        shown = None if samples is None else (lambda: samples("exact"))
        pixels = probe_pixels(ready.spec.preprocessing.crop_size, shown)
        exact = self._in_float32(ready)
        agreement = require_agreement(engine, exact=exact, reference=ready.engine, pixels=pixels)
        why = {"asked": self._engine, "agreement": {name: agreement.to_json()}}
        said = f"engine {name}; against {exact.name} over {len(pixels)} images: {agreement.describe()}"
        self.ready = replace(ready, engine=engine, why=why, said=said)
        return self.ready

    def load(self, *, batch_size: int | None = None) -> ReadyEngine:
        """Load the backbone and make its engine."""
        request = self.request
        backbone = self._backbone or load_backbone(
            request.backbone, weights=request.weights, seed=request.seed
        )
        return self._use(backbone, batch_size=batch_size)

    def _use(self, backbone: Backbone, *, batch_size: int | None) -> ReadyEngine:
        """With the default engine, whose numbers are those the others must agree with."""
        request = self.request
        engine = self._make(backbone, engine=DEFAULT_ENGINE, batch_size=batch_size)
        spec = FeatureSpec(
            backbone=backbone.name,
            weights_sha256=backbone.weights.sha256,
            nodes=engine.nodes,
            preprocessing=replace(backbone.preprocessing, jpeg=request.jpeg),
            compute_dtype=request.precision,
            store_dtype=request.store_dtype,
            views=request.views,
            views_seed=request.seed,
        )
        self.ready = ReadyEngine(
            engine=engine, spec=spec, backbone=backbone, batch_size=batch_size, why={"asked": self._engine}
        )
        return self.ready

    def _make(self, backbone: Backbone, *, engine: str, batch_size: int | None) -> Engine:
        return make_engine(
            backbone,
            nodes=self.request.nodes,
            device=self._device,
            precision=self.request.precision,
            batch_size=batch_size,
            engine=engine,
        )

    def _recorded_batch_size(self, stores: Sequence[FeatureStore]) -> int | None:
        return self._batch_size or (recorded_batch_size(stores[0].provenance) if stores else None)

    def _require_same_backbone(self, store: FeatureStore) -> None:
        """Refuse another backbone by its name alone, before its weights are looked for."""
        have, want = store.spec.backbone, self.request.backbone.partition("@")[0]
        if have != want:
            raise SpecMismatch(
                f"{store.path} holds {have} features: backbone is {have}, not {want}. "
                f"Choose another --output, or pass --backbone {have}."
            )


def _decoder_named(name: str) -> Decoder:
    if name not in get_args(Decoder):
        raise DeviceError(f"there is no decoder {name!r}; there are {', '.join(get_args(Decoder))}")
    return cast(Decoder, name)


def _require_same_file(store: FeatureStore, weights: Mapping[str, Any]) -> None:
    """SpecMismatch where the weights file of `store` is there with other weights. weights: those that are."""
    recorded = store.provenance.get("weights")
    if not isinstance(recorded, Mapping) or store.spec.weights_sha256 == weights["sha256"]:
        return
    path = weights["path"]
    if path and recorded.get("path") == path and recorded.get("file_sha256") != weights["file_sha256"]:
        raise SpecMismatch(
            f"{show_path(path)} has changed since {show_path(store.path)} was made with it. Choose another "
            "--output for features of the weights it holds now, or put back those it held."
        )


def _require_same(stores: Sequence[FeatureStore], spec: FeatureSpec, *, output: Path) -> None:
    for store in stores:
        if store.path == output:
            require_same_spec(store.spec, spec, where=str(output))
