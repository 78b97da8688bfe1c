import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.sparsity import keras as sparsity

from keras_sparse_init import (
    SparseHeNormal,
    SparseScaledInit,
    masked_kernels,
    masks,
    reinitialize,
    set_masks,
    sparsify,
    sparsity_table,
    strip,
)
from keras_sparse_init.tfmot import StaticPruneLowMagnitude, UpdatePruningStep, fix_precision, static_wrapper, wrappers

layers = tf_keras.layers
TIMES, FEATURES = 5, 6
X = np.random.default_rng(0).normal(size=(16, TIMES, FEATURES)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)

pytestmark = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning")


@pytest.fixture(autouse=True)
def float32_and_fixed_seed():
    tf_keras.utils.set_random_seed(0)
    yield
    tf_keras.mixed_precision.set_global_policy("float32")


def recurrent_model(built=True):
    """Two masked kernels of different shapes in the first layer, none of them with a bias after it in the second."""
    return tf_keras.Sequential(
        [
            *([layers.Input((TIMES, FEATURES))] if built else []),
            static_wrapper(
                layers.SimpleRNN(
                    4,
                    kernel_initializer=SparseHeNormal(sparsity=0.5),
                    recurrent_initializer=SparseHeNormal(sparsity=0.75),
                )
            ),
            static_wrapper(layers.Dense(3, use_bias=False, kernel_initializer=SparseHeNormal(sparsity=0.25))),
        ]
    )


def train(model, x=X, y=Y, optimizer="adam", **kwargs):
    model.compile(optimizer if not isinstance(optimizer, str) else tf_keras.optimizers.get(optimizer), "mse")
    return model.fit(x, y, batch_size=4, verbose=0, **kwargs)


def run(model, x):
    return model(x, training=False).numpy()


def snapshot(model):
    return {k.name: (k.kernel.numpy(), k.mask.numpy()) for k in masked_kernels(model)}


def assert_same(before, after):
    for (name, old), new in zip(before.items(), after.values(), strict=True):
        np.testing.assert_array_equal(old[0], new[0], err_msg=name)
        np.testing.assert_array_equal(old[1], new[1], err_msg=name)


def assert_sparse(model):
    for name, (kernel, mask) in snapshot(model).items():
        assert 0 < mask.mean() < 1, name
        assert not kernel[mask == 0].any(), name


# The static wrapper: where its masks come from.


