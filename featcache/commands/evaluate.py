"""`featcache evaluate`: how good a model is on labelled images, or on their features in a store."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from featcache.answers import (
    ALL,
    Answers,
    ImageRows,
    LabelledRows,
    RowSource,
    StoreRows,
    choose_split,
    join_classes,
    spread,
)
from featcache.disk import write_atomically
from featcache.engines import AUTO
from featcache.errors import DataError, DiskError
from featcache.evaluate.abstain import Accepted, accepted_at
from featcache.evaluate.metrics import Metrics, score
from featcache.evaluate.report import class_lines, score_lines
from featcache.evaluate.splits import number_units
from featcache.images import scan_images
from featcache.images.paths import show_path
from featcache.inference import ReadyModel
from featcache.model import Model, image_keys
from featcache.next_step import Scored, Step, Word, next_step
from featcache.outputs import require_csv
from featcache.progress import Progress, SilentProgress
from featcache.records import SPLITS
from featcache.store.files import begins_as_store
from featcache.words import name_some, plural, show_text

SPLIT_CHOICES = (*SPLITS, ALL)
CSV_HEADER = "path,label,predicted,probability,correct\n"
_SHOWN = 5  # failures named


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """The scores of a model on labelled rows.

    abstained: what answering only from the probability `abstain_below` would give. failed: {path: reason}
    of images that should have been scored and could not be read; they are in no score.
    unknown_classes: {class the model does not know: rows}, all of which count as errors. trained_on: how many
    of the rows scored are images the model was fitted on, as far as its file says.
    """

    model: str
    data: str
    head: str
    fingerprint: str
    scored_on: str
    metrics: Metrics
    abstain_below: float | None
    abstained: Accepted | None
    failed: Mapping[str, str]
    unknown_classes: Mapping[str, int]
    trained_on: int
    notes: tuple[str, ...]
    next: Step | None = None  # None where there is no command for it

    def to_json(self) -> dict[str, Any]:
        metrics = self.metrics.to_json()
        abstained = self.abstained.to_json() if self.abstained else None
        return {
            "model": self.model,
            "data": self.data,
            "head": self.head,
            "scored_on": self.scored_on,
            "n_test": metrics.pop("n"),
            **metrics,
            "abstain": {"below": self.abstain_below, **abstained} if abstained else None,
            "unknown_classes": dict(self.unknown_classes),
            "n_trained_on": self.trained_on,
            "failed": [{"path": path, "reason": reason} for path, reason in self.failed.items()],
            "fingerprint": self.fingerprint,
            "notes": list(self.notes),
            "next": self.next.to_json() if self.next else None,
        }

    def describe(self) -> str:
        lines = [f"{show_path(self.model)} ({self.head}) on {show_path(self.data)}"]
        lines += score_lines(self.metrics, on=self.scored_on, untrained=bool(self.unknown_classes))
        if self.abstained:
            lines.append(
                f"answering from a probability of {self.abstain_below:g}: {self.abstained.describe()}"
            )
        lines += ["", *class_lines(self.metrics)]
        lines += [f"failed: {show_path(path)}: {why}" for path, why in list(self.failed.items())[:_SHOWN]]
        if len(self.failed) > _SHOWN:
            lines.append(f"and {len(self.failed) - _SHOWN:,} more failed")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, *(self.next.lines() if self.next else ())])


def evaluate_model(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    split: str | None = None,
    abstain_below: float | None = None,
    csv_file: str | os.PathLike[str] | None = None,
    views: int = 1,
    seed: int = 0,
    weights: str | None = None,
    backbone: str | None = None,
    root: str | os.PathLike[str] | None = None,
    follow_links: bool = False,
    device: str = "auto",
    engine: str = AUTO,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> EvaluateResult:
    """Score a model on the labelled images of `data`: a folder or CSV as `embed` takes it, or a store.

    split: test, val, train or all; by default test where there is one, else val, else all.
    abstain_below: also say what answering only from this probability would give. csv_file: where to write
    path, label, predicted class, its probability and whether it is right, a row a line; of files that are
    there only such a table is replaced. Where it cannot be written, the error has the scores as its notes.
    views: average over so many views of each image, drawn by `seed`, or as the store has them.
    The other options are those of `iter_predictions` and are for images.

    Raises ModelError, DataError, StoreError (among it SpecMismatch: other features than the model's),
    BackboneError, DeviceError, DiskError.
    """
    if split not in (None, *SPLIT_CHOICES):
        raise ValueError(f"split is one of {', '.join(SPLIT_CHOICES)}, not {split!r}")
    if views < 1 or not 0 <= (abstain_below or 0) <= 1:
        raise ValueError("views is at least 1, abstain_below is a probability")
    progress = progress or SilentProgress()
    fitted, where, shown = Model.load(Path(model)), show_path(Path(model)), show_path(Path(data))
    if csv_file is not None:
        needed = {"the model": Path(model), "the data": Path(data)}
        require_csv(Path(csv_file), CSV_HEADER, option="--csv", needed=needed)
    source = _open_source(
        fitted,
        Path(data),
        where=where,
        root=Path(root) if root else None,
        follow_links=follow_links,
        views=views,
        seed=seed,
        options={
            "weights": weights,
            "allowed": backbone,
            "device": device,
            "engine": engine,
            "batch_size": batch_size,
            "workers": workers,
        },
    )
    chosen, scored_on = choose_split(source.rows, split, data=shown)
    rows = source.rows.take(chosen)
    classes = join_classes(fitted, rows, where=where, data=shown)
    answers = source.answer(chosen, progress)
    given = _Given.of(fitted, rows, answers, classes)
    metrics, unknown = given.score(), _unknown(fitted, given.rows)
    if csv_file is not None:
        scores = score_lines(metrics, on=scored_on, untrained=bool(unknown))
        _write_csv(Path(csv_file), _to_csv(fitted, rows, answers), scores=scores)
    scored = Scored(
        model=Path(model),
        fitted=fitted,
        data=Path(data),
        is_store=isinstance(source, StoreRows),
        rows=source.rows,
        scored_on=scored_on,
        metrics=metrics,
        trained_on=given.trained_on,
        unknown=unknown,
        source=_source_options(root, follow_links),
        weights=weights,
        listed=csv_file is not None,
    )
    return EvaluateResult(
        model=str(model),
        data=str(data),
        head=fitted.head_name,
        fingerprint=fitted.fingerprint,
        scored_on=scored_on,
        metrics=metrics,
        abstain_below=abstain_below,
        abstained=None if abstain_below is None else given.accepted_at(abstain_below),
        failed=answers.failed,
        unknown_classes=unknown,
        trained_on=given.trained_on,
        notes=(*source.notes, *_notes(fitted, source.rows, given.rows, given.trained_on)),
        next=next_step(scored),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Given:
    """The rows that there is an answer for.

    probabilities: (n, len(classes)). units: the same number for copies of an image, which say no more than
    one. trained_on: how many of the rows the model was fitted on.
    """

    rows: LabelledRows
    classes: tuple[str, ...]
    probabilities: NDArray[np.float64]
    units: NDArray[np.int64]
    trained_on: int

    @classmethod
    def of(cls, fitted: Model, rows: LabelledRows, answers: Answers, classes: tuple[str, ...]) -> Self:
        """DataError where there is none."""
        given = np.flatnonzero(answers.given)
        if not len(given):
            raise DataError(f"none of the images can be read: {next(iter(answers.failed.values()))}")
        sha256 = answers.sha256[given]
        return cls(
            rows=rows.take(given),
            classes=classes,
            probabilities=spread(fitted, answers.probabilities[given], classes),
            units=number_units(sha256),
            trained_on=int(np.isin(image_keys(sha256), fitted.trained_on).sum()),
        )

    def score(self) -> Metrics:
        return score(self.rows.y, self.probabilities, self.classes, ids=self.rows.ids, units=self.units)

    def accepted_at(self, threshold: float) -> Accepted:
        return accepted_at(self.rows.y, self.probabilities, threshold, units=self.units)


def _open_source(
    fitted: Model,
    data: Path,
    *,
    where: str,
    root: Path | None,
    follow_links: bool,
    views: int,
    seed: int,
    options: Mapping[str, Any],
) -> RowSource:
    """The rows of a store, known by its first bytes, or of a folder or CSV of images."""
    if begins_as_store(data):
        if root is not None or follow_links:
            option = "--follow-links" if root is None else "--root"
            raise DataError(f"{show_path(data)} is a store, which reads no images: leave {option} away.")
        return StoreRows(fitted, data, where=where, views=views)

    def load(images: int) -> ReadyModel:
        return ReadyModel.load(fitted, where=where, images=images, **options)

    listing = scan_images(data, root=root, follow_links=follow_links)
    return ImageRows(fitted, listing, load=load, views=views, seed=seed)


def _unknown(fitted: Model, rows: LabelledRows) -> dict[str, int]:
    return {name: n for name, n in rows.counts().items() if name not in fitted.classes}


def _notes(fitted: Model, everything: LabelledRows, scored: LabelledRows, trained_on: int) -> list[str]:
    """What makes the score mean less than it seems, or other than is thought."""
    notes = []
    if unknown := _unknown(fitted, scored):
        n = plural(sum(unknown.values()), "row")
        notes.append(f"{n} of classes the model does not know, counted as errors: {name_some(list(unknown))}")
    if unlabelled := int((everything.y < 0).sum()):
        notes.append(f"{plural(unlabelled, 'image')} without a label left out")
    if trained_on:
        n = f"{trained_on:,} of the {len(scored.ids):,} rows scored"
        notes.append(f"{n} are images it was fitted on, which are no measure of it")
    elif not len(fitted.trained_on) and (trained := int((scored.splits == "train").sum())):
        notes.append(f"{plural(trained, 'row')} of the train split: no measure of a model fitted on them")
    was, accuracy = fitted.metrics.get("scored_on"), fitted.metrics.get("accuracy")
    if isinstance(was, str) and isinstance(accuracy, float):
        notes.append(f"when it was fitted, its accuracy was {accuracy:.4f} on {show_text(was)}")
    return notes


def _to_csv(fitted: Model, rows: LabelledRows, answers: Answers) -> str:
    text = io.StringIO()
    text.write(CSV_HEADER)
    writer = csv.writer(text, lineterminator="\n")
    for path, label, row in zip(rows.ids, rows.y.tolist(), answers.probabilities, strict=True):
        name, best = rows.classes[label], int(row.argmax())
        if path in answers.failed:
            writer.writerow([path, name, "", "", ""])
            continue
        said = fitted.classes[best]
        writer.writerow([path, name, said, f"{row[best]:.6f}", "true" if said == name else "false"])
    return text.getvalue()


def _write_csv(path: Path, text: str, *, scores: list[str]) -> None:
    """DiskError with the scores, which may have taken hours."""
    try:
        write_atomically(path, text.encode())
    except DiskError as error:
        for line in scores:
            error.add_note(line)
        raise


def _source_options(root: str | os.PathLike[str] | None, follow_links: bool) -> tuple[Word, ...]:
    """What a command needs to find the same images."""
    return (*(("--root", Path(root)) if root else ()), *(("--follow-links",) if follow_links else ()))
