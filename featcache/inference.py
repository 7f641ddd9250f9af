"""A fitted model with its network: from image files to probabilities of its classes.

What predicting and evaluating do, and exporting and tuning begin with. Knows model files, backbones and
engines; neither how images are found nor what becomes of the answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from featcache.backbones import Backbone, load_backbone
from featcache.backbones.tuned import with_tensors
from featcache.backbones.weights import RANDOM
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
from featcache.engines.agreement import probe_pixels, require_agreement
from featcache.engines.choice import Candidate, Choice, choose_engine
from featcache.errors import BackboneError, ModelError
from featcache.images.decode import Decoder
from featcache.images.identity import ImageFailure
from featcache.lanes import EmbeddedBatch, Outcome
from featcache.model import Model
from featcache.pipeline import embed_files
from featcache.processors import usable_processors
from featcache.records import RowStatus
from featcache.request import RecordedBackbone, recorded_decoder
from featcache.spec import Picture, Precision, view_key


def load_network(
    model: Model, *, where: str, weights: str | None = None, allowed: str | None = None
) -> Backbone:
    """The backbone of a model with the weights it was fitted or fine-tuned with.

    where: the model file. weights: the file of the backbone's weights, where it is not where it was; a
    fine-tuned model brings its own. allowed: must repeat a model's own `module:function`.
    ModelError, BackboneError: what stands in the way, among it other weights than the recorded ones.
    """
    recorded = RecordedBackbone.from_records(
        model.request,
        model.weights,
        model.spec,
        where=where,
        kind="model file",
        says="was fitted on",
        error=ModelError,
    )
    if not model.network:
        return recorded.load(weights=weights, allowed=allowed)
    if weights:
        raise ModelError(f"{where} is fine-tuned and holds its own weights: leave --weights away.")
    recorded.require_permission(allowed)
    # The tensors are replaced, so it does not matter which ones the network is built with.
    built = load_backbone(recorded.name, weights=None if ":" in recorded.name else RANDOM, seed=recorded.seed)
    recorded.require_transform(built)
    # Weights from a file may be prepared for otherwise than the random ones are.
    built = replace(built, preprocessing=model.spec.preprocessing)
    loaded = with_tensors(built, model.network, label=where)
    if loaded.weights.sha256 != model.spec.weights_sha256:
        raise BackboneError(
            f"{where} was fine-tuned as another network than {recorded.name} is here: its tensors have "
            f"{loaded.weights.sha256[:12]}… where {model.spec.weights_sha256[:12]}… is recorded."
        )
    return loaded


@dataclass(frozen=True, kw_only=True, eq=False)
class AnsweredBatch:
    """Consecutive files, in order.

    outcomes: of each file its identity or its failure. probabilities: float64 ndarray (n, n_classes), NaN in
    the rows that failed.
    """

    outcomes: Sequence[Outcome]
    probabilities: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadyModel:
    """A model with its network, ready to look at images as those it was fitted on were looked at."""

    model: Model
    engine: Engine
    decoder: Decoder
    workers: int
    said: str = ""  # why it is this engine, where there was a choice

    @classmethod
    def load(
        cls,
        model: Model,
        *,
        where: str,
        images: int,
        weights: str | None = None,
        allowed: str | None = None,
        device: str = "auto",
        batch_size: int | None = None,
        workers: int | None = None,
        engine: str = AUTO,
    ) -> Self:
        """where, weights, allowed: see `load_network`. images: how many forward passes it is for.

        engine: a name, or "auto": the eager one, and where the run is long enough to look, the fastest.
        Raises ModelError, BackboneError, DeviceError.
        """
        network = load_network(model, where=where, weights=weights, allowed=allowed)
        engines = _Engines(model, network, device=device, batch_size=batch_size)
        workers = workers or usable_processors()
        choice = engines.fastest(images=images, threads=workers) if engine == AUTO else engines.named(engine)
        return cls(
            model=model,
            engine=choice.engine,
            decoder=recorded_decoder(model.provenance),
            workers=workers,
            said=choice.said,
        )

    def answer(self, files: Sequence[Path], *, views: int = 1, seed: int = 0) -> Iterator[AnsweredBatch]:
        """The probabilities of `files` in order, a batch at a time, as they are computed.

        views: pictures of each image, the plain one and augmented ones drawn by `seed`, whose probabilities
        are averaged.
        """
        preprocessing = self.model.spec.preprocessing
        pictures = [Picture(preprocessing=preprocessing, view=view, seed=seed) for view in range(views)]
        for batch in embed_files(
            files, engine=self.engine, pictures=pictures, decoder=self.decoder, workers=self.workers
        ):
            yield answer_batch(self.model, batch, views=views)


def answer_batch(model: Model, batch: EmbeddedBatch, *, views: int = 1) -> AnsweredBatch:
    """The mean over views of what the head says of a batch; features that are not finite are a failure."""
    of_views = [joined_features(model, batch, view=view) for view in range(views)]
    finite = np.all([np.isfinite(X).all(axis=1) for X in of_views], axis=0)
    outcomes = [_checked(model, outcome, ok) for outcome, ok in zip(batch.outcomes, finite, strict=True)]
    usable = np.array([not isinstance(outcome, ImageFailure) for outcome in outcomes])
    probabilities = np.full((len(outcomes), len(model.classes)), np.nan)
    if usable.any():
        probabilities[usable] = np.mean([model.predict_proba(X[usable]) for X in of_views], axis=0)
    return AnsweredBatch(outcomes=outcomes, probabilities=probabilities)


def joined_features(model: Model, batch: EmbeddedBatch, *, view: int = 0) -> NDArray[Any]:
    """X of shape (n, num_features) of a batch: the vectors of the model's nodes, one after the other.

    Through the store's dtype, so that an image is seen here as the head saw it in the store.
    """
    with np.errstate(over="ignore"):
        parts = [
            batch.features[view_key(node.key, view)].astype(model.spec.store_dtype) for node in model.nodes
        ]
    return np.concatenate(parts, axis=1)


def _checked(model: Model, outcome: Outcome, finite: np.bool_) -> Outcome:
    if finite or isinstance(outcome, ImageFailure):
        return outcome
    reason = f"its features are not finite in {model.spec.store_dtype}"
    return ImageFailure(status=RowStatus.NON_FINITE, reason=reason, stat=outcome.stat, sha256=outcome.sha256)


class _Engines:
    """The engines that can run a model's network: the eager one, and others that agree with it."""

    def __init__(self, model: Model, network: Backbone, *, device: str, batch_size: int | None) -> None:
        self._model, self._network = model, network
        self._device, self._batch_size = device, batch_size
        self._eager = self._make(DEFAULT_ENGINE, batch_size)

    def fastest(self, *, images: int, threads: int) -> Choice:
        """The one the features were computed by is looked at first, then those that are made soonest."""
        recorded = self._model.provenance.get("engine")
        kind = device_kind(self._eager.device)
        weights_bytes = sum(tensor.nbytes for tensor in self._network.module.state_dict().values())
        found = [
            Candidate(name, size, setup_seconds(name, weights_bytes=weights_bytes))
            for name in other_engines(self._model.spec.compute_dtype)
            for size in ([self._batch_size] if self._batch_size else batch_sizes(name, kind)[:1])
        ]
        return choose_engine(
            self._eager,
            candidates=sorted(found, key=lambda one: (one.name != recorded, one.setup_seconds)),
            make=lambda candidate: self._make(candidate.name, candidate.batch_size),
            exact=self._in_float32,
            images=images,
            crop_size=self._model.spec.preprocessing.crop_size,
            threads=threads,
        )

    def named(self, name: str) -> Choice:
        """DeviceError where there is no such engine, or where it disagrees."""
        if name == DEFAULT_ENGINE:
            return Choice(engine=self._eager)
        engine = self._make(name, self._batch_size)
        pixels = probe_pixels(self._model.spec.preprocessing.crop_size, None)
        require_agreement(engine, exact=self._in_float32(), reference=self._eager, pixels=pixels)
        return Choice(engine=engine)

    def _in_float32(self) -> Engine:
        if self._model.spec.compute_dtype == "float32":
            return self._eager
        return self._make(DEFAULT_ENGINE, self._eager.batch_size, precision="float32")

    def _make(self, name: str, batch_size: int | None, *, precision: Precision | None = None) -> Engine:
        return make_engine(
            self._network,
            nodes=tuple(node.key for node in self._model.nodes),
            device=self._device,
            precision=precision or self._model.spec.compute_dtype,
            batch_size=batch_size,
            engine=name,
        )
