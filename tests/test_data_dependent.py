"""Data-dependent initialization of weight-normalized layers, in both Kerases."""

import keras
import numpy as np
import pytest
import tf_keras

from keras_sparse_init import Masked, WeightNorm, compat, data_dependent_init

BOTH = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
_RANDOM = np.random.default_rng(0)
_IMAGES = _RANDOM.normal(3, 2, size=(64, 8, 8, 3)).astype(np.float32)


def _convnet(library, **options):
    L = library.layers
    return library.Sequential(
        [
            L.Input((8, 8, 3)),
            WeightNorm(L.Conv2D(6, 3, activation="relu", name="conv"), **options),
            WeightNorm(L.DepthwiseConv2D(3, depth_multiplier=2, activation="tanh", name="depthwise"), **options),
            WeightNorm(L.Conv2DTranspose(4, 3, activation="relu", name="transposed"), **options),
            L.Flatten(),
            L.Dense(7),
            WeightNorm(L.Dense(5, name="dense"), **options),
        ]
    )


def _moments(model, x, names):
    """Mean and standard deviation of each unit's pre-activations, by a model that ends in each of the layers."""
    found = {}
    value = x
    for layer in model.layers:
        plain = getattr(layer, "layer", layer)
        if plain.name in names:
            activation, plain.activation = plain.activation, None
            out = np.asarray(layer(value)).astype(np.float64)
            plain.activation = activation
            found[plain.name] = out.mean(axis=tuple(range(out.ndim - 1))), out.std(axis=tuple(range(out.ndim - 1)))
        value = layer(value)
    return found


NAMES = ("conv", "depthwise", "transposed", "dense")


@BOTH
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_pre_activations_on_the_batch_have_mean_0_and_the_std_asked_for_layer_after_layer(library, scale):
    model = _convnet(library, init_scale=scale)
    before = _moments(model, _IMAGES, NAMES)
    assert any(np.abs(std - scale).max() > 0.1 for _, std in before.values())
    data_dependent_init(model, _IMAGES)
    for mean, std in _moments(model, _IMAGES, NAMES).values():
        np.testing.assert_allclose(mean, 0, atol=1e-3 * scale)
        np.testing.assert_allclose(std, scale, rtol=1e-3)


@BOTH
def test_nothing_else_changes_and_nothing_is_initialized_by_itself(library):
    model = _convnet(library)
    kernels = [compat.to_numpy("v", layer.get_prunable_weights()[0]).copy() for layer in model.layers[:3]]
    activations = [getattr(getattr(layer, "layer", layer), "activation", None) for layer in model.layers]
    data_dependent_init(model, _IMAGES)
    weights = [np.array(weight) for weight in model.get_weights()]
    for layer, kernel in zip(model.layers[:3], kernels, strict=True):
        np.testing.assert_array_equal(compat.to_numpy("v", layer.get_prunable_weights()[0]), kernel)
    model.predict(_IMAGES[:8] * 100, verbose=0)
    model(_IMAGES[:8] - 50, training=True)
    model.compile("sgd", "mse")
    model.evaluate(_IMAGES[:8], np.zeros((8, 5)), verbose=0)
    for weight, expected in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(weight, expected)
    assert activations == [getattr(getattr(layer, "layer", layer), "activation", None) for layer in model.layers]


@BOTH
def test_constant_units_keep_a_finite_g_with_a_warning(library):
    x = _RANDOM.normal(size=(1, 4)).astype(np.float32)
    for batch, where in ((x, "3 of 3"), (np.repeat(x, 9, axis=0), "3 of 3")):
        layer = WeightNorm(library.layers.Dense(3))
        model = library.Sequential([library.layers.Input((4,)), layer])
        before = compat.to_numpy("g", layer.kernel_g).copy()
        with pytest.warns(UserWarning, match=f"{where} units of .* have constant pre-activations"):
            data_dependent_init(model, batch)
        np.testing.assert_array_equal(compat.to_numpy("g", layer.kernel_g), before)
        assert all(np.all(np.isfinite(weight)) for weight in model.get_weights())


@BOTH
def test_a_layer_without_bias_gets_the_std_alone_and_masked_weights_do_not_count(library):
    layer = WeightNorm(Masked(library.layers.Dense(4, use_bias=False), sparsity=0.5, seed=0))
    model = library.Sequential([library.layers.Input((20,)), layer])
    x = _RANDOM.normal(1, 3, size=(200, 20)).astype(np.float32)
    data_dependent_init(model, x)
    outputs = np.asarray(model.predict(x, verbose=0))
    np.testing.assert_allclose(outputs.std(axis=0), 1, rtol=1e-3)
    assert np.abs(outputs.mean(axis=0)).max() > 1e-3


