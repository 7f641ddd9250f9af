"""Several processes that train one network together, as torchrun starts them; or one, without any of it.

What they tell one another are tensors, and text and arrays as the bytes of a safetensors file: no pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from featcache import errors
from featcache.errors import FeatcacheError
from featcache.tuning.launched import launched_ranks

# The first rank may embed a data set while the others wait; torchrun ends all of them when one dies.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True, eq=False)
class Message:
    """What one rank tells the others: a JSON-able value, and arrays by name."""

    plain: Any = None
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        arrays = {name: np.asarray(array, order="C") for name, array in self.arrays.items()}
        return save(arrays, {"plain": json.dumps(self.plain)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Message:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return cls(json.loads(header["__metadata__"]["plain"]), load(data))


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

    def average(self, values: Tensor) -> Tensor:
        """The mean over all ranks, in place."""
        return self.add_up(values).div_(self.count)

    def from_first(self, make: Callable[[], Message]) -> Message:
        """What the first rank makes while the others wait; its error is raised by all, and told by it."""
        if self.count == 1:
            return make()
        made, raised = Message(), None
        if self.is_first:
            try:
                made = make()
            except FeatcacheError as error:
                raised = error
        said = self._broadcast(Message(_describe(raised)))
        if raised is not None or said.plain is not None:
            raise raised or _error_of(said.plain)
        others = self._broadcast(made)
        return made if self.is_first else others

    def _broadcast(self, message: Message) -> Message:
        """The message of the first rank, whatever this one's is."""
        data = torch.frombuffer(bytearray(message.to_bytes()), dtype=torch.uint8).to(self.device)
        length = torch.tensor([len(data)], device=self.device)
        dist.broadcast(length, 0)
        if not self.is_first:
            data = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        dist.broadcast(data, 0)
        return Message.from_bytes(data.cpu().numpy().tobytes())


def _describe(error: FeatcacheError | None) -> list[str] | None:
    return None if error is None else [type(error).__name__, str(error), *getattr(error, "__notes__", ())]


def _error_of(said: list[str]) -> FeatcacheError:
    name, text, *notes = said
    kind = getattr(errors, name, FeatcacheError)
    error: FeatcacheError = kind(text)
    for note in notes:
        error.add_note(note)
    error.told_elsewhere = True
    return error


@contextmanager
def joined_ranks(device: torch.device, environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """The ranks that torchrun's variables speak of, connected while this lasts, unless they are already."""
    count = launched_ranks(environment)
    if count == 1:
        yield Ranks(device)
        return
    if dist.is_initialized():
        yield Ranks(device, dist.get_rank(), count)
        return
    if device.type == "cuda":
        device = torch.device("cuda", device.index or int(environment.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(device, dist.get_rank(), count)
    finally:
        dist.destroy_process_group()
