"""The exact range of a piecewise linear network over a box, by mixed-integer programming."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from keras_sparse_init.ranges.bounds import Bounds, LinearBounds
from keras_sparse_init.ranges.extremes import Extremes, close_rounding
from keras_sparse_init.ranges.piecewise import Affine

# What HiGHS takes for feasible or optimal (1e-6 at most), with room: relative, since the program is scaled to order 1.
TOLERANCE = 1e-5

# What SciPy says of a program.
_COMPLETE, _OUT_OF_TIME = 0, 1

# Numbers are not scaled to order 1 beyond this power of two: nothing is lost in a division by it.
_SMALLEST = 2.0**-1000


def solve(network: list[Affine], box: Bounds, linear: LinearBounds, found: Extremes, deadline: float | None) -> None:
    """Improves extremes by a mixed-integer program for each end of each output, in place.

    Where the solver ends with a proof whose bound meets the attained value to `TOLERANCE` of the output's size, the
    attained value is the bound. Where it runs out of time its bound counts, less the same tolerance, if it is tighter.

    Args:
        network: As `chain` returns it.
        box: The lower and the upper corner.
        linear: What `crown_bounds` returned.
        found: What `attained` returned.
        deadline: A time of `time.monotonic()`: each program gets its share of what is left then; when all have had
            theirs, those that were stopped get what is left over, if that is longer.
    """
    close_rounding(found)
    ends = [(i, sign) for i in range(found.lower.size) for sign in (1, -1) if _open(found, i, sign)]
    if not ends or (deadline is not None and time.monotonic() >= deadline):
        return
    program = _Program(network, box, linear)
    # With the seconds that each has had: a program starts anew, so that only a longer run can tell more.
    pending = [(i, sign, 0.0) for i, sign in ends]
    while pending:
        stopped = []
        for number, (i, sign, had) in enumerate(pending):
            seconds = None
            if deadline is not None:
                left = deadline - time.monotonic()
                seconds = min(max(left / (len(pending) - number), 2.0 * had), left)
                if seconds <= had:
                    continue
            if _open(found, i, sign) and not _improve(found, program, network, box, linear, i, sign, seconds):
                stopped.append((i, sign, seconds))
        pending = stopped


def _improve(
    found: Extremes,
    program: _Program,
    network: list[Affine],
    box: Bounds,
    linear: LinearBounds,
    i: int,
    sign: int,
    seconds: float | None,
) -> bool:
    """Improves one end by its program; False when its time was over and more of it may help."""
    known = found.attained_upper[i] - found.attained_lower[i]
    scale = float(_powers_of_two(max(known, 1e-6 * (found.upper[i] - found.lower[i]))))
    bound, x, status = program.minimum(i, sign, scale, seconds)
    if x is not None:
        x = np.clip(x, *box)
        found.update(network, np.stack([x, _sharpened(network, box, linear, x)]))
    if bound is not None:
        value = sign * (found.attained_lower if sign > 0 else found.attained_upper)[i]
        tolerance = TOLERANCE * max(scale, abs(value))
        proved = status == _COMPLETE and bound >= value - tolerance
        bound = value if proved else min(bound - tolerance, value)
        if sign > 0:
            found.lower[i] = max(found.lower[i], bound)
        else:
            found.upper[i] = min(found.upper[i], -bound)
    # What one program finds may improve another output, by less than its tolerance.
    np.minimum(found.lower, found.attained_lower, out=found.lower)
    np.maximum(found.upper, found.attained_upper, out=found.upper)
    return seconds is None or status != _OUT_OF_TIME


def _sharpened(network: list[Affine], box: Bounds, linear: LinearBounds, x: np.ndarray) -> np.ndarray:
    """An input that the solver's tolerances have moved off a vertex, moved back: z = 0 where it is nearly 0."""
    low, high = box
    near = 1e-6 * (high - low)
    x = np.where(x - low <= near, low, np.where(high - x <= near, high, x))
    free = (x > low) & (x < high)
    y, jacobian = x[None], np.eye(x.size)[:, free]
    rows, values = [], []
    for layer, bounds, open_ in zip(network[:-1], linear.bounds, linear.unstable(network), strict=False):
        z, jacobian = layer.pre_activation(y), layer.weight @ jacobian
        kinks = open_ & (np.abs(z[0]) <= 1e-6 * np.maximum(*np.abs(bounds)))
        rows.append(jacobian[kinks])
        values.append(z[0][kinks])
        y, jacobian = layer.activation(z), jacobian * np.where(z[0] < 0, layer.slope, 1.0)[:, None]
    if not free.any() or not rows:
        return x
    step = np.linalg.lstsq(np.concatenate(rows), -np.concatenate(values), rcond=None)[0]
    moved = x.copy()
    moved[free] += step
    return np.clip(moved, low, high)


def _open(found: Extremes, i: int, sign: int) -> bool:
    return found.lower[i] < found.attained_lower[i] if sign > 0 else found.upper[i] > found.attained_upper[i]


