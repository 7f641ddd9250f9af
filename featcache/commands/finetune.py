"""`featcache finetune`: train the last blocks of a model's network and its head, from the fitted head on.

The start and all weights on the way are compared on the val rows; the test rows are scored once, at the end.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featcache.backbones.cut import cut_network
from featcache.disk import write_atomically
from featcache.engines import AUTO
from featcache.engines.devices import find_device
from featcache.errors import HeadError
from featcache.evaluate.metrics import Metrics
from featcache.evaluate.report import class_lines, score_lines
from featcache.images.paths import show_path
from featcache.inference import load_network
from featcache.interrupts import graceful_stop
from featcache.model import Model
from featcache.processors import usable_processors
from featcache.progress import Progress, SilentProgress
from featcache.sharding import processors_of_rank
from featcache.spec import StoreDtype
from featcache.store.files import begins_as_store
from featcache.tuning.activations import Cache, Preparation
from featcache.tuning.checkpoint import Checkpoint
from featcache.tuning.curve import curve_csv, curve_png
from featcache.tuning.ranks import joined_ranks
from featcache.tuning.run import Tuned, TuningRun
from featcache.tuning.settings import Settings
from featcache.tuning.start import linear_head

CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What training came to.

    alpha: the share of the trained weights in those that were kept; 0 where the fitted head is kept, and
    `output` holds just what `model` does. val: how each alpha did on the val rows, 0 being the start.
    scored_on, metrics: of the kept model, on rows that nothing was chosen on; None after an interruption.
    """

    model: str
    output: str
    alpha: float
    val: tuple[Mapping[str, float], ...]
    n_train: int
    n_val: int
    trained_on: str
    validated_on: str
    scored_on: str
    metrics: Metrics | None
    blocks: tuple[str, ...]
    frozen_blocks: int
    cached: bool
    store: str | None
    epochs: int
    best_epoch: int
    why_ended: str
    settings: Mapping[str, Any]
    losses: tuple[float, ...]  # one a step
    seconds: float
    training_seconds: float
    notes: tuple[str, ...]

    @property
    def probe_kept(self) -> bool:
        return self.alpha == 0

    def to_json(self) -> dict[str, Any]:
        raw = {**asdict(self), "probe_kept": self.probe_kept, "notes": list(self.notes)}
        del raw["losses"]  # the curve has them by epoch
        return raw

    def describe(self) -> str:
        """The report a person reads in a terminal."""
        parts = [*self._training_lines(), "", *self._choice_lines()]
        if self.metrics is not None:
            parts += ["", *score_lines(self.metrics, on=self.scored_on), "", *class_lines(self.metrics)]
        parts += [f"note: {note}" for note in self.notes]
        if self.store:
            parts.append(f"{self.store} is kept for the next run on the same images; remove it when done")
        return "\n".join(
            [*parts, "", f"written to {self.output}; next: featcache predict {self.output} IMAGES"]
        )

    def _training_lines(self) -> list[str]:
        blocks = ", ".join(self.blocks[:3]) + (
            f" and {len(self.blocks) - 3} more" if len(self.blocks) > 3 else ""
        )
        return [
            f"trained {blocks} and the head; {self.frozen_blocks} blocks before them frozen",
            f"{self.epochs} epochs over {self.n_train:,} rows ({self.trained_on}) in "
            f"{self.training_seconds:.1f} s of {self.seconds:.1f} s; {self.why_ended}",
        ]

    def _choice_lines(self) -> list[str]:
        by_alpha = {row["alpha"]: row for row in self.val}
        lines = [f"validated on {self.n_val:,} rows: {self.validated_on}", "", "   tuned  accuracy  log-loss"]
        mark = {self.alpha: ">"}
        lines += [
            f"{mark.get(alpha, ' ')} {alpha:>6.0%}  {row['accuracy']:>8.4f}  {row['log_loss']:>8.4f}"
            for alpha, row in by_alpha.items()
        ]
        probe, best = by_alpha[0.0], by_alpha.get(1.0)
        if self.probe_kept and best is not None:
            lines.append(
                f"the fitted head is kept: fine-tuning did not beat it on val by more than a standard error "
                f"({best['accuracy']:.4f} to {probe['accuracy']:.4f})"
            )
        return lines


