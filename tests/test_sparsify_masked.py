"""`sparsify(wrapper="masked")` and `strip` on models of both Kerases."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tf_keras

from keras_sparse_init import (
    Masked,
    SparseScaledInit,
    masked_kernels,
    masks,
    reinitialize,
    set_masks,
    sparsify,
    sparsity_table,
    strip,
)
from keras_sparse_init.sampling import derive_seed

BOTH = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])


def value(variable) -> np.ndarray:
    return np.asarray(variable.numpy())


def functional(library):
    """A residual sum, a nested model, attention on two inputs, recurrent, depthwise and normalization layers."""
    layers = library.layers
    inputs = layers.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", name="conv")(inputs)
    x = x + layers.BatchNormalization(name="norm")(x)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.Reshape((6, 48))(x)
    timed = layers.TimeDistributed(layers.Dense(12, name="dense"), name="timed")
    x = library.Sequential([layers.Input((6, 48)), timed], name="inner")(x)
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True, name="lstm"), name="both")(x)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.GlobalAveragePooling1D()(x)
    return library.Model(inputs, layers.Dense(3, name="out")(x))


def subclassed(library):
    layers = library.layers

    class Net(library.Model):
        def __init__(self):
            super().__init__()
            self.first = layers.Dense(8, "relu", name="first")
            self.some = [layers.Dense(8, name="a"), layers.Dense(8, name="b")]
            self.pair = (layers.Dense(5, name="c"),)
            self.by_name = {"d": layers.Dense(4, name="d")}
            self.inner = library.Sequential([layers.Dense(3, name="e")], name="inner")

        def call(self, x):
            x = self.first(x)
            for layer in (*self.some, *self.pair, self.by_name["d"]):
                x = layer(x)
            return self.inner(x)

    model = Net()
    model(np.zeros((1, 6), np.float32))
    return model


def images(number=4):
    return np.random.default_rng(0).normal(size=(number, 8, 8, 3)).astype(np.float32)


@BOTH
def test_every_kernel_is_masked_and_the_budget_is_that_of_all_together(library):
    model = functional(library)
    sparse = sparsify(model, 0.8, wrapper="masked", skip=["out"], seed=0)
    kernels = masked_kernels(sparse)
    assert all(isinstance(layer, Masked) for layer in sparse.layers if layer.name.startswith("masked_"))
    depthwise = "kernel" if library is keras else "depthwise_kernel"
    assert [kernel.name for kernel in kernels] == [
        "conv/kernel",
        f"depthwise/{depthwise}",
        "inner/timed/dense/kernel",
        *(f"both/{way}_lstm/lstm_cell/{part}kernel" for way in ("forward", "backward") for part in ("", "recurrent_")),
        *(f"attention/{name}/kernel" for name in ("query", "key", "value", "attention_output")),
    ]
    total = sparsity_table(sparse).total
    assert abs(total.nonzeros - 0.2 * total.size) <= len(kernels)
    for kernel in kernels:
        assert not value(kernel.kernel)[~kernel.mask_value()].any()


@BOTH
def test_kernels_are_drawn_for_the_layout_of_their_layer_with_seeds_from_one(library):
    sparse = sparsify(functional(library), 0.7, initializer=SparseScaledInit(2.0), wrapper="masked", seed=5)
    for kernel in masked_kernels(sparse):
        assert kernel.layout.name in ("conv", "depthwise", "dense", "lstm") or "->" in kernel.layout.name
        expected = SparseScaledInit(2.0).draw(
            kernel.shape, "float32", kernel.mask_value(), kernel.layout, derive_seed(5, kernel.seed_name)
        )
        np.testing.assert_array_equal(value(kernel.kernel), expected)


@BOTH
def test_a_model_built_again_is_the_same_and_the_original_is_left_alone(library):
    model = functional(library)
    before = [np.array(weight) for weight in model.get_weights()]
    first, second = (sparsify(model, 0.8, wrapper="masked", seed=3) for _ in range(2))
    for one, other in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert not masked_kernels(model)


@BOTH
def test_weights_that_are_not_masked_are_kept(library):
    model = functional(library)
    generator = np.random.default_rng(1)
    model.set_weights([generator.random(weight.shape) for weight in model.get_weights()])
    sparse = sparsify(model, 0.5, wrapper="masked", skip=["out"], seed=0)
    for name in ("norm", "out"):
        for old, new in zip(model.get_layer(name).get_weights(), sparse.get_layer(name).get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
    bias = sparse.get_layer("masked_conv").layer.get_weights()[1]
    np.testing.assert_array_equal(model.get_layer("conv").get_weights()[1], bias)


@BOTH
def test_training_keeps_the_zeros_and_strip_gives_a_plain_model_of_the_same_function(library, tmp_path):
    sparse = sparsify(functional(library), 0.8, wrapper="masked", seed=0)
    sparse.compile("adam", "mse")
    sparse.fit(images(8), np.zeros((8, 3)), batch_size=4, epochs=2, verbose=0)
    kernels = masked_kernels(sparse)
    assert not any(value(kernel.kernel)[~kernel.mask_value()].any() for kernel in kernels)
    plain = strip(sparse)
    assert [type(layer).__name__ for layer in plain.layers] == [type(a).__name__ for a in functional(library).layers]
    assert "keras_sparse_init" not in plain.to_json()
    output = value(sparse(images(), training=False))
    np.testing.assert_array_equal(value(plain(images(), training=False)), output)
    plain.save(tmp_path / "plain.keras")
    back = library.models.load_model(tmp_path / "plain.keras")
    np.testing.assert_array_equal(value(back(images(), training=False)), output)
    zeros = sum(np.count_nonzero(weight == 0) for weight in plain.get_layer("attention").get_weights()[::2])
    assert zeros >= sum(np.count_nonzero(~k.mask_value()) for k in kernels if k.name.startswith("attention"))


@BOTH
def test_a_subclassed_model_is_changed_in_place_and_back(library):
    model = subclassed(library)
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    sparse = sparsify(model, 0.5, wrapper="masked", seed=0)
    assert sparse is model
    names = [f"{name}/kernel" for name in ("first", "a", "b", "c", "d", "inner/e")]
    assert [kernel.name for kernel in masked_kernels(sparse)] == names
    assert isinstance(model.first, Masked) and isinstance(model.some[1], Masked)
    assert isinstance(model.pair[0], Masked) and isinstance(model.by_name["d"], Masked)
    sparse.compile("sgd", "mse")
    sparse.fit(x, np.zeros((5, 3)), verbose=0)
    output = sparse.predict(x, verbose=0)
    plain = strip(sparse)
    assert not masked_kernels(plain) and len(plain.weights) == 12
    np.testing.assert_array_equal(plain.predict(x, verbose=0), output)


@BOTH
def test_a_subclassed_model_that_was_compiled_and_called_uses_its_masks_from_then_on(library):
    model = subclassed(library)
    model.compile("sgd", "mse")
    x = np.ones((4, 6), np.float32)
    model.fit(x, np.zeros((4, 3)), verbose=0)
    before = model.predict(x, verbose=0)
    sparsify(model, 0.9, method="uniform", wrapper="masked", seed=0)
    after = model.predict(x, verbose=0)
    assert not np.allclose(before, after)
    np.testing.assert_allclose(after, np.asarray(model(x)), rtol=1e-5, atol=1e-6)


@BOTH
def test_layers_masked_before_keep_their_wrapper_and_share_the_budget(library):
    layers = library.layers
    masked = Masked(layers.Dense(10, name="a"), sparsity=0.5, seed=0)
    model = library.Sequential([layers.Input((10,)), masked, layers.Dense(10, name="b")])
    sparse = sparsify(model, 0.8, method="uniform", wrapper="masked", seed=1)
    assert [type(layer.layer).__name__ for layer in sparse.layers] == ["Dense", "Dense"]
    assert [row.sparsity for row in sparsity_table(sparse).rows] == pytest.approx([0.8, 0.8])


@BOTH
def test_a_shared_layer_has_one_wrapper_and_one_mask(library):
    layers = library.layers
    shared, inputs = layers.Dense(6, name="shared"), layers.Input((6,))
    model = library.Model(inputs, shared(shared(inputs)))
    sparse = sparsify(model, 0.5, wrapper="masked", seed=0)
    assert [kernel.name for kernel in masked_kernels(sparse)] == ["shared/kernel"]
    x = np.eye(6, dtype=np.float32)
    kernel = value(masked_kernels(sparse)[0].kernel)
    np.testing.assert_allclose(sparse.predict(x, verbose=0), kernel @ kernel, rtol=1e-5, atol=1e-6)


def test_the_default_wrapper_is_that_of_the_models_keras():
    for library, kind in ((keras, "Masked"), (tf_keras, "StaticPruneLowMagnitude")):
        model = library.Sequential([library.layers.Input((4,)), library.layers.Dense(4)])
        assert type(sparsify(model, 0.5, seed=0).layers[-1]).__name__ == kind


def test_masked_and_tfmot_wrappers_of_one_seed_hold_the_same_network():
    model = tf_keras.Sequential([tf_keras.layers.Input((4,)), tf_keras.layers.Dense(9), tf_keras.layers.Dense(3)])
    one, other = (masked_kernels(sparsify(model, 0.5, wrapper=w, seed=0)) for w in ("tfmot", "masked"))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(value(a.kernel), value(b.kernel))


@BOTH
def test_masks_and_kernels_can_be_changed_afterwards(library):
    sparse = sparsify(functional(library), 0.5, wrapper="masked", seed=0)
    first = [value(kernel.kernel) for kernel in masked_kernels(sparse)]
    set_masks(sparse, masks.ConstantFanIn(0.5), seed=1)
    for kernel in masked_kernels(sparse):
        inputs = kernel.mask_value().sum(axis=kernel.layout.fan_in_axes)
        assert len(np.unique(inputs)) == 1
    reinitialize(sparse, seed=2)
    second = [value(kernel.kernel) for kernel in masked_kernels(sparse)]
    assert all(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_bad_arguments_are_named():
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(4)])
    with pytest.raises(TypeError, match="`wrapper='tfmot'` needs a tf_keras model"):
        sparsify(model, 0.5, wrapper="tfmot")
    with pytest.raises(ValueError, match="`wrapper` must be one of 'tfmot', 'masked'.*'pruned'"):
        sparsify(model, 0.5, wrapper="pruned")
    with pytest.raises(ValueError, match="`skip` names unknown layers"):
        sparsify(model, 0.5, skip=["nothing"])
    with pytest.raises(ValueError, match="`model` must be built"):
        sparsify(keras.Sequential([keras.layers.Dense(4)]), 0.5)
    with pytest.raises(ValueError, match="must have a layer with a kernel"):
        sparsify(keras.Sequential([keras.layers.Input((4,)), keras.layers.ReLU()]), 0.5)


@BOTH
def test_preprocessing_layers_keep_what_they_have_learned_and_lambdas_their_function(library):
    layers = library.layers
    normalize = layers.Normalization()
    normalize.adapt(np.array([[1.0, 10.0], [3.0, 30.0]], np.float32))
    model = library.Sequential([layers.Input((2,)), normalize, layers.Lambda(lambda x: 2.0 * x), layers.Dense(3)])
    x = np.array([[2.0, 50.0]], np.float32)
    sparse = sparsify(model, 0.5, wrapper="masked", seed=0)
    kernel = value(masked_kernels(sparse)[0].kernel)
    np.testing.assert_allclose(sparse.predict(x, verbose=0), [[0.0, 6.0]] @ kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(strip(sparse).predict(x, verbose=0), sparse.predict(x, verbose=0))


@BOTH
def test_a_subclass_of_model_that_is_made_of_inputs_and_outputs_is_sparse_too(library):
    class Own(library.Model):
        pass

    inputs = library.layers.Input((6,))
    model = Own(inputs, library.layers.Dense(4, name="a")(inputs))
    sparse = sparsify(model, 0.5, wrapper="masked", seed=0)
    assert [kernel.name for kernel in masked_kernels(sparse)] == ["a/kernel"]
    assert isinstance(sparse, Own) and not masked_kernels(model)


@BOTH
def test_a_class_of_models_that_is_lost_is_warned_about(library):
    class Own(library.Sequential):
        pass

    model = Own([library.layers.Input((6,)), library.layers.Dense(4)])
    with pytest.warns(UserWarning, match="what Own defines itself"):
        sparsify(model, 0.5, wrapper="masked", seed=0)


@BOTH
def test_a_kernel_that_two_attributes_hold_is_masked_wherever_it_is_read(library):
    @library.saving.register_keras_serializable("test_sparsify_masked")
    class Tied(library.layers.Layer):
        def build(self, input_shape):
            self.kernel = self.add_weight(name="kernel", shape=(6, 6), initializer="glorot_uniform")
            self.same = self.kernel
            self.built = True

        def call(self, x):
            return library.ops.matmul(x, self.same) if library is keras else x @ self.same

    model = library.Sequential([library.layers.Input((6,)), Masked(Tied(), sparsity=0.5, seed=0)])
    model.compile("sgd", "mse")
    model.fit(np.ones((8, 6)), np.ones((8, 6)), verbose=0)
    (kernel,) = masked_kernels(model)
    assert not value(kernel.kernel)[~kernel.mask_value()].any()


@BOTH
@pytest.mark.parametrize("wrapper", ["masked", "tfmot"])
def test_strip_sets_weights_off_the_mask_to_zero_that_something_has_moved(library, wrapper):
    if wrapper == "tfmot" and library is keras:
        return
    model = library.Sequential([library.layers.Input((4,)), library.layers.Dense(8)])
    sparse = sparsify(model, 0.5, wrapper=wrapper, seed=0)
    (kernel,) = masked_kernels(sparse)
    kernel.kernel.assign(np.ones((4, 8)))
    np.testing.assert_array_equal(strip(sparse).layers[-1].get_weights()[0], kernel.mask_value())


def test_what_cannot_be_masked_is_refused_by_name():
    dense = keras.layers.Dense(4, name="inside")
    with pytest.raises(ValueError, match="masked already: 'masked_inside'"):
        Masked(Masked(dense))
    with pytest.raises(ValueError, match="`weight_names` must be a list"):
        Masked(keras.layers.Dense(4), weight_names="kernel")
    with pytest.raises(ValueError, match=r"`weight_names` names \['foo'\]"):
        Masked(keras.layers.Dense(4), weight_names=["kernel", "foo"]).build((None, 3))
