"""What goes through a model: every call of every layer, the very tensors, and nothing of the model changed."""

import keras
import masked_layers
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.sparsity.keras import prune_low_magnitude

from keras_sparse_init import Masked, WeightNorm, sparsify
from keras_sparse_init.watching import left_as_it_is, watch

BOTH = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def number(value):
    return np.asarray(masked_layers.number(value))


def state_of(model):
    # The first call leaves things of Keras's own.
    model(X)
    return [(layer, dict(vars(layer))) for layer in model._flatten_layers()]


def assert_state(model, before):
    for (layer, attributes), after in zip(before, model._flatten_layers(), strict=True):
        assert layer is after
        assert vars(layer).keys() == attributes.keys()
        for name, value in attributes.items():
            assert vars(layer)[name] is value, name


def sequential(library, *parts):
    return library.Sequential([library.layers.Input((4,)), *parts])


def dense(library, units=3, activation=None, name=None):
    return library.layers.Dense(units, activation, name=name, bias_initializer="ones")


@BOTH
def test_pre_and_post_are_those_of_the_layer_in_the_order_of_calls(library):
    L = library.layers
    parts = [
        dense(library, 3, "relu", "a"),
        L.BatchNormalization(name="b"),
        dense(library, 5, name="c"),
        L.ReLU(name="d"),
        L.Activation("tanh", name="e"),
        L.Softmax(name="f"),
    ]
    model = sequential(library, *parts)
    before = state_of(model)
    with watch(model) as items:
        outputs = model(X)
    assert_state(model, before)
    assert [(item.name, item.layer, item.call) for item in items] == [(part.name, part, 0) for part in parts]
    relu, normalized, linear, relu_layer, tanh, softmax = items
    affine = X @ number(parts[0].kernel) + 1
    np.testing.assert_allclose(number(relu.pre), affine, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(number(relu.post), np.maximum(number(relu.pre), 0))
    assert normalized.pre is None
    np.testing.assert_array_equal(number(normalized.post), number(parts[1](relu.post)))
    assert linear.pre is linear.post
    np.testing.assert_array_equal(number(relu_layer.pre), number(linear.post))
    np.testing.assert_array_equal(number(relu_layer.post), np.maximum(number(linear.post), 0))
    np.testing.assert_allclose(number(tanh.post), np.tanh(number(tanh.pre)), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(number(softmax.pre), number(tanh.post))
    np.testing.assert_array_equal(number(softmax.post), number(outputs))


@BOTH
def test_activation_layers_of_ones_own_and_one_function_for_several_layers(library):
    L = library.layers

    class Rectifier(L.ReLU):
        pass

    def shared(x):
        return x * 2

    class Looks(L.Layer):
        """Called ReLU and is none."""

        def call(self, inputs):
            return inputs + 1

    Looks.__name__ = "ReLU"
    parts = [
        dense(library, 3, shared, "a"),
        dense(library, 3, shared, "b"),
        Rectifier(name="c"),
        L.LeakyReLU(name="d"),
        L.PReLU(name="e"),
        L.ELU(name="f"),
        Looks(name="g"),
    ]
    model = sequential(library, *parts)
    with watch(model) as items:
        model(X)
    assert [item.name for item in items] == list("abcdefg")
    for item in items[:2]:
        np.testing.assert_array_equal(number(item.post), 2 * number(item.pre))
    for item, previous in zip(items[2:6], items[1:5], strict=True):
        np.testing.assert_array_equal(number(item.pre), number(previous.post))
    assert items[6].pre is None


@BOTH
def test_layers_inside_wrappers_nested_models_and_layers_and_shared_ones(library):
    L = library.layers
    shared = Masked(dense(library, 4, "relu", "shared"), sparsity=0.5, seed=0)
    inner = library.Sequential([L.Input((4,)), WeightNorm(dense(library, 4, "relu", "normalized")), shared], name="in")
    inputs = L.Input((4,))
    steps = L.TimeDistributed(dense(library, 2, "relu", "step"), name="steps")(L.Reshape((2, 2), name="split")(inputs))
    end = dense(library, 1, None, "end")(L.Flatten(name="flat")(steps))
    model = library.Model(inputs, [shared(inner(inputs)), end])
    before = state_of(model)
    with watch(model) as items:
        model(X)
    assert_state(model, before)
    found = [(item.name, item.call) for item in items]
    # tf_keras folds time into the batch.
    steps = [("steps/step", call) for call in range(2 if library is keras else 1)]
    nested = [("in/normalized", 0), ("in/shared", 0), ("in", 0), ("in/shared", 1)]
    assert sorted(found) == sorted([*nested, *steps, ("split", 0), ("steps", 0), ("flat", 0), ("end", 0)])
    assert [pair for pair in found if "in" in pair[0].split("/")] == nested
    by_name = {(item.name, item.call): item for item in items}
    first, second = by_name["in/shared", 0], by_name["in/shared", 1]
    kernel = number(shared.layer.kernel) * number(shared.kernels_and_masks()[0][1])
    np.testing.assert_allclose(number(second.pre), number(first.post) @ kernel + 1, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(number(by_name["in", 0].post), number(first.post))


@BOTH
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_of_cell", "bidirectional", "attention_by_position"])
def test_recurrent_layers_give_their_outputs_alone_and_attention_its_projections(library, name):
    layer = masked_layers.CASES[name][0](library.layers)
    args, kwargs = masked_layers.arguments(library, name)
    layer(*args, **kwargs)
    with watch(layer) as items:
        outputs = layer(*args, **kwargs)
    names = [item.name for item in items]
    assert names[-1] == layer.name
    assert items[-1].pre is None
    for value, expected in zip(tf.nest.flatten(items[-1].post), tf.nest.flatten(outputs), strict=True):
        np.testing.assert_array_equal(number(value), number(expected))
    if "attention" in name:
        assert {"query", "key", "value", "attention_output"} <= set(names)
        assert all(item.pre is item.post for item in items if item.name == "query")
    else:
        assert len(items) == (3 if name == "bidirectional" else 1)
        assert all(item.pre is None for item in items)


def test_layers_inside_those_of_tfmot():
    model = tf_keras.Sequential(
        [tf_keras.layers.Input((4,)), dense(tf_keras, 3, "relu", "a"), dense(tf_keras, name="b")]
    )
    for pruned in (prune_low_magnitude(model), sparsify(model, 0.5, seed=0)):
        with watch(pruned) as items:
            outputs = pruned(X)
        assert [item.name for item in items] == ["a", "b"]
        np.testing.assert_array_equal(number(items[0].post), np.maximum(number(items[0].pre), 0))
        np.testing.assert_array_equal(number(items[1].pre), number(outputs))


@BOTH
def test_gradients_go_through_the_values_in_eager_and_in_a_function(library):
    model = library.Sequential(
        [library.layers.Input((4,)), dense(library, 3, "relu", "a"), dense(library, 1, None, "b")]
    )

    def gradients():
        with tf.GradientTape() as tape, watch(model) as items:
            loss = tf.reduce_sum(model(X))
        return tape.gradient(loss, [items[0].pre, items[0].post]), items[0].pre

    expected = np.repeat(number(model.layers[-1].kernel).T, 6, axis=0)
    for function in (gradients, tf.function(gradients)):
        (pre, post), values = function()
        np.testing.assert_allclose(number(post), expected, rtol=1e-5)
        np.testing.assert_allclose(number(pre), expected * (number(values) > 0), rtol=1e-5)


def test_control_flow_on_tensors_is_rewritten_as_it_would_be_without():
    """Inside `tf.function`, tf_keras rewrites the Python of a layer's `call`; what a branch computes is not seen."""

    class Branches(tf_keras.layers.Layer):
        def __init__(self):
            super().__init__(name="branches")
            self.inside = dense(tf_keras, 4, "relu", "inside")
            self.activation = self.activate

        def activate(self, x):
            return x if tf.reduce_sum(x) > 0 else -x

        def call(self, inputs):
            outputs = self.inside(inputs)
            if tf.reduce_sum(outputs) > 0:
                outputs = self.inside(outputs)
            return self.activation(outputs)

    layer = Branches()
    expected = number(layer(X))
    names = []

    @tf.function
    def traced(x):
        with watch(layer) as items:
            outputs = layer(x)
        names[:] = [(item.name, item.call) for item in items]
        return outputs, items[-1].post

    for values in traced(X):
        np.testing.assert_allclose(number(values), expected, rtol=1e-4)
    assert names == [("inside", 0), ("branches", 0)]


@BOTH
def test_what_is_replaced_goes_on(library):
    model = library.Sequential(
        [library.layers.Input((4,)), dense(library, 3, "relu", "a"), library.layers.ReLU(name="b")]
    )
    asked = []

    def replace(name, call, kind, value):
        asked.append((name, call, kind))
        return value * 0 + {"a": {"pre": -1.0, "post": 5.0}, "b": {"pre": 7.0, "post": 9.0}}[name][kind]

    with watch(model, replace=replace) as items:
        outputs = model(X)
    assert asked == [("a", 0, "pre"), ("a", 0, "post"), ("b", 0, "pre"), ("b", 0, "post")]
    assert [float(number(value)[0, 0]) for item in items for value in (item.pre, item.post)] == [-1.0, 5.0, 7.0, 9.0]
    np.testing.assert_array_equal(number(outputs), np.full((6, 3), 9.0))


@BOTH
def test_the_model_is_as_before_when_it_raises(library):
    def broken(x):
        raise RuntimeError("broken")

    model = sequential(library, dense(library, 3, "relu"), dense(library, 2, "relu"))
    state_of(model)
    model.layers[-1].activation = broken
    before = [(layer, dict(vars(layer))) for layer in model._flatten_layers()]
    with pytest.raises(RuntimeError, match="broken"), watch(model) as items:
        model(X)
    assert len(items) == 1
    assert_state(model, before)


@BOTH
def test_only_the_layers_asked_for_and_only_layers_of_the_model(library):
    model = library.Sequential(
        [library.layers.Input((4,)), dense(library, 3, "relu", "a"), dense(library, 2, None, "b")]
    )
    with watch(model, model.layers[-1:]) as items:
        model(X)
        model(X)
    assert [(item.name, item.call) for item in items] == [("b", 0), ("b", 1)]
    with pytest.raises(ValueError, match="`layers` must be layers below the model .* Not there: other"):
        with watch(model, [dense(library, name="other")]):
            pass
    with pytest.raises(TypeError, match="Expected a layer or model"), watch(5):
        pass


@BOTH
def test_custom_layers_give_their_output_and_two_of_one_name_two_names(library):
    class Custom(library.layers.Layer):
        def call(self, inputs):
            return {"out": tf.nn.relu(inputs)}

    class Model(library.Model):
        def __init__(self):
            super().__init__()
            self.parts = [Custom(name="part"), Custom(name="part")]

        def call(self, inputs):
            return self.parts[1](self.parts[0](inputs)["out"])["out"]

    model = Model()
    model(X)
    with watch(model) as items:
        model(X)
    assert [item.name for item in items] == ["part", "part_1"]
    assert all(item.pre is None for item in items)
    np.testing.assert_array_equal(number(items[0].post["out"]), np.maximum(X, 0))


def test_kernels_that_a_forward_pass_masks_are_put_back():
    model = prune_low_magnitude(sequential(tf_keras, tf_keras.layers.Dense(3)))
    kernel, mask, _ = model.layers[0].pruning_vars[0]
    mask.assign(np.eye(4, 3))
    before = kernel.numpy()
    with left_as_it_is(model):
        model(X)
        assert np.count_nonzero(kernel) == 3
    np.testing.assert_array_equal(kernel.numpy(), before)
