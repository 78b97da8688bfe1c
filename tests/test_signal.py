"""What goes through a model: against closed forms and plain NumPy, in both Kerases."""

import random

import keras
import numpy as np
import pytest
import tf_keras

from keras_sparse_init import (
    Masked,
    SparseGlorotUniform,
    WeightNorm,
    compat,
    masked_kernels,
    measure_signal,
    sparsify,
    traversal,
)

BOTH = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
_RANDOM = np.random.default_rng(0)
_X = _RANDOM.normal(1.0, 2.0, size=(40, 6)).astype(np.float32)
_Y = _RANDOM.normal(size=(40, 3)).astype(np.float32)


def _perceptron(library):
    L = library.layers
    return library.Sequential(
        [
            L.Input((6,)),
            L.Dense(5, "relu", name="a", kernel_initializer=SparseGlorotUniform(seed=1), bias_initializer="ones"),
            L.Dense(3, name="b", kernel_initializer=SparseGlorotUniform(seed=2)),
        ]
    )


def _by_hand(model):
    """Pre-activations, activations and gradients of the mean squared error, layer by layer, in float64."""
    w, b, v, c = (compat.to_numpy("weight", weight).astype(np.float64) for weight in model.weights)
    first = _X @ w + b
    hidden = np.maximum(first, 0)
    outputs = hidden @ v + c
    back = 2 * (outputs - _Y) / outputs.size
    return (
        first,
        hidden,
        outputs,
        back @ v.T,
        back,
        {"a/kernel": _X.T @ (back @ v.T * (first > 0)), "b/kernel": hidden.T @ back},
    )


@BOTH
@pytest.mark.parametrize("batch_size", [40, 7])
def test_the_numbers_are_those_of_plain_numpy_whatever_the_batch_size(library, batch_size):
    model = _perceptron(library)
    report = measure_signal(model, _X, _Y, library.losses.MeanSquaredError(), batch_size=batch_size)
    first, hidden, outputs, back_hidden, back, kernels = _by_hand(model)
    a, b = report["a"], report["b"]
    for spread, values in ((a.pre, first), (a.post, hidden), (b.pre, outputs), (b.post, outputs)):
        units = values.std(axis=0)
        found = (spread.mean, spread.std, spread.unit_std_mean, spread.unit_std_min, spread.unit_std_max)
        expected = (values.mean(), values.std(), units.mean(), units.min(), units.max())
        # Absolute as well: a mean is a sum in which values cancel, so its error is one of the values, not of itself.
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * values.std())
    for layer, gradient in ((a, back_hidden), (b, back)):
        found, expected = (layer.gradient_mean, layer.gradient_std), (gradient.mean(), gradient.std())
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * gradient.std())
    assert (a.units, a.size, a.kind, a.has_kernel) == (5, 5, "Dense", True)
    assert a.zero_fraction == pytest.approx((hidden == 0).mean())
    assert a.dead_units == (hidden == 0).all(axis=0).sum()
    assert a.always_on_units == (hidden != 0).all(axis=0).sum()
    directions = first / np.linalg.norm(first, axis=1, keepdims=True)
    cosines = directions @ directions.T
    assert a.cosine == pytest.approx(cosines[~np.eye(40, dtype=bool)].mean(), abs=1e-6)
    for kernel in report.kernels:
        gradient = kernels[kernel.name]
        expected = gradient.mean(), gradient.std(), (gradient**2).sum()
        found = kernel.gradient_mean, kernel.gradient_std, kernel.gradient_flow
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * gradient.std())
    assert report.output_std == pytest.approx(outputs.std(), rel=1e-5)


def _values(model):
    return [np.array(compat.to_numpy("weight", variable)) for variable in traversal.variables(model)]


def _assert_same(model, before):
    for variable, value in zip(traversal.variables(model), before, strict=True):
        np.testing.assert_array_equal(compat.to_numpy("weight", variable), value)


def _flat(report):
    return {
        (entry.name, key): value
        for part in (report.layers, report.kernels)
        for entry in part
        for key, value in entry.row().items()
    }


@BOTH
@pytest.mark.parametrize("training", [False, True])
def test_weights_states_and_layers_are_left_as_they_are(library, training):
    L = library.layers
    model = library.Sequential(
        [
            L.Input(batch_shape=(8, 5, 4)) if library is keras else L.Input((5, 4), batch_size=8),
            L.GRU(6, stateful=True),
            L.BatchNormalization(),
            L.Dropout(0.5, seed=3),
            L.Dense(3, "relu"),
        ]
    )
    x = _RANDOM.normal(size=(16, 5, 4)).astype(np.float32)
    model(x[:8])  # A state that is not 0.
    state = model.layers[0].states[0]
    before, state_before = _values(model), np.array(compat.to_numpy("state", state))
    attributes = [dict(vars(layer)) for layer in model.layers]
    reports = [measure_signal(model, x, training=training, batch_size=8) for _ in range(2)]
    _assert_same(model, before)
    np.testing.assert_array_equal(compat.to_numpy("state", state), state_before)
    for layer, expected in zip(model.layers, attributes, strict=True):
        assert {k: id(v) for k, v in vars(layer).items()}.keys() == expected.keys()
        assert vars(layer).get("activation") is expected.get("activation")
    if library is keras or not training:  # tf_keras does not give its random state away.
        assert _flat(reports[0]) == _flat(reports[1])


