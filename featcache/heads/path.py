"""What a head offers that shares work between folds and between the candidates of a search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

if TYPE_CHECKING:
    from featcache.heads.base import Head


class PathSearch(Protocol):
    """The search of parameters on one set of rows and folds; made by `Head.start_search`."""

    def scores(self, candidates: Sequence[Mapping[str, Any]]) -> Iterator[NDArray[Any]]:
        """For each candidate, values of the parameters by name, in the order given, the scores (n_samples,
        n_classes) of every row by the head that was fitted without the row's fold. Rows that no fold holds
        out may have any score. What a candidate does not name is as in the head that started the search.
        """
        ...

    def fit(self, params: Mapping[str, Any]) -> Head:
        """The head with these parameters, fitted on all rows."""
        ...
