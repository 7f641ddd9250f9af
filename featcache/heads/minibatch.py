"""Small networks trained side by side by minibatches of AdamW: every fold and every candidate in one run.

Knows networks as stacks of tensors, F training sets by C candidates, and rows as arrays; nothing of heads,
and of folds only their rows. torch is imported when a training starts, not before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from threading import Event
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featcache.heads.batches import STEP_ROWS, Step, Walk
from featcache.heads.standardize import CHUNK_VALUES, Standardizer
from featcache.processors import usable_processors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WARM_UP = 0.05  # of the steps: the learning rate rises to its peak, then falls to 0 as a cosine


class Network(Protocol):
    """The shape of the networks of a stack."""

    @property
    def noise_width(self) -> int:
        """Uniform numbers that the forward pass of training needs for each row."""
        ...

    def size(self, n_features: int, n_classes: int) -> int:
        """Weights of one network."""
        ...

    def start(self, n_features: int, n_classes: int, generator: torch.Generator) -> list[Tensor]:
        """The tensors of one network before training: matrices, which decay, and vectors, which do not. The
        last is the intercept of each class."""
        ...

    def scores(self, weights: Sequence[Tensor], Z: Tensor, noise: Tensor | None) -> Tensor:
        """(F, C, K, B) of rows (F, B, D) by weights (F, C, …); noise: (noise_width, B), None to predict.

        The rows come last, so that products and sums need no copy in another order, here and in their
        gradients.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the networks of a stack have in common, and lr and weight_decay, (C,), in which they differ."""

    lr: NDArray[np.float64]
    weight_decay: NDArray[np.float64]
    batch_size: int
    label_smoothing: float
    seed: int


class Rows:
    """Feature vectors by index and view, standardised as each of F training sets asks.

    They are read where they are, a step at a time; on a CUDA device that has room for them, they are copied
    there once.
    """

    def __init__(
        self, arrays: Sequence[NDArray[Any]], standardizers: Sequence[Standardizer], device: torch.device
    ) -> None:
        import torch

        self.arrays, self.device = arrays, device
        self.dtype = np.result_type(*arrays)
        # Of float64 features the mean is taken before they are rounded: it may be far above their deviation.
        wide = torch.float64 if self.dtype == np.float64 else torch.float32
        self.mean = torch.from_numpy(np.stack([s.mean for s in standardizers])).to(device, wide)
        self.scale = torch.from_numpy(np.stack([s.scale for s in standardizers])).to(device, wide)
        self.table: Tensor | None = None
        if device.type == "cuda":
            size = sum(array.size for array in arrays) * self.dtype.itemsize
            if size < torch.cuda.mem_get_info(device)[0] // 2:
                self.table = torch.stack(
                    [torch.from_numpy(array.astype(self.dtype)).to(device) for array in arrays]
                )

    def take(self, index: NDArray[np.intp], view: NDArray[np.intp], *, sets: slice = slice(None)) -> Tensor:
        """Z, (F, B, D), of index and view, (F, B); F are the training sets in `sets`."""
        import torch

        raw = self._gather(index, view)
        centred = raw.to(self.mean.dtype) - self.mean[sets, None]
        return centred.div_(self.scale[sets, None]).to(torch.float32)

    def _gather(self, index: NDArray[np.intp], view: NDArray[np.intp]) -> Tensor:
        import torch

        if self.table is not None:
            where = torch.from_numpy(np.stack([view, index])).to(self.device)
            return self.table[where[0], where[1]]
        if len(self.arrays) == 1:
            return torch.from_numpy(np.ascontiguousarray(self.arrays[0][index])).to(self.device)
        taken = np.empty((*index.shape, self.arrays[0].shape[1]), dtype=self.dtype)
        for v in np.unique(view):
            taken[view == v] = self.arrays[v][index[view == v]]
        return torch.from_numpy(taken).to(self.device)


class Stack:
    """Networks of one shape, C for each of F training sets, and their training.

    codes: (n_samples,) of all rows. class_weights: (F, K). counts: (F, K), rows of each class in each set;
    intercepts start where they give these frequencies, which few steps could not reach. The gradient of a
    network touches its own tensors only, so that each is what it would be if it were trained alone with the
    same seed.
    """

    def __init__(
        self,
        network: Network,
        rows: Rows,
        codes: NDArray[np.intp],
        *,
        class_weights: NDArray[np.float64],
        counts: NDArray[np.int64],
        recipe: Recipe,
    ) -> None:
        import torch

        self.network, self.rows, self.recipe = network, rows, recipe
        self.codes = torch.from_numpy(codes.astype(np.int64)).to(rows.device)
        self.class_weights = torch.from_numpy(class_weights).to(rows.device, torch.float32)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        n_sets, n_classes = class_weights.shape
        first = network.start(rows.arrays[0].shape[1], n_classes, self.generator)
        many = [one.expand(n_sets, len(recipe.lr), *one.shape).clone().to(rows.device) for one in first]
        frequent = class_weights * np.maximum(counts, 1)  # (F, K)
        many[-1] += torch.from_numpy(np.log(frequent / frequent.sum(axis=1, keepdims=True))).to(many[-1])[
            :, None
        ]
        self.weights = [one.requires_grad_() for one in many]

    def train(self, walk: Walk, stop: Event) -> None:
        """Every step of the walk, for all networks at once, or as many as are taken when `stop` is set."""
        import torch

        optimizer, total = _AdamW(self.weights, self.recipe), walk.n_steps()
        for t, step in enumerate(walk.steps()):
            if stop.is_set():
                return
            for Z, targets, noise in self._pieces(step):
                scores = self.network.scores(self.weights, Z, noise)
                log_p = torch.nn.functional.log_softmax(scores, dim=2)  # (F, C, K, B)
                torch.autograd.backward(-(log_p * targets.unsqueeze(1)).sum())
            optimizer.step([_factor(t, int(steps)) for steps in total])

    def scores(self, f: int, index: NDArray[np.intp]) -> NDArray[np.float32]:
        """Of these rows of X by the networks of training set f, (C, n, K); all 0 where one diverged."""
        import torch

        one = slice(f, f + 1)
        weights = [weight[one] for weight in self.weights]
        step = max(CHUNK_VALUES // self.rows.arrays[0].shape[1], 1)
        parts = []
        with torch.inference_mode():
            for start in range(0, len(index), step):
                some = index[None, start : start + step]
                Z = self.rows.take(some, np.zeros_like(some), sets=one)
                parts.append(self.network.scores(weights, Z, None)[0].mT.cpu().numpy())
        scores = np.concatenate(parts, axis=1)
        scores[~np.isfinite(scores).all(axis=(1, 2))] = 0.0
        return scores

    def arrays(self, f: int, c: int) -> list[NDArray[np.float64]]:
        """The tensors of one network; ValueError where it diverged."""
        arrays = [weight[f, c].detach().cpu().numpy().astype(np.float64) for weight in self.weights]
        if not all(np.isfinite(array).all() for array in arrays):
            raise ValueError(f"the training diverged at lr = {self.recipe.lr[c]:g}; take a smaller one")
        return arrays

    def _pieces(self, step: Step) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Rows (F, b, D), weighted targets (F, K, b) and noise (noise_width, b), `batch_size` at a time."""
        import torch

        Z, targets = self.rows.take(step.index, step.view), self._targets(step)
        if (step.share < 1).any():
            Z, targets = _mix(Z, targets, step)
        smoothing = self.recipe.label_smoothing
        targets = targets * (1 - smoothing) + smoothing / targets.shape[1]
        used = step.used / np.maximum(step.used.sum(axis=1, keepdims=True), 1)  # (F, B)
        targets = targets * self.class_weights.unsqueeze(2) * torch.from_numpy(used).to(targets).unsqueeze(1)
        noise = None
        if self.network.noise_width:
            # As many numbers for every step, and drawn on the processor: the seed means the same everywhere.
            noise = torch.rand(self.network.noise_width, STEP_ROWS, generator=self.generator).to(Z.device)
        for start in range(0, Z.shape[1], self.recipe.batch_size):
            b = slice(start, min(start + self.recipe.batch_size, Z.shape[1]))
            yield Z[:, b], targets[:, :, b], None if noise is None else noise[:, b]

    def _targets(self, step: Step) -> Tensor:
        """One-hot, (F, K, B)."""
        import torch

        index = torch.from_numpy(step.index).to(self.codes.device)
        classes = torch.arange(self.class_weights.shape[1], device=self.codes.device)
        return (self.codes[index].unsqueeze(1) == classes[:, None]).to(torch.float32)


