"""Rows shifted and scaled on their way from storage into products; float16 quickly. Arrays only.

numpy turns float16 into float32 one value after the other, which takes seven times as long as operations on
their bits that the processor does many at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SIGN_AND_REST = np.int32(0x8FFFE000 - 2**32)  # of a float16 whose bits stand 13 places to the left
BIAS = np.float32(2.0**112)  # exponents count from 15 in float16, from 127 in float32
EXPONENT = np.uint16(0x7C00)
CACHE_VALUES = 128_000  # of rows that are in the cache from one operation to the next


def centre_rows(
    rows: NDArray[Any],
    mean: NDArray[Any],
    reciprocal: NDArray[Any] | None = None,
    *,
    out: NDArray[Any],
) -> None:
    """(rows - mean) * reciprocal in `out`, (n, D); mean and reciprocal (D,).

    The difference is taken in the wider dtype of rows and mean.
    """
    step = max(CACHE_VALUES // max(out.shape[1], 1), 1)
    for start in range(0, len(rows), step):
        made = out[start : start + step]
        np.subtract(widen(rows[start : start + step], out=made), mean, out=made, casting="same_kind")
        if reciprocal is not None:
            made *= reciprocal


def widen(rows: NDArray[Any], *, out: NDArray[Any]) -> NDArray[Any]:
    """Rows of float16 as float32 in `out`, where that is float32; any others as they are.

    They are finite, and so is the result: the bits of a float16, moved to where float32 has its own, are the
    value times 2^-112.
    """
    if rows.dtype != np.float16 or out.dtype != np.float32 or not out.flags.c_contiguous:
        return rows
    bits = out.view(np.int32)
    np.copyto(bits, rows.view(np.int16))
    bits <<= 13
    bits &= SIGN_AND_REST
    out *= BIAS
    return out


def finite(rows: NDArray[Any]) -> bool:
    """Whether no value is infinite or NaN."""
    if rows.dtype == np.float16 and rows.size:
        return bool((rows.view(np.uint16) & EXPONENT).max() < EXPONENT)
    return bool(np.isfinite(rows).all())
