"""How many processors there are to work on, and which kernels the matrix library has for them."""

from __future__ import annotations

import os
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_KERNELS = "OPENBLAS_CORETYPE"
_AVX512 = frozenset({"avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"})


def usable_processors() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prefer_wide_kernels() -> None:
    """Have numpy's OpenBLAS use AVX-512 where the processor is AMD's and has it, unless the user chose.

    By itself it takes the kernels for AVX2 there, at half the speed (`docs/benchmarks.md`). Works before
    numpy is imported; for the one who owns the process, as processes that it starts inherit the choice.
    """
    if _KERNELS not in os.environ and _is_wide_amd(_CPUINFO):
        os.environ[_KERNELS] = "SkylakeX"


def _is_wide_amd(cpuinfo: Path) -> bool:
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:  # no Linux
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return "AuthenticAMD" in text and set(flags.split()) >= _AVX512
