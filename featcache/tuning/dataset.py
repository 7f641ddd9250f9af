"""The images of a run as they are listed: their names, labels and splits. Opens none of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.images import scan_images
from featcache.model import Model
from featcache.origin import describe_origin
from featcache.records import SPLITS, Listing
from featcache.store.features import FeatureSet
from featcache.store.layout import NO_SPLIT, RowTable
from featcache.tuning.grouping import named_groups
from featcache.tuning.rows import TuningRows, require_all_classes, tuning_rows


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A folder or CSV as `embed` takes it, listed when that is first asked for. DataError."""

    path: Path
    root: Path | None
    follow_links: bool

    @cached_property
    def listing(self) -> Listing:
        return scan_images(self.path, root=self.root, follow_links=self.follow_links)

    @property
    def origin(self) -> dict[str, Any]:
        return describe_origin(self.path, self.root, follow_links=self.follow_links)

    def require_rows(self, model: Model, *, forget: bool, group_by: str | None = None) -> TuningRows:
        """The rows, as names tell them.

        HeadError where labels and splits alone say that nothing can be learned, chosen or scored.
        forget: whether classes of the model may lack images. The digests of the images are not known yet, and
        those of their names stand for them: which rows are held out changes by that, not whether there are
        some. Groups that vectors tell are not known yet either.
        """
        table = RowTable.from_records(self.listing.records, self.listing.classes)
        digests = b"".join(hashlib.sha256(path.encode()).digest() for path in table.ids)
        names = np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32)
        named = without_vectors(table, np.arange(len(names)), sha256=names, model=model)
        rows = tuning_rows(named, model.classes, named_groups(group_by, named))
        if not forget:
            require_all_classes(rows, model.classes)
        return rows

    def digest(self) -> str:
        """Of names, labels, splits, sizes and times: equal ones mean that no image need be looked at."""
        listed = self.listing
        rows = [[record.path, record.label, record.split, *record.stat] for record in listed.records]
        text = json.dumps([listed.classes, rows])
        return hashlib.sha256(text.encode()).hexdigest()


def without_vectors(
    table: RowTable, rows: NDArray[np.intp], *, sha256: NDArray[np.uint8], model: Model
) -> FeatureSet:
    """Some rows of a table as features of no columns: there is no use for vectors here. sha256: of each."""
    names, splits = np.array([*SPLITS, ""]), table.splits[rows]
    return FeatureSet(
        X=np.empty((len(rows), 0), dtype=np.float32),
        y=table.labels[rows],
        classes=table.classes,
        ids=tuple(table.ids[row] for row in rows.tolist()),
        splits=names[np.where(splits == NO_SPLIT, len(SPLITS), splits)],
        sha256=sha256,
        nodes=model.nodes,
        spec=model.spec,
    )