def finetune(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    follow_links: bool = False,
    weights: str | None = None,
    backbone: str | None = None,
    cache: Cache = "auto",
    store_dtype: StoreDtype = "float16",
    engine: str = AUTO,
    device: str = "auto",
    workers: int | None = None,
    restart: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    progress: Progress | None = None,
    **settings: Any,
) -> FinetuneResult:
    """Fine-tune the network of `model` on the images of `data`; `output` is the better of it and `model`.

    model: of a linear head. data, root, follow_links: as for `embed`. weights, backbone: as for `predict`.
    settings: the fields of `featcache.tuning.settings.Settings`.
    cache: "yes" keeps the activations at the cut in `output`.tail.h5, in `store_dtype`, and trains on them;
        "no" decodes and computes them every epoch; "auto" does what is measured to be faster.
    engine: of the frozen part while it is cached. checkpoint_seconds: between two checkpoints in an epoch.
    restart: begin again, though a checkpoint of this or another run is there.

    Beside `output` come its report (.json), its curve (.curve.csv, .curve.png), and while it is trained a
    checkpoint from which the same call goes on. Under torchrun the ranks train together.
    ModelError, HeadError, DataError, BackboneError, DiskError: what stands in the way, in one line.
    """
    begun = time.perf_counter()
    chosen, files = Settings(**settings), _Files(Path(output))
    if cache not in ("auto", "yes", "no"):
        raise ValueError(f"cache is auto, yes or no, not {cache!r}")
    if begins_as_store(files.output):
        raise HeadError(
            f"{show_path(files.output)} is a feature store, which would be replaced. Choose another --output."
        )
    with joined_ranks(find_device(device)) as ranks:
        said = (progress or SilentProgress()) if ranks.is_first else SilentProgress()
        fitted = Model.load(model)
        linear_head(fitted, where=str(model))
        network = load_network(fitted, where=str(model), weights=weights, allowed=backbone)
        tail = cut_network(network, fitted.nodes, chosen.unfreeze)
        prepared = Preparation(
            model=fitted,
            backbone=network,
            tail=tail,
            settings=chosen,
            data=Path(data),
            root=None if root is None else Path(root),
            follow_links=follow_links,
            store=files.store,
            store_dtype=store_dtype,
            engine=engine,
            workers=workers or processors_of_rank(usable_processors()),
            ranks=ranks,
            progress=said,
        ).prepare(cache, begun_with={} if restart else Checkpoint.recorded_run(files.checkpoint))
        run = TuningRun(
            model=fitted,
            where=Path(model),
            backbone=network,
            tail=tail,
            prepared=prepared,
            settings=chosen,
            ranks=ranks,
            progress=said,
            checkpoint=files.checkpoint,
            checkpoint_seconds=checkpoint_seconds,
        )
        # A signal is raised again once what was found until then is written.
        with graceful_stop() as stop:
            training = time.perf_counter()
            tuned = run.carry_out(stop, restart=restart)
            result = _result(run, tuned, files=files, begun=begun, training=training)
            if ranks.is_first:
                files.write(tuned, result, progress=said)
        return result


@dataclass(frozen=True)
class _Files:
    """What a run writes: the model, and beside it what belongs to it."""

    output: Path

    @property
    def store(self) -> Path:
        return self._beside(".tail.h5")

    @property
    def checkpoint(self) -> Path:
        return self._beside(".checkpoint")

    def write(self, tuned: Tuned, result: FinetuneResult, *, progress: Progress) -> None:
        """All of it; of a run that was stopped the best so far, if there is any, and the checkpoint stays."""
        if tuned.state.curve:
            write_atomically(self._beside(".curve.csv"), curve_csv(tuned.state.curve).encode())
            picture = curve_png(tuned.state.curve, best_epoch=tuned.state.best_epoch)
            write_atomically(self._beside(".curve.png"), picture)
        if tuned.stopped and tuned.state.best is None:
            progress.note("no epoch was finished; the same command goes on")
            return
        tuned.model.save(self.output)
        report = json.dumps(result.to_json(), indent=2) + "\n"
        write_atomically(self._beside(".json"), report.encode())
        if tuned.stopped:
            progress.note(f"{show_path(self.output)} has the best so far; the same command goes on")
        else:
            Checkpoint.remove(self.checkpoint)

    def _beside(self, ending: str) -> Path:
        return self.output.with_name(self.output.name + ending)


def _result(run: TuningRun, tuned: Tuned, *, files: _Files, begun: float, training: float) -> FinetuneResult:
    state, rows, now = tuned.state, tuned.rows, time.perf_counter()
    return FinetuneResult(
        model=str(run.where),
        output=str(files.output),
        alpha=tuned.choice.alpha,
        val=tuple(tuned.choice.to_json()["val"]),
        n_train=len(rows.train),
        n_val=len(rows.val),
        trained_on=rows.trained_on,
        validated_on=rows.validated_on,
        scored_on=rows.scored_on,
        metrics=tuned.metrics,
        blocks=run.tail.blocks,
        frozen_blocks=run.tail.frozen,
        cached=run.prepared.cached,
        store=run.prepared.store,
        epochs=state.epoch,
        best_epoch=state.best_epoch,
        why_ended=state.why_ended,
        settings=run.settings.to_json(),
        losses=tuple(state.losses),
        seconds=now - begun,
        training_seconds=now - training,
        notes=(*run.prepared.notes, *tuned.notes),
    )
