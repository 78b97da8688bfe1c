"""Magnitude pruning: schedules and masks as tfmot's, and training with them in both Kerases and on every backend."""

from __future__ import annotations

import importlib.util
import itertools
import json
import operator
import os
import subprocess
import sys
import warnings

import keras
import numpy as np
import pruning_checks
import pytest
import tensorflow as tf
import tf_keras
from pruning_checks import Recorder, X, Y, assert_same, fit, kernels, mask_values, network

from keras_sparse_init import Masked, SparseHeNormal, masked_kernels, masks, sparsify, strip
from keras_sparse_init.fans import kernel_layout
from keras_sparse_init.mask_updates.magnitude import (
    global_magnitude_masks,
    kept,
    lamp_masks,
    lamp_scores,
    magnitude_mask,
)
from keras_sparse_init.mask_updates.pruning import ConstantSparsity, MagnitudePruning, PolynomialDecay, magnitude_prune
from keras_sparse_init.slots import slots_of

LIBRARIES = pytest.mark.parametrize("library", [keras, tf_keras], ids=["keras", "tf_keras"])


@pytest.fixture(scope="module")
def tfmot():
    """tfmot's own modules: the reference."""
    from tensorflow_model_optimization.python.core.sparsity.keras import pruning_impl
    from tensorflow_model_optimization.sparsity import keras as sparsity

    return sparsity, pruning_impl


# Schedules.

POLYNOMIALS = [
    dict(initial_sparsity=0.0, final_sparsity=0.9, begin_step=0, end_step=300),
    dict(initial_sparsity=0.5, final_sparsity=0.95, begin_step=37, end_step=431, power=2.5, frequency=7),
    dict(initial_sparsity=0.1, final_sparsity=0.87, begin_step=3, end_step=300, power=1, frequency=1),
    dict(initial_sparsity=0.8, final_sparsity=0.2, begin_step=10, end_step=100, power=4, frequency=13),
]
CONSTANTS = [
    dict(target_sparsity=0.0, begin_step=0),
    dict(target_sparsity=0.9, begin_step=5, frequency=10),
    dict(target_sparsity=0.333, begin_step=5, end_step=105, frequency=10),
    dict(target_sparsity=0.5, begin_step=20, end_step=20, frequency=1),
]


@pytest.mark.parametrize("arguments", [*POLYNOMIALS, *CONSTANTS])
def test_a_schedule_is_tfmots_at_every_step(tfmot, arguments):
    name = "ConstantSparsity" if "target_sparsity" in arguments else "PolynomialDecay"
    ours = {"ConstantSparsity": ConstantSparsity, "PolynomialDecay": PolynomialDecay}[name](**arguments)
    theirs = getattr(tfmot[0], name)(**arguments)
    differing = 0
    for step in range(500):
        due, sparsity = ours(step)
        expected_due, expected = theirs(step)
        assert due is bool(expected_due), step
        assert isinstance(sparsity, float)
        # TensorFlow's power is not always the nearest float32: the last bit may differ.
        assert abs(np.float32(sparsity) - expected.numpy()) <= np.spacing(np.float32(max(sparsity, 0.25))), step
        differing += np.float32(sparsity) != expected.numpy()
    assert differing <= 2


def test_the_arguments_have_tfmots_order():
    assert ConstantSparsity(0.5, 1, 20, 3) == ConstantSparsity(
        target_sparsity=0.5, begin_step=1, end_step=20, frequency=3
    )
    assert PolynomialDecay(0.1, 0.5, 1, 20, 2, 3) == PolynomialDecay(
        initial_sparsity=0.1, final_sparsity=0.5, begin_step=1, end_step=20, power=2, frequency=3
    )
    assert (ConstantSparsity(0.5, 1).end_step, ConstantSparsity(0.5, 1).frequency) == (-1, 100)
    assert (PolynomialDecay(0.1, 0.5, 1, 2).power, PolynomialDecay(0.1, 0.5, 1, 2).frequency) == (3, 100)


@pytest.mark.parametrize("schedule", [ConstantSparsity(0.5, 1, 20), PolynomialDecay(0.1, 0.5, 1, np.int64(20), 2.5)])
def test_a_schedule_comes_back_from_its_config(schedule):
    config = json.loads(json.dumps(schedule.get_config()))
    assert type(schedule).from_config(config) == schedule


