"""The sums that are made of a layer's values and gradients, batch by batch, and the numbers that come of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from keras_sparse_init import compat
from keras_sparse_init.moments import Directions, Moments, Zeros
from keras_sparse_init.probe import Seen
from keras_sparse_init.signal_report import LayerSignal


class NotSeenError(ValueError):
    """Says why the values of a layer are not those of samples."""


@dataclasses.dataclass(frozen=True, eq=False)
class LayerSums:
    """Of the samples so far in one call of a layer."""

    layer: Any
    pre: Moments | None
    post: Moments
    zeros: Zeros | None
    directions: Directions
    gradient: Moments | None
    pre_shape: tuple[int, ...]
    post_shape: tuple[int, ...]

    @classmethod
    def of(cls, seen: Seen, count: int, factor: float, cache: dict[int, _Parts]) -> LayerSums:
        """Those of one batch.

        Args:
            seen: What was seen.
            count: Number of samples.
            factor: By what the gradients are too large.
            cache: What has been made of the arrays of this batch: layers share them.
        """

        def parts(values: np.ndarray) -> _Parts:
            if id(values) not in cache:
                cache[id(values)] = _Parts(as_matrix(values, count))
            return cache[id(values)]

        first = seen.post if seen.pre is None else seen.pre
        gradient = None if seen.gradient is None else Moments.of_all(real(seen.gradient)).divided(factor)
        return cls(
            layer=seen.layer,
            pre=None if seen.pre is None else parts(seen.pre).moments,
            post=parts(seen.post).moments,
            zeros=None if seen.pre is None or _is_linear(seen.layer) else Zeros.of(parts(seen.post).values),
            directions=parts(first).directions,
            gradient=gradient,
            pre_shape=_sample_shape(first, count),
            post_shape=_sample_shape(seen.post, count),
        )

    def merged(self, other: LayerSums) -> LayerSums:
        """Those of the samples of both.

        Raises:
            ValueError: When a sample has another shape in each.
        """
        if (self.pre_shape, self.post_shape) != (other.pre_shape, other.post_shape):
            raise ValueError(
                f"The samples of {self.layer.name!r} have the shape {self.post_shape} in one batch and "
                f"{other.post_shape} in another. Measure with one `batch_size` for all"
            )

        def both(name: str) -> Any:
            first, second = getattr(self, name), getattr(other, name)
            return None if first is None or second is None else first.merged(second)

        names = ("pre", "post", "zeros", "directions", "gradient")
        return dataclasses.replace(self, **{name: both(name) for name in names})

    def signal(self, name: str, has_kernel: bool) -> LayerSignal:
        """The numbers, under the name of the call."""
        axis = compat.unit_axis(self.layer, len(self.post_shape))
        post = self.post.spread(self.post_shape, axis)
        zeros, gradient = self.zeros, None if self.gradient is None else self.gradient.spread()
        units = self.post_shape[axis] if self.post_shape else 1
        dead, always = (None, None) if zeros is None else zeros.dead_and_always_on(self.post_shape, axis)
        return LayerSignal(
            name=name,
            kind=type(self.layer).__name__,
            has_kernel=has_kernel,
            units=units,
            size=self.post.mean.size,
            pre=None if self.pre is None else self.pre.spread(self.pre_shape, axis),
            post=post,
            zero_fraction=None if zeros is None else zeros.fraction(),
            dead_units=dead,
            always_on_units=always,
            cosine=self.directions.cosine(),
            gradient_mean=None if gradient is None else gradient.mean,
            gradient_std=None if gradient is None else gradient.std,
        )


class _Parts:
    """What is made of an array of shape (samples, positions) when it is asked for, once."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    @functools.cached_property
    def moments(self) -> Moments:
        """The moments of its positions."""
        return Moments.of(self.values)

    @functools.cached_property
    def directions(self) -> Directions:
        """The directions of its samples."""
        return Directions.of(self.values)


def _is_linear(layer: Any) -> bool:
    activation = getattr(layer, "activation", None)
    # A layer whose kind is an activation (ReLU) has no attribute of that name.
    return hasattr(layer, "activation") and (activation is None or compat.is_linear(activation))


def real(values: np.ndarray) -> np.ndarray:
    """The values in float32 or float64."""
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float32)


def as_matrix(values: np.ndarray, count: int) -> np.ndarray:
    """An array of shape (samples, positions) of a layer's values.

    Raises:
        NotSeenError: When they are not those of samples.
    """
    if not compat.is_floating(values):
        raise NotSeenError(f"its output has the dtype {values.dtype}")
    _sample_shape(values, count)
    return np.ascontiguousarray(real(values).reshape(count, -1))


def _sample_shape(values: np.ndarray, count: int) -> tuple[int, ...]:
    """The shape of a sample; rows of a layer that is called on all parts of samples at once are an axis more."""
    rows = values.shape[0] if values.ndim else 0
    if rows == 0 or rows % count or values.size == 0:
        raise NotSeenError(f"its output of shape {values.shape} has no axis for the {count} samples")
    return values.shape[1:] if rows == count else (rows // count, *values.shape[1:])
