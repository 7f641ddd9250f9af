"""Several processes that train one network together, as torchrun starts them; or one, without any of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from featcache.errors import FeatcacheError

T = TypeVar("T")

# The first rank may embed a data set while the others wait; torchrun ends all of them when one dies.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network, its gradients averaged over all ranks."""
        if self.count == 1:
            return network
        ids = [self.device.index or 0] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=ids, broadcast_buffers=False)

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes while the others wait; its error is raised by all of them."""
        if self.count == 1:
            return make()
        said: list[object] = [None, None]
        if self.is_first:
            try:
                said[0] = make()
            except FeatcacheError as error:
                said[1] = error
        dist.broadcast_object_list(said, src=0, device=self.device)
        if isinstance(said[1], FeatcacheError):
            raise said[1]
        return said[0]  # type: ignore[return-value]


def is_first_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one that says and writes what was done."""
    return environment.get("RANK", "0") == "0"


@contextmanager
def joined_ranks(device: torch.device, environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """The ranks that torchrun's variables speak of, connected while this lasts."""
    count = int(environment.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", device.index or int(environment.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(device, dist.get_rank(), count)
    finally:
        dist.destroy_process_group()
