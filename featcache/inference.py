"""A fitted model and the network its features come from: what predicting, exporting and tuning begin with.

Knows model files and backbones; no images.
"""

from __future__ import annotations

from featcache.backbones import Backbone, load_backbone
from featcache.backbones.tuned import with_tensors
from featcache.backbones.weights import RANDOM
from featcache.errors import BackboneError, ModelError
from featcache.model import Model
from featcache.request import RecordedBackbone


def load_network(
    model: Model, *, where: str, weights: str | None = None, allowed: str | None = None
) -> Backbone:
    """The backbone of a model with the weights it was fitted or fine-tuned with.

    where: the model file. weights: the file of the backbone's weights, where it is not where it was; a
    fine-tuned model brings its own. allowed: must repeat a model's own `module:function`.
    ModelError, BackboneError: what stands in the way, among it other weights than the recorded ones.
    """
    recorded = RecordedBackbone.from_records(
        model.request,
        model.weights,
        model.spec,
        where=where,
        kind="model file",
        says="was fitted on",
        error=ModelError,
    )
    if not model.network:
        return recorded.load(weights=weights, allowed=allowed)
    if weights:
        raise ModelError(f"{where} is fine-tuned and holds its own weights: leave --weights away.")
    recorded.require_permission(allowed)
    # The tensors are replaced, so it does not matter which ones the network is built with.
    built = load_backbone(recorded.name, weights=None if ":" in recorded.name else RANDOM, seed=recorded.seed)
    loaded = with_tensors(built, model.network, label=where)
    if loaded.weights.sha256 != model.spec.weights_sha256:
        raise BackboneError(
            f"{where} was fine-tuned as another network than {recorded.name} is here: its tensors have "
            f"{loaded.weights.sha256[:12]}… where {model.spec.weights_sha256[:12]}… is recorded."
        )
    return loaded
