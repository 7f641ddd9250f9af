"""`export`: a file answers as featcache does, by the tools of those who read it, or is not there."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow.parquet as parquet
import pytest
import torch
from click.testing import CliRunner
from conftest import make_toy_store, toy_spec
from gaussians import gaussian_features, write_store
from safetensors import safe_open
from safetensors.numpy import load_file
from test_predict import TOY, paint
from torch import nn
from torchvision import models
from torchvision.models import ResNet18_Weights

import featcache.exporting
from featcache.backbones import Backbone, load_backbone, make_backbone
from featcache.backbones.nodes import make_extractor
from featcache.backbones.tuned import network_tensors, tuned_identity
from featcache.cli import main
from featcache.commands.embed import embed
from featcache.commands.export import export
from featcache.commands.fit import fit
from featcache.commands.predict import predict
from featcache.engines import make_engine
from featcache.errors import DataError, DiskError, ExportError, IncompleteStore, ModelError
from featcache.exporting import FORMATS, Opened, find_format
from featcache.exporting.agreement import apart_from_predict, check, compare
from featcache.exporting.modules import SoftmaxHead
from featcache.exporting.pictures import Pictures, gather_pictures
from featcache.exporting.subject import Subject
from featcache.model import Model
from featcache.spec import FeatureSpec
from featcache.store.reader import FeatureStore

COLOURS = ("red", "green", "blue")


def photos_in(folder: Path, count: int) -> Path:
    for i in range(count):
        paint(folder / "photos" / COLOURS[i % 3] / f"{i:02d}.png", channel=i % 3, seed=i)
    return folder / "photos"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/, s.h5 of the toy backbone and m.model, of nearest means."""
    folder = tmp_path_factory.mktemp("toy")
    embed(photos_in(folder, 30), folder / "s.h5", backbone=TOY)
    fit(folder / "s.h5", folder / "m.model", head="ncm")
    return folder


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a ResNet-18 with random weights."""
    folder = tmp_path_factory.mktemp("resnet")
    photos = photos_in(folder, 9)
    embed(photos, folder / "s.h5", backbone="resnet18", weights="random", decoder="exact")
    fit(folder / "s.h5", folder / "m.model", head="ncm")
    return folder


def ask(model: Path, image: Path, **options: Any) -> dict[str, float]:
    """What `featcache predict` says."""
    (answer,) = predict(model, [image], **options).predictions
    return dict(answer.topk)


def follow(card: str, folder: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """{class: probability}, by the Python of a card and nothing else."""
    (folder / "image.jpg").write_bytes(image.read_bytes())
    monkeypatch.chdir(folder)
    code = re.search(r"```python\n(.*?)```", Path(card).read_text(), re.DOTALL)
    assert code
    found: dict[str, Any] = {}
    exec(code[1], found)  # what a card says is documentation, and is tested as such
    shown = np.asarray(found["probabilities"]).reshape(-1).tolist()
    assert found["label"] == found["classes"][int(np.argmax(shown))]
    assert found["probability"] == pytest.approx(max(shown))
    return dict(zip(found["classes"], shown, strict=True))


HEADS = ("logistic", "ridge", "lda", "knn", "ncm", "linear", "mlp")
GRAPHS = [(to, head) for to in ("onnx", "torch") for head in HEADS]
ESTIMATORS = ("RandomForestClassifier", "GaussianNB")
QUICK = {
    "linear": {"epochs": 3},
    "mlp": {"epochs": 3},
    "sklearn:RandomForestClassifier": {"n_estimators": 10},
}


@pytest.mark.parametrize(
    ("to", "head"), [*GRAPHS, *(("onnx", f"sklearn:{estimator}") for estimator in ESTIMATORS)]
)
def test_a_graph_answers_as_predict_does_by_the_code_of_its_card(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, head: str
) -> None:
    fit(toy / "s.h5", tmp_path / "h.model", head=head, params=QUICK.get(head, {}))
    result = export(tmp_path / "h.model", to=to, backbone=TOY)
    assert result.agreement is not None
    assert result.agreement.on == "30 of the 30 images it was made from"
    new = paint(tmp_path / "new.png", channel=1, seed=77)
    expected = ask(tmp_path / "h.model", new, backbone=TOY)
    answer = follow(str(result.card), tmp_path, new, monkeypatch)
    assert answer == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("to", ["torchvision", "onnx", "torch", "safetensors"])
def test_a_network_of_torchvision_answers_as_predict_does(
    resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    path = tmp_path / f"new name{FORMATS[to].suffixes[0]}"
    result = export(resnet / "m.model", path, to=to, images=[resnet / "photos" / "red"])
    assert result.agreement is not None
    assert (result.agreement.on, result.agreement.same) == ("3 of the 3 images given", 3)
    new = paint(tmp_path / "new.png", channel=2, seed=78)
    answer = follow(str(result.card), tmp_path, new, monkeypatch)
    assert answer == pytest.approx(ask(resnet / "m.model", new), abs=1e-4)


def test_the_state_dict_is_the_textbook_network_with_the_head_as_its_last_layer(
    resnet: Path, tmp_path: Path
) -> None:
    export(resnet / "m.model", tmp_path / "m.safetensors", to="torchvision")
    tensors = load_file(tmp_path / "m.safetensors")
    model = Model.load(resnet / "m.model")
    original = load_backbone("resnet18", weights="random").module.state_dict()
    assert set(tensors) == {*original, "fc.weight", "fc.bias"}
    assert all(np.array_equal(tensors[name], tensor.numpy()) for name, tensor in original.items())
    network = models.resnet18(weights=None)
    network.fc = nn.Linear(512, 3)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    pixels = ResNet18_Weights.DEFAULT.transforms()(torch.full((3, 256, 256), 90, dtype=torch.uint8))[None]
    with torch.inference_mode():
        features = load_backbone("resnet18", weights="random").module(pixels).numpy()
        found = network.eval()(pixels).softmax(1).numpy()
    np.testing.assert_allclose(found, model.predict_proba(features), atol=1e-5)


def test_a_fine_tuned_network_is_exported_with_its_own_weights(resnet: Path, tmp_path: Path) -> None:
    backbone, model = load_backbone("resnet18", weights="random"), Model.load(resnet / "m.model")
    with torch.no_grad():
        backbone.module.get_parameter("layer1.0.conv1.weight").mul_(1.5)
    spec = replace(model.spec, weights_sha256=tuned_identity(backbone, label="tuned").sha256)
    replace(model, spec=spec, network=network_tensors(backbone.module)).save(tmp_path / "m.model")
    result = export(tmp_path / "m.model", to="torchvision", images=[resnet / "photos" / "red"])
    tensors = load_file(result.path)
    expected = backbone.module.get_parameter("layer1.0.conv1.weight").numpy()
    np.testing.assert_array_equal(tensors["layer1.0.conv1.weight"], expected)
    assert "fine-tuned, starting from random" in Path(str(result.card)).read_text()


# One of each kind of last layer: by index, a convolution before the pooling, one that asks for its version.
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1", "mnasnet0_5"])
@pytest.mark.parametrize("to", ["torchvision", "safetensors"])
def test_every_kind_of_last_layer_is_replaced(
    name: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(name, weights="random")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    vectors = make_engine(backbone, device="cpu").embed(pixels)["penultimate"]
    nodes = make_extractor(backbone).nodes
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(3, vectors.shape[1])) / vectors.std() / np.sqrt(vectors.shape[1])
    model = Model(
        head_name="logistic",
        params={},
        arrays={"coef": weight, "intercept": -weight @ vectors.mean(0)},
        rest={},
        classes=COLOURS,
        spec=FeatureSpec(
            backbone=name,
            weights_sha256=backbone.weights.sha256,
            nodes=nodes,
            preprocessing=backbone.preprocessing,
        ),
        nodes=nodes,
        provenance={"weights": asdict(backbone.weights), "request": {"backbone": name, "weights": "random"}},
        metrics={},
        chosen={},
    )
    expected = model.predict_proba(vectors)
    assert np.ptp(expected, axis=0).max() > 0.01  # pictures it does tell apart
    subject, module = Subject(where="m.model", model=model, backbone=backbone), find_format(to).load()
    path = tmp_path / "m.safetensors"
    path.write_bytes(module.encode(subject))
    np.testing.assert_allclose(module.load(path, subject).answers(pixels), expected, atol=1e-5)
    (tmp_path / "card.md").write_text(f"```python\n{module.recipe(subject, path.name)}\n```")
    image = paint(tmp_path / "new.png", channel=1, seed=3)
    plain = gather_pictures(model, [image]).pixels
    answer = follow(str(tmp_path / "card.md"), tmp_path, image, monkeypatch)
    assert list(answer.values()) == pytest.approx(
        module.load(path, subject).answers(plain)[0].tolist(), abs=1e-5
    )


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_floats_from_0_to_1_are_taken_on_request(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    path = tmp_path / f"m{FORMATS[to].suffixes[0]}"
    result = export(toy / "m.model", path, to=to, pixels="float", backbone=TOY)
    new = paint(tmp_path / "new.png", channel=0, seed=79)
    answer = follow(str(result.card), tmp_path, new, monkeypatch)
    assert answer == pytest.approx(ask(toy / "m.model", new, backbone=TOY), abs=1e-4)


def test_a_graph_says_what_it_is_and_takes_any_number_of_images(toy: Path, tmp_path: Path) -> None:
    export(toy / "m.model", tmp_path / "m.onnx", to="onnx", backbone=TOY)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    model = Model.load(toy / "m.model")
    assert tuple(json.loads(about["classes"])) == model.classes
    assert json.loads(about["preprocessing"])["crop_size"] == 8
    assert about["fingerprint"] == model.fingerprint
    assert about["input"] == "pixels: uint8 (batch, height, width, 3), RGB"
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    (found,) = session.run(["probabilities"], {"pixels": pixels})
    # By hand: the feature is the mean of each channel, scaled to -1 to 1.
    features = (pixels.mean(axis=(1, 2)) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(found, model.predict_proba(features), atol=1e-5)
    (alone,) = session.run(["probabilities"], {"pixels": pixels[3:4]})
    np.testing.assert_allclose(alone[0], found[3], atol=1e-6)


def test_no_file_holds_a_pickle(toy: Path, tmp_path: Path) -> None:
    export(toy / "m.model", tmp_path / "m.pt2", to="torch", backbone=TOY)
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    assert any(name.endswith("description.json") for name in parts)
    # A pickle of protocol 2 or later begins with 0x80; torch's are zip files with one inside.
    assert not [name for name, data in parts.items() if data.startswith((b"\x80", b"PK"))]


def test_a_safetensors_file_describes_a_head_of_any_kind(toy: Path, tmp_path: Path) -> None:
    fit(toy / "s.h5", tmp_path / "h.model", head="knn", params={"k": 3})
    result = export(tmp_path / "h.model", to="safetensors", backbone=TOY)
    with safe_open(tmp_path / "h.safetensors", framework="np") as file:
        head = json.loads(file.metadata()["head"])
        assert set(file.keys()) == {"head.vectors", "head.labels"}
        np.testing.assert_array_equal(
            file.get_tensor("head.vectors"), Model.load(tmp_path / "h.model").arrays["vectors"]
        )
    assert (head["name"], head["params"]["k"]) == ("knn", 3)
    assert "safe_open" in Path(str(result.card)).read_text()


def test_several_nodes_are_in_the_graph(resnet: Path, tmp_path: Path) -> None:
    embed(
        resnet / "photos",
        tmp_path / "s.h5",
        backbone="resnet18",
        weights="random",
        nodes=("layer1", "layer2:max"),
    )
    features = FeatureStore.open(tmp_path / "s.h5").features(["layer1:avg", "layer2:max"])
    one = Model.load(resnet / "m.model")
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, features.X.shape[1])) / 10
    arrays = {"coef": weight, "intercept": -weight @ features.X.mean(0)}
    provenance = FeatureStore.open(tmp_path / "s.h5").provenance
    several = replace(one, arrays=arrays, spec=features.spec, nodes=features.nodes, provenance=provenance)
    several.save(tmp_path / "m.model")
    for to in ("onnx", "safetensors"):
        result = export(tmp_path / "m.model", to=to, images=[resnet / "photos" / "blue"])
        assert result.agreement is not None
        assert result.agreement.same == 3
    with pytest.raises(
        ExportError, match=r"is fitted on layer1:avg, layer2:max.*--to onnx, torch or safetens"
    ):
        export(tmp_path / "m.model", to="torchvision")


def test_what_a_float16_store_rounded_is_rounded_in_graphs_and_said_elsewhere(
    toy: Path, tmp_path: Path
) -> None:
    embed(toy / "photos", tmp_path / "s.h5", backbone=TOY, store_dtype="float16")
    fit(tmp_path / "s.h5", tmp_path / "m.model", head="ncm", params={"temperature": 1.0})
    # Weights so large that what rounding takes away is seen, and not so large that all is certain.
    X, weight = FeatureStore.open(tmp_path / "s.h5").features().X, 7 * np.eye(3)
    arrays = {"coef": weight, "intercept": -weight @ X.mean(0, dtype=np.float64)}
    replace(Model.load(tmp_path / "m.model"), arrays=arrays).save(tmp_path / "m.model")
    assert export(tmp_path / "m.model", to="onnx", backbone=TOY).notes == ()
    (note,) = export(tmp_path / "m.model", to="safetensors", backbone=TOY).notes
    assert note.startswith("featcache predict rounds features to float16 as the store was made")
    apart = re.search(r"differ by up to (\S+) and", note)
    assert apart
    assert float(apart[1]) > 1e-4
    assert note in (tmp_path / "m.safetensors.md").read_text()


def test_arithmetic_less_precise_than_the_file_is_said(toy: Path, tmp_path: Path) -> None:
    embed(toy / "photos", tmp_path / "s.h5", backbone=TOY, precision="bfloat16", device="cpu")
    fit(tmp_path / "s.h5", tmp_path / "m.model", head="ncm")
    (note,) = export(tmp_path / "m.model", to="onnx", backbone=TOY).notes
    assert note.startswith("featcache predict computes in bfloat16 as the store was made")


# Agreement


class Fixed(nn.Module):
    """A network whose features are the same for every image."""

    def __init__(self, vector: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("vector", torch.from_numpy(vector.astype(np.float32)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.vector + 0 * images.mean((2, 3))

    @classmethod
    def backbone(cls, vector: np.ndarray) -> Backbone:
        preprocessing = load_backbone(TOY).preprocessing
        return make_backbone(cls(vector), preprocessing=preprocessing)


def pictures_of(count: int) -> Pictures:
    return Pictures(pixels=np.zeros((count, 8, 8, 3), dtype=np.uint8), words=f"{count} pictures")


@pytest.mark.parametrize(
    ("found", "passed"),
    [
        ([[0.7, 0.3]], True),
        ([[0.70009, 0.29991]], True),
        ([[0.7002, 0.2998]], False),
        ([[0.3, 0.7]], False),
        ([[np.nan, np.nan]], False),
    ],
)
def test_probabilities_may_be_a_little_apart(found: list[list[float]], passed: bool) -> None:
    assert compare(np.array(found), np.array([[0.7, 0.3]]), on="one").passed is passed


def test_another_class_is_a_disagreement_however_near_but_a_tie_is_none() -> None:
    near = np.array([[0.50002, 0.49998]])
    assert not compare(near[:, ::-1], near, on="one").passed
    tied = np.array([[0.5, 0.5]])
    assert compare(tied + np.array([[-1e-9, 1e-9]]), tied, on="one").passed


def test_other_shapes_are_a_disagreement() -> None:
    with pytest.raises(ExportError, match=r"answers with \(1, 3\), where \(1, 2\)"):
        compare(np.ones((1, 3)), np.ones((1, 2)), on="one")


def test_a_file_that_answers_otherwise_is_refused(toy: Path) -> None:
    model = Model.load(toy / "m.model")
    subject = Subject(where="m.model", model=model, backbone=load_backbone(TOY))
    sizes = []

    def answers(pixels: np.ndarray) -> np.ndarray:
        sizes.append(len(pixels))
        return np.full((len(pixels), 3), 1 / 3)

    with pytest.raises(ExportError, match=r"is not m\.model: on 9 pictures .* where 0\.0001 and all of them"):
        check(subject, Opened(answers=answers), pictures_of(9), rounds=False)
    assert sizes == [1, 7, 1]  # a graph that holds for one size of batch alone would not pass


def test_a_head_that_makes_steps_is_compared_on_the_vectors_of_the_file(toy: Path, tmp_path: Path) -> None:
    fit(toy / "s.h5", tmp_path / "t.model", head="sklearn:DecisionTreeClassifier", params={"temperature": 1})
    model = Model.load(tmp_path / "t.model")
    scaler, tree = model.head.pipeline_  # type: ignore[attr-defined]
    feature, threshold = tree.tree_.feature[0], tree.tree_.threshold[0]
    edge = scaler.mean_[feature] + threshold * scaler.scale_[feature]
    # An image whose feature is just below the first threshold: a rounding error leads to another leaf.
    vectors = np.tile(scaler.mean_, (2, 1))
    vectors[:, feature] = edge + np.array([-1e-6, 1e-6]) * scaler.scale_[feature]
    own, other = model.predict_proba(vectors.astype(np.float32))
    assert own.argmax() != other.argmax()

    def check_of(answer: np.ndarray, off: float) -> str:
        here = Subject(where="t.model", model=model, backbone=Fixed.backbone(vectors[0]))
        opened = Opened(
            answers=lambda pixels: np.tile(answer, (len(pixels), 1)),
            vectors=lambda pixels: np.tile(vectors[1] + off, (len(pixels), 1)).astype(np.float32),
        )
        agreement = check(here, opened, pictures_of(2), rounds=False)
        return apart_from_predict(here, opened, pictures_of(2), rounds=False) or str(agreement.same)

    assert "but for rounding errors, of which this head makes steps" in check_of(other, 0.0)
    with pytest.raises(ExportError, match=r"the same class for 0 of 2"):
        check_of(own, 0.0)
    with pytest.raises(ExportError, match="its vectors differ by"):
        check_of(other, 0.01)


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_a_disagreement_leaves_what_was_there(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    path = tmp_path / f"m{FORMATS[to].suffixes[0]}"
    path.write_bytes(b"as it was")
    right = SoftmaxHead.forward
    monkeypatch.setattr(SoftmaxHead, "forward", lambda self, vectors: right(self, vectors).flip(1))
    with pytest.raises(ExportError, match="the same class for"):
        export(toy / "m.model", path, to=to, backbone=TOY)
    assert path.read_bytes() == b"as it was"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_without_its_images_a_model_is_checked_on_seeded_pictures(toy: Path, tmp_path: Path) -> None:
    model = Model.load(toy / "m.model")
    gone = {**model.provenance, "data": {"path": str(tmp_path / "none"), "root": None}}
    replace(model, provenance=gone).save(tmp_path / "m.model")
    result = export(tmp_path / "m.model", to="onnx", backbone=TOY)
    assert result.agreement is not None
    assert result.agreement.on == "32 pictures of seeded colours, as its images are not there"


def test_images_that_the_user_names_must_be_images(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match="none of the 1 images given can be read"):
        export(toy / "m.model", tmp_path / "m.onnx", to="onnx", backbone=TOY, images=[tmp_path / "text.png"])
    with pytest.raises(DataError, match="is not there"):
        export(toy / "m.model", tmp_path / "m.onnx", to="onnx", backbone=TOY, images=[tmp_path / "none"])


def test_of_many_images_a_hundred_are_looked_at(toy: Path, tmp_path: Path) -> None:
    image = next((toy / "photos" / "red").iterdir())
    many = [image] * 250
    gathered = gather_pictures(Model.load(toy / "m.model"), many)
    assert (len(gathered), gathered.words) == (100, "100 of the 250 images given")


# The card


def test_the_card_says_what_a_person_must_know(toy: Path, tmp_path: Path) -> None:
    result = export(toy / "m.model", tmp_path / "m.onnx", to="onnx", backbone=TOY)
    card = (tmp_path / "m.onnx.md").read_text()
    model = Model.load(toy / "m.model")
    low, high = model.metrics["accuracy_ci95"]
    for words in (
        "# m.onnx",
        "images: `photos`",
        "blue, green, red",
        f"fitted on {len(model.trained_on)} images",
        "weights: user, no weights",
        "licence of the weights: yours",
        f"| accuracy | {model.metrics['accuracy']:.4f} | {low:.4f} to {high:.4f} |",
        "resized to 8 px (bilinear, antialiased), 8 x 8 px",
        "mean [0.5, 0.5, 0.5]",
        "takes uint8 (batch, height, width, 3)",
        "## Limits",
    ):
        assert words in card
    assert result.agreement is not None
    assert result.agreement.describe() in card


# What is refused


def refused(source: Path, output: Path | None = None, **options: Any) -> str:
    with pytest.raises(ExportError) as raised:
        export(source, output, **{"backbone": TOY, **options})
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_formats_that_there_are_not(toy: Path, tmp_path: Path) -> None:
    assert "no format 'onxx'. Did you mean onnx?" in refused(toy / "m.model", to="onxx")
    assert "ends with .onnx" in refused(toy / "m.model", tmp_path / "m.pt2", to="onnx")
    assert "ends with .npz or .parquet" in refused(toy / "s.h5", tmp_path / "x.csv", to="features")
    assert "leave --input away" in refused(toy / "m.model", to="torchvision", pixels="float")


def test_a_file_does_not_replace_what_it_is_made_from(toy: Path, tmp_path: Path) -> None:
    source = tmp_path / "m.safetensors"
    source.write_bytes((toy / "m.model").read_bytes())
    assert "is what is to be exported" in refused(source, to="safetensors")
    Model.load(source)


def test_heads_that_a_format_cannot_hold(resnet: Path, toy: Path, tmp_path: Path) -> None:
    fit(resnet / "s.h5", tmp_path / "knn.model", head="knn")
    assert "has a knn head, which a state dict cannot hold" in refused(
        tmp_path / "knn.model", to="torchvision"
    )
    fit(toy / "s.h5", tmp_path / "nb.model", head="sklearn:GaussianNB")
    assert "export it --to onnx" in refused(tmp_path / "nb.model", to="torch")
    assert "is not made of tensors" in refused(tmp_path / "nb.model", to="safetensors")
    fit(toy / "s.h5", tmp_path / "svc.model", head="sklearn:LinearSVC")
    assert "gives no probabilities" in refused(tmp_path / "svc.model", to="onnx")


def test_a_network_of_the_users_own_is_no_state_dict_of_torchvision(toy: Path) -> None:
    assert "no network of torchvision or timm" in refused(toy / "m.model", to="torchvision")


def test_code_that_a_model_names_is_not_run_unless_the_user_names_it(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"repeat it as --backbone {TOY} to allow it"):
        export(toy / "m.model", tmp_path / "m.onnx", to="onnx")
    assert not list(tmp_path.iterdir())


def test_models_and_stores_are_told_apart(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a feature store, not a model"):
        export(toy / "s.h5", tmp_path / "m.onnx", to="onnx")
    assert "is a model, and features are those of a store" in refused(
        toy / "m.model", tmp_path / "m.npz", to="features"
    )
    cut = tmp_path / "cut.model"
    cut.write_bytes((toy / "m.model").read_bytes()[:-10])
    with pytest.raises(ModelError, match="damaged or cut short"):
        export(cut, to="onnx")


def test_a_library_that_is_not_there_is_named(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(featcache.exporting, "find_spec", lambda name: None)
    assert "need onnx and onnxruntime, not installed here: pip install 'featcache[export]'" in refused(
        toy / "m.model", to="onnx"
    )
    assert "need pyarrow" in refused(toy / "s.h5", tmp_path / "x.parquet", to="features")
    export(toy / "s.h5", tmp_path / "x.npz", to="features")


def test_a_folder_that_is_not_there_is_one_line(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="make the folder"):
        export(toy / "m.model", tmp_path / "none" / "m.onnx", to="onnx", backbone=TOY)


# Features


def npz_columns(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as found:
        return dict(found)


def parquet_columns(path: Path) -> dict[str, Any]:
    """The columns of a Parquet file as those of a .npz are."""
    table = parquet.read_table(path)
    classes = json.loads(table.schema.metadata[b"classes"])
    assert [classes[code] if code >= 0 else None for code in table["y"].to_pylist()] == table[
        "label"
    ].to_pylist()
    small = {
        "y": np.array(table["y"]),
        "ids": np.array(table["id"].to_pylist()),
        "classes": np.array(classes),
        "splits": np.array([split or "" for split in table["split"].to_pylist()]),
        "sha256": np.array([list(digest) for digest in table["sha256"].to_pylist()], dtype=np.uint8),
        "spec": np.array(table.schema.metadata[b"spec"].decode()),
    }
    vectors = {
        name: np.array(table[name].to_pylist(), dtype=np.float32)
        for name in table.column_names
        if ":" in name
    }
    return {**small, **vectors}


READERS: Sequence[tuple[str, Callable[[Path], dict[str, Any]]]] = (
    (".npz", npz_columns),
    (".parquet", parquet_columns),
)


@pytest.mark.parametrize(("suffix", "read"), READERS)
def test_features_are_those_of_the_store(
    tmp_path: Path, suffix: str, read: Callable[[Path], dict[str, Any]]
) -> None:
    features = gaussian_features({"train": 30, "test": 12, "": 3})
    features.y[4] = 1
    result = export(write_store(tmp_path / "s.h5", features), tmp_path / f"x{suffix}", to="features")
    assert result.rows == 45
    found = read(tmp_path / f"x{suffix}")
    assert set(found) == {"X:penultimate", "y", "ids", "classes", "splits", "sha256", "spec"}
    np.testing.assert_array_equal(found["X:penultimate"], features.X)
    np.testing.assert_array_equal(found["y"], features.y)
    np.testing.assert_array_equal(found["sha256"], features.sha256)
    assert found["ids"].tolist() == list(features.ids)
    assert found["classes"].tolist() == list(features.classes)
    assert found["splits"].tolist() == features.splits.tolist()
    assert FeatureSpec.from_json(str(found["spec"])) == features.spec


@pytest.mark.parametrize(("suffix", "read"), READERS)
def test_rows_that_failed_are_left_out_and_views_are_columns(
    toy: Path,
    tmp_path: Path,
    suffix: str,
    read: Callable[[Path], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("featcache.exporting.features._BLOCK_VALUES", 30)  # blocks of 5 rows
    photos = photos_in(tmp_path, 14)
    (photos / "red" / "03.png").write_bytes(b"no picture")
    embed(photos, tmp_path / "s.h5", backbone=TOY, views=2, max_failures=1.0)
    assert export(tmp_path / "s.h5", tmp_path / f"x{suffix}", to="features").rows == 13
    found = read(tmp_path / f"x{suffix}")
    store = FeatureStore.open(tmp_path / "s.h5")
    for view, column in enumerate(("X:penultimate", "X:penultimate@1")):
        expected = store.features(view=view)
        assert found["ids"].tolist() == list(expected.ids)
        np.testing.assert_array_equal(found[column], expected.X)


@pytest.mark.parametrize(("suffix", "name"), [(".npz", "_differing_npz"), (".parquet", "_differing_parquet")])
def test_features_that_are_read_back_otherwise_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, name: str
) -> None:
    store = write_store(tmp_path / "s.h5", gaussian_features())
    path = tmp_path / f"x{suffix}"
    true, calls = featcache.exporting.features.Table.vectors, []

    def once_otherwise(self: Any, column: str, rows: slice = slice(None)) -> Any:
        calls.append(column)
        return true(self, column, rows) + (len(calls) == 1)

    monkeypatch.setattr("featcache.exporting.features.Table.vectors", once_otherwise)
    with pytest.raises(ExportError, match="X:penultimate read from it are not the store's"):
        export(store, path, to="features")
    assert [file.name for file in tmp_path.iterdir()] == ["s.h5"]


def test_a_store_in_progress_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompleteStore, match="rows are pending"):
        export(make_toy_store(tmp_path / "s.h5", n=10, fill=False, spec=toy_spec()), to="features")


# The command line


def test_the_verb_prints_the_agreement_and_json_has_it(toy: Path, tmp_path: Path) -> None:
    arguments = [
        "export",
        str(toy / "m.model"),
        "--to",
        "onnx",
        "-o",
        str(tmp_path / "m.onnx"),
        "--backbone",
        TOY,
    ]
    said = CliRunner().invoke(main, [*arguments, "-q"])
    assert said.exit_code == 0, said.output
    assert "the same class for 30 of 30" in said.stdout
    answer = json.loads(CliRunner().invoke(main, [*arguments, "-q", "--json"]).stdout)
    assert answer["agreement"]["same_class"] == 30
    assert answer["agreement"]["largest_difference"] < 1e-5
    assert (answer["card"], answer["rows"]) == (str(tmp_path / "m.onnx.md"), None)
    failed = CliRunner().invoke(
        main, ["export", str(toy / "m.model"), "--to", "torchvision", "--backbone", TOY]
    )
    assert (failed.exit_code, failed.stdout) == (1, "")
