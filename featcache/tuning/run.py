"""A whole run, from a model and images to the model that is to be kept. Writes checkpoints, and no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featcache.backbones import Backbone
from featcache.backbones.cut import Tail
from featcache.backbones.tuned import network_tensors, tuned_identity
from featcache.evaluate.groups import find_groups
from featcache.evaluate.splits import Groups
from featcache.heads.temperature import fit_temperature
from featcache.images.paths import show_path
from featcache.interrupts import StopRequest
from featcache.model import Model, image_keys
from featcache.progress import Progress
from featcache.store.features import FeatureSet
from featcache.tuning.activations import Prepared
from featcache.tuning.checkpoint import Checkpoint, begun_from
from featcache.tuning.choose import Choice, choose_weights
from featcache.tuning.comparison import Comparison, Examination, Said
from featcache.tuning.grouping import groups_digest, needs_vectors
from featcache.tuning.network import TunedNetwork, Weights
from featcache.tuning.ranks import Message, Ranks
from featcache.tuning.rows import TuningRows, tuning_rows
from featcache.tuning.scoring import Computing
from featcache.tuning.settings import Settings
from featcache.tuning.start import linear_head, make_layer, random_layer, refit_head
from featcache.tuning.train import STOPPED, Trainer, TrainingState


@dataclass(frozen=True, kw_only=True, eq=False)
class Tuned:
    """What a run came to. model: to be kept; if `probe_kept`, the one to begin with, with a note of the run.

    comparison: None where the run was stopped.
    """

    model: Model
    probe_kept: bool
    choice: Choice
    state: TrainingState
    rows: TuningRows
    comparison: Comparison | None
    notes: tuple[str, ...]

    @property
    def stopped(self) -> bool:
        return self.state.why_ended == STOPPED


@dataclass(kw_only=True)
class TuningRun:
    """Trains the tail of a model's backbone and its head; `where` is the model's file, of this sha256.

    group_by: as `fit` takes it. checkpoint: the file that keeps the state of the run, every
    `checkpoint_seconds` and after each epoch.
    """

    model: Model
    where: Path
    sha256: str
    backbone: Backbone
    tail: Tail
    prepared: Prepared
    settings: Settings
    group_by: str | None = None
    ranks: Ranks
    progress: Progress
    checkpoint: Path
    checkpoint_seconds: float
    rows: TuningRows = field(init=False)

    def carry_out(self, stop: StopRequest, *, restart: bool) -> Tuned:
        """Train from the start, or from the checkpoint, to the weights to be kept.

        ModelError: the checkpoint is of another run. HeadError: no epoch ended before the loss was no number.
        """
        computing = Computing(self.prepared.source, self.ranks)
        self.rows = tuning_rows(self.prepared.images, self.model.classes, self._groups(computing))
        network = TunedNetwork(self.tail, self._start_layer(computing), self.settings)
        network.to(self.ranks.device).to(memory_format=torch.channels_last)
        start, run = network.copy_weights(), self._identity()
        trainer = Trainer(
            network,
            computing,
            self.rows,
            self.settings,
            ranks=self.ranks,
            progress=self.progress,
            save=lambda state: self._save(state, run),
            save_seconds=self.checkpoint_seconds,
        )
        probe = trainer.score()
        self.progress.note(
            f"at the start, on the {len(self.rows.choice):,} choice rows: accuracy {probe.accuracy:.4f}, "
            f"log-loss {probe.nll:.4f}; accuracy decides, and where it is the same, log-loss"
        )
        found = Message() if restart else self.ranks.from_first(lambda: self._load(run))
        if found.plain is not None:
            trainer.restore(Checkpoint(arrays=found.arrays, progress=found.plain))
            where = show_path(self.checkpoint)
            self.progress.note(f"goes on after step {trainer.state.step:,}, as {where} has it")
        trainer.run(stop)
        if trainer.state.why_ended == STOPPED:
            self._save(trainer.checkpoint(), run)
        choice = choose_weights(trainer, start, probe, progress=self.progress)
        return self._finish(network, computing, choice, trainer.state, start=start)

    # The start

    def _groups(self, computing: Computing) -> Groups | None:
        """Of all images, as the first rank finds them, by paths, a table or what the model's head gets."""
        by, images = self.group_by, self.prepared.images
        if by is None:
            return None
        if needs_vectors(by):
            self._place_tail()
            X = computing.over(np.arange(len(images)), self.tail, width=self.model.num_features)
            images = replace(images, X=X.astype(np.float32))

        def find() -> Message:
            groups = find_groups(by, images, progress=self.progress)
            return Message(arrays={"index": groups.index, "keys": groups.keys})

        found = self.ranks.from_first(find).arrays
        return Groups(index=found["index"], keys=found["keys"], by=by)

    def _place_tail(self) -> None:
        self.tail.to(self.ranks.device).to(memory_format=torch.channels_last)

    def _start_layer(self, computing: Computing) -> torch.nn.Linear:
        """The head to begin with, over all classes of the run."""
        n_classes, width = len(self.rows.classes), self.model.num_features
        if self.settings.start == "random":
            return random_layer(width, n_classes, seed=self.settings.seed)
        if self.settings.start == "model":
            weights, bias = linear_head(self.model, where=str(self.where)).as_linear()
            return make_layer(weights, bias, columns=range(len(self.model.classes)), n_classes=n_classes)
        y = self.rows.y[self.rows.train]
        self._place_tail()
        X = computing.over(self.rows.train, self.tail, width=width).astype(np.float32)
        fitted = self.ranks.from_first(lambda: self._refit(X, y)).arrays
        return make_layer(
            fitted["weights"], fitted["bias"], columns=np.unique(y).tolist(), n_classes=n_classes
        )

    def _refit(self, X: NDArray[np.float32], y: NDArray[np.int64]) -> Message:
        weights, bias = refit_head(self.model, X, y, where=str(self.where)).as_linear()
        return Message(arrays={"weights": weights, "bias": bias})

    # Checkpoints

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must be of to go on from: settings, model, images, source of activations."""
        run = {
            **begun_from(self.settings, model=self.sha256, ranks=self.ranks.count),
            "images": _images_digest(self.prepared.images),
            "groups": groups_digest(self.rows.groups),
            "cached": self.prepared.cached,
            "store_dtype": self.prepared.store_dtype,
        }
        same: dict[str, Any] = json.loads(json.dumps(run))
        return same

    def _load(self, run: Mapping[str, Any]) -> Message:
        found = Checkpoint.load(self.checkpoint, run=run)
        return Message() if found is None else Message(found.progress, found.arrays)

    def _save(self, state: Checkpoint, run: Mapping[str, Any]) -> None:
        if self.ranks.is_first:
            state.save(self.checkpoint, run=run)

    # The end

    def _finish(
        self,
        network: TunedNetwork,
        computing: Computing,
        choice: Choice,
        state: TrainingState,
        *,
        start: Weights,
    ) -> Tuned:
        """The model that is kept, compared with the one to begin with where training came to its end."""
        ended = state.why_ended != STOPPED
        rows = self.rows
        examination = Examination(self.prepared.images, rows.test, rows.groups)
        network.load_weights(start)
        before = self._say(self.model, computing) if ended else None
        network.load_weights(choice.weights)
        # A model that does not know all classes is no answer, even where training gained nothing.
        probe_kept = not choice.alpha and rows.classes == self.model.classes
        kept, temperature = self.model, None
        if not probe_kept:
            temperature = self._temperature(computing.scores(network, rows.choice))
            kept = self._tuned_model(network, choice, temperature)
        comparison = None
        if before is not None:
            comparison = examination.compare(before, None if probe_kept else self._say(kept, computing))
        metrics = self.model.metrics if probe_kept else self._metrics(comparison, state)
        record = self._record(choice, state, temperature=temperature)
        return Tuned(
            model=replace(kept, metrics=metrics, provenance={**kept.provenance, **record}),
            probe_kept=probe_kept,
            choice=choice,
            state=state,
            rows=rows,
            comparison=comparison,
            notes=rows.notes,
        )

    def _say(self, model: Model, computing: Computing) -> Said:
        """Of the test rows, by the weights that the network has now."""
        X = computing.over(self.rows.test, self.tail, width=model.num_features)
        return Said(model, model.predict_proba(X.astype(np.float32)))

    def _temperature(self, scores: NDArray[np.float64]) -> float:
        y = self.rows.y[self.rows.choice]
        return fit_temperature(scores[y >= 0], y[y >= 0])

    def _metrics(self, comparison: Comparison | None, state: TrainingState) -> dict[str, Any]:
        """What the model file says of the rows that were scored."""
        scored: dict[str, Any] = {}
        if comparison is not None:
            scored = {**comparison.kept.to_json(), "scored_on": self.rows.scored_on}
        if state.curve:
            scored["train_accuracy"] = state.curve[-1].accuracy
        return scored

    def _tuned_model(self, network: TunedNetwork, choice: Choice, temperature: float) -> Model:
        """The weights the network has now as a model that brings its own network."""
        identity = tuned_identity(self.backbone, label=f"fine-tuned from {self.where.name}")
        head = network.head
        return Model(
            head_name="linear",
            params={},
            arrays={
                "coef": head.weight.detach().cpu().double().numpy() / temperature,
                "intercept": head.bias.detach().cpu().double().numpy() / temperature,
            },
            rest={},
            classes=self.rows.classes,
            spec=replace(
                self.model.spec,
                weights_sha256=identity.sha256,
                nodes=self.model.nodes,
                compute_dtype="float32",
                store_dtype="float32",
                views=1,
            ),
            nodes=self.model.nodes,
            provenance={**self.model.provenance, "weights": asdict(identity)},
            metrics={},
            chosen={
                "by": "accuracy, then log-loss, on the choice rows",
                "candidates": choice.to_json()["choice"],
            },
            network=network_tensors(self.backbone.module),
            trained_on=np.union1d(self.model.trained_on, self._images_seen()),
        )

    def _record(self, choice: Choice, state: TrainingState, *, temperature: float | None) -> dict[str, Any]:
        """What the model file says of this fine-tuning and of those before it.

        temperature: of the head that was trained; None where the model to begin with is kept.
        """
        tuned = {
            "from": self.where.name,
            "weights": dict(self.model.weights),
            "settings": self.settings.to_json(),
            "blocks": list(self.tail.blocks),
            "epochs": state.epoch,
            "best_epoch": state.best_epoch,
            "temperature": temperature,
            "probe_kept": temperature is None,
            **choice.to_json(),
        }
        before = [dict(one) for one in self.model.tunings]
        return {"tuned": tuned, "tuned_before": before} if before else {"tuned": tuned}

    def _images_seen(self) -> NDArray[np.uint64]:
        """Of the images that were trained on, and of those on which the weights were chosen."""
        seen = np.concatenate([self.rows.train, self.rows.choice])
        return image_keys(self.prepared.images.sha256[seen])


def _images_digest(images: FeatureSet) -> str:
    """Of all that the images of a run contribute: names, labels, splits and bytes."""
    digest = hashlib.sha256(json.dumps([images.ids, images.classes, images.splits.tolist()]).encode())
    digest.update(images.y.astype("<i8").tobytes() + np.ascontiguousarray(images.sha256).tobytes())
    return digest.hexdigest()
