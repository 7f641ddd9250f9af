"""`predict`: new images are seen just as the head saw those it was fitted on, or nothing is predicted."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from featcache.backbones import load_backbone
from featcache.cli import main
from featcache.commands.embed import embed
from featcache.commands.fit import fit
from featcache.commands.predict import (
    PredictionStream,
    PredictResult,
    csv_lines,
    iter_predictions,
    json_lines,
    json_list,
    predict,
    text_lines,
    written_to_csv,
)
from featcache.errors import BackboneError, DataError, DeviceError, DiskError, ModelError
from featcache.images.decode import load_pictures
from featcache.images.identity import ImageFailure
from featcache.inference import answer_batch
from featcache.lanes import EmbeddedBatch, EmbeddedImage
from featcache.model import Model
from featcache.records import NO_FILE, RowStatus
from featcache.request import recorded_decoder
from featcache.spec import Picture
from featcache.store.reader import FeatureStore

TOY = "channel_mean:channel_mean"
SMALL = "shufflenet_v2_x0_5"


@dataclass(frozen=True, kw_only=True)
class Work:
    """A folder of reddish, greenish and bluish pictures, its store and a model."""

    photos: Path
    store: Path
    model: Path

    @property
    def images(self) -> list[Path]:
        return sorted(self.photos.rglob("*.png"))


def paint(path: Path, *, channel: int, seed: int) -> Path:
    """A noisy picture in which one channel is brighter than the others."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 120, (20, 24, 3))
    pixels[..., channel] += rng.integers(30, 120)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("work")
    for i in range(30):
        paint(folder / "photos" / ("red", "green", "blue")[i % 3] / f"{i:02d}.png", channel=i % 3, seed=i)
    work = Work(photos=folder / "photos", store=folder / "s.h5", model=folder / "s.model")
    embed(work.photos, work.store, backbone=TOY)
    fit(work.store, work.model)
    return work


def ask(work: Work, *images: Path, **options: Any) -> PredictResult:
    return predict(work.model, images or [work.photos], **{"backbone": TOY, **options})


