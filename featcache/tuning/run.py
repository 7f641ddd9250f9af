"""A whole run, from a model and images to the model that is to be kept. Writes checkpoints, and no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from featcache.backbones import Backbone
from featcache.backbones.cut import Tail
from featcache.backbones.tuned import network_tensors, tuned_identity
from featcache.disk import open_regular
from featcache.evaluate.metrics import Metrics, score
from featcache.heads.temperature import fit_temperature
from featcache.interrupts import StopRequest
from featcache.model import Model, image_keys
from featcache.progress import Progress
from featcache.store.features import FeatureSet
from featcache.tuning.activations import Prepared
from featcache.tuning.checkpoint import Checkpoint
from featcache.tuning.choose import Choice, choose_weights
from featcache.tuning.network import TunedNetwork
from featcache.tuning.ranks import Ranks
from featcache.tuning.rows import TuningRows, tuning_rows
from featcache.tuning.scoring import Computing
from featcache.tuning.settings import Settings
from featcache.tuning.start import linear_head, make_layer, random_layer, refit_head
from featcache.tuning.train import STOPPED, Trainer, TrainingState


@dataclass(frozen=True, kw_only=True, eq=False)
class Tuned:
    """What a run came to. model: to be kept; metrics: of its test rows, None where the run was stopped."""

    model: Model
    choice: Choice
    state: TrainingState
    rows: TuningRows
    metrics: Metrics | None
    notes: tuple[str, ...]

    @property
    def stopped(self) -> bool:
        return self.state.why_ended == STOPPED


@dataclass(kw_only=True)
class TuningRun:
    """Trains the tail of a model's backbone and its head; `where` is the model's file.

    checkpoint: the file that keeps the state of the run, every `checkpoint_seconds` and after each epoch.
    """

    model: Model
    where: Path
    backbone: Backbone
    tail: Tail
    prepared: Prepared
    settings: Settings
    ranks: Ranks
    progress: Progress
    checkpoint: Path
    checkpoint_seconds: float
    rows: TuningRows = field(init=False)

    def carry_out(self, stop: StopRequest, *, restart: bool) -> Tuned:
        """Train from the start, or from the checkpoint, to the weights to be kept.

        ModelError: the checkpoint is of another run. HeadError: no epoch ended before the loss was no number.
        """
        self.rows = tuning_rows(self.prepared.images, self.model.classes)
        if self.model.network and self.settings.start == "refit":
            # Its head was trained together with its network, and without val rows.
            self.settings = replace(self.settings, start="model")
        computing = Computing(self.prepared.source, self.ranks)
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
        probe = trainer.score(self.rows.val)
        self.progress.note(f"at the start: val accuracy {probe.accuracy:.4f}, val log-loss {probe.nll:.4f}")
        found = None if restart else self.ranks.from_first(lambda: Checkpoint.load(self.checkpoint, run=run))
        if found is not None:
            trainer.restore(found)
            self.progress.note(f"goes on after step {trainer.state.step:,}, as {self.checkpoint} has it")
        trainer.run(stop)
        if trainer.state.why_ended == STOPPED:
            self._save(trainer.checkpoint(), run)
        choice = choose_weights(trainer, start, probe, progress=self.progress)
        return self._finish(network, computing, choice, trainer.state)

    # The start

    def _start_layer(self, computing: Computing) -> torch.nn.Linear:
        """The head to begin with, over all classes of the run."""
        n_classes, width = len(self.rows.classes), self.model.num_features
        if self.settings.start == "random":
            return random_layer(width, n_classes, seed=self.settings.seed)
        if self.settings.start == "model":
            weights, bias = linear_head(self.model, where=str(self.where)).as_linear()
            return make_layer(weights, bias, columns=range(len(self.model.classes)), n_classes=n_classes)
        y = self.rows.y[self.rows.train]
        self.tail.to(self.ranks.device).to(memory_format=torch.channels_last)
        X = computing.over(self.rows.train, self.tail, width=width).astype(np.float32)
        weights, bias = self.ranks.from_first(
            lambda: refit_head(self.model, X, y, where=str(self.where)).as_linear()
        )
        return make_layer(weights, bias, columns=np.unique(y).tolist(), n_classes=n_classes)

    # Checkpoints

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must be of to go on from: settings, model, images, source of activations."""
        with open_regular(self.where) as file:
            model = hashlib.sha256(file.read()).hexdigest()
        run = {
            **self.settings.to_json(),
            "model": model,
            "images": _images_digest(self.prepared.images),
            "cached": self.prepared.cached,
            "store_dtype": self.prepared.store_dtype,
            "ranks": self.ranks.count,
        }
        same: dict[str, Any] = json.loads(json.dumps(run))
        return same

    def _save(self, state: Checkpoint, run: Mapping[str, Any]) -> None:
        if self.ranks.is_first:
            state.save(self.checkpoint, run=run)

    # The end

    def _finish(
        self, network: TunedNetwork, computing: Computing, choice: Choice, state: TrainingState
    ) -> Tuned:
        network.load_weights(choice.weights)
        rows, scores_test = self.rows, state.why_ended != STOPPED
        kept, metrics = self.model, None
        # A model that does not know all classes is no answer, even where training gained nothing.
        if choice.alpha or rows.classes != self.model.classes:
            temperature = self._temperature(computing.scores(network, rows.val))
            if scores_test:
                scores = computing.scores(network, rows.test)
                metrics = self._metrics(softmax(scores / temperature, axis=1), rows.classes)
            kept = self._tuned_model(network, choice, state, temperature, metrics)
        elif scores_test:
            X = computing.over(rows.test, self.tail, width=self.model.num_features).astype(np.float32)
            metrics = self._metrics(self.model.predict_proba(X), self.model.classes)
        return Tuned(model=kept, choice=choice, state=state, rows=rows, metrics=metrics, notes=rows.notes)

    def _temperature(self, scores: NDArray[np.float64]) -> float:
        y = self.rows.y[self.rows.val]
        return fit_temperature(scores[y >= 0], y[y >= 0])

    def _metrics(self, probabilities: NDArray[np.float64], classes: Sequence[str]) -> Metrics:
        """Of the test rows, over the classes of the data as well as the model's."""
        images, rows = self.prepared.images, self.rows.test
        joined = (*images.classes, *(name for name in classes if name not in images.classes))
        table = np.zeros((len(rows), len(joined)))
        table[:, [joined.index(name) for name in classes]] = probabilities
        return score(images.y[rows], table, joined, [images.ids[row] for row in rows.tolist()])

    def _tuned_model(
        self,
        network: TunedNetwork,
        choice: Choice,
        state: TrainingState,
        temperature: float,
        metrics: Metrics | None,
    ) -> Model:
        """The weights the network has now as a model that brings its own network."""
        identity = tuned_identity(self.backbone, label=f"fine-tuned from {self.where.name}")
        head = network.head
        tuned = {
            "from": self.where.name,
            "weights": dict(self.model.weights),
            "settings": self.settings.to_json(),
            "blocks": list(self.tail.blocks),
            "epochs": state.epoch,
            "best_epoch": state.best_epoch,
            "temperature": temperature,
            **choice.to_json(),
        }
        scored = {} if metrics is None else {**metrics.to_json(), "scored_on": self.rows.scored_on}
        if state.curve:
            scored["train_accuracy"] = state.curve[-1].accuracy
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
            provenance={**self.model.provenance, "weights": asdict(identity), "tuned": tuned},
            metrics=scored,
            chosen={"by": "accuracy, then log-loss, on val rows", "candidates": tuned["val"]},
            network=network_tensors(self.backbone.module),
            trained_on=np.union1d(self.model.trained_on, self._images_seen()),
        )

    def _images_seen(self) -> NDArray[np.uint64]:
        """Of the images that were trained on, and of those on which the weights were chosen."""
        seen = np.concatenate([self.rows.train, self.rows.val])
        return image_keys(self.prepared.images.sha256[seen])


def _images_digest(images: FeatureSet) -> str:
    """Of all that the images of a run contribute: names, labels, splits and bytes."""
    digest = hashlib.sha256(json.dumps([images.ids, images.classes, images.splits.tolist()]).encode())
    digest.update(images.y.astype("<i8").tobytes() + np.ascontiguousarray(images.sha256).tobytes())
    return digest.hexdigest()
