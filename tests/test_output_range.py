"""Ranges of the outputs of Keras models: against what the models themselves put out."""

import json
from itertools import product

import keras
import numpy as np
import pytest
import tf_keras
from tensorflow_model_optimization.sparsity.keras import prune_low_magnitude

from keras_sparse_init import Masked, OutputRange, WeightNorm, compat, output_range, set_masks, sparsify
from keras_sparse_init.ranges.affine_chain import affine_chain
from keras_sparse_init.ranges.piecewise import forward

LIBRARIES = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])


def with_random_weights(model, seed=0):
    """Biases and batch statistics too: what Keras starts them with would hide mistakes."""
    random = np.random.default_rng(seed)
    for weight in model.weights:
        if "mask" in weight.name or "pruning_step" in weight.name or "threshold" in weight.name:
            continue
        values = random.normal(0, 0.5, tuple(weight.shape))
        compat.assign(
            weight,
            np.minimum(np.abs(values) + 0.1, 1) if "variance" in weight.name or "alpha" in weight.name else values,
        )
    return model


def sequential(library, shape, *layers):
    return with_random_weights(library.Sequential([library.layers.Input(shape), *layers]))


def outputs(model, x):
    return compat.to_numpy("outputs", model(x.astype(np.float32), training=False)).astype(np.float64)


def assert_is_the_model(model, tolerance=2e-5):
    network, shape, output_shape = affine_chain(model)
    x = np.random.default_rng(1).normal(size=(16, *shape)).astype(np.float32)
    y = outputs(model, x)
    assert y.shape[1:] == tuple(output_shape)
    found = forward(network, x.reshape(16, -1).astype(np.float64)).reshape(y.shape)
    np.testing.assert_allclose(found, y, atol=tolerance * max(1, np.abs(y).max()))
    return network


def images(library):
    """Layers for images of shape (6, 5, 4), by what they are to show."""
    layers = library.layers
    return [
        [layers.Conv2D(3, 3, strides=2, padding="same", activation="relu"), layers.BatchNormalization()],
        [layers.Conv2D(4, (2, 3), dilation_rate=(2, 1), groups=2), layers.ReLU(negative_slope=0.25)],
        [layers.DepthwiseConv2D(2, depth_multiplier=2), layers.AveragePooling2D(2, strides=1, padding="same")],
        [layers.SeparableConv2D(3, 2, activation="relu"), layers.GlobalAveragePooling2D(), layers.Dense(2)],
        [layers.Conv2DTranspose(2, 3, strides=2), layers.PReLU(shared_axes=[1, 2]), layers.Cropping2D(1)],
        [layers.ZeroPadding2D(((1, 0), (2, 1))), layers.Permute((3, 1, 2)), layers.Dense(2), layers.LeakyReLU()],
        [layers.Reshape((10, 12)), layers.Conv1D(3, 3, padding="causal"), layers.UpSampling1D(2), layers.Flatten()],
        [layers.Reshape((3, 2, 5, 4)), layers.Conv3D(2, 2, activation="relu"), layers.AveragePooling3D((1, 1, 2))],
    ]


@LIBRARIES
@pytest.mark.parametrize("number", range(8))
def test_the_network_computes_what_the_model_computes(library, number):
    assert_is_the_model(sequential(library, (6, 5, 4), *images(library)[number]))


@LIBRARIES
def test_an_average_is_that_of_real_numbers_not_of_float32(library):
    layers = library.layers
    model = library.Sequential([layers.Input((3, 3, 1)), layers.AveragePooling2D(3), layers.Flatten()])
    found = output_range(model, 1, 1)
    np.testing.assert_allclose([found.lower[0], found.upper[0]], 1, rtol=1e-14)


@LIBRARIES
def test_channels_may_come_first(library):
    layers = library.layers
    first = {"data_format": "channels_first"}
    parts = [layers.AveragePooling2D(2, **first), layers.ZeroPadding2D(1, **first), layers.Flatten(**first)]
    model = library.Sequential([layers.Input((3, 6, 4)), *parts, layers.Dense(2)])
    # A processor computes no such pooling: the same on channels that come last.
    last = [layers.AveragePooling2D(2), layers.ZeroPadding2D(1), layers.Flatten(), layers.Dense(2)]
    other = library.Sequential([layers.Input((6, 4, 3)), *last])
    other.set_weights(with_random_weights(model).get_weights())
    x = np.random.default_rng(0).normal(size=(5, 3, 6, 4))
    found = forward(affine_chain(model)[0], x.reshape(5, -1))
    np.testing.assert_allclose(found, outputs(other, np.moveaxis(x, 1, -1)), atol=1e-5)


