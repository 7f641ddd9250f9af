"""`featcache predict`: classes of new images, seen just as the head saw the images it was fitted on.

Answers are handed on as they are computed, so that a folder of any size needs no more memory than its names.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from featcache.disk import disk_errors, whole_or_nothing
from featcache.engines import AUTO
from featcache.images import find_images
from featcache.images.identity import ImageFailure
from featcache.images.paths import show_path
from featcache.inference import ReadyModel
from featcache.model import Model
from featcache.progress import Progress, SilentProgress
from featcache.words import show_text

WIDEST_PATH = 40  # characters that paths are padded to at most: longer ones push their own line alone
_LOOKED_AT = 1000  # paths, to see how wide they are
UNSURE = ""  # the label of an image that is abstained from


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer for one image; `error` says why there is none, and the rest is None then.

    label: the most probable class, or "" where its probability is below what was asked for; `guess` is it
    all the same.
    """

    path: str
    label: str | None = None
    probability: float | None = None  # of the most probable class
    topk: tuple[tuple[str, float], ...] = ()
    error: str | None = None

    @property
    def guess(self) -> str | None:
        """The most probable class, whatever its probability."""
        return self.topk[0][0] if self.topk else None

    def to_json(self) -> dict[str, Any]:
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        topk = [{"label": label, "probability": p} for label, p in self.topk]
        return {"path": self.path, "label": self.label, "probability": self.probability, "topk": topk}

    def to_csv(self) -> str:
        """A line of CSV, in the order of CSV_HEADER."""
        text = io.StringIO()
        shown = "" if self.probability is None else f"{self.probability:.6f}"
        row = [self.path, self.label or UNSURE, self.guess or "", shown, self.error or ""]
        csv.writer(text, lineterminator="\n").writerow(row)
        return text.getvalue()

    def describe(self) -> str:
        if self.error is not None:
            return f"failed: {self.error}"
        said = f"{show_text(self.label)} {self.probability:.3f}" if self.label else "(unsure)"
        runners_up = self.topk[1:3] if self.label else self.topk[:3]
        others = ", ".join(f"{show_text(label)} {p:.3f}" for label, p in runners_up)
        return said + (f"  ({others})" if others else "")


CSV_HEADER = "path,label,guess,probability,error\n"


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
        return "".join(csv_lines(self.predictions))

    def describe(self) -> str:
        width = path_width(prediction.path for prediction in self.predictions)
        lines = [line.rstrip("\n") for line in text_lines(self.predictions, width=width)]
        return "\n".join([*lines, *self.notes])


def path_width(paths: Iterable[str]) -> int:
    """What paths are padded to, so that the answers stand in a column."""
    return min(max(map(len, paths), default=0), WIDEST_PATH)


def text_lines(predictions: Iterable[Prediction], *, width: int = WIDEST_PATH) -> Iterator[str]:
    for prediction in predictions:
        yield f"{prediction.path:{width}}  {prediction.describe()}\n"


def csv_lines(predictions: Iterable[Prediction]) -> Iterator[str]:
    yield CSV_HEADER
    for prediction in predictions:
        yield prediction.to_csv()


