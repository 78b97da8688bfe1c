"""w = g v / ||v||: equation (2) of weight normalization and its gradients, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from keras_sparse_init import compat


def norm(v: Any, axes: tuple[int, ...]) -> Any:
    """||v|| over all axes but `axes`, which it keeps with length 1; in float32 at least."""
    v, summed = _wide(v), _all_but(axes, v)
    _, factor, squared = _rescaled(v, summed)
    return compat.ops_of(v).sqrt(squared) / factor


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
        values, factor, squared = _rescaled(v, summed)
        inverse = _inverse_root(squared)

        def gradients(dw: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            dg = inverse * _sum(dw * values, summed)
            return (dw - values * (dg * inverse)) * (g * inverse * factor), dg

        return values * (g * inverse), gradients

    return function(v, g)


def _rescaled(v: Any, summed: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """`(factor * v, factor, sum of squares of factor * v)`: the square of 1e-30 would be 0, that of 1e30 infinite.

    There is a factor for each unit, which brings its sum of |v| to between 1 and 2. It is a power of 2, so that
    rounding does not depend on it, and no part of what is differentiated, as results do not either.
    """
    ops = compat.ops_of(v)
    size = ops.stop_gradient(_sum(ops.abs(v), summed))
    limits = np.finfo(compat.numpy_dtype(compat.float_dtype(v.dtype)))
    # Some machines take what is smaller than the smallest normal number for 0.
    nonzero = ops.where(size >= limits.tiny, size, ops.ones_like(size))
    exponent = ops.minimum(ops.floor(ops.log(nonzero) / float(np.log(2.0))), float(limits.maxexp - 2))
    factor = ops.power(ops.ones_like(size) * 2.0, -exponent)
    values = v * factor
    return values, factor, _sum(ops.square(values), summed)


def _sum(values: Any, summed: tuple[int, ...]) -> Any:
    """The sum over axes, which are kept with length 1."""
    if isinstance(values, tf.Tensor) and summed and summed == tuple(range(len(values.shape) - 1)):
        # The same as `tf.reduce_sum`, three times as fast on a CPU.
        return tf.reshape(tf.raw_ops.BiasAddGrad(out_backprop=values), [1] * len(summed) + [values.shape[-1]])
    return compat.ops_of(values).sum(values, axis=summed, keepdims=True)


def _inverse_root(squared: Any) -> Any:
    """1 / sqrt, and 0 of 0: the root of 0 has no gradient, not even where its value is not taken."""
    ops = compat.ops_of(squared)
    alive = squared > 0
    return ops.where(alive, ops.rsqrt(ops.where(alive, squared, ops.ones_like(squared))), ops.zeros_like(squared))


def _wide(v: Any) -> Any:
    return compat.ops_of(v).cast(v, "float64" if compat.float_dtype(v.dtype) == "float64" else "float32")


def _all_but(axes: tuple[int, ...], v: Any) -> tuple[int, ...]:
    return tuple(axis for axis in range(len(v.shape)) if axis not in axes)
