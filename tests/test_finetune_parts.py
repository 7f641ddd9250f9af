"""What fine-tuning is made of: the cut, the head to begin with, rates, averages, rows, the choice."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import small_network
import torch
from click.testing import CliRunner
from gaussians import gaussian_features, take
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, autoaugment

from featcache import tuning
from featcache.backbones import Backbone, load_backbone, make_backbone
from featcache.backbones.cut import Tail, cut_network
from featcache.backbones.nodes import make_extractor
from featcache.cli import main
from featcache.errors import (
    BackboneError,
    DataError,
    DiskError,
    FeatcacheError,
    HeadError,
    ModelError,
    UnknownNode,
)
from featcache.evaluate.comparison import Difference
from featcache.evaluate.splits import Groups, hold_out
from featcache.fitting import Wishes, fit_features
from featcache.heads import build_head
from featcache.heads.base import LinearHead
from featcache.progress import SilentProgress
from featcache.spec import FeatureNode, Preprocessing
from featcache.store.features import FeatureSet
from featcache.tuning.activations import disk_speed
from featcache.tuning.asked import Asked
from featcache.tuning.average import interpolate, update_average
from featcache.tuning.choose import choose_weights
from featcache.tuning.comparison import Comparison
from featcache.tuning.launched import errors_told_once
from featcache.tuning.network import TunedNetwork
from featcache.tuning.ranks import Message, Ranks
from featcache.tuning.result import advise
from featcache.tuning.rows import tuning_rows
from featcache.tuning.schedule import Schedule
from featcache.tuning.scoring import Score
from featcache.tuning.settings import Settings
from featcache.tuning.sources import drawn_views
from featcache.tuning.start import make_layer, random_layer, refit_head
from featcache.tuning.train import TrainingState
from featcache.tuning.trivial import OPERATIONS, STRENGTHS, augment

pytestmark = pytest.mark.usefixtures("one_thread")

# {network: (tail, its key, its blocks)}; at 64 px, but for the ViT.
CUTS = {
    "resnet18": ("last:2", "layer3.1.relu_1:flat", ("layer4.0", "layer4.1")),
    "efficientnet_lite0": ("last:2", "blocks.5.3.add:flat", ("blocks.6.0", "conv_head")),
    "vit_b_32": (
        "encoder.layers.encoder_layer_11",
        "encoder.layers.encoder_layer_10.add_1:flat",
        ("encoder.layers.encoder_layer_11",),
    ),
    "swin_t": ("last:1", "features.7.0.add_1:flat", ("features.7.1",)),
    "convnext_tiny": ("features.7.2", "features.7.1.add:flat", ("features.7.2",)),
}


def penultimate(backbone: Backbone) -> tuple[FeatureNode, ...]:
    return make_extractor(backbone).nodes


def images_for(backbone: Backbone, count: int = 2) -> Tensor:
    size = backbone.preprocessing.crop_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def fed(backbone: Backbone, tail: Tail, images: Tensor) -> Tensor:
    """The tail's vectors for images that went through the frozen part."""
    with torch.inference_mode():
        given = make_extractor(backbone, [tail.key])(images)[tail.key] if tail.key else images
        vectors: Tensor = tail(given)
    return vectors


@pytest.mark.parametrize("name", CUTS)
def test_a_network_cut_in_two_computes_what_it_did(name: str) -> None:
    unfreeze, key, blocks = CUTS[name]
    backbone = load_backbone(name, weights="random")
    if name != "vit_b_32":
        backbone = replace(backbone, preprocessing=replace(backbone.preprocessing, crop_size=64))
    images = images_for(backbone)
    with torch.inference_mode():
        expected = backbone.module(images)
    tail = cut_network(backbone, penultimate(backbone), unfreeze)
    assert (tail.key, tail.blocks) == (key, blocks)
    torch.testing.assert_close(fed(backbone, tail, images), expected, rtol=1e-4, atol=1e-5)
    own = {id(parameter) for parameter in backbone.module.parameters()}
    assert all(id(parameter) in own for parameter in tail.parameters())
    assert (
        0 < sum(p.numel() for p in tail.parameters()) < sum(p.numel() for p in backbone.module.parameters())
    )


