"""What is there before a run: whether it was done already, or is to go on, and whether it can be done at all.

Knows no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from featcache.model import Model
from featcache.tuning.asked import Asked
from featcache.tuning.checkpoint import Checkpoint, begun_from, require_same_run
from featcache.tuning.dataset import DataSet
from featcache.tuning.grouping import groups_digest
from featcache.tuning.launched import launched_ranks
from featcache.tuning.report import find_report, sha256_of
from featcache.tuning.result import FinetuneResult

if TYPE_CHECKING:
    from featcache.tuning.files import TuningFiles


def look_first(
    asked: Asked, fitted: Model, data: DataSet, files: TuningFiles, *, restart: bool
) -> dict[str, Any]:
    """JSON-able: what decides the result ("key"), the report of a run that did just this, or None, and
    what the checkpoint is of ("checkpoint").

    HeadError: nothing can be learned. ModelError: a checkpoint of another run. DiskError, StoreError,
    DataError: the output cannot be written. "replaced": what another run left where the model is to be.
    """
    files.require_writable(asked.model)
    rows = data.require_rows(fitted, forget=asked.forget, group_by=asked.group_by)
    model = sha256_of(asked.model)
    key = asked.key(model=model, images=data.digest(), groups=groups_digest(rows.groups))
    first = {"key": key, "report": None, "checkpoint": {}, "replaced": files.former()}
    if restart:
        return first
    report = find_report(files.report, key=key, output=files.output)
    if report is not None and FinetuneResult.can_read(report):
        return {**first, "report": report}
    recorded = Checkpoint.recorded_run(files.checkpoint)
    if recorded:
        now = begun_from(asked.settings_for(fitted), model=model, ranks=launched_ranks())
        require_same_run(files.checkpoint, recorded, now, names=now)
    # The model that is there may be the best so far of just this run.
    own = find_report(files.report, key=key, output=None) if recorded else None
    replaced = first["replaced"] if own is None else own.get("replaced")
    return {**first, "checkpoint": recorded, "replaced": replaced}