def test_a_decay_in_a_single_step_is_a_step():
    schedule = PolynomialDecay(0.25, 0.5, begin_step=10, end_step=10)
    assert [schedule(step) for step in (9, 10, 11)] == [(False, 0.25), (True, 0.5), (False, 0.5)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantSparsity(1.0, 0), r"`target_sparsity` must be a float in \[0, 1\)"),
        (lambda: PolynomialDecay(-0.1, 0.5, 0, 1), "`initial_sparsity` must be a float"),
        (lambda: PolynomialDecay(0, float("nan"), 0, 1), "`final_sparsity` must be a float"),
        (lambda: ConstantSparsity(0.5, -1), "`begin_step` must not be negative. Received: begin_step=-1"),
        (lambda: ConstantSparsity(0.5, 1.5), "`begin_step` must be an int. Received: begin_step=1.5"),
        (lambda: ConstantSparsity(0.5, 5, 4), "`end_step` must be at least `begin_step`, or -1. .*end_step=4"),
        (lambda: ConstantSparsity(0.5, 5, -2), "`end_step` must be at least `begin_step`, or -1"),
        (lambda: PolynomialDecay(0, 0.5, 5, -1), "`end_step` must be at least `begin_step`. Received"),
        (lambda: ConstantSparsity(0.5, 0, frequency=0), "`frequency` must be positive"),
        (lambda: PolynomialDecay(0, 0.5, 0, 1, power=0), "`power` must be a positive number"),
    ],
)
def test_impossible_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Masks.


def tfmots_mask(tfmot, weights, sparsity, block_size=(1, 1), m_by_n=None):
    """What tfmot's pruning makes of these weights."""
    weights = tf.constant(weights)
    pruning = tfmot[1].Pruning(
        lambda: 1,
        [(weights, None, None)],
        tfmot[0].ConstantSparsity(sparsity, 0),
        list(block_size),
        "AVG",
        sparsity_m_by_n=m_by_n,
    )
    return pruning._maybe_update_block_mask(weights)[1].numpy()


def random_kernel(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


SHAPES = [(1,), (3,), (7, 5), (3, 3, 4, 6), (64, 33)]
SPARSITIES = [0.0, 0.1, 0.5, 0.75, 0.9, 0.95, 0.999]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_is_tfmots(tfmot, shape):
    for sparsity, dtype in itertools.product(SPARSITIES, (np.float32, np.float64)):
        weights = random_kernel(shape, dtype=dtype)
        expected = tfmots_mask(tfmot, weights, sparsity)
        mask = magnitude_mask(weights, sparsity)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, expected)


def test_a_mask_is_tfmots_for_every_number_of_weights(tfmot):
    """Where round(size * (1 - sparsity)) is a tie or nearly one."""
    for size, sparsity in itertools.product(range(1, 41), (0.5, 0.25, 0.9, 0.7)):
        weights = random_kernel((size,), seed=size)
        expected = tfmots_mask(tfmot, weights, sparsity)
        np.testing.assert_array_equal(magnitude_mask(weights, sparsity), expected)
        assert expected.sum() == kept(size, sparsity)


@pytest.mark.parametrize(
    "weights",
    [
        np.zeros((4, 5)),
        np.ones((4, 5)),
        np.array([0.0, 0.0, 0.0, 2.0, -1.0, 1.0, 1.0, -1.0, 3.0]),
        np.array([[1.0, -1.0], [-1.0, 0.0]]),
        np.round(random_kernel((30, 30)) * 3) / 3,
    ],
    ids=["zeros", "ones", "ties", "signs", "rounded"],
)
def test_equal_weights_are_kept_together_as_in_tfmot(tfmot, weights):
    for sparsity in SPARSITIES:
        weights = weights.astype(np.float32)
        np.testing.assert_array_equal(magnitude_mask(weights, sparsity), tfmots_mask(tfmot, weights, sparsity))


def test_half_types_are_pruned_as_they_are():
    weights = random_kernel((40, 30))
    for dtype in (np.float16, tf.bfloat16.as_numpy_dtype):
        half = weights.astype(dtype)
        np.testing.assert_array_equal(magnitude_mask(half, 0.8), magnitude_mask(half.astype(np.float32), 0.8))


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_nan_is_not_hidden_behind_a_zero():
    weights = random_kernel((8, 4))
    weights[3, 2] = np.nan
    for rule in (None, masks.NM(1, 4), masks.ConstantFanIn(0.5), masks.Block(0.5, 2)):
        assert magnitude_mask(weights, 0.75, rule)[3, 2] == 1
    assert global_magnitude_masks([weights, 2 * random_kernel((3, 3))], 0.9)[0][3, 2] == 1


