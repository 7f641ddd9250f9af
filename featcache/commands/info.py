"""`featcache info`: what a store or a model file is. Needs neither torch nor the images nor the weights."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.backbones.weights import LICENCES
from featcache.disk import open_regular
from featcache.errors import ModelError, NotAStore
from featcache.model import Model
from featcache.records import SPLITS
from featcache.store.layout import NO_SPLIT
from featcache.store.reader import FeatureStore
from featcache.words import show_text

_TABLES = (
    "classes",
    "confusion",
    "confusion_counts",
    "confused",
    "per_class",
)  # of the metrics; the report beside a model has them


@dataclass(frozen=True, kw_only=True)
class Info:
    """The facts about a file, as printed and as JSON."""

    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return self.facts

    def describe(self) -> str:
        facts = dict(self.facts)
        if "checked" in facts:
            facts["checked"] = "no (`featcache verify` does)"
        return "\n".join(_lines(facts))


def info(file: str | os.PathLike[str]) -> Info:
    """Describe a feature store or a model file. NotAStore or ModelError when it is neither or damaged."""
    path = Path(file)
    try:
        with open_regular(path) as opened:
            head = opened.read(9)
    except OSError as exc:
        raise NotAStore(
            f"{path} cannot be opened: {exc.strerror}. A feature store or a model file is expected."
        ) from exc
    if head.startswith(b"\x89HDF"):
        return Info(facts=_store_facts(FeatureStore.open(path, check=False)))
    if head[8:9] == b"{":
        return Info(facts=_model_facts(path, Model.load(path)))
    raise ModelError(f"{path} is neither a feature store (HDF5) nor a model file (safetensors).")


def _store_facts(store: FeatureStore) -> dict[str, Any]:
    table, counts = store.table, store.status_counts()
    names = Counter("(none)" if label is None else label for label in table.label_names())
    splits = Counter(_split_name(code) for code in table.splits.tolist())
    provenance = store.provenance
    return {
        "file": str(store.path),
        "kind": "feature store",
        "complete": store.complete,
        "checked": False,  # rows are not compared with their checksums: info is quick on any store
        "rows": len(store),
        "status": {status.words: n for status, n in counts.items()},
        "failed": {path: status.words for path, status in store.failed_rows()},
        "classes": {name: names[name] for name in (*table.classes, "(none)") if names[name]},
        "splits": dict(splits),
        "spec": store.spec.flat(),
        "fingerprint": store.fingerprint,
        "weights": _weights_words(provenance.get("weights")),
        "provenance": {
            key: provenance.get(key)
            for key in ("created", "command", "engine", "decoder", "device", "batch_size", "versions")
        },
        "bytes": len(store.layout.buffer),
    }


def _weights_words(weights: Any) -> str:
    if not isinstance(weights, Mapping):
        return "not recorded"
    return f"{weights.get('source')}, {weights.get('label')}"


def _split_name(code: int) -> str:
    return "(none)" if code == NO_SPLIT else SPLITS[code]


def _model_facts(path: Path, model: Model) -> dict[str, Any]:
    return {
        "file": str(path),
        "kind": "model",
        "head": model.head_name,
        "params": dict(model.params),
        "classes": list(model.classes),
        "nodes": [node.key for node in model.nodes],
        "fine-tuned": bool(model.network),
        "spec": model.spec.flat(),
        "fingerprint": model.fingerprint,
        "weights": _weights_words(model.weights),
        **(_tuned_facts(model) if model.network else {}),
        "metrics": {
            name: value for name, value in model.metrics.items() if name not in _TABLES and value is not None
        },
        "bytes": os.path.getsize(path),
    }


def _tuned_facts(model: Model) -> dict[str, Any]:
    """Where a fine-tuned network comes from: the models it was, the first one first, and how that began."""
    kept = [one for one in model.tunings if one.get("probe_kept") is not True]
    return {
        "fine-tuned from": [name for one in kept if isinstance(name := one.get("from"), str)],
        "weights at first": _weights_words(model.first_weights),
        "licence of the weights": _licence(model),
    }


def _licence(model: Model) -> str:
    source = model.first_weights["source"]
    if source == "torchvision":  # which says it only where torch is imported
        return f"`featcache backbones {model.spec.backbone}` names it"
    return LICENCES.get(source, "not recorded")


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    width = max(map(len, facts), default=0)
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict) and len(value) > 0:
            shown = dict(list(value.items())[:20])
            lines.append(f"{indent}{show_text(name)}:")
            lines += _lines(shown, indent + "  ")
            if len(value) > len(shown):
                lines.append(f"{indent}  … and {len(value) - len(shown):,} more (--json lists all)")
        else:
            lines.append(f"{indent}{show_text(name) + ':':<{width + 1}} {_word(value)}")
    return lines


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, dict):
        return "none"
    if isinstance(value, list | tuple) and len(value) <= 20:
        return ", ".join(map(_word, value))
    if isinstance(value, list | tuple):
        return f"{', '.join(map(_word, value[:20]))}, … ({len(value):,} in all; --json lists them)"
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else show_text(str(value))
