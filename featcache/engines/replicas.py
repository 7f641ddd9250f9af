"""One network for several threads at once: each has its own Python state, and all share the weights.

A forward pass may leave something in the modules it runs through, and then two threads in the same modules
would compute from each other's images. What code of the user's own leaves elsewhere, a copy would share: such
a network is run by one thread at a time.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)

# What copying an object of someone else's making raises, or running the copy.
_COPY_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, copy.Error)


# Whose modules keep what they know in themselves.
_KNOWN = ("torch.nn", "torchvision", "timm", "featcache")


class Replicas(Generic[N]):
    """The copies of a network, one for each thread that asks; where there can be none, turns of the one.

    probe: images (n, 3, S, S), on which a copy must compute what the network does. copies: whether there may
    be some, see `is_known`. A turn has as many of torch's threads as there are where this is made.
    """

    def __init__(self, network: N, *, probe: Tensor, copies: bool) -> None:
        self._network = network
        self._probe = probe
        self._local = threading.local()
        self._lock = threading.Lock()
        self._threads = torch.get_num_threads()
        self._can_copy, self._proven = copies and not _has_hooks(network), False
        self._local.own = network  # the thread that made it goes on with it

    @contextmanager
    def own(self) -> Iterator[N]:
        """The network of the calling thread, in evaluation mode.

        Someone may have called .train() on the backbone since: batch-norm statistics must not move.
        """
        network = self._of_thread()
        if network is not None:
            yield network.eval()
            return
        with self._lock, threads_of_torch_kept():
            torch.set_num_threads(self._threads)
            yield self._network.eval()

    def _of_thread(self) -> N | None:
        if not self._can_copy:
            return None  # the thread that made it takes turns as well
        found: N | None = getattr(self._local, "own", None)
        if found is None:
            with self._lock:
                found = self._local.own = self._copy()
                self._can_copy = found is not None
        return found

    def _copy(self) -> N | None:
        try:
            copied = replica(self._network)
            if self._proven:
                return copied
            with torch.inference_mode():
                found, expected = copied(self._probe), self._network.eval()(self._probe)
        except _COPY_ERRORS:
            return None
        self._proven = all(
            torch.allclose(found[key], expected[key], rtol=1e-3, atol=1e-4) for key in expected
        )
        return copied if self._proven else None


def replica(network: N) -> N:
    """A copy of a network in evaluation mode, with the same tensors."""
    tensors = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
    # What is in the table counts as copied. A copied graph of torch.fx is in training mode whatever it was
    # before.
    return copy.deepcopy(network, tensors).eval()


def is_known(network: nn.Module) -> bool:
    """Whether a network consists of modules of well-known libraries, as they are."""
    return all(
        type(module).__module__.startswith(_KNOWN) and "forward" not in vars(module)
        for module in network.modules()
    )


def _has_hooks(network: nn.Module) -> bool:
    """Whether modules call functions of someone else's, which a copy would share."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@contextmanager
def threads_of_torch_kept() -> Iterator[None]:
    """Put back the number of torch's threads: `one_thread_of_torch` sets it for threads to come as well."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread_of_torch() -> None:
    """Let the calling thread run torch's operations alone: others work beside it."""
    torch.set_num_threads(1)
