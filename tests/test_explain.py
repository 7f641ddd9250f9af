"""`explain`: it names each field that differs, and says of each image just what `embed` then does with it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_toy_store, toy_spec

from featcache import embedding
from featcache.commands.embed import EmbedResult, embed
from featcache.commands.explain import explain
from featcache.errors import DamagedStore, DataError, NotAStore, StoreError
from featcache.explanation import FIELDS, Explanation
from featcache.progress import SilentProgress
from featcache.reuse import Reason
from featcache.spec import FeatureNode, FeatureSpec, Preprocessing
from featcache.store.opening import read_layout
from featcache.store.reader import FeatureStore

TOY = "channel_mean:channel_mean"
RANDOM = {"backbone": "resnet18", "weights": "random"}


@pytest.fixture
def photos(save_images: Callable[..., Path]) -> Path:
    return save_images(12, lambda i: f"class{i % 2}/{i:02d}.png")


@pytest.fixture
def store(photos: Path, tmp_path: Path) -> Path:
    embed(photos, tmp_path / "s.h5", backbone=TOY)
    return tmp_path / "s.h5"


def changed(explanation: Explanation) -> dict[str, tuple[object, object]]:
    assert explanation.differences is not None
    return {d.field: (d.have, d.want) for d in explanation.differences}


def reasons(explanation: Explanation) -> dict[str, int]:
    assert explanation.images is not None
    return {name: len(ids) for name, ids in explanation.images.reasons.items()}


def test_every_field_of_a_spec_has_words() -> None:
    assert set(FIELDS) == set(toy_spec().flat())


def test_alone_it_says_what_counts_and_what_does_not(store: Path) -> None:
    said = explain(store).describe().splitlines()
    beside = said.index("recorded beside it, and not part of it:")
    assert FeatureStore.open(store).fingerprint in said[0]
    assert [line.split()[0] for line in said[1:beside]] == list(FIELDS)
    names = [line.split()[0] for line in said[beside + 1 :]]
    assert {"engine", "device", "batch_size", "versions", "data", "command"} <= set(names)


SPEC_CHANGES: list[tuple[dict[str, Any], str, object, object]] = [
    ({"backbone": "resnet50"}, "backbone", "toy", "resnet50"),
    ({"weights_sha256": "1" * 64}, "weights_sha256", "0" * 64, "1" * 64),
    ({"compute_dtype": "bfloat16"}, "compute_dtype", "float32", "bfloat16"),
    ({"store_dtype": "float16"}, "store_dtype", "float32", "float16"),
]
PREPROCESSING_CHANGES: list[tuple[dict[str, Any], str, object, object]] = [
    (
        {"preprocessing": replace(toy_spec().preprocessing, **{name: value})},
        f"preprocessing.{name}",
        have,
        value,
    )
    for name, have, value in (
        ("resize_size", 8, 9),
        ("crop_size", 8, 7),
        ("interpolation", "bilinear", "bicubic"),
        ("antialias", True, False),
        ("mean", (0.485, 0.456, 0.406), (0.5, 0.5, 0.5)),
        ("std", (0.229, 0.224, 0.225), (0.5, 0.5, 0.5)),
        ("color", "rgb-over-white-1", "rgb-over-white-2"),
        ("exif", "transpose", "ignore"),
        ("jpeg", "full", "scaled"),
        ("transform", "", "mine:shift@0123456789abcdef"),
    )
]


@pytest.mark.parametrize(
    ("change", "field", "have", "want"),
    [*SPEC_CHANGES, *PREPROCESSING_CHANGES],
    ids=lambda part: str(part)[:24],
)
def test_the_one_field_in_which_two_stores_differ_is_named(
    tmp_path: Path, change: dict[str, Any], field: str, have: object, want: object
) -> None:
    a = make_toy_store(tmp_path / "a.h5", n=4)
    b = make_toy_store(tmp_path / "b.h5", n=4, spec=toy_spec(**change))
    explanation = explain(a, b)
    assert changed(explanation) == {field: (have, want)}
    assert f"  {field}: " in explanation.describe()
    assert f" -> {str(want)[:12].strip('()')}" in explanation.describe()
    assert explanation.to_json()["same"] is False


def test_every_field_is_tried_above() -> None:
    tried = {change[1] for change in (*SPEC_CHANGES, *PREPROCESSING_CHANGES)}
    # Another test has the nodes; only one view can be stored yet.
    assert tried | {"nodes", "num_features", "views", "views_seed", "augmentation"} == set(FIELDS)
    assert {f.name for f in fields(FeatureSpec)} == {name.split(".")[0] for name in FIELDS} - {"num_features"}
    assert {f.name for f in fields(Preprocessing)} == {name.split(".")[1] for name in FIELDS if "." in name}


def test_other_nodes_are_named_with_their_width(tmp_path: Path) -> None:
    a = make_toy_store(tmp_path / "a.h5", n=4)
    nodes = (FeatureNode(name="penultimate", num_features=3), FeatureNode(name="stem", num_features=5))
    b = make_toy_store(tmp_path / "b.h5", n=4, spec=toy_spec(nodes=nodes))
    assert changed(explain(a, b)) == {
        "nodes": ("penultimate, stem:max", "penultimate, stem"), "num_features": ([3, 2], [3, 5]),
    }  # fmt: skip


def test_the_same_features_are_the_same_whatever_else_differs(
    photos: Path, store: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.h5"
    embed(photos, other, backbone=TOY, batch_size=3, workers=1)
    explanation = explain(store, other)
    assert changed(explanation) == {}
    assert explanation.describe().splitlines()[0] == f"{store} and {other}: the same spec"
    assert explanation.rows is not None
    assert explanation.rows.same == 12


def test_the_rows_of_two_stores_are_compared_by_path_and_bytes(
    photos: Path, store: Path, tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    other = Path(shutil.copytree(photos, tmp_path / "other"))
    save_image(other / "class0" / "00.png", seed=100)  # other bytes
    (other / "class0" / "02.png").rename(other / "class0" / "renamed.png")
    (other / "class0" / "04.png").unlink()
    for i in range(3):
        save_image(other / "class1" / f"new{i}.png", seed=200 + i)
    embed(other, tmp_path / "o.h5", backbone=TOY)
    rows = explain(store, tmp_path / "o.h5").rows
    assert rows is not None
    found = {field.name: getattr(rows, field.name) for field in fields(rows)}
    assert found == {
        "same": 9, "same_bytes": 1, "other_bytes": 1, "only_here": 1, "only_there": 3,
        "relabelled": 0, "not_sound_here": 0, "not_sound_there": 0,
    }  # fmt: skip


def test_options_are_compared_field_by_field_the_others_being_those_of_the_store(
    photos: Path, tmp_path: Path
) -> None:
    store = tmp_path / "r.h5"
    embed(photos, store, **RANDOM, seed=3, nodes=("layer4",), store_dtype="float16")  # type: ignore[arg-type]
    assert changed(explain(store, seed=3)) == {}
    assert changed(explain(store, store_dtype="float32")) == {"store_dtype": ("float16", "float32")}
    assert changed(explain(store, precision="bfloat16")) == {"compute_dtype": ("float32", "bfloat16")}
    assert list(changed(explain(store, seed=4))) == ["weights_sha256"]
    assert changed(explain(store, nodes=("layer3",))) == {
        "nodes": ("layer4:avg", "layer3:avg"), "num_features": ([512], [256]),
    }  # fmt: skip
    assert list(changed(explain(store, backbone="resnet34"))) == ["backbone", "weights_sha256"]


def test_options_as_the_store_was_made_need_no_torch(photos: Path, tmp_path: Path) -> None:
    import subprocess

    store = tmp_path / "r.h5"
    embed(photos, store, **RANDOM)  # type: ignore[arg-type]
    code = (
        "import sys; from featcache.commands.explain import explain\n"
        f"print(explain({str(store)!r}, seed=0).to_json()['same'], 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "True False\n"


def test_the_code_a_store_names_is_run_only_when_the_user_names_it(store: Path) -> None:
    with pytest.raises(StoreError, match="repeat it as --backbone channel_mean:channel_mean"):
        explain(store, precision="bfloat16")
    assert changed(explain(store, backbone=TOY)) == {}
    assert list(changed(explain(store, backbone=TOY, precision="bfloat16"))) == ["compute_dtype"]


def test_images_of_another_spec_are_all_new_and_it_says_that_embed_refuses(photos: Path, store: Path) -> None:
    explanation = explain(store, backbone=TOY, store_dtype="float16", data=photos)
    assert reasons(explanation) == {"NEW": 12}
    assert "refuses another spec" in explanation.describe()


def compute(explanation: Explanation) -> int:
    return sum(count for name, count in reasons(explanation).items() if not Reason[name].is_reuse)


def reuse(explanation: Explanation) -> int:
    return sum(
        count
        for name, count in reasons(explanation).items()
        if Reason[name].is_reuse and Reason[name] is not Reason.SAME_FAILURE
    )


def agree(explanation: Explanation, result: EmbedResult) -> None:
    """What was said is what was done."""
    images = explanation.images
    assert images is not None
    assert reuse(explanation) == result.reused
    assert compute(explanation) + images.count(Reason.SAME_FAILURE) == result.embedded + result.failed
    assert (len(images.relabelled), len(images.removed)) == (result.relabelled, result.removed)
    assert images.images == result.rows


def test_the_reasons_are_what_embed_then_does(
    photos: Path, tmp_path: Path, save_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "BLOCK_ROWS", 4)
    store = tmp_path / "s.h5"
    for name in ("class1/bad.png", "class1/mended.png", "class1/away.png"):
        (photos / name).write_bytes(name.encode())
    agree(  # nothing of it is there yet: all are new to a store that holds other images
        _explained(make_other(tmp_path, save_image), photos),
        embed(photos, tmp_path / "o.h5", backbone=TOY, max_failures=1, prune=True),
    )
    embed(photos, store, backbone=TOY, batch_size=2, max_failures=1)
    agree(_explained(store, photos), embed(photos, store, backbone=TOY, max_failures=1))

    os.utime(photos / "class0" / "00.png", ns=(1, 1))
    (photos / "class0" / "02.png").rename(photos / "class0" / "03_renamed.png")
    shutil.copy(photos / "class0" / "04.png", photos / "class1" / "copied.png")
    save_image(photos / "class0" / "06.png", seed=106)
    save_image(photos / "class1" / "new.png", seed=200)
    save_image(photos / "class1" / "mended.png", seed=201)
    (photos / "class1" / "away.png").unlink()
    layout = read_layout(store)
    ids = FeatureStore.open(store).table.ids
    damaged, forgotten = ids.index("class1/03.png") // 4, ids.index("class1/11.png") // 4
    with open(store, "r+b") as file:
        region = layout.features["penultimate"]
        file.seek(region.offset + 4 * damaged * region.row_bytes)
        file.write(b"\xff\x00\xff")
        file.seek(layout.blocks.offset + forgotten * layout.blocks.row_bytes)
        file.write(bytes(layout.blocks.row_bytes))

    explanation = _explained(store, photos)
    assert explanation.images is not None
    by_reason = explanation.images.reasons
    assert by_reason["SAME_BYTES"] == ("class0/00.png",)
    assert by_reason["OTHER_PATH"] == ("class0/03_renamed.png", "class1/copied.png")
    assert by_reason["EDITED"] == ("class0/06.png",)
    assert by_reason["NEW"] == ("class1/new.png",)
    assert by_reason["SAME_FAILURE"] == ("class1/bad.png",)
    assert by_reason["FAILED_BEFORE"] == ("class1/mended.png",)
    assert "class1/03.png" in by_reason["DAMAGED"]
    assert "class1/11.png" in by_reason["PENDING"]
    # That of a broken seal is met in test_salvage.
    assert {*by_reason, "SALVAGED"} == {reason.name for reason in Reason}, "a reason was not met"
    assert "class1/away.png" in explanation.images.removed
    said = explanation.describe()
    assert "  1 to embed (the bytes changed): class0/06.png" in said
    assert "  1 reused (touched: the bytes are the recorded ones): class0/00.png" in said
    agree(explanation, embed(photos, store, backbone=TOY, dry_run=True, max_failures=1))
    agree(explanation, embed(photos, store, backbone=TOY, max_failures=1))
    json.dumps(explanation.to_json(), allow_nan=False)


def make_other(folder: Path, save_image: Callable[..., Path]) -> Path:
    save_image(folder / "others" / "class0" / "x.png", seed=900)
    embed(folder / "others", folder / "o.h5", backbone=TOY)
    return folder / "o.h5"


def _explained(store: Path, photos: Path) -> Explanation:
    before = store.read_bytes()
    explanation = explain(store, data=photos)
    assert store.read_bytes() == before
    return explanation


def test_relabelled_and_moved_images_are_told(photos: Path, store: Path) -> None:
    (photos / "class0").rename(photos / "aardvark")
    explanation = explain(store, data=photos)
    assert reasons(explanation) == {"SAME_STAT": 6, "OTHER_PATH": 6}
    agree(explanation, embed(photos, store, backbone=TOY))


def test_a_row_tells_its_story(photos: Path, store: Path, save_image: Callable[..., Path]) -> None:
    path = photos / "class0" / "00.png"
    was = path.stat()
    row = explain(store, row="class0/00.png").row
    assert row is not None
    assert (row.reason, row.recorded and row.recorded["label"]) == ("SAME_STAT", "class0")
    assert row.recorded is not None
    assert row.now is not None
    assert row.recorded["sha256"] == row.now["sha256"]
    save_image(path, seed=100)
    explanation = explain(store, row="class0/00.png")
    row = explanation.row
    assert row is not None
    assert row.recorded is not None
    assert row.now is not None
    assert row.reason == "EDITED"
    assert row.recorded["size"] == was.st_size
    assert row.recorded["sha256"] != row.now["sha256"]
    said = explanation.describe()
    assert f"sha256: {row.recorded['sha256']} recorded, {row.now['sha256']} now" in said
    assert said.startswith("class0/00.png: to embed (the bytes changed)\n")


def test_a_row_that_was_renamed_is_known_as_what_it_was(photos: Path, store: Path) -> None:
    (photos / "class0" / "00.png").rename(photos / "class0" / "zero.png")
    row = explain(store, row="class0/zero.png").row
    assert row is not None
    assert (row.reason, row.known_as, row.recorded) == ("OTHER_PATH", "class0/00.png", None)
    gone = explain(store, row="class0/00.png")
    assert gone.row is not None
    assert (gone.row.reason, gone.row.now) == ("REMOVED", None)
    assert "the file is not there" in gone.describe()
    for meant in ("class0/zer.png", "zero.png", "/some/where/else/photos/class0/zero.png", "zerro.png"):
        with pytest.raises(DataError, match=r"did you mean class0/zero\.png"):
            explain(store, row=meant)
    with pytest.raises(DataError, match=r"did you mean class0/02\.png"):
        explain(store, row="class1/02.png")
    with pytest.raises(DataError, match=r"nor its images have quite another$"):
        explain(store, row="quite another")


class CountingProgress(SilentProgress):
    """Counts what is told it."""

    def __init__(self) -> None:
        self.started, self.advanced, self.finished = 0, 0, 0

    def start(self, label: str, *, total: int, unit: str) -> None:
        self.started += 1

    def advance(self, count: int, *, stages: Mapping[str, float] | None = None) -> None:
        self.advanced += count

    def finish(self) -> None:
        self.finished += 1


def test_progress_begins_with_the_first_image_that_is_read(photos: Path, store: Path) -> None:
    progress = CountingProgress()
    explain(store, data=photos, progress=progress)
    assert (progress.started, progress.advanced) == (0, 0)
    for name in ("00", "02", "04"):
        os.utime(photos / "class0" / f"{name}.png", ns=(1, 1))
    explain(store, data=photos, progress=progress)
    assert (progress.started, progress.advanced, progress.finished) == (1, 3, 2)


def test_a_row_costs_reading_its_own_image_alone(photos: Path, store: Path) -> None:
    for path in photos.rglob("*.png"):
        os.utime(path, ns=(1, 1))
    progress = CountingProgress()
    row = explain(store, row="class1/03.png", progress=progress).row
    assert row is not None
    assert (row.reason, progress.advanced) == ("SAME_BYTES", 1)


def test_a_row_is_told_of_also_when_its_folder_is_gone(photos: Path, store: Path) -> None:
    photos.rename(photos.with_name("moved"))
    explanation = explain(store, row="class0/00.png")
    row = explanation.row
    assert row is not None
    assert (row.reason, row.now, row.recorded and row.recorded["status"]) == (None, None, "ok")
    said = explanation.describe()
    assert said.startswith("class0/00.png: what becomes of it is not known: ")
    assert "which is not there. Pass where they are now as --data DATA." in said
    assert "sha256: " in said
    with pytest.raises(DataError, match="which is not there"):
        explain(store, row="class0/none.png")
    with pytest.raises(DataError, match="which is not there"):
        explain(store, row="class0/00.png", data=photos)
    again = explain(store, row="class0/00.png", data=photos.with_name("moved")).row
    assert again is not None
    assert again.reason == "SAME_STAT"


def test_names_are_shown_on_one_line_and_kept_in_json(
    photos: Path, tmp_path: Path, save_image: Callable[..., Path]
) -> None:
    name = "class0/a\n\x1b[31m.png"
    embed(photos, tmp_path / "s.h5", backbone=TOY)
    save_image(photos / name, seed=50)
    explanation = explain(tmp_path / "s.h5", data=photos)
    assert explanation.to_json()["images"]["reasons"]["NEW"] == (name,)
    assert "  1 to embed (new): class0/a\\n\\x1b[31m.png" in explanation.describe().splitlines()
    row = explain(tmp_path / "s.h5", row=name)
    assert row.describe().startswith("class0/a\\n\\x1b[31m.png: to embed (new)\n")


def test_one_is_not_many(tmp_path: Path, save_image: Callable[..., Path]) -> None:
    photos = save_image(tmp_path / "photos" / "c" / "0.png").parent.parent
    store = tmp_path / "s.h5"
    embed(photos, store, backbone=TOY)
    assert explain(store, data=photos).describe().startswith(f"1 image in {photos}:\n")
    (photos / "c" / "0.png").rename(photos / "c" / "1.png")
    save_image(photos / "c" / "1.png", seed=9)
    assert "  1 row removed (no longer there): c/0.png" in explain(store, data=photos).describe()


def test_a_damaged_row_says_so(photos: Path, store: Path) -> None:
    with open(store, "r+b") as file:
        file.seek(read_layout(store).features["penultimate"].offset)
        file.write(b"\xff\x00\xff")
    row = explain(store, row="class0/00.png").row
    assert row is not None
    assert row.recorded is not None
    assert (row.reason, row.recorded["status"]) == ("DAMAGED", "in a damaged block")


def test_what_cannot_be_explained_is_one_line(store: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(NotAStore, match="cannot be opened"):
        explain(tmp_path / "none.h5")
    with pytest.raises(NotAStore, match="cannot be opened"):
        explain(store, tmp_path / "none.h5")
    with pytest.raises(ValueError, match="excludes"):
        explain(store, store, data=photos)
    with pytest.raises(DataError, match="not there"):
        explain(store, data=tmp_path / "nowhere")
    store.write_bytes(store.read_bytes()[:-100])
    with pytest.raises((DamagedStore, NotAStore)):
        explain(store)
