"""Gradients of a model's loss, against a network whose gradient is known in closed form."""

import keras
import numpy as np
import pytest
import tf_keras

from keras_sparse_init import Masked, compat, set_masks, sparsify
from keras_sparse_init.comparison.gradients import gradient_function, gradient_norm

_RANDOM = np.random.default_rng(0)
_X = _RANDOM.normal(size=(12, 5)).astype(np.float32)
_Y = _RANDOM.normal(size=(12, 3)).astype(np.float32)
_MASK = np.arange(15).reshape(5, 3) % 2 == 0


def _linear(library, wrap, **options):
    layer = library.layers.Dense(3, **options)
    model = library.Sequential([library.layers.Input((5,)), wrap(layer)])
    return model


def _closed_form(kernel, bias, mask):
    """Of the mean over images and outputs of (x (w m) + b - y)^2."""
    error = 2 * (_X @ (kernel * mask) + bias - _Y) / _Y.size
    return [_X.T @ error * mask, error.sum(axis=0)]


def _check(model, library, mask):
    gradients = gradient_function(model, library.losses.MeanSquaredError())(_X, _Y)
    values = [compat.to_numpy("weight", variable) for variable in model.trainable_variables]
    for found, expected in zip(gradients, _closed_form(*values, mask), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    return gradients


@pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
def test_the_gradient_is_that_of_the_closed_form_and_follows_the_weights(library):
    model = _linear(library, lambda layer: layer)
    gradient = gradient_function(model, library.losses.MeanSquaredError())
    for scale in (1, 3):
        for variable in model.trainable_variables:
            compat.assign(variable, np.full(variable.shape, scale / 10, np.float32))
        kernel, bias = (compat.to_numpy("weight", variable) for variable in model.trainable_variables)
        for found, expected in zip(gradient(_X, _Y), _closed_form(kernel, bias, 1), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
def test_the_gradient_is_zero_off_the_mask_and_the_closed_form_on_it(library):
    model = _linear(library, lambda layer: Masked(layer, mask=_MASK))
    gradients = _check(model, library, _MASK)
    assert np.all(gradients[0][~_MASK] == 0)


def test_the_gradient_of_tfmots_wrappers_is_masked_too():
    dense = _linear(tf_keras, lambda layer: layer)
    model = sparsify(dense, 0.5, seed=0)
    set_masks(model, [_MASK])
    assert np.all(_check(model, tf_keras, _MASK)[0][~_MASK] == 0)


@pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
def test_nothing_of_the_model_changes(library):
    """Batch normalization keeps its statistics, dropout is off."""
    layers = library.layers
    model = library.Sequential(
        [layers.Input((5,)), layers.Dense(3), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(3)]
    )
    before = [compat.to_numpy("weight", variable).copy() for variable in model.variables]
    gradient = gradient_function(model, library.losses.MeanSquaredError())
    for first, second in zip(gradient(_X, _Y), gradient(_X, _Y), strict=True):
        np.testing.assert_array_equal(first, second)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(compat.to_numpy("weight", variable), value)


def test_a_variable_that_the_loss_does_not_depend_on_has_gradient_zero_and_sparse_ones_are_dense_arrays():
    embedding = tf_keras.layers.Embedding(4, 3)
    model = tf_keras.Sequential([tf_keras.layers.Input((2,)), embedding])
    model.unused = model.add_weight(name="unused", shape=(2,), initializer="ones")
    gradient = gradient_function(model, lambda y, outputs: tf_keras.backend.sum(outputs))
    x = np.array([[0, 1], [1, 1]])
    by_shape = {array.shape: array for array in gradient(x, np.zeros(2))}
    np.testing.assert_array_equal(by_shape[4, 3], np.repeat([[1.0], [3.0], [0.0], [0.0]], 3, axis=1))
    np.testing.assert_array_equal(by_shape[(2,)], [0, 0])


def test_a_model_without_trainable_variables_is_refused():
    model = tf_keras.Sequential([tf_keras.layers.Input((2,)), tf_keras.layers.Flatten()])
    with pytest.raises(ValueError, match="must have trainable variables"):
        gradient_function(model, tf_keras.losses.MeanSquaredError())


def test_the_norm_is_over_all_gradients_together():
    assert gradient_norm([np.array([[1.0, 2.0]]), np.array([2.0])]) == 3.0
    assert gradient_norm([np.full(4, 1e30, np.float32)]) == pytest.approx(2e30)  # Squares beyond float32.
