"""What a head offers that shares work between folds and between values of the parameter that is searched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

if TYPE_CHECKING:
    from featcache.heads.base import Head


class PathSearch(Protocol):
    """The search of one parameter on one set of rows and folds; made by `Head.start_search`."""

    def scores(self, values: Sequence[Any]) -> Iterator[NDArray[Any]]:
        """For each value, in the order given, the scores (n_samples, n_classes) of every row by the head
        that was fitted without the row's fold. Rows that no fold holds out may have any score.
        """
        ...

    def fit(self, params: Mapping[str, Any]) -> Head:
        """The head with these parameters, fitted on all rows."""
        ...
