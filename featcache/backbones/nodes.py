"""Nodes: which outputs of a backbone become feature vectors, and how maps and tokens are pooled to them.

A node is written `name` or `name:pooling`. Knows nothing of where the backbone came from.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from featcache.backbones.backbone import Backbone
from featcache.errors import BackboneError, UnknownNode
from featcache.spec import PENULTIMATE, FeatureNode, Pooling

# Tracing runs the network's own Python on stand-ins for tensors, which fails in many ways.
TRACE_ERRORS = (torch.fx.proxy.TraceError, TypeError, RuntimeError, ValueError, AttributeError)

# Modules that only hold others, which the network passes one after another or as it likes.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_POOLINGS: tuple[Pooling, ...] = tuple(p for p in get_args(Pooling) if p != "none")


@dataclass(frozen=True, kw_only=True)
class _Request:
    """A node as it was asked for: `pooling` is None where the user left it to us."""

    name: str
    pooling: Pooling | None


class Extractor(nn.Module):
    """The backbone's forward pass up to its nodes: images (B, 3, S, S) to {key: (B, D)} in float32."""

    def __init__(self, graph: nn.Module, backbone: Backbone, nodes: tuple[FeatureNode, ...]) -> None:
        super().__init__()
        self.network = graph  # not `graph`: torch 2.11 takes what has one for a graph module
        self.nodes: tuple[FeatureNode, ...] = nodes
        self._pools = {node.key: (node.name, _pool(backbone, node)) for node in nodes}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        outputs = self.network(images)
        return {key: pool(outputs[name].float()) for key, (name, pool) in self._pools.items()}


class WholeNetwork(nn.Module):
    """The network's own output under the name `penultimate`, without tracing."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> dict[str, Any]:
        return {PENULTIMATE: self.module(images)}


class _Traced(nn.Module):
    """The traced part of a network; two names may stand for one node of its graph."""

    def __init__(self, graph: nn.Module, nodes: dict[str, str]) -> None:
        super().__init__()
        self.network = graph
        self._nodes = nodes

    def forward(self, images: Tensor) -> dict[str, Any]:
        outputs = self.network(images)
        return {name: outputs[node] for name, node in self._nodes.items()}


def make_extractor(backbone: Backbone, nodes: Sequence[str] = (PENULTIMATE,)) -> Extractor:
    """The network that computes `nodes` in one forward pass; `.nodes` describes what it returns, in order.

    nodes: "penultimate" is the input of the removed classifier; other names are torchvision's node names.
        A pooling follows a colon: avg, max, cls for the class token, or flat for all values of a map or of
        tokens, one after the other. Without one, feature maps are averaged, tokens are pooled as the backbone
        says and vectors stay. A node asked for twice comes once.
    Raises `UnknownNode` for a node that is not there or has no output to pool, `BackboneError` for a node
    inside a network that cannot be traced.
    """
    if not nodes:
        raise ValueError("nodes is empty: ask for at least one, such as 'penultimate'")
    requests = [_parse(text) for text in nodes]
    graph = _graph(backbone, {request.name for request in requests})
    graph.eval()
    outputs = _probe(graph, backbone)
    found = {node.key: node for node in (_describe(backbone, r, outputs[r.name]) for r in requests)}
    return Extractor(graph, backbone, tuple(found.values())).eval()


@dataclass(frozen=True, kw_only=True)
class NodeOutput:
    """A node that can be asked for, and what it gives.

    shape: of its output for one image. pooling: what becomes of that unless one is asked for. is_block: it is
    the whole network's, a container's or a block's, and not inside a block.
    """

    name: str
    num_features: int
    pooling: Pooling
    shape: tuple[int, ...]
    is_block: bool


def list_nodes(backbone: Backbone) -> tuple[NodeOutput, ...]:
    """All nodes of the network, in the order in which they are computed, the penultimate one last.

    Of a network that cannot be traced there is that one only.
    """
    try:
        there = _node_names(backbone)[1:]  # the first one is the image
    except BackboneError:
        there = []
    computed = _compute_all(backbone, there)
    order = {name: place for place, name in enumerate(there)}
    named = {name: name for name in there}
    for path, _ in backbone.module.named_modules():
        if path and (inside := [name for name in there if is_within(name, path)]):
            named[path] = inside[-1]
    # A container after the last node in it, which gives the same.
    names = sorted(named, key=lambda name: (order[named[name]], -len(name)))
    outputs = {name: computed[named[name]] for name in names}
    outputs[PENULTIMATE] = computed[there[-1] if there else PENULTIMATE]
    return tuple(_outputs(backbone, outputs))


def _compute_all(backbone: Backbone, names: Sequence[str]) -> dict[str, Any]:
    """The output of each node for one image, right in its shape; the penultimate one where none is named."""
    size = backbone.preprocessing.crop_size
    images = torch.zeros(1, 3, size, size)
    with torch.inference_mode():
        try:
            graph = _graph_with(_without_numbers(backbone.module), backbone, names)
            outputs: dict[str, Any] = graph(images.to("meta"))
        except RuntimeError:  # a network that looks at numbers cannot do without
            outputs = _graph_with(backbone.module, backbone, names)(images)
    return outputs


def _graph_with(module: nn.Module, backbone: Backbone, names: Sequence[str]) -> nn.Module:
    if not names:
        return WholeNetwork(module)
    graph: nn.Module = create_feature_extractor(
        module, return_nodes=list(names), tracer_kwargs=_tracer_options(backbone), suppress_diff_warning=True
    )
    return graph.eval()


def _without_numbers(module: nn.Module) -> nn.Module:
    """A copy whose tensors have a shape and no memory."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    memo: dict[int, Any] = {}
    for _, tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return deepcopy(module, memo)