def test_tfmots_masking_in_place_is_undone():
    model = sparsify(_perceptron(tf_keras), 0.5, seed=0)
    for kernel in masked_kernels(model):
        kernel.kernel.assign(np.ones(kernel.shape))
    before = _values(model)
    report = measure_signal(model, _X)
    _assert_same(model, before)
    mask = masked_kernels(model)[0].mask_value()
    assert report["a"].pre.std == pytest.approx((_X @ mask).std(), rel=1e-5)


@BOTH
def test_gradients_of_masked_kernels_are_those_on_the_mask(library):
    mask = np.arange(18).reshape(6, 3) % 3 == 0
    for wrapper in ("masked", "tfmot") if library is tf_keras else ("masked",):
        plain = library.Sequential([library.layers.Input((6,)), library.layers.Dense(3, name="a")])
        model = sparsify(plain, 0.5, wrapper=wrapper, seed=0)
        compat.assign(masked_kernels(model)[0].mask, mask)
        compat.assign(masked_kernels(model)[0].kernel, mask)
        (kernel,) = measure_signal(model, _X, _Y, "mse").kernels
        gradient = (_X.T @ (2 * (_X @ mask - _Y) / _Y.size))[mask]
        expected = gradient.mean(), gradient.std(), (gradient**2).sum()
        found = kernel.gradient_mean, kernel.gradient_std, kernel.gradient_flow
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        assert kernel.topology.nonzeros == 6


@BOTH
def test_every_call_of_a_shared_layer_and_layers_of_nested_and_subclassed_models_are_seen(library):
    L = library.layers

    class Block(library.Model):
        def __init__(self):
            super().__init__(name="block")
            self.dense, self.unused = L.Dense(6, "tanh", name="dense"), L.Dense(2, name="unused")

        def build(self, input_shape):
            self.dense.build(input_shape)
            self.built = True

        def call(self, x):
            return {"sum": self.dense(x) + x, "twice": 2 * x}

    inner = library.Sequential([L.Input((6,)), L.Dense(6, "relu", name="hidden")], name="inner")
    shared, inputs = L.Dense(6, "relu", name="shared"), {"x": L.Input((6,), name="x"), "n": L.Input((2,), name="n")}
    h = L.Concatenate(name="both")([inner(shared(shared(inputs["x"]))), inputs["n"]])
    outputs = Block()(L.Dense(6, name="joint")(h))
    model = library.Model(inputs, outputs)
    x = {"x": _X, "n": _X[:, :2]}
    report = measure_signal(model, x, batch_size=16)
    names = ["shared (1)", "shared (2)", "inner/hidden", "both", "joint", "block/dense"]
    assert [
        layer.name for layer in report.layers if not layer.name.startswith("block[") and layer.name != "block"
    ] == names
    first = np.asarray(shared(_X))
    kernel, bias = (compat.to_numpy("weight", weight) for weight in shared.weights)
    assert report["shared (2)"].pre.std == pytest.approx((first @ kernel + bias).std(), rel=1e-4)
    assert report["inner/hidden"].post.std == pytest.approx(np.asarray(inner(shared(first))).std(), rel=1e-4)
    assert list(report.not_seen) == ["block/unused"]
    assert len(report.outputs) == 2
    whole = np.concatenate([np.asarray(output) for output in model(x).values()], axis=1)
    assert report.output_std == pytest.approx(whole.std(), rel=1e-4)


@BOTH
def test_gates_are_listed_as_not_seen_and_tokens_have_no_gradient(library):
    L = library.layers
    layers = [L.Input((7,), dtype="int32"), L.Embedding(9, 5, name="words"), L.LSTM(4, name="lstm"), L.Dense(2)]
    model = library.Sequential(layers)
    report = measure_signal(model, _RANDOM.integers(0, 9, size=(20, 7)))
    (reason,) = report.not_seen.values()
    assert reason == "inside the loop over time of 'lstm'"
    assert (report["lstm"].pre, report["lstm"].units, report["words"].size) == (None, 4, 35)
    assert report["words"].gradient_std > 0
    assert [kernel.name for kernel in report.kernels if kernel.gradient_flow > 0][:2] == [
        "words/embeddings",
        "lstm/lstm_cell/kernel",
    ]


@BOTH
def test_nothing_depends_on_the_batch_size(library):
    L = library.layers
    layers = [L.Conv2D(4, 3, name="conv"), L.BatchNormalization(), L.ReLU(name="relu"), L.MaxPooling2D(), L.Flatten()]
    dense = [WeightNorm(L.Dense(8, "relu", name="normed")), Masked(L.Dense(3, name="out"), sparsity=0.5, seed=0)]
    model = library.Sequential([L.Input((7, 7, 2)), *layers, *dense])
    x = _RANDOM.normal(1, 1, size=(30, 7, 7, 2)).astype(np.float32)
    whole = _flat(measure_signal(model, x, seed=5))
    parts = _flat(measure_signal(model, x, seed=5, batch_size=4))
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        assert parts[key] == (pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value), key
    assert whole["conv", "units"] == 4 and whole["conv", "size"] == 100
    assert whole["relu", "zero_fraction"] > 0.1 and whole["normed", "pre_std"] > 0
    assert whole["out/kernel", "sparsity"] == 0.5
    other = _flat(measure_signal(model, x, seed=6))
    assert other["conv", "gradient_std"] != whole["conv", "gradient_std"]


