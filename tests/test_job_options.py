"""Options of the training job: gradient-norm regularization, and noise on the first weights."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from small_jobs import small_network, small_settings

from keras_sparse_init import compat, masked_kernels
from keras_sparse_init.training import Dense, Job, Prune, Scratch, train
from keras_sparse_init.training.fit import Fit

BOTH = pytest.mark.parametrize("keras_name", ["keras", "tf_keras"])


LIBRARIES = {"keras": keras, "tf_keras": tf_keras}


def smooth_network(input_shape, classes, keras="tf_keras"):
    """Second derivatives of ReLUs are 0 almost everywhere, not those of tanh."""
    library = LIBRARIES[keras]
    library.utils.set_random_seed(0)
    L = library.layers
    return library.Sequential([L.Input(input_shape), L.Flatten(), L.Dense(5, "tanh"), L.Dense(classes)])


def step_by_hand(job, penalty, rate):
    """The weights after one step of plain gradient descent: the gradient of the penalty by differences of gradients."""
    fit = Fit(job.model, job.data, job.settings)
    x, y = next(iter(fit.batches()))
    variables = [getattr(v, "_variable", v) for v in job.model.trainable_variables]
    variables = [v if isinstance(v, tf.Variable) else v.value for v in variables]
    masks = {id(k.kernel): k.mask_value() for k in masked_kernels(job.model)}
    masks = [masks.get(id(v), np.ones(v.shape)) for v in job.model.trainable_variables]
    start = [v.numpy().astype(np.float64) for v in variables]

    def gradient(weights):
        for variable, value in zip(variables, weights, strict=True):
            variable.assign(value.astype(np.float32))
        with tf.GradientTape() as tape:
            log_p = tf.nn.log_softmax(tf.cast(job.model(x, training=True), tf.float64))
            loss = -tf.reduce_mean(tf.gather(log_p, tf.cast(y, tf.int64), axis=1, batch_dims=1))
        found = tape.gradient(loss, variables)
        return [g.numpy().astype(np.float64) * m for g, m in zip(found, masks, strict=True)]

    g = gradient(start)
    length, step = np.sqrt(sum((part**2).sum() for part in g)), 1e-2
    up, down = (
        gradient([w + sign * step * part / length for w, part in zip(start, g, strict=True)]) for sign in (1, -1)
    )
    hessian_g = [length * (a - b) / (2 * step) for a, b in zip(up, down, strict=True)]
    return [w - rate * (a + penalty * h) for w, a, h in zip(start, g, hessian_g, strict=True)]


@BOTH
@pytest.mark.parametrize("experiment", [Dense(), Scratch(0.6)], ids=["dense", "sparse"])
def test_a_step_follows_the_loss_and_half_its_squared_gradient(data, tmp_path, keras_name, experiment):
    settings = small_settings(steps=1, log_every=1, optimizer="sgd", gradient_penalty=2.0, keras=keras_name)
    plain = small_settings(steps=1, log_every=1, optimizer="sgd", keras=keras_name)
    expected, without = (
        step_by_hand(Job(smooth_network, data, experiment, **plain), penalty, 0.1) for penalty in (2.0, 0.0)
    )
    result = train(smooth_network, data, experiment, output_dir=tmp_path, **settings)
    moved = max(np.abs(a - b).max() for a, b in zip(expected, without, strict=True))
    assert moved > 1e-3
    for weight, value in zip(result.model.get_weights(), expected, strict=True):
        # Differences of gradients in float32 over a step of 0.01.
        np.testing.assert_allclose(weight, value, rtol=0, atol=moved / 100)
    assert result.summary["gradient_penalty"] == 2.0


@BOTH
def test_a_penalty_goes_with_pruning_in_either_keras(data, tmp_path, keras_name):
    experiment = Prune(0.6, begin_step=2, end_step=20, frequency=6)
    plain, penalized = (
        train(
            smooth_network,
            data,
            experiment,
            output_dir=tmp_path / str(penalty),
            **small_settings(gradient_penalty=penalty, keras=keras_name),
        )
        for penalty in (0.0, 0.5)
    )
    assert penalized.summary["sparsity"] == plain.summary["sparsity"] == pytest.approx(0.6, abs=0.02)
    assert np.count_nonzero(penalized.model.get_weights()[0]) == np.count_nonzero(plain.model.get_weights()[0])
    assert not np.allclose(penalized.model.get_weights()[0], plain.model.get_weights()[0], atol=1e-2)


@BOTH
def test_noise_is_on_all_trainable_weights_that_are_not_masked(data, keras_name):
    settings = small_settings(keras=keras_name)
    plain, noisy, again, other = (
        Job(small_network, data, Scratch(0.5), **settings | changes).model
        for changes in ({}, {"init_noise": 0.3}, {"init_noise": 0.3}, {"init_noise": 0.3, "seed": 4})
    )
    noise = []
    for first, second, third in zip(*(m.trainable_variables for m in (plain, noisy, again)), strict=True):
        first, second, third = (compat.to_numpy("weight", v) for v in (first, second, third))
        np.testing.assert_array_equal(second, third)
        noise.append((second - first).ravel())
    masks = [kernel.mask_value().ravel() for kernel in masked_kernels(noisy)]
    off = np.concatenate([part[~mask] for part, mask in zip(noise[::2], masks, strict=True)])
    on = np.concatenate([*(part[mask] for part, mask in zip(noise[::2], masks, strict=True)), *noise[1::2]])
    assert not off.any() and len(on) > 400
    # Five standard errors of a standard deviation of normal numbers: 0.3 / sqrt(2 n).
    assert abs(on.std() - 0.3) < 5 * 0.3 / np.sqrt(2 * len(on))
    assert not np.array_equal(other.trainable_variables[1], noisy.trainable_variables[1])


def test_they_are_part_of_the_job(data, tmp_path):
    train(small_network, data, Scratch(0.5), output_dir=tmp_path, **small_settings(steps=2, init_noise=0.1))
    assert json.loads((tmp_path / "job.json").read_text())["init_noise"] == 0.1


def test_bad_input_is_named(data):
    for name in ("gradient_penalty", "init_noise"):
        with pytest.raises(ValueError, match=f"`{name}` must be a number of at least 0. Received: {name}=-1"):
            Job(small_network, data, Dense(), **{name: -1})

    class OwnStep(tf_keras.Sequential):
        def train_step(self, data):
            return super().train_step(data)

    model = OwnStep([tf_keras.layers.Input((6, 6, 1)), tf_keras.layers.Flatten(), tf_keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="`gradient_penalty` must be 0 but on one device.*OwnStep"):
        Job(model, data, Dense(), gradient_penalty=0.1)
