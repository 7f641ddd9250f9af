"""`featcache backbones`: the networks there are a name for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from featcache.backbones import BackboneInfo, list_backbones


@dataclass(frozen=True, kw_only=True)
class BackboneTable:
    rows: tuple[BackboneInfo, ...]

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    def describe(self) -> str:
        width = max(len(row.name) for row in self.rows)
        origin = max(len(row.weights) for row in self.rows)
        lines = [f"{'name':{width}} {'features':>8} {'parameters':>12}  {'weights':{origin}} here"]
        lines += [
            f"{row.name:{width}} {row.num_features:>8,} {row.num_params:>12,}  {row.weights:{origin}} "
            f"{'yes' if row.available else 'no'}"
            for row in self.rows
        ]
        lines.append("and module:function for one of your own (docs/adding-a-backbone.md)")
        return "\n".join(lines)


def backbones() -> BackboneTable:
    """Every backbone with its dimension, parameters, weights, and whether those are on this machine."""
    return BackboneTable(rows=list_backbones())