def test_nothing_is_left_of_nothing():
    for rule in (None, masks.ConstantFanIn(0.5), masks.Block(0.5, 2)):
        assert magnitude_mask(np.zeros((0, 4)), 0.5, rule).shape == (0, 4)
    empty, full = global_magnitude_masks([np.zeros((0, 4)), np.array([1.0, 2.0])], 0.5)
    assert empty.shape == (0, 4) and full.tolist() == [0, 1]


@pytest.mark.parametrize("block_size", [(2, 2), (4, 1), (1, 5), (4, 5)])
def test_a_block_mask_is_tfmots(tfmot, block_size):
    for sparsity in SPARSITIES:
        weights = random_kernel((12, 20))
        expected = tfmots_mask(tfmot, weights, sparsity, block_size)
        np.testing.assert_array_equal(magnitude_mask(weights, sparsity, masks.Block(0.5, block_size)), expected)


def slices(index, block):
    return tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, block, strict=True))


@pytest.mark.parametrize(("shape", "block_size"), [((7, 10), (3, 4)), ((2, 3, 5, 6), (2, 4)), ((3, 4, 4), (2, 2, 3))])
def test_a_block_mask_is_that_of_a_slow_loop(shape, block_size):
    """Also where the block does not divide the kernel."""
    weights = random_kernel(shape)
    block = (1,) * (len(shape) - len(block_size)) + block_size
    means = {}
    for index in itertools.product(*(range(-(-n // b)) for n, b in zip(shape, block, strict=True))):
        means[index] = np.abs(weights[slices(index, block)]).mean()
    for sparsity in (0.0, 0.3, 0.75, 0.99):
        expected = np.zeros(shape, int)
        for index in sorted(means, key=means.get)[-kept(len(means), sparsity) :]:
            expected[slices(index, block)] = 1
        np.testing.assert_array_equal(magnitude_mask(weights, sparsity, masks.Block(0.5, block_size)), expected)


@pytest.mark.parametrize("shape", [(16, 5), (3, 3, 8, 5)])
def test_an_nm_mask_is_tfmots(tfmot, shape):
    """tfmot calls N:M what has N zeros."""
    for zeros, m in ((2, 4), (1, 4), (3, 4), (6, 8)):
        expected = tfmots_mask(tfmot, random_kernel(shape), 0.0, m_by_n=(zeros, m))
        mask = magnitude_mask(random_kernel(shape), zeros / m, masks.NM(m - zeros, m))
        np.testing.assert_array_equal(mask, expected)


def slow_largest(values, count):
    """Places of the largest, the first of equal ones."""
    return sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:count]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("n", "m", "axis"), [(2, 4, 0), (1, 4, "input"), (3, 8, 2), (5, 24, 2), (20, 24, -2), (1, 1, 0)]
)
def test_an_nm_mask_is_that_of_a_slow_loop(n, m, axis, ties):
    weights = random_kernel((4, 3, 24, 5))
    weights = np.round(weights) if ties else weights
    lines = np.moveaxis(weights, 2 if axis == "input" else axis, -1)
    expected = np.zeros(lines.shape, int)
    for index in np.ndindex(lines.shape[:-1]):
        for start in range(0, lines.shape[-1], m):
            for place in slow_largest(lines[index][start : start + m], n):
                expected[index][start + place] = 1
    expected = np.moveaxis(expected, -1, 2 if axis == "input" else axis)
    np.testing.assert_array_equal(magnitude_mask(weights, 1 - n / m, masks.NM(n, m, axis)), expected)


def test_an_nm_mask_never_has_fewer_than_n_and_approaches_them_with_the_sparsity():
    weights = random_kernel((32, 6))
    counts = [
        magnitude_mask(weights, s, masks.NM(2, 8)).reshape(4, 8, 6).sum(axis=1) for s in (0, 0.25, 0.5, 0.75, 0.9)
    ]
    assert [np.unique(count).tolist() for count in counts] == [[8], [6], [4], [2], [2]]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((40, 6), None),
        ((3, 3, 4, 6), None),
        ((3, 3, 6, 4), "conv_transpose"),
        ((3, 3, 8, 2), "depthwise"),
        ((7, 3), None),
    ],
)
def test_a_constant_fan_in_mask_is_that_of_a_slow_loop(shape, layout, ties):
    weights = random_kernel(shape)
    weights = np.round(2 * weights) if ties else weights
    outputs = kernel_layout(layout, shape).output_axes
    units = {}
    for index in np.ndindex(shape):
        units.setdefault(tuple(index[axis] for axis in outputs), []).append(index)
    for sparsity in (0.0, 0.5, 0.8, 0.99):
        expected = np.zeros(shape, int)
        for places in units.values():
            for place in slow_largest([weights[i] for i in places], kept(len(places), sparsity)):
                expected[places[place]] = 1
        mask = magnitude_mask(weights, sparsity, masks.ConstantFanIn(0.5), layout)
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("ties", [False, True])
def test_global_masks_meet_the_budget_with_one_threshold(ties):
    arrays = [random_kernel((20, 10)), 3 * random_kernel((5, 4, 3), 1), 0.5 * random_kernel((30, 7), 2)]
    arrays = [np.round(array) if ties else array for array in arrays]
    total = sum(array.size for array in arrays)
    for sparsity in (0.0, 0.3, 0.5, 0.9, 0.97):
        found = global_magnitude_masks(arrays, sparsity)
        assert sum(int(mask.sum()) for mask in found) == round(total * (1 - sparsity))
        smallest = min(np.abs(a[m == 1]).min() for a, m in zip(arrays, found, strict=True) if m.sum() > 1)
        largest = max((np.abs(a[m == 0]).max() for a, m in zip(arrays, found, strict=True) if not m.all()), default=0)
        assert smallest >= largest
        if sparsity == 0.5:
            # Unlike a layer's.
            assert len({round(float(mask.mean()), 2) for mask in found}) == 3


