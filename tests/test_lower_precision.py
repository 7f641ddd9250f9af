"""What bfloat16 would bring on the processors: measured where they have it, and only where it agrees."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from fake_engine import SIZE, FakeEngine

from featcache.engines import lower_precision
from featcache.engines.agreement import noise
from featcache.engines.devices import has_bfloat16_instructions
from featcache.engines.lower_precision import IMAGES, LowerPrecision, try_lower_precision

THREADS = 2


def compare(lower: FakeEngine, exact: FakeEngine, images: int = IMAGES) -> LowerPrecision:
    return try_lower_precision(lower, exact, noise(images, SIZE), threads=THREADS)


@pytest.mark.parametrize(("batch_sizes", "pays"), [((8, 2), True), ((2, 8), False), ((4, 4), False)])
def test_it_pays_where_the_same_images_take_less_time(batch_sizes: tuple[int, int], pays: bool) -> None:
    """Each call takes 20 ms, whatever is in it."""
    lower, exact = (FakeEngine(batch_size=size, seconds=0.02) for size in batch_sizes)
    found = compare(lower, exact)
    assert found.times_as_fast is not None
    assert found.pays is pays
    assert len(lower.threads) == len(exact.threads) == THREADS
    assert (found.agreement.images, found.agreement.cosine) == (IMAGES, pytest.approx(1))


def off_by(fraction: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda vectors: vectors * [1 + fraction, 1 - fraction, 1]


@pytest.mark.parametrize(
    ("spoil", "agrees"),
    [
        (off_by(0.0), True),
        (off_by(0.01), True),  # a cosine of 0.99997
        (off_by(0.02), False),
        (lambda vectors: vectors * np.nan, False),
    ],
)
def test_other_features_are_not_even_timed(spoil: Callable[[np.ndarray], np.ndarray], agrees: bool) -> None:
    lower = FakeEngine(batch_size=8, spoil=spoil)
    found = compare(lower, FakeEngine(batch_size=2, seconds=0.01))
    said = found.to_json()
    assert said["precision"] == "bfloat16"
    assert (said["agrees"], said["times_as_fast"] is not None, found.pays) == (agrees, agrees, agrees)
    assert (lower.calls > THREADS) is agrees


def test_the_first_turn_is_the_only_one_where_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_precision, "_SECONDS", 0.0)
    lower, exact = FakeEngine(batch_size=8), FakeEngine(batch_size=2)
    assert compare(lower, exact).times_as_fast is not None
    assert (lower.calls, exact.calls) == (THREADS, THREADS * IMAGES // 2)


@pytest.mark.parametrize("images", [1, 5, 20])
def test_batches_are_full_whatever_there_is_to_see(images: int) -> None:
    lower, exact = FakeEngine(batch_size=8), FakeEngine(batch_size=2)
    assert compare(lower, exact, images).agreement.images == IMAGES
    assert 4 * lower.calls == exact.calls


KNOWN: list[tuple[Mapping[str, object], bool]] = [
    ({"avx512_f": True, "avx512_bf16": True}, True),
    ({"architecture": "aarch64", "bf16": True}, True),
    ({"avx512_f": True, "avx512_bf16": False}, False),
    ({"architecture": "arm64"}, False),
]


@pytest.mark.parametrize(("capabilities", "there"), KNOWN)
@pytest.mark.parametrize("built_in", [True, False])
def test_the_processor_is_asked_and_torch_must_have_what_uses_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: Mapping[str, object], there: bool, built_in: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: built_in)
    assert has_bfloat16_instructions() is (there and built_in)


@pytest.mark.parametrize("there", [True, False, None])
def test_an_earlier_torch_is_asked_what_it_knows(monkeypatch: pytest.MonkeyPatch, there: bool | None) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    if there is not None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: there, raising=False)
    assert has_bfloat16_instructions() is (there is True)
