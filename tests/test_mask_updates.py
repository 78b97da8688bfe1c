"""SET, RigL and RigLInverted: what is dropped and grown, in whole models, in `fit` and in a loop of one's own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import keras
import mask_update_checks as checks
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from mask_update_checks import UPDATERS, sparse_network
from pruning_checks import Recorder, X, Y, assert_same, fit, kernels, mask_values

from keras_sparse_init import SET, Masked, MaskUpdate, RigL, RigLInverted, dense_gradients, masked_kernels, set_masks
from keras_sparse_init.compat import metric_variables, to_numpy
from keras_sparse_init.mask_updates.drop_grow import drop_and_grow, number_dropped
from keras_sparse_init.mask_updates.unmasked_gradients import DenseGradients
from keras_sparse_init.masks import Random
from keras_sparse_init.variance import weight_std

LIBRARIES = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
GROWTHS = ("random", "largest", "smallest")


# Masks.


def slow_exchange(weights, mask, fraction, gradient, growth):
    """One connection after the other; all numbers differ."""
    weights, gradient = np.abs(weights).astype(float).ravel().tolist(), np.abs(gradient).ravel().tolist()
    active = {int(i) for i in np.flatnonzero(mask)}
    count = number_dropped(len(active), fraction)
    for i in sorted(active, key=weights.__getitem__)[:count]:
        active.remove(i)
    free = sorted(set(range(len(weights))) - active, key=gradient.__getitem__)
    active.update(free[-count:] if growth == "largest" else free[:count])
    new = np.zeros(mask.size, bool)
    new[list(active)] = True
    return new.reshape(mask.shape)


def random_case(shape, density, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    mask = np.zeros(size, bool)
    mask[rng.permutation(size)[: round(size * density)]] = True
    # Numbers that differ, in half precision too.
    gradient = (rng.permutation(size) + 1.0) * rng.choice([-1, 1], size)
    weights = (rng.normal(size=size) + np.copysign(0.01, rng.normal(size=size))) * mask
    return weights.astype(dtype).reshape(shape), mask.reshape(shape), gradient.astype(np.float32).reshape(shape)


@pytest.mark.parametrize("growth", GROWTHS[1:])
@pytest.mark.parametrize("shape", [(1,), (7, 5), (3, 3, 4, 6), (200, 150)])
def test_a_new_mask_is_that_of_a_slow_loop(shape, growth):
    """Large kernels take another way to the same result."""
    for density in (0.02, 0.3, 0.9):
        weights, mask, gradient = random_case(shape, density)
        for fraction in (0.05, 0.3, 1.0):
            found = drop_and_grow(weights, mask, fraction, growth, gradient)
            if number_dropped(mask.sum(), fraction) == 0:
                assert found.mask is mask
                continue
            np.testing.assert_array_equal(found.mask, slow_exchange(weights, mask, fraction, gradient, growth))
            np.testing.assert_array_equal(np.sort(found.dropped), np.flatnonzero(mask & ~found.mask))
            np.testing.assert_array_equal(np.sort(found.grown), np.flatnonzero(~mask & found.mask))


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("shape", [(6, 7), (200, 150)])
def test_the_number_of_connections_stays_exactly(shape, growth):
    """Whatever the numbers are: all equal, zeros, not finite."""
    size = int(np.prod(shape))
    rng = np.random.default_rng(1)
    odd = rng.choice([0.0, 1.0, -1.0, np.inf, -np.inf, np.nan], size).reshape(shape)
    for density in (0.0, 0.05, 0.5, 0.97, 1.0):
        weights, mask, gradient = random_case(shape, density)
        for w, g in (
            (weights, np.zeros(shape)),
            (np.zeros(shape), gradient),
            (mask * 1.0, np.ones(shape)),
            (weights, odd),
            (odd, odd),
            (weights, np.full(shape, np.nan)),
        ):
            for fraction in (0.1, 0.5, 1.0):
                found = drop_and_grow(w, mask, fraction, growth, g, seed=3)
                assert found.mask.sum() == mask.sum()
                assert found.dropped.size == found.grown.size == (mask & ~found.mask).sum()
                count = number_dropped(int(mask.sum()), fraction)
                magnitudes = np.where(np.isnan(w), np.inf, np.abs(w))
                if 0 < count < mask.sum():
                    assert found.mask[mask & (magnitudes > np.sort(magnitudes[mask])[count - 1])].all()


@pytest.mark.parametrize("growth", GROWTHS[1:])
def test_what_is_not_a_number_is_grown_last(growth):
    weights, mask, gradient = random_case((30, 20), 0.2)
    gradient[::2] = np.nan
    found = drop_and_grow(weights, mask, 0.4, growth, gradient)
    assert found.grown.size and not np.isnan(gradient.ravel()[found.grown]).any()
    gradient[1, 1] = np.inf
    weights[1, 1], mask[1, 1] = 0, False
    found = drop_and_grow(weights, mask, 0.4, growth, gradient)
    assert found.mask[1, 1] == (growth == "largest")


def test_half_types_are_compared_as_they_are():
    weights, mask, gradient = random_case((30, 20), 0.2)
    for dtype in (np.float16, tf.bfloat16.as_numpy_dtype):
        half = weights.astype(dtype), mask, 0.3, "largest", gradient.astype(dtype)
        same = half[0].astype(np.float32), mask, 0.3, "largest", half[-1].astype(np.float32)
        np.testing.assert_array_equal(drop_and_grow(*half).mask, drop_and_grow(*same).mask)


@pytest.mark.parametrize(("growth", "density"), [("random", 0.2), ("random", 0.9), ("largest", 0.2)])
def test_equal_places_are_equally_likely(growth, density):
    """Random growth by both of its ways, and growth by a gradient of zeros: chi-square over the places."""
    mask = np.zeros(40, bool)
    mask[: round(40 * density)] = True
    weights = np.where(mask, np.arange(40, 0, -1), 0.0)  # The last ones are dropped.
    rounds, free = 3000, 40 - mask.sum() + number_dropped(mask.sum(), 0.5)
    counts = sum(
        drop_and_grow(weights, mask, 0.5, growth, np.zeros(40), seed).mask[-free:].astype(int) for seed in range(rounds)
    )
    share = number_dropped(mask.sum(), 0.5) / free
    # Each count is binomial; all together have one degree of freedom less.
    deviation = np.sum((counts - rounds * share) ** 2) / (rounds * share * (1 - share)) * (free - 1) / free
    assert counts.sum() == rounds * share * free
    assert abs(deviation - (free - 1)) < 5 * np.sqrt(2 * (free - 1)), deviation


def test_equal_choices_follow_from_the_seed():
    mask = np.arange(400) < 100
    first, same, other = (drop_and_grow(mask * 1.0, mask, 0.3, "largest", np.zeros(400), s).mask for s in (1, 1, 2))
    assert (first == same).all() and (first != other).any()


# How much is dropped when.


def test_drop_fractions_are_those_of_the_formulas():
    cosine, constant = RigL(end_step=800, drop_fraction=0.4), SET(end_step=-1, drop_fraction=0.4, schedule="constant")
    for step in (0, 100, 400, 800):
        np.testing.assert_allclose(cosine.drop_fraction_at(step), 0.2 * (1 + np.cos(np.pi * step / 800)), atol=1e-12)
        assert constant.drop_fraction_at(step) == 0.4
    assert cosine.drop_fraction_at(900) == 0
    assert [step for step in range(1000) if RigL(end_step=300, frequency=100).is_due(step)] == [100, 200, 300]
    assert [step for step in range(45) if RigL(end_step=29, frequency=10).is_due(step)] == [10, 20]
    assert constant.is_due(10**9)


@pytest.mark.parametrize(
    ("optimizers", "make"),
    [
        pytest.param(keras.optimizers, keras.optimizers.SGD, id="keras"),
        pytest.param(tf_keras.optimizers, tf_keras.optimizers.SGD, id="tf_keras"),
        pytest.param(tf_keras.optimizers, tf_keras.optimizers.legacy.SGD, id="tf_keras legacy"),
    ],
)
def test_the_drop_fraction_follows_the_learning_rate(optimizers, make):
    updater = RigL(end_step=-1, drop_fraction=0.4, schedule="learning_rate")
    scheduled = make(optimizers.schedules.PiecewiseConstantDecay([4], [0.2, 0.05]))
    for iterations, expected in ((0, 0.4), (5, 0.1)):
        scheduled.iterations.assign(iterations)
        np.testing.assert_allclose(updater.drop_fraction_at(iterations + 1, scheduled), expected, rtol=1e-6)
    plain = make(0.1)
    given = RigL(end_step=-1, drop_fraction=0.4, schedule="learning_rate", initial_learning_rate=0.2)
    np.testing.assert_allclose(given.drop_fraction_at(1, plain), 0.2, rtol=1e-6)
    plain.learning_rate = 10.0
    assert given.drop_fraction_at(1, plain) == 1.0
    for optimizer in (plain, make(optimizers.schedules.PolynomialDecay(0.0, 9, 0.1)), None):
        with pytest.raises(ValueError, match="`initial_learning_rate` must be given"):
            updater.drop_fraction_at(1, optimizer)


@pytest.mark.parametrize("updater", UPDATERS)
def test_an_updater_comes_back_from_its_config(updater):
    config = json.loads(json.dumps(updater.get_config()))
    assert type(updater).from_config(config) == updater


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"end_step": 0}, "`end_step` must be positive. Received: end_step=0"),
        ({"end_step": -1}, "`end_step` must be positive. Received: end_step=-1"),
        ({"end_step": -2, "schedule": "constant"}, "`end_step` must be positive, or -1"),
        ({"end_step": 40, "frequency": 50}, "`end_step` must be at least `frequency`.*end_step=40, frequency=50"),
        ({"end_step": 1.5}, "`end_step` must be an int. Received: end_step=1.5"),
        ({"frequency": 0}, "`frequency` must be positive"),
        ({"drop_fraction": 0}, "`drop_fraction` must be a positive float"),
        ({"drop_fraction": 1.1}, r"`drop_fraction` must be in \(0, 1\]. Received: drop_fraction=1.1"),
        ({"schedule": "linear"}, "`schedule` must be one of 'constant', 'cosine', 'learning_rate'"),
        ({"initial_learning_rate": 0.1}, "`initial_learning_rate` is for `schedule='learning_rate'` only"),
        ({"grow_init": "ones"}, "`grow_init` must be one of 'zeros', 'scaled'"),
        ({"seed": -1}, "`seed` must be a non-negative int"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RigL(**{"end_step": 100, **arguments})


# Whole models, in both Kerases here and on other backends in a process of their own.


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{library.__name__}-{name}")
        for library in (keras, tf_keras)
        for name, check in checks.cases(library)
    ],
)
def test_a_model(check):
    check()


@pytest.fixture(scope="module", params=["jax", "torch"])
def results(request):
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    environment = {**os.environ, "KERAS_BACKEND": request.param, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, checks.__file__], capture_output=True, text=True, env=environment, timeout=300
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result.pop("backend") == request.param
    return result


def test_a_model_on_another_backend(results):
    assert len(results) == len(list(checks.cases(keras, few=True)))
    assert not any(results.values()), "\n".join(results.values())


def static(layer):
    from keras_sparse_init.tfmot import static_wrapper

    return static_wrapper(layer)


def test_static_tfmot_wrappers_get_the_masks_of_masked_layers():
    found = [sparse_network(tf_keras, tf_keras.optimizers.Adam(0.01), wrap) for wrap in (Masked, static)]
    for model in found:
        recorder = Recorder()
        fit(model, recorder, MaskUpdate(UPDATERS[1], X, Y, batch_size=40))
        assert not any(recorder.off_mask)
    start = mask_values(sparse_network(tf_keras))
    assert all((a != b).any() for a, b in zip(start, mask_values(found[0]), strict=True))
    assert_same(mask_values(found[0]), mask_values(found[1]))
    for masked, other in zip(kernels(found[0]), kernels(found[1]), strict=True):
        np.testing.assert_allclose(masked, other, rtol=1e-4, atol=1e-6)


@LIBRARIES
def test_compiled_steps_get_the_same_masks(library):
    """`jit_compile=True`; and several steps an execution, where updates follow the execution that they fall into."""
    updater = RigL(end_step=40, frequency=5, drop_fraction=0.4)
    plain, jitted, several = (
        sparse_network(library, **settings)
        for settings in ({}, {"jit_compile": True}, {"jit_compile": True, "steps_per_execution": 4})
    )
    recorder = Recorder()
    fit(plain, MaskUpdate(updater, X, Y, 80))
    fit(jitted, MaskUpdate(updater, X, Y, 80))
    fit(several, MaskUpdate(updater, X, Y, 80), recorder)
    assert_same(mask_values(plain), mask_values(jitted))
    changed = [
        done
        for (done, _, masks), (_, _, before) in zip(recorder.begun[1:], recorder.begun[:-1], strict=True)
        if any((a != b).any() for a, b in zip(masks, before, strict=True))
    ]
    # Due are 5, 10, 15 and 20, of which 5 and 15 are the first steps of executions of 4: an epoch has 10 steps.
    assert changed == [4, 10, 14]
    assert not any(recorder.off_mask)


@LIBRARIES
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_keeps_float32_weights_and_small_gradients(library, policy):
    layers = library.layers
    dtype = library.mixed_precision.Policy(policy) if library is tf_keras else policy
    dense = [layers.Dense(16, "tanh", dtype=dtype), layers.Dense(3, dtype=dtype)]
    model = library.Sequential([layers.Input((12,)), *(Masked(layer) for layer in dense)])
    set_masks(model, Random(0.75), seed=1)
    optimizer = library.optimizers.SGD(0.1)
    wrapped = optimizer
    if policy == "mixed_float16":
        wrapped = (library.mixed_precision if library is tf_keras else library.optimizers).LossScaleOptimizer(optimizer)
    model.compile(wrapped, "mse", **({"jit_compile": False} if library is keras else {}))
    exact = library.Sequential([layers.Input((12,)), layers.Dense(16, "tanh"), layers.Dense(3)])
    exact.set_weights([np.array(weight) for layer in dense for weight in layer.get_weights()])
    # So small that float16 would lose them.
    x, y = 1e-3 * X, 1e-4 * Y
    expected = dense_gradients_of_plain(exact, exact.layers, x, y)
    for ours, theirs in zip(dense_gradients(model, x, y), expected, strict=True):
        assert ours.dtype == np.float32
        assert np.abs(ours - theirs).max() < 0.03 * np.abs(theirs).max()
    recorder = Recorder()
    fit(model, recorder, MaskUpdate(UPDATERS[1], X, Y))
    before = mask_values(model)
    assert not any(recorder.off_mask) and [mask.sum() for mask in before] == [48, 12]


def dense_gradients_of_plain(model, layers, x, y):
    """Of the kernels of layers in a model without masks, by TensorFlow."""
    variables = [layer.kernel for layer in layers]
    variables = [variable.value if isinstance(variable, keras.Variable) else variable for variable in variables]
    with tf.GradientTape() as tape:
        value = tf.reduce_mean(tf.square(model(x, training=True) - y)) + sum(model.losses, 0.0)
    return [gradient.numpy() for gradient in tape.gradient(value, variables)]


@LIBRARIES
def test_gradients_of_a_nested_model_leave_its_state_alone(library):
    """Batch normalization with the statistics of the batch, regularization, metrics, a frozen layer."""
    layers = library.layers

    def build(wrap):
        inner = library.Sequential(
            [layers.Input((12,)), wrap(layers.Dense(8, kernel_regularizer="l2", name="a")), layers.BatchNormalization()]
        )
        frozen = wrap(layers.Dense(6, name="frozen"))
        frozen.trainable = False
        return library.Sequential([layers.Input((12,)), inner, frozen, wrap(layers.Dense(3, name="b"))])

    model = build(Masked)
    set_masks(model, Random(0.5), seed=1)
    model.compile("sgd", "mse", metrics=["mae"], **({"jit_compile": False} if library is keras else {}))
    model.fit(X, Y, verbose=0, epochs=1)
    plain = build(lambda layer: layer)
    inner, *outer = plain.layers
    for ours, theirs in zip(masked_kernels(model), [inner.layers[0], *outer], strict=True):
        theirs.set_weights(ours.layer.get_weights())
    inner.layers[1].set_weights(model.layers[0].layers[1].get_weights())
    state = model.get_weights()
    metrics = [to_numpy("metric", variable).copy() for variable in metric_variables(model)]
    found = dense_gradients(model, X, Y)
    for ours, theirs in zip(found, dense_gradients_of_plain(plain, [inner.layers[0], outer[1]], X, Y), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert_same(model.get_weights(), state)
    assert_same([to_numpy("metric", variable) for variable in metric_variables(model)], metrics)
    replaced = RigL(end_step=100).update(model, 1, found)
    # The few that the last kernel drops may all be grown again.
    assert [name.split("/")[-2] for name in replaced] == ["a", "b"] and sum(replaced.values()) > 0


def test_the_gradient_of_an_embedding_in_tfmots_wrapper_is_dense():
    layer = tf_keras.layers.Embedding(6, 4)
    model = tf_keras.Sequential([tf_keras.layers.Input((3,)), static(layer), tf_keras.layers.Flatten()])
    set_masks(model, Random(0.5), seed=0)
    x = np.array([[0, 1, 2], [3, 4, 5]])
    (gradient,) = dense_gradients(model, x, np.ones((2, 12)), lambda y, outputs: tf.reduce_sum(y * outputs))
    np.testing.assert_array_equal(gradient, np.ones((6, 4)))


def test_a_model_whose_call_has_been_traced_before_gets_dense_gradients():
    class Traced(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = Masked(tf_keras.layers.Dense(3, use_bias=False))

        @tf.function
        def call(self, inputs):
            return self.dense(inputs)

    model = Traced()
    model(X)
    set_masks(model, Random(0.75), seed=0)
    (gradient,) = dense_gradients(model, X, Y, lambda y, outputs: tf.reduce_sum(y * outputs))
    np.testing.assert_allclose(gradient, X.T @ Y, rtol=1e-4, atol=1e-4)


# New connections.


def big_layer():
    dense = keras.layers.Dense(100, kernel_initializer="he_normal")
    model = keras.Sequential([keras.layers.Input((400,)), Masked(dense)])
    mask = np.random.default_rng(0).random((400, 100)) < np.linspace(0.05, 0.6, 100)
    set_masks(model, [mask])
    return model, np.random.default_rng(1).normal(size=(400, 100))


def test_scaled_new_weights_have_the_variance_of_their_units_new_fan_in():
    model, gradient = big_layer()
    (old,), (weights,) = mask_values(model), kernels(model)
    updater = RigL(end_step=100, drop_fraction=0.5, grow_init="scaled")
    updater.update(model, 1, [gradient])
    (new,), (now,) = mask_values(model), kernels(model)
    grown = new & ~old
    np.testing.assert_array_equal(now[~grown], np.where(new, weights, 0)[~grown])
    std = np.broadcast_to(weight_std(new.shape, new, masked_kernels(model)[0].layout, 2.0, "fan_in", "unit"), new.shape)
    scaled = now[grown] / std[grown]
    assert grown.sum() > 4000
    # A truncated normal's square has variance 1.19; 5 standard deviations.
    assert abs(np.mean(scaled**2) - 1) < 5 * np.sqrt(1.19 / grown.sum())
    # By the old fan-in it would be another.
    fan_in = np.broadcast_to(old.sum(axis=0), new.shape)[grown]
    assert abs(np.mean(now[grown] ** 2 * fan_in / 2) - 1) > 0.1


def test_new_weights_are_those_of_a_function():
    model, gradient = big_layer()
    (old,) = mask_values(model)
    seen = []

    def grow_init(kernel, mask, grown, seed):
        seen.append((kernel.name, mask.copy(), grown.copy(), seed))
        return np.arange(mask.size).reshape(mask.shape)

    RigL(end_step=100, grow_init=grow_init).update(model, 1, [gradient])
    (new,), (now,) = mask_values(model), kernels(model)
    ((name, mask, grown, seed),) = seen
    assert name == masked_kernels(model)[0].name and isinstance(seed, int)
    np.testing.assert_array_equal(mask, new)
    np.testing.assert_array_equal(grown, new & ~old)
    np.testing.assert_array_equal(now[grown], np.arange(new.size).reshape(new.shape)[grown])
    with pytest.raises(ValueError, match=r"`grow_init` must return an array of the kernel's shape \(400, 100\)"):
        RigL(end_step=100, grow_init=lambda *_: np.zeros(3)).update(model, 2, [gradient])
    assert_same(mask_values(model), [new])


# In `fit` and in loops.


def test_rigl_finds_the_inputs_that_matter():
    """Of 60 inputs 4 decide on the target; RigL's 8 connections end there, those that never move do not."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 60)).astype("float32")
    y = x[:, [3, 17, 31, 50]] @ np.array([[1.0], [-2.0], [1.5], [2.5]], "float32")

    def train(updater):
        model = tf_keras.Sequential([tf_keras.layers.Input((60,)), Masked(tf_keras.layers.Dense(1))])
        set_masks(model, [np.arange(60)[:, None] % 8 == 6], seed=0)
        model.compile(tf_keras.optimizers.SGD(0.05), "mse")
        update = [MaskUpdate(updater, x, y)] if updater else []
        losses = model.fit(x, y, batch_size=32, epochs=20, verbose=0, callbacks=update).history["loss"]
        return set(np.flatnonzero(mask_values(model)[0])), losses[-1]

    start, static_loss = train(None)
    found, loss = train(RigL(end_step=100, frequency=10))
    assert not start & {3, 17, 31} and static_loss > 1
    assert {3, 17, 31, 50} <= found and len(found) == len(start) and loss < 1e-3
    assert train(RigLInverted(end_step=100, frequency=10))[1] > 1


