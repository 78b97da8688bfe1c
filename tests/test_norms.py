"""LSUV and MetaInit: norms of kernels from data, under masks."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from small_jobs import small_network, small_settings

from keras_sparse_init import Masked, WeightNorm, calibrate_init, compat, masked_kernels, sparsify
from keras_sparse_init.training import Job, Scratch, train

BOTH = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
_IMAGES = np.random.default_rng(0).normal(0.3, 1.0, size=(300, 8, 8, 4)).astype(np.float32)
_X = np.random.default_rng(1).normal(size=(200, 6)).astype(np.float32)
_Y = np.random.default_rng(2).integers(0, 3, 200)


def convolutional(library):
    L = library.layers
    inputs = L.Input((8, 8, 4))
    h = L.Conv2D(6, 3, activation="relu", kernel_initializer="he_normal")(inputs)
    h = L.BatchNormalization()(L.DepthwiseConv2D(3, use_bias=False)(h))
    h = L.Conv2DTranspose(5, 3, padding="same", activation="tanh")(h)
    h = L.SeparableConv2D(7, 2)(L.MaxPooling2D(2)(h))
    return library.Model(inputs, L.Dense(3)(L.Dense(9, "relu")(L.Flatten()(h))))


def scaled(model, factor):
    for kernel in masked_kernels(model):
        compat.assign(kernel.kernel, compat.to_numpy("kernel", kernel.kernel) * np.float32(factor))
    return model


def arrays(model):
    return [compat.to_numpy("kernel", kernel.kernel).copy() for kernel in masked_kernels(model)]


@BOTH
@pytest.mark.parametrize("factor", [0.1, 0.7, 10.0])
def test_lsuv_brings_the_std_of_every_layer_to_one_under_its_mask(library, factor):
    model = scaled(sparsify(convolutional(library), 0.6, wrapper="masked", seed=0), factor)
    before = arrays(model)
    report = calibrate_init(model, _IMAGES, "lsuv", n_samples=300)
    assert all(abs(row.std - 1) <= 0.1 for row in report.kernels) and len(report.kernels) == 6
    # Of the two kernels of a separable convolution the last.
    assert list(report.skipped) == [name for name in report.skipped if "depthwise" in name] and len(report.skipped) == 1
    # The first and the last, which has no activation, by themselves.
    first = tf.nn.conv2d(_IMAGES, arrays(model)[0], 1, "VALID")
    assert abs(np.std(first) - 1) <= 0.1 and abs(np.std(model(_IMAGES)) - 1) <= 0.1
    for value, old in zip(arrays(model), before, strict=True):
        np.testing.assert_allclose(value * np.linalg.norm(old), old * np.linalg.norm(value), rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(value == 0, old == 0)
    assert "pre std before" in str(report) and report.to_dict()["method"] == "lsuv"


@BOTH
def test_lsuv_says_what_it_leaves(library):
    L = library.layers
    frozen = L.Dense(4, name="frozen")
    nested = library.Sequential([L.Input((4,)), L.Dense(4, name="inside")])
    dead = Masked(L.Dense(4, name="dead"), mask=np.zeros((4, 4)))
    model = library.Sequential([L.Input((6,)), frozen, nested, WeightNorm(L.Dense(4, name="normed")), dead, L.Dense(2)])
    frozen.trainable = nested.trainable = False
    before = model.get_weights()
    report = calibrate_init(model, _X, "lsuv")
    reasons = {name.split("/")[-2]: why for name, why in report.skipped.items()}
    assert reasons["frozen"] == reasons["inside"] == "frozen"
    assert "WeightNorm" in reasons["normed"] and "constant" in reasons["dead"]
    for weight, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, old)


@BOTH
@pytest.mark.parametrize("spread, scaled", [(0.98, True), (1.5, False)])
def test_lsuv_leaves_a_kernel_whose_biases_alone_spread_too_much(library, spread, scaled):
    L = library.layers
    model = library.Sequential([L.Input((6,)), L.Dense(40, name="d")])
    random = np.random.default_rng(0)
    kernel, bias = random.normal(size=(6, 40)).astype("float32"), random.normal(size=40)
    bias = (spread * (bias - bias.mean()) / bias.std()).astype("float32")
    model.layers[-1].set_weights([kernel, bias])
    report = calibrate_init(model, _X, "lsuv")
    after, same_bias = model.layers[-1].get_weights()
    np.testing.assert_array_equal(same_bias, bias)
    if scaled:
        assert abs(np.std(_X @ after + bias) - 1) <= 0.1 and report.kernels[0].scale < 1
    else:
        np.testing.assert_array_equal(after, kernel)
        assert "do biases spread more?" in report.skipped["d/kernel"] and not report.kernels


def perceptron(library, first=1.0):
    L = library.layers
    layers = [L.Dense(5, "tanh", name="a"), L.Dense(3, name="b")]
    model = sparsify(library.Sequential([L.Input((6,)), *layers]), 0.4, wrapper="masked", seed=1)
    return scaled(model, first)


def quotient(model, loss):
    """GQ by its definition, with the whole Hessian in float64, of the weights that are not masked."""
    kernels = masked_kernels(model)
    masks = [kernels[0].mask_value(), np.ones(5, bool), kernels[1].mask_value(), np.ones(3, bool)]
    values = [compat.to_numpy("w", v).astype(np.float64) for v in model.trainable_variables]
    theta = tf.constant(np.concatenate([v[m] for v, m in zip(values, masks, strict=True)]))

    def value(theta):
        parts, start = [], 0
        for mask in masks:
            size = int(mask.sum())
            parts.append(tf.scatter_nd(np.argwhere(mask), theta[start : start + size], mask.shape))
            start += size
        logits = tf.tanh(tf.cast(_X, tf.float64) @ parts[0] + parts[1]) @ parts[2] + parts[3]
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(_Y, logits))

    with tf.GradientTape() as outer:
        outer.watch(theta)
        with tf.GradientTape() as inner:
            inner.watch(theta)
            found = value(theta)
        gradient = inner.gradient(found, theta)
    g, hessian = gradient.numpy(), outer.jacobian(gradient, theta).numpy()
    return np.mean(np.abs((g - hessian @ g) / (g + 1e-5 * np.where(g < 0, -1, 1)) - 1))


@BOTH
@pytest.mark.parametrize("first", [0.2, 5.0])
def test_metainit_lowers_the_gradient_quotient_by_norms_alone(library, first):
    model = perceptron(library, first)
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    before, expected = arrays(model), quotient(model, loss)
    biases = [compat.to_numpy("b", v).copy() for v in model.trainable_variables[1::2]]
    report = calibrate_init(model, _X, "metainit", n_samples=200, y=_Y, loss=loss)
    assert report.quotient_before == pytest.approx(expected, rel=1e-2)
    assert report.quotient == pytest.approx(quotient(model, loss), rel=1e-2)
    assert report.quotient < report.quotient_before * (0.9 if first > 1 else 1.0)
    for value, old, row in zip(arrays(model), before, report.kernels, strict=True):
        np.testing.assert_allclose(value, old * row.scale, rtol=1e-6)
    for variable, old in zip(model.trainable_variables[1::2], biases, strict=True):
        np.testing.assert_array_equal(compat.to_numpy("b", variable), old)
    assert "gradient quotient" in str(report)


@BOTH
def test_metainit_leaves_what_is_frozen_and_takes_the_name_of_a_loss(library):
    L = library.layers
    model = library.Sequential([L.Input((6,)), L.Dense(5, "tanh", name="a"), L.Dense(1, name="b")])
    model.layers[0].trainable = False
    kernel, targets = model.layers[0].get_weights()[0], _X[:, :1]
    report = calibrate_init(model, _X, "metainit", y=targets, loss="mse")
    np.testing.assert_array_equal(model.layers[0].get_weights()[0], kernel)
    assert report.skipped == {"a/kernel": "frozen"} and [row.name for row in report.kernels] == ["b/kernel"]
    model.trainable = False
    with pytest.raises(ValueError, match="`model` must have kernels that are trained"):
        calibrate_init(model, _X, "metainit", y=targets, loss="mse")


def test_metainit_is_the_same_in_both_kerases_and_each_time():
    scales = []
    for library in (keras, tf_keras, tf_keras):
        loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
        report = calibrate_init(perceptron(library, 3.0), _X, "metainit", y=_Y, loss=loss, seed=4, n_samples=100)
        scales.append([row.scale for row in report.kernels])
    assert scales[1] == scales[2] and scales[0] == pytest.approx(scales[1], rel=0.05)


def test_metainit_goes_with_maximum_pooling_and_batch_normalization():
    L = tf_keras.layers
    layers = [L.Conv2D(3, 3, activation="relu"), L.MaxPooling2D(), L.BatchNormalization(), L.Flatten(), L.Dense(3)]
    model = scaled(sparsify(tf_keras.Sequential([L.Input((8, 8, 4)), *layers]), 0.5, seed=0), 4.0)
    statistics = [v.numpy() for v in model.non_trainable_variables]
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    report = calibrate_init(model, _IMAGES[:200], "metainit", y=_Y, loss=loss, n_samples=32)
    assert report.quotient < report.quotient_before
    for variable, old in zip(model.non_trainable_variables, statistics, strict=True):
        np.testing.assert_array_equal(variable.numpy(), old)


@pytest.mark.parametrize("method", ["lsuv", "metainit"])
@pytest.mark.parametrize("library", ["keras", "tf_keras"])
def test_a_job_calibrates_before_it_trains(data, tmp_path, method, library):
    settings = small_settings(steps=20, keras=library)
    plain = arrays(Job(small_network, data, Scratch(0.7), **settings).model)
    model = Job(small_network, data, Scratch(0.7, calibrate=method), **settings).model
    for value, old in zip(arrays(model), plain, strict=True):
        np.testing.assert_array_equal(value == 0, old == 0)
        np.testing.assert_allclose(value * np.linalg.norm(old), old * np.linalg.norm(value), rtol=1e-4, atol=1e-6)
    assert any(not np.allclose(value, old) for value, old in zip(arrays(model), plain, strict=True))
    result = train(small_network, data, Scratch(0.7, calibrate=method), output_dir=tmp_path, **settings)
    assert result.summary["init"] == f"unit-{method}"


def test_bad_input_is_named():
    model = perceptron(keras)
    with pytest.raises(ValueError, match=r"`y` \(and `loss`\) must be given with method='metainit', and only then"):
        calibrate_init(model, _X, "metainit")
    with pytest.raises(ValueError, match=r"`y` \(and `loss`\) must be given with method='metainit', and only then"):
        calibrate_init(model, _X, "lsuv", y=_Y)
    with pytest.raises(ValueError, match="`loss` must be given with method='metainit', or the model compiled"):
        calibrate_init(model, _X, "metainit", y=_Y)
    with pytest.raises(ValueError, match="`calibrate` must be one of 'lsuv', 'metainit'"):
        Scratch(0.7, calibrate="bias")
