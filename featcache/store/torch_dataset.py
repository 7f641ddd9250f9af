"""Features as a torch `Dataset`. The only module of the store that imports torch."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from featcache.store.features import FeatureSet


class FeatureDataset(Dataset[tuple[torch.Tensor, int]]):
    """(features (num_features,), label) by index. Workers share the memory map, never an HDF5 handle."""

    def __init__(self, features: FeatureSet) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = np.array(self.features.X[index])  # torch warns of the read-only map, so one row is copied
        return torch.from_numpy(row), int(self.features.y[index])