def same(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and abs(a - b) < 1e-5


def test_an_image_is_predicted_as_its_cached_features_are(work: Work) -> None:
    features, model = FeatureStore.open(work.store).features(), Model.load(work.model)
    probabilities = dict(zip(features.ids, model.predict_proba(features.X), strict=True))
    result = ask(work)
    assert len(result.predictions) == 30
    for answer in result.predictions:
        expected = probabilities[str(Path(answer.path).relative_to(work.photos))]
        best = int(expected.argmax())
        assert answer.label == model.classes[best]
        assert same(answer.probability, expected[best])
        assert {label for label, _ in answer.topk} == set(model.classes)
        for label, p in answer.topk:
            assert same(p, expected[model.classes.index(label)])


def test_it_learned_the_colours(work: Work, tmp_path: Path) -> None:
    new = [paint(tmp_path / f"{c}.png", channel=c, seed=100 + c) for c in range(3)]
    assert [p.label for p in ask(work, *new).predictions] == ["red", "green", "blue"]


@pytest.mark.parametrize("batch_size", [None, 1, 7])
def test_an_image_alone_is_predicted_as_in_a_folder(work: Work, batch_size: int | None) -> None:
    together = {p.path: p for p in ask(work, batch_size=batch_size).predictions}
    for image in work.images[::9]:
        (alone,) = ask(work, image).predictions
        assert alone.label == together[str(image)].label
        assert same(alone.probability, together[str(image)].probability)


def test_the_order_is_the_order_given_and_top_k_is_kept(work: Work) -> None:
    chosen = [work.images[i] for i in (20, 3, 11, 3)]
    result = ask(work, *chosen, top_k=2, batch_size=3)
    assert [p.path for p in result.predictions] == [str(path) for path in chosen]
    for p in result.predictions:
        assert len(p.topk) == 2
        assert p.topk[0] == (p.label, p.probability)
        assert p.topk[0][1] >= p.topk[1][1]
    assert len(ask(work, chosen[0], top_k=99).predictions[0].topk) == 3


@pytest.fixture
def mixed(work: Work, tmp_path: Path) -> list[Path]:
    """Good images with bad ones between them."""
    bad = [tmp_path / name for name in ("empty.png", "text.jpg", "cut.png")]
    bad[0].write_bytes(b"")
    bad[1].write_text("<html>not found</html>")
    bad[2].write_bytes(work.images[0].read_bytes()[:200])
    return [bad[0], work.images[0], bad[1], work.images[15], bad[2]]


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_an_unreadable_image_costs_itself_only(work: Work, mixed: list[Path], batch_size: int | None) -> None:
    result = ask(work, *mixed, batch_size=batch_size)
    assert [p.path for p in result.predictions] == [str(path) for path in mixed]
    assert [p.error is None for p in result.predictions] == [False, True, False, True, False]
    assert result.failed == 3
    for answer, path in zip(result.predictions, mixed, strict=True):
        if answer.error is None:
            (alone,) = ask(work, path).predictions
            assert (answer.label, same(answer.probability, alone.probability)) == (alone.label, True)
        else:
            assert (answer.label, answer.probability, answer.topk) == (None, None, ())
            assert answer.error
            assert "\n" not in answer.error


def test_nothing_but_unreadable_images_is_an_answer_too(work: Work, mixed: list[Path]) -> None:
    assert ask(work, mixed[0]).failed == 1


def test_json_is_a_list_of_answers_and_of_errors(work: Work, mixed: list[Path]) -> None:
    answers = json.loads(json.dumps(ask(work, *mixed).to_json(), allow_nan=False))
    assert [set(answer) for answer in answers] == [
        {"path", "error"} if i % 2 == 0 else {"path", "label", "probability", "topk"} for i in range(5)
    ]
    assert answers[1]["topk"][0] == {"label": answers[1]["label"], "probability": answers[1]["probability"]}


def test_csv_has_a_line_an_image(work: Work, mixed: list[Path], tmp_path: Path) -> None:
    odd = paint(tmp_path / 'a, "b".png', channel=0, seed=1)
    result = ask(work, *mixed, odd)
    rows = list(csv.DictReader(io.StringIO(result.to_csv())))
    assert list(rows[0]) == ["path", "label", "guess", "probability", "error"]
    assert [row["path"] for row in rows] == [str(path) for path in [*mixed, odd]]
    for row, answer in zip(rows, result.predictions, strict=True):
        assert row["label"] == row["guess"] == (answer.label or "")
        assert row["error"] == (answer.error or "")
        assert row["probability"] == ("" if answer.error else f"{answer.probability:.6f}")


def test_the_text_has_a_line_an_image(work: Work, mixed: list[Path]) -> None:
    lines = ask(work, *mixed).describe().splitlines()
    assert len(lines) == 5
    assert all(line.startswith(str(path)) for line, path in zip(lines, mixed, strict=True))
    assert "failed: " in lines[0]


def test_what_is_not_there_is_an_error(work: Work, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not there"):
        ask(work, tmp_path / "none.png")
    with pytest.raises(DataError, match="image"):
        ask(work, tmp_path)
    with pytest.raises(ModelError, match="is a feature store, not a model"):
        predict(work.store, [work.photos])


CODE = """
from pathlib import Path
Path("ran").touch()
from channel_mean import channel_mean
"""


def with_request(model: Path, path: Path, **changes: Any) -> Path:
    """A copy of a model whose request for its backbone is changed."""
    loaded = Model.load(model)
    request = {**loaded.request, **changes}
    replace(loaded, provenance={**loaded.provenance, "request": request}).save(path)
    return path


@pytest.mark.parametrize("allowed", [None, "channel_mean:other", "resnet18"])
def test_the_code_a_model_names_is_not_run_unless_the_user_names_it(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("planted.py").write_text(CODE)
    planted = with_request(work.model, Path("p.model"), backbone="planted:channel_mean")
    # A spec that names a harmless backbone: what is loaded is what counts.
    loaded = Model.load(planted)
    replace(loaded, spec=replace(loaded.spec, backbone="resnet18")).save("q.model")
    for model in (work.model, planted, "q.model"):
        with pytest.raises(ModelError, match=r"repeat it as --backbone \w+:channel_mean to allow it"):
            predict(model, [work.images[0]], backbone=allowed)
    assert "planted" not in sys.modules
    assert not Path("ran").exists()


def test_the_code_of_a_backbone_that_changed_is_another_backbone(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("imitation.py").write_text((Path(__file__).parent / "channel_mean.py").read_text() + "\n# changed\n")
    name = "imitation:channel_mean"
    model = with_request(work.model, Path("m.model"), backbone=name)
    with pytest.raises(BackboneError, match="was fitted on features of .* with weights .* the weights here"):
        predict(model, [work.images[0]], backbone=name)


@pytest.fixture(scope="module")
def resnet(work: Work, tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A model on features of a small network with weights from a file, and a file of other tensors."""
    folder = tmp_path_factory.mktemp("resnet")
    for seed in (0, 1):
        network = load_backbone(SMALL, weights="random", seed=seed).module
        save_file(
            {k: v.contiguous() for k, v in network.state_dict().items()}, folder / f"{seed}.safetensors"
        )
    few = folder / "photos"
    for i, image in enumerate(work.images[::5]):
        target = few / f"c{i % 2}" / image.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(image.read_bytes())
    made = Work(photos=few, store=folder / "s.h5", model=folder / "s.model")
    embed(few, made.store, backbone=SMALL, weights=str(folder / "0.safetensors"))
    fit(made.store, made.model, head="ncm", curve=False)
    return made


def test_the_weights_file_of_the_store_is_found_again(resnet: Work) -> None:
    features, model = FeatureStore.open(resnet.store).features(), Model.load(resnet.model)
    (answer,) = predict(resnet.model, [resnet.images[2]]).predictions
    row = features.ids.index(str(resnet.images[2].relative_to(resnet.photos)))
    assert same(answer.probability, model.predict_proba(features.X[row : row + 1]).max())


def test_other_weights_are_refused_with_what_to_do(resnet: Work) -> None:
    with pytest.raises(
        BackboneError, match=r"was fitted on features of shufflenet.*--weights FILE, or embed"
    ):
        predict(resnet.model, resnet.images, weights=str(resnet.photos.parent / "1.safetensors"))


def test_a_weights_file_that_moved_is_named_by_the_user(resnet: Work, tmp_path: Path) -> None:
    expected = predict(resnet.model, resnet.images).predictions
    old = resnet.photos.parent / "0.safetensors"
    moved = tmp_path / "moved.safetensors"
    # Not the same bytes: the same tensors in a file with other metadata.
    save_file(load_file(old), moved, {"note": "saved again"})
    assert moved.read_bytes() != old.read_bytes()
    hidden = old.rename(tmp_path / "hidden")
    try:
        with pytest.raises(BackboneError, match=r"weights file .*0\.safetensors, which is not there"):
            predict(resnet.model, resnet.images)
        assert predict(resnet.model, resnet.images, weights=str(moved)).predictions == expected
    finally:
        hidden.rename(old)


def test_random_weights_are_drawn_again_by_their_seed(resnet: Work, tmp_path: Path) -> None:
    model = with_request(resnet.model, tmp_path / "m.model", weights="random", seed=0)
    loaded = Model.load(model)
    weights = {**loaded.weights, "source": "random", "path": None}
    replace(loaded, provenance={**loaded.provenance, "weights": weights}).save(model)
    assert predict(model, resnet.images).predictions == predict(resnet.model, resnet.images).predictions
    with pytest.raises(BackboneError, match="weights here"):
        predict(with_request(model, tmp_path / "n.model", seed=1), resnet.images)


def test_links_out_of_a_folder_are_followed_only_on_request(work: Work, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    paint(tmp_path / "in" / "a.png", channel=0, seed=1)
    os.symlink(work.images[0], tmp_path / "in" / "b.png")
    assert len(ask(work, tmp_path / "in").predictions) == 1
    assert len(ask(work, tmp_path / "in", follow_links=True).predictions) == 2


def test_float16_stores_are_predicted_through_float16(work: Work, tmp_path: Path) -> None:
    # The same batches, so that it is the same float32 that is rounded.
    alike: dict[str, Any] = {"backbone": TOY, "device": "cpu", "batch_size": 8}
    embed(work.photos, tmp_path / "s.h5", store_dtype="float16", **alike)
    fit(tmp_path / "s.h5", tmp_path / "s.model", head="ncm", params={"temperature": 2.0})
    features, model = FeatureStore.open(tmp_path / "s.h5").features(), Model.load(tmp_path / "s.model")
    expected = model.predict_proba(features.X).max(axis=1)
    answers = predict(tmp_path / "s.model", [work.photos], **alike).predictions
    np.testing.assert_allclose([p.probability for p in answers], expected, atol=1e-9)


def ask_one_by_one(work: Work, *images: Path, **options: Any) -> PredictionStream:
    return iter_predictions(work.model, images or [work.photos], **{"backbone": TOY, **options})


def test_one_by_one_they_are_the_same_in_the_same_order(work: Work, mixed: list[Path]) -> None:
    together = ask(work, *mixed, work.photos, batch_size=4)
    stream = ask_one_by_one(work, *mixed, work.photos, batch_size=4)
    assert tuple(stream) == together.predictions
    assert stream.failed == together.failed == 3


def test_the_first_answer_is_there_before_the_last_image_is_read(work: Work, tmp_path: Path) -> None:
    images = [paint(tmp_path / f"{i:02d}.png", channel=0, seed=i) for i in range(60)]
    stream = ask_one_by_one(work, *images, batch_size=1, workers=1)
    first = next(stream)
    # Nothing but what is in work already can have been read: the last image still changes its answer.
    images[-1].write_bytes(b"no picture any more")
    assert (first.path, first.label) == (str(images[0]), "red")
    rest = list(stream)
    assert [answer.error is None for answer in rest] == [True] * 58 + [False]


def test_every_format_hands_on_each_answer_as_it_comes(work: Work) -> None:
    answers = ask(work, *work.images[:3]).predictions
    for written in (text_lines, csv_lines, json_lines, json_list):
        taken = 0

        def one_by_one() -> Any:
            nonlocal taken
            for answer in answers:
                taken += 1
                yield answer

        pieces = written(one_by_one())
        header = next(pieces) if written is csv_lines else ""
        assert taken == (0 if header else taken)
        for n in range(1, 4):
            piece = next(pieces)
            assert taken == n
            assert answers[n - 1].path in piece


def test_the_formats_say_the_same(work: Work, mixed: list[Path]) -> None:
    result = ask(work, *mixed)
    assert json.loads("".join(json_list(result.predictions))) == result.to_json()
    assert json.loads("".join(json_list(()))) == []
    lines = "".join(json_lines(result.predictions)).splitlines()
    assert [json.loads(line) for line in lines] == result.to_json()


def test_a_long_name_does_not_push_the_others(work: Work, tmp_path: Path) -> None:
    names = [tmp_path / "a.png", tmp_path / ("long" * 40 + ".png")]
    for path in names:
        paint(path, channel=0, seed=1)
    short, long = ask(work, *names).describe().splitlines()
    assert short.startswith(f"{names[0]!s:40}  red ")
    assert long.startswith(f"{names[1]}  red ")


def test_names_of_files_and_classes_are_on_one_line_that_no_terminal_obeys(
    work: Work, tmp_path: Path
) -> None:
    model = Model.load(work.model)
    replace(model, classes=("two\nlines", "\x1b[31m", "plain")).save(tmp_path / "new\nline.model")
    image = paint(tmp_path / "a\nb.png", channel=2, seed=1)  # of the first class
    result = predict(tmp_path / "new\nline.model", [image], backbone=TOY)
    (line,) = result.describe().splitlines()
    assert line.isprintable()
    assert all(name in line for name in (r"two\nlines", r"\x1b[31m", r"a\nb.png"))
    (row,) = csv.DictReader(io.StringIO(result.to_csv()))
    assert row["label"] == "two\nlines"
    with pytest.raises(ModelError, match=r"new\\nline\.model needs the code of its own backbone"):
        predict(tmp_path / "new\nline.model", [image])


def test_short_names_stand_in_a_column(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "longer.png"):
        paint(Path(name), channel=0, seed=1)
    result = CliRunner().invoke(
        main, ["predict", str(work.model), "a.png", "longer.png", "--backbone", TOY, "-q"]
    )
    assert [line.partition("  red")[0] for line in result.stdout.splitlines()] == ["a.png     ", "longer.png"]


@pytest.mark.parametrize("views", [1, 2, 5])
def test_views_are_averaged(work: Work, views: int) -> None:
    model = Model.load(work.model)
    pre = model.spec.preprocessing
    pictures = [Picture(preprocessing=pre, view=view, seed=7) for view in range(views)]
    for answer, image in zip(
        ask(work, *work.images[:4], views=views, seed=7).predictions, work.images, strict=False
    ):
        loaded = load_pictures(image, pictures, decoder=recorded_decoder(model.provenance))
        assert not isinstance(loaded, ImageFailure)
        # The toy's feature by hand: the mean of each channel of (x / 255 - 0.5) / 0.5.
        means = np.array([(pixels / 255 - 0.5).mean((0, 1)) / 0.5 for pixels in loaded.pixels])
        expected = model.predict_proba(means.astype(np.float32)).mean(axis=0)
        assert answer.label == model.classes[int(expected.argmax())]
        for label, p in answer.topk:
            assert same(p, expected[model.classes.index(label)])
    with pytest.raises(ValueError, match="views"):
        ask(work, views=0)


def test_an_unsure_answer_has_no_label_and_keeps_the_candidates(work: Work) -> None:
    plain = ask(work).predictions
    threshold = sorted(answer.probability or 0.0 for answer in plain)[15]
    careful = ask(work, abstain_below=threshold)
    assert [answer.label == "" for answer in careful.predictions].count(True) == 15
    for answer, before in zip(careful.predictions, plain, strict=True):
        assert (answer.topk, answer.probability) == (before.topk, before.probability)
        sure = (before.probability or 0.0) >= threshold
        assert answer.label == (before.label if sure else "")
        said = answer.describe()
        assert said.startswith(f"{before.label} " if sure else f"(unsure)  ({before.label} ")
    rows = list(csv.DictReader(io.StringIO(careful.to_csv())))
    assert [row["label"] for row in rows] == [answer.label for answer in careful.predictions]
    assert [row["guess"] for row in rows] == [answer.label for answer in plain]
    assert careful.failed == 0
    with pytest.raises(ValueError, match="abstain_below"):
        ask(work, abstain_below=1.5)


def test_features_that_are_not_finite_are_a_failure(work: Work) -> None:
    model = Model.load(work.model)
    half = replace(model, spec=replace(model.spec, store_dtype="float16"))
    rows = np.array([[0.1, 0.2, 0.3], [1e6, 0.0, 0.0], [np.nan, 0.0, 0.0]], dtype=np.float32)
    fine = EmbeddedImage(sha256=bytes(32), stat=NO_FILE)
    batch = EmbeddedBatch(outcomes=[fine] * 3, features={model.nodes[0].key: rows})
    for asked, good in ((model, [True, True, False]), (half, [True, False, False])):
        answered = answer_batch(asked, batch)
        assert np.isfinite(answered.probabilities).all(axis=1).tolist() == good
        bad = answered.outcomes[2]
        assert isinstance(bad, ImageFailure)
        assert (bad.status, bad.reason) == (
            RowStatus.NON_FINITE,
            f"its features are not finite in {asked.spec.store_dtype}",
        )


@pytest.mark.parametrize("engine", ["torch-eager", "onnx", "auto"])
def test_every_engine_gives_the_same_answers(work: Work, engine: str) -> None:
    if engine == "onnx":
        pytest.importorskip("onnxruntime")
    for one, other in zip(
        ask(work, engine=engine, device="cpu").predictions, ask(work).predictions, strict=True
    ):
        assert (one.label, one.path) == (other.label, other.path)
        assert same(one.probability, other.probability)


def test_an_engine_that_there_is_not_is_one_line(work: Work) -> None:
    with pytest.raises(DeviceError, match="there is no engine 'fast'"):
        ask(work, work.images[0], engine="fast")


def test_the_shell_prints_a_line_an_image_in_every_format(work: Work, mixed: list[Path]) -> None:
    asked = ["predict", str(work.model), *map(str, mixed), "--backbone", TOY, "-q"]
    expected = ask(work, *mixed)
    for flags, said in (
        ([], expected.describe() + "\n"),
        (["--csv", "-"], expected.to_csv()),
        (["--json"], json.dumps(expected.to_json()) + "\n"),
        (["--jsonl"], "".join(json_lines(expected.predictions))),
    ):
        result = CliRunner().invoke(main, [*asked, *flags])
        assert (result.exit_code, result.stdout) == (3, said)
    for two in (["--json", "--jsonl"], ["--csv", "-", "--jsonl"], ["--csv", "-", "--json"]):
        assert CliRunner().invoke(main, [*asked, *two]).exit_code == 2


def test_the_answers_are_written_to_a_file_as_well(work: Work, mixed: list[Path], tmp_path: Path) -> None:
    asked = ["predict", str(work.model), *map(str, mixed), "--backbone", TOY, "-q"]
    expected, table = ask(work, *mixed), tmp_path / "answers.csv"
    as_json = json.dumps(expected.to_json()) + "\n"
    for flags, said in (([], expected.describe() + "\n"), (["--json"], as_json)):  # the table is replaced
        result = CliRunner().invoke(main, [*asked, *flags, "--csv", str(table)])
        assert (result.exit_code, result.stdout) == (3, said)
        assert table.read_text() == expected.to_csv()
    assert [path.name for path in tmp_path.glob("*.csv")] == ["answers.csv"]


def test_a_file_that_is_no_table_of_answers_is_kept(work: Work, tmp_path: Path) -> None:
    own = tmp_path / "labels.csv"
    own.write_text("path,label\na.png,red\n")
    photo = shutil.copy(work.images[0], tmp_path / "a.png")
    for taken in (own, photo, shutil.copy(work.model, tmp_path / "m.model")):
        before = Path(taken).read_bytes()
        result = CliRunner().invoke(main, ["predict", str(work.model), str(photo), "--csv", str(taken)])
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.endswith("would be replaced. Choose another --csv.\n")
        assert Path(taken).read_bytes() == before


def test_an_answer_file_that_is_not_complete_has_no_name(work: Work, tmp_path: Path) -> None:
    predictions = written_to_csv(iter(ask(work, *work.images).predictions), tmp_path / "answers.csv")
    next(predictions)
    predictions.close()
    assert not list(tmp_path.glob("*answers*"))
    with pytest.raises(DiskError, match="No such file"):
        list(written_to_csv(iter(()), tmp_path / "nowhere" / "answers.csv"))


def test_an_interrupted_run_leaves_whole_lines(work: Work) -> None:
    # More than a pipe holds, so that the run cannot end before it is interrupted.
    command = [sys.executable, "-m", "featcache", "predict", str(work.model), *map(str, work.images * 50)]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    running = subprocess.Popen(
        [*command, "--backbone", TOY, "-q", "--jsonl"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # or `communicate` would miss what `readline` has read ahead
        env={**os.environ, "PYTHONPATH": path},
    )
    assert running.stdout is not None
    lines = [running.stdout.readline()]
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    rest, said = running.communicate(timeout=60)
    lines += rest.splitlines(keepends=True)
    assert (running.returncode, said) == (130, b"Interrupted.\n")
    assert 1 < len(lines) < 1500
    answers = [json.loads(line) for line in lines]
    assert all(line.endswith(b"\n") for line in lines)
    assert [answer["path"] for answer in answers] == [str(path) for path in (work.images * 50)[: len(lines)]]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_one_line(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115 (closing it fails, too)
    asked = ["predict", str(work.model), str(work.photos), "--backbone", TOY, "-q"]
    with redirect_stdout(full), pytest.raises(SystemExit) as ended:
        main(asked)
    with suppress(OSError):
        full.close()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written beyond line 0: No space left on device" in line
