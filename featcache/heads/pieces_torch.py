"""`cut_rows` on a device of torch: rows go there as they are stored, and are centred and summed there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.heads.pieces import Cut, Piece, Run, runs


def cut_rows_on(device: torch.device, rows: NDArray[Any], group: NDArray[np.intp], cut: Cut) -> list[Piece]:
    """The pieces of rows (n, D), whose part and class are group (n,); their rows stay on the device."""
    order = np.argsort(group, kind="stable")
    group = group[order]
    centre = torch.from_numpy(cut.centre.astype(cut.wide(rows))).to(device)
    moved = torch.from_numpy(rows[order]).to(device).to(centre.dtype)
    centred = moved.sub_(centre).to(getattr(torch, np.dtype(cut.dtype).name))
    made = []
    for run in runs(group, cut.n_classes):
        some = centred[run.first : run.last]
        piece = _sum_up(some, run, squares=cut.squares)
        if cut.scale is not None:
            scale = cut.scale[group[run.first : run.last] % cut.n_classes, None]
            some *= torch.from_numpy(scale).to(some)
        made.append(piece)
    return made


def _sum_up(rows: Tensor, run: Run, *, squares: bool) -> Piece:
    lengths = torch.from_numpy(np.diff(run.firsts, append=len(rows))).to(rows.device)
    wide = rows.to(torch.float64)
    sums = torch.segment_reduce(wide, "sum", lengths=lengths, axis=0)
    return Piece(
        part=run.part,
        rows=rows,
        groups=run.groups,
        sums=sums.cpu().numpy(),
        squares=(wide * wide).sum(dim=0).cpu().numpy() if squares else 0.0,
        low=rows.amin(dim=0).cpu().numpy(),
        high=rows.amax(dim=0).cpu().numpy(),
    )
