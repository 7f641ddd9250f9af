"""Where the products over rows are done: by numpy on the processors, or by torch on a CUDA device.

Everything else of a fit, what the products are for and what is made of them, is the same for both. torch is
imported when it is to do the products, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featcache.heads.entry import RATE
from featcache.heads.pieces import Cut, Piece, cut_rows
from featcache.heads.softmax import ROW_VALUES, Affine, Block, SoftmaxRows
from featcache.processors import usable_processors

WORTH_SECONDS = 10.0  # of products on the processors, from which torch is looked for: to import it takes 2


class Products(Protocol):
    """The products that a fit of a linear head is made of, and what comes before them.

    tile_values: values of a block of rows that is made anew for every read.
    """

    tile_values: int

    def softmax_rows(
        self,
        blocks: Sequence[Callable[[], Iterator[Block]]],
        *,
        affine: Affine,
        weights: NDArray[np.float64],
    ) -> SoftmaxRows:
        """Rows whose log-loss will be asked for many times."""
        ...

    def pieces(self, rows: NDArray[Any], group: NDArray[np.intp], cut: Cut) -> list[Piece]:
        """Rows (n, D) as they are stored, of parts and classes group (n,), with their sums."""
        ...

    def gram(self, n_parts: int, n_features: int) -> GramSum:
        """Sums of cross-products, all 0."""
        ...

    def scores(self, rows: NDArray[Any], weights: NDArray[Any], shift: NDArray[Any]) -> NDArray[Any]:
        """rows (n, D) by weights (M, D) of their dtype, plus shift (M,): (n, M)."""
        ...


class GramSum(Protocol):
    """Cross-products of rows, summed part by part in float64."""

    def add(self, part: int, rows: Any) -> None:
        """Add those of the rows (n, D) of a piece, products in their own dtype."""
        ...

    def total(self) -> NDArray[np.float64]:
        """(n_parts, D, D)."""
        ...


class OnProcessors:
    """`Products` by numpy."""

    tile_values = ROW_VALUES

    def softmax_rows(
        self,
        blocks: Sequence[Callable[[], Iterator[Block]]],
        *,
        affine: Affine,
        weights: NDArray[np.float64],
    ) -> SoftmaxRows:
        return SoftmaxRows(blocks, affine=affine, weights=weights)

    def pieces(self, rows: NDArray[Any], group: NDArray[np.intp], cut: Cut) -> list[Piece]:
        return cut_rows(rows, group, cut)

    def gram(self, n_parts: int, n_features: int) -> GramSum:
        return _GramSum(n_parts, n_features)

    def scores(self, rows: NDArray[Any], weights: NDArray[Any], shift: NDArray[Any]) -> NDArray[Any]:
        scores: NDArray[Any] = rows @ weights.T
        scores += shift.astype(rows.dtype)
        return scores


class _GramSum:
    def __init__(self, n_parts: int, n_features: int) -> None:
        self.sums = np.zeros((n_parts, n_features, n_features))

    def add(self, part: int, rows: NDArray[Any]) -> None:
        self.sums[part] += rows.T @ rows

    def total(self) -> NDArray[np.float64]:
        return self.sums


ON_PROCESSORS: Products = OnProcessors()


def find_products(device: str, *, operations: float) -> Products:
    """Who does the products on this device, of so many operations in all.

    "auto" is a CUDA device where torch has one and the processors would take long. ValueError for a device
    that is not there.
    """
    if device == "cpu":
        return ON_PROCESSORS
    if device == "auto" and operations < WORTH_SECONDS * RATE * usable_processors():
        return ON_PROCESSORS
    from featcache.heads.minibatch import pick_device  # imports torch when it is called

    found = pick_device(device)
    if found.type == "cpu":
        return ON_PROCESSORS
    from featcache.heads.softmax_torch import OnTorch

    return OnTorch(found)
