"""What is exported: a fitted model with its network, described for whoever reads it without featcache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from featcache.errors import ExportError
from featcache.spec import PENULTIMATE
from featcache.versions import installed

if TYPE_CHECKING:
    from featcache.backbones import Backbone
    from featcache.backbones.nodes import Extractor
    from featcache.model import Model

Pixels = Literal["uint8", "float"]

PIXELS: Mapping[Pixels, str] = {
    "uint8": "uint8 (batch, height, width, 3), RGB",
    "float": "float32 (batch, 3, height, width), RGB from 0 to 1",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model with its network. `where` is its file, as messages name it; `pixels` what a graph takes."""

    where: str
    model: Model
    backbone: Backbone
    pixels: Pixels = "uint8"

    @cached_property
    def extractor(self) -> Extractor:
        """The frozen network up to the nodes of the model."""
        from featcache.backbones.backbone import freeze
        from featcache.backbones.nodes import make_extractor

        extractor = make_extractor(self.backbone, [node.key for node in self.model.nodes])
        freeze(extractor)
        return extractor

    @property
    def crop_size(self) -> int:
        return self.model.spec.preprocessing.crop_size

    @property
    def is_whole_network(self) -> bool:
        """Whether the features are what the backbone returns, and no other node."""
        return [node.key for node in self.model.nodes] == [PENULTIMATE]

    @property
    def rounds(self) -> bool:
        """Whether the head saw features that the store had rounded to float16."""
        return self.model.spec.store_dtype == "float16"

    def describe(self) -> dict[str, str]:
        """Metadata of a file: every value is text, in JSON where it is not one word."""
        about: dict[str, Any] = {
            "classes": list(self.model.classes),
            "preprocessing": asdict(self.model.spec.preprocessing),
            "nodes": [asdict(node) for node in self.model.nodes],
        }
        return {
            **{name: json.dumps(value) for name, value in about.items()},
            "backbone": self.model.spec.backbone,
            "head": self.model.head_name,
            "fingerprint": self.model.fingerprint,
            "featcache": installed().get("featcache", "unknown"),
        }

    def linear(self, *, wanted_by: str) -> tuple[Any, Any]:
        """W (K, D) and b (K,) with which probabilities are softmax(X @ W.T + b); ExportError without any."""
        head = self.model.head
        if not hasattr(head, "as_linear"):
            raise ExportError(
                f"{self.where} has a {self.model.head_name} head, which {wanted_by} cannot hold: linear ones "
                "it can (logistic, ridge, lda, ncm, linear). Fit one of those, or export --to onnx."
            )
        weight, bias = head.as_linear()
        return weight, bias