class _Program:
    """The constraints, the same for all outputs.

    Variables are x, then of each hidden layer z of the units whose state is open and y of all units; then a binary d
    for each open unit: 1 where z >= 0. With a = slope:

        y >= z,  y >= a z,  y <= a z + (1 - a) high d,  y <= z - (1 - a) low (1 - d)

    Each unit is divided by a power of two, about its largest value, which changes no function of this kind: the
    solver's absolute tolerances become relative ones.
    """

    def __init__(self, network: list[Affine], box: Bounds, linear: LinearBounds):
        from scipy import sparse

        self._last = network[-1]
        low, high = box
        self._scale = _powers_of_two(np.maximum(np.abs(low), np.abs(high)))
        self._x_scale, self._inputs = self._scale, low.size
        lows, highs = [low / self._scale], [high / self._scale]
        blocks: list[tuple[Any, int, int]] = []  # (matrix, first row, first column)
        row_low: list[np.ndarray] = []
        row_high: list[np.ndarray] = []
        rows, columns, first = 0, low.size, 0  # `first` is where the layer's inputs are.
        opens = []

        def add(matrices: list[tuple[Any, int]], low: np.ndarray, high: np.ndarray) -> None:
            nonlocal rows
            blocks.extend((sparse.coo_array(matrix), rows, column) for matrix, column in matrices)
            row_low.append(low)
            row_high.append(high)
            rows += low.size

        for layer, (low, high), open_ in zip(network[:-1], linear.bounds, linear.unstable(network)[:-1], strict=False):
            scale = _powers_of_two(np.maximum(np.abs(low), np.abs(high)))
            weight = sparse.csr_array(layer.weight) * self._scale[None, :] / scale[:, None]
            bias, low, high = layer.bias / scale, low / scale, high / scale
            units, count = bias.size, int(open_.sum())
            z_at, y_at = columns, columns + count
            columns += count + units
            eye = sparse.eye_array(units, format="csr")
            stable = np.where(low >= 0, 1.0, layer.slope)[~open_]
            lows += [low[open_], np.where(low < 0, layer.slope * low, low)]
            highs += [high[open_], np.where(high < 0, layer.slope * high, high)]
            # z = W y + b, or y = a (W y + b) where a is known.
            one = sparse.eye_array(count, format="csr")
            add([(weight[open_], first), (-one, z_at)], -bias[open_], -bias[open_])
            weight = weight[~open_] * stable[:, None]
            add([(weight, first), (-eye[~open_], y_at)], -stable * bias[~open_], -stable * bias[~open_])
            opens.append((z_at, y_at, eye[open_], layer.slope[open_], low[open_], high[open_]))
            first, self._scale = y_at, scale
        self._first, self._binaries = first, sum(low.size for *_, low, _ in opens)
        for z_at, y_at, y, a, low, high in opens:
            count, none = low.size, np.full(low.size, np.inf)
            z = sparse.eye_array(count, format="csr")
            add([(y, y_at), (-z, z_at)], np.zeros(count), none)
            if a.any():
                add([(y, y_at), (-sparse.diags_array(a), z_at)], np.zeros(count), none)
            d_high, d_low = sparse.diags_array((1 - a) * high), sparse.diags_array((1 - a) * low)
            add([(y, y_at), (-sparse.diags_array(a), z_at), (-d_high, columns)], -none, np.zeros(count))
            add([(y, y_at), (-z, z_at), (-d_low, columns)], -none, -(1 - a) * low)
            lows.append(np.zeros(count))
            highs.append(np.ones(count))
            columns += count
        self._bounds = np.concatenate(lows), np.concatenate(highs)
        self._rows = (np.concatenate(row_low), np.concatenate(row_high)) if rows else None
        data = [(block.data, (block.coords[0] + row, block.coords[1] + column)) for block, row, column in blocks]
        if rows:
            values = np.concatenate([d for d, _ in data])
            places = tuple(np.concatenate([c[axis] for _, c in data]) for axis in (0, 1))
            self._matrix = sparse.csc_array((values, places), shape=(rows, columns))

    def minimum(self, output: int, sign: int, scale: float, seconds: float | None) -> tuple[Any, Any, int]:
        """Of sign * output: a lower bound or None, an input or None, and what SciPy says of the search."""
        from scipy import optimize

        size = self._bounds[0].size
        weight = self._last.weight[[output]]
        weight = (weight if isinstance(weight, np.ndarray) else weight.toarray())[0]
        objective = np.zeros(size)
        objective[self._first : self._first + weight.size] = sign * weight * self._scale / scale
        options = {"mip_rel_gap": 0.0} | ({} if seconds is None else {"time_limit": seconds})
        result = optimize.milp(
            objective,
            integrality=np.arange(size) >= size - self._binaries,
            bounds=optimize.Bounds(*self._bounds),
            constraints=optimize.LinearConstraint(self._matrix, *self._rows) if self._rows else None,
            options=options,
        )
        x = None if result.x is None else result.x[: self._inputs] * self._x_scale
        bound = result.mip_dual_bound
        if result.status == _COMPLETE and bound is None:  # Without binaries the optimum is its own bound.
            bound = result.fun
        if result.status not in (_COMPLETE, _OUT_OF_TIME) or bound is None or not np.isfinite(bound):
            return None, x, result.status
        bound = min(bound, result.fun) if result.fun is not None else bound
        return bound * scale + sign * self._last.bias[output], x, result.status


def _powers_of_two(size: Any) -> np.ndarray:
    """The power of two at or above each number, but for the smallest; 1 for 0."""
    return np.where(size > 0, 2.0 ** np.ceil(np.log2(np.where(size > 0, np.maximum(size, _SMALLEST), 1.0))), 1.0)