def _outputs(backbone: Backbone, outputs: Mapping[str, Any]) -> Iterator[NodeOutput]:
    blocks = {*_blocks(backbone.module), PENULTIMATE}
    for name, output in outputs.items():
        try:
            node = _describe(backbone, _Request(name=name, pooling=None), output)
        except UnknownNode:
            continue  # numbers, tuples, what is not one an image
        yield NodeOutput(
            name=name,
            num_features=node.num_features,
            pooling=node.pooling,
            shape=tuple(output.shape[1:]),
            is_block=name in blocks,
        )


def _blocks(module: nn.Module, path: str = "", *, in_container: bool = False) -> Iterator[str]:
    """The paths of the modules that a network is a sequence of, and of the containers they are in."""
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        yield inner
        is_container = type(child) in CONTAINERS
        # A sequence inside a block of a sequence, such as its shortcut, is no sequence of blocks.
        if is_container or (not in_container and any(type(c) in CONTAINERS for c in child.children())):
            yield from _blocks(child, inner, in_container=is_container)


def _parse(text: str) -> _Request:
    name, colon, pooling = text.rpartition(":")
    if not colon:
        return _Request(name=text, pooling=None)
    for known in _POOLINGS:
        if pooling == known:
            return _Request(name=name, pooling=known)
    raise UnknownNode(f"node {text!r} asks for pooling {pooling!r}; there are {', '.join(_POOLINGS)}")


def _graph(backbone: Backbone, names: set[str]) -> nn.Module:
    """A module that returns {name: output}."""
    if names == {PENULTIMATE}:
        return WholeNetwork(backbone.module)
    there = _node_names(backbone)
    aliases = {PENULTIMATE: there[-1]}
    nodes = {name: aliases.get(name, name) for name in sorted(names)}
    for name, node in nodes.items():
        if not any(is_within(known, node) for known in there):
            raise unknown_node(backbone, name, there)
    graph: nn.Module = create_feature_extractor(
        backbone.module,
        return_nodes=sorted(set(nodes.values())),
        tracer_kwargs=_tracer_options(backbone),
        suppress_diff_warning=True,
    )
    return _Traced(graph, nodes)


