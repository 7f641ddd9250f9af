"""A store whose seal is broken: nothing serves it, and `embed` makes it anew from the rows that are sound."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.damage import KINDS, Versions, choose_change, parts_of
from test_embed import TOY, counts, no_decoding, stop_after

from featcache import reuse
from featcache.commands.embed import EmbedResult, embed
from featcache.commands.explain import explain
from featcache.commands.fit import fit
from featcache.commands.info import info
from featcache.commands.repair import repair
from featcache.commands.verify import verify
from featcache.errors import DamagedStore, DataError, DiskError, NotAStore, SpecMismatch, StoreError
from featcache.images.identity import hash_image
from featcache.records import Listing
from featcache.store.layout import Region
from featcache.store.opening import read_layout
from featcache.store.reader import FeatureStore

pytestmark = pytest.mark.usefixtures("small_blocks")

ROWS = 20  # in blocks of 8: 0-7, 8-15, 16-19
ROUNDS = 5  # of every kind of damage
STATIC = ("ids", "labels", "splits", "classes", "seal", "gaps")


@pytest.fixture
def photos(save_images: Callable[..., Path]) -> Path:
    # Of the size that is asked for, which every decoder leaves alone: which made a row is not known here.
    return save_images(ROWS, lambda i: f"class{i // 10}/{i:02d}.png", size=(8, 8))


@pytest.fixture
def store(photos: Path, tmp_path: Path) -> Path:
    embed_it(photos, tmp_path / "s.h5")
    return tmp_path / "s.h5"


def embed_it(photos: Path, store: Path, **options: object) -> EmbedResult:
    # With one worker a batch is written before the next but one is computed.
    return embed(photos, store, **{"backbone": TOY, "batch_size": 4, "workers": 1, **options})  # type: ignore[arg-type]


def flip(path: Path, offset: int, bits: int = 0x01) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ bits]))


def flip_in(path: Path, part: str) -> None:
    """One bit in the middle of the largest piece of this part."""
    place = max(parts_of(path, path.read_bytes())[part], key=len)
    flip(path, place[len(place) // 2])


def flip_text(path: Path, text: bytes, bits: int = 0x01) -> None:
    """A bit of the last byte of a text that is in the file once."""
    whole = path.read_bytes()
    assert whole.count(text) == 1
    flip(path, whole.index(text) + len(text) - 1, bits)


def damage_block(path: Path, block: int) -> None:
    layout = read_layout(path)
    region = layout.features["penultimate"]
    flip(path, region.offset + layout.rows_of(block).start * region.row_bytes)


def content(path: Path) -> dict[str, object]:
    """All that a store says of its images."""
    opened = FeatureStore.open(path)
    features = opened.features()
    return {
        "features": features.X.tobytes(),
        "labels": features.y.tolist(),
        "classes": features.classes,
        "ids": features.ids,
        "splits": features.splits.tolist(),
        "sources": opened.sources.tobytes(),
        "status": opened.row_status.tobytes(),
        "spec": opened.spec,
    }


def require_as_fresh(store: Path, photos: Path) -> None:
    """The store is what a run without any cache makes of the images, and nothing lies beside it."""
    fresh = store.with_name("fresh.h5")
    embed_it(photos, fresh)
    assert content(store) == content(fresh)
    fresh.unlink()
    assert sorted(path.name for path in store.parent.iterdir()) == ["photos", store.name]
    assert counts(embed_it(photos, store)) == {"rows": ROWS, "reused": ROWS}


def break_static(store: Path, what: str) -> None:
    if what in STATIC:
        flip_in(store, what)
    elif what == "superblock":
        flip(store, 44)  # its checksum, which says nothing beside the seal
    elif what == "header":
        flip(store, parts_of(store, store.read_bytes())["metadata"][0].stop - 1)
    else:
        texts = {
            "uuid": read_layout(store).uuid.encode(),
            "provenance": b'"command"',
            "not UTF-8": b'"command"',
        }
        flip_text(store, texts[what], 0x80 if what == "not UTF-8" else 0x01)


@pytest.mark.parametrize("what", [*STATIC, "superblock", "header", "uuid", "provenance", "not UTF-8"])
def test_one_flipped_bit_costs_no_row(
    photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    break_static(store, what)
    with pytest.raises(DamagedStore, match="sealed with.*takes over the rows that are sound"):
        FeatureStore.open(store)
    with monkeypatch.context() as patch:
        no_decoding(patch)
        result = embed_it(photos, store)
    assert counts(result) == {"rows": ROWS, "reused": ROWS}
    assert f"the seal of {store} was broken: 20 of its rows are taken over" in result.describe()
    require_as_fresh(store, photos)


def test_nothing_but_embed_opens_it_and_each_says_what_to_do(
    photos: Path, store: Path, tmp_path: Path
) -> None:
    flip_in(store, "ids")
    broken = store.read_bytes()
    for refuse in (
        lambda: fit(store, tmp_path / "m.model"),
        lambda: info(store),
        lambda: verify(store),
        lambda: repair(store, backbone=TOY, data=photos),
        lambda: explain(store, data=photos),
    ):
        with pytest.raises(
            DamagedStore, match=f"nothing of it is served.*`featcache embed DATA -o {store}`"
        ) as said:
            refuse()
        assert "\n" not in str(said.value)
    assert store.read_bytes() == broken
    with pytest.raises(DamagedStore, match="nothing says which image"):
        FeatureStore.salvage(store).features()


def test_every_image_is_hashed_once_and_no_time_stamp_believed(
    photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_in(store, "labels")
    hashed: list[str] = []

    def hash_and_count(path: Path) -> object:
        hashed.append(path.name)
        return hash_image(path)

    monkeypatch.setattr(reuse, "hash_image", hash_and_count)
    embed_it(photos, store)
    assert sorted(hashed) == sorted(path.name for path in photos.rglob("*.png"))


def test_labels_come_from_the_images_as_they_lie_now(
    photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_in(store, "labels")
    (photos / "class0").rename(photos / "class2")
    (photos / "class1" / "10.png").unlink()
    no_decoding(monkeypatch)
    result = embed_it(photos, store)
    assert counts(result) == {"rows": 19, "reused": 19}, "nothing is known of old labels and old paths"
    features = FeatureStore.open(store).features()
    assert [features.classes[label] for label in features.y] == [path.split("/")[0] for path in features.ids]


def test_of_a_damaged_block_only_the_rows_are_computed(photos: Path, store: Path, decoded: list[str]) -> None:
    damage_block(store, 1)
    flip_in(store, "ids")
    decoded.clear()
    assert counts(embed_it(photos, store)) == {"rows": ROWS, "embedded": 8, "reused": 12}
    # The images an engine proves itself on are read as well, and are among those to embed.
    assert set(decoded) == {f"{i:02d}.png" for i in range(8, 16)}
    require_as_fresh(store, photos)


def test_of_edited_images_only_they_are_computed(
    photos: Path, store: Path, save_image: Callable[..., Path], decoded: list[str]
) -> None:
    flip_in(store, "gaps")
    save_image(photos / "class0" / "03.png", seed=300, size=(8, 8))
    decoded.clear()
    assert counts(embed_it(photos, store)) == {"rows": ROWS, "embedded": 1, "reused": 19}
    assert set(decoded) == {"03.png"}
    require_as_fresh(store, photos)


@pytest.mark.parametrize(
    ("text", "bits", "words"),
    [
        (b'"weights_sha256":"', 0x02, "cannot be read"),
        (b'"resize_size":8', 0x01, "spec does not match its fingerprint"),
        (b"", 0x01, "spec does not match its fingerprint"),
    ],
    ids=["no JSON", "another spec", "fingerprint"],
)
def test_a_damaged_spec_cannot_be_believed(
    photos: Path, store: Path, text: bytes, bits: int, words: str
) -> None:
    flip_text(store, text or read_layout(store).fingerprint.encode(), bits)
    broken = store.read_bytes()
    with pytest.raises(DamagedStore, match=f"{words}.*Restore it from a copy, or delete it") as said:
        embed_it(photos, store)
    assert "\n" not in str(said.value)
    assert store.read_bytes() == broken
    assert sorted(path.name for path in store.parent.iterdir()) == ["photos", "s.h5"]


def test_another_spec_is_refused_as_of_any_store(photos: Path, store: Path) -> None:
    flip_in(store, "ids")
    broken = store.read_bytes()
    with pytest.raises(SpecMismatch, match="store_dtype is float32, not float16"):
        embed_it(photos, store, store_dtype="float16")
    assert store.read_bytes() == broken


def regions(path: Path) -> dict[str, Region]:
    layout = read_layout(path)
    names = ("row_status", "sources", "blocks")
    return {"features": layout.features["penultimate"], **{name: getattr(layout, name) for name in names}}


@pytest.mark.parametrize("rows", [-1, 1])
@pytest.mark.parametrize("name", ["features", "row_status", "sources", "blocks"])
def test_rows_moved_by_a_damaged_offset_are_not_taken(
    photos: Path, store: Path, name: str, rows: int
) -> None:
    """Trap: the bytes of the neighbouring row, whole and of the same network."""
    region, whole = regions(store)[name], store.read_bytes()
    old = region.offset.to_bytes(8, "little")
    assert whole.count(old) == 1
    store.write_bytes(whole.replace(old, (region.offset + rows * region.row_bytes).to_bytes(8, "little")))
    assert regions_moved(store, name) == rows * region.row_bytes
    result = embed_it(photos, store)
    # Of row_status, where all are ok, the first blocks are the same a byte further on.
    assert result.embedded == ROWS or name == "row_status"
    require_as_fresh(store, photos)


def regions_moved(path: Path, name: str) -> int:
    moved, whole = FeatureStore.salvage(path).layout, path.with_name("whole.h5")
    embed_it(path.with_name("photos"), whole)
    there = regions(whole)[name].offset
    whole.unlink()
    return (moved.features["penultimate"] if name == "features" else getattr(moved, name)).offset - there


@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_every_kind_is_refused_or_made_good(photos: Path, store: Path, kind: str) -> None:
    """Whatever chance does anywhere: no round ends in a store that is not the one a fresh run makes."""
    versions = Versions(now=store.read_bytes(), older=(bytes(8192),))
    good, parts = content(store), parts_of(store, versions.now)
    for seed in range(ROUNDS):
        rng = random.Random(f"{kind}{seed}")
        change = choose_change(rng, parts[rng.choice([*parts])], kind, versions)
        if change is None:
            continue
        store.write_bytes(versions.now)
        with open(store, "r+b") as file:
            os.pwrite(file.fileno(), change.data, change.offset)
            if change.size is not None:
                file.truncate(change.size)
        broken = store.read_bytes()
        refused = refusal(photos, store)
        assert "\n" not in refused
        if refused:
            assert store.read_bytes() == broken
        else:
            assert content(store) == good, f"seed {seed}, at {change.offset}"


def refusal(photos: Path, store: Path) -> str:
    try:
        embed_it(photos, store)
    except StoreError as error:
        return str(error)
    return ""


def test_killed_in_between_the_old_file_stays_and_the_same_command_goes_on(
    photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage_block(store, 1)
    flip_in(store, "ids")
    broken = store.read_bytes()
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            embed_it(photos, store, decoder="exact")
    assert store.read_bytes() == broken
    growth = store.with_name("s.h5.growing")
    assert FeatureStore.open(growth).done.tolist() == [True] * 8 + [False] * 12
    uuid = read_layout(growth).uuid
    assert counts(embed_it(photos, store)) == {"rows": ROWS, "embedded": 8, "reused": 12}
    assert read_layout(store).uuid == uuid, "the growth was not gone on with"
    require_as_fresh(store, photos)


def test_a_killed_one_whose_images_changed_needs_nothing_that_was_recorded(
    photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A growth that proves the weights, beside the store that records nothing, and no row to compute."""
    damage_block(store, 1)
    flip_in(store, "ids")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            embed_it(photos, store)
    for i in range(8, 16):
        next(photos.rglob(f"{i:02d}.png")).unlink()
    monkeypatch.setattr("featcache.embedder.prove_weights", lambda recorded, _: "proven" if recorded else "")
    no_decoding(monkeypatch)
    assert counts(embed_it(photos, store)) == {"rows": 12, "reused": 12}
    assert FeatureStore.open(store).provenance["engine"]


