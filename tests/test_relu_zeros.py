"""Zeros of ReLUs and their patterns against loops over every entry, and what is a ReLU and what is not."""

import json

import keras
import masked_layers
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.sparsity.keras import prune_low_magnitude

from keras_sparse_init import Masked, count_relu_zeros
from keras_sparse_init.signal.rectifiers import rectifiers
from keras_sparse_init.signal.relu_zeros import relu_zeros

BOTH = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
_RANDOM = np.random.default_rng(0)
X = _RANDOM.normal(size=(300, 6)).astype(np.float32)
IMAGES = _RANDOM.normal(size=(20, 6, 6, 2)).astype(np.float32)
number = masked_layers.number


def counted_by_loops(layers):
    """The document's way, a Python loop over every entry. Arrays of shape (samples, positions, units)."""
    per_unit, patterns = [], set()
    for outputs in layers:
        counts = [0] * outputs.shape[-1]
        for sample in outputs:
            for position in sample:
                for unit, value in enumerate(position):
                    counts[unit] += value == 0
        per_unit.append(counts)
    for rows in zip(*layers, strict=True):
        patterns.add(tuple(bool(value == 0) for row in rows for value in row.ravel()))
    return per_unit, len(patterns)


@BOTH
def test_counts_and_patterns_are_those_of_a_loop_over_every_entry(library):
    L = library.layers
    parts = [L.Dense(5, "relu", name="a"), L.Dense(4, name="b"), L.ReLU(name="c"), L.Dense(3, "relu", name="d")]
    model = library.Sequential([L.Input((6,)), *parts])
    outputs, value = {}, X
    for part in parts:
        outputs[part.name] = value = number(part(value))
    per_unit, patterns = counted_by_loops([outputs[name][:, None] for name in "acd"])
    assert 1 < patterns < 300
    # The last is of 44 samples; 300 are more than the 255 that are added up at a time.
    for batch_size in (None, 64, 300, 1000):
        zeros = count_relu_zeros(model, X, batch_size)
        assert [zeros.per_unit[name].tolist() for name in "acd"] == per_unit
        assert list(zeros.per_unit) == ["a", "c", "d"]
        assert zeros.per_layer == {name: sum(counts) for name, counts in zip("acd", per_unit, strict=True)}
        assert zeros.total == sum(map(sum, per_unit))
        assert zeros.outputs == {"a": 1500, "c": 1200, "d": 900}
        assert zeros.fraction == zeros.total / 3600
        assert (zeros.samples, zeros.patterns) == (300, patterns)


@BOTH
def test_units_of_convolutions_are_channels_and_patterns_look_at_every_position(library):
    L = library.layers
    conv = L.Conv2D(3, 3, activation="relu", name="conv")
    model = library.Sequential([L.Input((6, 6, 2)), conv, L.Flatten(), L.Dense(1)])
    images = IMAGES.copy()
    images[1] = images[0]
    images[2] = -images[0]
    outputs = number(conv(images))
    # The zeros of each channel of these two are as many; where they are is not the same.
    images[3], images[4] = images[0], images[0, ::-1, ::-1]
    conv.set_weights([np.ones((3, 3, 2, 3)), np.array([0.0, 1e9, -1e9])])
    outputs = number(conv(images))
    per_unit, patterns = counted_by_loops([outputs.reshape(20, 16, 3)])
    zeros = count_relu_zeros(model, images, batch_size=7)
    assert zeros.per_unit["conv"].tolist() == per_unit[0]
    assert (zeros.outputs["conv"], zeros.patterns) == (20 * 16 * 3, patterns)
    assert patterns == 18
    assert (zeros.dead_units, zeros.always_on_units) == ({"conv": 1}, {"conv": 1})