@BOTH
def test_random_output_gradients_are_standard_normal_and_touch_no_global_state(library):
    model = _perceptron(library)
    state, of_python = np.random.get_state()[1].copy(), random.getstate()
    report = measure_signal(model, np.repeat(_X, 25, axis=0))
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert random.getstate() == of_python
    # 3,000 draws: six standard errors.
    assert abs(report["b"].gradient_mean) < 6 / np.sqrt(3000)
    assert abs(report["b"].gradient_std - 1) < 6 / np.sqrt(2 * 3000)


@BOTH
def test_losses_of_all_kinds_mean_the_same(library):
    model = _perceptron(library)
    expected = _flat(measure_signal(model, _X, _Y, "mse", batch_size=15))

    def by_hand(y, outputs):
        return ((outputs - y) ** 2)[..., 0] / 3 + ((outputs - y) ** 2)[..., 1] / 3 + ((outputs - y) ** 2)[..., 2] / 3

    mean, summed = library.losses.MeanSquaredError(), library.losses.MeanSquaredError(reduction="sum")
    for loss, factor in ((mean, 1), (library.losses.MeanSquaredError, 1), (by_hand, 1), (summed, 40)):
        found = _flat(measure_signal(model, _X.astype(np.float64), _Y.tolist(), loss, batch_size=15))
        for key in (("a", "gradient_std"), ("a/kernel", "gradient_std")):
            assert found[key] == pytest.approx(factor * expected[key], rel=1e-4)


@BOTH
@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_is_measured_in_float32_and_small_gradients_are_kept(library, dtype):
    L = library.layers
    policy = tf_keras.mixed_precision.Policy(dtype) if library is tf_keras else keras.DTypePolicy(dtype)
    half, full = (
        library.Sequential([L.Input((6,)), L.Dense(50, "relu", name="a", dtype=d), L.Dense(3, name="b", dtype=d)])
        for d in (policy, "float32")
    )
    full.set_weights(half.get_weights())
    x, y = np.tile(_X, (50, 1)), 1e-3 * np.tile(_Y, (50, 1))
    found, expected = (_flat(measure_signal(model, x, y, "mse")) for model in (half, full))
    for key in (("a", "pre_std"), ("a", "std"), ("b", "std"), ("a", "gradient_std"), ("a/kernel", "gradient_std")):
        assert found[key] == pytest.approx(expected[key], rel=0.05), key


@BOTH
def test_singular_values_are_those_of_the_kernel_of_a_linear_model(library):
    model = library.Sequential([library.layers.Input((6,)), library.layers.Dense(3)])
    report = measure_signal(model, _X[:4], jacobian=True, batch_size=3)
    expected = np.linalg.svd(compat.to_numpy("kernel", model.weights[0]), compute_uv=False)
    np.testing.assert_allclose(report.singular_values, [expected] * 4, rtol=1e-5)
    assert measure_signal(model, _X[:4]).singular_values is None


@BOTH
def test_bad_arguments_are_named(library):
    model, deferred = _perceptron(library), library.Sequential([library.layers.Dense(3)])
    for arguments, options, message in (
        ((deferred, _X), {}, "`model` must be built"),
        ((model, _X[:0]), {}, "`x` must have samples"),
        ((model, np.float32(3)), {}, "`x` must have samples"),
        ((model, _X, _Y), {}, "`y` without `loss`"),
        ((model, _X), {"loss": "mse"}, "`loss` without `y`"),
        ((model, _X, _Y, "nonsense"), {}, "`loss` must be a Keras loss, its name, or a function"),
        ((model, _X, _Y[:7], "mse"), {}, "`y` must have as many samples as `x`. Received: 7 and 40"),
        ((model, [_X, _X[:3]]), {}, "must have as many samples each"),
        ((model, _X), {"training": 1}, "`training` must be a bool"),
        ((model, _X), {"jacobian": None}, "`jacobian` must be a bool"),
        ((model, _X), {"batch_size": 0}, "`batch_size` must be a positive int"),
        ((model, _X), {"seed": -1}, "`seed` must be a non-negative int"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_signal(*arguments, **options)

    class Total(library.Model):
        def call(self, x):
            return x[0]

    total = Total()
    total(_X)
    with pytest.raises(
        ValueError, match=r"first axis is that of the samples. Received: an output of shape \(6,\) for 40"
    ):
        measure_signal(total, _X)
    with pytest.raises(TypeError, match="Expected a layer or model"):
        measure_signal(5, _X)
    with pytest.raises(KeyError, match="No layer 'c' has been seen"):
        measure_signal(model, _X)["c"]
