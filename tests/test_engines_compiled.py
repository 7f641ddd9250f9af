"""The engine that compiles: what only it can meet. Networks are tiny, for compiling takes seconds each."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from featcache.backbones import Backbone, load_backbone, make_backbone
from featcache.backbones.backbone import freeze
from featcache.backbones.nodes import make_extractor
from featcache.engines import Engine, make_engine
from featcache.engines.agreement import compare_engines
from featcache.engines.pixels import PixelsToVectors
from featcache.engines.torch_compiled import TorchCompiled, _lay_out_inputs_of_layers, _quiet, make
from featcache.engines.torch_eager import TorchEager
from featcache.errors import DeviceError
from featcache.spec import Preprocessing

SIZE = 16
BATCH = 3


class Small(nn.Module):
    """A residual block with batch norms whose statistics matter, and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU())
        self.last = nn.Linear(16, 8)

    def forward(self, images: Tensor) -> Tensor:
        first = self.norm(self.stem(images)).relu()  # (B, 16, S / 2, S / 2)
        return self.last((first + self.block(first)).mean((2, 3)))


class Forking(nn.Module):
    """Its Python depends on the values of the images, so it is no graph."""

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean((2, 3))  # (B, 3)
        return means if means.sum() > 0 else -means


def backbone_of(module: nn.Module, name: str = "small") -> Backbone:
    return make_backbone(module, preprocessing=Preprocessing(resize_size=SIZE, crop_size=SIZE), name=name)


def small() -> Backbone:
    torch.manual_seed(0)
    module = Small()
    with torch.no_grad():
        for norm in (module.norm, module.block[1]):
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 2)
    return backbone_of(module)


def compiled(backbone: Backbone, **options: Any) -> TorchCompiled:
    given: dict[str, Any] = {
        "nodes": ("penultimate",), "device": "cpu", "precision": "float32", "batch_size": BATCH,
    }  # fmt: skip
    return make(backbone, **{**given, **options})


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """What is compiled lies in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield patch


NODES = ("norm:max", "penultimate")


@pytest.fixture(scope="module")
def engine(surroundings: pytest.MonkeyPatch) -> TorchCompiled:
    try:
        return compiled(small(), nodes=NODES)
    except DeviceError as error:
        if "needs" in str(error):
            pytest.skip(str(error))
        raise


def test_it_agrees_with_the_eager_engine_at_every_node(engine: TorchCompiled) -> None:
    reference = make_engine(small(), nodes=NODES, batch_size=2)
    assert [node.key for node in engine.nodes] == list(NODES)
    images = pixels(7)  # the last batch is short
    agreement = compare_engines(engine, reference, images)
    assert agreement.passed
    # Measured: 2e-7; float32 in another order.
    assert agreement.difference < 1e-5


def test_the_compiled_code_is_what_runs(engine: TorchCompiled, monkeypatch: pytest.MonkeyPatch) -> None:
    def eager(*_: object) -> Tensor:
        raise AssertionError("the eager engine normalised the images")

    monkeypatch.setattr(TorchEager, "_normalised", eager)
    assert set(engine.embed(pixels(1))) == set(NODES)


def test_a_vector_does_not_depend_on_neighbours_place_or_filling(engine: TorchCompiled) -> None:
    images = pixels(BATCH)
    together = engine.embed(images)["penultimate"]
    np.testing.assert_array_equal(engine.embed(images[::-1])["penultimate"], together[::-1])
    np.testing.assert_array_equal(engine.embed(images[2:])["penultimate"], together[2:])


def test_threads_that_call_at_once_get_what_one_gets_alone(engine: TorchCompiled) -> None:
    batches = [pixels(BATCH, seed) for seed in range(24)]
    expected = [engine.embed(batch)["penultimate"] for batch in batches]
    ready = threading.Barrier(4)

    def embed(batch: np.ndarray) -> np.ndarray:
        torch.set_num_threads(1)
        ready.wait(timeout=60)
        return engine.embed(batch)["penultimate"]

    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(embed, batches), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_training_the_module_changes_nothing(engine: TorchCompiled) -> None:
    images = pixels(BATCH)
    before = engine.embed(images)["penultimate"]
    engine._replicas._network.train()
    np.testing.assert_array_equal(engine.embed(images)["penultimate"], before)


def test_bfloat16_is_near_float32(engine: TorchCompiled) -> None:
    reference = make_engine(small(), batch_size=BATCH)
    agreement = compare_engines(compiled(small(), precision="bfloat16"), reference, pixels(BATCH))
    # Measured: 1e-5 and 4e-3 of the length; bfloat16 has 8 bits.
    assert 1e-6 < agreement.difference < 2e-2
    assert agreement.cosine > 0.999


def test_the_advice_of_the_compiler_is_kept_back(recwarn: pytest.WarningsRecorder) -> None:
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("torch").addHandler(handler)
    try:
        with _quiet():
            logging.getLogger("torch.some.module").error("advice")
            warnings.warn("advice", UserWarning, stacklevel=1)
        assert (said.getvalue(), recwarn.list) == ("", [])
        logging.getLogger("torch.some.module").error("after")
        assert said.getvalue() == "after\n"
    finally:
        logging.getLogger("torch").removeHandler(handler)


def test_it_is_made_without_a_word(
    engine: TorchCompiled, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    toy = load_backbone("channel_mean:channel_mean")
    level, threads = logging.getLogger("torch").level, torch.get_num_threads()
    found = compiled(toy).embed(np.zeros((1, 8, 8, 3), dtype=np.uint8))
    np.testing.assert_allclose(found["penultimate"], [[-1, -1, -1]], atol=1e-6)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert (logging.getLogger("torch").level, torch.get_num_threads()) == (level, threads)


class Tokens(nn.Module):
    """A layer over (tokens, B, D), as attention has it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 48)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(2).unflatten(2, (-1, 8)).transpose(1, 2).flatten(2).transpose(0, 1))


