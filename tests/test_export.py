"""`export`: a file answers as featcache does, by the tools of those who read it, or is not there."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import resource
import shutil
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save
from test_predict import TOY, paint
from torch import nn
from torch.torch_version import TorchVersion
from torchvision import models
from torchvision.models import ResNet18_Weights

import featcache.exporting
from featcache import disk
from featcache.backbones import (
    Backbone,
    WeightsIdentity,
    load_backbone,
    make_backbone,
    torchvision,
    torchvision_rows,
)
from featcache.backbones.backbone import without_module
from featcache.backbones.nodes import make_extractor
from featcache.backbones.tuned import network_tensors, tuned_identity
from featcache.cli import main
from featcache.commands.embed import embed
from featcache.commands.export import export
from featcache.commands.fit import fit
from featcache.commands.predict import predict
from featcache.engines import make_engine
from featcache.engines.replicas import threads_of_torch_kept
from featcache.errors import (
    DataError,
    DiskError,
    ExportError,
    ModelError,
    StoreError,
)
from featcache.exporting import FORMATS, Opened, find_format
from featcache.exporting.agreement import Proof, apart_from_predict, check, compare
from featcache.exporting.architecture import attribute, find_architecture, last_layers
from featcache.exporting.card import SIGN, Written, write_card
from featcache.exporting.modules import SoftmaxHead
from featcache.exporting.pictures import Pictures, gather_pictures
from featcache.exporting.subject import Subject
from featcache.model import Model
from featcache.spec import FeatureSpec, Preprocessing
from featcache.store.reader import FeatureStore

COLOURS = ("red", "green", "blue")
SMALL = "squeezenet1_1"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from a second, and where others work beside, they wait for it."""
    with threads_of_torch_kept():
        torch.set_num_threads(1)
        yield


def photos_in(folder: Path, count: int) -> Path:
    for i in range(count):
        paint(folder / "photos" / COLOURS[i % 3] / f"{i:02d}.png", channel=i % 3, seed=i)
    return folder / "photos"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/, s.h5 of the toy backbone and m.model, of nearest means."""
    folder = tmp_path_factory.mktemp("toy")
    embed(photos_in(folder, 30), folder / "s.h5", backbone=TOY, decoder="exact")
    fit(folder / "s.h5", folder / "m.model", head="ncm", curve=False)
    return folder


def make_small(folder: Path) -> Path:
    """The folder with photos/, s.h5 of a small network of torchvision's with random weights, and m.model."""
    embed(photos_in(folder, 9), folder / "s.h5", backbone=SMALL, weights="random", decoder="exact")
    fit(folder / "s.h5", folder / "m.model", head="ncm", curve=False)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def fitted(toy: Path) -> Callable[[str], Path]:
    """A model file of this head on the store of `toy`, fitted once."""

    @cache
    def fit_once(head: str) -> Path:
        path = toy / f"{head.removeprefix('sklearn:')}.model"
        fit(toy / "s.h5", path, head=head, params=QUICK.get(head, {}), curve=False)
        return path

    return fit_once


