"""The products over rows by torch, on a CUDA device or, to compare, on the processors.

Rows stay on the device where they fit; sums over them are float64, as `softmax` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.heads.device import GramSum
from featcache.heads.pieces import Cut, Piece
from featcache.heads.pieces_torch import cut_rows_on
from featcache.heads.softmax import Affine, Block, DataTerm, SoftmaxRows

TILE_VALUES = 64_000_000  # logits at a time: 256 MB
MEMORY_SHARE = 0.5  # of the device's free memory, that rows may take


class OnTorch:
    """`Products` on a device of torch."""

    tile_values = 4_000_000

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def softmax_rows(
        self,
        blocks: Sequence[Callable[[], Iterator[Block]]],
        *,
        affine: Affine,
        weights: NDArray[np.float64],
    ) -> SoftmaxRows:
        return TorchSoftmaxRows(blocks, affine=affine, weights=weights, device=self.device)

    def pieces(self, rows: NDArray[Any], group: NDArray[np.intp], cut: Cut) -> list[Piece]:
        return cut_rows_on(self.device, rows, group, cut)

    def gram(self, n_parts: int, n_features: int) -> GramSum:
        return _GramSum(n_parts, n_features, self.device)

    def scores(self, rows: NDArray[Any], weights: NDArray[Any], shift: NDArray[Any]) -> NDArray[Any]:
        moved, wide, added = (
            torch.from_numpy(part).to(self.device) for part in (rows, weights, shift.astype(rows.dtype))
        )
        scores: NDArray[Any] = torch.addmm(added, moved, wide.T).cpu().numpy()
        return scores


class _GramSum:
    def __init__(self, n_parts: int, n_features: int, device: torch.device) -> None:
        self.device = device
        self.sums = torch.zeros((n_parts, n_features, n_features), dtype=torch.float64, device=device)

    def add(self, part: int, rows: Tensor) -> None:
        self.sums[part] += rows.T @ rows

    def total(self) -> NDArray[np.float64]:
        total: NDArray[np.float64] = self.sums.cpu().numpy()
        return total


@dataclass(frozen=True, kw_only=True, eq=False)
class _Moved:
    """A `Block` on the device."""

    rows: Tensor  # (n, R)
    codes: Tensor  # (n,)
    index: NDArray[np.intp]
    fitted: NDArray[np.bool_]


class TorchSoftmaxRows(SoftmaxRows):
    """`SoftmaxRows` on a device of torch; rows that do not fit there come anew for every read."""

    def __init__(
        self,
        blocks: Sequence[Callable[[], Iterator[Block]]],
        *,
        affine: Affine,
        weights: NDArray[np.float64],
        device: torch.device,
    ) -> None:
        super().__init__(blocks, affine=affine, weights=weights)
        self.device = device
        self.kept: list[_Moved] | None = []
        self.room = np.inf
        if device.type == "cuda":
            self.room = MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]

    def evaluate(
        self, fold: NDArray[np.intp], weights: NDArray[np.float64], bias: NDArray[np.float64]
    ) -> DataTerm:
        on_rows, offset = self._on_rows(fold, weights, bias)
        sums = _Sums(self.device, on_rows.transpose(1, 0, 2), offset.T, self.weights[fold])
        for block in self._moved():
            sums.add(block, np.flatnonzero(block.fitted[fold]))
        loss, slope, ones, variance = (part.cpu().numpy() for part in sums.totals)
        mean, scale = self.affine.mean[fold][:, None], self.affine.scale[fold][:, None]
        return DataTerm(
            loss=loss, weights=(slope - ones[..., None] * mean) / scale, bias=ones, variance=variance
        )

    def scores(
        self, fold: int, weights: NDArray[np.float64], bias: NDArray[np.float64], out: NDArray[Any]
    ) -> None:
        on_rows, offset = self._on_rows(np.full(len(weights), fold), weights, bias)
        wide = torch.from_numpy(on_rows.transpose(1, 0, 2).copy()).to(self.device)  # (V, K, R)
        shift = torch.from_numpy(offset.T.copy()).to(self.device)
        for block in self._moved():
            if not block.fitted[fold]:
                rows = block.rows
                logits = torch.addmm(shift.to(rows).flatten(), rows, wide.to(rows).flatten(0, 1).T)
                out[:, block.index] = logits.view(len(rows), *shift.shape).transpose(0, 1).cpu().numpy()

    def _moved(self) -> Iterator[_Moved]:
        """All blocks on the device, kept there from the first read on where there is room."""
        if self.kept:
            yield from self.kept
            return
        kept: list[_Moved] | None = self.kept
        size = 0
        for make in self.blocks:
            for block in make():
                moved = _Moved(
                    rows=torch.from_numpy(block.rows).to(self.device, copy=True),
                    codes=torch.from_numpy(block.codes.astype(np.int64)).to(self.device),
                    index=block.index,
                    fitted=block.fitted,
                )
                size += block.rows.nbytes
                if kept is not None:
                    kept = [*kept, moved] if size <= self.room else None
                yield moved
        self.kept = kept


class _Sums:
    """What the rows are to J problems, summed block by block: loss (J,), gradients (J, K, R) and (J, K),
    and the sum of p (1 - p), (J, K)."""

    def __init__(
        self,
        device: torch.device,
        weights: NDArray[np.float64],
        offset: NDArray[np.float64],
        own: NDArray[np.float64],
    ) -> None:
        self.weights, self.offset, self.own = (
            torch.from_numpy(part.copy()).to(device) for part in (weights, offset, own)
        )
        shapes = (offset.shape[:1], weights.shape, offset.shape, offset.shape)
        self.totals = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]

    def add(self, block: _Moved, use: NDArray[np.intp]) -> None:
        """The rows of a block, to the problems `use` that are fitted on them."""
        if not len(use):
            return
        some = torch.from_numpy(use).to(block.codes.device)
        W, shift, own = (part[some].to(block.rows.dtype) for part in (self.weights, self.offset, self.own))
        step = max(TILE_VALUES // shift.numel(), 64)
        for start in range(0, len(block.rows), step):
            rows, codes = block.rows[start : start + step], block.codes[start : start + step]
            for total, part in zip(self.totals, _data_terms(rows, codes, W, shift, own), strict=True):
                total.index_add_(0, some, part.to(torch.float64))


def _data_terms(
    rows: Tensor, codes: Tensor, W: Tensor, shift: Tensor, own: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows (n, R) and classes (n,), for models W (J, K, R), shift (J, K) and class weights own (J, K)."""
    J, K, _ = W.shape
    p = torch.addmm(shift.flatten(), rows, W.flatten(0, 1).T).view(-1, J, K)
    true = codes[:, None, None].expand(-1, J, 1)  # (n, J, 1)
    of_row = own[:, codes].T  # (n, J)
    # The other classes against the row's own, as in `softmax`.
    against = -p.gather(2, true)[..., 0]
    others = p.scatter_(2, true, -torch.inf).logsumexp(dim=2)
    against += others
    loss = (torch.nn.functional.softplus(against) * of_row).sum(0, dtype=torch.float64)
    wrong = torch.sigmoid(against)
    p = p.sub_(others.unsqueeze(2)).exp_().mul_(wrong.unsqueeze(2)).scatter_(2, true, wrong.unsqueeze(2))
    variance = (p * (1 - p) * of_row.unsqueeze(2)).sum(0, dtype=torch.float64)
    p.scatter_(2, true, -wrong.unsqueeze(2))
    p *= of_row.unsqueeze(2)
    slope = (p.flatten(1).T @ rows).view(W.shape)
    return loss, slope, p.sum(0, dtype=torch.float64), variance
