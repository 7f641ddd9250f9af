"""Work spread over the processors, each with one thread of the matrix library, so that none waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TypeVar

from threadpoolctl import threadpool_limits

from featcache.processors import usable_processors

T = TypeVar("T")
R = TypeVar("R")


_single = ContextVar("single", default=False)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """No threads of the matrix library inside; where that is so already, this costs nothing."""
    if _single.get():
        yield
        return
    token = _single.set(True)
    try:
        with threadpool_limits(limits=1, user_api="blas"):
            yield
    finally:
        _single.reset(token)


def in_threads(work: Callable[[T], R], items: Sequence[T], *, products: bool = True) -> list[R]:
    """`work` of every item, in order. products: it calls the matrix library, which then has one thread."""
    threads = min(usable_processors(), len(items))
    if threads <= 1:
        return [work(item) for item in items]
    with one_blas_thread() if products else nullcontext(), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))
