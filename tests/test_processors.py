"""Kernels of the matrix library: which are asked for, and products in the pieces that suit them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import featcache.heads.narrow as narrow
import featcache.processors as processors

AVX512 = "flags\t\t: fpu sse2 avx2 avx512f avx512dq avx512cd avx512bw avx512vl\n"


@pytest.mark.parametrize("n", [40, 150, 1000])
@pytest.mark.parametrize("n_models", [1, 2, 10, 16, 17, 40])
def test_products_in_pieces_are_the_products(n: int, n_models: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((n, 700)).astype(np.float32)
    models = rng.standard_normal((n_models, 700)).astype(np.float32)
    values = rng.standard_normal((n_models, n)).astype(np.float32)
    made = []
    for small in (True, False):
        monkeypatch.setattr(narrow, "_has_small_kernels", lambda small=small: small)
        made.append((narrow.of_models(models, rows), narrow.of_rows(values, rows)))
    for (by_rows, by_values), exact in zip(
        zip(*made, strict=True), (models.astype(float) @ rows.T, values.astype(float) @ rows), strict=True
    ):
        np.testing.assert_allclose(by_rows, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
        np.testing.assert_allclose(by_values, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_few_models_take_the_rows_in_pieces_of_the_size_of_a_small_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(narrow, "_has_small_kernels", lambda: True)
    rows = np.zeros((1000, 1280), dtype=np.float32)
    assert narrow._few(rows[:10], rows) == 78
    assert narrow._few(rows[:20], rows) == 0
    assert narrow._few(rows[:10], rows.astype(np.float64)) == 0
    assert narrow._few(rows[:10], np.asfortranarray(rows)) == 0
    assert narrow._few(rows[:10, :1], rows[:5, :1].copy()) == 0


@pytest.mark.parametrize(
    ("cpuinfo", "chosen", "asked"),
    [
        ("vendor_id\t: AuthenticAMD\n" + AVX512, None, "SkylakeX"),
        ("vendor_id\t: AuthenticAMD\n" + AVX512, "Zen", "Zen"),
        ("vendor_id\t: GenuineIntel\n" + AVX512, None, None),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu sse2 avx2 avx512f\n", None, None),
        ("", None, None),
        (None, None, None),
    ],
)
def test_wide_kernels_are_asked_for_where_the_library_would_not_take_them(
    cpuinfo: str | None,
    chosen: str | None,
    asked: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    environment = {} if chosen is None else {"OPENBLAS_CORETYPE": chosen}
    monkeypatch.setattr(processors, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processors.os, "environ", environment)
    processors.prefer_wide_kernels()
    assert environment.get("OPENBLAS_CORETYPE") == asked


def test_the_command_line_asks_before_numpy_is_there() -> None:
    code = (
        "import sys, featcache.cli.group as group\n"
        "group.prefer_wide_kernels = lambda: print('numpy' in sys.modules)\n"
        "from featcache.cli import main\n"
        "main(['info', 'nothing-there'])\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (said.stdout, said.returncode) == ("False\n", 1)