@LIBRARIES
def test_linear_layers_are_folded_and_idle_ones_left_out(library):
    layers = library.layers
    parts = [layers.Dense(7), layers.BatchNormalization(), layers.Dropout(0.5), layers.Activation("linear")]
    model = sequential(library, (5,), *parts, layers.Dense(4), layers.Activation("leaky_relu"), layers.Dense(3))
    network = assert_is_the_model(model)
    assert [layer.weight.shape for layer in network] == [(4, 5), (3, 4)]
    np.testing.assert_allclose(network[0].slope, 0.2, rtol=1e-6)


@LIBRARIES
def test_branches_that_meet_again_and_models_in_models_are_followed(library):
    layers = library.layers
    block = sequential(library, (6,), layers.Dense(6, activation="relu"), layers.Dense(6))
    start = x = layers.Input((6,))
    x = layers.Add()([x, block(x)])
    x = layers.Activation("relu")(x)
    x = layers.Subtract()([block(x), x])
    a, b = layers.Dense(4, activation="relu")(x), layers.Dense(2)(layers.Dropout(0.5)(x))
    x = layers.Concatenate()([a, b, x])
    model = library.Model(start, layers.Average()([layers.Dense(2)(x), b]))
    network = assert_is_the_model(with_random_weights(model))
    # Beside the activations goes what is still needed, and no more: `start`, nothing, x, and at last x and b.
    assert [layer.bias.size for layer in network] == [6 + 6, 6, 6 + 6, 4 + 6 + 2, 2]


@LIBRARIES
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_wrapped_layers_count_with_the_weights_they_run_on_and_the_model_stays_as_it_is(library, order):
    wraps = [
        lambda layer: Masked(layer, sparsity=0.5, seed=0),
        WeightNorm,
        lambda layer: Masked(WeightNorm(layer), sparsity=0.5, seed=0),
        lambda layer: WeightNorm(Masked(layer, sparsity=0.5, seed=0)),
    ]
    layers = library.layers
    parts = [wraps[order](layers.Conv2D(3, 2, activation="relu")), layers.Flatten(), wraps[order](layers.Dense(3))]
    # Weights off the mask are not 0 now: they must not count, nor be changed.
    model = sequential(library, (4, 4, 1), *parts)
    before = [compat.to_numpy("weight", weight).copy() for weight in model.weights]
    assert_is_the_model(model)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(compat.to_numpy("weight", weight), value)


def test_tfmots_wrappers_are_read_too():
    layers = tf_keras.layers
    dense = sequential(tf_keras, (4, 4, 1), layers.Conv2D(3, 2, activation="relu"), layers.Flatten(), layers.Dense(3))
    for model in (sparsify(dense, 0.5, seed=0), prune_low_magnitude(dense)):
        set_masks(model, lambda shape, seed: np.arange(np.prod(shape)).reshape(shape) % 2, seed=0)
        before = with_random_weights(model).get_weights()
        found = output_range(model, -1, 1, "ibp")
        for weight, value in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(weight, value)
        y = outputs(model, np.random.default_rng(0).uniform(-1, 1, (50, 4, 4, 1)))  # Masks its kernels in place.
        assert np.all(found.lower - 1e-5 <= y) and np.all(y <= found.upper + 1e-5)
        assert_is_the_model(model)


