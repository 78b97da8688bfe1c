"""The sums that are made of a layer's values and gradients, batch by batch, and the numbers that come of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from keras_sparse_init import compat
from keras_sparse_init.signal.moments import Directions, Moments, Zeros
from keras_sparse_init.signal.probe import Place, Seen
from keras_sparse_init.signal.report import LayerSignal


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
    def of(cls, seen: Seen, count: int, factor: float, cache: dict[int, Parts]) -> LayerSums:
        """Those of one batch.

        Args:
            seen: What was seen: arrays; or, where they have been summed before, `Parts`, a `NotSeenError` in place of
                what cannot be, and the moments of the gradient.
            count: Number of samples.
            factor: By what the gradients are too large.
            cache: What has been made of the arrays of this batch: layers share them.

        Raises:
            NotSeenError: When the values are not those of samples.
        """

        def parts(values: Any) -> Parts:
            if isinstance(values, NotSeenError):
                raise values
            if isinstance(values, Parts):
                return values
            if id(values) not in cache:
                cache[id(values)] = _ArrayParts(values, count)
            return cache[id(values)]

        first, post = parts(seen.post if seen.pre is None else seen.pre), parts(seen.post)
        gradient = seen.gradient
        if gradient is not None and not isinstance(gradient, Moments):
            gradient = Moments.of_all(real(gradient))
        return cls(
            layer=seen.layer,
            pre=None if seen.pre is None else first.moments,
            post=post.moments,
            zeros=post.zeros if has_zeros(seen) else None,
            directions=first.directions,
            gradient=None if gradient is None else gradient.divided(factor),
            pre_shape=first.sample_shape,
            post_shape=post.sample_shape,
        )

    def merged(self, other: LayerSums) -> LayerSums:
        """Those of the samples of both.

        Raises:
            NotSeenError: When a sample has another shape in each: then the values are not those of samples.
        """
        if (self.pre_shape, self.post_shape) != (other.pre_shape, other.post_shape):
            shapes = f"{self.post_shape} in one batch and {other.post_shape} in another"
            raise NotSeenError(f"its output has for each sample the shape {shapes}")

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


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """What is made of an array of samples; None is what no layer asks for."""

    sample_shape: tuple[int, ...]
    moments: Moments
    directions: Directions | None
    zeros: Zeros | None


class _ArrayParts:
    """`Parts` of an array, each made when it is asked for, once."""

    def __init__(self, values: np.ndarray, count: int) -> None:
        self._matrix, self.sample_shape = as_matrix(values, count), sample_shape(values.shape, count)

    @functools.cached_property
    def moments(self) -> Moments:
        return Moments.of(self._matrix)

    @functools.cached_property
    def directions(self) -> Directions:
        return Directions.of(self._matrix)

    @functools.cached_property
    def zeros(self) -> Zeros:
        return Zeros.of(self._matrix)


def moments_of(outputs: list[Any], count: int) -> list[Moments]:
    """Those of the outputs of a model: of floating arrays, or moments as they are."""
    found = [output for output in outputs if isinstance(output, Moments) or compat.is_floating(output)]
    return [output if isinstance(output, Moments) else Moments.of(as_matrix(output, count)) for output in found]


def has_zeros(place: Seen | Place) -> bool:
    """Whether zeros are counted: those of an activation that is not linear."""
    activation = getattr(place.layer, "activation", None)
    # A layer whose kind is an activation (ReLU) has no attribute of that name.
    is_linear = hasattr(place.layer, "activation") and (activation is None or compat.is_linear(activation))
    return place.pre is not None and not is_linear


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
    sample_shape(values.shape, count)
    return np.ascontiguousarray(real(values).reshape(count, -1))


def sample_shape(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The shape of a sample; rows of a layer that is called on all parts of samples at once are an axis more.

    Raises:
        NotSeenError: When the first axis is not that of samples.
    """
    rows = shape[0] if shape else 0
    if rows == 0 or rows % count or 0 in shape:
        raise NotSeenError(f"its output of shape {shape} has no axis for the {count} samples")
    return shape[1:] if rows == count else (rows // count, *shape[1:])
