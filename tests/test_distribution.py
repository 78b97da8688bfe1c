"""MirroredStrategy on two virtual CPUs, which conftest makes."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from keras_sparse_init import SparseGlorotUniform, SparseHeNormal, SparseMuP, masks

either_keras = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])


def network(library, **settings):
    layers = library.layers
    return library.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.Conv2D(4, 3, activation="relu", kernel_initializer=SparseHeNormal(**settings)),
            layers.Flatten(),
            layers.Dense(5, kernel_initializer=SparseGlorotUniform(**settings)),
        ]
    )


def replicas(variable):
    """The values of a variable on each replica."""
    variable = getattr(variable, "value", variable) if isinstance(variable, keras.Variable) else variable
    assert len(variable.values) == 2
    return [replica.numpy() for replica in variable.values]


@either_keras
@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.5, "seed": 1},
        {"mask": masks.ConstantFanIn(0.75), "seed": 1},
        {"sparsity": 0.5},
        {"sparsity": 0.5, "seed": keras.random.SeedGenerator},
    ],
    ids=["seed", "rule", "no seed", "seed generator"],
)
def test_all_replicas_begin_with_the_same_values(strategy, library, settings):
    if not isinstance(settings.get("seed", 0), int):
        settings = {**settings, "seed": settings["seed"](4)}
    with strategy.scope():
        model = network(library, **settings)
    for weight in model.weights:
        first, second = replicas(weight)
        np.testing.assert_array_equal(first, second)
        assert len(first.shape) == 1 or 0.4 < np.mean(first == 0) < 0.8


@either_keras
def test_the_values_are_those_without_a_strategy(strategy, library):
    with strategy.scope():
        model = network(library, sparsity=0.5, seed=1)
    for ours, plain in zip(model.weights, network(library, sparsity=0.5, seed=1).weights, strict=True):
        np.testing.assert_array_equal(replicas(ours)[1], plain.numpy())


@either_keras
def test_a_kernel_large_enough_to_share_its_memory_reaches_all_replicas(strategy, library):
    init = SparseHeNormal(sparsity=0.5, seed=1)
    with strategy.scope():
        layer = library.layers.Dense(1000, kernel_initializer=init)
        layer.build((None, 600))
    expected = init((600, 1000)).numpy()
    assert expected.nbytes > 2**20
    for values in replicas(layer.kernel):
        np.testing.assert_array_equal(values, expected)


@either_keras
def test_without_a_seed_values_under_a_strategy_follow_set_random_seed(strategy, library):
    def kernels():
        library.utils.set_random_seed(3)
        with strategy.scope():
            return [replicas(weight)[1] for weight in network(library, sparsity=0.5).weights]

    for first, second in zip(kernels(), kernels(), strict=True):
        np.testing.assert_array_equal(first, second)


@either_keras
def test_a_model_trains_under_a_strategy(strategy, library):
    with strategy.scope():
        model = network(library, sparsity=0.5, seed=1)
        model.compile(library.optimizers.SGD(0.01), "mse")
    before = [weight.copy() for weight in model.get_weights()]
    history = model.fit(np.ones((8, 8, 8, 3)), np.ones((8, 5)), batch_size=4, epochs=1, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert any((old != new).any() for old, new in zip(before, model.get_weights(), strict=True))
    for weight in model.weights:
        first, second = replicas(weight)
        np.testing.assert_array_equal(first, second)


@either_keras
def test_rates_of_variables_are_those_without_a_strategy(strategy, library):
    def trained():
        model = network(library, sparsity=0.5, seed=1)
        optimizer = SparseMuP(network(library)).optimizer(model, library.optimizers.Adam(0.01))
        optimizer.rate_multipliers = (3.0, 1.0, 0.2, 1.0)
        model.compile(optimizer, "mse")
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(8, 8, 8, 3)).astype("float32"), rng.normal(size=(8, 5)).astype("float32")
        model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False)
        return model

    with strategy.scope():
        distributed = trained()
    for ours, plain in zip(distributed.weights, trained().weights, strict=True):
        for values in replicas(ours):
            # Adam divides by the root of a second moment: rounding of small gradients shows up to a part of a step.
            np.testing.assert_allclose(values, plain.numpy(), rtol=0, atol=1e-3)


def test_a_layer_first_built_inside_a_replica_gets_the_same_values(strategy):
    init = SparseHeNormal(sparsity=0.5, seed=1)
    with strategy.scope():
        layer = tf_keras.layers.Dense(4, kernel_initializer=init)
        strategy.run(tf.function(lambda: layer(tf.ones((2, 5)))))
    for values in replicas(layer.kernel):
        np.testing.assert_array_equal(values, init((5, 4)))
