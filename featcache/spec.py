"""What determines the numbers in a feature store, and its fingerprint. Knows no files, torch or HDF5."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from featcache.errors import SpecMismatch

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Pooling = Literal["none", "avg", "max", "cls", "flat"]
Precision = Literal["float32", "bfloat16", "float16"]
StoreDtype = Literal["float32", "float16"]
JpegScale = Literal["full", "scaled"]

PENULTIMATE = "penultimate"
MOST_VIEWS = 1000

# What `images.decode` does with every mode of picture; a change of behaviour there is a new name here.
COLOR_POLICY = "rgb-over-white-1"
EXIF_POLICY = "transpose"
# What `images.views` draws for the views after the first; a change of the draw is a new name here.
AUGMENTATION = "random-resized-crop-flip-1"


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes the network's input: resize the shorter side, crop the centre, normalise.

    Sizes are pixels. `mean` and `std` are per RGB channel for values scaled to [0, 1]. With jpeg "scaled" the
    decoder of JPEGs shrinks large ones by 2, 4 or 8 on the way, which is faster and gives other pixels.
    `transform` names a function of the user's own (`know_transform`) that resizes and crops instead.
    """

    resize_size: int
    crop_size: int
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    color: str = COLOR_POLICY
    exif: str = EXIF_POLICY
    jpeg: JpegScale = "full"
    transform: str = ""

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
        if self.jpeg not in get_args(JpegScale):
            raise ValueError(f"jpeg {self.jpeg!r} is none of {get_args(JpegScale)}")
        if not isinstance(self.transform, str):
            raise ValueError(f"transform is a name, not {str(self.transform)[:20]!r}")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture made of an image: the plain one, view 0, or an augmented view drawn by `seed`."""

    preprocessing: Preprocessing
    view: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.view < 0:
            raise ValueError(f"views are counted from 0, not {self.view}")


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
    views: vectors of each image; the first is of the plain picture, the others of views that `augmentation`
    draws by `views_seed`, which are 0 and "" where there are no others.
    """

    backbone: str
    weights_sha256: str
    nodes: tuple[FeatureNode, ...]
    preprocessing: Preprocessing
    compute_dtype: Precision = "float32"
    store_dtype: StoreDtype = "float32"
    views: int = 1
    views_seed: int = 0
    augmentation: str = ""

    def find_node(self, name: str) -> str:
        """The key of the node that alone has this name, as `layer3:avg` for `layer3`; else the name."""
        keys = [node.key for node in self.nodes]
        pooled = [node.key for node in self.nodes if node.name == name]
        return pooled[0] if name not in keys and len(pooled) == 1 else name

    def __post_init__(self) -> None:
        for name, least in (("views", 1), ("views_seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is a whole number from {least}, not {str(value)[:20]!r}")
        if self.views > MOST_VIEWS:  # of a forged file, whose datasets it would take for ever to look for
            raise ValueError(f"there are at most {MOST_VIEWS:,} views, not {str(self.views)[:20]}")
        drawn = self.views > 1
        # What draws no view determines nothing: it must not make another fingerprint.
        object.__setattr__(self, "views_seed", self.views_seed if drawn else 0)
        object.__setattr__(self, "augmentation", (self.augmentation or AUGMENTATION) if drawn else "")

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no white space, so that equal specs are equal bytes.

        A field that came later is left out where it has no effect: specs written before it keep their bytes.
        """
        raw = asdict(self)
        if self.views == 1:
            del raw["views_seed"], raw["augmentation"]
        for name, usual in (("jpeg", "full"), ("transform", "")):
            if raw["preprocessing"][name] == usual:
                del raw["preprocessing"][name]
        return json.dumps(raw, sort_keys=True, separators=(",", ":"))

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

    def pictures(self) -> tuple[Picture, ...]:
        """The pictures of an image, one a vector; ValueError where another version draws them."""
        if self.augmentation not in ("", AUGMENTATION):
            raise ValueError(f"this version draws views with {AUGMENTATION}, not {self.augmentation}")
        return tuple(
            Picture(preprocessing=self.preprocessing, view=view, seed=self.views_seed)
            for view in range(self.views)
        )

    def datasets(self) -> dict[str, int]:
        """{name of a dataset of a store: num_features}, one for each node and view."""
        return {
            view_key(node.key, view): node.num_features for node in self.nodes for view in range(self.views)
        }

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


def view_key(key: str, view: int) -> str:
    """The name of a node's dataset in a store for one of the views: `penultimate`, `penultimate@1`."""
    return f"{key}@{view}" if view else key


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
    return f"{text[:12]}…" if is_digest else text or "none"
