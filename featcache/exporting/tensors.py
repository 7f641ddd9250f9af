"""safetensors files whose bytes depend on what is in them and on nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor


def encode_tensors(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> bytes:
    """The file of these contiguous tensors, with `about` as its metadata in the order of its names.

    The library puts metadata in an order that it draws anew for each file.
    """
    data = memoryview(save(dict(tensors), dict(about)))
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:begin]))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin where a number of 8 bytes may
    return b"".join((len(text).to_bytes(8, "little"), text, data[begin:]))
