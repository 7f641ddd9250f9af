"""One call of `finetune` once it is known that there is something to do: from a model and images to files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from featcache.backbones.cut import cut_network
from featcache.engines.devices import find_device
from featcache.images.paths import show_path
from featcache.inference import load_network
from featcache.interrupts import graceful_stop
from featcache.model import Model
from featcache.processors import usable_processors
from featcache.progress import Progress, SilentProgress
from featcache.sharding import processors_of_rank
from featcache.tuning.activations import Preparation
from featcache.tuning.asked import Asked
from featcache.tuning.dataset import DataSet
from featcache.tuning.files import TuningFiles
from featcache.tuning.finished import look_first
from featcache.tuning.ranks import Message, Ranks, joined_ranks
from featcache.tuning.result import FinetuneResult, advise
from featcache.tuning.run import Tuned, TuningRun
from featcache.tuning.settings import Settings
from featcache.tuning.start import linear_head


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `finetune` was given. device, workers, checkpoint_seconds: see there. begun: the clock then."""

    asked: Asked
    fitted: Model
    data: DataSet
    files: TuningFiles
    progress: Progress
    device: str
    workers: int | None
    restart: bool
    checkpoint_seconds: float
    begun: float

    def carry_out(self, looked: Mapping[str, Any] | None) -> FinetuneResult:
        """looked: what `look_first` gave; None where the first of several ranks is to look for all."""
        with joined_ranks(find_device(self.device)) as ranks:
            if looked is None:
                looked = ranks.from_first(lambda: Message(self._look())).plain
            if looked["report"] is not None:
                return FinetuneResult.found(looked["report"])
            return self._train(ranks, looked)

    def _look(self) -> dict[str, Any]:
        return look_first(self.asked, self.fitted, self.data, self.files, restart=self.restart)

    def _train(self, ranks: Ranks, looked: Mapping[str, Any]) -> FinetuneResult:
        asked, fitted, files = self.asked, self.fitted, self.files
        progress = self.progress if ranks.is_first else SilentProgress()
        linear_head(fitted, where=show_path(asked.model))
        network = load_network(fitted, where=str(asked.model), weights=asked.weights, allowed=asked.backbone)
        tail = cut_network(network, fitted.nodes, asked.settings.unfreeze)
        prepared = Preparation(
            asked=asked,
            model=fitted,
            backbone=network,
            tail=tail,
            data=self.data,
            store=files.store,
            workers=self.workers or processors_of_rank(usable_processors()),
            ranks=ranks,
            progress=progress,
        ).prepare(begun_with=looked["checkpoint"])
        run = TuningRun(
            model=fitted,
            where=asked.model,
            sha256=looked["key"]["model"],
            backbone=network,
            tail=tail,
            prepared=prepared,
            settings=asked.settings_for(fitted),
            group_by=asked.group_by,
            ranks=ranks,
            progress=progress,
            checkpoint=files.checkpoint,
            checkpoint_seconds=self.checkpoint_seconds,
        )
        # A signal is raised again once what was found until then is written.
        with graceful_stop() as stop:
            training = time.perf_counter()
            tuned = run.carry_out(stop, restart=self.restart)
            result = self._result(run, tuned, training=training, replaced=looked["replaced"])
            if ranks.is_first:
                files.write(tuned, result, key=looked["key"], progress=progress)
        return result

    def _result(
        self, run: TuningRun, tuned: Tuned, *, training: float, replaced: str | None
    ) -> FinetuneResult:
        state, rows, now = tuned.state, tuned.rows, time.perf_counter()
        seen = tuned.comparison.seen if tuned.comparison else 0
        return FinetuneResult(
            model=str(run.where),
            output=str(self.files.output),
            replaced=replaced,
            probe_kept=tuned.probe_kept,
            alpha=tuned.choice.alpha,
            choice=tuple(tuned.choice.to_json()["choice"]),
            n_train=len(rows.train),
            n_choice=len(rows.choice),
            trained_on=rows.trained_on,
            chosen_on=rows.chosen_on,
            scored_on=rows.scored_on,
            comparison=tuned.comparison,
            blocks=run.tail.blocks,
            frozen_blocks=run.tail.frozen,
            cached=run.prepared.cached,
            store=run.prepared.store,
            epochs=state.epoch,
            best_epoch=state.best_epoch,
            why_ended=state.why_ended,
            settings=run.settings.to_json(),
            losses=tuple(state.losses),
            seconds=now - self.begun,
            training_seconds=now - training,
            next=advise(self.asked, tuned.comparison, frozen_blocks=run.tail.frozen),
            notes=(
                *run.prepared.notes,
                *tuned.notes,
                *_seen_note(seen, of=len(rows.test)),
                *_start_note(run.settings, asked=self.asked.settings),
            ),
        )


def _seen_note(seen: int, *, of: int) -> list[str]:
    if not seen:
        return []
    return [f"{seen:,} of the {of:,} rows scored are images that MODEL was fitted on: no measure of either"]


def _start_note(settings: Settings, *, asked: Settings) -> list[str]:
    if settings.start == asked.start:
        return []
    return ["MODEL is fine-tuned, so the run began with its head as it is, as with --start model"]