@pytest.mark.parametrize(
    ("unfreeze", "key", "blocks", "frozen"),
    [
        ("all", "", ("stem", "layers.0", "layers.1", "layers.2", "last.0"), 0),
        ("last:9", "", ("stem", "layers.0", "layers.1", "layers.2", "last.0"), 0),
        ("last:1", "layers.2.relu_1:flat", ("last.0",), 4),
        ("last:2", "layers.1:flat", ("layers.2", "last.0"), 3),
        ("layers", "relu:flat", ("layers.0", "layers.1", "layers.2", "last.0"), 1),
        ("layers.2.second", "layers.1:flat", ("layers.2", "last.0"), 3),  # no cut inside a residual branch
        ("last.1", "last.0:flat", (), 5),
    ],
)
def test_where_it_is_cut(unfreeze: str, key: str, blocks: tuple[str, ...], frozen: int) -> None:
    backbone = small_network.small()
    tail = cut_network(backbone, penultimate(backbone), unfreeze)
    assert (tail.key, tail.blocks, tail.frozen) == (key, blocks, frozen)
    images = images_for(backbone)
    torch.testing.assert_close(fed(backbone, tail, images), backbone.module(images), rtol=1e-5, atol=1e-6)


def test_depth_counts_the_blocks_after_a_parameter() -> None:
    backbone = small_network.small()
    tail = cut_network(backbone, penultimate(backbone), "all")
    found = {name: tail.depth[id(p)] for name, p in backbone.module.named_parameters()}
    first = {name.partition(".")[0]: depth for name, depth in found.items()}
    assert (first["stem"], first["norm"]) == (4, 4)  # a norm belongs to the block before it
    assert found["layers.0.first.weight"] == found["layers.0.second.bias"] == 3
    assert (found["layers.1.weight"], found["layers.2.first.bias"]) == (2, 1)
    assert found["last.0.weight"] == found["last.1.weight"] == 0


@pytest.mark.parametrize(
    ("unfreeze", "words"),
    [("last:0", "has no node"), ("layer.2", "try layers.2"), ("last.2", "has weights; its last blocks are")],
)
def test_what_cannot_be_unfrozen_names_what_can(unfreeze: str, words: str) -> None:
    backbone = small_network.small()
    with pytest.raises(UnknownNode, match=words):
        cut_network(backbone, penultimate(backbone), unfreeze)