def linear_model(backbone: Backbone, vectors: np.ndarray) -> Model:
    """Three classes on the penultimate features of a network with random weights, told apart at random."""
    nodes = make_extractor(backbone).nodes
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(3, vectors.shape[1])) / vectors.std() / np.sqrt(vectors.shape[1])
    return Model(
        head_name="logistic",
        params={},
        arrays={"coef": weight, "intercept": -weight @ vectors.mean(0)},
        rest={},
        classes=COLOURS,
        spec=FeatureSpec(
            backbone=backbone.name,
            weights_sha256=backbone.weights.sha256,
            nodes=nodes,
            preprocessing=backbone.preprocessing,
        ),
        nodes=nodes,
        provenance={
            "weights": asdict(backbone.weights),
            "request": {"backbone": backbone.name, "weights": "random"},
        },
        metrics={},
        chosen={},
    )


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
# Written from torch 2.9 on.
NOT_BEFORE_2_9 = pytest.mark.skipif(
    TorchVersion(torch.__version__) < (2, 9), reason="its programs hold pickles"
)
PROGRAM = pytest.param("torch", marks=NOT_BEFORE_2_9)
GRAPHS = [
    *(("onnx", head) for head in HEADS),
    *(pytest.param("torch", head, marks=NOT_BEFORE_2_9) for head in HEADS),
]
ESTIMATORS = (
    "RandomForestClassifier",
    "ExtraTreesClassifier",
    "GradientBoostingClassifier",
    "DecisionTreeClassifier",
    "GaussianNB",
)
QUICK: Mapping[str, Mapping[str, Any]] = {
    "linear": {"epochs": 3},
    "mlp": {"epochs": 3},
    "sklearn:RandomForestClassifier": {"n_estimators": 10},
    "sklearn:ExtraTreesClassifier": {"n_estimators": 10},
    "sklearn:GradientBoostingClassifier": {"n_estimators": 5},
}


@pytest.mark.parametrize(
    ("to", "head"), [*GRAPHS, *(("onnx", f"sklearn:{estimator}") for estimator in ESTIMATORS)]
)
def test_a_graph_answers_as_predict_does_by_the_code_of_its_card(
    fitted: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, head: str
) -> None:
    model = fitted(head)
    result = export(model, tmp_path / f"h{FORMATS[to].suffixes[0]}", to=to, backbone=TOY)
    assert result.agreement is not None
    assert result.agreement.on == "30 of the 30 images it was made from"
    new = paint(tmp_path / "new.png", channel=1, seed=77)
    expected = ask(model, new, backbone=TOY)
    answer = follow(str(result.card), tmp_path, new, monkeypatch)
    assert answer == pytest.approx(expected, abs=1e-4)


def test_the_state_dict_is_the_textbook_network_with_the_head_as_its_last_layer(tmp_path: Path) -> None:
    backbone = load_backbone("resnet18", weights="random")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    model = linear_model(backbone, make_engine(backbone, device="cpu").embed(pixels)["penultimate"])
    subject = Subject(where="m.model", model=model, backbone=backbone)
    (tmp_path / "m.safetensors").write_bytes(find_format("torchvision").load().encode(subject))
    tensors = load_file(tmp_path / "m.safetensors")
    original = backbone.module.state_dict()
    assert set(tensors) == {*original, "fc.weight", "fc.bias"}
    assert all(np.array_equal(tensors[name], tensor.numpy()) for name, tensor in original.items())
    network = models.resnet18(weights=None)
    network.fc = nn.Linear(512, 3)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    seen = ResNet18_Weights.DEFAULT.transforms()(torch.full((3, 256, 256), 90, dtype=torch.uint8))[None]
    with torch.inference_mode():
        features = backbone.module(seen).numpy()
        found = network.eval()(seen).softmax(1).numpy()
    np.testing.assert_allclose(found, model.predict_proba(features), atol=1e-5)


@pytest.fixture(scope="module")
def tuned(small: Path) -> Path:
    """`m.model` with one layer changed, as `finetune` records a network of its own."""
    backbone, model = load_backbone(SMALL, weights="random"), Model.load(small / "m.model")
    with torch.no_grad():
        backbone.module.get_parameter("features.0.weight").mul_(1.5)
    identity = tuned_identity(backbone, label="fine-tuned from m.model")
    began = {"from": "m.model", "weights": dict(model.weights)}
    replace(
        model,
        spec=replace(model.spec, weights_sha256=identity.sha256),
        network=network_tensors(backbone.module),
        provenance={**model.provenance, "weights": asdict(identity), "tuned": began},
    ).save(small / "m2.model")
    return small / "m2.model"


