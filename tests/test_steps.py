"""Blocks of training steps in one function: the same training as Keras's own, however long the blocks are."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from small_jobs import small_network, small_settings

from keras_sparse_init import SparseHeNormal, masked_kernels, sparsify
from keras_sparse_init.training import Dense, Dynamic, Job, Prune, Scratch, make_data, train
from keras_sparse_init.training.fit import Fit
from keras_sparse_init.training.steps import as_dataset, suits_xla, train_in_blocks

LIBRARIES = {"keras": keras, "tf_keras": tf_keras}
BOTH = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])


def convolutional(input_shape, classes, keras="tf_keras"):
    library = LIBRARIES[keras]
    library.utils.set_random_seed(5)
    L = library.layers
    layers = [L.Conv2D(4, 3, activation="tanh"), L.BatchNormalization(), L.Flatten(), L.Dense(classes)]
    return library.Sequential([L.Input(input_shape), *layers])


@pytest.mark.parametrize("network", [small_network, convolutional], ids=["with XLA", "without"])
@pytest.mark.parametrize("keras", ["tf_keras", "keras"])
@pytest.mark.parametrize("experiment", [Dense(), Scratch(0.7)], ids=["dense", "scratch"])
def test_the_steps_are_those_of_keras(data, tmp_path, network, keras, experiment):
    settings = small_settings(steps=30, keras=keras, weight_decay=1e-3, clip_norm=1.0)
    found = train(network, data, experiment, output_dir=tmp_path, **settings)
    job = Job(network, data, experiment, **settings)
    assert suits_xla(job.model) == (network is small_network)
    fit = Fit(job.model, data, job.settings)
    for x, y in fit.batches():
        job.model.train_on_batch(x, y)
    # Sums in another order in float32, over 30 steps.
    assert fit.evaluate() == pytest.approx((found.summary["test_loss"], found.summary["test_accuracy"]), rel=1e-4)


@pytest.mark.parametrize(
    ("network", "keras", "experiment"),
    [
        (small_network, "tf_keras", Scratch(0.7)),
        (small_network, "tf_keras", Dynamic(0.7, frequency=7)),
        (small_network, "keras", Prune(0.8, begin_step=4, end_step=22, frequency=3)),
        (convolutional, "tf_keras", Prune(0.8, begin_step=4, end_step=22, frequency=3)),
        (convolutional, "keras", Dynamic(0.7, frequency=7)),
    ],
    ids=["scratch", "rigl", "prune", "convolutional, tfmot prunes", "convolutional, rigl"],
)
def test_results_do_not_depend_on_the_length_of_the_blocks(data, tmp_path, network, keras, experiment):
    weights = []
    for log_every in (1, 30):
        settings = small_settings(steps=30, keras=keras, log_every=log_every)
        result = train(network, data, experiment, output_dir=tmp_path / str(log_every), **settings)
        weights.append(result.model.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)


@BOTH
def test_rows_are_of_their_own_steps_and_blocks_end_before_masks_change(library, data):
    experiment = Dynamic(0.7, frequency=7)
    settings = small_settings(steps=60, log_every=20, keras=library.__name__)
    job = Job(small_network, data, experiment, **settings)
    callbacks = experiment.callbacks(job.model, seed=0, steps=60, data=data, learning_rate=0.1)
    ends = Fit(job.model, data, job.settings, callbacks)._ends(0)
    due = [step for step in range(1, 61) if callbacks[0].due(step) is not None]
    assert due and {20, 40, 60, 25, 50, *(step - 1 for step in due)} == set(ends)
    assert Fit(job.model, data, job.settings, callbacks)._ends(30) == [end for end in ends if end > 30]


@pytest.mark.parametrize("network", [small_network, convolutional], ids=["with XLA", "without"])
@pytest.mark.parametrize("keras", ["tf_keras", "keras"])
def test_the_very_step_at_which_the_loss_is_lost_is_named(data, tmp_path, network, keras):
    # That of the first batch with an image whose pixels are not numbers, and which is not measured at step 0.
    x = data.x_train.repeat(6, axis=0)
    y = data.y_train.repeat(6)
    settings = small_settings(steps=60, keras=keras, batch=8)
    good = make_data("columns", x, y, data.x_test, data.y_test)
    job = Job(network, good, Scratch(0.7), **settings)
    fit = Fit(job.model, good, job.settings)
    order, probe = fit._order(), np.sort(np.random.default_rng(0).permutation(len(x))[:256])
    image = next(i for i in order[13] if i not in probe and i not in order[:13])
    x[image] = np.nan
    bad = object.__new__(type(good))
    bad.__dict__.update(good.__dict__, x_train=x)
    with pytest.raises(FloatingPointError, match="The loss is nan at step 14:"):
        train(network, bad, Scratch(0.7), output_dir=tmp_path, **settings)


@BOTH
def test_xla_is_for_dense_layers_of_keras_alone(library):
    L = library.layers

    class Own(L.Dense):
        pass

    class OwnStep(library.Sequential):
        def train_step(self, data):
            return super().train_step(data)

    def model(*layers, cls=library.Sequential):
        return cls([L.Input((4,)), *layers])

    assert suits_xla(model(L.Dense(3, "relu"), L.BatchNormalization(), L.Dense(2)))
    assert suits_xla(model(model(L.Dense(3)), L.ReLU()))
    assert not suits_xla(model(L.Reshape((4, 1)), L.Conv1D(3, 2), L.Flatten()))
    assert not suits_xla(model(L.Dense(3), L.Dropout(0.5)))
    assert not suits_xla(model(Own(3)))
    assert not suits_xla(model(L.Dense(3), cls=OwnStep))


def test_weights_that_were_put_off_the_mask_take_no_part_in_a_block():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)).astype("float32"), rng.integers(0, 3, 40)
    order = rng.integers(0, 40, (10, 8))

    def model_with_weights_off_its_masks():
        L = tf_keras.layers
        dense = tf_keras.Sequential([L.Input((6,)), L.Dense(9, "relu"), L.Dense(3)])
        model = sparsify(dense, 0.5, seed=0, initializer=SparseHeNormal())
        loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(tf_keras.optimizers.SGD(0.05, momentum=0.9), loss)
        for kernel in masked_kernels(model):
            kernel.kernel.assign_add(tf.ones_like(kernel.kernel))
        return model

    by_keras, in_blocks = model_with_weights_off_its_masks(), model_with_weights_off_its_masks()
    assert suits_xla(in_blocks)
    for rows in order:
        by_keras.train_on_batch(x[rows], y[rows])
    with train_in_blocks(in_blocks, x, y, order, longest=5):
        in_blocks.fit(as_dataset([5, 10], 0), verbose=0)
    for ours, other in zip(masked_kernels(in_blocks), masked_kernels(by_keras), strict=True):
        assert not ours.kernel.numpy()[~ours.mask_value()].any()
        # Sums in another order in float32.
        np.testing.assert_allclose(ours.kernel, other.kernel, rtol=0, atol=1e-5)
    # And outside of the blocks, kernels are masked at each call again.
    kernel = masked_kernels(in_blocks)[0]
    before = in_blocks(x).numpy()
    kernel.kernel.assign_add(1.0 - kernel.mask)
    np.testing.assert_array_equal(in_blocks(x), before)