@LIBRARIES
@pytest.mark.parametrize("method", ["ibp", "crown", "exact"])
def test_no_input_is_outside(library, method):
    layers = library.layers
    parts = [layers.Conv1D(2, 2, activation="relu"), layers.Flatten(), layers.Dense(4), layers.LeakyReLU(0.1)]
    model = sequential(library, (4, 2), *parts, layers.Dense(2))
    low = np.linspace(-1, 0, 8).reshape(4, 2)
    found = output_range(model, low, 1, method)
    random = np.random.default_rng(0)
    x = random.uniform(low, 1, (20000, 4, 2))
    x[10000:] = np.where(random.random((10000, 4, 2)) < 0.5, low, 1)
    y = outputs(model, x)
    rounding = 1e-5
    assert np.all(found.lower - rounding <= y.min(axis=0)) and np.all(y.max(axis=0) <= found.upper + rounding)
    assert np.all(found.lower <= found.attained_lower) and np.all(found.attained_upper <= found.upper)
    assert found.x_lower.shape == (2, 4, 2) and np.all(found.x_lower >= low) and np.all(found.x_upper <= 1)
    for i in range(2):
        np.testing.assert_allclose(outputs(model, found.x_lower)[i, i], found.attained_lower[i], atol=rounding)
        np.testing.assert_allclose(outputs(model, found.x_upper)[i, i], found.attained_upper[i], atol=rounding)
    assert found.method == method and np.all(found.exact == (method == "exact"))


@LIBRARIES
def test_each_method_is_tighter_than_the_one_before(library):
    model = sequential(library, (3,), *(library.layers.Dense(5, activation="relu") for _ in range(2)))
    widths = [np.sum(f.upper - f.lower) for f in (output_range(model, -1, 1, m) for m in ("ibp", "crown", "exact"))]
    assert widths[0] > widths[1] > widths[2] > 0


# (weights, lower, upper, range): |x|, x or x / 2, and |x_0 + x_1|.
_KNOWN = [
    ([[[1.0, -1.0]], [[1.0], [1.0]]], -2, 2, (0, 2)),
    ([[[1.0, -1.0]], [[1.0], [-0.5]]], -1, 1, (-0.5, 1)),
    ([[[1.0, -1.0], [1.0, -1.0]], [[1.0], [1.0]]], [-2, -2], 2, (0, 4)),
]


@LIBRARIES
@pytest.mark.parametrize(("weights", "lower", "upper", "expected"), _KNOWN)
def test_known_ranges_come_out_exactly(library, weights, lower, upper, expected):
    layers = library.layers
    parts = [layers.Dense(2, activation="relu", use_bias=False), layers.Dense(1, use_bias=False)]
    model = library.Sequential([layers.Input((len(weights[0]),)), *parts])
    model.set_weights([np.array(weight) for weight in weights])
    found = output_range(model, lower, upper)
    assert (found.lower.item(), found.upper.item()) == expected and found.exact.all() and found.method == "exact"


def test_a_box_of_one_point_and_an_activation_at_the_end():
    model = sequential(keras, (3,), keras.layers.Dense(4, activation="relu"))
    x = np.array([0.1, -0.3, 0.7], np.float32)
    found = output_range(model, x, x)
    np.testing.assert_allclose(found.lower, outputs(model, x[None])[0], atol=1e-6)
    np.testing.assert_array_equal(found.lower, found.upper)
    assert found.exact.all() and found.unstable == 0


def test_with_a_time_limit_what_is_certified_by_then_is_returned_and_marked():
    parts = [keras.layers.Dense(60, activation="relu") for _ in range(3)]
    model = sequential(keras, (20,), *parts, keras.layers.Dense(3))
    output_range(model, -1, 1, "ibp")  # Reading is not interrupted; the first time takes longest.
    found = output_range(model, -1, 1, time_limit=1.0)
    assert found.method == "exact" and found.seconds < 4 and not found.exact.any()
    assert np.all(found.lower < found.attained_lower) and np.all(found.attained_upper < found.upper)
    assert output_range(model, -1, 1).method == "crown"  # Without one it is too large to try.


@LIBRARIES
def test_what_is_not_piecewise_linear_is_refused_by_name(library):
    layers = library.layers

    class Own(layers.Dense):
        pass

    parts = {
        "tanh": layers.Dense(2, activation="tanh", name="culprit"),
        "softmax": layers.Dense(2, activation="softmax", name="culprit"),
        "MaxPooling1D": layers.MaxPooling1D(name="culprit"),
        "max_value=6": layers.ReLU(max_value=6.0, name="culprit"),
        "LayerNormalization": layers.LayerNormalization(name="culprit"),
        "class of its own": Own(2, name="culprit"),
        "outside": layers.LeakyReLU(1.5, name="culprit"),
    }
    for detail, layer in parts.items():
        model = library.Sequential([layers.Input((4, 2)), layer])
        with pytest.raises(ValueError, match=f"'culprit'.*{detail}.*is not supported. Supported are Dense") as error:
            output_range(model, 0, 1)
        assert ("give the model without its last activation" in str(error.value)) == (detail == "softmax")
    inputs = layers.Input((3,))
    with pytest.raises(ValueError, match="add.*, an operation on tensors, which is no layer.*is not supported"):
        output_range(library.Model(inputs, inputs + layers.Dense(3)(inputs)), 0, 1)


