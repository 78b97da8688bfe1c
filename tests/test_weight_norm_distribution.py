"""`WeightNorm` under MirroredStrategy on two virtual CPUs, which conftest makes."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tf_keras
from masked_layers import data, number

from keras_sparse_init import Masked, SparseHeNormal, WeightNorm, data_dependent_init, masked_kernels

either_keras = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
X, Y = data(16, 6, 4), data(16, 2, seed=1)


def network(library, built=True):
    """To trace recurrence takes seconds: only the model that is built before has it."""
    layers = library.layers
    return library.Sequential(
        [
            *([library.Input((6, 4))] if built else []),
            WeightNorm(layers.Conv1D(6, 3, kernel_initializer=SparseHeNormal(seed=1), kernel_regularizer="l2")),
            WeightNorm(layers.SimpleRNN(5)) if built else layers.Flatten(),
            Masked(WeightNorm(layers.Dense(4)), sparsity=0.5, seed=2),
            WeightNorm(Masked(layers.Dense(2), sparsity=0.5, seed=3)),
        ]
    )


@either_keras
def test_two_replicas_train_as_one_device(strategy, library):
    single = network(library)
    with strategy.scope():
        model = network(library)
        model.compile(library.optimizers.SGD(0.1), "mse")
    model.set_weights(single.get_weights())
    single.compile(library.optimizers.SGD(0.1), "mse")
    before = [number(weight).copy() for weight in single.trainable_weights]
    for each in (single, model):
        each.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    for weight, other in zip(single.weights, model.weights, strict=True):
        np.testing.assert_allclose(number(other), number(weight), rtol=1e-4, atol=1e-6)
    for weight, value in zip(model.trainable_weights, before, strict=True):
        assert (number(weight) != value).any()
    for kernel in masked_kernels(model):
        assert not number(kernel.kernel)[number(kernel.mask) == 0].any()


@either_keras
def test_replicas_get_the_data_dependent_initialization_of_a_single_device(strategy, library):
    def dense():
        return library.Sequential(
            [
                library.Input((4,)),
                WeightNorm(library.layers.Dense(6, "tanh", kernel_initializer=SparseHeNormal(seed=1))),
                WeightNorm(library.layers.Dense(2, kernel_initializer=SparseHeNormal(seed=2))),
            ]
        )

    single, x = dense(), data(64, 4)
    with strategy.scope():
        model = dense()
    for each in (single, model):
        data_dependent_init(each, x)
    outputs = strategy.experimental_local_results(strategy.run(lambda: model(x, training=False)))
    assert len(outputs) == 2
    for output in outputs:
        np.testing.assert_allclose(output.numpy().std(axis=0), 1, rtol=1e-3)
        np.testing.assert_allclose(output, single(x), rtol=1e-5, atol=1e-6)


@either_keras
def test_scales_of_a_model_built_by_fit_are_the_norms_on_all_replicas(strategy, library):
    with strategy.scope():
        model = network(library, built=False)
        model.compile(library.optimizers.SGD(0.0), "mse")
    model.fit(X, Y, batch_size=8, verbose=0)
    for wrapper in (model.layers[0], model.layers[2].layer, model.layers[3]):
        variables = [wrapper.kernel_g, wrapper.get_prunable_weights()[0]]
        variables = [getattr(variable, "_variable", variable) for variable in variables]
        variables = [v.value if isinstance(v, keras.Variable) else v for v in variables]
        for g, v in zip(*(variable.values for variable in variables), strict=True):
            length = np.linalg.norm(v.numpy().reshape(-1, v.shape[-1]), axis=0)
            np.testing.assert_allclose(g.numpy(), length, rtol=1e-5)
