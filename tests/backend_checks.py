"""What must hold on every backend of Keras 3. Run as a program, prints the failures of KERAS_BACKEND as JSON.

A backend is chosen when Keras is imported, so that test_backends runs the others in a process of their own.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import tempfile
import traceback
import warnings

import keras
import numpy as np
import tensorflow as tf
import tf_keras
from small_jobs import small_data, small_settings

import keras_sparse_init
from keras_sparse_init import (
    Masked,
    SignalMonitor,
    SparseHeNormal,
    SparseMuP,
    SparseScaledInit,
    calibrate_init,
    compat,
    count_relu_zeros,
    generalization_gap,
    masks,
    measure_signal,
    output_range,
)
from keras_sparse_init.comparison.gradients import gradient_function
from keras_sparse_init.fans import kernel_layout
from keras_sparse_init.training import Prune, train
from keras_sparse_init.watching import watch

MASK = np.random.default_rng(0).random((30, 20)) < 0.3

NAMES = [name for name in keras_sparse_init.__all__ if name.startswith("Sparse") and name != "SparseMuP"]
INITIALIZERS = [getattr(keras_sparse_init, name) for name in NAMES]


def digests() -> list[str]:
    """Of every initializer's values for a small and for a large kernel."""
    result = []
    for cls in INITIALIZERS:
        for shape in ((30, 20), (1200, 1000)):
            kernel = keras.ops.convert_to_numpy(cls(mask=masks.ConstantFanIn(0.5), seed=1)(shape))
            result.append(hashlib.sha256(kernel.tobytes()).hexdigest())
    return result


def check_values_are_tensors_of_the_backend():
    for cls in INITIALIZERS:
        kernel = cls(mask=MASK, seed=1)((30, 20), dtype="float32")
        assert keras.ops.is_tensor(kernel)
        assert keras.backend.standardize_dtype(kernel.dtype) == "float32"
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(kernel) != 0, MASK)


def check_half_types():
    for dtype in ("float16", "bfloat16"):
        kernel = SparseHeNormal(mask=MASK, seed=1)((30, 20), dtype=dtype)
        assert keras.backend.standardize_dtype(kernel.dtype) == dtype
        as_float = keras.ops.convert_to_numpy(keras.ops.cast(kernel, "float32"))
        np.testing.assert_array_equal(as_float != 0, MASK)


def check_a_mask_may_be_a_tensor_or_variable_of_the_backend():
    expected = keras.ops.convert_to_numpy(SparseHeNormal(seed=1)((30, 20), mask=MASK))
    for mask in (keras.ops.convert_to_tensor(MASK), keras.Variable(MASK.astype("float32"))):
        kernel = SparseHeNormal(seed=1)((30, 20), mask=mask)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(kernel), expected)


def check_tf_keras_gets_tensors_of_tensorflow_beside_any_backend():
    init = SparseHeNormal(mask=MASK, seed=1)
    layer = tf_keras.layers.Dense(20, kernel_initializer=init)
    layer.build((None, 30))
    assert isinstance(layer.kernel, tf.Variable)
    np.testing.assert_array_equal(layer.kernel.numpy(), keras.ops.convert_to_numpy(init((30, 20))))


def network(**settings):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, kernel_initializer=SparseHeNormal(**settings), name="conv"),
            layers.DepthwiseConv2D(
                3, depthwise_initializer=SparseHeNormal(kernel_layout="depthwise", **settings), name="depthwise"
            ),
            layers.Reshape((4, 16)),
            layers.Bidirectional(layers.GRU(3, kernel_initializer=SparseScaledInit(**settings)), name="gru"),
            layers.Dense(5, kernel_initializer=SparseHeNormal(**settings), name="dense"),
        ]
    )


def check_layers_are_built_and_trained_and_their_layouts_are_known():
    model = network(sparsity=0.5, seed=1)
    depthwise = model.get_layer("depthwise")
    assert kernel_layout(depthwise, tuple(depthwise.kernel.shape)).name == "depthwise"
    for layer in (model.get_layer("conv"), depthwise, model.get_layer("dense")):
        kernel = keras.ops.convert_to_numpy(layer.kernel)
        assert np.count_nonzero(kernel) == -(-kernel.size // 2)
    model.compile(keras.optimizers.SGD(0.01), "mse")
    loss = model.fit(np.ones((4, 8, 8, 3)), np.ones((4, 5)), epochs=1, verbose=0).history["loss"]
    assert np.isfinite(loss).all()


def check_saving_and_cloning():
    model = network(sparsity=0.5, seed=1)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".keras", ".h5"):
            path = os.path.join(folder, f"model{suffix}")
            model.save(path)
            loaded = keras.models.load_model(path)
            np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5)
            init = loaded.get_layer("dense").kernel_initializer
            assert init.get_config() == model.get_layer("dense").kernel_initializer.get_config()
    clone = keras.models.clone_model(model)
    for copied, original in zip(clone.get_weights(), model.get_weights(), strict=True):
        if copied.ndim > 1 and copied.shape != (3, 9):  # GRU's recurrent kernels are Keras's.
            np.testing.assert_array_equal(copied, original)


