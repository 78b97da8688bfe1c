"""Pruning at initialization: scores by formulas and differences, exact numbers, layers that would die."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from mask_update_checks import biases, gradients_by_hand
from pruning_checks import X, Y, assert_same, kernels, mask_values, network

from keras_sparse_init import Masked, masked_kernels, prune_at_init
from keras_sparse_init.compat import to_numpy
from keras_sparse_init.mask_updates.magnitude import kept

LIBRARIES = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
SIZE = 12 * 16 + 16 * 3


def together(arrays):
    return np.concatenate([np.ravel(array) for array in arrays])


def scores_by_hand(method, weights, bias, masks):
    """In float64: SNIP by the formula, GraSP by differences of the gradient flow when each weight shrinks a little."""
    weights = [weight.astype(float) for weight in weights]
    gradients = gradients_by_hand(weights, bias, X, Y)
    if method == "snip":
        return np.abs(together(weights) * together(gradients))

    def flow(changed):
        found = together(gradients_by_hand(changed, bias, X, Y))
        return np.sum(found[together(masks)] ** 2)

    scores = []
    for i, weight in enumerate(weights):
        for j in range(weight.size):
            flows = []
            for factor in (1 - 1e-5, 1 + 1e-5):
                changed = [w.copy() for w in weights]
                changed[i].ravel()[j] *= factor
                flows.append(flow(changed))
            # By how much the flow falls when the weight goes.
            scores.append((flows[1] - flows[0]) / 2e-5)
    return np.array(scores)


def static(layer):
    from keras_sparse_init.tfmot import static_wrapper

    return static_wrapper(layer)


@pytest.mark.parametrize("method", ["snip", "grasp"])
@pytest.mark.parametrize(
    ("library", "wrap"), [(keras, Masked), (tf_keras, Masked), (tf_keras, static)], ids=["keras", "tf_keras", "tfmot"]
)
def test_the_highest_scores_stay(library, wrap, method):
    """Of all kernels together; in two rounds the second scores are those of what is left."""
    for rounds in (1, 2):
        model = network(library, wrap=wrap)
        weights, bias, masks = kernels(model), biases(model), [np.ones(k.shape, bool) for k in kernels(model)]
        for part in range(1, rounds + 1):
            scores = scores_by_hand(method, weights, bias, masks)
            scores[~together(masks)] = -np.inf
            count = kept(SIZE, 1 - 0.25 ** (part / rounds))
            new = np.zeros(SIZE, bool)
            new[np.argsort(scores)[-count:]] = True
            masks = [part.reshape(m.shape) for part, m in zip(np.split(new, [12 * 16]), masks, strict=True)]
            weights = [np.where(m, w, 0) for m, w in zip(masks, weights, strict=True)]
        prune_at_init(model, 0.75, method, X, Y, rounds=rounds)
        assert_same(mask_values(model), masks)
        assert_same(kernels(model), weights)


def test_grasp_keeps_what_the_gradient_flow_falls_without():
    """By really removing weights, small ones, from a net that is linear enough."""
    model = network(keras)
    for kernel in masked_kernels(model):
        kernel.kernel.assign(0.1 * to_numpy("kernel", kernel.kernel))
    weights, bias = [kernel.astype(float) for kernel in kernels(model)], biases(model)

    def flow(changed):
        return np.sum(together(gradients_by_hand(changed, bias, X, Y)) ** 2)

    falls = []
    for i, weight in enumerate(weights):
        for j in range(weight.size):
            without = [w.copy() for w in weights]
            without[i].ravel()[j] = 0
            falls.append(flow(weights) - flow(without))
    prune_at_init(model, 0.5, "grasp", X, Y)
    stays = together(mask_values(model))
    best = np.zeros(SIZE, bool)
    best[np.argsort(falls)[SIZE // 2 :]] = True
    # What is left is of second order; the wrong sign would give less than 0.1.
    assert np.mean(stays == best) > 0.9


@pytest.mark.parametrize("method", ["magnitude", "random", "snip", "grasp"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_number_of_connections_is_exact(method, scope):
    model = network(keras)
    prune_at_init(model, 0.9, method, X, Y, scope=scope)
    first = mask_values(model)
    if scope == "layer":
        assert [mask.sum() for mask in first] == [19, 5]
    else:
        assert sum(mask.sum() for mask in first) == 24
    weights = kernels(network(keras))
    assert_same(kernels(model), [np.where(mask, weight, 0) for mask, weight in zip(first, weights, strict=True)])
    if method == "magnitude" and scope == "global":
        magnitudes = np.abs(together(weights))
        np.testing.assert_array_equal(together(first), magnitudes >= np.sort(magnitudes)[-24])
    # Masks lose connections only: at a lower sparsity they stay as they are.
    prune_at_init(model, 0.5, method, X, Y, scope=scope)
    assert_same(mask_values(model), first)
    again, other = network(keras), network(keras)
    prune_at_init(again, 0.9, method, X, Y, scope=scope, batch_size=7)
    prune_at_init(other, 0.9, method, X, Y, scope=scope, seed=1)
    assert_same(mask_values(again), first)
    assert (together(mask_values(other)) == together(first)).all() == (method != "random")


@LIBRARIES
def test_a_dataset_counts_its_samples_and_their_weights(library):
    """Batches of 50 and 30; without the samples of weight 0 the loss is that of the others, halved."""
    weights = np.repeat([1.0, 0.0], 40).astype("float32")
    order = np.random.default_rng(0).permutation(80)
    dataset = tf.data.Dataset.from_tensor_slices((X[order], Y[order], weights[order])).batch(50)
    given, by_arrays = network(library), network(library)
    prune_at_init(given, 0.75, "snip", dataset, loss=None)
    prune_at_init(by_arrays, 0.75, "snip", X[:40], Y[:40], library.losses.MeanSquaredError())
    assert_same(mask_values(given), mask_values(by_arrays))


def test_convolutions_and_pooling_have_second_derivatives():
    layers = tf_keras.layers
    model = tf_keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            Masked(layers.Conv2D(4, 3, activation="relu")),
            layers.MaxPooling2D(),
            layers.BatchNormalization(),
            layers.Flatten(),
            Masked(layers.Dense(3)),
        ]
    )
    x, y = np.random.default_rng(0).normal(size=(20, 8, 8, 1)), np.arange(20) % 3
    state = model.layers[2].get_weights()
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    prune_at_init(model, 0.5, "grasp", x, y, loss)
    assert sum(mask.sum() for mask in mask_values(model)) == (36 + 108) // 2
    assert_same(model.layers[2].get_weights(), state)


def test_a_layer_that_is_left_with_nothing_is_named_or_kept():
    def tiny():
        model = network(keras)
        masked_kernels(model)[1].kernel.assign(np.linspace(1e-6, 2e-6, 48).reshape(16, 3))
        return model

    model = tiny()
    with pytest.warns(UserWarning, match="Pruning leaves nothing of these kernels: output/kernel. Prune less"):
        prune_at_init(model, 0.9, "magnitude")
    assert [mask.sum() for mask in mask_values(model)] == [24, 0]
    model = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_at_init(model, 0.9, "magnitude", keep_layers=True)
    first, last = mask_values(model)
    assert first.sum() == 23 and np.flatnonzero(last).tolist() == [47]


def test_what_is_not_allowed_is_refused_and_changes_nothing():
    model = network(keras)
    before = mask_values(model)
    for arguments, message in (
        ({"sparsity": 1.0}, "`sparsity` must be a float in"),
        ({"method": "synflow"}, "`method` must be one of 'magnitude', 'random', 'snip', 'grasp'"),
        ({"scope": "model"}, "`scope` must be one of"),
        ({"rounds": 0}, "`rounds` must be a positive int. Received: rounds=0"),
        ({"batch_size": 1.5}, "`batch_size` must be a positive int"),
        ({"keep_layers": 1}, "`keep_layers` must be a bool"),
        ({"seed": -1}, "`seed` must be a non-negative int"),
        ({"x": None, "y": None}, "`x` must be given: method='snip' needs gradients on data"),
        ({"y": Y[:-1]}, "`y` must have as many samples as `x`"),
        ({"x": np.where(X == X[3, 3], np.nan, X)}, "The scores of 'hidden/kernel' are not finite"),
        ({"x": tf.data.Dataset.from_tensors((X, Y))}, "`y` must be None when `x` is a dataset"),
        ({"x": tf.data.Dataset.from_tensors((X, Y)).repeat(), "y": None}, "`x` must be a dataset that ends"),
        ({"x": tf.data.Dataset.from_tensors((X, Y)).take(0), "y": None}, "`x` must have samples"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_at_init(model, **{"sparsity": 0.5, "x": X, "y": Y, **arguments})
    plain = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="`model` must have masked kernels"):
        prune_at_init(plain, 0.5, "random")
    assert_same(mask_values(model), before)


def test_a_failure_in_a_later_round_puts_everything_back():
    model = network(keras)
    weights = kernels(model)

    def loss(y, outputs):
        """NaN as soon as a weight of the first layer is pruned."""
        pruned = tf.reduce_any(masked_kernels(model)[0].kernel.value == 0)
        return tf.reduce_mean(tf.square(outputs - y)) * tf.where(pruned, np.nan, 1.0)

    with pytest.raises(ValueError, match="are not finite"):
        prune_at_init(model, 0.75, "snip", X, Y, loss, rounds=3)
    assert all(mask.all() for mask in mask_values(model))
    assert_same(kernels(model), weights)
    prune_at_init(model, 0.75, "snip", X, Y, loss)
