"""Backbones: a name becomes a frozen network without its classifier, with its preprocessing and weights.

Knows nothing of image files, stores or heads. This module is the registry and imports no torch; a family of
backbones is one module with the functions of `Family`, registered below.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from featcache.backbones import bundled, torchvision, user
from featcache.backbones.backbone import (
    Backbone,
    BackboneInfo,
    PublishedWeights,
    WeightsIdentity,
    make_backbone,
)
from featcache.backbones.weights import RANDOM, file_sha256, require_file
from featcache.errors import UnknownBackbone
from featcache.versions import same_backbone_libraries

__all__ = [
    "FAMILIES",
    "Backbone",
    "BackboneInfo",
    "Family",
    "PublishedWeights",
    "WeightsIdentity",
    "find_family",
    "list_backbones",
    "load_backbone",
    "locate_weights",
    "make_backbone",
    "prove_weights",
]


class Family(Protocol):
    """What a module of this folder offers to be a family of backbones. Importing it imports no torch."""

    @property
    def TITLE(self) -> str: ...

    def names(self) -> tuple[str, ...]:
        """All names the family can list; may be slow."""

    def owns(self, name: str) -> bool:
        """Whether `load` knows this name."""

    def load(self, name: str, *, weights: str | None, seed: int) -> Backbone: ...

    def infos(self) -> tuple[BackboneInfo, ...]: ...

    def published(self, name: str) -> tuple[PublishedWeights, ...]:
        """The weights to be had of a network it owns, the variant after @ aside."""

    def locate(self, name: str, *, file_name: str | None) -> Path | None:
        """The file of the pretrained weights where that is known without torch and the file exists."""


# In the order in which they are asked for a name: torchvision last, as it may have to be imported to answer.
FAMILIES: tuple[Family, ...] = (bundled, user, torchvision)


def load_backbone(name: str, *, weights: str | None = None, seed: int = 0) -> Backbone:
    """The frozen network of that name, without its classifier.

    name: "resnet50", "resnet50@IMAGENET1K_V1" for other than the default weights, "efficientnet_lite0", or
        "module:function" for one of your own.
    weights: None for pretrained ones, "random" for ones drawn with `seed`, or the path of a .safetensors,
        .pth or .pt file. A file is prepared for as the name's tag says; without a tag, as the published
        weights with the same bytes are, or else as the default ones.
    Raises `UnknownBackbone`, `WeightsUnavailable` or `BackboneError`.
    """
    return find_family(name).load(name, weights=weights, seed=seed)


def find_family(name: str) -> Family:
    """The family that has a backbone of this name; UnknownBackbone offers the nearest names."""
    for family in FAMILIES:
        if family.owns(name):
            return family
    known = [known for family in FAMILIES for known in family.names()]
    nearest = difflib.get_close_matches(name.partition("@")[0], known, n=3)
    meant = f"did you mean {', '.join(nearest)}? " if nearest else ""
    raise UnknownBackbone(f"there is no backbone {name!r}; {meant}`featcache backbones` lists all of them")


def list_backbones() -> tuple[BackboneInfo, ...]:
    """Every backbone there is a name for. Builds none of them."""
    return tuple(info for family in FAMILIES for info in family.infos())


def locate_weights(name: str, weights: str | None = None, *, file_name: str | None = None) -> Path | None:
    """The weights file `load_backbone` would read, found without importing torch; None where that is unknown.

    file_name: the name of the file read the last time; where pretrained weights of torchvision lie is known
        only with it.
    Raises `BackboneError` when `weights` names a file that does not exist.
    """
    if weights is not None:
        return None if weights == RANDOM else require_file(weights)
    located = (family.locate(name, file_name=file_name) for family in FAMILIES)
    return next((path for path in located if path is not None), None)


def prove_weights(provenance: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    """How the weights are known to be those of a store, in words; "" when only loading them can tell.

    provenance: of the store, with its "request", "weights" (`WeightsIdentity` as a dict) and "versions".
    request: what is asked for now, with "backbone" and "weights" as given to `load_backbone`.
    Imports no torch: the request and the libraries must be the recorded ones, and the file's bytes unchanged,
    wherever the file is now.
    """
    had, weights, libraries = (_object(provenance, name) for name in ("request", "weights", "versions"))
    if not _asks_alike(had, request) or not same_backbone_libraries(libraries):
        return ""
    if weights.get("source") == RANDOM:
        return f"random weights of {weights.get('label')} under the same library versions"
    recorded = weights.get("path")
    if not recorded or not isinstance(recorded, str):
        return ""
    path = locate_weights(request["backbone"], request["weights"], file_name=Path(recorded).name)
    if path is None or file_sha256(path) != weights.get("file_sha256"):
        return ""
    return f"weights file {path.name} has the recorded sha256 {weights['file_sha256'][:12]}"


def _asks_alike(had: Mapping[str, Any], request: Mapping[str, Any]) -> bool:
    """Whether two requests differ in nothing, or in where their weights file is; it is read by its ending."""
    if had == request:
        return True
    places = [asked.get("weights") for asked in (had, request)]
    files = [Path(place) for place in places if isinstance(place, str) and place != RANDOM]
    return (
        {**had, "weights": None} == {**request, "weights": None}
        and len(files) == len(places)
        and len({file.suffix.lower() for file in files}) == 1
    )


def _object(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The JSON object of that name; an empty one where there is none."""
    found = document.get(name)
    return found if isinstance(found, Mapping) else {}
