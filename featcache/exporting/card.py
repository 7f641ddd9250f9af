"""The model card: what a person must know of an exported model, in Markdown, beside the file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from featcache.backbones.weights import LICENCES
from featcache.exporting import Format
from featcache.exporting.agreement import Proof
from featcache.exporting.subject import PIXELS, Subject
from featcache.images.decode import Decoder
from featcache.model import Model
from featcache.request import recorded_decoder
from featcache.words import name_some, plural, show_text

SHOWN_CLASSES = 100
SIGN = "Exported by featcache; "  # in the first paragraph of every card

# What a person calls a score; others by their names.
_SCORES: Mapping[str, str] = {
    "top5": "in the top 5",
    "nll": "log-loss",
    "nll_of_others": "log-loss without the rows whose class was given practically no probability",
    "ece": "calibration error",
    "auroc": "area under ROC",
    "train_accuracy": "accuracy on the rows trained on",
}
_PIXELS: Mapping[Decoder, str] = {
    "exact": "It saw its images as Pillow resizes them",
    "fast": "It saw its images by a decoder whose pixels are within 2 of 255 of what Pillow makes of them",
}


@dataclass(frozen=True, kw_only=True)
class Written:
    """An exported file: its name, the sha256 of its bytes, and Python that reads it."""

    name: str
    sha256: str
    recipe: str


def write_card(subject: Subject, row: Format, file: Written, proof: Proof) -> str:
    """The card of an exported file."""
    model = subject.model
    sections = {
        "Data": _data(model),
        "Network and weights": _network(subject),
        "How good it is": _metrics(model.metrics),
        "Preprocessing": _preprocessing(subject, row),
        "Agreement with featcache": [f"- {text}" for text in (proof.agreement.describe(), *proof.notes)],
        "Limits": _limits(model),
        "Reading it": ["```python", file.recipe, "```"],
    }
    lines = [
        f"# {show_text(file.name)}",
        "",
        f"{row.summary[0].upper()}{row.summary[1:]}: {plural(len(model.classes), 'class', 'classes')}, "
        f"{model.spec.backbone}, head {model.head_name}. {SIGN}fingerprint of its features "
        f"{model.fingerprint[:12]}. The file this is the card of has the sha256 {file.sha256}.",
    ]
    for title, body in sections.items():
        lines += ["", f"## {title}", "", *body]
    return "\n".join(lines) + "\n"


def _data(model: Model) -> list[str]:
    data, metrics, classes = model.provenance.get("data"), model.metrics, model.classes
    path = data.get("path") if isinstance(data, Mapping) else None
    name = PurePath(path).name if isinstance(path, str) else "not recorded"
    lines = [f"- images: `{show_text(name)}`"]
    if len(model.trained_on):
        lines.append(f"- fitted on {plural(len(model.trained_on), 'image')}")
    if isinstance(rows := metrics.get("n"), int):
        lines.append(f"- scored on {plural(rows, 'image')}: {_scored_on(metrics)}")
    named = name_some(classes, limit=SHOWN_CLASSES)
    return [*lines, f"- classes, in the order of the probabilities: {named}"]


def _network(subject: Subject) -> list[str]:
    model = subject.model
    weights = model.first_weights
    tuned = "fine-tuned, starting from " if model.network else ""
    began = f" of sha256 {show_text(str(weights.get('sha256'))[:12])}" if model.network else ""
    nodes = ", ".join(f"{node.key} ({node.num_features})" for node in model.nodes)
    return [
        f"- network: {model.spec.backbone}; features: {nodes}",
        f"- weights: {tuned}{weights['source']}, {show_text(os.path.basename(weights['label']))}{began}; "
        f"sha256 of those in use {model.spec.weights_sha256[:12]}",
        f"- licence of the weights: {_licence(model, weights)}",
        f"- head: {model.head_name}"
        + "".join(f", {name} {_short(value)}" for name, value in sorted(model.params.items())),
    ]


def _licence(model: Model, weights: Mapping[str, Any]) -> str:
    from featcache.exporting.architecture import licence_named

    source = weights["source"]
    named = licence_named(model.spec.backbone, weights["label"]) if source == "torchvision" else None
    return named or LICENCES.get(source, "not recorded")


def _scored_on(metrics: Mapping[str, Any]) -> str:
    return show_text(str(metrics.get("scored_on", "images held out")))


def _metrics(metrics: Mapping[str, Any]) -> list[str]:
    rows = list(_scores(metrics))
    if not rows:
        return ["The model file holds no scores."]
    return ["| | | 95 % interval |", "|---|---:|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]


def _scores(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, value, interval) of every number the model file has, whichever version wrote it."""
    for name, value in metrics.items():
        if isinstance(value, float) and not (name == "nll_of_others" and not metrics.get("no_chance")):
            interval = metrics.get(f"{name}_ci95")
            yield _SCORES.get(name, name.replace("_", " ")), f"{value:.4f}", _interval(interval)


def _interval(value: Any) -> str:
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    return f"{value[0]:.4f} to {value[1]:.4f}" if is_pair and all(isinstance(v, float) for v in value) else ""


def _preprocessing(subject: Subject, row: Format) -> list[str]:
    pre = subject.model.spec.preprocessing
    cut = (
        f"- shorter side resized to {pre.resize_size} px ({pre.interpolation}, antialiased), "
        f"{pre.crop_size} x {pre.crop_size} px cut from the centre"
    )
    lines = [
        "- as a camera means it (EXIF orientation applied), RGB; what is transparent is laid over white",
        f"- {pre.crop_size} x {pre.crop_size} px by {show_text(pre.transform)}" if pre.transform else cut,
    ]
    if pre.jpeg == "scaled" and not pre.transform:
        lines.append("- large JPEGs shrunk by their decoder on the way, which the code below does not do")
    normal = f"scaled to 0 to 1, mean {list(pre.mean)}, standard deviation {list(pre.std)}"
    if row.chooses_input:
        return [*lines, f"- the graph takes {PIXELS[subject.pixels]}, and does the rest itself: {normal}"]
    return [*lines, f"- {normal}; the network takes float32 (batch, 3, height, width)"]


def _limits(model: Model) -> list[str]:
    decoder = recorded_decoder(model.provenance)
    return [
        "- It knows its classes alone: an image of anything else is given one of them.",
        f"- The scores are of {_scored_on(model.metrics)}; other cameras, places and times "
        "may differ, and so may its probabilities.",
        f"- {_PIXELS[decoder]}; other decoders and resizers change pixels, and answers a little.",
    ]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else show_text(str(value))