def check_copies_without_a_seed_differ():
    layer = keras.layers.Bidirectional(keras.layers.GRU(3, kernel_initializer=SparseHeNormal()))
    layer.build((None, 4, 5))
    forward, backward = (
        keras.ops.convert_to_numpy(part.cell.kernel) for part in (layer.forward_layer, layer.backward_layer)
    )
    assert (forward != backward).all()
    attention = keras.layers.MultiHeadAttention(2, 4, kernel_initializer=SparseHeNormal())
    attention(np.zeros((1, 3, 8), "float32"), np.zeros((1, 3, 8), "float32"))
    query, key = (keras.ops.convert_to_numpy(getattr(attention, f"_{part}_dense").kernel) for part in ("query", "key"))
    assert (query != key).all()


def check_set_random_seed_is_followed():
    def kernels(seed):
        keras.utils.set_random_seed(seed)
        return [keras.ops.convert_to_numpy(SparseHeNormal()((5, 4))) for _ in range(2)]

    np.testing.assert_array_equal(kernels(1), kernels(1))
    assert (kernels(1)[0] != kernels(1)[1]).all()
    assert (kernels(1)[0] != kernels(2)[0]).all()


def check_a_seed_generator_gives_new_values_at_each_call():
    init = SparseHeNormal(seed=keras.random.SeedGenerator(4))
    first, second = (keras.ops.convert_to_numpy(init((5, 4))) for _ in range(2))
    assert (first != second).all()


def check_stateless_functions_of_jax():
    """Inside jax.jit, and of a mask without a value, which is an error."""
    if keras.backend.backend() != "jax":
        return
    import jax

    init = SparseHeNormal(seed=1)
    expected = keras.ops.convert_to_numpy(init((30, 20), mask=MASK))
    np.testing.assert_array_equal(jax.jit(lambda: init((30, 20), mask=MASK))(), expected)
    try:
        jax.jit(lambda mask: init((30, 20), mask=mask))(MASK)
    except ValueError as error:
        assert "`mask` must be an array that has a value" in str(error)
    else:
        raise AssertionError("a mask without a value passed")