class _AdamW:
    """AdamW for a stack, whose networks have learning rates and decays of their own (Loshchilov and Hutter,
    "Decoupled weight decay regularization", ICLR 2019)."""

    def __init__(self, weights: Sequence[Tensor], recipe: Recipe) -> None:
        import torch

        self.weights, self.recipe = weights, recipe
        self.first = [torch.zeros_like(weight) for weight in weights]
        self.second = [torch.zeros_like(weight) for weight in weights]
        self.taken = [torch.zeros((*weight.shape[:2], 1), device=weight.device) for weight in weights]
        matrices = [i for i, weight in enumerate(weights) if weight.ndim > 3]
        vectors = [i for i, weight in enumerate(weights) if weight.ndim == 3]
        self.groups = [
            (f, c, which, decay)
            for f, c in np.ndindex(*weights[0].shape[:2])
            for which, decay in ((matrices, float(recipe.weight_decay[c])), (vectors, 0.0))
        ]

    def step(self, factors: Sequence[float]) -> None:
        """At these parts of the peak learning rates, F of them; the gradients are used up."""
        import torch
        from torch.optim.adamw import adamw

        with torch.no_grad():
            for f, c, which, decay in self.groups:
                adamw(
                    [self.weights[i][f, c] for i in which],
                    [_gradient(self.weights[i])[f, c] for i in which],
                    [self.first[i][f, c] for i in which],
                    [self.second[i][f, c] for i in which],
                    [],
                    [self.taken[i][f, c, 0] for i in which],
                    fused=True,
                    amsgrad=False,
                    beta1=0.9,
                    beta2=0.999,
                    lr=float(self.recipe.lr[c]) * factors[f],
                    weight_decay=decay,
                    eps=1e-8,
                    maximize=False,
                )
        for weight in self.weights:
            weight.grad = None


