"""The loop: steps over the training rows, a look at the choice rows after each epoch, the best weights kept.

Whatever is drawn follows from the seed, the epoch and the step, so that a run that was stopped and goes on
from its checkpoint takes the same steps. Knows neither files of images nor how activations are come by.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from featcache.errors import HeadError
from featcache.interrupts import StopRequest
from featcache.progress import Progress
from featcache.tuning.average import update_average
from featcache.tuning.checkpoint import Checkpoint
from featcache.tuning.network import TunedNetwork, Weights
from featcache.tuning.ranks import Ranks
from featcache.tuning.rows import TuningRows
from featcache.tuning.schedule import Schedule
from featcache.tuning.scoring import Computing, Score
from featcache.tuning.settings import Settings
from featcache.tuning.sources import Batch
from featcache.words import plural

STOPPED = "stopped"

_NOTE_SECONDS = 60.0  # between two lines on how an epoch goes


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """A row of the curve. loss, accuracy: of the training rows, as they were met."""

    epoch: int
    steps: int
    loss: float
    accuracy: float
    choice_loss: float  # of the choice rows
    choice_accuracy: float
    lr: float
    head_lr: float
    seconds: float


@dataclass(kw_only=True)
class TrainingState:
    """How far a run is. `best` and what belongs to it are None until an epoch was finished."""

    epoch: int = 0  # epochs finished
    step: int = 0  # steps finished, of all epochs
    loss_sum: float = 0.0  # of the epoch in work
    hits: float = 0.0
    seen: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # one a step
    curve: list[Epoch] = field(default_factory=list)
    best: Weights | None = None
    best_score: Score | None = None
    best_epoch: int = 0
    why_ended: str = ""


class Diverged(HeadError):
    """The loss is no number any more."""


class Trainer:
    """Trains a network on the activations of a source; `state` is what it came to.

    save: called with a checkpoint at the end of an epoch, and every `save_seconds` within one.
    """

    def __init__(
        self,
        network: TunedNetwork,
        computing: Computing,
        rows: TuningRows,
        settings: Settings,
        *,
        ranks: Ranks,
        progress: Progress,
        save: Callable[[Checkpoint], None],
        save_seconds: float,
    ) -> None:
        self.network, self.computing, self.rows, self.settings = network, computing, rows, settings
        self.ranks, self.progress = ranks, progress
        self.state = TrainingState()
        self._save, self._save_seconds = save, save_seconds
        self._train = rows.train[rows.y[rows.train] >= 0]
        self._steps_an_epoch = -(-len(self._train) // settings.batch_size)
        self._schedule = Schedule.of(settings, steps_an_epoch=self._steps_an_epoch)
        self._groups = network.groups(settings)
        self._highest = [group["lr"] for group in self._groups]
        self._optimizer = torch.optim.AdamW(self._groups)
        self._wrapped = ranks.wrap(network)
        self._average = network.copy_weights() if settings.ema else None

    def run(self, stop: StopRequest) -> None:
        """Train until the last epoch, until the choice rows no longer gain, or until a signal asks to stop.

        Diverged: before any epoch was finished. Later it only ends the training.
        """
        state, settings = self.state, self.settings
        total = settings.epochs * len(self._train)
        self.progress.start("fine-tuning", total=total, unit="images")
        self.progress.advance(state.epoch * len(self._train) + state.seen)
        try:
            while not state.why_ended:
                self._run_epoch(stop)
        except Diverged as error:
            if state.best is None:
                raise
            state.why_ended = str(error)
        finally:
            self.progress.finish()

    def score_weights(self, weights: Mapping[str, Tensor]) -> Score:
        """How good these weights are on the choice rows; the network keeps them."""
        self.network.load_weights(weights)
        return self.score()

    def score(self) -> Score:
        """How good the network is as it is on the choice rows."""
        rows = self.rows.choice
        return Score.of(self.computing.scores(self.network, rows), self.rows.y[rows])

    def checkpoint(self) -> Checkpoint:
        """The state as it is now, between two steps."""
        parts: dict[str, Mapping[str, Tensor]] = {"now": self.network.weights()}
        if self._average is not None:
            parts["average"] = self._average
        if self.state.best is not None:
            parts["best"] = self.state.best
        for index, moments in self._optimizer.state_dict()["state"].items():
            parts[f"adam.{index}"] = moments
        arrays = {
            f"{part}/{name}": tensor.detach().cpu().numpy()
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }
        plain = {
            **{name: getattr(self.state, name) for name in _PLAIN},
            "why_ended": "" if self.state.why_ended == STOPPED else self.state.why_ended,
            "curve": [asdict(epoch) for epoch in self.state.curve],
            "best_score": self._best_score(),
        }
        return Checkpoint(arrays=arrays, progress=plain)

    def _best_score(self) -> dict[str, float] | None:
        found = self.state.best_score
        return {"accuracy": found.accuracy, "nll": found.nll} if found else None

    def restore(self, found: Checkpoint) -> None:
        """Go on from a checkpoint of this run."""
        parts: dict[str, dict[str, NDArray[Any]]] = {}
        for name, array in found.arrays.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = array
        weights = self.network.weights()

        def as_weights(part: str) -> Weights:
            return {name: _laid_out_like(weights[name], array) for name, array in parts[part].items()}

        self.network.load_weights(as_weights("now"))
        if self._average is not None:
            self._average = as_weights("average")
        parameters = [each for group in self._optimizer.param_groups for each in group["params"]]
        moments = {
            index: {name: _laid_out_like(each, array) for name, array in parts[f"adam.{index}"].items()}
            for index, each in enumerate(parameters)
            if f"adam.{index}" in parts
        }
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})
        plain = dict(found.progress)
        curve, best_score = plain.pop("curve"), plain.pop("best_score")
        self.state = TrainingState(
            **plain,
            curve=[Epoch(**row) for row in curve],
            best=as_weights("best") if "best" in parts else None,
            best_score=Score(**best_score) if best_score else None,
        )

    # One epoch

    def _run_epoch(self, stop: StopRequest) -> None:
        state = self.state
        begun, saved, told = time.monotonic(), time.monotonic(), time.monotonic()
        batches = self._batches(state.epoch)[state.step - state.epoch * self._steps_an_epoch :]
        own = [self._share(batch) for batch in batches]
        self.network.training_mode(True)
        stream = self.computing.source.stream([Batch(rows, state.epoch) for rows, _ in own])
        with closing(stream):
            for batch, (rows, weight), activations in zip(batches, own, stream, strict=True):
                stopping = self._step(activations, rows, weight, len(batch), stop=stop.requested)
                self.progress.advance(len(batch))
                now = time.monotonic()
                if stopping:
                    state.seconds += now - begun
                    state.why_ended = STOPPED
                    return
                if now - saved >= self._save_seconds:
                    state.seconds, begun, saved = state.seconds + now - begun, now, now
                    self._save(self.checkpoint())
                if now - told >= _NOTE_SECONDS:
                    told = now
                    self._tell(f"step {state.step:,} of {self._schedule.steps:,}", self._means())
        state.seconds += time.monotonic() - begun
        self._end_epoch()
        self._save(self.checkpoint())

    def _step(
        self, activations: Tensor, rows: NDArray[np.int64], weight: float, size: int, *, stop: bool
    ) -> bool:
        """One step over `size` rows of all ranks, `rows` of this one; whether any rank is to stop."""
        state, settings = self.state, self.settings
        for group, highest in zip(self._optimizer.param_groups, self._highest, strict=True):
            group["lr"] = highest * self._schedule.factor(state.step)
        targets = torch.from_numpy(self.rows.y[rows]).to(activations.device)
        mixing = self._mixing(len(rows))
        self._optimizer.zero_grad(set_to_none=True)
        reduced = settings.precision != "float32"
        with torch.autocast(activations.device.type, getattr(torch, settings.precision), enabled=reduced):
            scores = self._wrapped(mixing.mix(activations))
        loss_sum = weight * mixing.loss(scores.float(), targets, smoothing=settings.label_smoothing)
        torch.autograd.backward(loss_sum * (self.ranks.count / size))  # ranks average their gradients
        hits = weight * (scores.argmax(dim=1) == targets).sum()
        told = torch.stack([loss_sum.detach(), hits.float(), torch.tensor(float(stop), device=hits.device)])
        total_loss, total_hits, stops = self.ranks.add_up(told).tolist()
        self._require_finite(total_loss / size)
        if settings.clip:
            norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip)
            self._require_finite(norm.item(), what="gradient")
        self._optimizer.step()
        self._agree_on_statistics()
        if self._average is not None:
            update_average(self._average, self.network.weights(), decay=settings.ema, step=state.step)
        state.step += 1
        state.losses.append(total_loss / size)
        state.loss_sum, state.hits, state.seen = (
            state.loss_sum + total_loss,
            state.hits + total_hits,
            state.seen + size,
        )
        return bool(stops)

    def _end_epoch(self) -> None:
        state, settings = self.state, self.settings
        loss, accuracy = self._means()
        now = self.network.copy_weights()
        weights = now if self._average is None else self._average
        score = self.score_weights(weights)
        self.network.load_weights(now)
        if not math.isfinite(score.nll):
            raise Diverged(self._diverged("log-loss on the choice rows", score.nll))
        state.epoch += 1
        rates = [group["lr"] for group in self._optimizer.param_groups]
        state.curve.append(
            Epoch(
                epoch=state.epoch,
                steps=state.step,
                loss=loss,
                accuracy=accuracy,
                choice_loss=score.nll,
                choice_accuracy=score.accuracy,
                lr=max(rates[:-2]),
                head_lr=rates[-1],
                seconds=state.seconds,
            )
        )
        state.loss_sum, state.hits, state.seen = 0.0, 0.0, 0
        lead = score.lead_over(state.best_score)
        if lead:
            state.best = {name: tensor.detach().clone() for name, tensor in weights.items()}
            state.best_score, state.best_epoch = score, state.epoch
        said = f"; choice rows: accuracy {score.accuracy:.4f}, log-loss {score.nll:.4f}"
        said += f", best epoch so far {lead}" if lead and state.epoch > 1 else ""
        self._tell(f"epoch {state.epoch} of {settings.epochs}", (loss, accuracy), said)
        if state.epoch >= settings.epochs:
            state.why_ended = "all epochs done"
        elif state.epoch - state.best_epoch >= settings.patience:
            state.why_ended = f"no better on the choice rows for {plural(settings.patience, 'epoch')}"

    def _agree_on_statistics(self) -> None:
        """Each rank has met other rows, and those of one rank alone are kept."""
        moving = self.network.moving
        if self.ranks.count == 1 or not moving:
            return
        together = self.ranks.average(torch.cat([buffer.flatten() for buffer in moving]))
        parts = torch.split(together, [buffer.numel() for buffer in moving])
        for buffer, part in zip(moving, parts, strict=True):
            buffer.copy_(part.view_as(buffer))

    def _batches(self, epoch: int) -> list[NDArray[np.int64]]:
        order = np.random.default_rng([self.settings.seed, epoch, 0]).permutation(self._train)
        size = self.settings.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _share(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], float]:
        """This rank's rows of a batch; a row that does not count where there is none for it."""
        own = rows[self.ranks.rank :: self.ranks.count]
        return (own, 1.0) if len(own) else (rows[:1], 0.0)

    def _mixing(self, rows: int) -> _Mixing:
        if not self.settings.mixup:
            return _Mixing()
        draw = np.random.default_rng([self.settings.seed, self.state.epoch, self.state.step, 2])
        share = float(draw.beta(self.settings.mixup, self.settings.mixup))
        return _Mixing(share=max(share, 1 - share), other=torch.from_numpy(draw.permutation(rows)))

    def _means(self) -> tuple[float, float]:
        seen = max(self.state.seen, 1)
        return self.state.loss_sum / seen, self.state.hits / seen

    def _require_finite(self, value: float, *, what: str = "loss") -> None:
        if not math.isfinite(value):
            raise Diverged(self._diverged(what, value))

    def _diverged(self, what: str, value: float) -> str:
        lr, head_lr = (max(self._highest[:-2]), self._highest[-1])
        return (
            f"the {what} is {value} at step {self.state.step + 1:,} of {self._schedule.steps:,}, with --lr "
            f"{lr:g} and --head-lr {head_lr:g}: pass lower ones, or a lower --clip"
        )

    def _tell(self, where: str, means: tuple[float, float], more: str = "") -> None:
        rates = [group["lr"] for group in self._optimizer.param_groups]
        said = f"{where}: training rows: loss {means[0]:.4f}, accuracy {means[1]:.4f}{more}"
        self.progress.note(f"{said}; lr {max(rates[:-2]):.1e}, of the head {rates[-1]:.1e}")