def check_gradients_are_those_of_the_closed_form():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(8, 30)).astype("float32"), random.normal(size=(8, 20)).astype("float32")
    layer = Masked(keras.layers.Dense(20, kernel_initializer=SparseHeNormal(seed=1)), mask=MASK)
    model = keras.Sequential([keras.layers.Input((30,)), layer])
    gradients = gradient_function(model, keras.losses.MeanSquaredError())(x, y)
    kernel = keras.ops.convert_to_numpy(layer.layer.kernel)
    error = 2 * (x @ (kernel * MASK) - y) / y.size
    for found, expected in zip(gradients, (x.T @ error * MASK, error.sum(axis=0)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def check_zeros_of_relus_are_counted():
    x = np.random.default_rng(0).normal(size=(30, 4)).astype("float32")
    module = {"jax": "jax.nn", "torch": "torch.nn.functional"}.get(keras.backend.backend())
    relu = importlib.import_module(module).relu if module else tf.nn.relu
    layers = [keras.layers.Dense(5, "relu", name="a"), keras.layers.Dense(3, relu, name="b")]
    model = keras.Sequential([keras.layers.Input((4,)), *layers])
    zeros = count_relu_zeros(model, x, batch_size=8)
    outputs = [keras.ops.convert_to_numpy(part) == 0 for part in (layers[0](x), model(x))]
    for name, expected in zip("ab", outputs, strict=True):
        np.testing.assert_array_equal(zeros.per_unit[name], expected.sum(axis=0))
    assert zeros.patterns == len(np.unique(np.concatenate(outputs, axis=1), axis=0))


def check_gradients_of_activations_in_jax():
    """JAX has gradients of arguments alone: a zero is added to each value, and is the argument."""
    if keras.backend.backend() != "jax":
        return
    import jax

    relu = keras.layers.Dense(3, "relu", name="a")
    model = keras.Sequential([keras.layers.Input((4,)), relu, keras.layers.Dense(1, name="b")])
    x = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")

    def loss(added):
        with watch(model, [relu], lambda name, call, kind, value: value + added[kind]) as items:
            outputs = model(x)
        return keras.ops.sum(outputs), items[0].pre

    zero = np.zeros((6, 3), "float32")
    gradients, pre = jax.jit(jax.grad(loss, has_aux=True))({"pre": zero, "post": zero})
    expected = np.repeat(keras.ops.convert_to_numpy(model.layers[-1].kernel).T, 6, axis=0)
    np.testing.assert_allclose(gradients["post"], expected, rtol=1e-5)
    np.testing.assert_allclose(gradients["pre"], expected * (np.asarray(pre) > 0), rtol=1e-5)


def check_signals_and_gradients_are_those_of_plain_numpy_and_the_model_stays_as_it_is():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(50, 30)).astype("float32"), random.normal(size=(50, 3)).astype("float32")
    layers = keras.layers
    first = Masked(layers.Dense(20, "relu", kernel_initializer=SparseHeNormal(seed=1), name="a"), mask=MASK)
    last = layers.Dense(3, kernel_initializer=SparseHeNormal(seed=2), name="b")
    inner = keras.Sequential([layers.Input((20,)), layers.Dropout(0.5, seed=1, name="drop"), last], name="inner")
    model = keras.Sequential([layers.Input((30,)), first, inner])
    w, v = (keras.ops.convert_to_numpy(layer.kernel) for layer in (first.layer, last))
    before = [np.array(keras.ops.convert_to_numpy(variable)) for variable in model.variables]
    report = measure_signal(model, x, y, "mse", batch_size=20, jacobian=True)
    pre = x @ (w * MASK)
    hidden = np.maximum(pre, 0)
    back = 2 * (hidden @ v - y) / y.size
    for spread, values in ((report["a"].pre, pre), (report["a"].post, hidden), (report["inner/b"].pre, hidden @ v)):
        np.testing.assert_allclose((spread.mean, spread.std), (values.mean(), values.std()), rtol=1e-4, atol=1e-5)
    for name, gradient in (("a", back @ v.T), ("inner/drop", back @ v.T), ("inner/b", back)):
        np.testing.assert_allclose(report[name].gradient_std, gradient.std(), rtol=1e-3)
    flows = (((x.T @ (back @ v.T * (pre > 0))) * MASK) ** 2).sum(), ((hidden.T @ back) ** 2).sum()
    np.testing.assert_allclose([kernel.gradient_flow for kernel in report.kernels], flows, rtol=1e-3)
    assert report["inner/b"].zero_fraction is None
    jacobians = np.einsum("ij,nj,jk->nki", w * MASK, pre > 0, v)
    np.testing.assert_allclose(report.singular_values, np.linalg.svd(jacobians)[1], rtol=1e-3)
    monitor = SignalMonitor(x, every=2, training=True)
    model.compile("sgd", "mse")
    model.fit(x, y, batch_size=25, epochs=1, verbose=0, callbacks=[monitor])
    assert list(monitor.reports) == [0, 2]
    assert monitor.reports[0]["inner/b"].pre != monitor.reports[2]["inner/b"].pre
    after = [keras.ops.convert_to_numpy(variable) for variable in model.variables]
    assert not all(map(np.array_equal, after, before))
    measure_signal(model, x, training=True)
    for variable, value in zip(model.variables, after, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)


def check_a_job_prunes_and_a_stopped_one_goes_on_to_the_same_weights():
    """With dropout, whose random state is a variable of the model, and with batch normalization."""
    data = small_data()

    def network(input_shape, classes):
        layers = keras.layers
        hidden = layers.Dense(20, "relu", kernel_initializer=SparseHeNormal(seed=1))
        last = layers.Dense(classes, kernel_initializer=SparseHeNormal(seed=3))
        block = [hidden, layers.BatchNormalization(), layers.Dropout(0.2, seed=2), last]
        return keras.Sequential([layers.Input(input_shape), layers.Flatten(), *block])

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if compat.iterations(self.model) >= 25:
                raise KeyboardInterrupt

    class Stopped(Prune):
        def callbacks(self, model, **asked):
            return [*super().callbacks(model, **asked), Stop()]

    with tempfile.TemporaryDirectory() as directory:
        settings = small_settings(steps=40, log_every=10, checkpoint_every=10)
        pruning = {"sparsity": 0.8, "begin_step": 5, "end_step": 35, "frequency": 3}
        whole = train(network, data, Prune(**pruning), output_dir=f"{directory}/whole", **settings)
        try:
            train(network, data, Stopped(**pruning), output_dir=f"{directory}/stopped", **settings)
        except KeyboardInterrupt:
            pass
        resumed = train(network, data, Prune(**pruning), output_dir=f"{directory}/stopped", **settings)
        assert whole.summary["backend"] == keras.backend.backend()
        assert abs(whole.summary["sparsity"] - 0.8) < 0.01
        for weight, expected in zip(resumed.model.get_weights(), whole.model.get_weights(), strict=True):
            np.testing.assert_array_equal(weight, expected)
        rows = [(run.directory / "metrics.csv").read_text() for run in (resumed, whole)]
        assert rows[0] == rows[1]
        loaded = keras.models.load_model(whole.directory / "model.keras")
        for weight, expected in zip(loaded.get_weights(), whole.model.get_weights(), strict=True):
            np.testing.assert_array_equal(weight, expected)


def check_a_step_goes_by_the_rates_of_the_variables():
    layers = keras.layers
    model = keras.Sequential([layers.Input((30,)), Masked(layers.Dense(20), mask=MASK), layers.Dense(3)])
    mup = SparseMuP()
    before = [keras.ops.convert_to_numpy(variable) for variable in model.trainable_variables]
    model.compile(mup.optimizer(model, keras.optimizers.SGD(0.1)), "mse")
    x, y = np.random.default_rng(0).normal(size=(2, 8, 30)).astype("float32")
    model.train_on_batch(x, y[:, :3])
    h = x @ before[0] + before[1]
    d_out = 2 * (h @ before[2] + before[3] - y[:, :3]) / (8 * 3)
    d_h = d_out @ before[2].T
    gradients = [x.T @ d_h * MASK, d_h.sum(0), h.T @ d_out, d_out.sum(0)]
    rates = [1 / MASK.mean(), 1, 1, 1]
    for variable, start, gradient, rate in zip(model.trainable_variables, before, gradients, rates, strict=True):
        found = keras.ops.convert_to_numpy(variable)
        np.testing.assert_allclose(found, start - 0.1 * rate * gradient, rtol=0, atol=1e-6)


def check_the_range_of_outputs_is_that_of_the_model():
    layers = [
        Masked(keras.layers.Conv2D(2, 2, activation="relu"), sparsity=0.3, seed=0),
        keras.layers.BatchNormalization(),
        keras.layers.AveragePooling2D(2, padding="same"),
        keras.layers.Flatten(),
        keras.layers.Dense(2),
    ]
    model = keras.Sequential([keras.layers.Input((4, 4, 1)), *layers])
    found = output_range(model, -1, 1, "crown")
    y = keras.ops.convert_to_numpy(model(found.x_upper.astype("float32"), training=False))
    np.testing.assert_allclose(np.diag(y), found.attained_upper, rtol=1e-4)
    assert np.all(found.lower <= y.min(axis=0) + 1e-4) and np.all(y.max(axis=0) - 1e-4 <= found.upper)


def check_a_calibrated_model_is_on_for_the_fraction_and_the_mixed_difference_leaves_it_as_it_is():
    layers = keras.layers
    images = np.random.default_rng(0).normal(0.3, 1.0, (40, 6, 6, 2)).astype("float32")
    parts = [layers.Conv2D(3, 3, strides=2, padding="same", activation="relu", name="conv"), layers.Flatten()]
    model = keras.Sequential([layers.Input((6, 6, 2)), *parts, Masked(layers.Dense(5), sparsity=0.5), layers.ReLU()])
    report = calibrate_init(model, images, on_fraction=0.6)
    assert [row.zeros for row in report.layers] == [0.4, 0.4]
    report = calibrate_init(model, images, "lp", on_fraction=0.5)
    assert all(abs(row.zeros - 0.5) < abs(row.zeros_before - 0.5) for row in report.layers)
    before = model.get_weights()
    assert generalization_gap(model, images) > 0
    for weight, value in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, value)


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}


def main() -> None:
    """Every check's traceback, or an empty string."""
    warnings.simplefilter("error", UserWarning)
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
