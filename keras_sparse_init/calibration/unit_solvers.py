"""Solvers of the linear programs of a layer's units: first-order and all at once, or exact and one by one."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from keras_sparse_init.calibration.unit_programs import UnitPrograms

Solver = Literal["pdhg", "highs"]
SOLVERS = ("pdhg", "highs")

# Objectives are in units of the margin m: 1 is what a unit costs whose pre-activations are all 0.
_TOLERANCE, _MAX_ITERATIONS, _EVERY = 1e-3, 4000, 20
# A unit starts anew when its gap is that part of what it was when it started last. How much larger the steps of the
# multipliers are than those of u and v, at first. Both were tried out; they matter little.
_RESTART, _BALANCE = 0.5, 0.3


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """Solutions of the programs of a layer's units.

    Attributes:
        u: (w - w0) / s0, of shape (inputs, units); feasible.
        v: b / m, one for each unit.
        objective: What each unit's objective is there, divided by m.
        bound: What it cannot be less than, as proven by the dual program.
        iterations: Number of iterations of the unit that took most.
    """

    u: np.ndarray
    v: np.ndarray
    objective: np.ndarray
    bound: np.ndarray
    iterations: int

    @property
    def gap(self) -> float:
        """The largest difference of objective and bound among the units."""
        return float((self.objective - self.bound).max(initial=0.0))


def solve(programs: UnitPrograms, solver: Solver) -> Solution:
    """The solution by the solver of that name."""
    return solve_pdhg(programs) if solver == "pdhg" else solve_highs(programs)


def solve_pdhg(
    programs: UnitPrograms, tolerance: float = _TOLERANCE, max_iterations: int = _MAX_ITERATIONS
) -> Solution:
    """Solves the programs of all units together by the primal-dual hybrid gradient method.

    Each iteration takes two matrix products for all units. The box, the costs of moving and the equality <u, w0> = 0
    are in the proximal step, so that each iterate is feasible and has a gap. A unit goes on from its average, when that
    is better, once its gap has halved, and is left out once it is done.

    Args:
        programs: The programs.
        tolerance: The gap at which a unit is done, in units of m.
        max_iterations: When to stop all the same; the gap tells.

    Returns:
        The best points found; never worse than w0 with a bias of 0.

    Reference:
        Chambolle and Pock 2011, A first-order primal-dual algorithm for convex problems with applications to imaging,
        doi:10.1007/s10851-010-0251-1. Restarts: Applegate et al. 2021, arXiv:2106.04756.
    """
    u, v = np.zeros_like(programs.kernel), np.zeros(programs.units)
    best = Solution(u, v, programs.primal(u, v), np.full(programs.units, -np.inf), 0)
    active = np.arange(programs.units)
    run = _Run.start(programs)
    iterations = 0
    while True:
        objective, bound, points = run.evaluate()
        better = objective < best.objective[active]
        best.u[:, active[better]], best.v[active[better]] = points[0][:, better], points[1][better]
        best.objective[active] = np.minimum(best.objective[active], objective)
        best.bound[active] = np.maximum(best.bound[active], bound)
        left = best.objective[active] - best.bound[active] > tolerance
        if not left.any() or iterations >= max_iterations:
            return dataclasses.replace(best, iterations=iterations)
        if not left.all():
            active, run = active[left], run.subset(left)
        for _ in range(min(_EVERY, max_iterations - iterations)):
            run.step()
            iterations += 1


class _Run:
    """Iterates of some units: of u, v and of multipliers y in [0, 1]; their sums since each unit's last restart."""

    def __init__(self, programs: UnitPrograms, norm: np.ndarray, reach: np.ndarray):
        self.programs, self.norm, self.reach = programs, norm, reach
        unmet = (programs.signs * programs.start < 1.0).astype(float)
        self.point = [np.zeros_like(programs.kernel), np.zeros(programs.units), unmet]
        self.origin = [part.copy() for part in self.point]
        self.sums = [np.zeros_like(part) for part in self.point]
        self.steps = np.zeros(programs.units)
        self.gap = np.full(programs.units, np.inf)
        self.balance = np.full(programs.units, _BALANCE)
        self.multiplier = np.zeros(programs.units)

    @classmethod
    def start(cls, programs: UnitPrograms) -> _Run:
        reach = _reach(programs)
        return cls(programs, _norm(programs, reach), reach)

    def subset(self, units: np.ndarray) -> _Run:
        other = _Run(self.programs.subset(np.flatnonzero(units)), self.norm[units], self.reach[units])
        for name in ("point", "origin", "sums"):
            setattr(other, name, [part[..., units] for part in getattr(self, name)])
        for name in ("steps", "gap", "balance", "multiplier"):
            setattr(other, name, getattr(self, name)[units])
        return other

    def step(self) -> None:
        programs, (u, v, y) = self.programs, self.point
        primal, dual = 1.0 / (self.norm * self.balance), self.balance / self.norm
        gradient, bias_gradient = programs.backward(programs.signs * y)
        new_u, self.multiplier = _proximal(
            u + primal * gradient, programs.direction, programs.box, primal * programs.stay, self.multiplier
        )
        new_v = np.clip(v + primal * self.reach**2 * bias_gradient, -programs.bias_box, programs.bias_box)
        ahead = programs.forward(2.0 * new_u - u, 2.0 * new_v - v)
        new_y = np.clip(y + dual * (1.0 - programs.signs * (programs.start + ahead)), 0.0, 1.0)
        self.point = [new_u, new_v, new_y]
        for total, part in zip(self.sums, self.point, strict=True):
            total += part
        self.steps += 1

    def evaluate(self) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Objectives, bounds and points: of the last iterates or of the averages. Restarts those that are due."""
        programs = self.programs
        steps = np.maximum(self.steps, 1)
        average = [np.where(self.steps, total / steps, part) for total, part in zip(self.sums, self.point, strict=True)]
        candidates = [(programs.primal(u, v), programs.dual(y), u, v, y) for u, v, y in (self.point, average)]
        last, mean = candidates
        gaps = [objective - bound for objective, bound, *_ in candidates]
        choose = gaps[1] < gaps[0]
        chosen = [np.where(choose, b, a) for a, b in zip(last[2:], mean[2:], strict=True)]
        gap = np.minimum(*gaps)
        self._restart(gap < _RESTART * self.gap, chosen, gap)
        smaller = mean[0] < last[0]
        points = np.where(smaller, mean[2], last[2]), np.where(smaller, mean[3], last[3])
        return np.minimum(last[0], mean[0]), np.maximum(last[1], mean[1]), points

    def _restart(self, due: np.ndarray, chosen: list[np.ndarray], gap: np.ndarray) -> None:
        moved = [np.where(due, new - old, 0.0) for new, old in zip(chosen, self.origin, strict=True)]
        primal = np.sqrt((moved[0] ** 2).sum(axis=0) + (moved[1] / self.reach) ** 2)
        dual = np.sqrt((moved[2] ** 2).mean(axis=0))
        known = (primal > 1e-10) & (dual > 1e-10)
        # Both move as far in a step as they have to: half way, in logarithms, from the balance before.
        ratio = np.where(known, dual, 1.0) / np.where(known, primal, 1.0)
        self.balance = np.where(known, np.sqrt(self.balance * ratio), self.balance)
        self.point = [np.where(due, new, part) for new, part in zip(chosen, self.point, strict=True)]
        self.origin = [np.where(due, new, part) for new, part in zip(chosen, self.origin, strict=True)]
        self.sums = [np.where(due, 0.0, total) for total in self.sums]
        self.steps = np.where(due, 0.0, self.steps)
        self.gap = np.where(due, gap, self.gap)


def _norm(programs: UnitPrograms, reach: np.ndarray) -> np.ndarray:
    """The norm of `forward` for each unit, with v in units of `reach`, over the root of the number of samples.

    From above, by power iteration.
    """
    # A start that is no unit's eigenvector: the gradient of all samples, with the bias.
    u, v = programs.backward(np.ones_like(programs.start))
    u = u + (programs.box > 0) * np.linspace(0.5, 1.0, len(u))[:, None] / np.sqrt(len(u))
    v, value = v + 1.0, np.ones(programs.units)
    for _ in range(20):
        value = np.sqrt((u**2).sum(axis=0) + v**2)
        u, v = programs.backward(programs.forward(u / value, reach * v / value))
        v = reach * v
    return 1.02 * np.sqrt(np.sqrt((u**2).sum(axis=0) + v**2))


def _reach(programs: UnitPrograms) -> np.ndarray:
    """In what units v is as u: half of what all weights of a unit, each s0, add to pre-activations, in m.

    With a small margin a bias goes far, in m. The half is 1 for a margin of 0.5, for which the rest was tried out.
    """
    size = np.sqrt((programs.box > 0).T @ (programs.features**2).mean(axis=0)) * programs.weight_scale / programs.margin
    return np.where(size > 0, 0.5 * size, 1.0)


def _proximal(
    point: np.ndarray, direction: np.ndarray, box: np.ndarray, cost: np.ndarray, mu: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest u to a point, with a cost of |u|, in the box and orthogonal to the direction: and its multiplier mu.

    u(mu) = clip(shrink(point - mu direction, cost), -box, box), where <u(mu), direction> falls with mu: its zero is
    found by Newton's method from a first guess, kept between bounds.
    """
    used = (box > 0) & (direction != 0)
    safe = np.where(used, np.abs(direction), 1.0)
    # Beyond these, each weight is at the end of its box or off it.
    reach = np.where(used, (np.abs(point) + box + cost) / safe, 0.0).max(axis=0)
    low, high = -reach, reach
    for _ in range(60):
        shifted = point - mu * direction
        shrunk = np.sign(shifted) * np.maximum(np.abs(shifted) - cost, 0.0)
        u = np.clip(shrunk, -box, box)
        terms = u * direction
        value = terms.sum(axis=0)
        if np.all(np.abs(value) <= 1e-13 * (np.abs(terms).sum(axis=0) + 1e-3)):
            break
        low, high = np.where(value > 0, mu, low), np.where(value < 0, mu, high)
        free = (u == shrunk) & (u != 0)
        slope = (direction**2 * free).sum(axis=0)
        newton = mu + value / np.where(slope > 0, slope, 1.0)
        inside = (slope > 0) & (newton > low) & (newton < high)
        mu = np.where(value == 0, mu, np.where(inside, newton, 0.5 * (low + high)))
    return u, mu


