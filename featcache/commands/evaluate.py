"""`featcache evaluate`: how good a model is on labelled images, or on their features in a store."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
from featcache.errors import DataError, DiskError, StoreError
from featcache.evaluate.abstain import Accepted, accepted_at
from featcache.evaluate.metrics import Metrics, score
from featcache.evaluate.report import class_lines, score_lines
from featcache.evaluate.splits import number_units
from featcache.images import scan_images
from featcache.images.paths import show_path
from featcache.inference import ReadyModel
from featcache.model import Model, image_keys
from featcache.progress import Progress, SilentProgress
from featcache.records import SPLITS
from featcache.store.files import begins_as_store
from featcache.words import name_some, plural, show_text

SPLIT_CHOICES = (*SPLITS, ALL)
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
        }

    def describe(self) -> str:
        lines = [f"{show_path(self.model)} ({self.head}) on {show_path(self.data)}"]
        lines += score_lines(self.metrics, on=self.scored_on)
        if self.abstained:
            lines.append(
                f"answering from a probability of {self.abstain_below:g}: {self.abstained.describe()}"
            )
        lines += ["", *class_lines(self.metrics)]
        lines += [f"failed: {show_path(path)}: {why}" for path, why in list(self.failed.items())[:_SHOWN]]
        if len(self.failed) > _SHOWN:
            lines.append(f"and {len(self.failed) - _SHOWN:,} more failed")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


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
    path, label, predicted class, its probability and whether it is right, a row a line.
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
    fitted = Model.load(Path(model))
    if csv_file is not None:
        _require_writable(Path(csv_file), model=Path(model))
    source = _open_source(
        fitted,
        Path(data),
        where=str(model),
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
    chosen, scored_on = choose_split(source.rows, split, data=str(data))
    rows = source.rows.take(chosen)
    classes = join_classes(fitted, rows, where=str(model), data=str(data))
    answers = source.answer(chosen, progress)
    given = np.flatnonzero(answers.given)
    if not len(given):
        raise DataError(f"none of the images can be read: {next(iter(answers.failed.values()))}")
    scored = rows.take(given)
    trained_on = int(np.isin(image_keys(answers.sha256[given]), fitted.trained_on).sum())
    table = spread(fitted, answers.probabilities[given], classes)
    units = number_units(answers.sha256[given])  # copies of an image say no more than one
    if csv_file is not None:
        write_atomically(Path(csv_file), _to_csv(fitted, rows, answers).encode())
    return EvaluateResult(
        model=str(model),
        data=str(data),
        head=fitted.head_name,
        fingerprint=fitted.fingerprint,
        scored_on=scored_on,
        metrics=score(scored.y, table, classes, ids=scored.ids, units=units),
        abstain_below=abstain_below,
        abstained=None if abstain_below is None else accepted_at(scored.y, table, abstain_below, units=units),
        failed=answers.failed,
        unknown_classes=_unknown_classes(fitted, scored),
        trained_on=trained_on,
        notes=(*source.notes, *_notes(fitted, source.rows, scored, trained_on)),
    )


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
        return StoreRows(fitted, data, where=where, views=views)

    def load(images: int) -> ReadyModel:
        return ReadyModel.load(fitted, where=where, images=images, **options)

    listing = scan_images(data, root=root, follow_links=follow_links)
    return ImageRows(fitted, listing, load=load, views=views, seed=seed)


def _unknown_classes(fitted: Model, rows: LabelledRows) -> dict[str, int]:
    return {name: n for name, n in rows.counts().items() if name not in fitted.classes}


def _notes(fitted: Model, everything: LabelledRows, scored: LabelledRows, trained_on: int) -> list[str]:
    """What makes the score mean less than it seems, or other than is thought."""
    notes = []
    if unknown := _unknown_classes(fitted, scored):
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
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "predicted", "probability", "correct"])
    for path, label, row in zip(rows.ids, rows.y.tolist(), answers.probabilities, strict=True):
        name, best = rows.classes[label], int(row.argmax())
        if path in answers.failed:
            writer.writerow([path, name, "", "", ""])
            continue
        said = fitted.classes[best]
        writer.writerow([path, name, said, f"{row[best]:.6f}", "true" if said == name else "false"])
    return text.getvalue()


def _require_writable(path: Path, *, model: Path) -> None:
    """Refuse, before any work, a CSV that would replace a store or the model, or lie in no folder."""
    if begins_as_store(path) or (path.exists() and path.samefile(model)):
        raise StoreError(f"{path} is a store or the model, which would be replaced. Choose another --csv.")
    if not path.parent.is_dir():
        raise DiskError(f"{path} cannot be written: there is no folder {path.parent}. Make it first.")
