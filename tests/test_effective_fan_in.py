"""`granularity="effective"`: fans that count only inputs which get a signal and outputs which pass one on."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from keras_sparse_init import (
    SparseHeNormal,
    SparseScaledInit,
    compat,
    masked_kernels,
    masks,
    reinitialize,
    set_masks,
    sparsify,
)
from keras_sparse_init.training import SignalGrid

BOTH = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])


def network(library):
    """Two branches of convolutions, joined, flattened, and two dense layers: not built of one chain."""
    L = library.layers
    inputs = L.Input((8, 8, 2))
    h = L.Conv2D(6, 3, activation="relu", use_bias=False)(inputs)
    left = L.Conv2D(5, 3, padding="same", activation="relu", use_bias=False)(h)
    right = L.Conv2D(4, 3, padding="same", activation="relu", use_bias=False)(h)
    h = L.MaxPooling2D(3)(L.Concatenate()([left, right]))
    h = L.Dense(12, "relu", use_bias=False)(L.Flatten()(h))
    return library.Model(inputs, L.Dense(7, use_bias=False)(h))


def masked(library, wrapper, sparsity=0.8):
    """The network with masks that leave many units dead."""
    return sparsify(network(library), sparsity, "uniform", masks.Heterogeneous, wrapper=wrapper, seed=2)


def ones_through(model):
    """What goes into each kernel's layer when inputs and active weights are 1, and what comes back to its outputs.

    Nothing cancels then: where a number is 0, no path of weights leads.
    """
    kernels = masked_kernels(model)
    for kernel in kernels:
        kernel.kernel.assign(kernel.mask_value().astype(np.float32))
    owners = [layer for layer in model.layers if hasattr(layer, "layer")]
    library = keras if isinstance(model, keras.Model) else tf_keras
    inside = library.Model(model.inputs, [part for layer in owners for part in (layer.input, layer.output)])
    x = tf.ones((1, 8, 8, 2))
    with tf.GradientTape() as tape:
        tape.watch(x)
        found = inside(x)
    back = tape.gradient(found[-1], found[1::2])
    return kernels, [value.numpy() for value in found[::2]], [value.numpy() for value in back]


@pytest.mark.parametrize(
    ("library", "wrapper"), [(keras, "masked"), (tf_keras, "masked"), (tf_keras, "tfmot")], ids=str
)
@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
def test_only_live_ends_count_in_the_fans(library, wrapper, mode):
    model = masked(library, wrapper)
    drawn = {}
    for granularity in ("dense", "effective"):
        reinitialize(model, SparseScaledInit(2.0, mode, granularity=granularity), seed=5)
        drawn[granularity] = [compat.to_numpy("kernel", kernel.kernel).copy() for kernel in masked_kernels(model)]
    kernels, inputs, outputs = ones_through(model)
    dead = 0
    for kernel, live, back, dense, effective in zip(kernels, inputs, outputs, *drawn.values(), strict=True):
        mask = kernel.mask_value()
        live = live.reshape(-1, mask.shape[-2]).any(axis=0)[:, None]
        needed = back.reshape(-1, mask.shape[-1]).any(axis=0)
        dead += (~live).sum() + (~needed).sum()
        field_axes = tuple(range(mask.ndim - 2))
        fan_in = (mask & live).sum(axis=(*field_axes, mask.ndim - 2), keepdims=True)
        fan_out = (mask & needed).sum(axis=(*field_axes, mask.ndim - 1), keepdims=True)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
        field = mask[..., 0, 0].size
        dense_fan = {"fan_in": mask.shape[-2], "fan_out": mask.shape[-1], "fan_avg": sum(mask.shape[-2:]) / 2}[mode]
        expected = dense * np.sqrt(dense_fan * field / np.maximum(fan, 1))
        np.testing.assert_allclose(effective, expected, rtol=1e-5)
    assert dead > 5


@BOTH
def test_where_all_units_are_live_it_is_the_same_as_unit(library):
    model = sparsify(network(library), 0.5, "uniform", seed=0)
    drawn = {}
    for granularity in ("unit", "effective"):
        reinitialize(model, SparseHeNormal(granularity=granularity), seed=5)
        drawn[granularity] = [compat.to_numpy("kernel", kernel.kernel).copy() for kernel in masked_kernels(model)]
    for one, other in zip(*drawn.values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_sparsify_draws_by_live_inputs_too():
    init = SparseHeNormal(granularity="effective")
    sparse = sparsify(network(keras), 0.8, "uniform", masks.Heterogeneous, init, seed=2)
    other = masked(keras, "masked")
    reinitialize(other, init, seed=2)
    for one, expected in zip(sparse.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(one, expected)
    # So does a model whose layers have such an initializer themselves, and drew dense kernels when they were built.
    L = keras.layers

    def perceptron(**settings):
        dense = [L.Dense(30, "relu", name=name, **settings) for name in "abc"]
        return keras.Sequential([L.Input((30,)), *dense])

    own = sparsify(perceptron(kernel_initializer=init), 0.95, rule=masks.Heterogeneous, seed=2)
    given = sparsify(perceptron(), 0.95, rule=masks.Heterogeneous, initializer=init, seed=2)
    for one, expected in zip(own.get_weights(), given.get_weights(), strict=True):
        np.testing.assert_array_equal(one, expected)


def test_signal_dies_less_on_heterogeneous_masks():
    """Against each other on the same masks and noise: a coin would say so of all 24 networks once in 10^7 times."""
    result = SignalGrid(
        masks=["heterogeneous"], sparsities=[0.8], inits=["unit", "effective"], repeats=24, inputs=32
    ).run()
    by_init = {init: [n.output_std for n in result.networks if n.init == init] for init in ("unit", "effective")}
    assert (np.array(by_init["effective"]) > np.array(by_init["unit"])).all()


def test_the_signal_grid_draws_as_reinitialize_does():
    grid = SignalGrid(masks=["heterogeneous"], sparsities=[0.9], inits=["effective"], repeats=1, inputs=2, seed=3)
    L = keras.layers
    layers = [L.Conv2D(6, 5, activation="relu"), L.MaxPooling2D(), L.Conv2D(16, 5, activation="relu"), L.MaxPooling2D()]
    layers += [L.Flatten(), *(L.Dense(units, "relu") for units in (120, 84, 10))]
    model = sparsify(keras.Sequential([L.Input((28, 28, 3)), *layers]), 0.5, seed=0)
    set_masks(model, grid.network_masks("heterogeneous", 0.9, 0))
    stds = []
    for granularity in ("effective", "dense"):
        reinitialize(model, SparseScaledInit(2.0, distribution="untruncated_normal", granularity=granularity), seed=0)
        stds.append([compat.to_numpy("kernel", kernel.kernel).copy() for kernel in masked_kernels(model)])
    dense = grid.kernels("heterogeneous", 0.9, "dense", 0)
    for kernel, scaled, by_fan, other in zip(
        grid.kernels("heterogeneous", 0.9, "effective", 0), *stds, dense, strict=True
    ):
        active = kernel != 0
        np.testing.assert_allclose(kernel[active] / other[active], scaled[active] / by_fan[active], rtol=1e-5)


class Subclassed(keras.Model):
    """Its layers follow each other as Python says."""

    def __init__(self):
        super().__init__()
        self.first, self.last = keras.layers.Dense(8, "relu"), keras.layers.Dense(2)

    def call(self, x):
        return self.last(self.first(x))


def test_a_model_that_cannot_be_read_is_refused_and_keeps_its_weights():
    model = Subclassed()
    model(np.ones((1, 4), np.float32))
    before = model.get_weights()
    with pytest.raises(ValueError, match="must be readable.*cannot be read: .*as its `call` says"):
        sparsify(model, 0.5, initializer=SparseHeNormal(granularity="effective"), seed=0)
    assert type(model.first) is keras.layers.Dense
    for weight, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)
    sparsify(model, 0.5, seed=0)
    before = model.get_weights()
    with pytest.raises(ValueError, match="must be readable"):
        reinitialize(model, SparseHeNormal(granularity="effective"), seed=0)
    for weight, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize("argument", [{"sparsity": 0.5}, {"mask": masks.Random(0.5)}, {"mask": [[1, 0]]}])
def test_a_mask_of_its_own_is_refused(argument):
    with pytest.raises(ValueError, match="`mask` and `sparsity` must be None with granularity='effective'"):
        SparseHeNormal(granularity="effective", **argument)


@BOTH
def test_models_with_it_are_saved_loaded_and_cloned(library, tmp_path):
    L = library.layers
    init = SparseScaledInit(2.0, granularity="effective", seed=1)
    model = sparsify(library.Sequential([L.Input((6,)), L.Dense(5, kernel_initializer=init), L.Dense(2)]), 0.5, seed=0)
    model.save(tmp_path / "model.keras")
    loaded = library.models.load_model(tmp_path / "model.keras")
    for one, other in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    clone = library.models.clone_model(model)
    assert masked_kernels(clone)[0].initializer.granularity == "effective"