@pytest.mark.parametrize("to", ["torchvision", "onnx", PROGRAM, "safetensors"])
def test_a_fine_tuned_network_is_exported_with_its_own_weights(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    photos = tuned.parent / "photos" / "red"
    result = export(tuned, tmp_path / f"new name{FORMATS[to].suffixes[0]}", to=to, images=[photos])
    assert result.agreement is not None
    assert (result.agreement.on, result.agreement.same) == ("3 of the 3 images given", 3)
    card = Path(str(result.card)).read_text()
    assert "fine-tuned, starting from random, seed 0" in card
    assert "licence of the weights: none: they were drawn at random" in card
    new = paint(tmp_path / "new.png", channel=2, seed=81)
    answer = follow(str(result.card), tmp_path, new, monkeypatch)
    assert answer == pytest.approx(ask(tuned, new), abs=1e-4)
    assert answer != pytest.approx(ask(tuned.parent / "m.model", new), abs=1e-4)


def test_the_features_of_a_fine_tuned_network_are_had_by_way_of_its_state_dict(
    tuned: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ExportError, match=r"--to torchvision .* --backbone squeezenet\w+ --weights .*m2.safe"
    ):
        export(tuned, tmp_path / "x.npz", to="features")
    export(tuned, tmp_path / "m2.safetensors", to="torchvision", images=[tuned.parent / "photos" / "red"])
    weights = str(tmp_path / "m2.safetensors")
    embed(tuned.parent / "photos", tmp_path / "s.h5", backbone=SMALL, weights=weights, decoder="exact")
    export(tmp_path / "s.h5", tmp_path / "x.npz", to="features")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as found:
        text, X, names = str(found["spec"]), found["X:penultimate"], found["ids"].tolist()
    model = Model.load(tuned)
    assert FeatureSpec.from_json(text) == model.spec
    images = [tuned.parent / "photos" / name for name in names]
    expected = [answer.probability for answer in predict(tuned, images).predictions]
    np.testing.assert_allclose(model.predict_proba(X).max(1), expected, atol=1e-5)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Shapes and no numbers, so that the largest network takes no memory."""
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:  # RegNet computes its widths by tensors
        return build().to("meta")


@pytest.mark.parametrize("row", torchvision_rows.ROWS, ids=lambda row: next(iter(row.num_features)))
def test_the_code_for_every_family_makes_the_network_with_a_new_last_layer(row: torchvision_rows.Row) -> None:
    name, width = next(iter(row.num_features.items()))
    whole = on_meta(lambda: torchvision.build(name, image_size=224))
    headless = without_module(on_meta(lambda: torchvision.build(name, image_size=224)), row.classifier)
    backbone = Backbone(
        name=name,
        module=headless,
        preprocessing=Preprocessing(resize_size=256, crop_size=224),
        weights=WeightsIdentity(source="random", label="seed 0", sha256="0" * 64),
        classifier=row.classifier,
    )
    architecture = find_architecture(backbone)
    assert architecture is not None
    layers = last_layers(whole, row.classifier, num_features=width, num_classes=3)
    lines = [f"model{attribute(layer.path)} = {layer.code}" for layer in layers]
    code = [architecture.imports, "from torch import nn", f"model = {architecture.call}", *lines]

    def follow_code() -> nn.Module:
        found: dict[str, Any] = {}
        exec("\n".join(code), found)
        network: nn.Module = found["model"]
        return network.eval()

    network = on_meta(follow_code)
    assert network(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, 3)
    tensors = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    last = {f"{row.classifier}.weight", f"{row.classifier}.bias"}
    assert tensors.keys() - last == headless.state_dict().keys()
    assert tensors[f"{row.classifier}.weight"][:2] == (3, width)


# One of each kind of last layer: by index, a convolution before the pooling, one that asks for its version.
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1", "mnasnet0_5"])
@pytest.mark.parametrize("to", ["torchvision", "safetensors"])
def test_every_kind_of_last_layer_is_replaced(
    name: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(name, weights="random")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    vectors = make_engine(backbone, device="cpu").embed(pixels)["penultimate"]
    model = linear_model(backbone, vectors)
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


@pytest.mark.parametrize("to", ["onnx", PROGRAM])
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


@NOT_BEFORE_2_9
def test_no_file_holds_a_pickle(toy: Path, tmp_path: Path) -> None:
    export(toy / "m.model", tmp_path / "m.pt2", to="torch", backbone=TOY)
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    assert any(name.endswith("description.json") for name in parts)
    # A pickle of protocol 2 or later begins with 0x80; torch's are zip files with one inside.
    assert not [name for name, data in parts.items() if data.startswith((b"\x80", b"PK"))]


@pytest.mark.parametrize("version", ["2.6.0", "2.8.0+cu126"])
def test_a_torch_that_writes_pickles_is_refused(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(
        ExportError, match=r"^torch 2\.[68].* install torch 2\.9 or later, or export --to onnx or"
    ):
        export(toy / "m.model", tmp_path / "m.pt2", to="torch", backbone=TOY)
    assert not list(tmp_path.iterdir())


@NOT_BEFORE_2_9
def test_what_torch_warns_of_in_its_own_files_is_not_repeated(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    load = torch.export.load

    def warn(path: Path) -> Any:
        warnings.warn("the given buffer is not writable", UserWarning, stacklevel=2)
        return load(path)

    monkeypatch.setattr(torch.export, "load", warn)
    export(toy / "m.model", tmp_path / "m.pt2", to="torch", backbone=TOY)
    assert not recwarn.list


def test_a_safetensors_file_describes_a_head_of_any_kind(toy: Path, tmp_path: Path) -> None:
    fit(toy / "s.h5", tmp_path / "h.model", head="knn", params={"k": 3}, curve=False)
    result = export(tmp_path / "h.model", to="safetensors", backbone=TOY)
    with safe_open(tmp_path / "h.safetensors", framework="np") as file:
        head = json.loads(file.metadata()["head"])
        assert set(file.keys()) == {"head.vectors", "head.labels"}
        np.testing.assert_array_equal(
            file.get_tensor("head.vectors"), Model.load(tmp_path / "h.model").arrays["vectors"]
        )
    assert (head["name"], head["params"]["k"]) == ("knn", 3)
    assert "safe_open" in Path(str(result.card)).read_text()


def test_several_nodes_are_in_the_graph(small: Path, tmp_path: Path) -> None:
    embed(
        small / "photos",
        tmp_path / "s.h5",
        backbone=SMALL,
        weights="random",
        nodes=("features.5", "features.8:max"),
    )
    features = FeatureStore.open(tmp_path / "s.h5").features(["features.5:avg", "features.8:max"])
    one = Model.load(small / "m.model")
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, features.X.shape[1])) / features.X.std() / 30
    arrays = {"coef": weight, "intercept": -weight @ features.X.mean(0)}
    provenance = FeatureStore.open(tmp_path / "s.h5").provenance
    several = replace(one, arrays=arrays, spec=features.spec, nodes=features.nodes, provenance=provenance)
    several.save(tmp_path / "m.model")
    for to in ("onnx", "safetensors"):
        result = export(tmp_path / "m.model", to=to, images=[small / "photos" / "blue"])
        assert result.agreement is not None
        assert result.agreement.same == 3
    with pytest.raises(
        ExportError, match=r"is fitted on features.5:avg, features.8:max.*--to onnx, torch or safetens"
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


def write_export(path: Path) -> dict[str, bytes]:
    """What passes for an earlier export, with its card, in an empty folder; the contents of that."""
    path.write_bytes(b"as it was")
    path.with_name(path.name + ".md").write_text(f"# Earlier\n\n{SIGN}as it was.\n")
    return contents(path.parent)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("to", ["onnx", PROGRAM])
def test_a_disagreement_leaves_what_was_there(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    path = tmp_path / f"m{FORMATS[to].suffixes[0]}"
    before = write_export(path)
    right = SoftmaxHead.forward
    monkeypatch.setattr(SoftmaxHead, "forward", lambda self, vectors: right(self, vectors).flip(1))
    with pytest.raises(ExportError, match="the same class for"):
        export(toy / "m.model", path, to=to, backbone=TOY)
    assert contents(tmp_path) == before


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
    assert f"has the sha256 {hashlib.sha256((tmp_path / 'm.onnx').read_bytes()).hexdigest()}." in card


def card_of(model: Model) -> str:
    subject = Subject(where="m.model", model=model, backbone=load_backbone(TOY))
    proof = Proof(agreement=compare(np.ones((1, 2)), np.ones((1, 2)), on="one"))
    return write_card(subject, FORMATS["onnx"], Written(name="m", sha256="0" * 64, recipe="pass"), proof)


def test_the_card_names_a_hundred_classes_and_says_how_many_more(toy: Path) -> None:
    names = [f"class{i:03d}" for i in range(102)]
    card = card_of(replace(Model.load(toy / "m.model"), classes=tuple(names)))
    assert f"of the probabilities: {', '.join(names[:100])} and 2 more\n" in card


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("IMAGENET1K_V1", "torchvision names the data and the recipe"),
        ("IMAGENET1K_SWAG_E2E_V1", "https://github.com/facebookresearch/SWAG/blob/main/LICENSE"),
    ],
)
def test_the_card_has_the_licence_that_torchvision_names(toy: Path, label: str, words: str) -> None:
    model = Model.load(toy / "m.model")
    weights = {"source": "torchvision", "label": label}
    named = replace(
        model,
        spec=replace(model.spec, backbone="vit_b_16"),
        provenance={**model.provenance, "weights": weights},
    )
    assert f"licence of the weights: {words}" in card_of(named)


def test_a_model_tuned_twice_says_that_its_licence_is_not_named(tuned: Path) -> None:
    model = Model.load(tuned)
    began = {"weights": {"source": "tuned", "label": "fine-tuned from m.model"}}
    card = card_of(replace(model, provenance={**model.provenance, "tuned": began}))
    assert "that of the weights the first fine-tuning began with, which this model does not name" in card


def test_a_model_tuned_twice_has_the_licence_of_the_first_weights(tuned: Path) -> None:
    model = Model.load(tuned)
    first = {"source": "torchvision", "label": "IMAGENET1K_SWAG_E2E_V1", "sha256": "12ab" * 16}
    provenance = {
        **model.provenance,
        "tuned": {"weights": {"source": "tuned", "label": "fine-tuned from m.model"}},
        "tuned_before": [{"weights": first}],
    }
    card = card_of(replace(model, spec=replace(model.spec, backbone="vit_b_16"), provenance=provenance))
    assert "fine-tuned, starting from torchvision, IMAGENET1K_SWAG_E2E_V1 of sha256 12ab12ab12ab;" in card
    assert "licence of the weights: https://github.com/facebookresearch/SWAG" in card
    for forged in (7, [7], [{"weights": 7}], [{"weights": {"source": 7, "label": ""}}]):
        odd = replace(model, provenance={**provenance, "tuned_before": forged})
        assert "fine-tuned, starting from tuned, fine-tuned from m.model of sha256" in card_of(odd)


def test_the_code_of_a_card_sees_what_is_transparent_as_predict_does(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = export(toy / "m.model", tmp_path / "m.onnx", to="onnx", backbone=TOY)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "new.png")
    answer = follow(str(result.card), tmp_path, tmp_path / "new.png", monkeypatch)
    assert answer == pytest.approx(ask(toy / "m.model", tmp_path / "new.png", backbone=TOY), abs=1e-4)


@pytest.mark.parametrize("to", ["torchvision", "onnx", "torch", "safetensors"])
@pytest.mark.parametrize("stem", ['a "name"', "two\nlines", "it's \\", "caf\u00e9 \U0001f34e", "bad\udcff"])
def test_the_code_of_a_card_opens_a_file_of_any_name(small: Path, to: str, stem: str) -> None:
    model = Model.load(small / "m.model")
    subject = Subject(where="m.model", model=model, backbone=load_backbone(SMALL, weights="random"))
    code = find_format(to).load().recipe(subject, stem)
    texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert stem in texts


# What is refused


def refused(source: Path, output: Path | None = None, **options: Any) -> str:
    if options["to"] != "features":
        options = {"backbone": TOY, **options}
    with pytest.raises(ExportError) as raised:
        export(source, output, **options)
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


def test_a_file_replaces_no_model_no_store_and_no_weights(toy: Path, small: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    shutil.copy(toy / "m.model", other)
    before = other.read_bytes()
    with pytest.raises(
        ModelError, match=r"other\.safetensors is a model of featcache's, which would be repl"
    ):
        export(toy / "m.model", other, to="safetensors", backbone=TOY)
    assert other.read_bytes() == before
    store = shutil.copy(toy / "s.h5", tmp_path / "store.npz")
    with pytest.raises(StoreError, match=r"store\.npz is a feature store, which would be replaced"):
        export(toy / "s.h5", store, to="features")
    network = load_backbone(SMALL, weights="random").module.state_dict()
    weights = tmp_path / "network.safetensors"
    weights.write_bytes(save({name: tensor.contiguous() for name, tensor in network.items()}))
    with pytest.raises(DataError, match=r"is the weights file of its network, which would be replaced"):
        export(small / "m.model", weights, to="torchvision", weights=str(weights))
    # What was exported before is replaced.
    for _ in range(2):
        export(toy / "m.model", tmp_path / "again.safetensors", to="safetensors", backbone=TOY)


def test_a_file_replaces_only_an_export_with_its_card(toy: Path, tmp_path: Path) -> None:
    file, card = tmp_path / "own.safetensors", tmp_path / "own.safetensors.md"
    file.write_bytes(save({"w": torch.zeros(3)}))
    with pytest.raises(DataError, match=r"own\.safetensors is there already and is no export of featcache's"):
        export(toy / "m.model", file, to="safetensors", backbone=TOY)
    file.unlink()
    card.write_text("# Notes of mine\n")
    with pytest.raises(DataError, match=r"own\.safetensors\.md is there already and is no export"):
        export(toy / "m.model", file, to="safetensors", backbone=TOY)
    assert card.read_text() == "# Notes of mine\n"
    assert not file.exists()


def test_options_of_models_are_not_for_features(toy: Path, tmp_path: Path) -> None:
    for option in ({"images": [toy / "photos"]}, {"pixels": "uint8"}):
        said = refused(toy / "s.h5", tmp_path / "x.npz", to="features", **option)
        assert "leave --input, --images, --weights and --backbone away" in said


def test_what_has_no_name_is_no_model() -> None:
    assert "name a model, or a store" in refused(Path("."), to="onnx")


def test_a_tensor_that_a_network_uses_twice_is_written_twice(toy: Path, tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 3, 1)
            self.two = nn.Conv2d(3, 3, 1)
            self.two.weight = self.one.weight

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(images)).mean((2, 3))

    backbone = make_backbone(Tied(), preprocessing=load_backbone(TOY).preprocessing)
    subject = Subject(where="m.model", model=Model.load(toy / "m.model"), backbone=backbone)
    module = find_format("safetensors").load()
    path = tmp_path / "m.safetensors"
    path.write_bytes(module.encode(subject))
    check(subject, module.load(path, subject), pictures_of(3), rounds=False)
    tensors = load_file(path)
    np.testing.assert_array_equal(tensors["network.one.weight"], tensors["network.two.weight"])


def test_heads_that_a_format_cannot_hold(small: Path, fitted: Callable[[str], Path], tmp_path: Path) -> None:
    fit(small / "s.h5", tmp_path / "knn.model", head="knn", params={"k": 1, "temperature": 1}, curve=False)
    assert "has a knn head, which a state dict cannot hold" in refused(
        tmp_path / "knn.model", to="torchvision"
    )
    naive, machine = fitted("sklearn:GaussianNB"), fitted("sklearn:LinearSVC")
    assert "export it --to onnx" in refused(naive, tmp_path / "m.pt2", to="torch")
    assert "is not made of tensors" in refused(naive, tmp_path / "m.safetensors", to="safetensors")
    assert "gives no probabilities" in refused(machine, tmp_path / "m.onnx", to="onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"knn.model", "knn.model.json"}


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
    with pytest.raises(DiskError, match="Make the folder"):
        export(toy / "m.model", tmp_path / "none" / "m.onnx", to="onnx", backbone=TOY)


# What happens on the way


def test_an_interruption_leaves_what_was_there(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = write_export(tmp_path / "m.onnx")
    for step in ("gather_pictures", "prove", "write_card"):
        with monkeypatch.context() as patched:
            patched.setattr(f"featcache.commands.export.{step}", interrupt)
            with pytest.raises(KeyboardInterrupt):
                export(toy / "m.model", tmp_path / "m.onnx", to="onnx", backbone=TOY)
        assert contents(tmp_path) == before


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond a hundred bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_leaves_what_was_there(toy: Path, tmp_path: Path) -> None:
    before = write_export(tmp_path / "m.safetensors")
    with (
        full_disk(),
        pytest.raises(DiskError, match=r"writing \S+ failed: File too large\. .*another --output"),
    ):
        export(toy / "m.model", tmp_path / "m.safetensors", to="safetensors", backbone=TOY)
    assert contents(tmp_path) == before


def test_of_two_exports_to_one_file_one_is_there_with_its_own_card(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, card, rename = tmp_path / "m.safetensors", tmp_path / "m.safetensors.md", disk.replace_durably
    first_has_its_card, first_goes_on = threading.Event(), threading.Event()

    def the_first_dawdles(source: Path, target: Path) -> None:
        if target == path and not first_has_its_card.is_set():
            first_has_its_card.set()
            first_goes_on.wait(0.5)  # as long as the other one needs without waiting for its turn
        rename(source, target)

    monkeypatch.setattr(disk, "replace_durably", the_first_dawdles)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(export, toy / "m.model", path, to="safetensors", backbone=TOY)
        assert first_has_its_card.wait(30)
        second = threads.submit(export, toy / "m.model", path, to="safetensors", backbone=TOY, images=[toy])
        second.add_done_callback(lambda _: first_goes_on.set())
        first.result()
        second.result()
    assert {file.name for file in tmp_path.iterdir()} == {path.name, card.name}
    assert hashlib.sha256(path.read_bytes()).hexdigest() in card.read_text()
    assert "of the 30 images given" in card.read_text()


def test_an_export_killed_between_its_names_can_be_repeated(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, card, rename = tmp_path / "m.safetensors", tmp_path / "m.safetensors.md", disk.replace_durably
    named: list[Path] = []

    def killed(source: Path, target: Path) -> None:
        if named:
            raise KeyboardInterrupt
        named.append(target)
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(disk, "replace_durably", killed)
        with pytest.raises(KeyboardInterrupt):
            export(toy / "m.model", path, to="safetensors", backbone=TOY)
    assert list(tmp_path.iterdir()) == named
    export(toy / "m.model", path, to="safetensors", backbone=TOY)
    assert hashlib.sha256(path.read_bytes()).hexdigest() in card.read_text()


def test_a_graph_that_the_runtime_refuses_is_one_line(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.exporting.onnx.encode", lambda subject: b"no graph")
    said = refused(toy / "m.model", tmp_path / "m.onnx", to="onnx")
    assert said.startswith(f"ONNX Runtime {onnxruntime.__version__} cannot run ")
    assert not list(tmp_path.iterdir())


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