@LIBRARIES
def test_models_whose_graph_is_not_known_are_refused(library):
    class Own(library.Model):
        def __init__(self):
            super().__init__()
            self.dense = library.layers.Dense(2)

        def call(self, x):
            return library.activations.tanh(self.dense(x))

    own = Own()
    own(np.zeros((1, 3), np.float32))
    with pytest.raises(ValueError, match="a `call` of its own"):
        output_range(own, 0, 1)

    class Doubled(library.Sequential):
        def call(self, *args, **kwargs):
            return 2 * super().call(*args, **kwargs)

    with pytest.raises(ValueError, match="something else than its layers say"):
        output_range(Doubled([library.layers.Input((3,)), library.layers.Dense(2)]), 0, 1)
    with pytest.raises(ValueError, match="must be built"):
        output_range(library.Sequential([library.layers.Dense(2)]), 0, 1)
    a, b = library.layers.Input((3,)), library.layers.Input((3,))
    with pytest.raises(ValueError, match="must have one input"):
        output_range(library.Model([a, b], library.layers.Add()([a, b])), 0, 1)
    with pytest.raises(ValueError, match="must have one output"):
        output_range(library.Model(a, [library.layers.Dense(2)(a), a]), 0, 1)
    with pytest.raises(ValueError, match="known shape"):
        output_range(library.Sequential([library.layers.Input((None, 3)), library.layers.Dense(2)]), 0, 1)


def test_wrong_arguments_are_refused():
    model = sequential(keras, (2, 3), keras.layers.Dense(1))
    for arguments, message in [
        ((np.zeros(2), 1), r"`lower` must broadcast to the input's shape \(2, 3\). Received: an array of shape \(2,\)"),
        ((0, np.inf), "`upper` must be finite. Received: inf"),
        ((np.nan, 1), "`lower` must be finite. Received: nan"),
        ((0, [1, 1, -1]), r"`lower` must not be above `upper`. Received: 0.0 > -1.0 at \(0, 2\)"),
        (("a", 1), "`lower` must be a number or an array of numbers. Received: lower='a'"),
        ((0, True), "`upper` must be a number"),
        ((0, 1, "best"), "`method` must be one of 'auto', 'ibp', 'crown', 'exact'"),
        ((0, 1, "auto", 0), "`time_limit` must be a positive float. Received: time_limit=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            output_range(model, *arguments)
    model.layers[0].kernel.assign(np.full((3, 1), np.nan))
    with pytest.raises(ValueError, match="The weights '.*kernel' must be finite. Received: nan"):
        output_range(model, 0, 1)
    with pytest.raises(TypeError, match="Expected a layer or model"):
        output_range("model", 0, 1)
    with pytest.raises(TypeError, match="must be a Keras model"):
        output_range(keras.layers.Dense(2), 0, 1)


def test_the_table_says_what_is_known_and_the_dict_is_json():
    model = sequential(keras, (2,), keras.layers.Dense(30))
    found = output_range(model, 0, 1)
    assert isinstance(found, OutputRange)
    lines = str(found).splitlines()
    assert lines[0].split() == ["output", "lower", "attained", "from", "to", "upper", "exact"]
    assert [float(cell) for cell in lines[3].split()[1:5]] == pytest.approx(
        [found.lower[2], found.lower[2], found.upper[2], found.upper[2]], rel=1e-5
    )
    assert lines[21] == "... and 10 more; 30 of 30 outputs are exact"
    values = json.loads(json.dumps(found.to_dict()))
    assert values["lower"] == found.lower.tolist() and values["exact"] == [True] * 30
    corners = np.array(list(product((0, 1), repeat=2)))
    np.testing.assert_allclose(found.upper, outputs(model, corners).max(axis=0), atol=1e-6)
