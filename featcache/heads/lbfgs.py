"""Many convex problems of one size minimised side by side. Knows no data: an objective answers for all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MEMORY = 10  # pairs of steps and gradient changes that are kept
SUFFICIENT = 1e-4  # of the decrease that the slope promises, for a step to be taken
LEAST_STEPS = 2
MAX_TRIALS = 12  # lengths of one step
LEAST_SCALE = 0.02  # of the preconditioner
PATIENCE = 10  # steps that together must gain more than the values' rounding


class Objective(Protocol):
    """`which` are the numbers of the problems asked for, (J,); `x` their points, (J, n)."""

    noise: float  # relative error of the values

    def evaluate(
        self, which: NDArray[np.intp], x: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Values (J,) and gradients (J, n)."""
        ...

    def precondition(self, which: NDArray[np.intp], gradient: NDArray[np.float64]) -> NDArray[np.float64]:
        """About the inverse Hessian of each problem times the vectors given, (J, n)."""
        ...


@dataclass(kw_only=True, eq=False)
class Minima:
    """Where the problems ended: points (J, n), values, iterations, and whether they met the tolerance."""

    x: NDArray[np.float64]
    value: NDArray[np.float64]
    n_iter: NDArray[np.int64]
    converged: NDArray[np.bool_]


@dataclass(kw_only=True, eq=False)
class _Running:
    """The problems still running, one row each, and the last steps they took (float32: they only steer)."""

    which: NDArray[np.intp]
    x: NDArray[np.float64]
    value: NDArray[np.float64]
    gradient: NDArray[np.float64]
    length: NDArray[np.float64]  # of the last step, (J,), as part of the direction
    before: list[NDArray[np.float64]] = field(default_factory=list)  # values of the last steps
    pairs: list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]] = field(
        default_factory=list
    )

    def keep(self, rows: NDArray[np.bool_]) -> None:
        self.which, self.x = self.which[rows], self.x[rows]
        self.value, self.gradient, self.length = self.value[rows], self.gradient[rows], self.length[rows]
        self.before = [value[rows] for value in self.before]
        self.pairs = [(s[rows], y[rows], rho[rows]) for s, y, rho in self.pairs]

    def gained(self, noise: float) -> NDArray[np.bool_]:
        """Whether the last steps lowered the values by more than their rounding, (J,); notes the values."""
        self.before = [*self.before[-PATIENCE:], self.value.copy()]
        lowered: NDArray[np.bool_] = self.before[0] - self.value > noise * np.abs(self.value)
        return lowered | (len(self.before) <= PATIENCE)


def minimise(objective: Objective, x: NDArray[np.float64], *, tol: float, max_iter: int) -> Minima:
    """L-BFGS from the points x, (J, n), a step of all problems at a time; a problem that is done drops out.

    A problem is done when the decrease that its quadratic model promises, 1/2 g H g, is below `tol` times
    its value, and LEAST_STEPS were taken: where the value hardly depends on x, the decrease that one step
    leaves is next to nothing beside the value, but not beside what x has gained.

    H starts from `objective.precondition` (Nocedal and Wright, "Numerical optimization", 2006, algorithm
    7.4), less where that was too long along the last step. Where a step had to be shorter than its
    direction, the next is first tried at twice that length. Convexity spares the second Wolfe condition:
    s . y > 0 holds for every step.
    """
    which = np.arange(len(x))
    value, gradient = objective.evaluate(which, x)
    run = _Running(which=which, x=x.copy(), value=value, gradient=gradient, length=np.ones(len(x)))
    found = Minima(
        x=x.copy(),
        value=value.copy(),
        n_iter=np.zeros(len(x), dtype=np.int64),
        converged=np.zeros(len(x), dtype=bool),
    )
    for iteration in range(max_iter + 1):
        direction, slope = _direction(objective, run)
        done = (-0.5 * slope <= tol * np.abs(run.value)) & (iteration >= LEAST_STEPS)
        stalled = done.copy()
        if iteration < max_iter and not done.all():
            stalled |= _step(objective, run, direction, slope, ~done)
        stalled |= ~run.gained(objective.noise)
        # Steps that find nothing lower end at the optimum, to the precision of the arithmetic.
        near = -0.5 * slope <= max(tol, 100 * objective.noise) * np.abs(run.value)
        rows = run.which
        found.x[rows], found.value[rows] = run.x, run.value
        found.n_iter[rows], found.converged[rows] = iteration, done | (stalled & near)
        if stalled.all() or iteration == max_iter:
            break
        if stalled.any():
            run.keep(~stalled)
    return found