def test_global_pruning_empties_no_kernel():
    arrays = [random_kernel((20, 10)), 1e-6 * random_kernel((5, 4)), np.zeros((3, 3))]
    found = global_magnitude_masks(arrays, 0.9)
    assert [int(mask.sum()) for mask in found] == [21, 1, 1]
    assert np.abs(arrays[1][found[1] == 1]) == np.abs(arrays[1]).max()
    # The budget is smaller than the number of kernels.
    assert [int(mask.sum()) for mask in global_magnitude_masks(arrays, 0.999)] == [1, 1, 1]


def test_lamp_scores_by_the_definition():
    weights = random_kernel((4, 5))
    squares = np.square(weights.astype(np.float64))
    expected = [s / squares[squares >= s].sum() for s in squares.ravel()]
    np.testing.assert_allclose(lamp_scores(weights).ravel(), expected, rtol=1e-6)
    # The scores of a kernel do not depend on its scale, however small.
    np.testing.assert_allclose(lamp_scores(1e-25 * weights).ravel(), expected, rtol=1e-4)
    assert lamp_scores(weights).max() == 1
    assert not lamp_scores(np.zeros((3, 2))).any()
    # Of equals the first come first; what is not a number is not hidden.
    np.testing.assert_allclose(lamp_scores(np.array([2.0, -2.0, 1.0])), [1, 1 / 2, 1 / 9])
    assert lamp_scores(np.array([2.0, np.nan, 1.0])).tolist() == [1, np.inf, 1 / 5]


def test_lamp_spreads_zeros_whatever_the_scales_of_the_kernels():
    """Where one threshold for all would leave single weights of the small kernel, see above."""
    arrays = [random_kernel((20, 10)), 1e-6 * random_kernel((5, 4), 1), np.zeros((3, 3))]
    found = lamp_masks(arrays, 0.9)
    assert sum(int(mask.sum()) for mask in found) == kept(229, 0.9)
    assert found[1].sum() > 3
    scores = np.concatenate([lamp_scores(array).ravel() for array in arrays[:2]])
    chosen = np.concatenate([mask.ravel() for mask in found[:2]]) == 1
    assert scores[chosen].min() >= scores[~chosen].max()
    rescaled = lamp_masks([1e3 * arrays[0], arrays[1], arrays[2]], 0.9)
    for mask, expected in zip(rescaled, found, strict=True):
        np.testing.assert_array_equal(mask, expected)


@LIBRARIES
def test_pruning_by_lamp_meets_the_sparsity_of_all_kernels_together(library):
    model = network(library)
    fit(model, MagnitudePruning(ConstantSparsity(0.7, 1, 1), "lamp"), epochs=1)
    found = mask_values(model)
    assert sum(int(mask.sum()) for mask in found) == kept(sum(mask.size for mask in found), 0.7)
    assert len({round(float(mask.mean()), 2) for mask in found}) > 1


