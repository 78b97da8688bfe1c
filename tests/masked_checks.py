"""What must hold for `Masked` and `WeightNorm` on every backend. As a program, prints the failures of KERAS_BACKEND."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import traceback
import warnings

import keras
import numpy as np
import weight_norm_checks
from masked_layers import arguments, data, half, masked_case, number, weights_and_masks

from keras_sparse_init import Masked, SparseHeNormal, masked_kernels, masks, reinitialize, set_masks, sparsity_table

layers = keras.layers
# Enough for every way in which Keras's layers read their kernels: JAX takes seconds to compile some of them.
SOME_CASES = [
    "dense",
    "conv2d_grouped",
    "separable_conv2d",
    "lstm_from_states",
    "time_distributed",
    "attention_by_name",
    "einsum_dense",
    "embedding",
    "model",
]
X, Y = data(16, 6, 4), data(16, 2, seed=1)


def network(seed=0):
    return keras.Sequential(
        [
            keras.Input((6, 4)),
            Masked(layers.SeparableConv1D(6, 3, padding="same", activation="tanh"), sparsity=0.5, seed=seed),
            Masked(layers.Bidirectional(layers.SimpleRNN(4)), mask=masks.ConstantFanIn(0.5), seed=seed),
            Masked(layers.Dense(8, kernel_initializer=SparseHeNormal(sparsity=0.5, seed=seed))),
            Masked(layers.Dense(2), sparsity=0.5, seed=seed),
        ]
    )


def assert_sparse(model):
    for kernel, mask in weights_and_masks(model):
        assert 0 < mask.mean() < 1
        assert not kernel[mask == 0].any()


def digests():
    """Of masks and kernels of a fixed seed: the same bits on every backend."""
    model = network()
    result = [hashlib.sha256(a.tobytes()).hexdigest() for pair in weights_and_masks(model) for a in pair]
    set_masks(model, masks.Random(0.75), seed=3)
    reinitialize(model, seed=4)
    return result + [hashlib.sha256(a.tobytes()).hexdigest() for pair in weights_and_masks(model) for a in pair]


def check_outputs_are_those_of_the_layer_on_kernel_times_mask():
    for name in SOME_CASES:
        masked, plain, _ = masked_case(keras, name)
        args, kwargs = arguments(keras, name)
        for output, expected in zip(
            keras.tree.flatten(masked(*args, **kwargs)), keras.tree.flatten(plain(*args, **kwargs)), strict=True
        ):
            np.testing.assert_allclose(number(output), number(expected), rtol=1e-5, atol=1e-6, err_msg=name)


def check_weights_off_the_mask_stay_0_under_every_optimizer():
    for optimizer in (keras.optimizers.SGD(0.1, momentum=0.9), keras.optimizers.AdamW(0.01, weight_decay=0.1)):
        model = network()
        before = weights_and_masks(model)
        model.compile(optimizer, "mse")
        model.fit(X, Y, batch_size=4, verbose=0)
        assert_sparse(model)
        for (old_kernel, old_mask), (kernel, mask) in zip(before, weights_and_masks(model), strict=True):
            np.testing.assert_array_equal(mask, old_mask)
            assert (kernel != old_kernel).any()
        assert np.isfinite(model.evaluate(X, Y, verbose=0))


def check_a_model_is_built_by_fit_and_by_call():
    for build in (lambda model: None, lambda model: model(X[:2]), lambda model: model.build((None, 6, 4))):
        model = keras.Sequential([Masked(layers.SimpleRNN(3), sparsity=0.5, seed=0), layers.Dense(2)])
        build(model)
        model.compile(keras.optimizers.SGD(0.0), "mse")
        model.fit(X, Y, verbose=0)
        twin = Masked(layers.SimpleRNN(3), sparsity=0.5, seed=0)
        twin(X[:2])
        for pair, expected in zip(weights_and_masks(model), weights_and_masks(twin), strict=True):
            np.testing.assert_array_equal(pair, expected)


def check_masks_that_a_callback_changes_take_effect():
    class AtEpochEnd(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                set_masks(self.model, masks.Random(0.75), seed=2)

    class AtBatchEnd(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                set_masks(self.model, masks.Random(0.75), seed=2)

    for callback in (AtEpochEnd(), AtBatchEnd()):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((6,)), Masked(layers.Dense(4), mask=half(6, 4), seed=0)])
        model.compile(keras.optimizers.Adam(0.01, weight_decay=0.1), "mse")
        x, y = data(16, 6), data(16, 4)
        model.fit(x, y, batch_size=4, verbose=0)
        model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[callback])
        ((kernel, mask),) = weights_and_masks(model)
        assert mask.sum() == 6
        assert kernel[(mask > half(6, 4))].all()
        assert not kernel[mask == 0].any()
        assert sparsity_table(model).total.nonzeros == 6


def check_half_precision():
    layer = Masked(layers.Dense(4, dtype="mixed_bfloat16"), mask=half(6, 4))
    output = layer(data(3, 6))
    assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"
    for kernel, mask in weights_and_masks(layer):
        assert kernel.dtype == mask.dtype == np.float32
    model = keras.Sequential([keras.Input((6,)), layer])
    model.compile("sgd", "mse")
    model.fit(data(8, 6), data(8, 4), verbose=0)
    assert_sparse(model)


def check_saving_loading_and_cloning():
    model = network()
    model.compile("adam", "mse")
    model.fit(X, Y, verbose=0)
    set_masks(model, masks.Random(0.6), seed=1)
    expected = model.predict(X, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("model.keras", "model.h5", "model.weights.h5"):
            path = os.path.join(folder, name)
            if "weights" in name:
                model.save_weights(path)
                loaded = network(seed=5)
                loaded.load_weights(path)
            else:
                model.save(path)
                loaded = keras.models.load_model(path, compile=name != "model.h5")
            for pair, other in zip(weights_and_masks(model), weights_and_masks(loaded), strict=True):
                np.testing.assert_array_equal(pair, other)
            np.testing.assert_allclose(loaded.predict(X, verbose=0), expected, rtol=1e-5, atol=1e-6)
    for pair, other in zip(weights_and_masks(model), weights_and_masks(keras.models.clone_model(model)), strict=True):
        np.testing.assert_array_equal(pair[1], other[1])


def check_nothing_is_left_in_the_layer():
    model = network()
    model.compile("adam", "mse", jit_compile=keras.backend.backend() == "jax")
    model.fit(X, Y, verbose=0)
    for kernel in masked_kernels(model):
        assert any(value is kernel.kernel for value in vars(kernel.layer).values())


def check_lora_is_refused():
    layer = Masked(layers.Dense(4), sparsity=0.5)
    layer.build((None, 6))
    layer.layer.enable_lora(2)
    try:
        layer(data(2, 6))
    except ValueError as error:
        assert "LoRA" in str(error)
    else:
        raise AssertionError("LoRA passed")


def check_gradients_of_jax_are_masked():
    if keras.backend.backend() != "jax":
        return
    import jax

    layer = Masked(layers.Dense(4), mask=half(6, 4))
    layer.build((None, 6))
    rest = [variable.value for variable in layer.non_trainable_variables]

    def loss(trainable, x):
        return layer.stateless_call(trainable, rest, x)[0].sum()

    gradient = jax.jit(jax.grad(loss))([variable.value for variable in layer.trainable_variables], data(3, 6))[0]
    np.testing.assert_allclose(gradient, data(3, 6).sum(axis=0)[:, None] * half(6, 4), rtol=1e-5)
    assert not np.asarray(gradient)[half(6, 4) == 0].any()


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}
# In the same process, whose start takes seconds.
CHECKS.update(weight_norm_checks.CHECKS)


def main() -> None:
    """Every check's traceback, or an empty string."""
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", message="You are saving your model as an HDF5 file")
    result = {"backend": keras.backend.backend(), "digests": digests()}
    for name, check in CHECKS.items():
        try:
            check()
            result[name] = ""
        except Exception:
            result[name] = traceback.format_exc()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