def test_batches_are_random_samples_that_follow_from_the_step():
    seen = []

    class Spy(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            tf.py_function(lambda v: seen.append(v.numpy()), [y], [])
            return super().compute_loss(x, y, y_pred, sample_weight)

    def batches(epochs, **resume):
        seen.clear()
        plain = sparse_network(keras)
        model = Spy(plain.layers)
        model.compile("sgd", "mse", jit_compile=False)
        for _ in range(epochs):
            # Distinct numbers tell samples apart; the batches of `fit` have 8.
            fit_y = np.arange(240.0, dtype="float32").reshape(80, 3)
            model.fit(X, fit_y, batch_size=8, verbose=0, callbacks=[MaskUpdate(UPDATERS[1], X, fit_y, batch_size=5)])
        return [y[:, 0].astype(int) // 3 for y in seen if len(y) == 5]

    once = batches(1)
    assert len(once) == 3 and all(len(set(batch)) == 5 for batch in once)
    assert len({tuple(batch) for batch in once}) == 3
    assert_same(once, batches(1))
    # A second fit goes on with the steps of the optimizer.
    assert_same(batches(2)[:3], once)
    assert len(batches(2)) == 6


@LIBRARIES
def test_a_dataset_gives_its_batches_in_turn(library):
    """With sample weights: here they leave the first half of each batch out."""
    weights = np.tile(np.repeat([0.0, 1.0], 20), 2).astype("float32")
    dataset = tf.data.Dataset.from_tensor_slices((X, Y, weights)).batch(40)
    model, by_hand = sparse_network(library), sparse_network(library)
    updater = RigL(end_step=20, frequency=4, drop_fraction=0.4)
    recorder = Recorder()
    fit(model, recorder, MaskUpdate(updater, dataset), epochs=1)
    gradients = DenseGradients(by_hand)
    for step in range(1, 11):
        if updater.is_due(step):
            part = slice(0, 40) if step == 4 else slice(40, 80)
            updater.update(by_hand, step, gradients(X[part], Y[part], weights[part]))
        by_hand.train_on_batch(X[8 * step - 8 : 8 * step], Y[8 * step - 8 : 8 * step])
    assert_same(mask_values(model), mask_values(by_hand))
    for ours, theirs in zip(kernels(model), kernels(by_hand), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_run_is_continued_with_its_optimizer():
    updater = SET(end_step=40, frequency=4)
    whole, parts = sparse_network(keras, "adam"), sparse_network(keras, "adam")
    fit(whole, MaskUpdate(updater), epochs=3)
    for _ in range(3):
        fit(parts, MaskUpdate(updater), epochs=1)
    assert_same(mask_values(whole), mask_values(parts))
    assert_same(kernels(whole), kernels(parts))


def test_what_does_not_fit_is_refused_and_changes_nothing():
    model = sparse_network(keras)
    masks, rigl = mask_values(model), RigL(end_step=100)
    names = [kernel.name for kernel in masked_kernels(model)]
    good = [np.ones((12, 16)), np.ones((16, 3))]
    for gradients, message in (
        (None, "`gradients` must be given"),
        (good[:1], "`gradients` must be those of .*Received: 1 arrays"),
        (good[::-1], "`gradients` must have the shapes of the kernels"),
        ({names[0]: good[0]}, "`gradients` must be those of"),
    ):
        with pytest.raises(ValueError, match=message):
            rigl.update(model, 1, gradients)
    assert_same(mask_values(model), masks)
    # Zeros have no variance that could be scaled.
    masked_kernels(model)[1].layer.kernel_initializer = keras.initializers.Zeros()
    with pytest.raises(ValueError, match="has no variance that could be scaled"):
        RigL(end_step=100, grow_init="scaled").update(model, 1, good)
    # Told before the training begins, not at the first update.
    callback = MaskUpdate(SET(end_step=100, grow_init="scaled", frequency=50))
    callback.set_model(model)
    with pytest.raises(ValueError, match="has no variance that could be scaled"):
        callback.on_train_begin()
    assert_same(mask_values(model), masks)
    rigl.update(model, 1, dict(zip(names, good, strict=True)))
    plain = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="`model` must have masked kernels"):
        SET(end_step=100).update(plain, 1)
    with pytest.raises(ValueError, match="`loss` must be given, or the model compiled"):
        DenseGradients(plain)
    model.trainable = False
    with pytest.raises(ValueError, match="`model` must have masked kernels that are trainable"):
        SET(end_step=100).update(model, 1)


def test_a_callback_without_what_it_needs_is_refused():
    with pytest.raises(ValueError, match="`x` must be given: RigL needs gradients on a batch of data"):
        MaskUpdate(RigL(end_step=100))
    with pytest.raises(TypeError, match="`updater` must be a SET, RigL or RigLInverted"):
        MaskUpdate("rigl")
    with pytest.raises(ValueError, match="`y` must be None when `x` is a dataset"):
        MaskUpdate(RigL(end_step=100), tf.data.Dataset.from_tensors((X, Y)), Y)
    with pytest.raises(ValueError, match="`batch_size` must be a positive int"):
        MaskUpdate(RigL(end_step=100), X, Y, batch_size=0)
    model = sparse_network(keras)
    with pytest.raises(ValueError, match="`y` must have as many samples as `x`"):
        fit(model, MaskUpdate(RigL(end_step=100), X, Y[:-1]))
    with pytest.raises(ValueError, match="`x` must have batches. Received: an empty dataset"):
        empty = tf.data.Dataset.from_tensors((X, Y)).take(0)
        fit(model, MaskUpdate(RigL(end_step=10, frequency=1), empty))


def test_what_tfmot_prunes_is_left_to_tfmot():
    from tensorflow_model_optimization.sparsity import keras as sparsity

    dense = tf_keras.Sequential([tf_keras.layers.Input((12,)), tf_keras.layers.Dense(3)])
    model = sparsity.prune_low_magnitude(dense, sparsity.ConstantSparsity(0.5, 0))
    with pytest.raises(ValueError, match="is pruned by tfmot with a schedule of its own"):
        SET(end_step=100).update(model, 1)