def _gradient(weight: Tensor) -> Tensor:
    if weight.grad is None:
        raise RuntimeError("a tensor of the network had no part in its scores")
    return weight.grad


@dataclass(frozen=True)
class Part:
    """Training sets and candidates that one stack trains."""

    sets: range
    candidates: range


def divide(n_sets: int, n_candidates: int, device: torch.device) -> list[Part]:
    """All in one stack on a CUDA device, which has to be kept busy; else a stack for each set, and for some
    of the candidates where there are processors left."""
    if device.type != "cpu":
        return [Part(range(n_sets), range(n_candidates))]
    pieces = min(n_candidates, max(usable_processors() // n_sets, 1))
    cuts = np.linspace(0, n_candidates, pieces + 1).astype(int).tolist()
    spans = [range(start, stop) for start, stop in pairwise(cuts)]
    return [Part(range(f, f + 1), span) for f in range(n_sets) for span in spans]


def side_by_side(work: Callable[[Part, Event], None], parts: Sequence[Part]) -> None:
    """`work` on every part, each in a thread that runs torch's operations alone: threads of torch that meet
    after every short operation wait for one another, and for whoever else uses the processors, most of the
    time.

    The event tells the others to stop when one fails or the user interrupts.
    """
    import torch

    before, stop = torch.get_num_threads(), Event()
    workers = min(len(parts), usable_processors())
    torch.set_num_threads(1)
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = [pool.submit(work, part, stop) for part in parts]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            torch.set_num_threads(before)
    for one in running:
        one.result()


def pick_device(name: str) -> torch.device:
    """ "auto" is a CUDA device where torch has one; ValueError for what torch does not know or have."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is auto, cpu or cuda, not {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is auto, cpu or cuda, not {name!r}")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= there:
        raise ValueError(
            f"device is {name}, but torch has {there or 'no'} CUDA devices here; use auto or cpu"
        )
    return device


def _mix(Z: Tensor, targets: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Each row and its target mixed with that of its partner."""
    import torch

    share = torch.from_numpy(step.share).to(Z)[:, None, None]
    partner = torch.from_numpy(step.partner).to(Z.device)
    sets = torch.arange(len(Z), device=Z.device)[:, None]
    other_targets = targets.mT[sets, partner].mT
    return Z * share + Z[sets, partner] * (1 - share), targets * share + other_targets * (1 - share)


def _factor(t: int, total: int) -> float:
    """What part of its peak the learning rate has at step t, from 0, of `total`; 0 after the last."""
    rising = math.ceil(WARM_UP * total)
    if t < rising:
        return (t + 1) / rising
    done = (t - rising) / max(total - rising, 1)
    return (1 + math.cos(math.pi * min(done, 1.0))) / 2
