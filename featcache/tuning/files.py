"""The files of a run: the model it writes, and what lies beside that. Knows what is in none of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.disk import write_atomically
from featcache.images.paths import show_path
from featcache.model import begins_as_model
from featcache.outputs import require_model
from featcache.progress import Progress
from featcache.tuning.checkpoint import Checkpoint
from featcache.tuning.report import write_report
from featcache.tuning.result import FinetuneResult

if TYPE_CHECKING:
    from featcache.tuning.run import Tuned


@dataclass(frozen=True)
class TuningFiles:
    """What a run writes: the model, and beside it what belongs to it."""

    output: Path

    @property
    def store(self) -> Path:
        return self._beside(".tail.h5")

    @property
    def checkpoint(self) -> Path:
        return self._beside(".checkpoint")

    @property
    def report(self) -> Path:
        return self._beside(".json")

    def require_writable(self, model: Path) -> None:
        """Refuse, before any work, to replace the model to begin with or anything but a model and its report.

        StoreError, DataError, DiskError: what is there, or that there is no place.
        """
        require_model(self.output, option="--output", needed={"the model to begin with": model})

    def former(self) -> str | None:
        """What is where the model is to be, in words."""
        return "another model" if begins_as_model(self.output) else None

    def write(
        self, tuned: Tuned, result: FinetuneResult, *, key: Mapping[str, Any], progress: Progress
    ) -> None:
        """All of it; of a run that was stopped the best so far, if there is any, and the checkpoint stays."""
        from featcache.tuning.curve import curve_csv, curve_png

        if tuned.state.curve:
            write_atomically(self._beside(".curve.csv"), curve_csv(tuned.state.curve).encode())
            picture = curve_png(tuned.state.curve, best_epoch=tuned.state.best_epoch)
            write_atomically(self._beside(".curve.png"), picture)
        if tuned.stopped and tuned.state.best is None:
            progress.note("no epoch was finished; the same command goes on")
            return
        tuned.model.save(self.output)
        write_report(self.report, result.to_json(), key=key, output=None if tuned.stopped else self.output)
        if tuned.stopped:
            progress.note(f"{show_path(self.output)} has the best so far; the same command goes on")
        else:
            Checkpoint.remove(self.checkpoint)

    def _beside(self, ending: str) -> Path:
        return self.output.with_name(self.output.name + ending)
