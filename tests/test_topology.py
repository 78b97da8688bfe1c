"""What masks connect, against gradients: a path of positive weights is what a derivative is positive through."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from keras_sparse_init import Masked, compat, masked_kernels, sparsify
from keras_sparse_init.topology.paths import live_ends, topology
from keras_sparse_init.watching import watch

BOTH = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])


def _convnet(library):
    """All layers that are read, linear in what is positive, and alike at all positions of an image."""
    L = library.layers
    images, tokens = L.Input((8, 8, 4)), L.Input((3,), dtype="int32")
    h = L.Conv2D(6, 3, activation="relu", name="conv")(images)
    h = L.BatchNormalization(name="norm")(h)
    h = L.AveragePooling2D(2)(L.ZeroPadding2D(1)(h))
    shared = L.SeparableConv2D(6, 1, name="separable")
    h = L.Add()([h, shared(shared(h))])
    h = L.Conv2D(8, 2, groups=2, name="grouped")(h)
    h = L.DepthwiseConv2D(2, depth_multiplier=2, name="depthwise")(h)
    h = L.Conv2DTranspose(5, 1, name="transposed")(h)
    h = L.Concatenate()([h, L.ReLU()(h)])
    flat = L.Flatten()(L.Permute((3, 1, 2))(h))
    words = L.Flatten()(L.Embedding(7, 4, name="embedding")(tokens))
    inner = library.Sequential([L.Input((12,)), L.Dense(5, "relu", name="in_it")], name="inner")
    h = L.Concatenate()([L.Dense(12, name="dense")(flat), inner(words)])
    h = L.Dense(9, name="joint")(L.Reshape((17,))(h))
    outputs = [L.Dense(3, name="out")(h), L.GlobalAveragePooling1D()(L.Reshape((9, 1))(h))]
    return library.Model([images, tokens], outputs)


@pytest.fixture(scope="module", params=[keras, tf_keras], ids=["keras", "tf_keras"])
def sparse(request):
    """A network whose weights are 1 on its masks, at a sparsity at which units are dead."""
    model = sparsify(_convnet(request.param), 0.8, "uniform", wrapper="masked", seed=3)
    for kernel in masked_kernels(model):
        compat.assign(kernel.kernel, kernel.mask_value())
    return model


def test_weights_on_a_path_are_those_that_the_output_depends_on(sparse):
    kernels = masked_kernels(sparse)
    sources = [kernel.kernel if isinstance(kernel.kernel, tf.Variable) else kernel.kernel.value for kernel in kernels]
    x = [tf.ones((7, 8, 8, 4)), tf.tile(tf.range(7)[:, None], (1, 3))]
    with watch(sparse) as items, tf.GradientTape() as tape:
        value = tf.add_n([tf.reduce_sum(output) for output in sparse(x)])
    found = topology(sparse)
    assert found.not_read == {}
    dead = 0
    for kernel, entry, gradient in zip(kernels, found.kernels, tape.gradient(value, sources), strict=True):
        assert entry.effective_nonzeros == np.count_nonzero(tf.convert_to_tensor(gradient)), entry.name
        outputs = [np.asarray(item.post) for item in items if item.layer is kernel.layer]
        if "depthwise_kernel" not in entry.name or "separable" not in entry.name:
            reached = np.any([output.reshape(-1, output.shape[-1]).any(axis=0) for output in outputs], axis=0)
            assert (entry.units, entry.off_input) == (reached.size, (~reached).sum()), entry.name
        dead += entry.off_input + entry.off_output
        assert entry.nonzeros - entry.effective_nonzeros >= 0
    assert dead > 10
    assert found.effective_sparsity > found.sparsity == pytest.approx(0.8, abs=0.01)


def test_what_is_dead_in_a_perceptron_by_hand():
    L = keras.layers
    first = Masked(L.Dense(4, name="a"), mask=np.array([[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]))
    second = Masked(L.Dense(3, name="b"), mask=np.array([[1, 0, 0], [0, 0, 0], [0, 1, 1], [0, 1, 0]]))
    third = Masked(L.Dense(1, name="c"), mask=np.array([[1], [1], [0]]))
    model = keras.Sequential([L.Input((3,)), first, L.Activation("tanh"), second, third])
    a, b, c = topology(model).kernels
    assert (a.fan_in, a.units, a.without_input) == ((0, 0.75, 1, 1.25, 2), 4, 1)
    assert (a.inputs, a.without_output) == (3, 1)
    assert (a.off_input, a.off_output) == (1, 1)  # Unit 2 has no input, unit 1 leads nowhere.
    assert (b.off_input, b.off_output) == (1, 1)  # Unit 2 hears of the dead unit alone, and leads nowhere.
    assert (b.without_input, b.without_output) == (0, 1)
    assert (a.effective_nonzeros, b.effective_nonzeros, c.effective_nonzeros) == (2, 2, 2)
    live = {name: tuple(end.ravel().tolist() for end in ends) for name, ends in live_ends(model).items()}
    assert live == {
        "a/kernel": ([True] * 3, [True, False, True, True]),
        "b/kernel": ([True, True, False, True], [True, True, False]),
        "c/kernel": ([True, True, False], [True]),
    }
    # With unit 3 of the first layer in place of unit 0, other paths.
    found = topology(model, {"a/kernel": np.eye(3, 4)}).kernels
    assert [kernel.off_input for kernel in found] == [1, 0, 0]


def test_masks_given_must_be_those_of_kernels():
    model = keras.Sequential([keras.layers.Input((3,)), Masked(keras.layers.Dense(2, name="a"), sparsity=0.5, seed=0)])
    with pytest.raises(ValueError, match="unknown kernel 'b/kernel'"):
        topology(model, {"b/kernel": np.ones((3, 2))})
    with pytest.raises(ValueError, match="must have the kernel's shape"):
        topology(model, {"a/kernel": np.ones((2, 2))})


@BOTH
def test_what_cannot_be_read_is_listed_and_connects_everything(library):
    L = library.layers
    dead_ends = np.zeros((4, 5))
    dead_ends[:, :2] = 1
    inputs = L.Input((6, 4))
    h = Masked(L.Dense(5, name="dense"), mask=dead_ends)(inputs)
    h = Masked(L.LSTM(3, name="lstm"), sparsity=0.5, seed=0)(h)
    model = library.Model(inputs, Masked(L.Dense(2, name="out"), sparsity=0.5, seed=0)(h))
    found = topology(model)
    assert found.not_read == {"lstm": "LSTM"}
    by_name = {entry.name: entry for entry in found.kernels}
    assert by_name["dense/kernel"].effective_nonzeros == 8
    assert by_name["out/kernel"].effective_nonzeros == 3
    inside = [entry for name, entry in by_name.items() if "lstm" in name]
    assert [entry.off_input for entry in inside] == [None, None]
    assert [(entry.units, entry.inputs) for entry in inside] == [(12, 5), (12, 3)]
    assert found.effective_sparsity is None
    with pytest.raises(ValueError, match=r"must be readable.*lstm \(LSTM\)"):
        live_ends(model)


@BOTH
def test_a_subclassed_model_has_masks_but_no_graph(library):
    class Model(library.Model):
        def __init__(self):
            super().__init__()
            self.dense = Masked(library.layers.Dense(3, name="dense"), sparsity=0.5, seed=0)

        def call(self, x):
            return self.dense(x)

    model = Model()
    model(np.ones((1, 4), np.float32))
    found = topology(model)
    assert list(found.not_read) == [model.name]
    assert [(entry.nonzeros, entry.off_input) for entry in found.kernels] == [(6, None)]


def test_a_dense_model_has_no_masks():
    found = topology(keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)]))
    assert (found.kernels, found.not_read, found.sparsity, found.effective_sparsity) == ((), {}, 0.0, 0.0)


def test_every_call_of_a_nested_model_and_lengths_that_are_not_known_are_read():
    L = keras.layers
    mask = np.zeros((4, 4))
    mask[0, 1] = mask[1, 2] = 1  # Twice: from 0 to 2 alone.
    inner = keras.Sequential([L.Input((None, 4)), Masked(L.Conv1D(4, 1, name="in_it"), mask=mask[None])], name="inner")
    inputs = L.Input((None, 4))
    h = L.GlobalMaxPooling1D()(inner(inner(inputs)))
    model = keras.Model(inputs, Masked(L.Dense(1, name="out"), mask=np.ones((4, 1)))(h))
    found = topology(model)
    assert found.not_read == {}
    entry, out = found.kernels
    # What a unit is cut off from in every call counts, not in one.
    assert (entry.off_input, entry.off_output, entry.effective_nonzeros) == (2, 0, 2)
    assert out.effective_nonzeros == 1


class Doubled(keras.layers.Layer):
    """A layer of the user's own."""

    def call(self, inputs):
        return inputs * 2


@pytest.mark.parametrize("mask", ["full", "dead"])
def test_live_ends_are_known_behind_an_unread_layer_only_when_it_hides_no_dead_unit(mask):
    L = keras.layers
    first = np.ones((3, 4)) if mask == "full" else np.eye(3, 4)
    layers = [Masked(L.Dense(4, name="a"), mask=first), Doubled(name="doubled"), Masked(L.Dense(1, name="b"))]
    model = keras.Sequential([L.Input((3,)), *layers])
    if mask == "full":
        assert all(end.all() for ends in live_ends(model).values() for end in ends)
    else:
        with pytest.raises(ValueError, match=r"doubled \(Doubled\)$"):
            live_ends(model)
