"""Calibration of models of both Kerases, and the mixed second difference."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from keras_sparse_init import (
    Masked,
    WeightNorm,
    calibrate_init,
    compat,
    count_relu_zeros,
    generalization_gap,
    masked_kernels,
    sparsify,
)
from keras_sparse_init.calibration import calibrate
from keras_sparse_init.calibration.relu_layers import LAYOUTS, relu_layers

BOTH = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
_X = np.random.default_rng(0).normal(0.5, 1.0, size=(90, 12)).astype(np.float32)
_IMAGES = np.random.default_rng(1).normal(0.2, 1.0, size=(6, 7, 7, 4)).astype(np.float32)


def _draw(model, scale=2.0):
    """Weights that do not depend on the Keras: kernels with a variance of scale / fan_in, biases of 0.3."""
    random = np.random.default_rng(3)
    for layer in model._flatten_layers():
        for name in ("kernel", "_kernel", "depthwise_kernel"):
            kernel = vars(layer).get(name)
            if compat.is_variable(kernel):
                fan_in = np.prod(kernel.shape[:-1])
                compat.assign(kernel, random.normal(0, np.sqrt(scale / fan_in), kernel.shape))
        if compat.is_variable(getattr(layer, "bias", None)):
            compat.assign(layer.bias, np.full(layer.bias.shape, 0.3))
    return model


def _mlp(library, wrap=lambda layer: layer):
    """Two dense layers with a ReLU, one inside and one after, and a softmax; the first masked when it is wrapped."""
    L = library.layers
    layers = [
        wrap(L.Dense(8, "relu", name="a")),
        L.Dense(6, name="b"),
        L.ReLU(name="r"),
        L.Dense(3, "softmax", name="out"),
    ]
    return _draw(library.Sequential([L.Input((12,)), *layers]))


def _masked(layer):
    return Masked(layer, sparsity=0.5, seed=0)


def _weights(model):
    return [np.array(weight) for weight in model.get_weights()]


def _assert_weights(model, expected):
    for weight, value in zip(_weights(model), expected, strict=True):
        np.testing.assert_array_equal(weight, value)


@BOTH
def test_biases_turn_each_unit_on_for_the_fraction_of_samples_and_nothing_else_changes(library):
    model = _mlp(library)
    before = _weights(model)
    report = calibrate_init(model, _X, on_fraction=0.7, calibrate_scale=False)
    zeros = count_relu_zeros(model, _X)
    for name in ("a", "r"):
        np.testing.assert_array_equal(zeros.per_unit[name], 27)
    for index, (weight, value) in enumerate(zip(_weights(model), before, strict=True)):
        assert np.array_equal(weight, value) == (index not in (1, 3))
    assert [row.name for row in report.layers] == ["a", "r"]
    assert [row.calibrated for row in report.layers] == ["a", "b"]
    assert (report.total.zeros, report.total.patterns, report.samples) == (zeros.fraction, zeros.patterns, 90)
    assert report.layers[0].zeros == report.layers[1].zeros == 0.3
    assert report.skipped == {"out": "Dense, no ReLU after it"}
    assert not any("call" in vars(layer) for layer in model.layers)


@BOTH
@pytest.mark.parametrize("method", ["bias", "lp", "none"])
def test_the_scale_makes_the_mean_square_of_outputs_half_that_of_what_the_draw_gives(library, method):
    model = _mlp(library)
    kernel = _weights(model)[0].astype(np.float64)
    report = calibrate_init(model, _X, method)
    new_kernel, new_bias = (weight.astype(np.float64) for weight in _weights(model)[:2])
    outputs = np.maximum(_X @ new_kernel + new_bias, 0)
    assert np.mean(outputs**2) == pytest.approx(0.5 * np.mean((_X @ kernel) ** 2), rel=1e-4)
    if method != "lp":
        np.testing.assert_allclose(new_kernel, report.layers[0].scale * kernel, rtol=1e-5)
    if method == "none":
        np.testing.assert_allclose(new_bias, 0.3 * report.layers[0].scale, rtol=1e-5)


def test_the_scale_of_a_deep_network_stays_and_does_not_without():
    def rms(calibrate_scale):
        L = keras.layers
        model = _draw(keras.Sequential([L.Input((12,)), *[L.Dense(12, "relu") for _ in range(10)], L.Dense(5)]))
        calibrate_init(model, _X, on_fraction=0.75, calibrate_scale=calibrate_scale)
        return float(np.sqrt(np.mean(np.square(model(_X)))))

    # The gains of 10 kernels of 144 weights vary: 0.4 and 1.2 for three seeds. Without, they were 3.7, 5.2 and 5.3.
    calibrated = rms(True)
    assert 0.3 < calibrated / np.sqrt(2 * np.mean(_X**2)) < 2
    assert rms(False) > 4 * calibrated


@BOTH
def test_programs_keep_weights_in_their_box_and_masked_ones_at_0(library):
    model = _mlp(library, _masked)
    (masked,) = masked_kernels(model)
    mask, w0 = masked.mask_value(), compat.to_numpy("kernel", masked.kernel) * masked.mask_value()
    assert not mask.all()
    report = calibrate_init(model, _X, "lp", on_fraction=0.5, radius=0.3, calibrate_scale=False)
    w = compat.to_numpy("kernel", masked.kernel)
    assert np.all(w[~mask] == 0)
    assert not np.array_equal(w, w0)
    s0 = np.sqrt((w0**2).sum(axis=0) / mask.sum(axis=0))
    assert np.all(np.abs(w - w0) <= 0.3 * s0 * (1 + 1e-5))
    np.testing.assert_allclose((w * w0).sum(axis=0), (w0**2).sum(axis=0), rtol=1e-5)
    bias = compat.to_numpy("bias", masked.layer.bias)
    assert np.all(np.abs(bias) <= (_X @ w0).std(axis=0) * (1 + 1e-5))
    assert all(0 < row.iterations < 4000 and row.gap <= 1e-3 for row in report.layers)
    assert all(abs(row.zeros - 0.5) < abs(row.zeros_before - 0.5) for row in report.layers)


def test_tfmot_wrappers_are_calibrated_and_weights_off_their_masks_are_0():
    dense = _mlp(tf_keras)
    model = sparsify(dense, 0.5, seed=0, wrapper="tfmot")
    for method in ("bias", "lp"):
        calibrate_init(model, _X, method)
        for kernel in masked_kernels(model):
            assert np.all(compat.to_numpy("kernel", kernel.kernel)[~kernel.mask_value()] == 0)
    calibrate_init(model, _X)
    np.testing.assert_array_equal(count_relu_zeros(model, _X).per_unit["a"], 23)


@BOTH
def test_both_kerases_and_the_exact_solver_agree(library):
    model, exact = _mlp(library, _masked), _mlp(keras, _masked)
    report, exact_report = calibrate_init(model, _X, "lp"), calibrate_init(exact, _X, "lp", solver="highs")
    assert exact_report.layers[0].gap < 1e-7
    for row, other in zip(report.layers, exact_report.layers, strict=True):
        assert row.zeros_before == pytest.approx(other.zeros_before, abs=0.002)
        assert row.zeros == pytest.approx(other.zeros, abs=0.03)


@BOTH
def test_the_trap_of_units_that_are_always_on_is_told(library):
    model = _mlp(library)
    with pytest.warns(UserWarning, match="is an affine function on the data"):
        report = calibrate_init(model, _X, "lp", objective="zeros", bias_radius=8.0)
    assert report.is_affine
    assert report.total.zeros < 0.02 < report.total.zeros_before
    assert report.non_linearity < 0.01 < report.non_linearity_before
    with pytest.warns(UserWarning, match="1 activation patterns"):
        calibrate_init(model, _X, on_fraction=0.999)


@BOTH
def test_how_linear_a_classifier_is_is_measured_before_its_softmax(library):
    model, logits = _mlp(library), _mlp(library)
    logits.layers[-1].activation = library.activations.linear
    # Large logits: their softmax is far from affine.
    for each in (model, logits):
        compat.assign(each.layers[-1].kernel, 30 * compat.to_numpy("kernel", each.layers[-1].kernel))
    found, expected = calibrate_init(model, _X, "none"), calibrate_init(logits, _X, "none")
    assert found.non_linearity == pytest.approx(expected.non_linearity, rel=1e-4)


@BOTH
def test_what_units_see_times_their_weights_is_what_convolutions_put_out(library):
    L = library.layers
    inputs = library.Input((7, 7, 4))
    sequence = L.Reshape((49, 4))(inputs)
    images = [
        L.Conv2D(6, 3, strides=2, padding="same", groups=2, activation="relu")(inputs),
        L.Conv2D(6, (2, 3), dilation_rate=2, activation="relu")(inputs),
        Masked(L.Conv2D(6, (4, 2), strides=(3, 2), padding="same", activation="relu"), sparsity=0.7, seed=1)(inputs),
        L.Conv1D(5, 3, padding="causal", dilation_rate=2, activation="relu")(sequence),
        L.Dense(5, "relu")(sequence),
    ]
    model = _draw(library.Model(inputs, L.Concatenate()([L.Flatten()(image) for image in images])))
    found, others = relu_layers(model, _IMAGES, LAYOUTS)
    assert (len(found), others) == (5, {})
    for most in (10**6, 20):
        for layer in found:
            units = layer.units(model, _IMAGES, True, most, seed=0)
            np.testing.assert_allclose(units.features @ units.kernel, units.z, atol=1e-4)
            assert len(units.z) == 20 or most > 20
            assert np.all(units.kernel[~units.mask] == 0)
            kernel = compat.to_numpy("kernel", layer.kernel).copy()
            layer.assign(units.kernel, np.full(units.z.shape[1], 0.3), 1.0)
            np.testing.assert_allclose(compat.to_numpy("kernel", layer.kernel), kernel * layer._mask(), rtol=1e-6)


@BOTH
def test_convolutions_of_all_kinds_are_calibrated_over_their_positions(library):
    L = library.layers
    layers = [
        L.Conv2D(4, 3, groups=2, activation="relu", name="conv"),
        L.DepthwiseConv2D(2, activation="relu", name="depthwise"),
        L.Conv2DTranspose(3, 2, activation="relu", name="transposed"),
    ]
    model = _draw(library.Sequential([L.Input((7, 7, 4)), *layers, L.Flatten(), L.Dense(2, name="out")]))
    report = calibrate_init(model, _IMAGES, on_fraction=0.6)
    assert [row.calibrated for row in report.layers] == ["conv", "depthwise", "transposed"]
    zeros = count_relu_zeros(model, _IMAGES)
    for name, counts in zeros.per_unit.items():
        np.testing.assert_allclose(counts / zeros.outputs_per_unit[name], 0.4, atol=0.005)
    report = calibrate_init(model, _IMAGES, "lp")
    assert [row.calibrated for row in report.layers] == ["conv", None, None]
    assert set(report.skipped) == {"depthwise", "transposed", "out"}


@BOTH
def test_units_without_inputs_are_counted_and_get_no_bias(library):
    mask = np.ones((12, 8))
    mask[:, :3] = 0
    for method in ("bias", "lp"):
        model = _mlp(library, lambda layer: Masked(layer, mask=mask, seed=0))
        report = calibrate_init(model, _X, method)
        assert [row.without_inputs for row in report.layers] == [3, 0]
        assert report.total.without_inputs == 3
        np.testing.assert_array_equal(compat.to_numpy("bias", model.layers[0].layer.bias)[:3], 0)
        assert all(np.all(np.isfinite(weight)) for weight in _weights(model))


@BOTH
def test_layers_that_cannot_be_calibrated_are_named_with_why(library):
    L = library.layers
    inputs = library.Input((12,))
    shared = L.Dense(12, "relu", name="shared")
    value = shared(shared(inputs))
    value = L.Dense(8, "relu", use_bias=False, name="no_bias")(value)
    value = WeightNorm(L.Dense(8, "relu", name="normed"))(value)
    value = L.ReLU(name="after_tanh")(L.Dense(8, "tanh", name="tanh")(value))
    value = L.BatchNormalization()(L.Dense(8, name="before_norm")(value))
    value = L.EinsumDense("ab,bc->ac", output_shape=4, bias_axes="c", activation="relu", name="einsum")(value)
    model = library.Model(inputs, L.Dense(2, name="out")(value))
    report = calibrate_init(model, _X)
    assert [row.calibrated for row in report.layers] == ["shared", None, None, None, None]
    assert set(report.skipped) == {"no_bias", "normed", "tanh", "before_norm", "einsum", "out"}
    assert report.skipped["no_bias"] == "Dense, no bias"
    assert "data_dependent_init" in report.skipped["normed"]


@BOTH
def test_frozen_layers_stay_as_they_are_and_count_as_they_are(library):
    model = _mlp(library, _masked)
    model.layers[0].trainable = False
    before = _weights(model)
    report = calibrate_init(model, _X, on_fraction=0.6, calibrate_scale=False)
    (name,) = (name for name in report.skipped if name != "out")
    assert report.skipped[name] == "Dense, frozen (not trainable)"
    assert [row.calibrated for row in report.layers] == [None, "b"]
    assert report.layers[0].flip_rate == 0 and report.layers[1].zeros == pytest.approx(0.4)
    changed = [not np.array_equal(a, b) for a, b in zip(before, _weights(model), strict=True)]
    shapes = [weight.shape for weight, change in zip(before, changed, strict=True) if change]
    assert shapes == [(6,)]  # The bias of b.
    model.trainable = False
    with pytest.raises(ValueError, match="must have a layer with a kernel, a bias and a ReLU. Received: .*frozen"):
        calibrate_init(model, _X)


def test_a_shared_layer_with_a_relu_after_one_call_only_is_not_calibrated_and_few_samples_do_for_the_rest():
    L = keras.layers
    inputs = keras.Input((12,))
    shared = L.Dense(12, name="shared")
    value = L.Dense(8, "relu", name="a")(shared(L.ReLU(name="relu")(shared(inputs))))
    model = _draw(keras.Model(inputs, L.Dense(2, name="out")(value)))
    report = calibrate_init(model, _X, n_samples=8)
    assert report.skipped["shared"] == "Dense, no ReLU after it"
    # 8 samples are too few for an affine fit of 12 inputs: for that there are more.
    assert report.samples == 8 and 0 < report.non_linearity < 1


@BOTH
def test_of_a_shared_layer_all_calls_count_on_the_inputs_that_they_had(library):
    L = library.layers
    inputs = library.Input((12,))
    shared = L.Dense(12, "relu", name="shared")
    model = _draw(library.Model(inputs, L.Dense(2)(shared(shared(inputs)))))
    kernel, bias = (weight.astype(np.float64) for weight in _weights(model)[:2])
    z = np.concatenate([_X @ kernel, np.maximum(_X @ kernel + bias, 0) @ kernel])
    (row,) = calibrate_init(model, _X).layers
    new_kernel, new_bias = _weights(model)[:2]
    np.testing.assert_allclose(new_kernel, row.scale * kernel, rtol=1e-5)
    np.testing.assert_array_equal((z + new_bias / row.scale > 0).sum(axis=0), 135)
    # The second call has other inputs by now: what is reported is counted.
    zeros = count_relu_zeros(model, _X)
    assert (row.zeros, row.units) == (zeros.fraction_per_layer["shared"], 12)
    assert zeros.outputs["shared"] == 180 * 12


@BOTH
def test_an_error_half_way_leaves_the_model_as_it_was(library, monkeypatch):
    model = _mlp(library, _masked)
    before, solved, solve = _weights(model), [], calibrate.solve

    def fails_at_the_second(*args):
        solved.append(args)
        if len(solved) == 2:
            raise RuntimeError("no solution")
        return solve(*args)

    monkeypatch.setattr(calibrate, "solve", fails_at_the_second)
    with pytest.raises(RuntimeError, match="no solution"):
        calibrate_init(model, _X, "lp")
    _assert_weights(model, before)


def test_seeds_decide_samples_and_nothing_global_is_touched():
    def run(seed, x=_X):
        model = _mlp(keras, _masked)
        state = np.random.get_state()[1].copy()
        report = calibrate_init(model, x, "lp", n_samples=40, seed=seed)
        np.testing.assert_array_equal(np.random.get_state()[1], state)
        return report, _weights(model)

    (report, weights), (again, same), (_, other) = run(0), run(0), run(1)
    assert report == again
    assert report.samples == 40
    for weight, value in zip(weights, same, strict=True):
        np.testing.assert_array_equal(weight, value)
    assert not np.array_equal(weights[1], other[1])


@BOTH
def test_samples_may_be_a_dict_a_list_or_a_dataset(library):
    L = library.layers
    one, two = library.Input((5,), name="one"), library.Input((7,), name="two")
    model = _draw(library.Model({"one": one, "two": two}, L.Dense(6, "relu", name="a")(L.Concatenate()([one, two]))))
    parts = {"one": _X[:, :5], "two": _X[:, 5:]}
    calibrate_init(model, parts)
    bias = compat.to_numpy("bias", model.get_layer("a").bias).copy()
    np.testing.assert_array_equal(count_relu_zeros(model, parts).per_unit["a"], 23)
    model = _mlp(library)
    report = calibrate_init(model, tf.data.Dataset.from_tensor_slices((_X, np.zeros(90))).batch(32), n_samples=50)
    assert report.samples == 50
    np.testing.assert_array_equal(count_relu_zeros(model, _X[:50]).per_unit["a"], 13)
    assert np.all(np.isfinite(bias))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "bayes"}, "`method` must be one of 'bias', 'lp', 'none', .* Received: method='bayes'"),
        ({"objective": "on"}, "`objective` must be one of"),
        ({"solver": "simplex"}, "`solver` must be one of"),
        ({"on_fraction": 1}, "`on_fraction` must be a float in .0, 1.. Received: on_fraction=1"),
        ({"on_fraction": float("nan")}, "`on_fraction` must be a finite float"),
        ({"radius": -0.1}, "`radius` must be a float of at least 0. Received: radius=-0.1"),
        ({"bias_radius": -1}, "`bias_radius` must be"),
        ({"margin": 0}, "`margin` must be a positive float. Received: margin=0"),
        ({"n_samples": 1}, "`n_samples` must be an int of at least 2. Received: n_samples=1"),
        ({"calibrate_scale": "no"}, "`calibrate_scale` must be a bool. Received: calibrate_scale='no'"),
        ({"seed": -1}, "`seed` must be a non-negative int"),
        ({"x": _X[:1]}, "`x` must have at least 2 samples. Received: 1"),
        ({"x": np.where(_X == _X[3, 4], np.nan, _X)}, "`x` must be finite. Received: nan"),
        ({"x": np.where(_X == _X[3, 4], -np.inf, _X), "method": "lp"}, "`x` must be finite. Received: -inf"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(arguments, message):
    model = _mlp(keras)
    before = _weights(model)
    with pytest.raises(ValueError, match=message):
        calibrate_init(model, **({"x": _X} | arguments))
    _assert_weights(model, before)


def test_outputs_that_are_not_finite_are_refused_and_nothing_changes():
    model = _mlp(keras)
    model.layers[0].kernel.assign(np.full((12, 8), 3e38))
    before = _weights(model)
    for function in (calibrate_init, lambda *args: calibrate_init(*args, method="lp"), generalization_gap):
        with pytest.raises(
            ValueError, match="What the model 'sequential.*' puts out for `x` must be finite. Received:"
        ):
            function(model, _X)
        _assert_weights(model, before)


@BOTH
def test_models_without_anything_to_calibrate_are_refused(library):
    L = library.layers
    with pytest.raises(TypeError, match="Expected a layer or model"):
        calibrate_init(5, _X)
    with pytest.raises(ValueError, match="not built"):
        calibrate_init(library.Sequential([L.Dense(3, "relu")]), _X)
    with pytest.raises(ValueError, match="must have a ReLU"):
        calibrate_init(library.Sequential([L.Input((12,)), L.Dense(3)]), _X)
    only = library.Sequential([L.Input((12,)), L.Dense(3, "relu", use_bias=False, name="d")])
    with pytest.raises(ValueError, match="a layer with a kernel, a bias and a ReLU. Received: d .Dense, no bias"):
        calibrate_init(only, _X)


@BOTH
def test_the_mixed_difference_is_that_of_the_closed_form_and_the_model_is_left_as_it_was(library):
    model = _draw(
        library.Sequential([library.layers.Input((12,)), Masked(library.layers.Dense(1), sparsity=0.5, seed=0)])
    )
    (masked,) = masked_kernels(model)
    mask = masked.mask_value()[:, 0]
    # Off the mask is what neither counts nor may be lost.
    w = compat.to_numpy("kernel", masked.kernel)
    compat.assign(masked.kernel, np.where(mask[:, None], w, 50.0))
    before = _weights(model)
    rms = np.sqrt(np.mean(compat.to_numpy("kernel", masked.kernel)[mask] ** 2))
    gap = generalization_gap(model, _X, relative_size=0.01, perturbations=60)
    _assert_weights(model, before)
    # dw.(x' - x) is normal with standard deviation 0.01 rms ||x'_S - x_S||; its absolute mean sqrt(2 / pi) of that.
    distances = np.linalg.norm((_X[:, None] - _X[None])[..., mask], axis=-1)
    expected = 0.01 * rms * np.sqrt(2 / np.pi) * distances.sum() / (90 * 89)
    # In 6 dimensions the mean of |dw.d| varies by about 30% from one perturbation to the other, that of 60 by 4%.
    assert gap == pytest.approx(expected, rel=0.2)
    assert generalization_gap(model, 2 * _X, 0.01, 60) == pytest.approx(2 * gap, rel=1e-3)
    assert generalization_gap(model, _X, 0.02, 60) == pytest.approx(2 * gap, rel=1e-3)
    assert generalization_gap(model, _X, 0.01, 2, seed=0) != generalization_gap(model, _X, 0.01, 2, seed=1)


def test_each_perturbation_of_the_weights_is_another_one():
    dense = _draw(keras.Sequential([keras.Input((12,)), keras.layers.Dense(3)]))
    # Two samples have one partner each: only the perturbations differ.
    assert len({generalization_gap(dense, _X[:2], perturbations=number) for number in (1, 2, 3)}) == 3


def test_the_mixed_difference_of_what_is_a_sum_of_both_is_0_and_errors_name_what_is_wrong():
    dense = keras.layers.Dense(3)
    model = _draw(keras.Sequential([keras.layers.Input((12,)), dense]))
    assert generalization_gap(model, _X) > 1e-3
    dense.kernel.trainable = False
    # The biases alone move: rounding is left.
    assert generalization_gap(model, _X) < 1e-6
    for arguments, message in (
        ({"relative_size": 0.0}, "`relative_size` must be a positive float"),
        ({"perturbations": 0}, "`perturbations` must be a positive int. Received: perturbations=0"),
        ({"x": _X[:1]}, "`x` must have at least 2 samples"),
    ):
        with pytest.raises(ValueError, match=message):
            generalization_gap(model, **({"x": _X} | arguments))
    dense.trainable = False
    with pytest.raises(ValueError, match="must have trainable variables"):
        generalization_gap(model, _X)
