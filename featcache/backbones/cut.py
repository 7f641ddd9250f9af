"""Where a network is cut in two: a frozen part that only computes, and a tail of blocks that are trained.

A cut lies at a node whose output is the one tensor that everything after it depends on. A block is a child
of an `nn.Sequential`, or of the network or what it holds outside of any, that has weights of its own; what
has none (activations, pooling) and norms belong to the block before them. So `last:2` of a ResNet are its
last two residual blocks, of a ViT its last two encoder layers. Knows graphs; nothing of training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision.ops
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import NodePathTracer

from featcache.backbones.backbone import Backbone
from featcache.backbones.nodes import (
    CONTAINERS,
    TRACE_ERRORS,
    Extractor,
    WholeNetwork,
    is_within,
    unknown_node,
)
from featcache.errors import BackboneError, UnknownNode
from featcache.spec import PENULTIMATE, FeatureNode

ALL = "all"
# What `nodes` does not look into either, so that a node has one name.
_LEAVES = [
    kind for kind in vars(torchvision.ops).values() if isinstance(kind, type) and issubclass(kind, nn.Module)
]


class Tail(nn.Module):
    """The trained part of a network: activations at the cut in, the model's feature vectors (B, D) out.

    key: the feature node of the activations, "" where the tail is the whole network and takes images.
    shape: of one image's activations. blocks: what is trained, in order; frozen: how many blocks are not.
    depth: {parameter: blocks after its own}, by the id of the parameter; 0 for all of an untraced network.
    """

    def __init__(
        self,
        extractor: Extractor,
        *,
        key: str,
        shape: tuple[int, ...],
        blocks: tuple[str, ...],
        frozen: int,
        depth: Mapping[int, int],
        channels_last: bool,
    ) -> None:
        super().__init__()
        self.extractor = extractor
        self.key, self.shape, self.blocks, self.frozen = key, shape, blocks, frozen
        self.depth = depth
        self._channels_last = channels_last and len(shape) == 3

    def forward(self, activations: Tensor) -> Tensor:
        x = activations.reshape(len(activations), *self.shape)
        if self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        vectors = self.extractor(x)
        return torch.cat([vectors[node.key] for node in self.extractor.nodes], dim=1)  # (B, D)


def cut_network(backbone: Backbone, nodes: Sequence[FeatureNode], unfreeze: str) -> Tail:
    """The tail of `backbone` that computes `nodes` and begins as `unfreeze` says; it shares its modules.

    unfreeze: "all", "last:K" for the K last blocks, or a node: that one and all after it.
    UnknownNode names the nearest node; BackboneError for a network that cannot be traced, of which only "all"
    is to be had.
    """
    names = {node.name for node in nodes}
    try:
        traced = _Traced(backbone, names)
    except TRACE_ERRORS as error:
        if unfreeze == ALL and names == {PENULTIMATE}:
            return _untraced(backbone, nodes)
        raise BackboneError(
            f"{backbone.name} cannot be traced, so it can be fine-tuned with --unfreeze all only: {error}"
        ) from error
    first = traced.first_trained(unfreeze)
    cut = max(index for index in traced.cuts if index < first or not index)
    graph = traced.after(cut)
    blocks = traced.blocks_from(cut)
    if not any(True for _ in graph.parameters()):
        raise UnknownNode(
            f"nothing after {unfreeze!r} in {backbone.name} has weights; its last blocks are "
            f"{', '.join(block.path for block in traced.blocks[-3:])}"
        )
    name, shape = traced.names[cut], traced.shapes[cut]
    return Tail(
        Extractor(graph, backbone, tuple(nodes)),
        key="" if not cut else name if len(shape) == 1 else f"{name}:flat",
        shape=shape,
        blocks=tuple(block.path for block in blocks),
        frozen=len(traced.blocks) - len(blocks),
        depth=traced.depth(cut),
        channels_last=not cut or backbone.layout_of(name) == "nchw",
    )


def _untraced(backbone: Backbone, nodes: Sequence[FeatureNode]) -> Tail:
    size = backbone.preprocessing.crop_size
    return Tail(
        Extractor(WholeNetwork(backbone.module), backbone, tuple(nodes)),
        key="",
        shape=(3, size, size),
        blocks=(backbone.name,),
        frozen=0,
        depth={},
        channels_last=True,
    )


@dataclass(frozen=True)
class _Block:
    """A module with weights, and the index of its first node."""

    path: str
    start: int


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape of each tensor, by the node's name; that of others is ()."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        is_tensor = isinstance(value, Tensor) and value.is_floating_point()
        self.found[n.name] = tuple(value.shape) if is_tensor else ()
        return value


@dataclass(init=False)
class _Traced:
    """The graph of a network in evaluation mode, its nodes by index in the order of execution.

    outputs: {name of a feature node: index}. shapes: of one image's tensors. cuts: where it can be cut.
    """

    module: nn.Module
    nodes: list[fx.Node]
    names: list[str]
    outputs: dict[str, int]
    shapes: list[tuple[int, ...]]
    cuts: list[int]
    blocks: list[_Block] = field(default_factory=list)

    def __init__(self, backbone: Backbone, names: set[str]) -> None:
        self._backbone = backbone
        self.module = backbone.module.eval()
        tracer = NodePathTracer(
            autowrap_modules=(math, torchvision.ops),
            leaf_modules=[*_LEAVES, *backbone.trace.leaf_modules],
            autowrap_functions=list(backbone.trace.leaf_functions),
        )
        graph = tracer.trace(self.module)
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        self.names = [tracer.node_to_qualname.get(node, node.name) for node in self.nodes]
        self._index = {node: index for index, node in enumerate(self.nodes)}
        self.outputs = {name: self._last_of(name) for name in sorted(names)}
        self.shapes = self._probe(graph)
        self._of_input = self._computed_from_input()
        self._needed = self._needed_for_outputs()
        self.cuts = list(self._find_cuts())
        self.blocks = sorted(self._find_blocks(), key=lambda block: block.start)

    def first_trained(self, unfreeze: str) -> int:
        """The index of the first node that is trained; 0 for all."""
        if unfreeze == ALL:
            return 0
        if match := re.fullmatch(r"last:([1-9]\d{0,5})", unfreeze):
            last = self.blocks[-int(match[1]) :]
            return last[0].start if len(last) < len(self.blocks) else 0
        found = [index for index, name in enumerate(self.names) if is_within(name, unfreeze)]
        if not found:
            error = unknown_node(self._backbone, unfreeze, self.names)
            error.add_note("--unfreeze takes all, last:K for the K last blocks, or a node to begin with")
            raise error
        return found[0]

    def blocks_from(self, cut: int) -> list[_Block]:
        return [block for block in self.blocks if block.start > cut]

    def after(self, cut: int) -> fx.GraphModule:
        """The part of the graph after `cut`, which returns {name of a feature node: output}."""
        graph = fx.Graph()
        copies = {self.nodes[cut]: graph.placeholder("activations")}
        for index, node in enumerate(self.nodes):
            if index in self._needed and index != cut and (index > cut or index not in self._of_input):
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output({name: copies[self.nodes[index]] for name, index in self.outputs.items()})
        return fx.GraphModule(self.module, graph).eval()

    def depth(self, cut: int) -> dict[int, int]:
        """{id of a parameter after the cut: how many blocks come after the block it is used in}."""
        found: dict[int, int] = {}
        for index in sorted(self._needed):
            node = self.nodes[index]
            used = index if node.op == "call_module" else min(self._users(index), default=index)
            if node.op not in ("call_module", "get_attr") or used <= cut:
                continue
            after = sum(block.start > used for block in self.blocks)
            for name, parameter in self.module.named_parameters():
                if is_within(name, str(node.target)):
                    found.setdefault(id(parameter), after)
        return found

    def _users(self, index: int) -> list[int]:
        """The nodes after this one that use its output on the way to what is asked for."""
        users = [self._index[user] for user in self.nodes[index].users if user in self._index]
        return [user for user in users if user in self._needed]

    def _last_of(self, name: str) -> int:
        if name == PENULTIMATE:
            return len(self.nodes) - 1
        found = [index for index, there in enumerate(self.names) if is_within(there, name)]
        if not found:
            raise unknown_node(self._backbone, name, self.names)
        return found[-1]

    def _probe(self, graph: fx.Graph) -> list[tuple[int, ...]]:
        """Of two images, so that what has no place for each of them is told apart; () for that."""
        size = self._backbone.preprocessing.crop_size
        shapes = _Shapes(fx.GraphModule(self.module, graph).eval())
        device = next((tensor.device for tensor in self.module.state_dict().values()), None)
        with torch.no_grad():
            shapes.run(torch.zeros(2, 3, size, size, device=device))
        found = [shapes.found.get(node.name, ()) for node in self.nodes]
        return [shape[1:] if shape[:1] == (2,) else () for shape in found]

    def _computed_from_input(self) -> set[int]:
        found = {0}
        for index, node in enumerate(self.nodes):
            if any(self._index[before] in found for before in node.all_input_nodes):
                found.add(index)
        return found

    def _needed_for_outputs(self) -> set[int]:
        needed = set(self.outputs.values())
        for index in reversed(range(len(self.nodes))):
            if index in needed:
                needed |= {self._index[before] for before in self.nodes[index].all_input_nodes}
        return needed

    def _find_cuts(self) -> Iterator[int]:
        """Nodes of a tensor an image after which nothing needs any other node that comes from the images."""
        outputs = set(self.outputs.values())
        still_needed = -1  # the last node that uses any of those before
        for index in sorted(self._needed & self._of_input):
            if still_needed <= index and 1 <= len(self.shapes[index]) <= 3:
                yield index
            last = max(self._users(index), default=index)
            still_needed = max(still_needed, len(self.nodes) if index in outputs else last)

    def _find_blocks(self) -> Iterator[_Block]:
        cuts = {self.names[index] for index in self.cuts}
        for path, module in _blocks_of(self.module, "", cuts=cuts, in_container=False):
            start = next((i for i in sorted(self._needed) if is_within(self.names[i], path)), None)
            if start is not None and any(p.ndim >= 2 for p in module.parameters()):
                yield _Block(path, start)


def _blocks_of(
    module: nn.Module, path: str, *, cuts: set[str], in_container: bool
) -> Iterator[tuple[str, nn.Module]]:
    """The modules below `module` that are not taken apart, each with its path."""
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        is_container = type(child) in CONTAINERS
        # A sequence in a residual branch is no sequence of blocks: after it the network cannot be cut.
        holds_blocks = not in_container and any(
            type(part) in CONTAINERS and any(is_within(cut, f"{inner}.{of}") for cut in cuts)
            for of, part in child.named_children()
        )
        if is_container or holds_blocks:
            yield from _blocks_of(child, inner, cuts=cuts, in_container=is_container)
        else:
            yield inner, child
