"""What determines the numbers in a feature store, and its fingerprint. Knows no files, torch or HDF5."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from featcache.errors import SpecMismatch

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Pooling = Literal["none", "avg", "max", "cls"]
Precision = Literal["float32", "bfloat16", "float16"]
StoreDtype = Literal["float32", "float16"]

PENULTIMATE = "penultimate"

# What `images.decode` does with every mode of picture; a change of behaviour there is a new name here.
COLOR_POLICY = "rgb-over-white-1"
EXIF_POLICY = "transpose"


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes the network's input: resize the shorter side, crop the centre, normalise.

    Sizes are pixels. `mean` and `std` are per RGB channel for values scaled to [0, 1].
    """

    resize_size: int
    crop_size: int
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    color: str = COLOR_POLICY
    exif: str = EXIF_POLICY

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            # 0 and 0.0 are one number, and must be one fingerprint.
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if self.resize_size < 1 or self.crop_size < 1:
            raise ValueError(f"sizes are positive pixels, not {self.resize_size} and {self.crop_size}")
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(f"interpolation {self.interpolation!r} is none of {get_args(Interpolation)}")
        if any(s <= 0 for s in self.std):
            raise ValueError(f"std is positive, not {self.std}")


@dataclass(frozen=True, kw_only=True)
class FeatureNode:
    """One output of the backbone: a node of its graph, pooled to a vector of `num_features` values."""

    name: str
    pooling: Pooling = "none"
    num_features: int

    def __post_init__(self) -> None:
        if not isinstance(self.num_features, int) or self.num_features < 1:
            raise ValueError(f"num_features is a positive whole number, not {str(self.num_features)[:20]!r}")

    @property
    def key(self) -> str:
        """The name of the node's dataset in a store: `penultimate`, `layer3:avg`."""
        return self.name if self.pooling == "none" else f"{self.name}:{self.pooling}"


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Everything that determines the features of an image, and nothing else.

    Batch size, workers, paths, device, engine and library versions are recorded beside the spec, never in it.
    """

    backbone: str
    weights_sha256: str
    nodes: tuple[FeatureNode, ...]
    preprocessing: Preprocessing
    compute_dtype: Precision = "float32"
    store_dtype: StoreDtype = "float32"
    views: int = 1

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no white space, so that equal specs are equal bytes."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> FeatureSpec:
        """The spec of `to_json`; ValueError or TypeError when a field is missing, unknown or malformed."""
        raw: dict[str, Any] = json.loads(text)
        if not isinstance(raw, dict):
            raise ValueError("a spec is a JSON object")
        raw["nodes"] = tuple(FeatureNode(**node) for node in raw["nodes"])
        pre = raw["preprocessing"]
        raw["preprocessing"] = Preprocessing(**{**pre, "mean": tuple(pre["mean"]), "std": tuple(pre["std"])})
        return cls(**raw)

    def fingerprint(self) -> str:
        """sha256 of the canonical JSON, 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def flat(self) -> dict[str, object]:
        """The fields a person compares, in order: nested ones under dotted names."""
        rows: dict[str, object] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Preprocessing):
                rows |= {f"preprocessing.{k}": v for k, v in asdict(value).items()}
            elif field.name == "nodes":
                rows["nodes"] = ", ".join(node.key for node in value)
                rows["num_features"] = [node.num_features for node in value]
            else:
                rows[field.name] = value
        return rows


def spec_differences(have: FeatureSpec, want: FeatureSpec) -> Mapping[str, tuple[object, object]]:
    """The fields in which two specs differ, as {field: (have, want)}; empty when they are equal."""
    a, b = have.flat(), want.flat()
    return {name: (a[name], b[name]) for name in a if a[name] != b[name]}


def describe_differences(have: FeatureSpec, want: FeatureSpec) -> str:
    """The fields in which two specs differ, in words; "" when they are equal."""
    differences = spec_differences(have, want)
    return "; ".join(
        f"{name} is {show_value(a)}, not {show_value(b)}" for name, (a, b) in differences.items()
    )


def require_same_spec(have: FeatureSpec, want: FeatureSpec, *, where: str) -> None:
    """Raise `SpecMismatch` naming every field in which the features at `where` are not the ones wanted."""
    said = describe_differences(have, want)
    if not said:
        return
    raise SpecMismatch(
        f"{where} holds {have.backbone} features of another spec: {said}. "
        "Choose another --output, or ask for what the store holds."
    )


def require_shallow(document: object, *, levels: int = 32) -> None:
    """ValueError for JSON nested so deeply that printing it would fail; none of ours is."""
    level = [document]
    for _ in range(levels):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return
    raise ValueError(f"it is nested more than {levels} levels deep")


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def show_value(value: object) -> str:
    """The value of a field for a message: of a digest, what tells it from others."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    is_digest = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return f"{text[:12]}…" if is_digest else text
