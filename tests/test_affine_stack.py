"""A pass through the stack against TensorFlow's."""

import numpy as np
import pytest
import tensorflow as tf

from keras_sparse_init.comparison.affine_stack import ACTIVATIONS, activation_functions, pass_through

_TENSORFLOW = {
    "linear": tf.identity,
    "relu": tf.nn.relu,
    "leaky_relu": lambda z: tf.nn.leaky_relu(z, 0.25),
    "tanh": tf.nn.tanh,
    "sigmoid": tf.nn.sigmoid,
    "elu": tf.nn.elu,
    "selu": tf.nn.selu,
    "silu": tf.nn.silu,
}


def _stack(sizes=(7, 5, 6, 3), samples=4):
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=shape) for shape in zip(sizes, sizes[1:], strict=False)]
    biases = [rng.normal(size=size) for size in sizes[1:]]
    return kernels, biases, rng.normal(size=(samples, sizes[0])), rng.normal(size=(samples, sizes[-1]))


def _by_tensorflow(kernels, biases, x, y, activation):
    """The loss, and for each layer the same as `pass_through`, from a tape."""
    kernels, biases = ([tf.constant(array) for array in arrays] for arrays in (kernels, biases))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([kernels, biases])
        values, before = tf.constant(x), []
        activations = []
        for kernel, bias in zip(kernels, biases, strict=True):
            before.append(values @ kernel + bias)
            values = activation(before[-1])
            activations.append(values)
        losses = 0.5 * tf.reduce_sum((values - y) ** 2, axis=1)
        loss, total = tf.reduce_mean(losses), tf.reduce_sum(losses)
    found = {
        "pre_activation": before,
        "activation": activations,
        "kernel": kernels,
        "kernel_gradient": tape.gradient(loss, kernels),
        "bias_gradient": tape.gradient(loss, biases),
        # The gradient of a sample's loss by its activations is that of the sum of all losses.
        "activation_gradient": tape.gradient(total, activations),
    }
    return float(loss), found


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_pass_forward_and_backward_is_tensorflows(name):
    kernels, biases, x, y = _stack()
    loss, layers = pass_through(kernels, biases, x, y, *activation_functions(name, 0.25))
    expected_loss, expected = _by_tensorflow(kernels, biases, x, y, _TENSORFLOW[name])
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for quantity, arrays in expected.items():
        for layer, array in zip(layers, arrays, strict=True):
            np.testing.assert_allclose(layer[quantity], array.numpy(), rtol=1e-9, atol=1e-12, err_msg=quantity)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_at_zero_too_the_derivative_is_tensorflows(name):
    kernels, biases, x, y = _stack()
    kernels, biases = [np.zeros_like(kernel) for kernel in kernels], [np.zeros_like(bias) for bias in biases]
    _, layers = pass_through(kernels, biases, x, y, *activation_functions(name, 0.25))
    _, expected = _by_tensorflow(kernels, biases, x, y, _TENSORFLOW[name])
    np.testing.assert_allclose(layers[-1]["bias_gradient"], expected["bias_gradient"][-1].numpy(), atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float32_stays_float32_and_large_values_stay_finite(name):
    kernels, biases, x, y = _stack()
    kernels, biases, x, y = ([a.astype(np.float32) for a in part] for part in (kernels, biases, 1e4 * x, y))
    _, layers = pass_through(kernels, biases, np.stack(x), np.stack(y), *activation_functions(name, 0.25))
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for layer in layers for array in layer.values())


def test_a_pass_changes_none_of_its_inputs():
    arguments = _stack()
    copies = _stack()
    pass_through(*arguments, *activation_functions("relu"))
    for arrays, copied in zip(arguments, copies, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(arrays, copied, strict=True))
