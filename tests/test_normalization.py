"""w = g v / ||v|| as tensors: against the formula differentiated by TensorFlow, operation by operation."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from keras_sparse_init.layers import normalization
from keras_sparse_init.layers.normalization import norm, normalized

SHAPE = (3, 2, 4)
AXES = [(), (2,), (0, 2), (0, 1, 2)]


def tensors(axes, scale=1.0):
    random = np.random.default_rng(0)
    v = tf.constant(scale * random.normal(size=SHAPE))
    return v, tf.constant(random.normal(size=[SHAPE[axis] for axis in axes])), tf.constant(random.normal(size=SHAPE))


def formula(v, g, axes):
    summed = [axis for axis in range(3) if axis not in axes]
    g = tf.reshape(g, [SHAPE[axis] if axis in axes else 1 for axis in range(3)])
    return g * v / tf.sqrt(tf.reduce_sum(v * v, summed, keepdims=True))


def derivatives(function, v, g, axes, direction):
    """w, the gradients of sum(sin(w) * direction), and the product of its Hessian in (v, g) with (direction, g)."""
    with tf.GradientTape() as outer:
        outer.watch([v, g])
        with tf.GradientTape() as inner:
            inner.watch([v, g])
            w = function(v, g, axes)
            value = tf.reduce_sum(tf.sin(w) * direction)
        first = inner.gradient(value, [v, g])
    second = outer.gradient(first, [v, g], [direction, g], unconnected_gradients="zero")
    return [w, *first, *second]


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_values_and_first_and_second_derivatives_are_those_of_the_formula(axes, traced):
    arguments = tensors(axes)
    run = tf.function(derivatives) if traced else derivatives
    found = run(normalized, *arguments[:2], axes, arguments[2])
    for one, other in zip(found, derivatives(formula, *arguments[:2], axes, arguments[2]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("axes", AXES[:3], ids=str)
@pytest.mark.parametrize("scale", [1e-140, 1e-12, 1e12, 1e140])
def test_derivatives_do_not_depend_on_the_scale_of_v_but_for_its_factor(axes, scale):
    v, g, direction = tensors(axes)
    w, dv, dg, *_ = derivatives(normalized, v, g, axes, direction)
    scaled_w, scaled_dv, scaled_dg, *_ = derivatives(normalized, v * scale, g, axes, direction)
    np.testing.assert_allclose(scaled_w, w, rtol=1e-12)
    np.testing.assert_allclose(scaled_dg, dg, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(scaled_dv * scale, dv, rtol=1e-10, atol=1e-14)


def test_one_unit_far_from_1_changes_no_bit_of_the_others():
    v, g, direction = tensors((2,))
    plain = derivatives(normalized, v, g, (2,), direction)[:3]
    mixed = derivatives(normalized, v * [1.0, 1e-140, 1.0, 0.0], g, (2,), direction)[:3]
    for one, other in zip(plain, mixed, strict=True):
        np.testing.assert_array_equal(one.numpy()[..., [0, 2]], other.numpy()[..., [0, 2]])
        assert not other.numpy()[..., 3].any()


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e30])
def test_units_of_one_kernel_may_lie_far_apart(scale):
    v = tf.constant([[3.0, 3 * scale], [4.0, 4 * scale]], tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(v)
        w = normalized(v, tf.constant([5.0, 10.0]), (1,))
        first = w[0, 1]
    np.testing.assert_allclose(w, [[3, 6], [4, 8]], rtol=1e-6)
    # d(10 v0 / ||v||) = 10 / ||v|| (1 - 0.36, -0.48).
    gradient = tape.gradient(first, v).numpy().astype(np.float64)
    np.testing.assert_allclose(gradient * scale, [[0, 1.28], [0, -0.96]], rtol=1e-5)


def test_norms_are_summed_in_float32_at_least():
    v = tf.constant([[3e-30], [4e-30]], tf.float32)
    np.testing.assert_allclose(norm(v, (1,)), [[5e-30]], rtol=1e-6)
    v = tf.constant([[300.0], [400.0]], tf.float16)  # Squares of them are more than float16 has.
    assert norm(v, (1,)).dtype == tf.float32
    np.testing.assert_allclose(norm(v, (1,)), [[500]], rtol=1e-6)


def test_the_written_out_gradient_is_that_of_variables_too(monkeypatch):
    """A cast of a variable to its own dtype gives it back, which is no tensor."""
    variable, calls = tf.Variable(np.ones((3, 2), np.float32)), []
    written_out = normalization._normalized_in_tensorflow
    monkeypatch.setattr(
        normalization, "_normalized_in_tensorflow", lambda *args: calls.append(args) or written_out(*args)
    )
    for function in (normalized, tf.function(normalized, autograph=False)):
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(function(variable, None, (1,))[0])
        gradient = tape.gradient(value, variable)
        np.testing.assert_allclose(gradient, [[2 / 27**0.5] * 2, *[[-1 / 27**0.5] * 2] * 2], rtol=1e-6)
    assert len(calls) == 2