@BOTH
def test_shared_layers_count_all_their_calls_and_order_is_that_of_the_calls(library):
    L = library.layers
    first, second = WeightNorm(L.Dense(4, "relu", name="b")), WeightNorm(L.Dense(4, "relu", name="a"))
    inputs = library.Input((4,))
    model = library.Model(inputs, second(first(first(inputs))))
    x = _RANDOM.normal(size=(100, 4)).astype(np.float32)
    data_dependent_init(model, x)
    once = np.asarray(first(x))
    assert np.all(np.isfinite(once))
    second.layer.activation, kept = None, second.layer.activation
    outputs = np.asarray(second(first(once)))
    second.layer.activation = kept
    np.testing.assert_allclose(outputs.std(axis=0), 1, rtol=1e-3)
    np.testing.assert_allclose(outputs.mean(axis=0), 0, atol=1e-3)


@BOTH
def test_a_shared_layer_gets_its_moments_from_all_its_calls_together(library):
    L = library.layers
    shared = WeightNorm(L.Dense(3))
    a, b = library.Input((4,)), library.Input((4,))
    model = library.Model([a, b], [shared(a), shared(b)])
    x = [_RANDOM.normal(mean, std, size=(50, 4)).astype(np.float32) for mean, std in ((0, 1), (5, 3))]
    data_dependent_init(model, x)
    parts = [np.asarray(shared(part)) for part in x]
    outputs = np.concatenate(parts)
    np.testing.assert_allclose(outputs.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(outputs.std(axis=0), 1, rtol=1e-3)
    assert np.abs(parts[0].mean(axis=0)).max() > 0.01


@BOTH
@pytest.mark.parametrize("bias_name", ["bias", None])
def test_a_layer_of_the_users_own_needs_no_use_bias(library, bias_name):
    class Own(library.layers.Layer):
        activation = None

        def build(self, input_shape):
            self.kernel = self.add_weight(name="kernel", shape=(input_shape[-1], 3), initializer="glorot_uniform")
            if bias_name:
                self.bias = self.add_weight(name="bias", shape=(3,), initializer="zeros")
            self.built = True

        def call(self, inputs):
            outputs = inputs @ self.kernel
            return self.activation(outputs + self.bias if bias_name else outputs)

    own = Own()
    own.activation = library.activations.linear
    model = library.Sequential([library.layers.Input((4,)), WeightNorm(own)])
    x = _RANDOM.normal(3, 2, size=(100, 4)).astype(np.float32)
    data_dependent_init(model, x)
    outputs = np.asarray(model.predict(x, verbose=0))
    np.testing.assert_allclose(outputs.std(axis=0), 1, rtol=1e-3)
    assert bool(np.abs(outputs.mean(axis=0)).max() < 1e-3) == bool(bias_name)


@BOTH
@pytest.mark.parametrize(
    "x, message", [(np.ones((0, 4)), "'out' are none"), (np.full((2, 4), np.nan), "not all finite")]
)
def test_a_batch_without_finite_samples_is_refused_and_nothing_changed(library, x, message):
    model = library.Sequential([library.layers.Input((4,)), WeightNorm(library.layers.Dense(3, name="out"))])
    before = [np.array(weight) for weight in model.get_weights()]
    with pytest.raises(ValueError, match=f"`x` must have samples.*{message}"):
        data_dependent_init(model, x.astype(np.float32))
    for weight, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)


@BOTH
def test_what_cannot_be_initialized_is_refused_and_nothing_changed(library):
    L = library.layers
    with pytest.raises(TypeError, match="Expected a layer or model"):
        data_dependent_init(5, np.ones((3, 4)))
    with pytest.raises(ValueError, match="`use_scale` must be a bool.*'no'"):
        WeightNorm(L.Dense(3), use_scale="no")
    for make, message in (
        (lambda: L.Dense(3), "must have WeightNorm layers"),
        (lambda: WeightNorm(L.Dense(3), use_scale=False), "has no g"),
        (lambda: WeightNorm(L.EinsumDense("ab,bc->ac", output_shape=3)), "Known are Dense and convolutions"),
        (lambda: WeightNorm(L.Dense(3), feature_axes=0), "Known are Dense and convolutions"),
    ):
        first = make()
        model = library.Sequential([L.Input((4,)), *([WeightNorm(L.Dense(4))] if "must" not in message else []), first])
        before = [np.array(weight) for weight in model.get_weights()]
        with pytest.raises(ValueError, match=message):
            data_dependent_init(model, np.ones((3, 4), np.float32))
        for weight, expected in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(weight, expected)
