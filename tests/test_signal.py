"""What goes through a model: against closed forms and plain NumPy, in both Kerases."""

import keras
import numpy as np
import pytest
import tf_keras

from keras_sparse_init import compat, measure_signal

BOTH = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
_RANDOM = np.random.default_rng(0)
_X = _RANDOM.normal(1.0, 2.0, size=(40, 6)).astype(np.float32)
_Y = _RANDOM.normal(size=(40, 3)).astype(np.float32)


def _perceptron(library):
    L = library.layers
    return library.Sequential(
        [L.Input((6,)), L.Dense(5, "relu", name="a", bias_initializer="ones"), L.Dense(3, name="b")]
    )


def _by_hand(model):
    """Pre-activations, activations and gradients of the mean squared error, layer by layer, in float64."""
    w, b, v, c = (compat.to_numpy("weight", weight).astype(np.float64) for weight in model.weights)
    first = _X @ w + b
    hidden = np.maximum(first, 0)
    outputs = hidden @ v + c
    back = 2 * (outputs - _Y) / outputs.size
    return (
        first,
        hidden,
        outputs,
        back @ v.T,
        back,
        {"a/kernel": _X.T @ (back @ v.T * (first > 0)), "b/kernel": hidden.T @ back},
    )


@BOTH
@pytest.mark.parametrize("batch_size", [40, 7])
def test_the_numbers_are_those_of_plain_numpy_whatever_the_batch_size(library, batch_size):
    model = _perceptron(library)
    report = measure_signal(model, _X, _Y, library.losses.MeanSquaredError(), batch_size=batch_size)
    first, hidden, outputs, back_hidden, back, kernels = _by_hand(model)
    a, b = report["a"], report["b"]
    for spread, values in ((a.pre, first), (a.post, hidden), (b.pre, outputs), (b.post, outputs)):
        units = values.std(axis=0)
        found = (spread.mean, spread.std, spread.unit_std_mean, spread.unit_std_min, spread.unit_std_max)
        expected = (values.mean(), values.std(), units.mean(), units.min(), units.max())
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    for layer, gradient in ((a, back_hidden), (b, back)):
        np.testing.assert_allclose(
            (layer.gradient_mean, layer.gradient_std), (gradient.mean(), gradient.std()), rtol=1e-4
        )
    assert (a.units, a.size, a.kind, a.has_kernel) == (5, 5, "Dense", True)
    assert a.zero_fraction == pytest.approx((hidden == 0).mean())
    assert a.dead_units == (hidden == 0).all(axis=0).sum()
    assert a.always_on_units == (hidden != 0).all(axis=0).sum()
    directions = first / np.linalg.norm(first, axis=1, keepdims=True)
    cosines = directions @ directions.T
    assert a.cosine == pytest.approx(cosines[~np.eye(40, dtype=bool)].mean(), abs=1e-6)
    for kernel in report.kernels:
        gradient = kernels[kernel.name]
        expected = gradient.mean(), gradient.std(), (gradient**2).sum()
        found = kernel.gradient_mean, kernel.gradient_std, kernel.gradient_flow
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert report.output_std == pytest.approx(outputs.std(), rel=1e-5)