@LIBRARIES
def test_a_kernel_that_global_pruning_nearly_empties_is_named(library):
    model = network(library)
    model.layers[-1].layer.set_weights([np.full((16, 3), 1e-9, "float32"), np.zeros(3, "float32")])
    with pytest.warns(UserWarning, match="leaves a single weight to each of these kernels: output/kernel. "):
        fit(model, MagnitudePruning(ConstantSparsity(0.5, 1, 1), "global"), epochs=1)
    assert [int(mask.sum()) for mask in mask_values(model)] == [119, 1]


# tfmot's training and ours.


class EveryMask(tf_keras.callbacks.Callback):
    """Masks, and kernels with what is off the mask left out, after every batch."""

    def __init__(self):
        super().__init__()
        self.masks, self.kernels = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.masks.append(mask_values(self.model))
        self.kernels.append([np.where(m, k, 0) for m, k in zip(self.masks[-1], kernels(self.model), strict=True)])


DECAY = dict(initial_sparsity=0.1, final_sparsity=0.9, begin_step=2, end_step=17, frequency=3)
EVERY_STEP = dict(initial_sparsity=0.0, final_sparsity=0.8, begin_step=0, end_step=20, frequency=1)
CONSTANT = dict(target_sparsity=0.75, begin_step=4, end_step=-1, frequency=5)


@pytest.mark.parametrize(
    ("name", "arguments", "optimizer"),
    [
        ("PolynomialDecay", DECAY, "sgd"),
        ("PolynomialDecay", DECAY, "adam"),
        ("PolynomialDecay", EVERY_STEP, "momentum"),
        ("ConstantSparsity", CONSTANT, "adam"),
    ],
)
def test_training_has_tfmots_masks_and_weights_at_every_step(tfmot, name, arguments, optimizer):
    """Bit for bit, with updates so small that tfmot lets no pruned weight return."""
    make = {
        "sgd": lambda: tf_keras.optimizers.SGD(0.01),
        "momentum": lambda: tf_keras.optimizers.SGD(0.001, momentum=0.9),
        "adam": lambda: tf_keras.optimizers.Adam(0.001),
    }[optimizer]
    their_schedule = getattr(tfmot[0], name)(**arguments)
    theirs = network(tf_keras, make(), wrap=lambda layer: layer)
    theirs = tfmot[0].prune_low_magnitude(theirs, pruning_schedule=their_schedule)
    theirs.compile(make(), "mse")
    ours = network(tf_keras, make())
    their_record, our_record = EveryMask(), EveryMask()
    fit(theirs, tfmot[0].UpdatePruningStep(), their_record)
    our_schedule = {"ConstantSparsity": ConstantSparsity, "PolynomialDecay": PolynomialDecay}[name](**arguments)
    fit(ours, MagnitudePruning(our_schedule), our_record)
    assert len(our_record.masks) == 20
    assert len({int(found[0].sum()) for found in our_record.masks}) > 1
    for step in range(20):
        assert_same(our_record.masks[step], their_record.masks[step])
        assert_same(our_record.kernels[step], their_record.kernels[step])


def test_in_tfmot_alone_a_large_update_brings_a_pruned_weight_back(tfmot):
    """The one difference: gradients of pruned weights are 0 here."""
    arguments = dict(initial_sparsity=0.5, final_sparsity=0.9, begin_step=1, end_step=20, frequency=1)
    theirs = network(tf_keras, wrap=lambda layer: layer)
    theirs = tfmot[0].prune_low_magnitude(theirs, pruning_schedule=tfmot[0].PolynomialDecay(**arguments))
    theirs.compile(tf_keras.optimizers.SGD(1.0), "mse")
    ours = network(tf_keras, tf_keras.optimizers.SGD(1.0))
    their_record, our_record = EveryMask(), EveryMask()
    fit(theirs, tfmot[0].UpdatePruningStep(), their_record)
    fit(ours, MagnitudePruning(PolynomialDecay(**arguments)), our_record)

    def returned(record):
        return sum(
            int((new & ~old).sum())
            for before, after in itertools.pairwise(record.masks)
            for old, new in zip(before, after, strict=True)
        )

    assert returned(their_record) > 0
    assert returned(our_record) == 0