def solve_highs(programs: UnitPrograms) -> Solution:
    """Solves the programs exactly, one unit after the other, by SciPy's HiGHS.

    Args:
        programs: The programs.

    Returns:
        The solutions, with an error of about 1e-7.

    Raises:
        ImportError: When SciPy is not installed.
        RuntimeError: When HiGHS fails.
    """
    try:
        from scipy import optimize, sparse
    except ImportError as error:
        raise ImportError("The solver 'highs' needs SciPy: `pip install scipy`") from error
    samples = len(programs.features)
    u, v = np.zeros_like(programs.kernel), np.zeros(programs.units)
    bound, iterations = np.zeros(programs.units), 0
    for unit in range(programs.units):
        one = programs.subset(np.array([unit]))
        inputs = np.flatnonzero(one.box[:, 0])
        signs, scale = one.signs, one.weight_scale / one.margin
        # Variables: the positive and the negative part of u on S, v, xi. Rows: -sign (h.u + v) - xi <= sign z - 1.
        product = sparse.csr_matrix(-signs * one.features[:, inputs] * scale)
        rows = sparse.hstack([product, -product, sparse.csr_matrix(-signs), -sparse.identity(samples)], format="csr")
        w0 = one.direction[inputs, 0]
        equal = np.concatenate([w0, -w0, np.zeros(1 + samples)])[None]
        ends = [(0.0, end) for end in one.box[inputs, 0]]
        bounds = [*ends, *ends, (-one.bias_box[0], one.bias_box[0]), *[(0.0, None)] * samples]
        cost = np.concatenate([np.full(2 * len(inputs), one.stay[0]), [0.0], np.full(samples, 1.0 / samples)])
        result = optimize.linprog(cost, rows, signs[:, 0] * one.start[:, 0] - 1.0, equal, [0.0], bounds, method="highs")
        if result.status != 0:
            raise RuntimeError(f"HiGHS did not solve the program of unit {unit}: {result.message}")
        plus, minus = result.x[: len(inputs)], result.x[len(inputs) : 2 * len(inputs)]
        u[inputs, unit], v[unit] = plus - minus, result.x[2 * len(inputs)]
        bound[unit], iterations = result.fun, max(iterations, int(result.nit))
    return Solution(u, v, programs.primal(u, v), bound, iterations)