def test_the_weights_of_a_layer_are_not_copied_for_each_of_the_batch() -> None:
    """The compiler makes a batched product of a layer whose input is not contiguous."""
    images = torch.rand(BATCH, 3, 4, 8)
    graph: Any = torch.export.export(freeze(Tokens()), (images,), strict=False).module()
    expected = graph(images)
    assert {"bmm"} & operations_in(graph, images)
    _lay_out_inputs_of_layers(graph)
    assert not {"bmm"} & operations_in(graph, images)
    torch.testing.assert_close(graph(images), expected)


def operations_in(graph: Any, images: Tensor) -> set[str]:
    """The names of the operations that a network comes down to."""
    with torch.no_grad():
        traced = make_fx(graph)(images)
    return {getattr(node.target, "__name__", "").split(".")[0] for node in traced.graph.nodes}


@pytest.mark.parametrize("nodes", [NODES, ("norm:max", "norm", "penultimate")])
def test_no_part_of_what_is_compiled_passes_for_a_graph(nodes: tuple[str, ...]) -> None:
    """torch 2.11, told to log all, prints the code of every part that has a `graph`."""
    backbone = small()
    network = PixelsToVectors(make_extractor(backbone, nodes), backbone.preprocessing, torch.device("cpu"))
    captured: Any = torch.export.export(network, (torch.from_numpy(pixels(1)),), strict=False).module()
    parts = {name: part for name, part in captured.named_modules() if name and hasattr(part, "graph")}
    assert not [name for name, part in parts.items() if not isinstance(part, GraphModule)]


def test_a_network_that_is_no_graph_is_one_line(engine: TorchCompiled) -> None:
    with pytest.raises(DeviceError, match="cannot run forking .*: pass --engine torch-eager") as raised:
        compiled(backbone_of(Forking(), "forking"))
    assert len(str(raised.value).splitlines()) == 1


def test_code_that_the_compiler_refuses_is_one_line(
    engine: TorchCompiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch._inductor.exc.CppCompileError(["g++"], "no such instruction")

    monkeypatch.setattr("featcache.engines.torch_compiled.compile_graph", refuse)
    with pytest.raises(DeviceError, match=r"cannot run small \(C\+\+ compile error\): pass") as raised:
        compiled(small())
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PATH": ""}, "needs a compiler, and there is no .*: install it, name another in CXX, or pass"),
        ({"CXX": "/no/such/cxx -O2"}, "there is no /no/such/cxx here"),
    ],
)
def test_no_compiler_is_one_line(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DeviceError, match=said):
        compiled(small())


def test_no_headers_of_python_are_one_line(monkeypatch: pytest.MonkeyPatch, engine: TorchCompiled) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/no/such/folder")
    with pytest.raises(DeviceError, match=r"Python.h is not here: install them \(python3-dev\)"):
        compiled(small())


def test_an_engine_describes_itself(engine: Engine) -> None:
    assert (engine.name, engine.device, engine.batch_size) == ("torch-compiled", "cpu", BATCH)
    assert engine.allocate().shape == (BATCH, SIZE, SIZE, 3)