def test_tfmots_schedules_are_accepted(tfmot):
    arguments = dict(initial_sparsity=0.1, final_sparsity=0.9, begin_step=2, end_step=17, frequency=3)
    first, second = network(keras), network(keras)
    fit(first, MagnitudePruning(tfmot[0].PolynomialDecay(**arguments)))
    fit(second, MagnitudePruning(PolynomialDecay(**arguments)))
    assert_same(kernels(first), kernels(second))


# Training, in both Kerases here and on other backends in a process of their own.


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{library.__name__}-{name}")
        for library in (keras, tf_keras)
        for name, check in pruning_checks.cases(library)
    ],
)
def test_training(check):
    check()


@pytest.fixture(scope="module", params=["jax", "torch"])
def results(request):
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    environment = {**os.environ, "KERAS_BACKEND": request.param, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, pruning_checks.__file__]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result.pop("backend") == request.param
    return result


@pytest.mark.parametrize("name", [name for name, _ in pruning_checks.cases(keras)])
def test_training_on_another_backend(results, name):
    assert not results[name], results[name]


OTHER_OPTIMIZERS = {
    keras: ("RMSprop", "Ftrl", "Nadam", "Adafactor", "Lion", "Lamb"),
    tf_keras: ("RMSprop", "Ftrl", "Nadam", "Adagrad", "Adadelta", "Adafactor", "legacy.Adam", "legacy.Ftrl"),
}


@pytest.mark.parametrize(
    ("library", "name"),
    [
        pytest.param(library, name, id=f"{library.__name__}.{name}")
        for library, names in OTHER_OPTIMIZERS.items()
        for name in names
        if hasattr(library.optimizers, name.split(".")[0])
    ],
)
def test_weights_stay_zero_under_every_optimizer(library, name):
    settings = {"momentum": 0.9, "centered": True} if name == "RMSprop" else {}
    make = operator.attrgetter(name)(library.optimizers)
    pruning_checks.check_weights_stay_zero(library, lambda library: make(0.01, **settings))


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer")
def test_slots_inside_a_multi_optimizer_are_found():
    optimizers = keras.optimizers
    inner = optimizers.OptimizerMap(optimizers.Adam(0.05))
    inner["hidden/.*"] = optimizers.SGD(0.05, momentum=0.9)
    pruning_checks.check_weights_stay_zero(keras, lambda library: optimizers.MultiOptimizer(inner))


@LIBRARIES
def test_without_the_reset_of_slots_momentum_would_move_pruned_weights(library, monkeypatch):
    """Then the callback notices and sets them to 0 after each batch."""
    monkeypatch.setattr("keras_sparse_init.mask_updates.pruning.slots_of", lambda optimizer, variable: ())
    recorder, model = Recorder(), network(library, library.optimizers.SGD(0.05, momentum=0.9))
    pruning = MagnitudePruning(ConstantSparsity(0.5, 4, 4))
    first = Recorder()
    fit(model, first, pruning, recorder)
    assert pruning._moved and any(first.off_mask)
    assert not any(recorder.off_mask)


def test_accumulators_are_reset_to_their_initial_value():
    for library, name in itertools.product((keras, tf_keras), ("Adagrad", "Ftrl")):
        kernel = library.Variable(np.ones((2, 2))) if library is keras else tf.Variable(np.ones((2, 2)))
        optimizer = getattr(library.optimizers, name)(initial_accumulator_value=0.25)
        optimizer.build([kernel])
        for slot, initial in slots_of(optimizer, kernel):
            np.testing.assert_array_equal(pruning_checks.to_numpy("slot", slot), initial)
        assert 0.25 in [initial for _, initial in slots_of(optimizer, kernel)]


def test_slots_of_what_is_not_trained_are_none():
    optimizer = keras.optimizers.Adam()
    assert list(slots_of(optimizer, keras.Variable(np.ones(2)))) == []
    assert list(slots_of(None, keras.Variable(np.ones(2)))) == []


def test_static_tfmot_wrappers_are_pruned_like_masked_layers():
    def wrapped(layer):
        from keras_sparse_init.tfmot import static_wrapper

        return static_wrapper(layer)

    schedule = PolynomialDecay(0.1, 0.75, begin_step=3, end_step=18, frequency=3)
    models = [network(tf_keras, "adam", wrap, steps_per_execution=2) for wrap in (Masked, wrapped)]
    for model in models:
        recorder = Recorder()
        fit(model, recorder, MagnitudePruning(schedule))
        assert not any(recorder.off_mask)
    assert_same(mask_values(models[0]), mask_values(models[1]))
    for masked, static in zip(kernels(models[0]), kernels(models[1]), strict=True):
        np.testing.assert_allclose(masked, static, rtol=1e-5, atol=1e-7)


