"""`featcache backbones`: the networks there are a name for, or all there is to know of one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from featcache.backbones import BackboneInfo, PublishedWeights, find_family, list_backbones
from featcache.backbones.weights import RANDOM
from featcache.images.paths import show_path
from featcache.spec import Preprocessing
from featcache.words import plural

if TYPE_CHECKING:
    from featcache.backbones.nodes import NodeOutput


@dataclass(frozen=True, kw_only=True)
class BackboneTable:
    rows: tuple[BackboneInfo, ...]

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    def describe(self) -> str:
        width = max(len(row.name) for row in self.rows)
        origin = max(len(row.weights) for row in self.rows)
        lines = [f"{'name':{width}} {'features':>8} {'parameters':>12}  {'weights':{origin}} here"]
        for row in self.rows:
            features = "?" if row.num_features is None else f"{row.num_features:,}"
            lines.append(
                f"{row.name:{width}} {features:>8} {row.num_params:>12,}  {row.weights:{origin}} "
                f"{'yes' if row.available else 'no'}"
            )
        lines.append(
            "here: on this machine; torchvision's are downloaded when first used, and without internet "
            "--weights FILE takes a copy"
        )
        lines.append("and module:function for one of your own (docs/adding-a-backbone.md)")
        lines.append("`featcache backbones NAME` lists the nodes of one, and its weights")
        return "\n".join(lines)


def backbones() -> BackboneTable:
    """Every backbone with its dimension, parameters, weights, and whether those are on this machine."""
    return BackboneTable(rows=list_backbones())


@dataclass(frozen=True, kw_only=True)
class BackboneStory:
    """One backbone: what `--node` takes, and where its weights are to be had."""

    name: str
    family: str
    num_features: int
    preprocessing: Preprocessing
    weights: tuple[PublishedWeights, ...]
    nodes: tuple[NodeOutput, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        pre = self.preprocessing
        lines = [
            f"{self.name}: {plural(self.num_features, 'feature')} from pictures of {pre.crop_size} x "
            f"{pre.crop_size} pixels, {self.family}"
        ]
        return "\n".join([*lines, *self._weights_lines(), *self._node_lines()])

    def _weights_lines(self) -> list[str]:
        if not self.weights:
            return ["weights: those that its own code loads"]
        base = self.name.partition("@")[0]
        lines = ["weights:"]
        for weights in self.weights:
            name = f"{base}@{weights.label}" if weights.label else base
            facts = [
                "the default" if weights.default and len(self.weights) > 1 else "",
                f"{weights.megabytes:,.0f} MB" if weights.megabytes else "",
                f"{weights.top1:.1%} on ImageNet" if weights.top1 else "",
                f"licence: {weights.licence or 'none stated by ' + self.family}",
                "here" if weights.available else "not here",
            ]
            lines.append(f"  {name}: {', '.join(filter(None, facts))}; {weights.source}")
        folder = next((weights.folder for weights in self.weights if weights.folder), None)
        if folder:
            lines.append(f"  looked for in {show_path(folder)}, and downloaded to there")
        return lines

    def _node_lines(self) -> list[str]:
        shown = [node for node in self.nodes if node.is_block]
        width = max(len(node.name) for node in shown)
        lines = [f"{'--node':{width + 2}} {'features':>8}  of an output of"]
        for node in shown:
            how = "" if node.pooling == "none" else f", pooled by {node.pooling}"
            shape = " x ".join(f"{side:,}" for side in node.shape)
            lines.append(f"  {node.name:{width}} {node.num_features:>8,}  {shape}{how}")
        if more := len(self.nodes) - len(shown):
            lines.append(f"  and {more:,} inside these (--json lists them)")
        lines.append("NAME:avg, :max, :cls or :flat pools in another way; flat keeps all values")
        return lines


def describe_backbone(name: str) -> BackboneStory:
    """What there is to know of one backbone without its weights; nothing is downloaded.

    Raises UnknownBackbone, which offers the nearest names, or BackboneError.
    """
    from featcache.backbones.nodes import list_nodes

    family = find_family(name)
    is_own = not family.names()  # whose numbers are its own affair
    backbone = family.load(name, weights=None if is_own else RANDOM, seed=0)
    nodes = list_nodes(backbone)
    return BackboneStory(
        name=name,
        family=family.TITLE,
        num_features=nodes[-1].num_features,
        preprocessing=backbone.preprocessing,
        weights=family.published(name),
        nodes=nodes,
    )
