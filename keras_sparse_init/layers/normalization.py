"""w = g v / ||v||: equation (2) of weight normalization and its gradients, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from keras_sparse_init import compat

# Squared norms between these are sums that neither overflow nor lose what counts of them to underflow.
_SAFE = (1e-20, 1e30)


def norm(v: Any, axes: tuple[int, ...]) -> Any:
    """||v|| over all axes but `axes`, which it keeps with length 1; in float32 at least."""
    v, summed = _wide(v), _all_but(axes, v)
    _, divisor, squared = _rescaled(v, summed)
    return divisor * compat.ops_of(v).sqrt(squared)


def normalized(v: Any, g: Any, axes: tuple[int, ...]) -> Any:
    """The weights g v / ||v||, in float32 at least; 0 in a unit of zeros, as are its gradients.

    Args:
        v: A tensor or variable.
        g: What the norms are to be, of the shape of the axes that index units; None for 1.
        axes: These axes.
    """
    v, summed = _wide(v), _all_but(axes, v)
    ops = compat.ops_of(v)
    shape = tuple(1 if axis in summed else size for axis, size in enumerate(v.shape))
    g = ops.ones(shape, v.dtype) if g is None else ops.reshape(ops.cast(g, v.dtype), shape)
    if isinstance(v, tf.Tensor | tf.Variable):
        # A variable too: a cast to the dtype that it has gives it back as it is.
        return _normalized_in_tensorflow(tf.convert_to_tensor(v), g, summed)
    values, _, squared = _rescaled(v, summed)
    return values * (g * _inverse_root(squared))


def _normalized_in_tensorflow(v: tf.Tensor, g: tf.Tensor, summed: tuple[int, ...]) -> tf.Tensor:
    """The same with equation (3) written out: half of the passes over v that differentiating each operation takes."""

    @tf.custom_gradient
    def function(v: tf.Tensor, g: tf.Tensor) -> Any:
        values, divisor, squared = _rescaled(v, summed)
        inverse = _inverse_root(squared)

        def gradients(dw: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            dg = inverse * tf.reduce_sum(dw * values, summed, keepdims=True)
            return (dw - values * (dg * inverse)) * (g * inverse / divisor), dg

        return values * (g * inverse), gradients

    return function(v, g)


def _rescaled(v: Any, summed: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """`(v / divisor, divisor, sum of squares of v / divisor)` with a divisor for each unit that makes the sum safe.

    The divisor is 1 where the squares of v can be summed as they are; so that another unit does not change that. It
    is no part of what is differentiated: results do not depend on it.
    """
    ops = compat.ops_of(v)

    def sum_of_squares(values: Any) -> Any:
        return ops.sum(ops.square(values), axis=summed, keepdims=True)

    squared = sum_of_squares(v)
    safe = ops.logical_and(squared > _SAFE[0], squared < _SAFE[1])
    ones = ops.ones_like(squared)

    def divided() -> tuple[Any, Any, Any]:
        largest = ops.stop_gradient(ops.max(ops.abs(v), axis=summed, keepdims=True))
        # Some machines take what is smaller than the smallest normal number for 0 in a division.
        zero = largest < np.finfo(compat.numpy_dtype(compat.float_dtype(v.dtype))).tiny
        divisor = ops.where(ops.logical_or(safe, zero), ones, largest)
        return v / divisor, divisor, sum_of_squares(v / divisor)

    return ops.cond(ops.all(safe), lambda: (v, ones, squared), divided)


def _inverse_root(squared: Any) -> Any:
    """1 / sqrt, and 0 of 0: the root of 0 has no gradient, not even where its value is not taken."""
    ops = compat.ops_of(squared)
    alive = squared > _SAFE[0]
    return ops.where(alive, ops.rsqrt(ops.where(alive, squared, ops.ones_like(squared))), ops.zeros_like(squared))


def _wide(v: Any) -> Any:
    return compat.ops_of(v).cast(v, "float64" if compat.float_dtype(v.dtype) == "float64" else "float32")


def _all_but(axes: tuple[int, ...], v: Any) -> tuple[int, ...]:
    return tuple(axis for axis in range(len(v.shape)) if axis not in axes)
