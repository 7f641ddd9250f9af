"""Products of many rows with a few models, which take most of the time of a fit of few classes.

A matrix library copies both sides of a product into an order of its own first, which pays where both are
large. The kernels of OpenBLAS for AVX-512 leave that out for small products, and are then twice as fast: so
the rows are handed over a few at a time.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_info

NARROW = 32  # models below which the matrix library is faster with the rows on the left
SMALL = 1_000_000  # multiplications up to which the product is small: OpenBLAS, sgemm_small_kernel_permit
MOST = 16  # models from which small products gain nothing
LEAST = 32  # rows below which calling costs more than is won
KERNELS = ("SkylakeX", "Cooperlake", "SapphireRapids")


def of_models(models: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """Models (M, R) by rows (n, R): (M, n)."""
    if len(models) >= NARROW:
        product: NDArray[Any] = models @ rows.T
        return product
    return np.ascontiguousarray(_on_the_left(models, rows).T)


def of_rows(values: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """Values (M, n) by rows (n, R): (M, R)."""
    few = _few(values, rows)
    if not few:
        product: NDArray[Any] = (rows.T @ values.T).T if len(values) < NARROW else values @ rows
        return product
    (M, n), R = values.shape, rows.shape[1]
    even = n - n % few
    tiles = values[:, :even].reshape(M, -1, few).transpose(1, 0, 2)  # (n // few, M, few)
    total: NDArray[Any] = np.matmul(tiles, rows[:even].reshape(-1, few, R)).sum(axis=0)
    total += values[:, even:] @ rows[even:]
    return total


def _on_the_left(models: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """(n, M)."""
    few = _few(models, rows)
    if not few:
        product: NDArray[Any] = rows @ models.T
        return product
    (M, R), n = models.shape, len(rows)
    even = n - n % few
    out = np.empty((n, M), dtype=rows.dtype)
    np.matmul(rows[:even].reshape(-1, few, R), models.T, out=out[:even].reshape(-1, few, M))
    np.matmul(rows[even:], models.T, out=out[even:])
    return out


def _few(models: NDArray[Any], rows: NDArray[Any]) -> int:
    """How many rows to hand over at a time; 0 for all at once."""
    M, (n, R) = len(models), rows.shape
    few = min(SMALL // max(M * R, 1), n)
    single = rows.dtype == np.float32 and rows.flags.c_contiguous
    return few if M <= MOST and few >= LEAST and single and _has_small_kernels() else 0


@cache
def _has_small_kernels() -> bool:
    """Whether numpy's matrix library is one that gains."""
    return any(library.get("architecture") in KERNELS for library in threadpool_info())