def test_a_sparsified_model_is_pruned_further_and_stripped():
    dense = tf_keras.Sequential([tf_keras.layers.Input((12,)), tf_keras.layers.Dense(20), tf_keras.layers.Dense(3)])
    model = sparsify(dense, 0.5, method="uniform", seed=0)
    start = mask_values(model)
    model.compile("adam", "mse")
    fit(model, MagnitudePruning(PolynomialDecay(0.5, 0.9, 0, 20, frequency=2)))
    for before, after in zip(start, mask_values(model), strict=True):
        assert (before | ~after).all() and after.sum() == round(0.1 * after.size)
    plain = strip(model)
    assert [int(np.count_nonzero(layer.kernel)) for layer in plain.layers] == [24, 6]
    np.testing.assert_allclose(plain.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-5, atol=1e-6)


def test_layers_that_the_first_batch_builds_are_pruned_after_it():
    layers = [Masked(tf_keras.layers.Dense(4, kernel_initializer=SparseHeNormal(seed=1))) for _ in range(2)]
    model = tf_keras.Sequential(layers)
    model.compile("sgd", "mse")
    ours = MagnitudePruning(ConstantSparsity(0.5, 1, 1))
    model.fit(X, Y[:, :1] @ np.ones((1, 4)), verbose=0, batch_size=40, callbacks=[ours])
    assert [int(mask.sum()) for mask in mask_values(model)] == [24, 8]


@LIBRARIES
def test_a_train_step_may_update_several_times(library):
    """Here twice a batch: steps are the optimizer's."""

    class Twice(library.Sequential):
        def train_step(self, data):
            super().train_step(data)
            return super().train_step(data)

    plain = network(library)
    model = Twice(plain.layers)
    model.compile("sgd", "mse", **({"jit_compile": False} if library is keras else {}))
    recorder = Recorder()
    fit(model, MagnitudePruning(ConstantSparsity(0.5, 5, 17, frequency=12)), recorder, epochs=1)
    assert [done for done, _, _ in recorder.begun] == list(range(0, 20, 2))
    assert [int(found[0].sum()) for _, _, found in recorder.begun] == [192] * 2 + [96] * 8


def test_a_callback_may_be_used_for_several_fits():
    schedule = PolynomialDecay(0.0, 0.9, begin_step=3, end_step=27, frequency=4)
    whole, parts, pruning = network(keras, "adam"), network(keras, "adam"), MagnitudePruning(schedule)
    fit(whole, MagnitudePruning(schedule), epochs=3)
    for _ in range(3):
        fit(parts, pruning, epochs=1)
    assert_same(kernels(whole), kernels(parts))


def test_earlier_steps_belong_to_earlier_fits():
    model = network(keras)
    fit(model, epochs=1)
    fit(model, MagnitudePruning(ConstantSparsity(0.5, 5, 5)), epochs=1)
    assert all(mask.all() for mask in mask_values(model))


@LIBRARIES
def test_the_sparsity_is_in_the_history_and_other_callbacks_see_it(library):
    seen = []
    later = library.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs["sparsity"]))
    pruning = MagnitudePruning(PolynomialDecay(0.0, 0.75, begin_step=10, end_step=20, frequency=10))
    model = network(library)
    history = model.fit(X, Y, batch_size=8, epochs=2, verbose=0, validation_data=(X, Y), callbacks=[pruning, later])
    assert history.history["sparsity"] == seen == [0.0, 0.75]
    assert len(history.history["val_loss"]) == 2


@LIBRARIES
@pytest.mark.parametrize("rule", [None, masks.NM(1, 4, axis=0), masks.Block(0.9, (2, 1)), masks.ConstantFanIn(0.5)])
def test_pruning_once(library, rule):
    model = network(library)
    before = kernels(model)
    magnitude_prune(model, 0.75, rule=rule)
    for kernel, old, mask in zip(kernels(model), before, mask_values(model), strict=True):
        np.testing.assert_array_equal(mask, magnitude_mask(old, 0.75, rule))
        np.testing.assert_array_equal(kernel, np.where(mask, old, 0))