def test_masks_are_the_zeros_of_the_kernels_that_sparse_initializers_make():
    kernels = masked_kernels(recurrent_model())
    assert [k.name.split("/")[-1] for k in kernels] == ["kernel", "recurrent_kernel", "kernel"]
    assert [int(k.mask_value().sum()) for k in kernels] == [FEATURES * 4 // 2, 4 * 4 // 4, 9]
    for k in kernels:
        np.testing.assert_array_equal(k.kernel.numpy() != 0, k.mask_value())


def test_a_kernel_of_zeros_has_a_mask_of_ones():
    wrapper = static_wrapper(layers.Dense(3, kernel_initializer="zeros"))
    wrapper.build((None, 4))
    assert masked_kernels(wrapper)[0].mask_value().all()


def test_a_model_that_is_built_by_its_first_call_is_masked_alike():
    model = recurrent_model(built=False)
    model(X)
    assert [int(k.mask_value().sum()) for k in masked_kernels(model)] == [FEATURES * 4 // 2, 4 * 4 // 4, 9]


def test_a_model_that_is_built_inside_a_traced_function_is_masked_alike():
    model = recurrent_model(built=False)
    traced = tf.function(model)
    traced(X)
    before = snapshot(model)
    assert [int(mask.sum()) for _, mask in before.values()] == [FEATURES * 4 // 2, 4 * 4 // 4, 9]
    traced(X)
    assert_same(before, snapshot(model))


def test_a_layer_that_is_not_prunable_is_refused():
    with pytest.raises(ValueError, match="supported layer"):
        static_wrapper(layers.EinsumDense("ab,bc->ac", 3))


def test_masks_of_the_constructor_are_checked_and_the_kernels_drawn_for_them():
    mask = np.zeros((40, 30), np.uint8)
    mask[:4] = 1
    layer = StaticPruneLowMagnitude(layers.Dense(30, kernel_initializer="he_uniform"), masks=[mask])
    layer.build((None, 40))
    kernel = layer.layer.kernel.numpy()
    np.testing.assert_array_equal(kernel != 0, mask != 0)
    # He's uniform limit for 4 inputs is sqrt(6 / 4), for 40 it is sqrt(6 / 40).
    assert 1.0 < np.abs(kernel).max() <= np.sqrt(6 / 4)
    for wrong, message in (
        ([mask, mask], r"1 kernels of 'dense_ok'.*Received: 2"),
        ([mask.T], r"'dense_ok' cannot be set: .*\(40, 30\)"),
        ([mask * 2], "'dense_ok' cannot be set: .*0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            StaticPruneLowMagnitude(layers.Dense(30, name="dense_ok"), masks=wrong).build((None, 40))


# The static wrapper: saving.


@pytest.fixture(scope="module")
def trained():
    """A model whose masks were changed after they were made, then trained."""
    tf_keras.utils.set_random_seed(1)
    model = recurrent_model()
    before = snapshot(model)
    set_masks(model, masks.Random(0.4), seed=3)
    train(model, epochs=2)
    after = snapshot(model)
    assert all((before[name][1] != after[name][1]).any() for name in before)
    return model


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "saved_model"])
def test_a_saved_model_comes_back_bit_for_bit(trained, tmp_path, name):
    trained.save(tmp_path / name)
    loaded = tf_keras.models.load_model(tmp_path / name)
    assert_same(snapshot(trained), snapshot(loaded))
    np.testing.assert_array_equal(run(loaded, X), run(trained, X))
    # What was loaded trains on, with its masks.
    loaded.fit(X, Y, verbose=0)
    for (_, old), (_, new) in zip(snapshot(trained).values(), snapshot(loaded).values(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert_sparse(loaded)


@pytest.mark.parametrize("name", ["model.weights.h5", "model.h5", "checkpoint"])
def test_saved_weights_come_back_bit_for_bit(trained, tmp_path, name):
    trained.save_weights(tmp_path / name)
    other = recurrent_model()
    other.load_weights(tmp_path / name)
    assert_same(snapshot(trained), snapshot(other))


@pytest.mark.parametrize("built", [True, False])
def test_a_checkpoint_comes_back_bit_for_bit_also_into_a_model_that_is_not_built(trained, tmp_path, built):
    path = tf.train.Checkpoint(model=trained).save(str(tmp_path / "checkpoint"))
    other = recurrent_model(built)
    status = tf.train.Checkpoint(model=other).restore(path).expect_partial()
    other(X)
    status.assert_existing_objects_matched()
    assert_same(snapshot(trained), snapshot(other))


def test_a_clone_has_the_masks_and_kernels_drawn_for_them(trained):
    clone = tf_keras.models.clone_model(trained)
    for (old_kernel, old), (kernel, mask) in zip(snapshot(trained).values(), snapshot(clone).values(), strict=True):
        np.testing.assert_array_equal(old, mask)
        np.testing.assert_array_equal(kernel != 0, mask != 0)
        assert (kernel != old_kernel)[mask != 0].all()
    clone.set_weights(trained.get_weights())
    assert_same(snapshot(trained), snapshot(clone))


def test_a_checkpoint_of_a_clone_that_is_not_built_is_not_drawn_over(trained, tmp_path):
    path = tf.train.Checkpoint(model=trained).save(str(tmp_path / "checkpoint"))
    wrappers = [type(layer).from_config(layer.get_config()) for layer in trained.layers]
    other = tf_keras.Sequential(wrappers)
    tf.train.Checkpoint(model=other).restore(path).expect_partial()
    other(X)
    assert_same(snapshot(trained), snapshot(other))


# The static wrapper: training, without a callback.


@pytest.mark.parametrize(
    ("optimizer", "recurrent"),
    [
        (lambda: tf_keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True), False),
        (lambda: tf_keras.optimizers.Adam(0.01), True),
        (lambda: tf_keras.optimizers.AdamW(0.01, weight_decay=0.1), False),
        (lambda: tf_keras.optimizers.legacy.Adam(0.01), False),
    ],
    ids=["momentum", "adam", "adamw", "legacy"],
)
def test_weights_off_the_masks_are_exactly_0_after_the_last_step(optimizer, recurrent):
    sparse = SparseHeNormal(sparsity=0.5)
    if recurrent:
        middle = [static_wrapper(layers.Bidirectional(layers.SimpleRNN(4, kernel_initializer=sparse)))]
    else:
        middle = [static_wrapper(layers.Conv1D(4, 2, kernel_initializer=sparse)), layers.Flatten()]
    model = tf_keras.Sequential(
        [
            layers.Input((TIMES,)),
            static_wrapper(layers.Embedding(20, FEATURES, embeddings_initializer=SparseScaledInit(sparsity=0.5))),
            *middle,
            static_wrapper(layers.Dense(3, kernel_initializer=SparseHeNormal(sparsity=0.5))),
        ]
    )
    set_masks(model, masks.Random(0.5), seed=0)
    before = snapshot(model)
    train(model, x=np.random.default_rng(2).integers(0, 20, (16, TIMES)), optimizer=optimizer(), epochs=5)
    assert_sparse(model)
    for name, (kernel, mask) in snapshot(model).items():
        np.testing.assert_array_equal(mask, before[name][1], err_msg=name)
        assert (kernel != before[name][0])[mask != 0].any(), name


def test_a_constraint_of_the_layer_holds_as_well():
    dense = layers.Dense(8, kernel_constraint=tf_keras.constraints.UnitNorm(axis=0))
    model = tf_keras.Sequential([layers.Input((TIMES, FEATURES)), layers.Flatten(), static_wrapper(dense)])
    set_masks(model, masks.Random(0.5), seed=0)
    train(model, y=np.ones((16, 8), np.float32))
    assert_sparse(model)
    np.testing.assert_allclose(np.linalg.norm(dense.kernel.numpy(), axis=0), 1.0, rtol=1e-5)


def test_a_compiled_step_of_xla_trains_it():
    model = tf_keras.Sequential([layers.Input((TIMES, FEATURES)), layers.Flatten(), static_wrapper(layers.Dense(3))])
    set_masks(model, masks.Random(0.5), seed=0)
    model.compile("adam", "mse", jit_compile=True)
    model.fit(X, Y, verbose=0)
    assert_sparse(model)


def updates_under(policy, wrap, fix=False, callbacks=()):
    """Mean change of a weight in 100 small SGD steps; about 100 times the learning rate times the mean gradient."""
    tf_keras.utils.set_random_seed(0)
    tf_keras.mixed_precision.set_global_policy(policy)
    model = tf_keras.Sequential([layers.Input((32,)), wrap(layers.Dense(16))])
    model.compile(tf_keras.optimizers.SGD(1e-4), "mse")
    if fix:
        fix_precision(model)
    before = masked_kernels(model)[0].kernel.numpy()
    model.fit(np.ones((800, 32)), np.ones((800, 16)), batch_size=8, verbose=0, shuffle=False, callbacks=list(callbacks))
    return float(np.abs(masked_kernels(model)[0].kernel.numpy() - before).mean())


def tfmot_wrapper(layer):
    return sparsity.prune_low_magnitude(layer, sparsity.ConstantSparsity(0.5, begin_step=10**6))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_small_updates_are_not_lost_in_mixed_precision_where_tfmot_loses_them(policy):
    exact = updates_under("float32", static_wrapper)
    assert exact > 1e-3
    assert updates_under(policy, static_wrapper) == pytest.approx(exact, rel=0.01)
    assert updates_under(policy, tfmot_wrapper, fix=True, callbacks=[sparsity.UpdatePruningStep()]) == pytest.approx(
        exact, rel=0.01
    )
    assert updates_under(policy, tfmot_wrapper, callbacks=[UpdatePruningStep()]) == pytest.approx(exact, rel=0.01)
    # When this fails, tfmot has been repaired, and `fix_precision` can go.
    assert updates_under(policy, tfmot_wrapper, callbacks=[sparsity.UpdatePruningStep()]) < 0.9 * exact


def test_fix_precision_takes_effect_on_a_model_that_was_trained_before():
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = tf_keras.Sequential([layers.Input((32,)), tfmot_wrapper(layers.Dense(16))])
    model.compile(tf_keras.optimizers.SGD(1e-6), "mse")
    kernel = masked_kernels(model)[0].kernel
    x, y = np.ones((8, 32)), np.ones((8, 16))
    model.fit(x, y, verbose=0, callbacks=[sparsity.UpdatePruningStep()])
    fix_precision(model)
    unrounded = np.full((32, 16), 1 + 2.0**-12, np.float32)
    kernel.assign(unrounded)
    run(model, x)
    np.testing.assert_array_equal(kernel.numpy(), unrounded)


def test_fix_precision_names_a_layer_that_is_not_built():
    with pytest.raises(ValueError, match="prune_low_magnitude_last.*not built"):
        fix_precision(tf_keras.Sequential([tfmot_wrapper(layers.Dense(3, name="last"))]))


# The static wrapper: what the wrapped layer is and does stays as it was.


def dense_counterpart(model):
    """The same layers without wrappers, with the same weights, as a check that does not go through `strip`."""
    plain = tf_keras.models.clone_model(
        model, clone_function=lambda layer: type(inner(layer)).from_config(inner(layer).get_config())
    )
    for new, old in zip(plain.layers, model.layers, strict=True):
        new.set_weights(inner(old).get_weights())
    return plain


def inner(layer):
    return getattr(layer, "layer", layer)


def test_sequence_masks_pass_through():
    model = tf_keras.Sequential(
        [
            layers.Input((None,)),
            static_wrapper(layers.Embedding(20, FEATURES, mask_zero=True)),
            static_wrapper(layers.SimpleRNN(4, return_sequences=True)),
            static_wrapper(layers.Dense(4)),
            static_wrapper(layers.Bidirectional(layers.SimpleRNN(4))),
            static_wrapper(layers.Dense(3)),
        ]
    )
    set_masks(model, masks.Random(0.5), seed=0)
    x = np.array([[3, 4, 5, 0, 0], [1, 2, 3, 4, 0]])
    outputs = run(model, x)
    np.testing.assert_allclose(outputs, run(dense_counterpart(model), x), rtol=1e-5)
    # The sequence mask matters: the padded steps, which have an embedding of their own, change nothing.
    np.testing.assert_allclose(outputs[:1], run(model, x[:1, :3]), rtol=1e-5)


def test_a_layer_keeps_its_own_precision():
    tf_keras.mixed_precision.set_global_policy("mixed_float16")
    model = tf_keras.Sequential(
        [layers.Input((8,)), static_wrapper(layers.Dense(8)), static_wrapper(layers.Dense(3, dtype="float32"))]
    )
    assert [layer.compute_dtype for layer in model.layers] == ["float16", "float32"]
    assert model.output.dtype == tf.float32
    assert all(k.mask.dtype == tf.float32 for k in masked_kernels(model))


def test_activity_regularization_stays():
    model = tf_keras.Sequential([layers.Input((8,)), static_wrapper(layers.Dense(3, activity_regularizer="l2"))])
    model(np.ones((2, 8), np.float32))
    assert len(model.losses) == 1


def test_state_is_kept_and_reset():
    model = tf_keras.Sequential(
        [static_wrapper(layers.SimpleRNN(4, stateful=True, batch_input_shape=(2, TIMES, FEATURES)))]
    )
    first = run(model, X[:2])
    assert (run(model, X[:2]) != first).any()
    model.reset_states()
    np.testing.assert_array_equal(run(model, X[:2]), first)


@pytest.mark.parametrize("by_name", [False, True])
def test_attention_to_values_of_another_width(by_name):
    query, value = layers.Input((TIMES, 8)), layers.Input((3, 6))
    wrapper = static_wrapper(layers.MultiHeadAttention(2, 4))
    outputs = wrapper(query, value=value) if by_name else wrapper(query, value)
    model = tf_keras.Model([query, value], outputs)
    kernels = masked_kernels(model)
    assert [k.name.split("/")[-2] for k in kernels] == ["query", "key", "value", "attention_output"]
    assert [k.shape[0] for k in kernels] == [8, 6, 6, 2]
    run(model, [np.ones((1, TIMES, 8)), np.ones((1, 3, 6))])


# Models that tfmot prunes.


def schedule(end=8, frequency=1, final=0.75):
    return sparsity.PolynomialDecay(0.0, final, begin_step=0, end_step=end, frequency=frequency)


def pruned_model(built=True, recurrent=False, **kwargs):
    first = [layers.SimpleRNN(4)] if recurrent else [layers.Dense(6), layers.Flatten()]
    return tf_keras.Sequential(
        [
            *([layers.Input((TIMES, FEATURES))] if built else []),
            sparsity.prune_low_magnitude(first[0], schedule(**kwargs)),
            *first[1:],
            sparsity.prune_low_magnitude(layers.Dense(3), schedule(**kwargs)),
        ]
    )


def steps(model):
    return [int(wrapper.pruning_step) for wrapper in wrappers(model)]


def test_masks_kernels_and_steps_are_those_that_the_callback_of_tfmot_gives():
    results = []
    for callback in (UpdatePruningStep(), sparsity.UpdatePruningStep()):
        tf_keras.utils.set_random_seed(3)
        model = pruned_model(recurrent=True, end=10, frequency=3)
        train(model, epochs=3, shuffle=False, callbacks=[callback])
        results.append((snapshot(model), steps(model)))
    assert_same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] == [12, 12]
    assert 0.7 < sparsity_table(model).total.sparsity < 0.8


def test_a_model_that_is_not_built_can_be_trained_where_tfmot_fails():
    model = pruned_model(built=False)
    train(model, epochs=2, callbacks=[UpdatePruningStep()])
    assert steps(model) == [8, 8]
    assert sparsity_table(model).total.sparsity == pytest.approx(0.75, abs=0.01)
    with pytest.raises(Exception, match="pruning_step"):  # To notice when it no longer does.
        train(pruned_model(built=False), callbacks=[sparsity.UpdatePruningStep()])


def test_a_checkpoint_into_a_model_that_is_not_built_continues_its_schedule(tmp_path):
    # tfmot's wrapper of a layer with several kernels cannot be restored in this way: its masks have the same name.
    def dense_model():
        return tf_keras.Sequential([layers.Flatten(), sparsity.prune_low_magnitude(layers.Dense(3), schedule())])

    model = dense_model()
    train(model, callbacks=[UpdatePruningStep()])
    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
    other = dense_model()
    tf.train.Checkpoint(model=other).restore(path).expect_partial()
    train(other, callbacks=[UpdatePruningStep()])
    assert steps(other) == [8]


@tf_keras.saving.register_keras_serializable("test_tfmot")
class Block(layers.Layer):
    """A layer that holds a wrapper and calls it several times."""

    def __init__(self, calls=1, **kwargs):
        super().__init__(**kwargs)
        self.calls = calls
        self.dense = sparsity.prune_low_magnitude(layers.Dense(FEATURES), schedule(end=4))

    def call(self, inputs):
        for _ in range(self.calls):
            inputs = self.dense(inputs)
        return inputs


def test_wrappers_inside_other_layers_are_found_where_tfmot_misses_them():
    def model():
        return tf_keras.Sequential(
            [
                layers.Input((TIMES, FEATURES)),
                layers.TimeDistributed(sparsity.prune_low_magnitude(layers.Dense(FEATURES), schedule(end=4))),
                Block(),
                layers.Flatten(),
                layers.Dense(3),
            ]
        )

    ours = model()
    train(ours, callbacks=[UpdatePruningStep()])
    assert steps(ours) == [4, 4]
    for k in masked_kernels(ours):
        assert int(k.mask_value().sum()) == FEATURES**2 // 4
    assert_sparse(ours)
    with pytest.raises(tf.errors.InvalidArgumentError, match="UpdatePruningStep"):
        train(model(), callbacks=[sparsity.UpdatePruningStep()])


class LooksAtKernels(tf_keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def look(self):
        assert_sparse(self.model)
        self.seen += 1

    def on_train_batch_end(self, batch, logs=None):
        self.look()

    def on_epoch_end(self, epoch, logs=None):
        self.look()


@pytest.mark.parametrize(("first", "suffix"), [(True, ".keras"), (False, "")])
def test_whatever_is_saved_is_sparse_wherever_the_callback_stands(tmp_path, first, suffix):
    model = pruned_model()
    look = LooksAtKernels()
    checkpoint = tf_keras.callbacks.ModelCheckpoint(str(tmp_path / f"{{batch:02d}}{suffix}"), save_freq=4)
    callbacks = [UpdatePruningStep(), look, checkpoint] if first else [look, checkpoint, UpdatePruningStep()]
    train(model, epochs=2, optimizer=tf_keras.optimizers.SGD(0.1, momentum=0.9), callbacks=callbacks)
    assert look.seen == 10
    (saved,) = tmp_path.iterdir()
    assert_sparse(tf_keras.models.load_model(saved))


@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 2}, {"run_eagerly": True}], ids=str)
def test_a_step_is_a_batch_however_often_a_layer_is_called(options):
    inputs = layers.Input(batch_shape=(4, 2, FEATURES))
    shared = sparsity.prune_low_magnitude(layers.Dense(FEATURES, name="shared"), schedule())
    # With a batch size, this is a loop over the steps of time.
    looped = layers.TimeDistributed(sparsity.prune_low_magnitude(layers.Dense(FEATURES, name="looped"), schedule()))
    idle = sparsity.prune_low_magnitude(layers.Dense(3, name="once"), schedule())
    model = tf_keras.Model(inputs, idle(layers.Flatten()(Block(3)(looped(shared(shared(inputs)))))))
    model.compile("sgd", "mse", **options)
    expected = [schedule()(step)[1].numpy() for step in range(1, 9)]
    seen = []

    class Sparsity(tf_keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append([row.sparsity for row in sparsity_table(model).rows][0])

    for _ in range(2):
        model.fit(X[:, :2], Y, batch_size=4, verbose=0, callbacks=[UpdatePruningStep(), Sparsity()])
    assert steps(model) == [8, 8, 8, 8]
    per = options.get("steps_per_execution", 1)
    np.testing.assert_allclose(seen, expected[per - 1 :: per], atol=0.5 / FEATURES**2 + 1e-6)


def test_training_that_was_traced_before_counts_batches_too():
    inputs = layers.Input((FEATURES,))
    shared = sparsity.prune_low_magnitude(layers.Dense(FEATURES), schedule())
    model = tf_keras.Model(inputs, shared(shared(inputs)))
    x = X[:, 0]
    train(model, x=x, y=x, callbacks=[sparsity.UpdatePruningStep()])
    assert steps(model) == [8]  # tfmot counts calls.
    model.fit(x, x, batch_size=4, verbose=0, callbacks=[UpdatePruningStep()])
    assert steps(model) == [12]
    model.fit(x, x, batch_size=4, verbose=0)
    assert steps(model) == [16]


def test_the_model_is_left_as_it_was():
    model = pruned_model()
    train(model, callbacks=[UpdatePruningStep()])
    assert "train_step" not in vars(model)

    class Stop(tf_keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, batch_size=4, verbose=0, callbacks=[UpdatePruningStep(), Stop()])
    model.fit(X, Y, batch_size=4, verbose=0, callbacks=[UpdatePruningStep()])
    assert "train_step" not in vars(model)
    assert steps(model) == [12, 12]


def test_a_training_loop_of_ones_own():
    model = pruned_model()
    callback, optimizer = UpdatePruningStep(), tf_keras.optimizers.SGD(0.1)
    callback.set_model(model)
    callback.on_train_begin()
    for start in range(0, 16, 4):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(X[start : start + 4], training=True) - Y[start : start + 4]) ** 2)
        optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )
    callback.on_epoch_end(0)
    assert steps(model) == [4, 4]
    assert_sparse(model)
    callback.on_train_end()
    assert "train_step" not in vars(model)