def written_to_csv(predictions: Iterable[Prediction], path: Path) -> Generator[Prediction, None, None]:
    """The predictions, written on the way to a file that gets its name `path` once it has all. DiskError."""
    with (
        whole_or_nothing(path) as temporary,
        disk_errors(path, doing="writing"),
        open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        file.write(CSV_HEADER)
        for prediction in predictions:
            file.write(prediction.to_csv())
            yield prediction


def json_lines(predictions: Iterable[Prediction]) -> Iterator[str]:
    """An object a line."""
    for prediction in predictions:
        yield json.dumps(prediction.to_json(), allow_nan=False) + "\n"


def json_list(predictions: Iterable[Prediction]) -> Iterator[str]:
    """The pieces of one list on one line, which is JSON once it is whole."""
    before = "["
    for prediction in predictions:
        yield before + json.dumps(prediction.to_json(), allow_nan=False)
        before = ", "
    yield "[]\n" if before == "[" else "]\n"


class PredictionStream(Iterator[Prediction]):
    """Predictions as they are computed, in the order the images were given; to be iterated over once.

    files: what is predicted. notes: what the user should know of the search for images, and of the engine.
    """

    def __init__(
        self, predictions: Iterator[Prediction], *, files: Sequence[Path], notes: Sequence[str]
    ) -> None:
        self.files, self.notes = files, tuple(notes)
        self.failed = 0  # so far
        self._predictions = predictions

    def __next__(self) -> Prediction:
        prediction = next(self._predictions)
        self.failed += prediction.error is not None
        return prediction

    @property
    def width(self) -> int:
        """What paths are padded to, by the first of them."""
        return path_width(show_path(file) for file in self.files[:_LOOKED_AT])


class PredictOptions(TypedDict, total=False):
    """See `iter_predictions`, which has the defaults."""

    top_k: int
    views: int
    seed: int
    abstain_below: float
    weights: str | None
    backbone: str | None
    follow_links: bool
    device: str
    engine: str
    batch_size: int | None
    workers: int | None
    progress: Progress | None


def predict(
    model: str | os.PathLike[str],
    images: Sequence[str | os.PathLike[str]],
    **options: Unpack[PredictOptions],
) -> PredictResult:
    """Predict the class of every image in `images`, which names files and folders.

    The options, and what is raised, are those of `iter_predictions`, which gives the predictions one by one.
    """
    stream = iter_predictions(model, images, **options)
    return PredictResult(predictions=tuple(stream), notes=stream.notes)


def iter_predictions(
    model: str | os.PathLike[str],
    images: Sequence[str | os.PathLike[str]],
    *,
    top_k: int = 5,
    views: int = 1,
    seed: int = 0,
    abstain_below: float = 0.0,
    weights: str | None = None,
    backbone: str | None = None,
    follow_links: bool = False,
    device: str = "auto",
    engine: str = AUTO,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PredictionStream:
    """The class of every image in `images`, one after the other, while later images are still unread.

    views: pictures of each image, the plain one and augmented ones drawn by `seed`, whose probabilities are
    averaged. abstain_below: an image whose most probable class is less probable gets the label "".
    weights: the backbone's weights file, where it is not where the store's maker had it.
    backbone: must repeat a model's own `module:function` to allow that code to be run.

    Raises ModelError, DataError, BackboneError (among them: the weights found are not those the features
    were made with), DeviceError before the first image is read. An image that cannot be read is a prediction
    with an error.
    """
    if top_k < 1 or views < 1 or not 0 <= abstain_below <= 1:
        raise ValueError("top_k and views are at least 1, abstain_below is a probability")
    progress = progress or SilentProgress()
    fitted = Model.load(Path(model))
    files, notes = find_images([Path(image) for image in images], follow_links=follow_links)
    ready = ReadyModel.load(
        fitted,
        where=show_path(Path(model)),
        images=len(files) * views,
        weights=weights,
        allowed=backbone,
        device=device,
        engine=engine,
        batch_size=batch_size,
        workers=workers,
    )
    if ready.said:
        progress.note(ready.said)
    rank = _Ranking(classes=fitted.classes, top_k=top_k, abstain_below=abstain_below)
    predictions = _predict_files(ready, files, views=views, seed=seed, rank=rank, progress=progress)
    return PredictionStream(predictions, files=files, notes=notes)


def _predict_files(
    ready: ReadyModel, files: Sequence[Path], *, views: int, seed: int, rank: _Ranking, progress: Progress
) -> Iterator[Prediction]:
    progress.start("predicting", total=len(files), unit="images")
    done = 0
    for batch in ready.answer(files, views=views, seed=seed):
        for outcome, probabilities in zip(batch.outcomes, batch.probabilities, strict=True):
            path = show_path(files[done])
            done += 1
            if isinstance(outcome, ImageFailure):
                yield Prediction(path=path, error=outcome.reason)
            else:
                yield rank.prediction(path, probabilities)
        progress.advance(len(batch.outcomes))
    progress.finish()


@dataclass(frozen=True, kw_only=True)
class _Ranking:
    """How probabilities become an answer."""

    classes: Sequence[str]
    top_k: int
    abstain_below: float

    def prediction(self, path: str, probabilities: NDArray[np.float64]) -> Prediction:
        order = np.argsort(-probabilities, kind="stable")[: self.top_k]
        topk = tuple((self.classes[i], float(probabilities[i])) for i in order)
        label, probability = topk[0]
        sure = probability >= self.abstain_below
        return Prediction(path=path, label=label if sure else UNSURE, probability=probability, topk=topk)