class Branching(nn.Module):
    """Looks at the values of its input, which symbolic tracing cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images if images.sum() > 0 else -images).mean((2, 3))


def test_what_cannot_be_traced_is_trained_whole_or_not_at_all() -> None:
    backbone = make_backbone(Branching(), preprocessing=Preprocessing(resize_size=8, crop_size=8))
    tail = cut_network(backbone, penultimate(backbone), "all")
    images = images_for(backbone)
    torch.testing.assert_close(tail(images), backbone.module(images))
    with pytest.raises(BackboneError, match="cannot be traced, so it can be fine-tuned with --unfreeze all"):
        cut_network(backbone, penultimate(backbone), "last:1")


def test_several_nodes_come_out_of_one_tail_unless_one_lies_before_it() -> None:
    backbone = small_network.small()
    extractor = make_extractor(backbone, ["layers.2", "penultimate", "last.0:max"])
    tail = cut_network(backbone, extractor.nodes, "layers.2")
    images = images_for(backbone)
    expected = torch.cat(list(extractor(images).values()), dim=1)
    torch.testing.assert_close(fed(backbone, tail, images), expected, rtol=1e-5, atol=1e-6)
    # What comes after last.0 alone cannot be the tail: nodes before it are asked for as well.
    assert cut_network(backbone, extractor.nodes, "last.1").key == "layers.2.relu_1:flat"


def test_a_flat_node_is_all_of_a_map() -> None:
    backbone, images = small_network.small(), torch.rand(3, 3, 16, 16)
    extractor = make_extractor(backbone, ["layers.1:flat"])
    module: Any = backbone.module
    with torch.no_grad():
        expected = module.layers[1](module.layers[0](module.relu(module.norm(module.stem(images)))))
        found = extractor(images)["layers.1:flat"]
    assert extractor.nodes == (FeatureNode(name="layers.1", pooling="flat", num_features=12 * 4 * 4),)
    torch.testing.assert_close(found.reshape(expected.shape), expected)
    with pytest.raises(UnknownNode, match="is a vector already: leave :flat away"):
        make_extractor(backbone, ["penultimate:flat"])


HEADS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("logistic", {"C": 0.3, "temperature": 1.7}), ("ridge", {"alpha": 10.0, "temperature": 0.2}), ("ncm", {}),
    ("linear", {"epochs": 2}),
)  # fmt: skip


@pytest.mark.parametrize(("name", "params"), HEADS)
@pytest.mark.parametrize("k", [2, 3])
def test_the_layer_says_what_the_head_says(name: str, params: dict[str, Any], k: int) -> None:
    features = gaussian_features({"": 60}, k=k, gap=2.0)
    X = (features.X * np.geomspace(0.1, 10, 5) + 7).astype(np.float32)  # to be standardised
    head = build_head(name, params, seed=0).fit(X, features.y)
    assert isinstance(head, LinearHead)
    layer = make_layer(*head.as_linear(), columns=range(k), n_classes=k)
    found = torch.softmax(layer(torch.from_numpy(X)), dim=1).detach().numpy()
    np.testing.assert_allclose(found, head.predict_proba(X), atol=2e-5)


def test_at_the_start_the_network_predicts_as_the_probe() -> None:
    backbone = small_network.small()
    images = images_for(backbone, 40)
    with torch.no_grad():
        X = backbone.module(images).numpy()
    head = build_head("logistic", {"C": 1.0}, seed=0).fit(X, np.arange(40) % 3)
    assert isinstance(head, LinearHead)
    for unfreeze in ("all", "last:1"):
        tail = cut_network(backbone, penultimate(backbone), unfreeze)
        layer = make_layer(*head.as_linear(), columns=range(3), n_classes=3)
        network = TunedNetwork(tail, layer, Settings())
        given = make_extractor(backbone, [tail.key])(images)[tail.key] if tail.key else images
        found = torch.softmax(network(given), dim=1).detach().numpy()
        np.testing.assert_allclose(found, head.predict_proba(X), atol=1e-5)


def test_a_class_the_head_lacks_changes_nothing_at_the_start() -> None:
    features = gaussian_features({"": 60}, gap=1.0)
    head = build_head("logistic", {"C": 1.0}, seed=0).fit(features.X, features.y)
    assert isinstance(head, LinearHead)
    head.coef_, head.intercept_ = head.coef_ + 3, head.intercept_ - 100  # which changes no probability
    layer = make_layer(*head.as_linear(), columns=[3, 0, 2], n_classes=5)
    found = torch.softmax(layer(torch.from_numpy(features.X)), dim=1).detach().numpy()
    np.testing.assert_allclose(found[:, [3, 0, 2]], head.predict_proba(features.X), atol=1e-4)
    assert found[:, [1, 4]].max() < 5e-5


def test_a_random_head_is_drawn_by_its_seed_alone() -> None:
    torch.manual_seed(1)
    one, state = random_layer(6, 3, seed=5), torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.testing.assert_close(one.weight, random_layer(6, 3, seed=5).weight)
    assert not torch.equal(one.weight, random_layer(6, 3, seed=6).weight)
    assert one.weight.abs().max() <= 6**-0.5


def test_rates_rise_and_fall_along_a_cosine() -> None:
    schedule = Schedule.of(Settings(epochs=2, warmup=0.2), steps_an_epoch=10)
    found = [schedule.factor(step) for step in range(20)]
    assert found[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert found[4] == 1.0
    assert found[12] == pytest.approx(0.5)
    assert found[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 16)))
    assert Schedule.of(Settings(epochs=1, warmup=1.0), steps_an_epoch=1).factor(0) == 1.0


def test_rates_fall_with_depth_and_norms_do_not_decay() -> None:
    backbone = small_network.small()
    tail = cut_network(backbone, penultimate(backbone), "layers.1")
    settings = Settings(lr=1.0, head_lr=5.0, layer_decay=0.5, weight_decay=0.1)
    network = TunedNetwork(tail, nn.Linear(16, 3), settings)
    rates = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in network.groups(settings)
        for parameter in group["params"]
    }
    named = {name: rates[id(p)] for name, p in backbone.module.named_parameters() if id(p) in rates}
    assert named["layers.1.weight"] == (0.25, 0.1)
    assert named["layers.2.first.bias"] == (0.5, 0.0)
    assert named["last.1.weight"] == (1.0, 0.0)  # of a norm
    assert "stem.weight" not in named
    assert [rates[id(p)] for p in network.head.parameters()] == [(5.0, 0.1), (5.0, 0.0)]


def test_the_moving_average_is_that_of_the_formula() -> None:
    average, expected = {"w": torch.tensor([1.0])}, 1.0
    for step, value in enumerate((3.0, 5.0, -2.0)):
        update_average(average, {"w": torch.tensor([value])}, decay=0.15, step=step)
        decay = min(0.15, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert average["w"].item() == pytest.approx(expected, rel=1e-6)


def trainer(best: float | None, score_of: Any, start: str = "refit") -> Any:
    state = TrainingState()
    if best is not None:
        state.best, state.best_score = {"w": torch.tensor([best])}, score_of(best)
    return SimpleNamespace(
        state=state,
        settings=Settings(start=start),  # type: ignore[arg-type]
        score_weights=lambda weights: score_of(weights["w"].item()),
    )


@pytest.mark.parametrize(
    ("accuracies", "alpha"),
    [
        ({0.0: 0.8, 1.0: 0.8, 2.0: 0.8, 3.0: 0.8, 4.0: 0.8}, 0.0),  # ties are the start's
        ({0.0: 0.8, 1.0: 0.8, 2.0: 0.9, 3.0: 0.9, 4.0: 0.85}, 0.5),
        ({0.0: 0.8, 1.0: 0.7, 2.0: 0.7, 3.0: 0.7, 4.0: 0.81}, 1.0),
        ({0.0: 0.8, 1.0: 0.7, 2.0: 0.805, 3.0: 0.7, 4.0: 0.7}, 0.0),  # one row more may be chance
    ],
)
def test_the_weights_are_the_best_between_start_and_tuned(
    accuracies: dict[float, float], alpha: float
) -> None:
    def score_of(w: float) -> Score:
        return Score(accuracy=accuracies[w], nll=1.0, hits=np.arange(200) < 200 * accuracies[w])

    found = choose_weights(
        trainer(4.0, score_of), {"w": torch.tensor([0.0])}, score_of(0.0), progress=SilentProgress()
    )
    assert found.alpha == alpha
    assert found.weights["w"].item() == 4.0 * alpha
    assert [score.accuracy for score in found.scores.values()] == list(accuracies.values())


def test_without_a_finished_epoch_the_start_is_kept_and_a_random_one_never() -> None:
    start, probe = {"w": torch.tensor([0.0])}, Score(accuracy=0.9, nll=0.1)
    nothing = choose_weights(trainer(None, None), start, probe, progress=SilentProgress())
    assert (nothing.alpha, nothing.weights) == (0.0, start)
    worse = trainer(4.0, lambda w: Score(accuracy=0.1, nll=9.0), start="random")
    assert choose_weights(worse, start, probe, progress=SilentProgress()).alpha == 1.0
    assert interpolate(start, {"w": torch.tensor([4.0])}, 0.25)["w"].item() == 1.0


def test_scores_are_compared_by_accuracy_then_log_loss() -> None:
    scores, y = np.log([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]]), np.array([0, 0, -1])
    found = Score.of(scores, y)
    assert found.accuracy == pytest.approx(1 / 3)  # what is not known is an error
    assert found.nll == pytest.approx(-(math.log(0.7) + math.log(0.4) + math.log(1e-15)) / 3)
    assert Score(accuracy=0.9, nll=2.0).beats(Score(accuracy=0.8, nll=0.1))
    assert Score(accuracy=0.9, nll=0.1).beats(Score(accuracy=0.9, nll=0.2))
    assert not Score(accuracy=0.9, nll=0.1).beats(Score(accuracy=0.9, nll=0.1))
    assert not Score(accuracy=1.0, nll=math.nan).beats(None)


def test_clearly_better_is_by_more_than_a_standard_error() -> None:
    def of(right: int, wrong: int) -> Score:
        """Right on so many of the last 50 rows that the other misses, wrong on so many of its 50."""
        hits = np.r_[np.arange(50) >= wrong, np.arange(50) < right]
        return Score(accuracy=float(hits.mean()), nll=1.0, hits=hits)

    other = of(0, 0)
    assert of(6, 1).clearly_beats(other)  # 5 of 7 rows: sqrt(7) is 2.6
    assert not of(5, 3).clearly_beats(other)  # 2 of 8
    assert not of(1, 0).clearly_beats(other)
    assert not of(0, 9).clearly_beats(other)


def test_val_rows_are_kept_from_training_and_test_rows_from_both() -> None:
    features = gaussian_features({"train": 60, "val": 15, "test": 30})
    rows = tuning_rows(features, features.classes)
    for split, found in (("train", rows.train), ("val", rows.choice), ("test", rows.test)):
        assert found.tolist() == np.flatnonzero(features.splits == split).tolist()
    assert (rows.chosen_on, rows.scored_on, rows.notes) == ("the 15 of the val split", "test", ())


@pytest.mark.parametrize("splits", [{"": 400}, {"train": 300, "test": 60}, {"train": 300, "val": 60}])
def test_without_a_val_split_a_fifth_of_the_training_rows_is_held_out(splits: dict[str, int]) -> None:
    features = gaussian_features(splits)
    rows = tuning_rows(features, features.classes)
    pool = np.concatenate([rows.train, rows.choice])
    assert 0.12 < len(rows.choice) / len(pool) < 0.28
    assert not set(rows.test.tolist()) & set(pool.tolist())
    # Not by the digits that test rows were held out by: of those none is below a fifth any more.
    assert hold_out(features.sha256[pool], features.y[pool]).mean() != len(rows.choice) / len(pool)
    moved = tuning_rows(take(features, slice(None, None, -1)), features.classes)
    ids = {features.ids[row] for row in rows.choice}
    assert {features.ids[::-1][row] for row in moved.choice} == ids


def test_classes_of_the_model_come_first_and_new_ones_follow() -> None:
    features = gaussian_features({"train": 60, "test": 30})
    rows = tuning_rows(features, ("other", "class2", "class0"))
    assert rows.classes == ("other", "class2", "class0", "class1")
    assert rows.y[:3].tolist() == [2, 3, 1]
    few = take(gaussian_features({"": 6}), [0, 1, 3, 4])
    with pytest.raises(HeadError, match="none can be kept to choose weights on"):
        tuning_rows(few, few.classes)


def test_an_epoch_draws_other_views_and_the_plain_ones_are_drawn_by_none() -> None:
    first, second = (drawn_views(200, views=4, epoch=epoch, seed=0) for epoch in (0, 1))
    assert set(first.tolist()) == {0, 1, 2, 3}
    assert (first != second).any()
    assert (first == drawn_views(200, views=4, epoch=0, seed=0)).all()
    assert not drawn_views(200, views=4, epoch=None, seed=0).any()


_THEIRS = {
    "identity": "Identity", "shear x": "ShearX", "shear y": "ShearY", "translate x": "TranslateX",
    "translate y": "TranslateY", "rotate": "Rotate", "brightness": "Brightness", "colour": "Color",
    "contrast": "Contrast", "sharpness": "Sharpness", "posterize": "Posterize", "solarize": "Solarize",
    "autocontrast": "AutoContrast", "equalize": "Equalize",
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_torchvisions(name: str) -> None:
    operation = OPERATIONS[name]
    space = autoaugment.TrivialAugmentWide()._augmentation_space(STRENGTHS)
    strengths, signed = space[_THEIRS[name]]
    ends = [float(strengths.reshape(-1)[i]) for i in (0, -1)]
    assert [operation.weakest, operation.strongest] == pytest.approx(ends)
    assert operation.signed == signed
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    for share in (0.1, 0.5, 1.0):
        strength = ends[0] + share * (ends[1] - ends[0])
        strength = round(strength) if name == "posterize" else -strength if signed else strength
        mode = InterpolationMode.NEAREST
        theirs = autoaugment._apply_op(Image.fromarray(pixels), _THEIRS[name], strength, mode, None)
        ours = operation.apply(Image.fromarray(pixels), strength)
        np.testing.assert_array_equal(np.array(ours), np.array(theirs))


def test_every_operation_is_drawn_and_none_changes_the_size() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    draw, drawn = np.random.default_rng(1), set()
    for _ in range(60):
        found = augment(pixels, draw)
        assert (found.shape, found.dtype) == (pixels.shape, pixels.dtype)
        drawn.add(found.tobytes())
    assert len(drawn) > 30


def test_settings_are_checked_before_any_work() -> None:
    for name, value in (
        ("epochs", 0), ("lr", -1.0), ("layer_decay", 2.0), ("precision", "float16"), ("start", "elsewhere"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            Settings(**{name: value})  # type: ignore[arg-type]


def test_the_speed_of_the_disk_is_a_number_and_leaves_nothing(tmp_path: Path) -> None:
    speed = disk_speed(tmp_path / "x.h5", least=1 << 16)
    assert 0 < speed.read < math.inf
    assert 0 < speed.write < math.inf
    assert not list(tmp_path.iterdir())


def test_one_process_makes_what_the_first_rank_makes() -> None:
    assert Ranks(torch.device("cpu")).from_first(lambda: Message(7)).plain == 7


def test_a_message_is_the_same_after_it_was_sent() -> None:
    sent = Message({"a": [1, None, "ä"]}, {"x": np.eye(3, dtype=np.float32)[:, ::-1], "n": np.array(2)})
    found = Message.from_bytes(sent.to_bytes())
    assert found.plain == sent.plain
    assert found.arrays.keys() == sent.arrays.keys()
    assert all(np.array_equal(found.arrays[name], array) for name, array in sent.arrays.items())
    assert Message.from_bytes(Message().to_bytes()).plain is None


class TwoRanks(Ranks):
    """One process that is both of two ranks in turn: what the first says, the second hears."""

    wire: ClassVar[list[Message]] = []

    def _broadcast(self, message: Message) -> Message:
        if self.is_first:
            self.wire.append(Message.from_bytes(message.to_bytes()))
            return message
        return self.wire.pop(0)


def test_the_error_of_the_first_rank_is_raised_by_all() -> None:
    def refuse() -> Message:
        error = UnknownNode("no such node")
        error.add_note("try another")
        raise error

    for rank in (0, 1):
        with pytest.raises(UnknownNode, match="no such node") as raised:
            TwoRanks(torch.device("cpu"), rank, 2).from_first(refuse)
        assert raised.value.__notes__ == ["try another"]
        assert raised.value.told_elsewhere == bool(rank)  # so that it is said once
    made = iter("ab")
    ranks = [TwoRanks(torch.device("cpu"), rank, 2) for rank in (0, 1)]
    assert [one.from_first(lambda: Message(next(made))).plain for one in ranks] == ["a", "a"]


def test_ranks_and_checkpoints_pickle_nothing() -> None:
    pickling = {
        "pickle", "cPickle", "dill", "broadcast_object_list", "all_gather_object", "gather_object",
        "scatter_object_list", "send_object_list", "recv_object_list",
    }  # fmt: skip
    for path in Path(tuning.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [getattr(node, name, None) for name in ("id", "attr", "module", "name")]
            assert not pickling.intersection(filter(None, names)), f"{path}:{node.lineno}"


def test_a_network_that_was_moved_is_probed_where_it_is() -> None:
    backbone = small_network.small()
    backbone.module.to("meta")
    assert make_extractor(backbone, ["layers.1:flat"]).nodes[0].num_features == 12 * 4 * 4


def test_a_command_is_that_of_the_options_given() -> None:
    asked = Asked(
        model=Path("my model"), data=Path("photos"), output=Path("t.model"), cache="no", forget=True,
        root=Path("-r"), settings=Settings(lr=0.01, trivial_augment=True),
    )  # fmt: skip
    assert asked.line(epochs=3) == (
        "featcache finetune 'my model' photos -o t.model --epochs 3 --lr 0.01 --trivial-augment "
        "--root ./-r --cache no --forget"
    )
    other = replace(asked, settings=replace(asked.settings, seed=1))
    assert other.key(model="m", images="i") != asked.key(model="m", images="i")
    with pytest.raises(ValueError, match="cache is auto, yes or no"):
        replace(asked, **{"cache": "maybe"})


def test_what_to_do_next_follows_from_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = Asked(model=Path("m"), data=Path("photos"), output=Path("t.model"))
    metrics: Any = SimpleNamespace(n=9)

    def command(low: float, high: float, **settings: Any) -> str:
        difference = Difference(points=0.0, ci95=(low, high), se=1.0)
        compared = Comparison(before=metrics, kept=metrics, difference=difference, seen=0)
        now = replace(asked, settings=Settings(**settings))
        return advise(now, compared, frozen_blocks=int(not settings)).command

    assert command(1, 2) == "featcache predict t.model ."
    assert command(-2, -1) == "featcache predict m ."
    assert command(-1, 1) == "featcache finetune m photos -o t-2.model --unfreeze all"
    whole = {"unfreeze": "all"}
    assert command(-1, 1, **whole) == "featcache finetune m photos -o t-2.model --unfreeze all --views 2"
    assert command(-1, 1, **whole, views=2).endswith("--unfreeze all --lr 0.0001 --views 2")
    same = Comparison(before=metrics, kept=metrics, difference=None, seen=0)
    assert advise(asked, same, frozen_blocks=1).command.endswith("-o t-2.model --unfreeze all")
    for name in ("t.model", "t-2.model"):
        Path(name).touch()
    assert advise(asked, same, frozen_blocks=1).command.endswith("-o t-3.model --unfreeze all")


def test_the_probe_is_fitted_again_without_the_val_rows() -> None:
    features = gaussian_features({"train": 60, "val": 15, "test": 30}, gap=1.0)
    _, model = fit_features(features, Wishes(head="logistic", params={"C": 1.0}))
    rows = tuning_rows(features, model.classes)
    again = refit_head(model, features.X[rows.train], rows.y[rows.train], where="m")
    expected = build_head("logistic", model.params, seed=0).fit(
        features.X[rows.train], features.y[rows.train]
    )
    np.testing.assert_array_equal(again.as_linear()[0], expected.as_linear()[0])
    assert not np.allclose(again.as_linear()[0], model.head.as_linear()[0])


@pytest.mark.parametrize(
    ("error", "local_rank", "elsewhere"),
    [
        (ModelError("m"), "0", False),
        (ModelError("m"), "1", True),
        (DataError("an image that this rank alone reads"), "1", False),
        (DiskError("a disk of its own"), "1", False),
    ],
)
def test_what_all_ranks_meet_is_told_once_a_machine(
    error: FeatcacheError, local_rank: str, elsewhere: bool
) -> None:
    with pytest.raises(FeatcacheError) as raised, errors_told_once({"LOCAL_RANK": local_rank}):
        raise error
    assert raised.value.told_elsewhere == elsewhere


@pytest.mark.parametrize("words", [["no.model", "photos", "-o", "t.model"], ["no.model"]])
def test_an_error_of_all_ranks_is_one_line_and_ends_all(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    alone = CliRunner().invoke(main, ["finetune", *words])
    monkeypatch.setenv("LOCAL_RANK", "1")
    other = CliRunner().invoke(main, ["finetune", *words])
    assert alone.stderr
    assert (other.exit_code, other.output) == (alone.exit_code, "")


def grouped(splits: dict[str, int], *, size: int) -> tuple[FeatureSet, Groups]:
    """Rows of one class after the other, so many of a class in a group."""
    features = gaussian_features(splits)
    order = np.lexsort((np.arange(len(features)), features.y))
    index = np.empty(len(features), dtype=np.int64)
    index[order] = np.arange(len(features)) // size
    keys = np.random.default_rng(0).integers(0, 256, (int(index.max()) + 1, 32), dtype=np.uint8)
    return features, Groups(index=index, keys=keys, by="folder")


@pytest.mark.parametrize("splits", [{"": 300}, {"train": 300}])
def test_no_group_is_trained_on_and_chosen_on(splits: dict[str, int]) -> None:
    features, groups = grouped(splits, size=5)
    rows = tuning_rows(features, features.classes, groups)
    sides = [set(groups.index[some].tolist()) for some in (rows.train, rows.choice, rows.test)]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert not (sides[0] | sides[1]) & sides[2]
    assert rows.chosen_on.endswith("in whole groups of folder")
    alone = tuning_rows(features, features.classes)
    assert set(groups.index[alone.train]) & set(groups.index[alone.choice])


def test_groups_that_cross_the_splits_of_the_data_are_said() -> None:
    features = gaussian_features({"train": 60, "val": 15, "test": 30})
    index = np.arange(len(features)) % 9
    keys = np.zeros((9, 32), dtype=np.uint8)
    rows = tuning_rows(features, features.classes, Groups(index=index, keys=keys, by="folder:2"))
    assert "15 of the 15 choice rows share a group of folder:2 with rows trained on" in rows.notes
    single = Groups(index=features.y, keys=np.zeros((3, 32), dtype=np.uint8), by="folder")
    with pytest.raises(HeadError, match="single group of folder"):
        tuning_rows(gaussian_features({"": 60}), ("class0",), single.take(np.arange(60)))


def test_another_grouping_is_another_run() -> None:
    asked = Asked(model=Path("m"), data=Path("photos"), output=Path("t.model"))
    by_folder = replace(asked, group_by="folder:1")
    assert by_folder.line() == "featcache finetune m photos -o t.model --group-by folder:1"
    given = ((asked, None), (by_folder, "x"), (by_folder, "y"))
    keys = [one.key(model="m", images="i", groups=groups) for one, groups in given]
    assert keys[0] != keys[1] != keys[2]
