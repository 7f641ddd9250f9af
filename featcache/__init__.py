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
    from featcache.commands.compare import CompareResult, compare
    from featcache.commands.embed import EmbedResult, embed, embed_together
    from featcache.commands.evaluate import EvaluateResult, evaluate_model
    from featcache.commands.explain import explain
    from featcache.commands.export import ExportResult, export
    from featcache.commands.finetune import FinetuneResult, finetune
    from featcache.commands.fit import fit
    from featcache.commands.info import Info, info
    from featcache.commands.merge import MergeResult, merge
    from featcache.commands.plan import PlanResult, plan
    from featcache.commands.predict import (
        Prediction,
        PredictionStream,
        PredictResult,
        iter_predictions,
        predict,
    )
    from featcache.commands.repair import RepairResult, repair
    from featcache.commands.verify import VerifyResult, verify
    from featcache.errors import FeatcacheError
    from featcache.explanation import Explanation
    from featcache.fitting import FitResult
    from featcache.model import Model
    from featcache.sharding import Shard
    from featcache.spec import FeatureSpec, Preprocessing
    from featcache.store.features import FeatureSet
    from featcache.store.reader import FeatureStore

_HOMES = {
    "Backbone": "featcache.backbones",
    "CompareResult": "featcache.commands.compare",
    "EmbedResult": "featcache.commands.embed",
    "EvaluateResult": "featcache.commands.evaluate",
    "Explanation": "featcache.explanation",
    "ExportResult": "featcache.commands.export",
    "FeatcacheError": "featcache.errors",
    "FeatureSet": "featcache.store.features",
    "FeatureSpec": "featcache.spec",
    "FeatureStore": "featcache.store.reader",
    "FinetuneResult": "featcache.commands.finetune",
    "FitResult": "featcache.fitting",
    "Info": "featcache.commands.info",
    "MergeResult": "featcache.commands.merge",
    "Model": "featcache.model",
    "PlanResult": "featcache.commands.plan",
    "PredictResult": "featcache.commands.predict",
    "Prediction": "featcache.commands.predict",
    "PredictionStream": "featcache.commands.predict",
    "Preprocessing": "featcache.spec",
    "RepairResult": "featcache.commands.repair",
    "Shard": "featcache.sharding",
    "VerifyResult": "featcache.commands.verify",
    "compare": "featcache.commands.compare",
    "embed": "featcache.commands.embed",
    "embed_together": "featcache.commands.embed",
    "evaluate_model": "featcache.commands.evaluate",
    "explain": "featcache.commands.explain",
    "export": "featcache.commands.export",
    "finetune": "featcache.commands.finetune",
    "fit": "featcache.commands.fit",
    "info": "featcache.commands.info",
    "iter_predictions": "featcache.commands.predict",
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
    "CompareResult",
    "EmbedResult",
    "EvaluateResult",
    "Explanation",
    "ExportResult",
    "FeatcacheError",
    "FeatureSet",
    "FeatureSpec",
    "FeatureStore",
    "FinetuneResult",
    "FitResult",
    "Info",
    "MergeResult",
    "Model",
    "PlanResult",
    "PredictResult",
    "Prediction",
    "PredictionStream",
    "Preprocessing",
    "RepairResult",
    "Shard",
    "VerifyResult",
    "compare",
    "embed",
    "embed_together",
    "evaluate_model",
    "explain",
    "export",
    "finetune",
    "fit",
    "info",
    "iter_predictions",
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
