import keras
import numpy as np
import pytest
import tf_keras
from tensorflow_model_optimization.sparsity import keras as sparsity

from keras_sparse_init import masked_kernels, masks, set_masks, tfmot, traversal
from keras_sparse_init.tfmot import static_wrapper

layers = tf_keras.layers
X = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)


def run(model, x):
    return model(x, training=False).numpy()


def values(model):
    return [np.asarray(weight.read_value()) for weight in model.weights]


def keep(layer, copy):
    return copy(layer)


def look_inside(layer, copy):
    return None


def paths(model):
    return ["/".join(path) for path, _, layer in traversal.walk(model) if type(layer).__name__ != "InputLayer"]


def canonical(model):
    return ["/".join(path) for _, path, layer in traversal.walk(model) if type(layer).__name__ != "InputLayer"]


class _Block(layers.Layer):
    """A layer of a private class, holding layers in a list, a dict and a tuple."""

    def __init__(self, wrap=lambda layer: layer, **kwargs):
        super().__init__(**kwargs)
        self.listed = [wrap(layers.Dense(10)), layers.Dense(10)]
        self.keyed = {"one": wrap(layers.Dense(10))}
        self.fixed = (layers.Dense(10), 3)
        self.alone = wrap(layers.Dense(10))

    def get_config(self):
        return super().get_config()

    def call(self, x):
        for layer in (*self.listed, self.keyed["one"], self.fixed[0], self.alone):
            x = layer(x)
        return x


def everything():
    """Layers that Keras names by itself, of many kinds; one in two places, one shared by two models."""
    inputs = layers.Input((10,))
    shared = layers.Dense(10)
    inner = tf_keras.Model(inputs, layers.BatchNormalization()(shared(inputs)))
    inputs = layers.Input((10,))
    x = inner(shared(shared(inputs)))
    x = _Block()(x)
    x = tf_keras.Sequential([layers.Dense(10), layers.Dropout(0.1), layers.Dense(10)])(x)
    x = layers.Bidirectional(layers.SimpleRNN(4))(layers.Reshape((2, 5))(x))
    return tf_keras.Model(inputs, layers.Dense(3, name="out")(x))


# Walking.


def test_each_layer_is_visited_once_in_model_order_with_its_path():
    inputs = layers.Input((10,))
    shared = layers.Dense(10, name="shared")
    inner = tf_keras.Sequential([layers.Dense(10, name="a"), shared], name="inner")
    model = tf_keras.Model(inputs, static_wrapper(layers.Dense(3, name="last"))(inner(shared(inputs))))
    assert paths(model) == ["shared", "inner", "inner/a", "last", "last"]
    visited = [layer for _, _, layer in traversal.walk(model)]
    assert len({id(layer) for layer in visited}) == len(visited)
    assert visited[-1] is visited[-2].layer


def test_a_wrapper_is_visited_itself():
    wrapper = static_wrapper(layers.Dense(3, name="alone"))
    assert [layer for _, _, layer in traversal.walk(wrapper)] == [wrapper, wrapper.layer]
    assert paths(wrapper) == ["alone", "alone"]


def test_canonical_paths_do_not_depend_on_what_was_built_before():
    first, second = everything(), everything()
    assert canonical(first) == canonical(second)
    assert paths(first) != paths(second)
    assert len(set(canonical(first))) == len(canonical(first))
    found = canonical(first)
    for name in ("model_0", "private__block_0/dense_0", "private__block_0/dense_4", "sequential_0/dense_1", "out"):
        assert name in found, found
    assert any(name.endswith("forward_simple_rnn_0") for name in found)


def test_canonical_paths_keep_names_that_were_given():
    model = tf_keras.Sequential([layers.Dense(3, name="dense_block"), layers.Dense(3, name="conv_1"), layers.Dense(3)])
    assert canonical(model) == ["dense_block", "conv_1", "dense_0"]


def test_keras_3_is_walked_alike():
    inner = keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(3, name="b")])
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(4), inner])
    assert canonical(model) == ["dense_0", "sequential_0", "sequential_0/dense_0", "sequential_0/b"]


def test_the_owner_of_a_variable_is_the_layer_that_has_it_as_an_attribute():
    rnn = layers.RNN([layers.LSTMCell(3, name="a"), layers.GRUCell(3, name="b")])
    rnn.build((None, 4, 5))
    for cell in rnn.cell.cells:
        path, _, owner, attribute = traversal.owner_of(rnn, cell.recurrent_kernel)
        assert (path[-1], owner, attribute) == (cell.name, cell, "recurrent_kernel")
    dense = layers.Dense(3)
    dense.build((None, 4))
    other = dense.add_weight("late", (2, 2))
    assert traversal.owner_of(dense, other) == ((), (), dense, "late")
    attention = layers.MultiHeadAttention(2, 3)
    attention(np.ones((1, 2, 4)), np.ones((1, 2, 4)))
    path, _, owner, attribute = traversal.owner_of(attention, attention._key_dense.kernel)
    assert (path, owner, attribute) == (("key",), attention._key_dense, "kernel")


# Rebuilding.


@pytest.mark.parametrize("replace", [keep, look_inside])
def test_a_model_rebuilt_without_replacements_is_equal_and_apart(replace):
    model = everything()
    model.compile("sgd", "mse", run_eagerly=True)
    model.train_on_batch(X, np.ones((4, 3)))  # Moves the statistics of the batch normalization.
    before = values(model)
    new = traversal.rebuild(model, replace)
    assert not {id(weight) for weight in model.weights} & {id(weight) for weight in new.weights}
    np.testing.assert_array_equal(run(new, X), run(model, X))
    assert paths(new) == paths(model)
    for old, copied, after in zip(before, values(new), values(model), strict=True):
        np.testing.assert_array_equal(old, copied)
        np.testing.assert_array_equal(old, after)