@BOTH
def test_every_way_to_write_a_relu_counts_and_others_are_named(library):
    L = library.layers
    activations = library.activations

    class Rectifier(L.ReLU):
        pass

    relus = [
        L.Dense(6, "relu", name="text"),
        L.Dense(6, activations.relu, name="function"),
        L.Dense(6, tf.nn.relu, name="tensorflow"),
        L.Dense(6, tf.nn.relu6, name="relu6"),
        L.Dense(6, keras.activations.relu6 if library is keras else "relu6", name="text6"),
        L.Dense(6, keras.ops.relu, name="ops"),
        L.ReLU(6.0, name="capped"),
        Rectifier(name="subclass"),
        L.Activation("relu", name="activation"),
        Masked(L.Dense(6, "relu", name="masked")),
    ]
    others = [
        L.LeakyReLU(name="leaky"),
        L.ReLU(negative_slope=0.1, name="slope"),
        L.ReLU(threshold=1.0, name="threshold"),
        L.Activation("tanh", name="tanh"),
        L.Dense(6, lambda x: x, name="lambda"),
        L.Dense(6, name="linear"),
        L.PReLU(name="prelu"),
        L.Lambda(lambda x: tf.nn.relu(x), name="code"),
    ]
    model = library.Sequential([L.Input((6,)), *relus, L.Dense(6, L.ReLU(name="inside"), name="outside"), *others])
    zeros = count_relu_zeros(model, X)
    names = [relu.name for relu in relus[:-1]]
    assert list(zeros.per_layer) == [*names, "masked", "outside/inside"]
    assert zeros.not_counted == {
        "leaky": "LeakyReLU",
        "slope": "ReLU with a slope or a threshold",
        "threshold": "ReLU with a slope or a threshold",
        "tanh": "Activation, tanh",
        "lambda": "Dense, <lambda>",
        "prelu": "PReLU",
        "code": "Lambda, activation functions in its own code are not seen",
    }
    assert "not counted: leaky (LeakyReLU)" in str(zeros)


@BOTH
def test_functions_in_functional_models_count(library):
    inputs = library.Input((6,))
    function, leaky = (keras.ops.relu, keras.ops.leaky_relu) if library is keras else (tf.nn.relu, tf.nn.leaky_relu)
    inner = library.Model(inputs, function(library.layers.Dense(4)(inputs)), name="inner")
    model = library.Model(inputs, leaky(inner(inputs)))
    zeros = count_relu_zeros(model, X)
    assert len(zeros.per_layer) == len(zeros.not_counted) == 1
    assert next(iter(zeros.per_layer)).startswith("inner/")
    assert zeros.total == np.count_nonzero(number(inner(X)) == 0)


@BOTH
def test_calls_of_a_shared_layer_add_up_and_of_a_shared_activation_stand_one_after_the_other(library):
    L = library.layers
    shared, relu = L.Dense(6, "relu", name="shared"), L.ReLU(name="relu")
    inputs = L.Input((6,))
    first = shared(inputs)
    second = shared(first)
    wide = L.Dense(8, name="wide")
    model = library.Model(inputs, relu(wide(relu(L.Dense(2, name="narrow")(second)))))
    zeros = count_relu_zeros(model, X)
    outputs = [number(shared(X)), number(shared(shared(X)))]
    assert zeros.per_unit["shared"].tolist() == sum((values == 0).sum(axis=0) for values in outputs).tolist()
    assert zeros.outputs == {"shared": 2 * 300 * 6, "relu": 300 * 10}
    narrow = number(relu(model.get_layer("narrow")(outputs[1])))
    expected = [(values == 0).sum(axis=0) for values in (narrow, number(relu(wide(narrow))))]
    assert zeros.per_unit["relu"].tolist() == np.concatenate(expected).tolist()


@BOTH
def test_time_steps_are_positions(library):
    L = library.layers
    inside = Masked(L.Dense(3, "relu", name="inside"))
    model = library.Sequential([L.Input((3, 2)), L.TimeDistributed(inside, name="steps")])
    x = X.reshape(300, 3, 2)
    zeros = count_relu_zeros(model, x)
    outputs = number(model(x))
    per_unit, patterns = counted_by_loops([outputs])
    assert zeros.per_unit["steps/inside"].tolist() == per_unit[0]
    assert (zeros.outputs["steps/inside"], zeros.patterns) == (2700, patterns)


@BOTH
def test_a_model_at_each_time_step_counts_once(library):
    """tf_keras runs it a second time for its mask."""
    L = library.layers
    inner = library.Sequential(
        [L.Input((2,)), L.Dense(4, "relu", name="a"), L.Dense(3, "relu", name="b")], name="inner"
    )
    after = L.Dense(2, "relu", name="after")
    model = library.Sequential([L.Input((3, 2)), L.TimeDistributed(inner, name="steps"), after])
    x = X.reshape(300, 3, 2)
    hidden = number(inner.layers[0](X.reshape(900, 2)))
    outputs = [hidden, number(inner.layers[1](hidden))]
    outputs.append(number(after(outputs[1])))
    per_unit, patterns = counted_by_loops([values.reshape(300, 3, -1) for values in outputs])
    zeros = count_relu_zeros(model, x, batch_size=128)
    assert [zeros.per_unit[f"steps/inner/{name}"].tolist() for name in "ab"] == per_unit[:2]
    assert zeros.per_unit["after"].tolist() == per_unit[2]
    assert (zeros.outputs["steps/inner/a"], zeros.patterns) == (3600, patterns)


