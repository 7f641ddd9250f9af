"""Reading a store: checked once at the door, then features are a memory map and cost nothing."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DamagedStore, IncompleteStore, StoreError
from featcache.records import SPLITS, RowStatus
from featcache.spec import FeatureNode, FeatureSpec, view_key
from featcache.store.blocks import BlockCheck, BlockState
from featcache.store.features import FeatureSet
from featcache.store.layout import NO_SPLIT, RowTable, StoreLayout
from featcache.store.opening import read_layout
from featcache.words import plural

if TYPE_CHECKING:
    import torch.utils.data


class FeatureStore:
    """A feature store opened for reading; no lock is held and no row is copied.

    A writer that grows the store puts a new file under its name: an open `FeatureStore` keeps the old one.
    """

    def __init__(self, layout: StoreLayout) -> None:
        self.layout = layout

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check: bool = True) -> Self:
        """Open a store and, with `check`, compare every block with its checksums.

        NotAStore, DamagedStore: the file is something else, or its bytes are not those that were written.
        """
        store = cls(read_layout(Path(path)))
        if check:
            store.check()
        return store

    @classmethod
    def salvage(cls, path: str | os.PathLike[str]) -> Self:
        """Open a store, blocks unchecked, also where its seal is broken: for whoever makes it anew.

        Rows of a store that is not `sealed` are known by the sha256 in `sources` alone, once `inspect` has
        found their blocks sound.
        """
        return cls(read_layout(Path(path), salvage=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held open: the maps go with the last array that uses them."""

    @property
    def path(self) -> Path:
        return self.layout.path

    @property
    def spec(self) -> FeatureSpec:
        return self.layout.spec

    @property
    def sealed(self) -> bool:
        """Whether what is not rows is as it was written; always so for a store opened by `open`."""
        return self.layout.sealed

    @property
    def fingerprint(self) -> str:
        return self.layout.fingerprint

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.layout.provenance

    @property
    def table(self) -> RowTable:
        return self.layout.table

    @property
    def classes(self) -> tuple[str, ...]:
        return self.table.classes

    def __len__(self) -> int:
        return self.layout.n_rows

    @cached_property
    def done(self) -> NDArray[np.bool_]:
        """bool ndarray (n_rows,): the rows of blocks declared done, and found sound where that was checked.

        As it was when the store was opened, or when this was first asked of a store opened unchecked.
        """
        blocks = BlockCheck(self.layout)
        return self._rows_of([blocks.is_declared(block) for block in range(self.layout.n_blocks)])

    def _rows_of(self, of_block: Sequence[bool]) -> NDArray[np.bool_]:
        return np.repeat(np.array(of_block, dtype=bool), self.layout.block_rows)[: len(self)]

    @property
    def complete(self) -> bool:
        return bool(self.done.all())

    @cached_property
    def row_status(self) -> NDArray[np.uint8]:
        """uint8 ndarray (n_rows,) of RowStatus; PENDING where the block is not done.

        DamagedStore where a row has a status that there is none of, which an unchecked store may have.
        """
        status = np.full(len(self), RowStatus.PENDING, dtype=np.uint8)
        # Only done rows are touched: a page that the disk cannot give would kill the process.
        status[self.done] = self.layout.map(self.layout.row_status)[self.done]
        unknown = np.flatnonzero(~np.isin(status, list(RowStatus)))
        if len(unknown):
            raise DamagedStore(
                f"{self.path} is damaged: row {unknown[0]} has the status {status[unknown[0]]}, which no row "
                f"has. `featcache verify {self.path}` says what else is."
            )
        return status

    @cached_property
    def sources(self) -> NDArray[Any]:
        """Structured ndarray (n_rows,) of SOURCE_DTYPE: sha256 and stat of each image as it was embedded."""
        return self.layout.map(self.layout.sources)

    def status_counts(self) -> dict[RowStatus, int]:
        return {RowStatus(code): n for code, n in sorted(Counter(self.row_status.tolist()).items())}

    def failed_rows(self) -> list[tuple[str, RowStatus]]:
        """(path, status) of every row that was tried and has no features."""
        codes = self.row_status
        rows = np.flatnonzero((codes != RowStatus.OK) & (codes != RowStatus.PENDING))
        return [(self.table.ids[row], RowStatus(int(codes[row]))) for row in rows]

    def inspect(self) -> list[BlockState]:
        """Compare every block with its checksums; from then on only rows found sound count as done.

        A block whose record is empty is pending, not damaged: the writer writes rows before their record. A
        record that was just being written when it was read is read again.
        """
        states = BlockCheck(self.layout).states()
        if any(state.is_damage for state in states):
            again = BlockCheck(self.layout)
            states = [again.state_of(i) if state.is_damage else state for i, state in enumerate(states)]
        self.done = self._rows_of([state is BlockState.DONE for state in states])
        self.__dict__.pop("row_status", None)  # of rows that were taken for done before
        return states

    def check(self) -> None:
        """Compare every block with its checksums; DamagedStore names the rows that disagree."""
        states = self.inspect()
        damaged = [self.layout.rows_of(block) for block, state in enumerate(states) if state.is_damage]
        if damaged:
            raise DamagedStore(
                f"{self.path} is damaged: rows {name_rows(damaged)} do not match their checksums. "
                f"`featcache repair {self.path}` embeds just these rows again."
            )

    def node(self, key: str | None = None) -> FeatureNode:
        """The node of this key; the first one for None. StoreError names the nodes there are."""
        nodes = {node.key: node for node in self.spec.nodes}
        if key is None:
            return self.spec.nodes[0]
        if key not in nodes:
            raise StoreError(f"{self.path} has no node {key!r}; it holds {', '.join(nodes)}.")
        return nodes[key]

    def map(self, key: str | None = None, *, view: int = 0) -> NDArray[Any]:
        """All rows of a node as they lie in the file: (n_rows, num_features), NaN where a row failed.

        view: 0 is of the plain images; StoreError where the store has no such view.
        """
        return self.dataset(view_key(self.node(key).key, self._checked_view(view)))

    def dataset(self, name: str) -> NDArray[Any]:
        """`map` by the name of a dataset, one of `spec.datasets()`."""
        return self.layout.map(self.layout.features[name])

    def _checked_view(self, view: int) -> int:
        if not 0 <= view < self.spec.views:
            raise StoreError(
                f"{self.path} has no view {view}; it holds {plural(self.spec.views, 'view')}, counted from 0."
            )
        return view

    def features(
        self,
        node: str | Sequence[str] | None = None,
        *,
        view: int = 0,
        with_views: bool = False,
        partial: bool = False,
    ) -> FeatureSet:
        """The usable rows of a node, with labels, ids and splits joined to them.

        node: a key, None for the first node, or several, whose vectors are put one after the other.
        view: 0 is of the plain images, and what is scored is scored on those; others are augmented.
        with_views: the other views of the same rows beside X.
        IncompleteStore when rows are still pending, unless `partial` asks for the complete blocks only.
        """
        keys = (node,) if node is None or isinstance(node, str) else tuple(dict.fromkeys(node))
        chosen = tuple(self.node(key) for key in keys)
        if not self.sealed:
            raise DamagedStore(f"{self.path} is damaged: nothing says which image is which of its rows.")
        if not partial and not self.complete:
            raise IncompleteStore(
                f"{self.path} is not complete: {int((~self.done).sum())} of {len(self)} rows are pending. "
                "Run the same `featcache embed` again: it goes on where it stopped."
            )
        usable = self.row_status == RowStatus.OK
        everything = bool(usable.all())
        keep = slice(None) if everything else np.flatnonzero(usable)

        def vectors(of_view: int) -> NDArray[Any]:
            maps = [self.map(one.key, view=of_view)[keep] for one in chosen]
            return maps[0] if len(maps) == 1 else np.concatenate(maps, axis=1)

        ids = self.table.ids
        others = [other for other in range(self.spec.views) if other != view] if with_views else []
        return FeatureSet(
            X=vectors(view),
            y=np.array(self.table.labels[keep]),
            classes=self.classes,
            ids=ids if everything else tuple(ids[row] for row in np.flatnonzero(usable)),
            splits=_split_names(self.table.splits[keep]),
            sha256=np.array(self.sources["sha256"][keep]),
            nodes=chosen,
            spec=self.spec,
            views=tuple(vectors(other) for other in others),
        )

    def torch_dataset(self, node: str | None = None) -> torch.utils.data.Dataset[tuple[Any, int]]:
        """A map-style torch `Dataset` of (features (num_features,), label) over the usable rows."""
        from featcache.store.torch_dataset import FeatureDataset

        return FeatureDataset(self.features(node))


def _split_names(codes: NDArray[np.uint8]) -> NDArray[np.str_]:
    names = np.array([*SPLITS, ""])
    return names[np.where(codes == NO_SPLIT, len(SPLITS), codes)]


def name_rows(ranges: Sequence[slice], *, limit: int = 5) -> str:
    """`0-255, 512-767, …`: the first few of some ranges of rows, in order, neighbours joined."""
    joined: list[tuple[int, int]] = []
    for rows in ranges:
        if joined and joined[-1][1] == rows.start:
            joined[-1] = (joined[-1][0], rows.stop)
        else:
            joined.append((rows.start, rows.stop))
    return ", ".join(f"{start}-{stop - 1}" for start, stop in joined[:limit]) + (
        ", …" if len(joined) > limit else ""
    )