def test_sharing_survives_also_between_nested_models():
    model = everything()
    new = traversal.rebuild(model, keep)
    assert len(new.weights) == len(model.weights)
    inner = next(layer for layer in new.layers if isinstance(layer, tf_keras.Model) and "model" in layer.name)
    assert any(layer in new.layers for layer in inner.layers)


def test_what_is_frozen_stays_frozen_also_inside_layers():
    model = everything()
    block = next(layer for layer in model.layers if isinstance(layer, _Block))
    block.listed[1].trainable = False
    model.layers[-1].trainable = False
    new = traversal.rebuild(model, look_inside)
    assert [w.shape for w in new.trainable_weights] == [w.shape for w in model.trainable_weights]
    assert len(new.trainable_weights) == len(new.weights) - 2 - 4
    for old, copied in zip(values(model), values(new), strict=True):
        np.testing.assert_array_equal(old, copied)


def test_wrappers_that_a_config_does_not_tell_of_are_copied_with_their_masks():
    pruned = sparsity.PolynomialDecay(0.0, 0.5, begin_step=0, end_step=7, frequency=3)
    for wrap in (static_wrapper, lambda layer: sparsity.prune_low_magnitude(layer, pruned)):
        inputs = layers.Input((10,))
        model = tf_keras.Model(inputs, wrap(layers.Dense(3))(_Plain(_Block(wrap))(inputs)))
        set_masks(model, masks.Random(0.5), seed=0)
        new = traversal.rebuild(model, keep)
        assert [k.seed_name for k in masked_kernels(new)] == [k.seed_name for k in masked_kernels(model)]
        assert len(masked_kernels(new)) == 4
        for old, copied in zip(values(model), values(new), strict=True):
            np.testing.assert_array_equal(old, copied)
        for old, copied in zip(tfmot.wrappers(model), tfmot.wrappers(new), strict=True):
            assert type(old) is type(copied) and old is not copied
            assert old.pruning_schedule.get_config() == copied.pruning_schedule.get_config()


class _Plain(layers.Layer):
    """A layer whose config makes the block without wrappers."""

    def __init__(self, block=None, **kwargs):
        super().__init__(**kwargs)
        self.block = block or _Block()

    def get_config(self):
        return super().get_config()

    def call(self, x):
        return self.block(x)


def replace_dense(layer, copy):
    if type(layer) is not layers.Dense:
        return None
    new = static_wrapper(copy(layer))
    if new.layer.built:
        new.build(None)
    return new


def test_layers_inside_layers_are_replaced_where_they_are_and_keep_their_order():
    model = everything()
    block = next(layer for layer in model.layers if isinstance(layer, _Block))
    new = traversal.rebuild(model, replace_dense)
    assert not any(traversal.is_mask_wrapper(layer) for layer in model._flatten_layers())
    copied = next(layer for layer in new.layers if isinstance(layer, _Block))
    assert [type(layer).__name__ for layer in copied._flatten_layers(recursive=False, include_self=False)] == [
        "StaticPruneLowMagnitude"
    ] * 5
    assert copied.fixed[1] == 3 and list(copied.keyed) == ["one"] and len(copied.listed) == 2
    for old, wrapped in ((block.listed[1], copied.listed[1]), (block.alone, copied.alone)):
        np.testing.assert_array_equal(old.kernel.numpy(), wrapped.layer.kernel.numpy())
    np.testing.assert_array_equal(run(new, X), run(model, X))
    assert len(new.trainable_weights) == len(model.trainable_weights)


def test_a_subclassed_model_is_changed_in_place_with_its_weights_and_order():
    class Model(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.first = layers.Dense(10, name="first")
            self.norm = layers.BatchNormalization(name="norm")
            self.block = _Block(name="block")
            self.again = self.first
            self.last = layers.Dense(3, name="last")

        def call(self, x):
            return self.last(self.block(self.norm(self.again(self.first(x)))))

    model = Model()
    outputs = run(model, X)
    kernels = {id(layer.kernel) for layer in model._flatten_layers() if hasattr(layer, "kernel")}
    assert traversal.rebuild(model, replace_dense) is model
    assert model.again is model.first
    assert [getattr(layer, "layer", layer).name for layer in model.layers] == ["first", "norm", "block", "last"]
    assert {id(k.kernel) for k in masked_kernels(model)} == kernels
    np.testing.assert_array_equal(run(model, X), outputs)


def test_a_subclassed_model_inside_a_functional_one_is_copied():
    class Model(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(10, name="dense")
            self.inner = tf_keras.Sequential([layers.Dense(4, name="deep")], name="inner")

        def call(self, x):
            return self.inner(self.dense(x))

    inputs = layers.Input((10,))
    inner = Model()
    model = tf_keras.Model(inputs, inner(inputs))
    new = traversal.rebuild(model, replace_dense)
    assert not any(traversal.is_mask_wrapper(layer) for layer in model._flatten_layers())
    assert [k.name for k in masked_kernels(new)] == [f"{inner.name}/dense/kernel", f"{inner.name}/inner/deep/kernel"]
    np.testing.assert_array_equal(run(new, X), run(model, X))
    again = traversal.rebuild(new, keep)
    assert [k.name for k in masked_kernels(again)] == [k.name for k in masked_kernels(new)]
    np.testing.assert_array_equal(run(again, X), run(model, X))