def test_a_model_with_a_train_step_of_its_own():
    class Model(tf_keras.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((self(x, training=True) - self(x, training=True) + self(x) - y) ** 2)
            self.optimizer.minimize(loss, self.trainable_variables, tape)
            return {"loss": loss}

    inputs = layers.Input((TIMES, FEATURES))
    model = Model(inputs, pruned_model()(inputs))
    train(model, callbacks=[UpdatePruningStep()])
    assert steps(model) == [4, 4]
    train(model, callbacks=[UpdatePruningStep()])
    assert steps(model) == [8, 8]


def test_masks_can_be_read_and_set_at_any_moment_of_pruning():
    sparsities = []

    class Watch(tf_keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            sparsities.append(sparsity_table(self.model).total.sparsity)
            plain = strip(self.model)
            np.testing.assert_array_equal(plain(X), self.model(X))
            if batch == 1:
                reinitialize(self.model, SparseHeNormal(), seed=0)
                assert_sparse(self.model)

    model = pruned_model(end=4)
    train(model, callbacks=[UpdatePruningStep(), Watch()])
    assert len(sparsities) == 4 and sparsities == sorted(sparsities) and sparsities[0] > 0.3
    set_masks(model, masks.Random(0.9), seed=0)
    assert sparsity_table(model).total.sparsity == pytest.approx(0.9, abs=0.05)
    # The schedule is over: tfmot changes the masks no more.
    set_to = snapshot(model)
    train(model, callbacks=[UpdatePruningStep()])
    for name, (_, mask) in snapshot(model).items():
        np.testing.assert_array_equal(mask, set_to[name][1])


def test_pruned_models_that_are_not_built_are_named():
    for function in (masked_kernels, sparsity_table, strip, reinitialize):
        with pytest.raises(ValueError, match="prune_low_magnitude_last.*not built"):
            function(tf_keras.Sequential([sparsity.prune_low_magnitude(layers.Dense(3, name="last"), schedule())]))


def test_masks_that_are_no_masks_are_named():
    model = pruned_model()
    kernel = masked_kernels(model)[1]
    kernel.mask.assign(kernel.mask * 0.5)
    for function in (reinitialize, sparsity_table, strip):
        with pytest.raises(ValueError, match=f"{kernel.name}.*0 and 1"):
            function(model)


def test_static_and_pruned_layers_together():
    model = tf_keras.Sequential(
        [
            layers.Input((TIMES, FEATURES)),
            static_wrapper(layers.SimpleRNN(4, kernel_initializer=SparseHeNormal(sparsity=0.5))),
            sparsity.prune_low_magnitude(layers.Dense(3), schedule(end=4)),
        ]
    )
    set_masks(model, {k.name: masks.Random(0.5) for k in masked_kernels(model)[:2]}, seed=0)
    before = snapshot(model)
    train(model, callbacks=[UpdatePruningStep()])
    after = snapshot(model)
    changed = [bool((before[name][1] != after[name][1]).any()) for name in before]
    assert changed == [False, False, True]


def test_shared_layers_have_one_wrapper_and_one_mask():
    inputs = layers.Input((FEATURES,))
    dense = layers.Dense(FEATURES, name="shared")
    model = sparsify(tf_keras.Model(inputs, dense(dense(inputs))), 0.5, seed=0)
    assert [k.name for k in masked_kernels(model)] == ["shared/kernel"]
    train(model, x=X[:, 0], y=X[:, 0])
    assert_sparse(model)


# A process of its own: what loads after `import keras_sparse_init` alone, and several devices.

SCRIPT = """
import json, sys
import keras_sparse_init
assert "tensorflow" not in sys.modules and "keras" not in sys.modules
import numpy as np, tensorflow as tf, tf_keras
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
results = {}
for path in sys.argv[1:]:
    model = tf_keras.models.load_model(path)
    with np.load(path.rsplit(".", 1)[0] + ".npz") as expected:
        from keras_sparse_init import masked_kernels
        results[path.rsplit("/", 1)[1]] = all(
            np.array_equal(v.numpy(), expected[f"{i}_{j}"])
            for i, k in enumerate(masked_kernels(model)) for j, v in enumerate((k.kernel, k.mask)))

from keras_sparse_init import SparseHeNormal, masked_kernels, masks, set_masks
from keras_sparse_init.tfmot import UpdatePruningStep, static_wrapper
from tensorflow_model_optimization.sparsity import keras as sparsity
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
layers = tf_keras.layers
# Each model has several cases: what takes its time is that Keras traces its training.
for cases in (("static", "seeded", "changed", "pruned"), ("unbuilt", "pruned_unbuilt"), ("mixed",)):
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16" if "mixed" in cases else "float32")
    wrapped = {}
    with strategy.scope():
        for case in cases:
            initializer = SparseHeNormal(sparsity=0.5, seed=1 if case == "seeded" else None)
            dense = layers.Dense(16, kernel_initializer=initializer, name=case)
            if case.startswith("pruned"):
                schedule = sparsity.PolynomialDecay(0.1, 0.5, begin_step=0, end_step=6, frequency=2)
                wrapped[case] = sparsity.prune_low_magnitude(dense, schedule)
            else:
                wrapped[case] = static_wrapper(dense)
        model = tf_keras.Sequential([*([] if "unbuilt" in cases else [layers.Input((32,))]), *wrapped.values()])
        model.compile(tf_keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    if "changed" in cases:
        set_masks(model, {"changed/kernel": masks.Random(0.5)}, seed=7)
    rng = np.random.default_rng(0)
    callbacks = [UpdatePruningStep()] if any(case.startswith("pruned") for case in cases) else []
    model.fit(rng.normal(size=(80, 32)), rng.normal(size=(80, 16)), batch_size=8, verbose=0, callbacks=callbacks)
    for case, wrapper in wrapped.items():
        kernel, mask = ([v.numpy() for v in getattr(w, "_variable", w).values]
                        for w in (wrapper.layer.kernel, wrapper.pruning_vars[0][1]))
        results[case] = bool(len(kernel) == 2 and np.array_equal(*kernel) and np.array_equal(*mask)
                             and mask[0].mean() == 0.5 and not kernel[0][mask[0] == 0].any())
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def other_process(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pruned = pruned_model(recurrent=True)
    tf_keras.utils.set_random_seed(0)
    train(pruned, epochs=2, callbacks=[UpdatePruningStep()])
    dense = tf_keras.Sequential([layers.Input((8,)), layers.Dense(3, name="dense")])
    # tfmot cannot save a layer with several kernels as h5.
    pruned_dense = sparsity.prune_low_magnitude(dense, schedule())
    paths = []
    for model, kind, names in (
        (trained, "static", ("keras", "h5", "tf")),
        (pruned, "pruned", ("keras", "tf")),
        (pruned_dense, "dense", ("h5",)),
    ):
        arrays = {f"{i}_{j}": a for i, pair in enumerate(snapshot(model).values()) for j, a in enumerate(pair)}
        np.savez(folder / f"{kind}.npz", **arrays)
        for name in names:
            paths.append(str(folder / f"{kind}.{name}"))
            model.save(paths[-1], save_format=name)
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(SCRIPT), *paths], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["static.keras", "static.h5", "static.tf", "pruned.keras", "pruned.tf", "dense.h5"])
def test_importing_the_package_is_enough_to_load_a_model(other_process, name):
    assert other_process[name]


@pytest.mark.parametrize("case", ["static", "seeded", "unbuilt", "changed", "pruned", "pruned_unbuilt", "mixed"])
def test_kernels_and_masks_are_bitwise_equal_on_all_replicas(other_process, case):
    assert other_process[case]
