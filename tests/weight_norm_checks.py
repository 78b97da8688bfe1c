"""What must hold for `WeightNorm` on every backend of Keras 3; `masked_checks` runs it with its own."""

from __future__ import annotations

import os
import tempfile

import keras
import numpy as np
from masked_layers import CASES, arguments, data, half, number, weights_and_masks

from keras_sparse_init import Masked, WeightNorm, fold_weight_norm, reinitialize, strip

layers = keras.layers
SOME_CASES = ["dense", "conv2d_transpose", "separable_conv1d", "lstm_from_states", "attention_by_name", "embedding"]


def network():
    return keras.Sequential(
        [
            keras.Input((6, 4)),
            WeightNorm(layers.SeparableConv1D(4, 3, activation="tanh", pointwise_regularizer="l2")),
            WeightNorm(layers.SimpleRNN(4)),
            Masked(WeightNorm(layers.Dense(6)), sparsity=0.5, seed=0),
            WeightNorm(Masked(layers.Dense(2), sparsity=0.5, seed=0)),
        ]
    )


def trained():
    keras.utils.set_random_seed(0)
    model = network()
    model.compile(keras.optimizers.Adam(0.01), keras.losses.MeanSquaredError())
    model.fit(data(8, 6, 4), data(8, 2, seed=1), batch_size=4, verbose=0)
    return model


def check_weight_norm_changes_no_output_and_folds():
    for name in SOME_CASES:
        args, kwargs = arguments(keras, name)
        layer = CASES[name][0](layers)
        before = keras.tree.flatten(layer(*args, **kwargs))
        wrapped = WeightNorm(layer)
        after = keras.tree.flatten(wrapped(*args, **kwargs))
        folded = keras.tree.flatten(wrapped.fold()(*args, **kwargs))
        for output, other, plain in zip(before, after, folded, strict=True):
            np.testing.assert_allclose(number(other), number(output), rtol=1e-5, atol=1e-6, err_msg=name)
            np.testing.assert_allclose(number(other), number(plain), rtol=1e-5, atol=1e-6, err_msg=name)


def check_weight_norm_trains_v_and_g():
    keras.utils.set_random_seed(0)
    model = network()
    before = [number(weight) for weight in model.trainable_weights]
    x, y = data(8, 6, 4), data(8, 2, seed=1)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x, y, batch_size=4, verbose=0)
    for weight, old in zip(model.trainable_weights, before, strict=True):
        assert (number(weight) != old).any(), weight.path
        assert np.isfinite(number(weight)).all()
    for kernel, mask in weights_and_masks(model):
        assert not kernel[mask == 0].any()
    unbuilt = keras.Sequential([Masked(WeightNorm(layers.Dense(4)), mask=half(6, 4), seed=0)])
    unbuilt.compile(keras.optimizers.SGD(0.0), "mse")
    unbuilt.fit(data(8, 6), data(8, 4), verbose=0)
    ((kernel, _),) = weights_and_masks(unbuilt)
    np.testing.assert_allclose(number(unbuilt.layers[0].layer.effective_weights()[0]), kernel, rtol=1e-5, atol=1e-7)


def check_weight_norm_of_zeros_and_of_tiny_weights():
    layer = WeightNorm(layers.Dense(3, use_bias=False))
    model = keras.Sequential([keras.Input((5,)), layer])
    layer.layer.kernel.assign(data(5, 3) * [1e-30, 0, 1])
    layer.kernel_g.assign([1.0, 2.0, 3.0])
    np.testing.assert_allclose(np.linalg.norm(number(layer.effective_weights()[0]), axis=0), [1.0, 0.0, 3.0], rtol=1e-5)
    # The right gradient of v is about 1e30 at first, whose square no optimizer can hold.
    layer.layer.kernel.assign(data(5, 3) * [1e-10, 0, 1])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(data(8, 5), data(8, 3, seed=1), batch_size=2, verbose=0)
    assert np.isfinite(number(layer.layer.kernel)).all()
    assert not number(layer.layer.kernel)[:, 1].any()
    assert number(layer.kernel_g)[1] == 2.0


def check_weight_norm_regularizers_act_on_w():
    layer = WeightNorm(layers.Dense(3, kernel_regularizer="l2"))
    model = keras.Sequential([keras.Input((5,)), layer])
    w = number(layer.effective_weights()[0])
    layer.layer.kernel.assign(number(layer.layer.kernel) * 10)
    loss = keras.ops.convert_to_numpy(sum(model.losses))
    np.testing.assert_allclose(loss, 0.01 * (w**2).sum(), rtol=1e-5)
    model.compile(keras.optimizers.SGD(0.5), "mse")
    before = number(layer.kernel_g)
    model.fit(np.zeros((2, 5)), np.zeros((2, 3)), verbose=0)
    np.testing.assert_allclose(number(layer.kernel_g), before * 0.99, rtol=1e-5)


def check_weight_norm_half_precision():
    layer = WeightNorm(layers.Dense(4, dtype="mixed_bfloat16"))
    assert keras.backend.standardize_dtype(layer(data(3, 6)).dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(layer.effective_weights()[0].dtype) == "float32"


def check_weight_norm_saving_folding_and_reinitializing():
    model, x = trained(), data(8, 6, 4)
    expected = model.predict(x, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        model.save(path)
        np.testing.assert_array_equal(keras.models.load_model(path).predict(x, verbose=0), expected)
    plain = fold_weight_norm(strip(model))
    assert not any(isinstance(layer, Masked | WeightNorm) for layer in plain._flatten_layers())
    np.testing.assert_allclose(plain.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)
    reinitialize(model, seed=3)
    for wrapper, (kernel, _) in zip((model.layers[2].layer, model.layers[3]), weights_and_masks(model), strict=True):
        np.testing.assert_allclose(number(wrapper.effective_weights()[0]), kernel, rtol=1e-5, atol=1e-7)
        before = number(wrapper.kernel_g)
        wrapper.canonicalize()
        np.testing.assert_array_equal(number(wrapper.kernel_g), before)


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}