def test_a_growth_with_a_broken_seal_gives_its_rows(
    photos: Path, store: Path, save_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(20, 36):
        save_image(photos / "class0" / f"{i}.png", seed=i)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            embed_it(photos, store)
    growth = store.with_name("s.h5.growing")
    kept = int(FeatureStore.open(growth).done[10:26].sum())
    assert kept
    flip_in(growth, "labels")
    reasons = explain(store, data=photos).images
    assert reasons is not None
    assert len(reasons.reasons["SALVAGED"]) == kept
    said = explain(store, data=photos, row="class0/20.png").describe()
    assert "the bytes are known in an unfinished store whose seal is broken" in said
    assert "known as" not in said
    result = embed_it(photos, store)
    assert counts(result) == {"rows": 36, "embedded": 16 - kept, "reused": ROWS + kept}
    assert f"the seal of {growth} was broken" in result.describe()
    assert sorted(path.name for path in store.parent.iterdir()) == ["photos", "s.h5"]


def test_a_growth_that_cannot_be_read_for_its_disk_is_no_damage(
    photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growth = Path(shutil.copy(store, store.with_name("s.h5.growing")))
    plain = FeatureStore.salvage

    def fail(path: Path) -> FeatureStore:
        if path == growth:
            raise DiskError(f"reading {path} failed: Input/output error.")
        return plain(path)

    monkeypatch.setattr(FeatureStore, "salvage", fail)
    with pytest.raises(DiskError, match="Input/output"):
        embed_it(photos, store)
    assert growth.exists()


def test_a_file_that_is_no_store_is_not_made_anew(photos: Path, store: Path) -> None:
    store.write_bytes(b"something else")
    with pytest.raises(NotAStore, match="not an HDF5 file"):
        embed_it(photos, store)
    assert store.read_bytes() == b"something else"


def test_a_dry_run_says_what_would_be_taken_over(photos: Path, store: Path) -> None:
    flip_in(store, "seal")
    broken = store.read_bytes()
    dry = embed_it(photos, store, dry_run=True)
    assert counts(dry) == {"rows": ROWS, "reused": ROWS}
    assert "20 of its rows are taken over, known by the sha256 of their images" in dry.describe()
    assert store.read_bytes() == broken


def test_rows_of_a_folder_that_cannot_be_listed_may_be_in_it(
    photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_in(store, "ids")
    broken = store.read_bytes()

    def without_class1(data: Path, **options: object) -> Listing:
        listing = scan(data, **options)
        records = tuple(record for record in listing.records if record.label == "class0")
        return Listing(root=listing.root, records=records, classes=("class0",), unlisted=("class1/",))

    from featcache.images import scan_images as scan

    monkeypatch.setattr("featcache.commands.embed.scan_images", without_class1)
    with pytest.raises(
        DataError, match="class1/ cannot be listed, and .*s.h5, whose seal is broken, may have"
    ):
        embed_it(photos, store)
    assert store.read_bytes() == broken


def test_it_says_that_the_engine_of_its_rows_is_not_known(photos: Path, store: Path) -> None:
    damage_block(store, 2)
    flip_in(store, "ids")
    assert "rows embedded before are by an unrecorded engine" in embed_it(photos, store).describe()
    assert FeatureStore.open(store).provenance["earlier_engines"] == ["an unrecorded engine"]


@pytest.mark.parametrize("ending", [".growing", ".growing.2", ".creating", ".growing.creating"])
def test_a_folder_in_the_place_of_an_unfinished_store_is_named_before_any_work(
    photos: Path, store: Path, monkeypatch: pytest.MonkeyPatch, ending: str, save_image: Callable[..., Path]
) -> None:
    folder = store.with_name(store.name + ending)
    folder.mkdir()
    save_image(photos / "class0" / "new.png", seed=500)
    damage_block(store, 1)
    before = store.read_bytes()
    no_decoding(monkeypatch)
    for work in (lambda: embed_it(photos, store), lambda: repair(store, backbone=TOY)):
        with pytest.raises(StoreError, match=f"{folder} is a folder, .*Move or remove it"):
            work()
    assert store.read_bytes() == before
    assert folder.is_dir()