def _tracer_options(backbone: Backbone) -> dict[str, Any]:
    return {
        "leaf_modules": list(backbone.trace.leaf_modules),
        "autowrap_functions": list(backbone.trace.leaf_functions),
    }


def is_within(name: str, path: str) -> bool:
    """Whether a node of this name is the module at `path` or in it."""
    return name == path or name.startswith(f"{path}.")


def _node_names(backbone: Backbone) -> list[str]:
    options = _tracer_options(backbone)
    try:
        _, names = get_graph_node_names(backbone.module, tracer_kwargs=options, suppress_diff_warning=True)
    except TRACE_ERRORS as error:
        raise BackboneError(
            f"{backbone.name} cannot be traced, so only its {PENULTIMATE} node is to be had: {error}"
        ) from error
    found: list[str] = names
    return found


def unknown_node(backbone: Backbone, name: str, there: Sequence[str]) -> UnknownNode:
    """What to raise for a node that is not there: it names the nearest ones."""
    modules = [path for path, _ in backbone.module.named_modules() if path]
    nearest = difflib.get_close_matches(name, [*modules, *there], n=3)
    said = nearest or [path for path, _ in backbone.module.named_children()]
    return UnknownNode(f"{backbone.name} has no node {name!r}; try {', '.join(dict.fromkeys(said))}")


def _probe(graph: nn.Module, backbone: Backbone) -> dict[str, Any]:
    """The outputs for one black image, for their shapes."""
    size = backbone.preprocessing.crop_size
    device = next((tensor.device for tensor in graph.state_dict().values()), None)
    with torch.inference_mode():
        outputs: dict[str, Any] = graph(torch.zeros(1, 3, size, size, device=device))
    return outputs


def _describe(backbone: Backbone, request: _Request, output: Any) -> FeatureNode:
    """The node as it is stored: its pooling settled by the shape of its output."""
    name, asked = request.name, request.pooling
    if not isinstance(output, Tensor) or not 2 <= output.ndim <= 4 or len(output) != 1:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UnknownNode(
            f"node {name!r} of {backbone.name} gives {shape}: no vector, tokens or feature map an image"
        )
    if output.ndim == 2:
        if asked:
            raise UnknownNode(f"node {name!r} of {backbone.name} is a vector already: leave :{asked} away")
        return FeatureNode(name=name, num_features=output.shape[1])
    if asked == "flat":
        return FeatureNode(name=name, pooling=asked, num_features=output[0].numel())
    if asked == "cls" and (output.ndim == 4 or not backbone.prefix_tokens):
        raise UnknownNode(f"node {name!r} of {backbone.name} has no class token: ask for :avg or :max")
    channels = 1 if output.ndim == 4 and backbone.layout_of(name) == "nchw" else output.ndim - 1
    pooling = asked or ("avg" if output.ndim == 4 else backbone.token_pooling)
    if name == PENULTIMATE and asked is None:
        pooling = "none"
    return FeatureNode(name=name, pooling=pooling, num_features=output.shape[channels])


def _pool(backbone: Backbone, node: FeatureNode) -> Callable[[Tensor], Tensor]:
    """The function from the node's output, (B, D), (B, tokens, D) or a feature map, to (B, D)."""
    space = (2, 3) if backbone.layout_of(node.name) == "nchw" else (1, 2)
    prefix = backbone.prefix_tokens

    def pool(output: Tensor) -> Tensor:
        if output.ndim == 2:
            return output
        is_map = output.ndim == 4
        default = "avg" if is_map else backbone.token_pooling
        pooling = default if node.pooling == "none" else node.pooling
        if pooling == "flat":
            return output.flatten(1)
        if pooling == "cls":
            return output[:, 0]
        values, axes = (output, space) if is_map else (output[:, prefix:], (1,))
        return values.mean(axes) if pooling == "avg" else values.amax(axes)

    return pool
