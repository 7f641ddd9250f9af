"""`featcache predict`: classes of new images, seen just as the head saw the images it was fitted on."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.engines import make_engine
from featcache.images import find_images
from featcache.images.identity import ImageFailure
from featcache.images.paths import show_path
from featcache.inference import load_network
from featcache.lanes import EmbeddedBatch
from featcache.model import Model
from featcache.pipeline import embed_files
from featcache.processors import usable_processors
from featcache.progress import Progress, SilentProgress
from featcache.request import recorded_decoder
from featcache.spec import Picture


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer for one image; `error` says why there is none, and the rest is None then."""

    path: str
    label: str | None = None
    probability: float | None = None
    topk: tuple[tuple[str, float], ...] = ()
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        topk = [{"label": label, "probability": p} for label, p in self.topk]
        return {"path": self.path, "label": self.label, "probability": self.probability, "topk": topk}


@dataclass(frozen=True, kw_only=True)
class PredictResult:
    """One prediction an image, in the order the images were given."""

    predictions: tuple[Prediction, ...]
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> int:
        return sum(prediction.error is not None for prediction in self.predictions)

    def to_json(self) -> list[dict[str, Any]]:
        return [prediction.to_json() for prediction in self.predictions]

    def to_csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "label", "probability", "error"])
        for p in self.predictions:
            shown = "" if p.probability is None else f"{p.probability:.6f}"
            writer.writerow([p.path, p.label or "", shown, p.error or ""])
        return text.getvalue()

    def describe(self) -> str:
        width = max((len(p.path) for p in self.predictions), default=0)
        lines = [f"{p.path:{width}}  {_words(p)}" for p in self.predictions]
        return "\n".join([*lines, *self.notes])


def _words(prediction: Prediction) -> str:
    if prediction.error is not None:
        return f"failed: {prediction.error}"
    others = ", ".join(f"{label} {p:.3f}" for label, p in prediction.topk[1:3])
    return f"{prediction.label} {prediction.probability:.3f}" + (f"  ({others})" if others else "")


def predict(
    model: str | os.PathLike[str],
    images: Sequence[str | os.PathLike[str]],
    *,
    top_k: int = 5,
    weights: str | None = None,
    backbone: str | None = None,
    follow_links: bool = False,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PredictResult:
    """Predict the class of every image in `images`, which names files and folders.

    weights: the backbone's weights file, where it is not where the store's maker had it.
    backbone: must repeat a model's own `module:function` to allow that code to be run.

    Raises ModelError, DataError, BackboneError (among them: the weights found are not those the features
    were made with). An image that cannot be read is a prediction with an error.
    """
    progress = progress or SilentProgress()
    fitted = Model.load(Path(model))
    files, notes = find_images([Path(image) for image in images], follow_links=follow_links)
    loaded = load_network(fitted, where=str(model), weights=weights, allowed=backbone)
    engine = make_engine(
        loaded,
        nodes=tuple(node.key for node in fitted.nodes),
        device=device,
        precision=fitted.spec.compute_dtype,
        batch_size=batch_size,
    )
    predictions: list[Prediction] = []
    progress.start("predicting", total=len(files), unit="images")
    for batch in embed_files(
        files,
        engine=engine,
        pictures=(Picture(preprocessing=fitted.spec.preprocessing),),
        decoder=recorded_decoder(fitted.provenance),
        workers=workers or usable_processors(),
    ):
        names = files[len(predictions) : len(predictions) + len(batch.outcomes)]
        predictions += _predict_batch(fitted, batch, names, top_k=top_k)
        progress.advance(len(batch.outcomes))
    progress.finish()
    return PredictResult(predictions=tuple(predictions), notes=tuple(notes))


def _predict_batch(
    model: Model, batch: EmbeddedBatch, files: Sequence[Path], *, top_k: int
) -> list[Prediction]:
    # Through the store's dtype, so that an image is seen here as the head saw it in the store.
    X = np.concatenate(
        [batch.features[node.key].astype(model.spec.store_dtype) for node in model.nodes], axis=1
    )
    ok = np.array([not isinstance(outcome, ImageFailure) for outcome in batch.outcomes])
    probabilities = iter(model.predict_proba(X[ok]) if ok.any() else ())
    return [
        Prediction(path=show_path(file), error=outcome.reason)
        if isinstance(outcome, ImageFailure)
        else _rank(show_path(file), next(probabilities), model.classes, top_k=top_k)
        for file, outcome in zip(files, batch.outcomes, strict=True)
    ]


def _rank(path: str, probabilities: NDArray[Any], classes: Sequence[str], *, top_k: int) -> Prediction:
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    topk = tuple((classes[i], float(probabilities[i])) for i in order)
    return Prediction(path=path, label=topk[0][0], probability=topk[0][1], topk=topk)