@BOTH
def test_the_first_axis_after_the_samples_is_that_of_units_where_channels_come_first(library):
    L = library.layers

    class First(L.Layer):  # No convolution of these runs on a CPU.
        def __init__(self):
            super().__init__(name="first")
            self.activation, self.data_format = library.activations.relu, "channels_first"

        def call(self, inputs):
            return self.activation(inputs)

    zeros = count_relu_zeros(library.Sequential([L.Input((6, 6, 2)), First()]), IMAGES)
    assert zeros.per_unit["first"].tolist() == (IMAGES <= 0).sum(axis=(0, 2, 3)).tolist()


@BOTH
def test_stateful_layers_do_not_go_on(library):
    L = library.layers
    one = {"batch_shape": (4, 3, 2)} if library is keras else {"shape": (3, 2), "batch_size": 4}
    lstm = L.LSTM(4, stateful=True)
    model = library.Sequential([L.Input(**one), lstm, L.Dense(3, "relu")])
    x = X.reshape(300, 3, 2)
    model(x[:4])
    before = [number(state).copy() for state in lstm.states]
    first = count_relu_zeros(model, x, batch_size=4)
    for state, expected in zip(lstm.states, before, strict=True):
        np.testing.assert_array_equal(number(state), expected)
    assert expected.any() and count_relu_zeros(model, x, batch_size=4).total == first.total


@BOTH
def test_inputs_may_be_lists_dicts_and_datasets(library):
    L = library.layers
    inputs = {"a": L.Input((2,), name="a"), "b": L.Input((4,), name="b")}
    hidden = L.Dense(5, "relu", name="hidden")(L.Concatenate()([inputs["a"], inputs["b"]]))
    model = library.Model(inputs, hidden)
    arrays = {"a": X[:, :2], "b": X[:, 2:]}
    expected = count_relu_zeros(model, arrays)
    dataset = tf.data.Dataset.from_tensor_slices((arrays, np.zeros(300))).batch(128)
    plain = library.Sequential([L.Input((6,)), model.get_layer("hidden")])
    of_list = library.Model(list(inputs.values()), hidden)
    for other, x in (
        (model, dataset),
        (of_list, [X[:, :2], X[:, 2:]]),
        (plain, X),
        (plain, X.tolist()),
        (plain, tf.constant(X)),
        (plain, tf.data.Dataset.from_tensor_slices(X).batch(7)),
    ):
        zeros = count_relu_zeros(other, x)
        np.testing.assert_array_equal(zeros.per_unit["hidden"], expected.per_unit["hidden"])
        assert (zeros.patterns, zeros.samples) == (expected.patterns, 300)


def test_a_pruned_model_is_left_bit_for_bit_as_it_was():
    L = tf_keras.layers
    model = prune_low_magnitude(tf_keras.Sequential([L.Input((6,)), L.Dense(5, "relu"), L.Dense(2)]))
    kernel, mask, _ = model.layers[0].pruning_vars[0]
    mask.assign(_RANDOM.integers(0, 2, (6, 5)))
    before = [weight.copy() for weight in model.get_weights()]
    assert (before[0][mask.numpy() == 0] != 0).any()
    zeros = count_relu_zeros(model, X)
    for weight, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)
    # The zeros are those of the masked kernel.
    assert zeros.total == np.count_nonzero(X @ (before[0] * mask.numpy()) <= 0)


@BOTH
def test_symmetric_weights_without_bias_give_half_zeros_in_every_layer(library):
    """A unit's weights are as likely their negatives: for any input P(z <= 0) = 1/2, in every layer.

    On one input the units of a layer are independent: a binomial bound at 1e-6 (4.9 deviations). A bias of a tenth of
    the pre-activations' deviation gives Phi(-0.1) = 0.46 and must fail.
    """
    L = library.layers
    sizes = (10_000, 100, 10_000)
    bounds = [4.9 * 0.5 / size**0.5 for size in sizes]
    normal = {"kernel_initializer": library.initializers.HeNormal(seed=1)}
    model = library.Sequential([L.Input((6,)), *(L.Dense(size, "relu", **normal) for size in sizes)])
    fractions = list(count_relu_zeros(model, X[:1]).fraction_per_layer.values())
    assert all(abs(fraction - 0.5) < bound for fraction, bound in zip(fractions, bounds, strict=True))
    layer = model.layers[0]
    deviation = (2 / 6 * np.square(X[0]).sum()) ** 0.5
    layer.set_weights([number(layer.kernel), np.full(10_000, 0.1 * deviation)])
    fraction = next(iter(count_relu_zeros(model, X[:1]).fraction_per_layer.values()))
    assert bounds[0] < 0.5 - fraction < 0.06


