"""featcache: transfer learning that pays for the backbone once.

    import featcache

    featcache.embed("photos/", "photos.h5", backbone="resnet18")
    report = featcache.fit("photos.h5", "photos.model")
    answers = featcache.predict("photos.model", ["new/1.jpg"])

Names are imported when they are first used, so that `import featcache` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featcache.backbones import Backbone, load_backbone, make_backbone
    from featcache.commands.embed import EmbedResult, embed, embed_together
    from featcache.commands.explain import explain
    from featcache.commands.fit import FitResult, fit
    from featcache.commands.info import Info, info
    from featcache.commands.merge import MergeResult, merge
    from featcache.commands.plan import PlanResult, plan
    from featcache.commands.predict import Prediction, PredictResult, predict
    from featcache.commands.repair import RepairResult, repair
    from featcache.commands.verify import VerifyResult, verify
    from featcache.errors import FeatcacheError
    from featcache.explanation import Explanation
    from featcache.model import Model
    from featcache.sharding import Shard
    from featcache.spec import FeatureSpec, Preprocessing
    from featcache.store.features import FeatureSet
    from featcache.store.reader import FeatureStore

_HOMES = {
    "Backbone": "featcache.backbones",
    "EmbedResult": "featcache.commands.embed",
    "Explanation": "featcache.explanation",
    "FeatcacheError": "featcache.errors",
    "FeatureSet": "featcache.store.features",
    "FeatureSpec": "featcache.spec",
    "FeatureStore": "featcache.store.reader",
    "FitResult": "featcache.commands.fit",
    "Info": "featcache.commands.info",
    "MergeResult": "featcache.commands.merge",
    "Model": "featcache.model",
    "PlanResult": "featcache.commands.plan",
    "PredictResult": "featcache.commands.predict",
    "Prediction": "featcache.commands.predict",
    "Preprocessing": "featcache.spec",
    "RepairResult": "featcache.commands.repair",
    "Shard": "featcache.sharding",
    "VerifyResult": "featcache.commands.verify",
    "embed": "featcache.commands.embed",
    "embed_together": "featcache.commands.embed",
    "explain": "featcache.commands.explain",
    "fit": "featcache.commands.fit",
    "info": "featcache.commands.info",
    "load_backbone": "featcache.backbones",
    "make_backbone": "featcache.backbones",
    "merge": "featcache.commands.merge",
    "plan": "featcache.commands.plan",
    "predict": "featcache.commands.predict",
    "repair": "featcache.commands.repair",
    "verify": "featcache.commands.verify",
}

__all__ = [
    "Backbone",
    "EmbedResult",
    "Explanation",
    "FeatcacheError",
    "FeatureSet",
    "FeatureSpec",
    "FeatureStore",
    "FitResult",
    "Info",
    "MergeResult",
    "Model",
    "PlanResult",
    "PredictResult",
    "Prediction",
    "Preprocessing",
    "RepairResult",
    "Shard",
    "VerifyResult",
    "embed",
    "embed_together",
    "explain",
    "fit",
    "info",
    "load_backbone",
    "make_backbone",
    "merge",
    "plan",
    "predict",
    "repair",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featcache' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