def _laid_out_like(parameter: Tensor, array: NDArray[Any]) -> Tensor:
    """The array as a tensor that lies in memory as one of this parameter's does.

    Sums over tensors that lie otherwise may round otherwise, and a run is to go on to the same bits.
    """
    found = torch.from_numpy(array.copy())
    if found.shape != parameter.shape:  # the count of steps
        return found.to(parameter.device)
    return torch.empty_like(parameter.detach()).copy_(found)


_PLAIN = (*("epoch", "step", "loss_sum", "hits", "seen", "seconds", "losses", "best_epoch", "why_ended"),)


@dataclass(frozen=True)
class _Mixing:
    """Pairs of rows and their labels, mixed (Zhang et al., "mixup", ICLR 2018); none without `other`."""

    share: float = 1.0  # of the row itself
    other: Tensor | None = None

    def mix(self, activations: Tensor) -> Tensor:
        if self.other is None:
            return activations
        return self.share * activations + (1 - self.share) * activations[self.other]

    def loss(self, scores: Tensor, targets: Tensor, *, smoothing: float) -> Tensor:
        """The sum over the rows."""
        own = functional.cross_entropy(scores, targets, reduction="sum", label_smoothing=smoothing)
        if self.other is None:
            return own
        others = targets[self.other]
        mixed = functional.cross_entropy(scores, others, reduction="sum", label_smoothing=smoothing)
        return self.share * own + (1 - self.share) * mixed