@BOTH
def test_bad_input_is_named(library):
    L = library.layers
    model = library.Sequential([L.Input((6,)), L.Dense(3, "relu")])
    for x, message in (
        (X[:0], "`x` must have samples"),
        (tf.data.Dataset.from_tensor_slices(X[:0]).batch(3), "`x` must have samples"),
        (tf.data.Dataset.from_tensor_slices(X).batch(3).repeat(), "must be a dataset that ends"),
        ([X, X[:3]], "same number of samples"),
        (np.float32(3), "same number of samples"),
    ):
        with pytest.raises(ValueError, match=message):
            count_relu_zeros(model, x)
    for batch_size in (0, -1, 2.0, "3", True):
        with pytest.raises(ValueError, match="`batch_size` must be a positive int or None"):
            count_relu_zeros(model, X, batch_size)
    with pytest.raises(TypeError, match="Expected a layer or model"):
        count_relu_zeros(5, X)
    with pytest.raises(ValueError, match=r"must have a ReLU that can be seen.*out \(Dense, tanh\)"):
        count_relu_zeros(library.Sequential([L.Input((6,)), L.Dense(3, "tanh", name="out")]), X)
    with pytest.raises(ValueError, match="not built"):
        count_relu_zeros(library.Sequential([L.Dense(3, "relu")]), X)


@BOTH
def test_what_is_never_called_is_named(library):
    class Model(library.Model):
        def __init__(self):
            super().__init__(name="own")
            self.used = library.layers.Dense(3, "relu", name="used")
            self.unused = library.layers.Dense(3, "relu", name="unused")
            for layer in (self.used, self.unused):
                layer.build((None, 6))

        def call(self, inputs):
            return tf.nn.relu(self.used(inputs))

    model = Model()
    model(X)
    zeros = count_relu_zeros(model, X)
    assert list(zeros.per_layer) == ["used"]
    assert zeros.not_counted == {
        "own": "Model, activation functions in its own code are not seen",
        "unused": "its ReLU is never called, or in a loop or branch",
    }


@BOTH
def test_a_relu_that_a_layer_only_hands_on_counts_where_it_is_called(library):
    L = library.layers

    class Block(L.Layer):
        def __init__(self, activation):
            super().__init__(name="block")
            self.activation = activation
            self.dense = L.Dense(6, activation, name="dense")

        def build(self, input_shape):
            self.dense.build(input_shape)
            self.built = True

        def call(self, inputs):
            return inputs * 0 - self.dense(inputs)

    for activation in (library.activations.relu, "relu"):
        block = Block(activation)
        model = library.Sequential([L.Input((6,)), block])
        zeros = count_relu_zeros(model, X)
        assert zeros.per_layer == {"block/dense": np.count_nonzero(number(block.dense(X)) == 0)}
        assert list(zeros.not_counted) == ["block"]


@BOTH
def test_a_relu_of_gates_is_none_of_units(library):
    L = library.layers
    model = library.Sequential([L.Input((3, 2)), L.LSTM(4, activation="relu", name="lstm")])
    assert rectifiers(model) == ([], {"lstm": "LSTM, activations of gates"})


def test_the_report_is_json_and_a_table():
    L = keras.layers
    model = keras.Sequential([L.Input((6,)), L.Dense(3, "relu", name="a"), L.Dense(2, "relu", name="b")])
    model.layers[1].set_weights([np.ones((3, 2)), np.array([-1e9, 1.0])])
    zeros = count_relu_zeros(model, X)
    report = json.loads(json.dumps(zeros.to_dict()))
    assert report["total"] == sum(layer["zeros"] for layer in report["layers"].values())
    assert report["layers"]["b"] == {
        "zeros": 300,
        "outputs": 600,
        "fraction": 0.5,
        "units": 2,
        "dead_units": 1,
        "always_on_units": 1,
        "zeros_per_unit": [300, 0],
    }
    lines = str(zeros).splitlines()
    assert lines[2].split() == ["b", "2", "600", "300", "50.00%", "1", "1"]
    assert lines[3].split()[:3] == ["total", "5", "1,500"]
    assert lines[4] == f"{zeros.patterns} activation patterns of 300 samples"


def test_masks_of_zeros_come_batch_after_batch():
    model = keras.Sequential([keras.layers.Input((6,)), keras.layers.Dense(3, "relu", name="a")])
    found = list(relu_zeros(model, X, batch_size=200))
    assert [list(batch) for batch in found] == [[("a", 0)]] * 2
    masks = np.concatenate([batch["a", 0] for batch in found])
    np.testing.assert_array_equal(masks[:, 0], number(model(X)) == 0)
