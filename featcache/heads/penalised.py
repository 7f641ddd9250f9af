"""Solutions of one symmetric system under many penalties. A matrix in, columns out; knows no rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack


class Penalised:
    """Solutions of (G + alpha) W = B for many alpha: G, (D, D), is made tridiagonal once, by reflections.

    That is the first third of an eigendecomposition, and the rest is not needed: a tridiagonal system takes
    some D operations for each alpha. (Golub and Van Loan, "Matrix computations", 2013, section 8.3.1.)
    gram: (D, D), symmetric and not negative up to rounding, or (D,) where it is diagonal. noise: the relative
    rounding error of its entries.
    """

    def __init__(self, gram: NDArray[np.float64], *, noise: float) -> None:
        self.noise = noise
        if gram.ndim == 1 or len(gram) == 1:
            self.diagonal, self.off, self.reflectors = gram.ravel(), np.zeros(len(gram) - 1), None
            return
        work, _ = lapack.dsytrd_lwork(len(gram), lower=1)
        made, self.diagonal, self.off, self.tau, _ = lapack.dsytrd(
            np.asfortranarray(gram), lower=1, lwork=int(work), overwrite_a=1
        )
        self.reflectors = np.asfortranarray(made[1:, :-1])

    def solve(self, right: NDArray[np.float64], alphas: Sequence[float]) -> list[NDArray[np.float64]]:
        """W, (D, K), of each alpha. ValueError: one that is too small."""
        if self.reflectors is None:
            return [right / (self.diagonal + alpha)[:, None] for alpha in alphas]
        inner = self._turn(right, "T")
        solved = [self._solve(inner, alpha) for alpha in alphas]
        return np.split(self._turn(np.concatenate(solved, axis=1), "N"), len(alphas), axis=1)

    def _solve(self, inner: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
        # Rounding may leave a tridiagonal matrix that is not positive where alpha is far below its size.
        size = len(self.diagonal) * np.abs(self.diagonal).max(initial=0.0)
        for least in (np.finfo(float).eps * size, self.noise * size):
            diagonal, off, failed = lapack.dpttrf(self.diagonal + max(alpha, least), self.off)
            if not failed:
                solved: NDArray[np.float64] = lapack.dpttrs(diagonal, off, inner)[0]
                return solved
        raise ValueError(f"a penalty of {alpha:g} is too small for these features; take a larger one")

    def _turn(self, columns: NDArray[np.float64], trans: str) -> NDArray[np.float64]:
        """Q^T ("T") or Q ("N") times these columns; the reflections leave the first row as it is."""
        turned: NDArray[np.float64] = np.array(columns, order="F")
        below, size = np.asfortranarray(turned[1:]), 64 * columns.shape[1]
        turned[1:] = lapack.dormqr("L", trans, self.reflectors, self.tau, below, size, overwrite_c=1)[0]
        return turned
