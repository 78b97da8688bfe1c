"""Guaranteed bounds of piecewise linear networks over a box: intervals, and linear bounds propagated backwards (CROWN).

Bounds hold for the real-valued function of the given weights: what rounding can add up
to is bounded as well (|fl(a.b) - a.b| <= gamma_n |a|.|b|, in any order of summation) and the bounds are moved outwards
by it, so that no input of the box is outside, not even by the last digit.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

from keras_sparse_init.ranges.piecewise import Affine

# Twice the unit roundoff: also for the rounding in the computation of the error bounds.
_ROUNDING = 2.0**-52

# So many numbers of a matrix of linear bounds are held at once.
_CHUNK = 2**22

Bounds = tuple[np.ndarray, np.ndarray]


def interval_bounds(network: list[Affine], lower: np.ndarray, upper: np.ndarray) -> list[Bounds]:
    """Bounds of each layer's z by interval arithmetic: W+ l + W- u + b <= z <= W+ u + W- l + b.

    Args:
        network: As `chain` returns it.
        lower: The box's lower corner, of shape (inputs,).
        upper: Its upper corner.

    Returns:
        (lower, upper) of each layer, arrays of shape (units,). The last are those of the outputs.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.ranges.bounds import interval_bounds
        >>> from keras_sparse_init.ranges.piecewise import Affine, chain
        >>> difference = [Affine.of([[1.0], [1.0]], slope=0.0), Affine.of([[1.0, -1.0]])]
        >>> low, high = interval_bounds(chain(difference), np.zeros(1), np.ones(1))[-1]
        >>> bool(-1.001 < low[0] <= -1 and 1 <= high[0] < 1.001)
        True
    """
    found = []
    for layer in network:
        found.append(_interval(layer, lower, upper))
        lower, upper = _activated(layer, *found[-1])
    return found


@dataclasses.dataclass(frozen=True)
class LinearBounds:
    """Bounds from `crown_bounds`.

    Attributes:
        bounds: (lower, upper) of each layer's z; the last are those of the outputs.
        slopes: Gradients of the linear functions of the input below each output, then of those above: shape
            (2, outputs, inputs). None when there was no time for them.
    """

    bounds: list[Bounds]
    slopes: np.ndarray | None

    def unstable(self, network: list[Affine]) -> list[np.ndarray]:
        """Which units of each layer have an activation that changes its slope inside the box, as far as is known."""
        return [
            (lower < 0) & (upper > 0) & (layer.slope < 1)
            for layer, (lower, upper) in zip(network, self.bounds, strict=True)
        ]


def crown_bounds(
    network: list[Affine], lower: np.ndarray, upper: np.ndarray, deadline: float | None = None
) -> LinearBounds:
    """Bounds of each layer's z by linear functions of the input that are propagated backwards, or by intervals.

    An activation between l < 0 and u > 0 lies below its chord and above each line of slope between its own two. Going
    back through all layers with these gives a linear function of the input on either side, whose extremes over the box
    are known. Of every bound the tighter of this and the interval's is taken, layer after layer, so that later layers
    profit; only units whose activation's state is open are worth it before the last layer.

    Args:
        network: As `chain` returns it.
        lower: The box's lower corner, of shape (inputs,).
        upper: Its upper corner.
        deadline: A time of `time.monotonic()` from which intervals have to do for what is left.

    Returns:
        The bounds and the linear functions of the outputs.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.ranges.bounds import crown_bounds
        >>> from keras_sparse_init.ranges.piecewise import Affine, chain
        >>> difference = [Affine.of([[1.0], [1.0]], slope=0.0), Affine.of([[1.0, -1.0]])]
        >>> low, high = crown_bounds(chain(difference), np.zeros(1), np.ones(1)).bounds[-1]
        >>> bool(-1e-9 < low[0] <= 0 <= high[0] < 1e-9)
        True

    Reference:
        Zhang et al. 2018, Efficient Neural Network Robustness Certification with General Activation Functions,
        arXiv:1811.00866.
    """
    box, found, steps = (lower, upper), [], []
    slopes: list[np.ndarray] = []
    for k, layer in enumerate(network):
        last = k == len(network) - 1
        low, high = _interval(layer, lower, upper)
        rows = np.arange(low.size) if last else np.flatnonzero((low < 0) & (high > 0) & (layer.slope < 1))
        width = max(other.weight.shape[1] for other in network[: k + 1])
        for part in np.array_split(rows, -(-rows.size * width // _CHUNK)) if rows.size and (k or last) else ():
            if deadline is not None and time.monotonic() > deadline:
                break
            weight = _dense(layer.weight[part])
            below, gradients = _linear_lower(
                np.concatenate([weight, -weight]), np.concatenate([layer.bias[part], -layer.bias[part]]), steps, box
            )
            low[part] = np.maximum(low[part], below[: part.size])
            high[part] = np.minimum(high[part], -below[part.size :])
            if last:
                slopes.append(gradients.reshape(2, part.size, -1) * np.array([1.0, -1.0])[:, None, None])
        found.append((low, high))
        if not last:
            steps.append(_Step.of(layer, low, high, lower, upper))
            lower, upper = _activated(layer, low, high)
    gradients = np.concatenate(slopes, axis=1) if slopes else None
    complete = gradients is not None and gradients.shape[1] == network[-1].bias.size
    return LinearBounds(found, gradients if complete else None)


@dataclasses.dataclass(frozen=True)
class _Step:
    """A layer between lines, for z in its bounds: below z <= y <= above z + offset."""

    layer: Affine
    below: np.ndarray
    above: np.ndarray
    offset: np.ndarray
    size: np.ndarray  # What |W||x| + |b| can be at most.
    terms: int

    @classmethod
    def of(cls, layer: Affine, low: np.ndarray, high: np.ndarray, x_low: np.ndarray, x_high: np.ndarray) -> _Step:
        slope = layer.slope
        stable = np.where(low >= 0, 1.0, slope)
        open_ = (low < 0) & (high > 0)
        low, high = np.where(open_, low, -1.0), np.where(open_, high, 1.0)
        chord = (high - slope * low) / (high - low)
        # Right for the rounded chord: a line above a convex function at both ends is above it.
        offset = np.maximum(slope * low - chord * low, high - chord * high)
        offset = np.maximum(offset, 0.0) + 4 * _ROUNDING * (high - low)
        # Of the lines below the one that leaves less area.
        below = np.where(high > -low, 1.0, slope)
        size = abs(layer.weight) @ np.maximum(np.abs(x_low), np.abs(x_high)) + np.abs(layer.bias)
        dead = (stable == 0) & ~open_
        return cls(
            layer,
            np.where(open_, below, stable),
            np.where(open_, chord, stable),
            np.where(open_ & (slope < 1), offset, 0.0),
            np.where(dead, 0.0, size),
            layer.weight.shape[1],
        )


def _linear_lower(weight: np.ndarray, bias: np.ndarray, steps: list[_Step], box: Bounds) -> Bounds:
    """Lower bounds of W y + b where y is what the steps put out, and the linear functions' gradients.

    Coefficients are rounded at each step. What this changes is at most gamma |W| |y| for the largest |y|.
    """
    lower, upper = box
    error = np.zeros(bias.size)
    for step in reversed(steps):
        error += _gamma(step.terms + 2 * len(steps) + 8) * (np.abs(weight) @ step.size)
        negative = np.minimum(weight, 0.0)
        bias = bias + negative @ step.offset
        weight = np.maximum(weight, 0.0) * step.below + negative * step.above
        bias = bias + weight @ step.layer.bias
        weight = np.asarray(weight @ step.layer.weight)
    extreme = np.maximum(weight, 0.0) @ lower + np.minimum(weight, 0.0) @ upper
    size = np.maximum(weight, 0.0) @ np.abs(lower) - np.minimum(weight, 0.0) @ np.abs(upper) + np.abs(bias)
    error += _gamma(lower.size + 2 * len(steps) + 8) * size
    return bias + extreme - error, weight


def _interval(layer: Affine, lower: np.ndarray, upper: np.ndarray) -> Bounds:
    positive, negative = _parts(layer.weight)
    gamma = _gamma(layer.weight.shape[1] + 8)
    low = positive @ lower + negative @ upper + layer.bias
    high = positive @ upper + negative @ lower + layer.bias
    low_error = gamma * (positive @ np.abs(lower) - negative @ np.abs(upper) + np.abs(layer.bias))
    high_error = gamma * (positive @ np.abs(upper) - negative @ np.abs(lower) + np.abs(layer.bias))
    return low - low_error, high + high_error


def _activated(layer: Affine, low: np.ndarray, high: np.ndarray) -> Bounds:
    """Bounds of y = max(z, slope z)."""
    # Products with 0 and 1 are not rounded.
    outward = np.where((layer.slope == 0) | (layer.slope == 1), 0.0, 2 * _ROUNDING)
    low = np.where(low < 0, layer.slope * low * (1 + outward), low)
    return low + 0.0, np.where(high < 0, layer.slope * high * (1 - outward), high) + 0.0


def _gamma(terms: int) -> float:
    return terms * _ROUNDING / (1 - terms * _ROUNDING)


def _parts(weight: Any) -> tuple[Any, Any]:
    """W+ and W-."""
    if isinstance(weight, np.ndarray):
        return np.maximum(weight, 0.0), np.minimum(weight, 0.0)
    return weight.maximum(0.0), weight.minimum(0.0)


def _dense(weight: Any) -> np.ndarray:
    return weight if isinstance(weight, np.ndarray) else weight.toarray()