def _dot(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    product: NDArray[np.float64] = np.einsum("jn,jn->j", a, b).astype(np.float64)
    return product


def _direction(objective: Objective, run: _Running) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The two loops: -H g, (J, n), and its slope g . direction, (J,)."""
    q = run.gradient.astype(np.float32)
    alphas = []
    for s, y, rho in reversed(run.pairs):
        alpha = rho * _dot(s, q)
        q -= alpha[:, None].astype(np.float32) * y
        alphas.append(alpha)
    r = objective.precondition(run.which, q.astype(np.float64))
    if run.pairs:
        r *= _scale(objective, run)[:, None]
    for (s, y, rho), alpha in zip(run.pairs, reversed(alphas), strict=True):
        beta = rho * _dot(y, r)
        r += (alpha - beta)[:, None] * s
    return -r, -_dot(run.gradient, r)


def _scale(objective: Objective, run: _Running) -> NDArray[np.float64]:
    """s . y / y H y of the last step, (J,), by the preconditioner alone, at most 1 (equation 7.20)."""
    _, y, rho = run.pairs[-1]
    expected = rho * _dot(objective.precondition(run.which, y.astype(np.float64)), y)
    return np.clip(1 / np.maximum(expected, 1.0), LEAST_SCALE, 1.0)


def _step(
    objective: Objective,
    run: _Running,
    direction: NDArray[np.float64],
    slope: NDArray[np.float64],
    moving: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Move the problems of `moving` along `direction`; which of them found nothing lower, (J,)."""
    before_x, before_gradient = run.x.copy(), run.gradient.copy()
    length, pending = np.minimum(2 * run.length, 1.0), np.flatnonzero(moving & (slope < 0))
    stuck = moving & ~(slope < 0)
    start_value = run.value.copy()
    for _ in range(MAX_TRIALS):
        if not len(pending):
            break
        x = before_x[pending] + length[pending, None] * direction[pending]
        value, gradient = objective.evaluate(run.which[pending], x)
        new_slope = _dot(gradient, direction[pending])
        wanted = start_value[pending] + SUFFICIENT * length[pending] * slope[pending]
        slack = objective.noise * np.abs(start_value[pending])
        # The function is convex: where it still falls along the direction, it is lower than at the start.
        good = np.isfinite(value) & ((new_slope <= 0) | (value <= wanted + slack))
        taken = pending[good]
        run.x[taken], run.value[taken], run.gradient[taken] = x[good], value[good], gradient[good]
        secant = slope[pending] / np.minimum(slope[pending] - new_slope, -1e-300)
        shrink = np.where(np.isfinite(secant), np.clip(secant, 0.1, 0.5), 0.1)
        length[pending] *= np.where(good, 1.0, shrink)
        pending = pending[~good]
    stuck[pending] = True
    run.length = length
    s = (run.x - before_x).astype(np.float32)
    y = (run.gradient - before_gradient).astype(np.float32)
    curvature = _dot(s, y)
    rho = np.where(curvature > 0, 1 / np.where(curvature > 0, curvature, 1.0), 0.0)
    run.pairs = [*run.pairs[-(MEMORY - 1) :], (s, y, rho)]
    return stuck
