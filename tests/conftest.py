"""What the tests stand on: small real images, and a store made without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gaussians import PROVENANCE
from PIL import Image

from featcache import embedding, pipeline
from featcache.images.decode import Decoder, load_pictures
from featcache.records import NO_FILE, ImageRecord, RowStatus
from featcache.spec import FeatureNode, FeatureSpec, Picture, Preprocessing
from featcache.store.creating import create_store
from featcache.store.layout import SOURCE_DTYPE, RowTable
from featcache.store.reader import FeatureStore
from featcache.store.writer import StoreWriter


def toy_spec(**changes: object) -> FeatureSpec:
    fields = {
        "backbone": "toy",
        "weights_sha256": "0" * 64,
        "nodes": (
            FeatureNode(name="penultimate", num_features=3),
            FeatureNode(name="stem", pooling="max", num_features=2),
        ),
        "preprocessing": Preprocessing(resize_size=8, crop_size=8),
    }
    return FeatureSpec(**{**fields, **changes})  # type: ignore[arg-type]


def toy_records(n: int) -> tuple[ImageRecord, ...]:
    return tuple(
        ImageRecord(path=f"c{i % 2}/é{i:04d}.png", stat=NO_FILE, label=f"c{i % 2}", split="train")
        for i in range(n)
    )


def toy_block(store: FeatureStore, block: int) -> dict[str, np.ndarray]:
    """The features a toy store holds: row r is r, r + 1, … in every node."""
    rows = store.layout.rows_of(block)
    first = np.arange(rows.start, rows.stop)[:, None]
    return {
        key: (first + np.arange(region.shape[1])).astype(region.dtype)
        for key, region in store.layout.features.items()
    }


def write_toy_blocks(path: Path, blocks: range | None = None) -> None:
    store = FeatureStore.open(path, check=False)
    with StoreWriter(store.layout) as writer:
        for block in blocks if blocks is not None else range(store.layout.n_blocks):
            rows = store.layout.rows_of(block)
            n = rows.stop - rows.start
            writer.write_block(
                block,
                features=toy_block(store, block),
                row_status=np.full(n, RowStatus.OK, dtype=np.uint8),
                sources=np.zeros(n, SOURCE_DTYPE),
            )


@pytest.fixture
def toy_store(tmp_path: Path) -> Path:
    """A complete store of 10 rows in blocks of 4."""
    return make_toy_store(tmp_path / "toy.h5", n=10)


def make_toy_store(path: Path, *, n: int, fill: bool = True, spec: FeatureSpec | None = None) -> Path:
    create_store(
        path,
        spec=spec or toy_spec(),
        table=RowTable.from_records(toy_records(n), ("c0", "c1")),
        provenance=PROVENANCE,
        block_rows=4,
    )
    if fill:
        write_toy_blocks(path)
    return path


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are decoded from here on, to compute features of."""
    names: list[str] = []

    def load(path: Path, pictures: Sequence[Picture], *, decoder: Decoder) -> object:
        names.append(path.name)
        return load_pictures(path, pictures, decoder=decoder)

    monkeypatch.setattr(pipeline, "load_pictures", load)
    return names


@pytest.fixture
def save_image() -> Callable[..., Path]:
    """save_image(path, seed=0, size=(w, h)): a picture of smooth seeded colours, saved by its extension."""

    def save(path: Path, *, seed: int = 0, size: tuple[int, int] = (24, 20)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
        return path

    return save


@pytest.fixture
def save_images(tmp_path: Path, save_image: Callable[..., Path]) -> Callable[..., Path]:
    """save_images(n, name_of, folder="photos", seed=0, size=(w, h)): n pictures in a folder, which it gives.

    name_of: from the number of a picture to its path in the folder.
    """

    def save(
        n: int, name_of: Callable[[int], str], *, folder: str = "photos", seed: int = 0, **how: Any
    ) -> Path:
        for i in range(n):
            save_image(tmp_path / folder / name_of(i), seed=seed + i, **how)
        return tmp_path / folder

    return save


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores that are embedded have blocks of 8 rows."""
    monkeypatch.setattr(embedding, "BLOCK_ROWS", 8)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch computes in one thread: small images gain nothing from more, and a run adds up in one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
