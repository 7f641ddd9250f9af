"""Copies of a network for threads: the same weights, other Python state; turns where there can be no copy."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featcache.backbones import load_backbone, make_backbone
from featcache.engines import make_engine
from featcache.engines.replicas import (
    Replicas,
    is_known,
    one_thread_of_torch,
    replica,
    threads_of_torch_kept,
)
from featcache.spec import Preprocessing

SIZE = 8
PROBE = torch.linspace(-1, 1, 3 * SIZE**2).view(1, 3, SIZE, SIZE)


class Keeping(nn.Module):
    """Leaves the images in `self` between two layers, and lets other threads pass meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.norm = nn.BatchNorm2d(3)
        self.kept: Tensor | None = None
        self.passes: list[int] = []

    def forward(self, images: Tensor) -> Any:
        self.kept = images
        self.passes.append(threading.get_ident())
        time.sleep(0.002)
        return {"mean": self.kept.mean((2, 3)) * self.weight}


class Uncopiable(Keeping):
    def __deepcopy__(self, memo: object) -> object:
        raise TypeError("cannot be copied")


class WrongCopy(Keeping):
    def __deepcopy__(self, memo: dict[int, Any]) -> object:
        copied = Keeping()
        copied.weight = nn.Parameter(torch.full((3,), 2.0))
        return copied


class BrokenCopy(Keeping):
    def __deepcopy__(self, memo: dict[int, Any]) -> object:
        class Broken(Keeping):
            def forward(self, images: Tensor) -> Any:
                raise RuntimeError("where is the rest of me")

        return Broken()


def with_hook() -> Keeping:
    network = Keeping()
    network.norm.register_forward_hook(lambda *_: None)
    return network


def in_threads(work: Callable[[int], Any], count: int = 4) -> list[Any]:
    """What each of so many threads, all alive at once, makes of its number."""
    together = threading.Barrier(count)

    def begin(number: int) -> Any:
        together.wait(20)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def networks(replicas: Replicas[Any]) -> list[nn.Module]:
    def own(_: int) -> nn.Module:
        with replicas.own() as network:
            time.sleep(0.01)
            return network  # type: ignore[no-any-return]

    return in_threads(own)


def test_a_copy_has_the_same_tensors_and_python_state_of_its_own() -> None:
    network = Keeping().train()
    copied = replica(network)
    assert copied is not network
    assert copied.passes is not network.passes
    assert not copied.training
    assert network.training
    for ours, theirs in zip(network.state_dict().values(), copied.state_dict().values(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
    assert next(copied.parameters()) is next(network.parameters())


def test_each_thread_has_a_copy_and_the_one_that_made_it_the_network() -> None:
    network = Keeping()
    replicas = Replicas(network, probe=PROBE, copies=True)
    assert len({id(own) for own in networks(replicas)} - {id(network)}) == 4
    with replicas.own() as own:
        assert own is network


def test_training_mode_is_left_before_a_pass() -> None:
    network = Keeping()
    replicas = Replicas(network, probe=PROBE, copies=True)
    network.train()
    assert not any(own.training for own in networks(replicas))
    network.train()
    with replicas.own() as own:
        assert not own.training


@pytest.mark.parametrize("make", [Uncopiable, WrongCopy, BrokenCopy, with_hook])
def test_what_cannot_be_copied_is_used_in_turns(make: Callable[[], Keeping]) -> None:
    network = make()
    replicas = Replicas(network, probe=PROBE, copies=True)
    assert {id(own) for own in networks(replicas)} == {id(network)}
    inside, most = [], []

    def enter(_: int) -> None:
        with replicas.own():
            inside.append(1)
            time.sleep(0.005)
            most.append(len(inside))
            inside.pop()

    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(enter, i) for i in range(3)]
        enter(3)  # the thread that made it waits for its turn as well
        for other in others:
            other.result()
    assert max(most) == 1


@pytest.fixture
def switches_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


_kept_by_all: dict[str, Tensor] = {}


class KeepingElsewhere(Keeping):
    """Leaves the images where all copies would."""

    def forward(self, images: Tensor) -> Any:
        _kept_by_all["images"] = images
        time.sleep(0.002)
        return {"mean": _kept_by_all["images"].mean((2, 3)) * self.weight}


class KeepingInBuffer(Keeping):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(2, 3))

    def forward(self, images: Tensor) -> Any:
        means: Any = self.means
        means.resize_(len(images), 3).copy_(images.mean((2, 3)))
        time.sleep(0.002)
        return {"mean": means * self.weight}


def with_closure() -> Keeping:
    network, other = Keeping(), Keeping()
    network.forward = other.forward  # type: ignore[method-assign]
    return network


class Kept(nn.Module):
    """As `Keeping`, as a backbone."""

    def __init__(self, make: Callable[[], Keeping]) -> None:
        super().__init__()
        self.keeping = make()

    def forward(self, images: Tensor) -> Tensor:
        return self.keeping(images)["mean"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [Keeping, Uncopiable, KeepingElsewhere, KeepingInBuffer, with_closure])
def test_features_are_right_in_many_threads_for_a_network_that_keeps_state(
    switches_often: None, make: Callable[[], Keeping]
) -> None:
    preprocessing = Preprocessing(resize_size=SIZE, crop_size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)
    backbone = make_backbone(Kept(make), preprocessing=preprocessing)
    engine = make_engine(backbone, device="cpu", batch_size=2)

    def work(number: int) -> list[float]:
        pixels = np.full((2, SIZE, SIZE, 3), 10 * number, dtype=np.uint8)
        return [float(engine.embed(pixels)["penultimate"][0, 0]) for _ in range(10)]

    for number, found in enumerate(in_threads(work)):
        np.testing.assert_allclose(found, (10 * number / 255 - 0.5) / 0.5, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_real_networks_are_copied_and_compute_the_same(name: str) -> None:
    whole = load_backbone(name, weights="random")
    backbone = replace(whole, preprocessing=replace(whole.preprocessing, crop_size=64))
    engine = make_engine(backbone, device="cpu", batch_size=1)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    with threads_of_torch_kept():
        one_thread_of_torch()
        expected = engine.embed(pixels)["penultimate"]
        for found in in_threads(lambda _: engine.embed(pixels)["penultimate"], 2):
            np.testing.assert_array_equal(found, expected)
    assert engine._replicas._proven  # type: ignore[attr-defined]


def test_the_number_of_torchs_threads_is_put_back_whatever_happens() -> None:
    def work() -> None:
        with threads_of_torch_kept():
            one_thread_of_torch()
            assert torch.get_num_threads() == 1
            raise ZeroDivisionError

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ZeroDivisionError):
            work()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_networks_of_well_known_libraries_are_known_unless_they_were_changed() -> None:
    network = load_backbone("resnet18", weights="random").module
    assert is_known(network)
    network.layer1[0].forward = lambda images: images  # type: ignore[index,union-attr]
    assert not is_known(network)
    assert not is_known(nn.Sequential(nn.ReLU(), Keeping()))
    assert is_known(nn.Sequential(nn.ReLU()))


def test_a_turn_has_all_threads_of_torch() -> None:
    def threads(_: int) -> tuple[int, int]:
        one_thread_of_torch()
        with replicas.own():
            inside = torch.get_num_threads()
        return inside, torch.get_num_threads()

    with threads_of_torch_kept():
        torch.set_num_threads(3)
        replicas = Replicas(Keeping(), probe=PROBE, copies=False)
        assert in_threads(threads) == [(3, 1)] * 4
