"""`featcache fit`: choose, fit and score a head on cached features, and write one model file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from featcache.disk import write_atomically
from featcache.errors import FeatcacheError, ModelError
from featcache.evaluate.groups import find_groups
from featcache.fitting import Files, FitResult, fit_features
from featcache.fitting.nodes import pick_nodes
from featcache.fitting.wishes import AUTO, BUDGET, TRIES, Wishes
from featcache.heads.parameters import parse_params
from featcache.images.paths import is_inside
from featcache.model import Model, begins_as_model
from featcache.origin import find_origin, find_root
from featcache.outputs import require_model
from featcache.progress import Progress
from featcache.request import EmbedRequest
from featcache.store.reader import FeatureStore
from featcache.words import show_text


def fit(
    store: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    head: str = AUTO,
    params: Mapping[str, Any] | None = None,
    node: str | Sequence[str] | None = None,
    nodes: str | None = None,
    budget: float = BUDGET,
    class_weight: str | None = None,
    logit_adjustment: float | None = None,
    group_by: str | None = None,
    precision: float | None = None,
    shots: Sequence[int] = (),
    tries: int = TRIES,
    curve: bool | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    check: bool = True,
) -> FitResult:
    """Fit a head on a store's features; write the model to `output` and its report beside it.

    output: the store's name with the ending `.model` by default; a model that is there is replaced, and named
    in the result. (To keep the one that scores better would be to choose by the rows scored.) head: "auto"
    lets heads compete. params: of the head, values or their text; giving a searched one ends its search.
    node: a key or several, whose vectors are put one after the other; by default the first. nodes: "all", or
    "auto" for those that inner validation chooses. class_weight: "balanced" counts every class alike.
    logit_adjustment: tau, scores are lowered by tau times the logarithm of the class's share of the training
    rows. group_by: "folder", "folder:N", "FILE.csv:COLUMN" or "similar[:COSINE]"; rows of a group stay on one
    side. precision: what rows above a threshold shall be right by. shots, tries: accuracy by images a class.
    curve: accuracy by parts of the training rows; None: where there is time. budget: seconds, about, for
    choosing nodes, for the competition and for that curve. device: "cuda" or "auto" for the heads
    that can use one; None: as each does by itself. check: compare the store with its checksums first.
    HeadError, StoreError, DataError, DiskError: what stands in the way, in one line; among it anything but a
    model and its report where these are to be.
    """
    started = time.perf_counter()
    wishes = Wishes(
        head=head,
        params=parse_params(params),
        seed=seed,
        budget=budget,
        class_weight=class_weight,
        logit_adjustment=logit_adjustment,
        precision=precision,
        shots=shots,
        tries=tries,
        curve=curve,
        device=device,
    )
    wishes.require_savable()  # before hours of work, as all that can be refused now
    path = Path(output) if output is not None else Path(f"{os.path.splitext(store)[0]}.model")
    require_model(path, option="--output", needed={})
    with FeatureStore.open(store, check=check) as opened:
        groups = find_groups(group_by, opened.features(), progress=progress) if group_by else None
        picked = pick_nodes(
            opened,
            node=node,
            nodes=nodes,
            groups=groups,
            seed=seed,
            class_weight=wishes.loss_weights,
            budget=budget,
            progress=progress,
        )
        features = opened.features(picked.keys, with_views=wishes.uses_views)
        result, model = fit_features(
            features,
            replace(wishes, spent=picked.seconds),
            groups=groups,
            provenance=dict(opened.provenance),
            progress=progress,
        )
        files = _files(opened, store=Path(store), model=path)
    replaced = _describe_model(path)
    model.save(path)
    others = () if nodes else tuple(one.key for one in opened.spec.nodes if one.key not in picked.keys)
    result = replace(
        result,
        model=str(path),
        node_choice=picked.choice,
        other_nodes=others,
        files=replace(files, head_options=_param_options(params or {}), fit_options=wishes.spell()),
        replaced=replaced,
        seconds=time.perf_counter() - started,
    )
    report = json.dumps(result.to_json(), indent=2) + "\n"
    write_atomically(path.with_name(f"{path.name}.json"), report.encode())
    return result


def _param_options(params: Mapping[str, Any]) -> tuple[str, ...]:
    """Values are said as `parse_value` reads them."""
    said = {name: value if isinstance(value, str) else json.dumps(value, default=str)
            for name, value in params.items()}  # fmt: skip
    return tuple(word for name, value in said.items() for word in ("--param", f"{name}={value}"))


def _describe_model(path: Path) -> str | None:
    """What a model file that is about to be replaced says of itself; None where there is none."""
    if not begins_as_model(path):
        return None
    try:
        former = Model.load(path)
    except ModelError:
        return "a damaged model"
    accuracy, n = former.metrics.get("accuracy"), former.metrics.get("n")
    said = f"{former.head_name} on {' + '.join(node.key for node in former.nodes)}"
    if not isinstance(accuracy, float) or not isinstance(n, int):
        return show_text(said)
    return show_text(f"{said} ({100 * accuracy:.1f} % right on {n:,} rows)")


def _files(opened: FeatureStore, *, store: Path, model: Path) -> Files:
    """Where things are, as far as the store says it of its images."""
    found = Files(store=str(store), model=str(model))
    try:
        request, origin, root = EmbedRequest.of_store(opened), find_origin(opened), find_root(opened)
    except FeatcacheError:  # they are elsewhere now, or were never said
        return replace(found, embed=("featcache", "embed", found.data, "-o", str(store)))
    data = _short(origin["path"])
    own_code = request.backbone if ":" in request.backbone else None
    words = ("featcache", "embed", data, "-o", str(store), *_embed_options(request, origin))
    return replace(found, data=data, images=_short(root), embed=words, own_code=own_code)


def _embed_options(request: EmbedRequest, origin: Mapping[str, Any]) -> Iterator[str]:
    """Those of `featcache embed` that ask for the features of the store, but for what is the default."""
    yield from request.spell()
    if origin["root"] is not None:
        yield from ("--root", str(origin["root"]))
    yield from ["--follow-links"] * origin["follow_links"]


def _short(path: str | os.PathLike[str]) -> str:
    """A path from here where it lies below."""
    here = os.getcwd()
    return os.path.relpath(path, here) if is_inside(os.path.normpath(path), here) else str(path)
