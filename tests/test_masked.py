"""`Masked` in both Kerases: what it computes, its gradients, masks, building and training. Saving has its own file."""

from __future__ import annotations

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from masked_layers import (
    CASES,
    arguments,
    assert_sparse,
    data,
    half,
    masked_case,
    number,
    predicted,
    subclassed,
    weights_and_masks,
)

from keras_sparse_init import (
    Masked,
    SparseHeNormal,
    masked_kernels,
    masks,
    reinitialize,
    set_masks,
    sparsity_table,
)
from keras_sparse_init.sampling import derive_seed

either_keras = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])


@pytest.fixture(autouse=True)
def fixed_seed():
    keras.utils.set_random_seed(0)


def outputs_and_gradients(layer, args, kwargs):
    variables = [weight if isinstance(weight, tf.Variable) else weight.value for weight in layer.trainable_weights]
    with tf.GradientTape() as tape:
        outputs = tf.nest.flatten(layer(*args, **kwargs))
        loss = sum(tf.reduce_sum(tf.sin(output)) for output in outputs)
    gradients = tape.gradient(loss, variables)
    return outputs, [tf.convert_to_tensor(gradient).numpy() for gradient in gradients]


# What it computes.


@either_keras
@pytest.mark.parametrize("name", CASES)
def test_a_masked_layer_is_the_layer_on_kernel_times_mask(library, name):
    masked, plain, masks = masked_case(library, name)
    args, kwargs = arguments(library, name)
    outputs, gradients = outputs_and_gradients(masked, args, kwargs)
    expected_outputs, expected_gradients = outputs_and_gradients(plain, args, kwargs)
    for output, expected in zip(outputs, expected_outputs, strict=True):
        np.testing.assert_array_equal(output, expected)
    for gradient, expected, mask in zip(gradients, expected_gradients, masks, strict=True):
        if mask is not None:
            assert not gradient[mask == 0].any()
            expected = expected * mask
        assert gradient.any()
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def assert_variables(layer):
    """Every kernel attribute holds the variable again."""
    for kernel in masked_kernels(layer):
        assert any(value is kernel.kernel for value in vars(kernel.layer).values())


def user_dense(library, base=None):
    class Custom(base or library.layers.Dense):
        def call(self, inputs, shift=1.0):
            return super().call(inputs) + shift

    return Custom(4)


