"""Work spread over the processors, each with one thread of the matrix library, so that none waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import TypeVar

from threadpoolctl import threadpool_limits

from featcache.processors import usable_processors

T = TypeVar("T")
R = TypeVar("R")


_count = Lock()
_inside = 0  # callers of `one_blas_thread` that are inside now, in all threads
_limits: threadpool_limits | None = None


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """No threads of the matrix library inside; where that is so already, this costs nothing.

    The limit is one for the whole process: the first who comes sets it and the last who leaves lifts it, so
    that two fits at once leave it as it was.
    """
    global _inside, _limits
    with _count:
        if not _inside:
            _limits = threadpool_limits(limits=1, user_api="blas")
        _inside += 1
    try:
        yield
    finally:
        with _count:
            _inside -= 1
            if not _inside and _limits is not None:
                _limits.restore_original_limits()
                _limits = None


def in_threads(work: Callable[[T], R], items: Sequence[T], *, products: bool = True) -> list[R]:
    """`work` of every item, in order. products: it calls the matrix library, which then has one thread."""
    threads = min(usable_processors(), len(items))
    if threads <= 1:
        return [work(item) for item in items]
    with one_blas_thread() if products else nullcontext(), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))
