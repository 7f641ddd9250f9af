"""What a skops archive claims, compared with what it holds, before skops or scikit-learn believe it.

skops refuses types that are not trusted; sizes it takes as they are told, and a tree whose sizes are false
makes scikit-learn read beyond its arrays.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import ModelError


def check_archive(data: bytes) -> None:
    """ModelError for an archive that skops would not have written."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ModelError("the scikit-learn estimator of this model is compressed, as none of ours is")
        parts = list(_parts(json.loads(archive.read("schema.json"))))
        namesakes: dict[Any, list[dict[str, Any]]] = {}
        for part in parts:
            namesakes.setdefault(part.get("__id__"), []).append(part)
        for part in parts:
            if part.get("__loader__") == "TreeNode" or part.get("__class__") == "Tree":
                _check_tree_sizes(part, archive, namesakes)


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in `schema`, itself included, however deep."""
    left = [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield value
            left += value.values()
        elif isinstance(value, list):
            left += value


def _check_tree_sizes(
    part: Mapping[str, Any], archive: zipfile.ZipFile, namesakes: Mapping[Any, list[dict[str, Any]]]
) -> None:
    state, (_, classes, outputs) = part["content"]["content"], part["__reduce__"]["args"]["content"]
    count, n_outputs = (
        _same_of_all(namesakes, number, lambda other: json.loads(other["content"]))
        for number in (state["node_count"], outputs)
    )
    nodes, values, n_classes = (
        _same_of_all(namesakes, array, lambda other: _shape(archive, other))
        for array in (state["nodes"], state["values"], classes)
    )
    if nodes != (count,) or values[:2] != (count, n_outputs) or n_classes != (n_outputs,):
        raise ModelError("a decision tree of this model has arrays of other sizes than it says")


def _same_of_all(
    namesakes: Mapping[Any, list[dict[str, Any]]], part: dict[str, Any], read: Callable[[dict[str, Any]], Any]
) -> Any:
    """What `read` gives for a part; skops takes a later part of the same `__id__` for the first of them."""
    found = read(part)
    if any(read(other) != found for other in namesakes.get(part.get("__id__"), ())):
        raise ModelError("the scikit-learn estimator of this model has two parts of one name")
    return found


def _shape(archive: zipfile.ZipFile, part: Mapping[str, Any]) -> tuple[int, ...]:
    array: NDArray[Any] = np.load(io.BytesIO(archive.read(part["file"])), allow_pickle=False)
    return array.shape
