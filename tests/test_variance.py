"""Gains and standard deviations: exact, against closed forms written out here."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
import tf_keras
from scipy import special

from keras_sparse_init import gain
from keras_sparse_init.arguments import check_finite, check_positive
from keras_sparse_init.variance import weight_std

MASK = np.array([[1, 0, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
FAN_IN = np.array([[4, 1, 3, 0]])
FAN_OUT = np.array([[2], [3], [1], [2], [0]])


# Gains.


@pytest.mark.parametrize(
    ("activation", "slope", "expected"),
    [
        ("relu", None, math.sqrt(2)),
        ("leaky_relu", 0.2, 1.3867505),
        ("leaky_relu", None, 1.3867505),
        ("leaky_relu", 0.0, math.sqrt(2)),
        ("leaky_relu", 1.0, 1.0),
        ("leaky_relu", -1.0, 1.0),
        ("leaky_relu", 0.01, 1.4141428569978354),
        ("tanh", None, 5 / 3),
        ("selu", None, 3 / 4),
        ("linear", None, 1.0),
        ("sigmoid", None, 1.0),
        ("hard_sigmoid", None, 1.0),
        ("softmax", None, 1.0),
        (None, None, 1.0),
    ],
)
def test_gain_has_the_customary_value(activation, slope, expected):
    assert gain(activation, slope) == pytest.approx(expected, abs=5e-8)


ACTIVATIONS = {
    "silu": lambda z: z * special.expit(z),
    "swish": lambda z: z * special.expit(z),
    "gelu": lambda z: z * special.ndtr(z),
    "elu": lambda z: np.where(z > 0, z, np.expm1(z)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gain_makes_the_second_moment_of_the_activation_1(activation):
    """A trapezoid rule of its own: its error is the 2nd derivative's, 1e-9 at this step, elu's kink on a node."""
    z = np.linspace(-12, 12, 2 * 120_000 + 1)
    second_moment = np.trapezoid(ACTIVATIONS[activation](z) ** 2 * np.exp(-(z**2) / 2), z) / math.sqrt(2 * math.pi)
    assert gain(activation) ** 2 * second_moment == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_gain_of_a_piecewise_linear_activation_is_its_second_moments_too(activation):
    z = np.linspace(-12, 12, 2 * 120_000 + 1)
    f = np.asarray(getattr(keras.activations, activation)(z))
    second_moment = np.trapezoid(f**2 * np.exp(-(z**2) / 2), z) / math.sqrt(2 * math.pi)
    assert gain(activation) ** 2 * second_moment == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])
@pytest.mark.parametrize(
    "activation", ["relu", "tanh", "selu", "linear", "sigmoid", "softmax", "silu", "swish", "gelu", "elu"]
)
def test_gain_accepts_the_activation_function_of_either_keras(library, activation):
    assert gain(library.activations.get(activation)) == gain(activation)


def test_gain_accepts_keras_leaky_relu():
    assert gain(keras.activations.leaky_relu) == gain("leaky_relu")
    assert gain(keras.activations.leaky_relu, 0.1) == gain("leaky_relu", 0.1)


@pytest.mark.parametrize(
    ("activation", "slope", "message"),
    [
        ("rely", None, "`activation` must be one of .*leaky_relu.*activation='rely'"),
        (3, None, "activation=3"),
        (len, None, "activation=<built-in function len>"),
        ("relu", 0.1, "`negative_slope`.*activation='relu', negative_slope=0.1"),
        (None, 0.1, "`negative_slope`.*negative_slope=0.1"),
        ("leaky_relu", math.nan, "`negative_slope` must be a finite float.*negative_slope=nan"),
        ("leaky_relu", math.inf, "negative_slope=inf"),
        ("leaky_relu", "0.2", "negative_slope='0.2'"),
        ("leaky_relu", True, "negative_slope=True"),
    ],
)
def test_gain_of_bad_input_is_an_error_that_names_it(activation, slope, message):
    with pytest.raises(ValueError, match=message):
        gain(activation, slope)


# Standard deviations.


def full_std(*args, **kwargs):
    return np.broadcast_to(weight_std((5, 4), *args, **kwargs), (5, 4))


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.3, 7])
@pytest.mark.parametrize(
    ("mode", "fan"),
    [("fan_in", FAN_IN + 0 * FAN_OUT), ("fan_out", FAN_OUT + 0 * FAN_IN), ("fan_avg", (FAN_IN + FAN_OUT) / 2)],
)
def test_unit_std_is_the_root_of_scale_over_the_fan_of_the_units_a_weight_connects(mode, fan, scale):
    expected = np.sqrt(scale / np.maximum(fan, 1))
    np.testing.assert_array_equal(full_std(MASK, scale=scale, mode=mode), expected)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(("mode", "fan"), [("fan_in", 5), ("fan_out", 4), ("fan_avg", 4.5)])
def test_layer_std_takes_the_dense_fan_times_the_density(mode, fan, scale):
    expected = np.full((5, 4), math.sqrt(scale / (fan * 8 / 20)))
    np.testing.assert_allclose(full_std(MASK, scale=scale, mode=mode, granularity="layer"), expected, rtol=1e-15)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(("mode", "fan"), [("fan_in", 5), ("fan_out", 4), ("fan_avg", 4.5)])
@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
def test_dense_std_does_not_look_at_the_mask(mode, fan, scale, mask):
    expected = np.full((5, 4), math.sqrt(scale / fan))
    np.testing.assert_array_equal(full_std(mask, scale=scale, mode=mode, granularity="dense"), expected)


@pytest.mark.parametrize("granularity", ["unit", "effective", "layer", "dense"])
@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (None, (6, 8)),
        ("conv", (3, 2, 6, 12)),
        ("conv_transpose", (3, 2, 6, 12)),
        ("depthwise", (3, 2, 6, 2)),
        ("lstm", (6, 8)),
        ("gru", (6, 12)),
        ("embedding", (6, 8)),
        ("abc,cde->abde", (6, 2, 4)),
        (None, (9,)),
        (None, ()),
    ],
)
def test_an_all_ones_mask_changes_nothing_in_any_granularity(granularity, mode, layout, shape):
    masked = weight_std(shape, np.ones(shape), layout, 2.0, mode, granularity)
    dense = weight_std(shape, None, layout, 2.0, mode)
    np.testing.assert_array_equal(np.broadcast_to(masked, shape), np.broadcast_to(dense, shape))


@pytest.mark.parametrize("granularity", ["unit", "effective", "layer", "dense"])
@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
def test_an_empty_mask_gives_a_finite_std(granularity, mode):
    fan = {"fan_in": 5, "fan_out": 4, "fan_avg": 4.5}[mode] if granularity == "dense" else 1
    expected = np.full((5, 4), math.sqrt(2 / fan))
    np.testing.assert_array_equal(full_std(np.zeros((5, 4)), scale=2.0, mode=mode, granularity=granularity), expected)


def test_fans_below_1_count_as_1():
    """A density of 1/20 of a dense fan of 5 is a quarter of a connection."""
    mask = np.zeros((5, 4))
    mask[0, 0] = 1
    np.testing.assert_array_equal(full_std(mask, scale=3.0, granularity="layer"), math.sqrt(3))


@pytest.mark.parametrize(
    ("layout", "shape", "axes"),
    [
        ("conv", (3, 3, 5, 4), (0, 1, 2)),
        ("conv_transpose", (3, 3, 5, 4), (0, 1, 3)),
        ("depthwise", (3, 3, 5, 2), (0, 1)),
    ],
)
def test_unit_std_follows_the_layout(layout, shape, axes):
    mask = np.random.default_rng(0).random(shape) < 0.3
    expected = np.sqrt(2 / np.maximum(mask.sum(axis=axes, keepdims=True), 1))
    std = weight_std(shape, mask, layout, scale=2.0)
    np.testing.assert_array_equal(np.broadcast_to(std, shape), np.broadcast_to(expected, shape))


@pytest.mark.parametrize("granularity", ["unit", "effective", "layer", "dense"])
def test_an_embeddings_std_in_fan_in_mode_is_the_root_of_scale(granularity):
    std = full_std(MASK, "embedding", scale=3.0, granularity=granularity)
    np.testing.assert_array_equal(std, np.full((5, 4), math.sqrt(3)))


def test_std_is_float64_and_broadcasts_to_the_kernel():
    std = weight_std((300, 100), np.ones((300, 100)))
    assert std.dtype == np.float64
    assert std.shape == (1, 100)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scale": 0.0}, "`scale` must be a positive float. Received: scale=0.0"),
        ({"scale": -1}, "`scale` must be a positive float. Received: scale=-1"),
        ({"scale": math.nan}, "scale=nan"),
        ({"scale": math.inf}, "scale=inf"),
        ({"scale": "2"}, "scale='2'"),
        ({"scale": None}, "scale=None"),
        ({"scale": True}, "scale=True"),
        ({"mode": "fan"}, "`mode` must be one of 'fan_in', 'fan_out', 'fan_avg'. Received: mode='fan'"),
        ({"mode": None}, "mode=None"),
        (
            {"granularity": "units"},
            "`granularity` must be one of 'unit', 'effective', 'layer', 'dense'.*='units'",
        ),
        ({"mask": np.ones((4, 5))}, r"`mask`.*\(5, 4\).*\(4, 5\)"),
        ({"mask": 2 * np.ones((5, 4))}, "`mask` must consist of 0 and 1"),
        ({"layout": "lstn"}, "kernel_layout='lstn'"),
    ],
)
def test_bad_input_is_an_error_that_names_it(kwargs, message):
    with pytest.raises(ValueError, match=message):
        weight_std((5, 4), **kwargs)


@pytest.mark.parametrize("shape", [(0, 3), (3, None)])
def test_the_std_of_an_empty_or_unknown_shape_is_an_error(shape):
    with pytest.raises(ValueError, match="`shape` must have positive integer dimensions"):
        weight_std(shape)


@pytest.mark.parametrize("number", [2, 2.0, np.float32(2), np.int64(2)])
def test_numbers_of_numpy_are_numbers(number):
    assert check_positive("scale", number) == check_finite("scale", number) == 2.0
    assert isinstance(check_positive("scale", number), float)


@pytest.mark.parametrize("activation", [["relu"], 3, np.ones(2)])
def test_what_is_no_activation_is_refused_by_name(activation):
    with pytest.raises(ValueError, match="`activation` must be one of"):
        gain(activation)
