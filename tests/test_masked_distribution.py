"""`Masked` under MirroredStrategy on two virtual CPUs, which conftest makes."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tf_keras
from masked_layers import data, subclassed, weights_and_masks

from keras_sparse_init import Masked, MaskUpdate, RigL, masked_kernels, masks, set_masks
from keras_sparse_init.slots import slots_of

either_keras = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
X, Y = data(16, 6, 4), data(16, 2, seed=1)


def network(library, **settings):
    """With layers whose state is updated in the middle of a masked layer's call."""
    layers = library.layers
    block = library.Sequential([layers.Conv1D(6, 3), layers.BatchNormalization(), layers.Conv1D(4, 2)])
    return library.Sequential(
        [
            library.Input((6, 4)),
            Masked(block, sparsity=0.5, **settings),
            Masked(layers.LSTM(5), sparsity=0.5, **settings),
            Masked(layers.Dense(2), mask=masks.ConstantFanIn(0.4), **settings),
        ]
    )


def replicas(variable):
    """The values of a variable on each replica."""
    variable = getattr(variable, "_variable", variable)
    variable = variable.value if isinstance(variable, keras.Variable) else variable
    assert len(variable.values) == 2
    return [replica.numpy() for replica in variable.values]


def assert_replicas_are_equal_and_sparse(model):
    assert masked_kernels(model)
    for kernel in masked_kernels(model):
        (weights, other_weights), (mask, other_mask) = replicas(kernel.kernel), replicas(kernel.mask)
        np.testing.assert_array_equal(mask, other_mask)
        np.testing.assert_array_equal(weights, other_weights)
        assert 0 < mask.mean() < 1
        assert not weights[mask == 0].any()
        assert any(value is kernel.kernel for value in vars(kernel.layer).values())


@either_keras
@pytest.mark.parametrize("seed", [1, None])
def test_kernels_and_masks_are_bitwise_equal_on_all_replicas(strategy, library, seed):
    with strategy.scope():
        model = network(library, seed=seed)
        model.compile(library.optimizers.Adam(0.01), "mse")
    assert_replicas_are_equal_and_sparse(model)
    before = weights_and_masks(model)
    if seed is not None:
        for pair, plain in zip(before, weights_and_masks(network(library, seed=seed)), strict=True):
            np.testing.assert_array_equal(pair, plain)
        return
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0)
    assert_replicas_are_equal_and_sparse(model)
    assert any((new[0] != old[0]).any() for new, old in zip(weights_and_masks(model), before, strict=True))
    set_masks(model, masks.Random(0.6), seed=3)
    assert_replicas_are_equal_and_sparse(model)
    model.fit(X, Y, batch_size=8, verbose=0)
    assert_replicas_are_equal_and_sparse(model)


@either_keras
def test_training_on_replicas_is_training_on_one_device(strategy, library):
    def train():
        layers = library.layers
        model = library.Sequential(
            [library.Input((4,)), Masked(layers.Dense(6, "tanh"), sparsity=0.5, seed=1), layers.Dense(2, name="last")]
        )
        model.get_layer("last").set_weights([data(6, 2), data(2)])
        model.compile(library.optimizers.SGD(0.1, momentum=0.9), "mse")
        model.fit(X[:, 0], Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        return model

    with strategy.scope():
        model = train()
    for weight, expected in zip(model.get_weights(), train().get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-6)


@either_keras
def test_a_model_that_is_built_by_fit_is_equal_on_all_replicas(strategy, library):
    with strategy.scope():
        model = subclassed(library, lambda layer: Masked(layer, sparsity=0.5))
        model.compile(library.optimizers.Adam(0.01), "mse")
    model.fit(data(8, 5), data(8, 2), batch_size=4, verbose=0)
    assert_replicas_are_equal_and_sparse(model)


@either_keras
def test_updates_of_masks_are_equal_on_all_replicas_and_those_on_one_device(strategy, library):
    """With momentum, whose slots are reset; weights that are not zero would show one that was not."""

    def train():
        layers = library.layers
        model = library.Sequential(
            [library.Input((4,)), Masked(layers.Dense(16, "tanh"), sparsity=0.75, seed=1), Masked(layers.Dense(2))]
        )
        model.layers[1].layer.set_weights([data(16, 2), data(2)])
        model.compile(library.optimizers.SGD(0.1, momentum=0.9), "mse")
        update = MaskUpdate(RigL(end_step=8, frequency=1, drop_fraction=0.5), X[:, 0], Y)
        model.fit(X[:, 0], Y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[update])
        return model

    with strategy.scope():
        model = train()
    first, *_ = masked_kernels(model)
    for variable in first.kernel, first.mask, *(slot for slot, _ in slots_of(model.optimizer, first.kernel)):
        np.testing.assert_array_equal(*replicas(variable))
    plain = train()
    start = Masked(library.layers.Dense(16), sparsity=0.75, seed=1)
    start.build((None, 4))
    assert (start.kernels_and_masks()[0][1] != masked_kernels(plain)[0].mask).numpy().any()
    np.testing.assert_array_equal(first.mask_value(), masked_kernels(plain)[0].mask_value())
    for weight, expected in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-5)
