"""Features with a known answer, in memory or in a real store: normal clouds around one centre a class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from featcache.records import NO_FILE, ImageRecord, RowStatus
from featcache.spec import FeatureNode, FeatureSpec, Preprocessing
from featcache.store.creating import create_store
from featcache.store.features import FeatureSet
from featcache.store.layout import SOURCE_DTYPE, RowTable
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter

PROVENANCE: Mapping[str, Any] = {
    "request": {"backbone": "toy", "weights": None, "seed": 0},
    "weights": {"source": "user", "label": "toy", "sha256": "0" * 64, "path": None, "file_sha256": None},
    "versions": {},
    "engine": "toy",
    "device": "cpu",
    "batch_size": 4,
    "created": "2026-01-01T00:00:00+00:00",
    "command": "tests",
}
SPLITS = {"train": 36, "test": 24}


def gaussian_features(
    splits: Mapping[str, int] = SPLITS, *, k: int = 3, d: int = 5, gap: float = 6.0, seed: int = 0
) -> FeatureSet:
    """So many rows a split, the classes in turn, `gap` standard deviations between the centres' axes."""
    rng = np.random.default_rng(seed)
    n = sum(splits.values())
    y = np.concatenate([np.arange(rows) % k for rows in splits.values()])
    X = rng.normal(size=(n, d)) + gap * np.eye(max(k, d))[y, :d]
    node = FeatureNode(name="penultimate", num_features=d)
    spec = FeatureSpec(
        backbone="toy",
        weights_sha256="0" * 64,
        nodes=(node,),
        preprocessing=Preprocessing(resize_size=8, crop_size=8),
    )
    return FeatureSet(
        X=X.astype(np.float32),
        y=y.astype(np.int64),
        classes=tuple(f"class{i}" for i in range(k)),
        ids=tuple(f"{i:05d}.png" for i in range(n)),
        splits=np.repeat(np.array(list(splits), dtype="<U5"), list(splits.values())),
        sha256=rng.integers(0, 256, size=(n, 32), dtype=np.uint8),
        nodes=(node,),
        spec=spec,
    )


def take(features: FeatureSet, rows: Any) -> FeatureSet:
    """Some of the rows."""
    index = np.arange(len(features))[rows]
    return replace(
        features,
        X=features.X[index],
        y=features.y[index],
        ids=tuple(features.ids[i] for i in index),
        splits=features.splits[index],
        sha256=features.sha256[index],
    )


def write_store(path: Path, features: FeatureSet, *, fill: bool = True) -> Path:
    """A store that gives these features back; without `fill` its rows are pending."""
    records = tuple(
        ImageRecord(
            path=name,
            stat=NO_FILE,
            label=features.classes[label] if label >= 0 else None,
            split=split or None,
        )
        for name, label, split in zip(
            features.ids, features.y.tolist(), features.splits.tolist(), strict=True
        )
    )
    n = len(features)
    create_store(
        path,
        spec=features.spec,
        table=RowTable.from_records(records, features.classes),
        provenance=PROVENANCE,
        block_rows=n,
    )
    if fill:
        sources = np.zeros(n, SOURCE_DTYPE)
        sources["sha256"] = features.sha256
        store = FeatureStore.open(path, check=False)
        with StoreWriter(store.layout) as writer:
            writer.write_block(
                0,
                features={features.nodes[0].key: features.X},
                row_status=np.full(n, RowStatus.OK, dtype=np.uint8),
                sources=sources,
            )
    return path
