"""The field's example: ResNet-18, every parameter frozen, `fc` replaced by a new linear layer.

Cached features through the head must be what the whole network computes from the photograph.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18

from featcache.commands.embed import embed
from featcache.commands.fit import fit
from featcache.model import Model
from featcache.store.reader import FeatureStore


def frozen_model(model: Model) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The textbook's network with the fitted head as its `fc`, and the state dict it began with."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = resnet18(weights=None)
    original = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for parameter in network.parameters():
        parameter.requires_grad = False
    weight, bias = model.head.as_linear()  # type: ignore[attr-defined]  # the head is a linear one
    network.fc = nn.Linear(512, len(model.classes))
    with torch.no_grad():
        network.fc.weight.copy_(torch.from_numpy(weight))
        network.fc.bias.copy_(torch.from_numpy(bias))
    return network.eval(), original


def largest_difference(data: Path, folder: Path, *, decoder: str = "exact") -> tuple[float, set[str], int]:
    """max |cached logit - end-to-end logit|, the tensors that differ from the original, and the images."""
    store, path = folder / "store.h5", folder / "store.model"
    embed(data, store, backbone="resnet18", weights="random", seed=0, decoder=decoder)
    fit(store, path, head="linear", params={"weight_decay": 0.1, "epochs": 2})
    model = Model.load(path)
    network, original = frozen_model(model)
    features = FeatureStore.open(store).features()
    cached = model.head.column_scores(features.X) / model.head.temperature
    transform = ResNet18_Weights.DEFAULT.transforms()
    worst = 0.0
    for name, logits in zip(features.ids, cached, strict=True):
        with Image.open(data / name) as photo, torch.inference_mode():
            whole = network(transform(photo.convert("RGB"))[None])[0]
        worst = max(worst, float(np.abs(whole.double().numpy() - logits).max()))
    changed = {name for name, t in network.state_dict().items() if not same(t, original[name])}
    return worst, changed, len(features)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())


# By the fast decoder, whose pixels are within 2 of 255, 9e-5 was measured.
@pytest.mark.parametrize(("decoder", "most"), [("exact", 1e-5), ("fast", 1e-3)])
def test_cached_features_and_head_are_the_frozen_model(
    tmp_path: Path, save_image: Callable[..., Path], decoder: str, most: float
) -> None:
    for i in range(12):
        save_image(tmp_path / "photos" / f"class{i % 3}" / f"{i}.jpg", seed=i, size=(300, 260 + 7 * i))
    worst, changed, n = largest_difference(tmp_path / "photos", tmp_path, decoder=decoder)
    assert n == 12
    assert worst < most
    assert changed == {"fc.weight", "fc.bias"}