def composite(library, **kwargs):
    """A layer of one's own around layers: two kernels below it, and training and sequence masks that matter."""

    class Block(library.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.parts = [library.layers.Dense(5, activation="tanh"), library.layers.Dense(4, **kwargs)]
            self.norm = library.layers.BatchNormalization()
            self.supports_masking = True

        def build(self, input_shape):
            self.parts[0].build(input_shape)
            self.parts[1].build((*tuple(input_shape)[:-1], 5))
            self.norm.build((*tuple(input_shape)[:-1], 4))
            super().build(input_shape)

        def call(self, inputs, training=False, mask=None):
            outputs = self.norm(self.parts[1](self.parts[0](inputs)), training=training)
            if mask is not None:
                outputs = outputs * tf.cast(mask, tf.float32)[..., None]
            return outputs

    return Block(**kwargs)


@either_keras
def test_a_subclass_of_a_keras_layer(library):
    masked = Masked(user_dense(library), mask=half(5, 4))
    x = tf.constant(data(3, 5))
    expected = x.numpy() @ number(masked.layer.kernel if masked(x) is None else masked.layer.kernel)
    np.testing.assert_allclose(masked(x), expected + 1, rtol=1e-5)
    np.testing.assert_allclose(masked(x, shift=3.0), expected + 3, rtol=1e-5)
    assert_sparse(masked)


@either_keras
def test_weights_of_ones_own_by_their_names(library):
    class Bilinear(library.layers.Layer):
        def build(self, input_shape):
            size = input_shape[-1]
            self.left = self.add_weight(name="left", shape=(size, 3))
            self.right = self.add_weight(name="right", shape=(size, 3))
            self.kernel = self.add_weight(name="kernel", shape=(size, 3))

        def call(self, inputs):
            dot = tf.matmul
            return dot(inputs, tf.convert_to_tensor(self.left)) * dot(inputs, tf.convert_to_tensor(self.right)) + dot(
                inputs, tf.convert_to_tensor(self.kernel)
            )

    masked = Masked(Bilinear(), sparsity=0.5, weight_names=["left", "right"], seed=0)
    x = tf.constant(data(4, 6))
    masked(x)
    layer = masked.layer
    assert [kernel.name.split("/")[-1] for kernel in masked_kernels(masked)] == ["left", "right"]
    left, right, kernel = (data(6, 3, seed=i) for i in range(3))
    for variable, value in zip((layer.left, layer.right, layer.kernel), (left, right, kernel), strict=True):
        variable.assign(value)
    masks = [number(k.mask) for k in masked_kernels(masked)]
    expected = (x @ (left * masks[0])) * (x @ (right * masks[1])) + x @ kernel
    np.testing.assert_allclose(masked(x), expected, rtol=1e-5)
    assert (masks[0] != masks[1]).any()


@either_keras
def test_a_composite_layer_gets_training_and_sequence_masks(library):
    masked, plain = Masked(composite(library), sparsity=0.5, seed=0), composite(library)
    x, sequence_mask = tf.constant(data(4, 3, 6)), tf.constant(np.random.default_rng(1).random((4, 3)) < 0.5)
    masked(x)
    plain(x)
    assert_sparse(masked)
    plain.set_weights(masked.layer.get_weights())
    for arguments_ in ({}, {"training": True}, {"mask": sequence_mask}, {"training": False}):
        np.testing.assert_allclose(masked(x, **arguments_), plain(x, **arguments_), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(masked.layer.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert np.abs(masked(x, training=True) - masked(x, training=False)).max() > 0.01


@either_keras
@pytest.mark.parametrize("outer", ["time_distributed", "bidirectional"])
def test_a_masked_layer_inside_another(library, outer):
    layers = library.layers
    if outer == "time_distributed":
        layer = layers.TimeDistributed(Masked(layers.Dense(3), sparsity=0.5, seed=0))
        plain = layers.TimeDistributed(layers.Dense(3))
    else:
        layer = layers.Bidirectional(layers.RNN(CellOf(library, Masked(layers.Dense(3), sparsity=0.5, seed=0))))
        plain = layers.Bidirectional(layers.RNN(CellOf(library, layers.Dense(3))))
    x = tf.constant(data(2, 5, 4))
    layer(x)
    plain(x)
    assert_sparse(layer)
    kernels = {id(k.kernel) for k in masked_kernels(layer)} | {id(w) for w in layer.trainable_weights}
    plain.set_weights([number(w) for w in layer.weights if id(w) in kernels])
    np.testing.assert_allclose(layer(x), plain(x), rtol=1e-5, atol=1e-6)
    assert_variables(layer)


def CellOf(library, dense):  # A class, made for one of two Kerases.
    """A recurrent cell whose step is a dense layer."""

    @library.saving.register_keras_serializable("test_masked")
    class Cell(library.layers.Layer):
        def __init__(self, dense, **kwargs):
            super().__init__(**kwargs)
            self.dense, self.units = dense, 3
            self.state_size = self.output_size = 3

        def build(self, input_shape):
            self.dense.build((input_shape[0], input_shape[-1] + 3))
            super().build(input_shape)

        def call(self, inputs, states):
            output = self.dense(tf.concat([inputs, states[0]], -1))
            return output, [output]

        def get_config(self):
            return {"dense": library.layers.serialize(self.dense)}

        @classmethod
        def from_config(cls, config, custom_objects=None):
            return cls(library.layers.deserialize(config["dense"]))

    return Cell(dense)


@either_keras
def test_masks_of_an_embedding_reach_the_layer_behind_it(library):
    layers = library.layers

    def model(wrap):
        return library.Sequential(
            [
                library.Input((5,), dtype="int32"),
                wrap(layers.Embedding(7, 4, mask_zero=True)),
                wrap(layers.LSTM(3)),
            ]
        )

    masked, plain = model(lambda layer: Masked(layer, sparsity=0.5, seed=0)), model(lambda layer: layer)
    plain.set_weights([weight for layer in masked.layers for weight in layer.layer.get_weights()])
    tokens = np.array([[1, 2, 0, 0, 0], [3, 4, 5, 6, 0]])
    expected = number(plain(tf.constant(tokens)))
    np.testing.assert_allclose(masked(tf.constant(tokens)), expected, rtol=1e-5)
    # What the tokens that are masked stand for does not matter.
    embedding = masked.layers[0].layer
    embedding.set_weights([number(embedding.embeddings) + np.eye(7, 1) * masked.layers[0].embeddings_mask])
    np.testing.assert_allclose(masked(tf.constant(tokens)), expected, rtol=1e-5)


def functional(library, wrap):
    layers = library.layers
    shared = wrap(layers.Dense(4, activation="tanh", name="shared"))
    a, b = library.Input((4,), name="a"), library.Input((4,), name="b")
    inner_input = library.Input((8,))
    inner = library.Model(inner_input, wrap(layers.Dense(3, name="inner"))(inner_input), name="nested")
    both = layers.Concatenate()([shared(a), shared(b)])
    return library.Model([a, b], wrap(layers.Dense(2, name="last"))(inner(both)))


@either_keras
def test_functional_models_with_nested_ones_shared_layers_and_several_inputs(library):
    masked, plain = functional(library, lambda layer: Masked(layer, sparsity=0.5)), functional(library, lambda x: x)
    assert [k.name for k in masked_kernels(masked)] == ["shared/kernel", "nested/inner/kernel", "last/kernel"]
    assert_sparse(masked)
    masks = {id(k.mask) for k in masked_kernels(masked)}
    plain.set_weights([number(weight) for weight in masked.weights if id(weight) not in masks])
    x = [data(3, 4), data(3, 4, seed=1)]
    np.testing.assert_allclose(predicted(masked, x), predicted(plain, x), rtol=1e-5)
    masked.compile("adam", "mse")
    masked.fit(x, data(3, 2), epochs=2, verbose=0)
    assert_sparse(masked)


@either_keras
@pytest.mark.parametrize(
    "settings", [{"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 2}], ids=str
)
def test_every_way_of_fitting_keeps_weights_off_the_mask_at_0(library, settings):
    model = subclassed(library)
    model.compile("adam", "mse", **settings)
    before = None
    for _ in range(2):
        model.fit(data(8, 5), data(8, 2), batch_size=4, verbose=0)
        assert_sparse(model)
        after = weights_and_masks(model)
        assert before is None or any((new[0] != old[0]).any() for new, old in zip(after, before, strict=True))
        before = after
    assert_variables(model)


OPTIMIZERS = {
    "sgd": lambda o: o.SGD(0.1, momentum=0.9, nesterov=True),
    "adam": lambda o: o.Adam(0.01),
    "adamw": lambda o: o.AdamW(0.01, weight_decay=0.1),
    "rmsprop": lambda o: o.RMSprop(0.01, momentum=0.5),
    "adam_clipped": lambda o: o.Adam(0.01, global_clipnorm=0.1, use_ema=True),
}


@either_keras
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_off_the_mask_are_exactly_0_under_every_optimizer(library, optimizer):
    layers = library.layers
    if optimizer == "adam":  # To trace an LSTM takes as long as all the others.
        first = layers.LSTM(4, return_sequences=True, kernel_regularizer="l2")
    else:
        first = layers.Dense(4, activation="tanh", kernel_regularizer="l2")
    model = library.Sequential(
        [
            library.Input((6, 4)),
            Masked(first, sparsity=0.5),
            Masked(layers.Conv1D(4, 2, kernel_constraint=library.constraints.MaxNorm(0.8, axis=[0, 1])), sparsity=0.5),
            Masked(layers.Dense(2, kernel_regularizer="l1"), sparsity=0.5),
        ]
    )
    before = weights_and_masks(model)
    model.compile(OPTIMIZERS[optimizer](library.optimizers), "mse")
    model.fit(data(16, 6, 4), data(16, 5, 2), batch_size=4, epochs=3, verbose=0)
    assert_sparse(model)
    for (old_kernel, old_mask), (kernel, mask) in zip(before, weights_and_masks(model), strict=True):
        np.testing.assert_array_equal(mask, old_mask)
        assert (kernel[mask == 1] != old_kernel[mask == 1]).mean() > 0.5
    if not model.optimizer.use_ema:  # Which mixes in values from before.
        assert (np.linalg.norm(number(model.layers[1].layer.kernel).reshape(-1, 4), axis=0) <= 0.8 + 1e-6).all()
    assert np.isclose(float(sum(model.losses)), regularization(model), rtol=1e-5)


def regularization(model):
    first = model.layers[0].layer
    l2, l1 = number(getattr(first, "cell", first).kernel), number(model.layers[2].layer.kernel)
    return 0.01 * (l2**2).sum() + 0.01 * np.abs(l1).sum()


@either_keras
def test_a_mask_is_a_weight_that_is_not_trained(library):
    masked = Masked(library.layers.Dense(4), sparsity=0.5)
    masked.build((None, 5))
    (kernel,) = masked_kernels(masked)
    assert len(masked.weights) == 3
    assert [tuple(w.shape) for w in masked.trainable_weights] == [(5, 4), (4,)]
    assert len(masked.non_trainable_weights) == 1
    assert masked.non_trainable_weights[0] is kernel.mask is masked.kernel_mask
    assert masked.count_params() == 5 * 4 * 2 + 4
    masked.trainable = False
    assert not masked.trainable_weights
    assert len(masked.weights) == 3
    masked.trainable = True
    assert len(masked.trainable_weights) == 2
    frozen = Masked(library.layers.Dense(4), sparsity=0.5, trainable=False)
    frozen.build((None, 5))
    assert not frozen.trainable_weights


# What a call leaves behind.


@either_keras
def test_the_kernel_is_the_variable_again_after_an_exception(library):
    class Failing(library.layers.Dense):
        def call(self, inputs):
            super().call(inputs)
            raise RuntimeError("in the middle of a call")

    masked = Masked(Failing(4), sparsity=0.5)
    kernel = None
    for _ in range(2):
        with pytest.raises(RuntimeError, match="in the middle"):
            masked(tf.constant(data(2, 5)))
        assert_variables(masked)
        assert kernel is None or masked.layer.kernel is kernel
        kernel = masked.layer.kernel


@either_keras
def test_no_tensor_of_a_traced_function_is_left_in_the_layer(library):
    masked = Masked(library.layers.Bidirectional(library.layers.LSTM(3)), sparsity=0.5)
    traced = tf.function(masked)
    x = tf.constant(data(2, 4, 5))
    first = traced(x)
    assert_variables(masked)
    np.testing.assert_allclose(masked(x), first, rtol=1e-5, atol=1e-6)
    for kernel in masked_kernels(masked):
        kernel.kernel.assign(number(kernel.kernel) * 2)
    assert (np.abs(traced(x) - first) > 1e-4).any()
    np.testing.assert_allclose(masked(x), traced(x), rtol=1e-5, atol=1e-6)


@either_keras
def test_a_call_inside_a_while_loop(library):
    masked = Masked(library.layers.Dense(4), mask=half(4, 4), seed=0)
    x = data(2, 4)
    masked(tf.constant(x))

    @tf.function
    def loop(start):
        with tf.GradientTape() as tape:
            result = tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, masked(y)), (0, start))[1]
        kernel = masked.layer.kernel
        return result, tape.gradient(result, kernel if library is tf_keras else kernel.value)

    result, gradient = loop(tf.constant(x))
    kernel = number(masked.layer.kernel)
    np.testing.assert_allclose(result, x @ kernel @ kernel @ kernel, rtol=1e-4, atol=1e-5)
    assert not gradient.numpy()[half(4, 4) == 0].any()
    assert gradient.numpy().any()
    assert_variables(masked)


@either_keras
def test_threads_that_call_one_layer_do_not_disturb_one_another(library):
    """One thread puts kernel * mask into the layer while another is in the middle of its call."""
    inside, meet = threading.Event(), threading.Event()

    class Slow(library.layers.Dense):
        def call(self, inputs):
            if not inside.is_set():
                inside.set()
                meet.wait(0.3)
            return super().call(inputs)

    layer = Slow(4)
    layer.build((None, 5))
    masked = Masked(layer, mask=half(5, 4))
    masked.build((None, 5))
    layer.set_weights([np.ones((5, 4)), np.zeros(4)])
    x, outputs = tf.ones((1, 5)), {}
    kernel = layer.kernel if library is tf_keras else layer.kernel.value

    def call(name):
        with tf.GradientTape() as tape:
            output = masked(x)
        outputs[name] = output.numpy(), tape.gradient(output, kernel).numpy()

    first = threading.Thread(target=call, args=["first"])
    first.start()
    inside.wait()
    second = threading.Thread(target=call, args=["second"])
    second.start()
    for thread in (first, second):
        thread.join()
    for output, gradient in outputs.values():
        np.testing.assert_array_equal(output, half(5, 4).sum(axis=0)[None])
        np.testing.assert_array_equal(gradient, half(5, 4))
    assert len(outputs) == 2
    assert_variables(masked)


@either_keras
def test_a_layer_with_state_keeps_and_resets_it(library):
    layers = library.layers
    options = {"stateful": True, "batch_input_shape": (2, 5, 4)} if library is tf_keras else {"stateful": True}
    masked, plain = Masked(layers.LSTM(3, **options), sparsity=0.5), layers.LSTM(3, **options)
    x = tf.constant(data(2, 5, 4))
    first = masked(x)
    plain(x)
    plain.set_weights(masked.layer.get_weights())
    (plain.reset_states if library is tf_keras else plain.reset_state)()
    np.testing.assert_allclose(plain(x), first, rtol=1e-5)
    assert masked.stateful
    second = masked(x)
    np.testing.assert_allclose(second, plain(x), rtol=1e-5)
    assert (np.abs(second - first) > 1e-4).any()
    if library is tf_keras:
        model = tf_keras.Sequential([masked])
        model.reset_states()
    else:
        masked.reset_states()
    np.testing.assert_allclose(masked(x), first, rtol=1e-5)


@either_keras
def test_activity_regularization_and_losses_of_the_layer_are_counted_once(library):
    masked = Masked(library.layers.Dense(4, activity_regularizer="l2", kernel_regularizer="l2"), sparsity=0.5)
    x = tf.constant(data(3, 5))
    output = masked(x)
    kernel = number(masked.layer.kernel)
    expected = 0.01 * (kernel**2).sum() + 0.01 * (output.numpy() ** 2).sum() / 3
    np.testing.assert_allclose(sum(float(loss) for loss in masked.losses), expected, rtol=1e-5)


# Masks that change.


def change_masks_after_an_epoch(library, rule):
    class Change(library.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                set_masks(self.model, rule, seed=epoch)

    return Change()


@either_keras
@pytest.mark.parametrize("settings", [{}, {"jit_compile": True}], ids=str)
def test_masks_that_a_callback_changes_take_effect_in_the_next_step(library, settings):
    model = library.Sequential([library.Input((6,)), Masked(library.layers.Dense(4), mask=half(6, 4), seed=0)])
    model.compile(library.optimizers.Adam(0.01, weight_decay=0.1), "mse", **settings)
    x, y = data(16, 6), data(16, 4)
    model.fit(x, y, batch_size=4, verbose=0)
    ((_, before),) = weights_and_masks(model)
    model.fit(
        x, y, batch_size=4, epochs=2, verbose=0, callbacks=[change_masks_after_an_epoch(library, masks.Random(0.75))]
    )
    ((kernel, mask),) = weights_and_masks(model)
    assert mask.sum() == 6
    assert (mask > before).any()
    # New weights have begun to grow from 0, others went to 0 and are not moved by their momentum.
    assert kernel[(mask > before)].all()
    np.testing.assert_allclose(
        model.predict(x, verbose=0), x @ (kernel * mask) + number(model.layers[0].layer.bias), rtol=1e-4, atol=1e-5
    )
    assert not kernel[mask == 0].any()


@either_keras
def test_whole_model_functions_know_masked_layers(library):
    layers = library.layers

    def make():
        return library.Sequential(
            [
                library.Input((8, 8, 3)),
                Masked(layers.SeparableConv2D(4, 3, name="separable"), sparsity=0.5),
                layers.Reshape((36, 4)),
                Masked(layers.Bidirectional(layers.GRU(3), name="both_ways"), sparsity=0.5),
                Masked(layers.Dense(4, kernel_initializer=SparseHeNormal(seed=3)), sparsity=0.5),
            ]
        )

    model, other = make(), make()
    kernels = masked_kernels(model)
    assert [kernel.layout.name for kernel in kernels] == ["depthwise", "conv", "gru", "gru", "gru", "gru", "dense"]
    assert [kernel.name.split("/")[0] for kernel in kernels[:-1]] == ["separable"] * 2 + ["both_ways"] * 4
    assert [k.seed_name for k in kernels] == [k.seed_name for k in masked_kernels(other)]
    for seed in (1, 2):
        for each in (model, other):
            set_masks(each, masks.Random(0.75), seed=seed)
            reinitialize(each, seed=seed)
        for first, second in zip(weights_and_masks(model), weights_and_masks(other), strict=True):
            np.testing.assert_array_equal(first[0], second[0])
            np.testing.assert_array_equal(first[1], second[1])
        assert_sparse(model)
    table = sparsity_table(model)
    assert [row.nonzeros for row in table.rows] == [kernel.mask_value().sum() for kernel in kernels]
    assert 0.74 < table.total.sparsity <= 0.75
    reinitialize(model, SparseHeNormal(), seed=5)
    expected = SparseHeNormal().draw(
        (6, 4), "float32", kernels[-1].mask_value(), None, derive_seed(5, kernels[-1].seed_name)
    )
    np.testing.assert_array_equal(number(kernels[-1].kernel), expected)
    kernels[0].mask.assign(np.full(kernels[0].shape, 0.5))
    with pytest.raises(ValueError, match="separable/depthwise_kernel.*not a mask"):
        kernels[0].mask_value()


@pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
def test_weights_that_set_masks_removes_in_the_midst_of_training_stay_zero(library):
    model = library.Sequential([library.layers.Input((6,)), Masked(library.layers.Dense(4))])
    model.compile(library.optimizers.SGD(0.1, momentum=0.9), "mse")
    data = np.random.default_rng(0)
    x, y = data.normal(size=(32, 6)), data.normal(size=(32, 4))
    model.fit(x, y, epochs=2, verbose=0)
    set_masks(model, masks.Random(0.5), seed=0)
    model.fit(x, y, epochs=2, verbose=0)
    kernel = masked_kernels(model)[0]
    assert np.count_nonzero(np.asarray(model.layers[0].layer.get_weights()[0])[~kernel.mask_value()]) == 0