@LIBRARIES
def test_layouts_are_those_of_the_layers(library):
    layers = library.layers
    model = library.Sequential(
        [layers.Input((6, 6, 4)), Masked(layers.Conv2DTranspose(6, 3)), Masked(layers.DepthwiseConv2D(3))]
    )
    magnitude_prune(model, 0.5, rule=masks.ConstantFanIn(0.5))
    transposed, depthwise = mask_values(model)
    assert set(transposed.sum(axis=(0, 1, 3))) == {18}
    assert set(depthwise.sum(axis=(0, 1)).ravel()) == {4}


def test_replicas_have_the_same_masks(request):
    if len(tf.config.list_logical_devices("CPU")) < 2:
        pytest.skip("one CPU only: test_distribution was not asked for")
    with request.getfixturevalue("strategy").scope():
        model = network(tf_keras, tf_keras.optimizers.Adam(0.01))
    fit(model, MagnitudePruning(PolynomialDecay(0.0, 0.8, begin_step=0, end_step=20, frequency=5)))
    for kernel in masked_kernels(model):
        for variable in (kernel.kernel, kernel.mask):
            first, second = (value.numpy() for value in variable.values)
            np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(kernel.kernel.numpy() != 0, kernel.mask_value())
    assert mask_values(model)[0].sum() == 38


# Errors.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MagnitudePruning(0.9), TypeError, "`schedule` must be a PolynomialDecay.*Received: schedule=0.9"),
        (lambda: MagnitudePruning(PolynomialDecay), TypeError, "`schedule` must be a PolynomialDecay"),
        (lambda: MagnitudePruning(ConstantSparsity(0.5, 0), "model"), ValueError, "`scope` must be one of"),
        (
            lambda: MagnitudePruning(ConstantSparsity(0.5, 0), rule=masks.Random(0.5)),
            TypeError,
            r"`rule` must be None or an instance of masks.NM, masks.Block or masks.ConstantFanIn. .*Random",
        ),
        (lambda: MagnitudePruning(ConstantSparsity(0.5, 0), rule=masks.NM), TypeError, "`rule` must be None or an"),
        (
            lambda: MagnitudePruning(ConstantSparsity(0.5, 0), "global", masks.NM(2, 4)),
            ValueError,
            "`rule` needs `scope='layer'`",
        ),
        (
            lambda: MagnitudePruning(ConstantSparsity(0.5, 0), "lamp", masks.NM(2, 4)),
            ValueError,
            "`rule` needs `scope='layer'`",
        ),
        (lambda: magnitude_mask(np.ones(4), 1.0), ValueError, "`sparsity` must be a float in"),
        (lambda: global_magnitude_masks([np.ones(4)], -0.1), ValueError, "`sparsity` must be a float in"),
        (lambda: magnitude_mask(np.ones(4), 0.5, masks.Block(0.5, 2)), ValueError, "must not have more axes than"),
        (lambda: magnitude_mask(np.ones((6, 4)), 0.5, masks.NM(2, 4)), ValueError, "`m` must divide the length"),
    ],
)
def test_impossible_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@LIBRARIES
def test_a_model_without_masks_is_refused(library):
    model = network(library, wrap=lambda layer: layer)
    with pytest.raises(ValueError, match="`model` must have masked kernels. .* wrap its layers in `Masked`"):
        fit(model, MagnitudePruning(ConstantSparsity(0.5, 0)))
    with pytest.raises(ValueError, match="`model` must have masked kernels"):
        magnitude_prune(model, 0.5)


@LIBRARIES
def test_a_pattern_that_does_not_fit_is_refused_before_training_with_the_kernels_name(library):
    model = network(library)
    before = kernels(model)
    with pytest.raises(ValueError, match="The kernel 'hidden/kernel' cannot be pruned: `m` must divide"):
        fit(model, MagnitudePruning(ConstantSparsity(0.5, 15), rule=masks.NM(2, 8)))
    assert_same(kernels(model), before)


def test_a_model_that_tfmot_prunes_is_refused(tfmot):
    model = tfmot[0].prune_low_magnitude(network(tf_keras, wrap=lambda layer: layer))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="The layer 'prune_low_magnitude_hidden' is pruned by tfmot"):
        fit(model, MagnitudePruning(ConstantSparsity(0.5, 0)))


def test_no_warning_comes_from_a_plain_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(network(keras, "adam"), MagnitudePruning(PolynomialDecay(0.0, 0.9, 0, 20, frequency=5), "global"))
