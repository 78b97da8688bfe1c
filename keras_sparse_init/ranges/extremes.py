"""The lowest and highest outputs of a piecewise linear network that a search finds in a box, and the inputs there."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from keras_sparse_init.ranges.bounds import Bounds
from keras_sparse_init.ranges.piecewise import Affine, forward


@dataclasses.dataclass
class Extremes:
    """Bounds of each output, and inputs that attain the lowest and highest values known.

    Attributes:
        lower: Certified lower bounds, of shape (outputs,).
        upper: Certified upper bounds.
        attained_lower: Values that inputs attain.
        attained_upper: Likewise.
        x_lower: The inputs that attain `attained_lower`, of shape (outputs, inputs).
        x_upper: Likewise.
    """

    lower: np.ndarray
    upper: np.ndarray
    attained_lower: np.ndarray
    attained_upper: np.ndarray
    x_lower: np.ndarray
    x_upper: np.ndarray

    def update(self, network: list[Affine], x: np.ndarray) -> None:
        """Takes inputs of shape (samples, inputs) for the extremes that they improve."""
        y = forward(network, x)
        best, outputs = y.argmin(axis=0), np.arange(y.shape[1])
        better = y[best, outputs] < self.attained_lower
        self.x_lower[better], self.attained_lower[better] = x[best[better]], y[best, outputs][better]
        best = y.argmax(axis=0)
        better = y[best, outputs] > self.attained_upper
        self.x_upper[better], self.attained_upper[better] = x[best[better]], y[best, outputs][better]


def attained(
    network: list[Affine], box: Bounds, bounds: Bounds, slopes: np.ndarray | None, deadline: float | None = None
) -> Extremes:
    """A search for the extremes: corners that linear bounds point to, random inputs, then steps along the gradients.

    Args:
        network: As `chain` returns it.
        box: The lower and the upper corner, each of shape (inputs,).
        bounds: Certified (lower, upper) bounds of the outputs.
        slopes: Of the linear functions below and above each output, as `crown_bounds` returns them, or None.
        deadline: A time of `time.monotonic()` at which the search ends.
    """
    low, high = box
    outputs, inputs = network[-1].bias.size, low.size
    random = np.random.default_rng(0)
    x = [low[None], high[None], (low + (high - low) / 2)[None], random.uniform(low, high, (128, inputs))]
    x.append(np.where(random.random((128, inputs)) < 0.5, low, high))
    nowhere = np.full((outputs, inputs), np.nan)
    found = Extremes(
        bounds[0].copy(), bounds[1].copy(), np.full(outputs, np.inf), np.full(outputs, -np.inf), nowhere, nowhere.copy()
    )
    found.update(network, np.clip(np.concatenate(x), low, high))
    if slopes is not None:
        for part in np.array_split(np.arange(outputs), -(-outputs // 256)):
            found.update(network, np.where(slopes[0][part] > 0, low, high))
            found.update(network, np.where(slopes[1][part] > 0, high, low))
    for part in np.array_split(np.arange(outputs), -(-outputs // 256)):
        for _ in range(20):
            if deadline is not None and time.monotonic() > deadline:
                return found
            before = found.attained_lower.sum(), found.attained_upper.sum()
            for x, sign in ((found.x_lower[part], 1), (found.x_upper[part], -1)):
                corner = np.where(sign * _gradients(network, x, part) > 0, low, high)
                for step in (1.0, 0.5, 0.1):
                    found.update(network, np.clip(x + step * (corner - x), low, high))
            if before == (found.attained_lower.sum(), found.attained_upper.sum()):
                break
    return found


def _gradients(network: list[Affine], x: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Of output `outputs[i]` at `x[i]`: shape (samples, inputs)."""
    slopes = []
    for layer in network[:-1]:
        z = layer.pre_activation(x)
        slopes.append(np.where(z < 0, layer.slope, 1.0))
        x = layer.activation(z)
    gradient = network[-1].weight[outputs]
    gradient = gradient if isinstance(gradient, np.ndarray) else gradient.toarray()
    for layer, slope in zip(network[-2::-1], reversed(slopes), strict=True):
        gradient = (gradient * slope) @ layer.weight
    return gradient


def close_rounding(found: Extremes) -> None:
    """Makes an attained value the bound where they differ by rounding only; no bound is beyond an attained value."""
    rounding = 1e-12 * np.maximum(np.abs(found.attained_lower), np.abs(found.attained_upper))
    near = found.attained_lower - found.lower <= rounding
    found.lower[near] = found.attained_lower[near]
    near = found.upper - found.attained_upper <= rounding
    found.upper[near] = found.attained_upper[near]
