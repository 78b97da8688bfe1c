"""What calibration asks of each unit of a layer: a bias by a quantile, or the solution of a linear program. Pure NumPy.

Features h have the shape (samples, inputs), kernels w and masks (inputs, units), pre-activations z = h w (samples,
units).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

Objective = Literal["fraction", "zeros", "margin"]
OBJECTIVES = ("fraction", "zeros", "margin")

# A unit varies on the samples when its pre-activations do by more than what rounding leaves of a constant.
_CONSTANT = 1e-6
# Pre-activations of equal samples differ by that part of the largest, when they are computed in float32.
_TIE = 4 * float(np.finfo(np.float32).eps)


def varies(z: np.ndarray) -> np.ndarray:
    """Which units have pre-activations that are not the same on all samples.

    Args:
        z: Pre-activations of shape (samples, units).

    Returns:
        A boolean for each unit.
    """
    return z.std(axis=0) > _CONSTANT * np.abs(z).max(axis=0)


def quantile_bias(z: np.ndarray, on_fraction: float) -> np.ndarray:
    """The bias with which each unit is on for a fraction of the samples.

    b_j = -quantile_{1-p}(z_j), so that P(z_j + b_j > 0) = p, rounded to whole samples.

    The quantile lies halfway between two samples, so that none is on the edge. Samples with the same pre-activation
    are on or off together: then p is the nearest that there is.

    Args:
        z: Pre-activations without bias, of shape (samples, units).
        on_fraction: p, in (0, 1).

    Returns:
        A bias for each unit; 0 for units whose pre-activations are the same on all samples: no bias lets such a unit
        tell samples apart.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.calibration.unit_programs import quantile_bias
        >>> quantile_bias(np.array([[1.0], [2.0], [3.0], [4.0]]), 0.75).tolist()
        [-1.5]
    """
    return np.where(varies(z), -_quantile(z, 1.0 - on_fraction), 0.0)


def _quantile(z: np.ndarray, part: float) -> np.ndarray:
    """Halfway between the largest of a part of the samples and the next; beyond them all where there is none.

    Where these two are the same, to float32, the nearest place between two that are not: with samples on either side.
    """
    ordered = np.sort(z, axis=0)
    step = (ordered[-1] - ordered[0]) / len(z)
    ordered = np.concatenate([ordered[:1] - step, ordered, ordered[-1:] + step])
    differ = np.diff(ordered, axis=0) > _TIE * np.abs(z).max(axis=0)
    wanted = int(np.floor(part * len(z) + 0.5))
    distance = np.abs(np.arange(len(differ)) - wanted)[:, None]
    if 0 < wanted < len(z):
        differ[[0, -1]] = False
    below = np.where(differ, distance, distance + len(differ)).argmin(axis=0)[None]
    return 0.5 * (np.take_along_axis(ordered, below, axis=0) + np.take_along_axis(ordered, below + 1, axis=0))[0]


def wanted_signs(z: np.ndarray, objective: Objective, on_fraction: float) -> np.ndarray:
    """On which samples each unit is to be on (1) and off (-1).

    fraction: on for the `on_fraction` of the samples with its largest pre-activations. zeros: on for all samples.
    margin: as it is, on where its pre-activation is above 0.

    Args:
        z: Pre-activations without bias, of shape (samples, units).
        objective: One of the three.
        on_fraction: p, in (0, 1), of "fraction".

    Returns:
        Signs of the shape of `z`.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.calibration.unit_programs import wanted_signs
        >>> z = np.array([[-1.0], [2.0], [-3.0], [-4.0]])
        >>> [wanted_signs(z, objective, 0.75)[:, 0].tolist() for objective in ("fraction", "zeros", "margin")]
        [[1.0, 1.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0], [-1.0, 1.0, -1.0, -1.0]]
    """
    if objective == "zeros":
        return np.ones_like(z)
    threshold = 0.0 if objective == "margin" else _quantile(z, 1.0 - on_fraction)
    return np.where(z > threshold, 1.0, -1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class UnitPrograms:
    """The linear programs of the units of a layer, one for each, over the same features.

    minimize    mean_i xi_i + lambda / (|S| s0) sum_k |w_k - w0_k|
    subject to  sign_i (w.h_i + b) + xi_i >= m,  xi_i >= 0,
                |w_k - w0_k| <= radius s0,  <w, w0> = <w0, w0>,  |b| <= bias_radius std(z),  w_k = 0 off S

    S are the weights on the unit's mask, s0 is the root mean square of w0 on S, z = w0.h, m = margin s0 rms||h_S|| and
    lambda = stay m.

    They are held in units of s0 and m: u = (w - w0) / s0 and v = b / m; then, with xi = max(0, 1 - sign (w.h + b) / m)
    put in, objective / m is mean_i max(0, 1 - sign_i (z_i / m + h_i.u s0 / m + v)) + stay / |S| sum_k |u_k|.

    Attributes:
        features: h, of shape (samples, inputs).
        kernel: w0, of shape (inputs, units), 0 off the mask.
        signs: 1 and -1, of shape (samples, units).
        start: z / m, of shape (samples, units).
        direction: w0 / s0, of shape (inputs, units).
        box: Largest |u|: `radius` on the mask and 0 off it.
        bias_box: Largest |v| of each unit.
        weight_scale: s0 of each unit.
        margin: m of each unit; 1 where it would be 0.
        stay: What |u_k| costs, for each unit: stay / |S|.
    """

    features: np.ndarray
    kernel: np.ndarray
    signs: np.ndarray
    start: np.ndarray
    direction: np.ndarray
    box: np.ndarray
    bias_box: np.ndarray
    weight_scale: np.ndarray
    margin: np.ndarray
    stay: np.ndarray

    @classmethod
    def of(
        cls,
        features: np.ndarray,
        kernel: np.ndarray,
        mask: np.ndarray,
        signs: np.ndarray,
        radius: float,
        margin: float,
        bias_radius: float,
        stay: float,
    ) -> UnitPrograms:
        """The programs of the units of a layer.

        A unit without weights, without inputs other than 0, or with weights that are all 0 keeps them and a bias of 0.

        Args:
            features: h, of shape (samples, inputs).
            kernel: w0, of shape (inputs, units).
            mask: Booleans of that shape, True for S.
            signs: What `wanted_signs` gives.
            radius: How far a weight may move, in s0.
            margin: How far from 0 pre-activations are to be, in s0 rms||h_S||.
            bias_radius: Largest bias, in standard deviations of z.
            stay: lambda / m, what moving costs.
        """
        kernel = np.where(mask, kernel, 0.0)
        count = mask.sum(axis=0)
        scale = np.sqrt((kernel**2).sum(axis=0) / np.maximum(count, 1))
        m = margin * scale * np.sqrt(mask.T @ (features**2).mean(axis=0))
        live = m > 0
        m, safe = np.where(live, m, 1.0), np.where(live, scale, 1.0)
        z = features @ kernel
        return cls(
            features=features,
            kernel=kernel,
            signs=signs,
            start=z / m,
            direction=kernel / safe,
            box=np.where(mask & live, radius, 0.0),
            bias_box=np.where(live & varies(z), bias_radius * z.std(axis=0) / m, 0.0),
            weight_scale=safe,
            margin=m,
            stay=stay / np.maximum(count, 1),
        )

    @property
    def units(self) -> int:
        """The number of units."""
        return self.kernel.shape[1]

    def subset(self, units: np.ndarray) -> UnitPrograms:
        """The programs of some of the units, given by their numbers."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "features"]
        return dataclasses.replace(self, **{name: getattr(self, name)[..., units] for name in names})

    def forward(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """What a move adds to the pre-activations, in m."""
        return self.features @ (u * (self.weight_scale / self.margin)) + v

    def backward(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The transpose of `forward`, divided by the number of samples; 0 off the mask."""
        y = y / len(y)
        return (self.features.T @ y) * (self.weight_scale / self.margin) * (self.box > 0), y.sum(axis=0)

    def primal(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The objective of each unit, divided by m, at a feasible point."""
        slack = np.maximum(1.0 - self.signs * (self.start + self.forward(u, v)), 0.0)
        return slack.mean(axis=0) + self.stay * np.abs(u).sum(axis=0)

    def dual(self, y: np.ndarray) -> np.ndarray:
        """A lower bound of each unit's objective, divided by m, from multipliers y in [0, 1] of shape (samples, units).

        mean_i y_i (1 - sign_i z_i / m) - bias_box |mean_i y_i sign_i|
        - min_mu sum_k box_k max(|g_k - mu w0_k / s0| - stay, 0), with g the gradient for u.
        """
        gradient, bias_gradient = self.backward(self.signs * y)
        linear = (y * (1.0 - self.signs * self.start)).mean(axis=0) - self.bias_box * np.abs(bias_gradient)
        mu = self._best_multiplier(gradient)
        excess = np.maximum(np.abs(gradient - mu * self.direction) - self.stay, 0.0)
        return linear - (self.box * excess).sum(axis=0)

    def _best_multiplier(self, gradient: np.ndarray) -> np.ndarray:
        """Where the convex, piecewise linear function of mu in `dual` is smallest.

        Each term has a slope of -a below its first kink, 0 between its two and a above, a = box |w0 / s0|: so that the
        smallest value is at the weighted median of all kinks.
        """
        weights = self.box * np.abs(self.direction)
        used = weights > 0
        safe = np.where(used, self.direction, 1.0)
        kinks = np.concatenate([np.where(used, (gradient + side * self.stay) / safe, 0.0) for side in (-1, 1)])
        order = np.argsort(kinks, axis=0, kind="stable")
        below = np.cumsum(np.take_along_axis(np.concatenate([weights, weights]), order, axis=0), axis=0)
        median = (below >= weights.sum(axis=0)).argmax(axis=0)
        return np.take_along_axis(kinks, np.take_along_axis(order, median[None], axis=0), axis=0)[0]

    def weights_and_bias(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The kernel w, 0 off the mask, and the bias b of a point."""
        return self.kernel + u * self.weight_scale, v * self.margin
