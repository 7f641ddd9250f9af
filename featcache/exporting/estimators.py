"""scikit-learn's estimators behind a network's graph, converted by skl2onnx."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np

from featcache.engines.onnx_graph import OPSET
from featcache.engines.pixels import CAPTURE_ERRORS, reason
from featcache.errors import ExportError
from featcache.exporting import EXTRA
from featcache.exporting.subject import Subject
from featcache.heads.estimators import LEAST_PROBABILITY

FEATURES = "features"
_SCALED, _TAKEN = "scaled", "taken"  # what the network gives, and what the estimator takes
_ML_OPSET = 3


def has_estimator(subject: Subject) -> bool:
    """Whether the head is one of scikit-learn's."""
    return hasattr(subject.model.head, "pipeline_")


def require_convertible(subject: Subject) -> None:
    """ExportError where the estimator has no probabilities, or skl2onnx is not here."""
    _, estimator = _steps(subject)
    if not hasattr(estimator, "predict_proba"):
        raise ExportError(
            f"{subject.where} has a {subject.model.head_name} head, which gives no probabilities: "
            "fit one that does, such as sklearn:RandomForestClassifier."
        )
    if find_spec("skl2onnx") is None:
        raise ExportError(
            f"a {subject.model.head_name} head needs skl2onnx, not installed here: pip install '{EXTRA}'"
        )


def append_estimator(graph: Any, subject: Subject, *, output: str) -> Any:
    """A graph that ends in `FEATURES`, followed by the head, whose probabilities are called `output`."""
    import onnx

    scaler, _ = _steps(subject)
    head = onnx.compose.add_prefix(_converted(subject), "head.", rename_inputs=False)
    head.ir_version = graph.ir_version
    probabilities = head.graph.output[-1].name
    network = onnx.compose.add_prefix(graph, "network.", rename_inputs=False, rename_outputs=False)
    _standardize(network.graph, scaler)
    merged = onnx.compose.merge_models(network, head, io_map=[(_SCALED, _TAKEN)], outputs=[probabilities])
    _finish(merged.graph, probabilities, output, subject.model.head)
    return merged


def _steps(subject: Subject) -> tuple[Any, Any]:
    """The scaler and the estimator."""
    pipeline = subject.model.head.pipeline_
    return pipeline[0], pipeline[-1]


def _standardize(graph: Any, scaler: Any) -> None:
    """The scaler's own two steps in its own precision: trees compare what comes out to the last digit."""
    from onnx import TensorProto, helper, numpy_helper

    precision = _precision_of_scaler()
    computed = helper.np_dtype_to_tensor_dtype(np.dtype(precision))
    steps = (
        ("Sub", "mean", scaler.mean_, FEATURES, "centred"),
        ("Div", "scale", scaler.scale_, "centred", _SCALED),
    )
    for operation, name, values, taken, given in steps:
        graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype=precision), name))
        graph.node.extend(
            [
                helper.make_node("Cast", [taken], [f"{given}.from"], to=computed),
                helper.make_node(operation, [f"{given}.from", name], [f"{given}.exact"]),
                helper.make_node("Cast", [f"{given}.exact"], [given], to=TensorProto.FLOAT),
            ]
        )
    shape: list[str | int | None] = ["batch", len(scaler.mean_)]
    graph.output.append(helper.make_tensor_value_info(_SCALED, TensorProto.FLOAT, shape))


def _precision_of_scaler() -> type[np.float32 | np.float64]:
    """What the scaler computes each step on float32 in: float64 before scikit-learn 1.8, rounded after it."""
    major, minor = version("scikit-learn").split(".")[:2]
    return np.float32 if (int(major), int(minor)) >= (1, 8) else np.float64


def _converted(subject: Subject) -> Any:
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    _, estimator = _steps(subject)
    shape = FloatTensorType([None, subject.model.num_features])
    try:
        return to_onnx(
            estimator,
            initial_types=[(_TAKEN, shape)],
            options={id(estimator): {"zipmap": False}},
            target_opset={"": OPSET, "ai.onnx.ml": _ML_OPSET},
        )
    except CAPTURE_ERRORS as error:
        raise ExportError(
            f"{subject.where} has a {subject.model.head_name} head, which skl2onnx cannot convert "
            f"({reason(error)}): choose another head."
        ) from error


def _finish(graph: Any, probabilities: str, output: str, head: Any) -> None:
    """softmax(log(p) / temperature) as the last nodes, in float64 as the head computes it."""
    from onnx import TensorProto, helper

    constants = {
        "least": helper.make_tensor("least", TensorProto.DOUBLE, [], [LEAST_PROBABILITY]),
        "temperature": helper.make_tensor("temperature", TensorProto.DOUBLE, [], [float(head.temperature)]),
    }
    graph.initializer.extend(constants.values())
    graph.node.extend(
        [
            helper.make_node("Cast", [probabilities], ["wide"], to=TensorProto.DOUBLE),
            helper.make_node("Max", ["wide", "least"], ["possible"]),
            helper.make_node("Log", ["possible"], ["logarithms"]),
            helper.make_node("Div", ["logarithms", "temperature"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["calibrated"], axis=1),
            helper.make_node("Cast", ["calibrated"], [output], to=TensorProto.FLOAT),
        ]
    )
    del graph.output[:]
    shape: list[str | int | None] = ["batch", len(head.classes_)]
    graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, shape))
