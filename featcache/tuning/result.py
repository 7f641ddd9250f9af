"""What fine-tuning came to, as values and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import Any, Self

from featcache.evaluate.comparison import Difference
from featcache.evaluate.metrics import ClassMetrics, ConfusedPair, Metrics
from featcache.evaluate.report import class_lines, score_lines
from featcache.images.paths import show_path
from featcache.next_step import Step
from featcache.tuning.asked import Asked
from featcache.tuning.comparison import Comparison
from featcache.words import name_some, plural


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What training came to.

    probe_kept: `output` answers just as `model` does. alpha: the share of the trained weights in those that
    were kept, 0 where they are those of the start. choice: how each alpha did on the choice rows, those on
    which the weights to keep were chosen, 0 being the start.
    comparison: of the kept model and `model`, on rows that nothing was chosen on, `scored_on`; None after an
    interruption. next: what to do now. losses: one a step. done_before: nothing was to do, since
    the same run left this result, then without losses. replaced: what was where `output` is, in words.
    """

    model: str
    output: str
    probe_kept: bool
    alpha: float
    choice: tuple[Mapping[str, float], ...]
    n_train: int
    n_choice: int
    trained_on: str
    chosen_on: str
    scored_on: str
    comparison: Comparison | None
    blocks: tuple[str, ...]
    frozen_blocks: int
    cached: bool
    store: str | None
    epochs: int
    best_epoch: int
    why_ended: str
    settings: Mapping[str, Any]
    seconds: float
    training_seconds: float
    next: Step
    notes: tuple[str, ...]
    losses: tuple[float, ...] = field(default=(), repr=False)
    done_before: bool = False
    replaced: str | None = None

    @property
    def metrics(self) -> Metrics | None:
        """Of the kept model."""
        return self.comparison.kept if self.comparison else None

    def to_json(self) -> dict[str, Any]:
        raw = asdict(self)
        del raw["losses"], raw["comparison"]  # the curve has the losses by epoch
        found = self.comparison
        compared = {
            "metrics": found.kept.to_json() if found else None,
            "model_metrics": found.before.to_json() if found else None,
            "difference": asdict(found.difference) if found and found.difference else None,
            "verdict": found.verdict if found else None,
            "seen": found.seen if found else None,
        }
        return {**raw, **compared, "notes": list(self.notes)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Of what `to_json` gave, but for the losses. KeyError, TypeError, ValueError: of something else."""
        known = {each.name for each in fields(cls)} & raw.keys()
        comparison = None
        if raw["metrics"] is not None:
            comparison = Comparison(
                before=_read_metrics(raw["model_metrics"]),
                kept=_read_metrics(raw["metrics"]),
                difference=None if raw["difference"] is None else Difference(**_tuples(raw["difference"])),
                seen=raw["seen"],
            )
        plain = {name: _tuples(raw[name]) for name in known - {"next"}}
        return cls(**plain, comparison=comparison, next=Step(**raw["next"]))

    @classmethod
    def found(cls, raw: Mapping[str, Any]) -> Self:
        """Of a run that was done before."""
        return cls.from_json({**raw, "done_before": True})

    @classmethod
    def can_read(cls, raw: Mapping[str, Any]) -> bool:
        """Whether `from_json` can; a report of another version says other things."""
        try:
            cls.from_json(raw).describe()
        except (AttributeError, KeyError, TypeError, ValueError):
            return False
        return True

    def describe(self) -> str:
        """The report a person reads in a terminal; it ends with what was gained and what to do now."""
        parts = []
        if self.done_before:
            parts += [f"nothing to do: {show_path(self.output)} is what this command made of the same model, "
                      "images and settings; --restart trains again", ""]  # fmt: skip
        parts += [*self._training_lines(), "", *self._choice_lines()]
        if self.metrics is not None:
            parts += ["", *score_lines(self.metrics, on=self.scored_on), "", *class_lines(self.metrics)]
        parts += [f"note: {note}" for note in self.notes]
        if self.store:
            parts.append(
                f"{show_path(self.store)} is kept for the next run on the same images; remove it when done"
            )
        where = f", where {self.replaced} was" if self.replaced else ""
        parts += ["", *([] if self.done_before else [f"written to {show_path(self.output)}{where}"])]
        if self.comparison:
            parts += [*self.comparison.lines(model=self.model, output=self.output), self._verdict()]
        return "\n".join([*parts, *self.next.lines()])

    def _training_lines(self) -> list[str]:
        return [
            f"trained {name_some(self.blocks)} and the head; {plural(self.frozen_blocks, 'block')} before "
            "them frozen",
            f"{plural(self.epochs, 'epoch')} over {self.n_train:,} rows ({self.trained_on}) in "
            f"{self.training_seconds:.1f} s of {self.seconds:.1f} s; {self.why_ended}",
        ]

    def _choice_lines(self) -> list[str]:
        lines = [
            f"choice rows, on which the weights to keep were chosen: {self.chosen_on}",
            "   tuned  accuracy  log-loss",
        ]
        for row in self.choice:
            mark = ">" if row["alpha"] == self.alpha else " "
            lines.append(f"{mark} {row['alpha']:>6.0%}  {row['accuracy']:>8.4f}  {row['log_loss']:>8.4f}")
        if not self.alpha and any(_is_better(row, self.choice[0]) for row in self.choice):
            lines.append(
                "  (the start is kept unless another is right on more rows, beyond one standard error)"
            )
        return lines

    def _on_choice_rows(self) -> str:
        by_alpha = {row["alpha"]: row["accuracy"] for row in self.choice}
        best = max((accuracy for alpha, accuracy in by_alpha.items() if alpha), default=by_alpha[0.0])
        return f"on the {self.n_choice:,} choice rows: {best:.4f} to {by_alpha[0.0]:.4f}"

    def _verdict(self) -> str:
        if self.comparison is None or self.comparison.difference is None:
            return (
                "verdict: MODEL2 is MODEL, since nothing that was trained was better by more than a standard "
                f"error {self._on_choice_rows()}"
            )
        ends = {
            "beats": "fine-tuning helped",
            "is tied with": f"{self.comparison.kept.n:,} rows are too few to tell them apart",
            "is beaten by": "fine-tuning hurt, though it was better where the weights were chosen: the rows "
            "scored may be of other data",
        }
        said = self.comparison.verdict
        return f"verdict: MODEL2 {said} MODEL: {ends[said]}"


def advise(asked: Asked, comparison: Comparison | None, *, frozen_blocks: int) -> Step:
    """What to do now. comparison: None where the run was stopped."""
    if comparison is None:
        return Step(why="to go on", command=asked.line())
    difference = comparison.difference
    if difference is not None and difference.verdict != "is tied with":
        name, better = ("MODEL2", asked.output) if difference.verdict == "beats" else ("MODEL", asked.model)
        return Step(why=f"to use {name}", command=asked.predict_line(better))
    output = _free_name(asked.output)
    if frozen_blocks:
        command = asked.line(output=output, unfreeze="all")
        return Step(why="to train more of the network", command=command)
    if asked.settings.views == 1 and not asked.settings.trivial_augment:
        return Step(why="to train on augmented pictures", command=asked.line(output=output, views=2))
    lower = float(f"{asked.settings.lr / 10:.2g}")
    return Step(why="to train more gently", command=asked.line(output=output, lr=lower))


def _is_better(row: Mapping[str, float], start: Mapping[str, float]) -> bool:
    """As far as a table of four digits shows it."""
    gained = row["accuracy"] - start["accuracy"], start["log_loss"] - row["log_loss"]
    return max(gained) >= 1e-4


def _free_name(taken: Path) -> Path:
    """Another name in the same folder, where nothing is that a command would replace."""
    names = (taken.with_stem(f"{taken.stem}-{number}") for number in count(2))
    return next(name for name in names if not name.exists())


def _read_metrics(raw: Mapping[str, Any]) -> Metrics:
    plain = {name: _tuples(value) for name, value in raw.items() if name not in ("confused", "per_class")}
    return Metrics(
        **plain,
        confused=tuple(ConfusedPair(**_tuples(pair)) for pair in raw["confused"]),
        per_class=tuple(ClassMetrics(**row) for row in raw["per_class"]),
    )


def _tuples(value: Any) -> Any:
    """Lists as tuples, as they were before they were JSON."""
    if isinstance(value, list):
        return tuple(_tuples(each) for each in value)
    if isinstance(value, Mapping):
        return {name: _tuples(each) for name, each in value.items()}
    return value
