"""`featcache export`: a fitted model, or the features of a store, for those who have no featcache.

Every file is read back by the tools it is for, and answers as featcache does, before it gets its name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.disk import disk_errors, whole_or_nothing
from featcache.errors import ExportError, ModelError, NotAStore
from featcache.exporting import Format, choose_output, find_format, require_libraries
from featcache.exporting.agreement import Agreement, prove
from featcache.exporting.card import SIGN, Written, write_card
from featcache.exporting.pictures import gather_pictures
from featcache.exporting.subject import PIXELS, Pixels, Subject
from featcache.images.paths import show_path
from featcache.inference import load_network
from featcache.model import Model
from featcache.outputs import require_exported, require_own, require_replaceable, turn_in
from featcache.progress import Progress, SilentProgress
from featcache.store.reader import FeatureStore
from featcache.words import plural


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """The file that was written, and how it was found to agree with featcache.

    card: the Markdown beside it. agreement: of a model. rows: of the features of a store.
    """

    path: str
    format: str
    bytes: int
    card: str | None = None
    agreement: Agreement | None = None
    rows: int | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.path,
            "format": self.format,
            "bytes": self.bytes,
            "card": self.card,
            "agreement": self.agreement.to_json() if self.agreement else None,
            "rows": self.rows,
            "notes": list(self.notes),
        }

    def describe(self) -> str:
        what = f"{show_path(self.path)}: {self.format}, {self.bytes / 1e6:.1f} MB"
        if self.rows is not None:
            what += f", {plural(self.rows, 'row')}, read back and equal"
        lines = [what, *([self.agreement.describe()] if self.agreement else [])]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, *([f"how to read it: {show_path(self.card)}"] if self.card else [])])


def export(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    to: str,
    pixels: Pixels | None = None,
    images: Sequence[str | os.PathLike[str]] = (),
    weights: str | None = None,
    backbone: str | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Write `source`, a model file or for `to="features"` a store, in another format.

    output: the name of `source` with the ending of the format by default. pixels: what a graph takes, "uint8"
    or "float". images: files and folders to check a model on; without any, some of those it was made from, or
    seeded ones. weights, backbone: as `predict` takes them.

    ExportError: the format cannot hold the model, or the file does not answer as featcache does; no file is
    left then. ModelError, StoreError, BackboneError, DataError, DiskError: what stands in the way.
    """
    row = find_format(to)
    if pixels is not None and pixels not in PIXELS:
        raise ValueError(f"pixels is one of {', '.join(PIXELS)}, not {pixels!r}")
    if row.holds == "features" and (pixels or images or weights or backbone):
        raise ExportError(
            f"{row.name} are read from a store as they are: leave --input, --images, --weights and "
            "--backbone away."
        )
    if pixels is not None and not row.chooses_input:
        raise ExportError(f"{row.name} files hold no preprocessing: leave --input away, or export --to onnx.")
    path = choose_output(row, Path(source), None if output is None else Path(output))
    require_replaceable(path, option="--output", needed={})
    require_libraries(row, path.suffix)
    if row.holds == "features":
        return _export_features(Path(source), path, row)
    fitted, where = Model.load(source), show_path(Path(source))
    network = load_network(fitted, where=where, weights=weights, allowed=backbone)
    weights_file = Path(network.weights.path) if network.weights.path else None
    require_replaceable(path, option="--output", needed={"the weights file of its network": weights_file})
    require_exported(path, _card_of(path), sign=SIGN, option="--output")
    subject = Subject(where=where, model=fitted, backbone=network, pixels=pixels or "uint8")
    return _export_model(
        subject, path, row, images=[Path(image) for image in images], progress=progress or SilentProgress()
    )


def _export_model(
    subject: Subject, path: Path, row: Format, *, images: Sequence[Path], progress: Progress
) -> ExportResult:
    module = row.load()
    progress.start("exporting", total=3, unit="steps")
    pictures = gather_pictures(subject.model, images)
    progress.advance(1)
    data = module.encode(subject)
    progress.advance(1)
    card = _card_of(path)
    # Both are written before one has its name, and nobody's come between them: no file has another's card.
    # The card is named first: what a run that is killed in between leaves is known by it, and is replaced.
    with ExitStack() as turn, whole_or_nothing(path) as temporary, whole_or_nothing(card) as card_temporary:
        with disk_errors(path, doing="writing"):
            temporary.write_bytes(data)
        proof = prove(subject, module.load(temporary, subject), pictures, rounds=row.rounds)
        written = Written(
            name=path.name,
            sha256=hashlib.sha256(data).hexdigest(),
            recipe=module.recipe(subject, path.name),
        )
        with disk_errors(card, doing="writing"):
            card_temporary.write_bytes(write_card(subject, row, written, proof).encode())
        turn.enter_context(turn_in(path.parent))
    progress.advance(1)
    progress.finish()
    return ExportResult(
        path=str(path),
        format=row.name,
        bytes=len(data),
        card=str(card),
        agreement=proof.agreement,
        notes=proof.notes,
    )


def _card_of(path: Path) -> Path:
    return path.with_name(path.name + ".md")


def _export_features(source: Path, path: Path, row: Format) -> ExportResult:
    from featcache.exporting.features import Table, export_table, is_export

    require_own(path, is_export, what=f"{path.suffix} export", option="--output")
    try:
        store = FeatureStore.open(source)
    except NotAStore as error:
        raise _of_another_kind(source, row) or error from error
    table = Table.of_store(store)
    with whole_or_nothing(path) as temporary, disk_errors(path, doing="writing"):
        export_table(table, path, temporary=temporary)
    return ExportResult(path=str(path), format=row.name, bytes=path.stat().st_size, rows=len(table))


def _of_another_kind(source: Path, row: Format) -> ExportError | None:
    """What to say where `source` is a model; None where it is nothing of ours."""
    try:
        model = Model.load(source)
    except ModelError:
        return None
    shown, weights = show_path(source), show_path(source.with_suffix(".safetensors"))
    own = (
        f" A store of its fine-tuned network: featcache export {shown} --to torchvision -o {weights}, and "
        f"embed with --backbone {model.spec.backbone} --weights {weights}."
    )
    return ExportError(
        f"{shown} is a model, and {row.name} are those of a store: name the store, or export the model --to "
        "another format." + (own if model.network and ":" not in model.spec.backbone else "")
    )
