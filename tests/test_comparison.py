"""Initializers side by side: against closed forms, and against training the same stack in Keras."""

import dataclasses
import json
import math
import random
import sys

import keras
import numpy as np
import pandas
import pytest
import tf_keras
from statistical import KURTOSIS, normal_bound

from keras_sparse_init import Masked, SparseHeNormal, SparseScaledInit, compare_initializers
from keras_sparse_init.comparison.compare import initial_kernels
from keras_sparse_init.comparison.report import COLUMNS, QUANTITIES
from keras_sparse_init.sampling import TRUNCATED_STD, derive_seed, sample

SIZES = (90, 120, 50, 20)
NAMES = (
    *("zeros", "normal(1)", "normal(0.01)", "truncated_normal(0.01)", "lecun_normal", "lecun_uniform"),
    *("glorot_normal", "glorot_uniform", "he_normal", "he_uniform"),
)
RANDOM = NAMES[1:]


@pytest.fixture(scope="module")
def comparison():
    """All initializers, and sparse ones, on layers that are not square."""
    return compare_initializers(sizes=SIZES, samples=500, epochs=3, sparsity=0.75)


def _std(name, inputs, units):
    """By the textbook."""
    return {
        "normal(1)": 1.0,
        "normal(0.01)": 0.01,
        "truncated_normal(0.01)": 0.01 * TRUNCATED_STD,
        "lecun_normal": math.sqrt(1 / inputs),
        "lecun_uniform": math.sqrt(1 / inputs),
        "glorot_normal": math.sqrt(2 / (inputs + units)),
        "glorot_uniform": math.sqrt(2 / (inputs + units)),
        "he_normal": math.sqrt(2 / inputs),
        "he_uniform": math.sqrt(2 / inputs),
    }[name]


def _kurtosis(name):
    if "uniform" in name:
        return KURTOSIS["uniform"]
    return KURTOSIS["untruncated_normal" if name.startswith("normal") else "truncated_normal"]


def _shapes():
    return list(zip(SIZES, SIZES[1:], strict=False))


@pytest.mark.parametrize("name", RANDOM)
def test_weights_have_the_standard_deviation_of_the_textbook(name, comparison):
    # By the normal law of the mean of w^2.
    for measured, (inputs, units) in zip(comparison[name].values("kernel_std"), _shapes(), strict=True):
        error = math.sqrt((_kurtosis(name) - 1) / (inputs * units))
        assert abs((measured / _std(name, inputs, units)) ** 2 - 1) < normal_bound(len(RANDOM) * 3) * error


@pytest.mark.parametrize("name", RANDOM)
def test_the_first_pre_activation_has_std_sqrt_fan_in_times_that_of_the_weights(name, comparison):
    inputs, units = SIZES[:2]
    expected = inputs * _std(name, inputs, units) ** 2
    # Of mean z^2: the weights' error as above, and that of the samples, 2 tr(G^2) / tr(G)^2 / n with G = W'W, which is
    # (1 / inputs + 1 / units) for independent weights.
    error = (_kurtosis(name) - 1) / (inputs * units) + 2 * (1 / inputs + 1 / units) / 500
    measured = comparison[name].values("pre_activation_std")[0] ** 2
    assert abs(measured / expected - 1) < normal_bound(len(RANDOM)) * math.sqrt(error)


def test_forward_through_a_linear_stack_is_the_product_of_its_kernels():
    run = compare_initializers(["glorot_uniform"], SIZES, "linear", samples=2000, epochs=1)["glorot_uniform"]
    kernels, _ = initial_kernels("glorot_uniform", keras.initializers.GlorotUniform(0), SIZES, seed=0)
    product = np.eye(SIZES[0])
    for measured, kernel in zip(run.values("activation_std"), kernels, strict=True):
        product = product @ kernel
        gram = product.T @ product
        # z = x P: mean z^2 has mean tr(G) / units and, over n samples, the relative variance 2 tr(G^2) / tr(G)^2 / n.
        expected = np.trace(gram) / gram.shape[0]
        error = math.sqrt(2 * np.sum(gram**2) / np.trace(gram) ** 2 / 2000)
        assert abs(measured**2 / expected - 1) < normal_bound(3) * error


def test_backward_a_layer_multiplies_the_std_by_sqrt_fan_out_times_that_of_the_weights():
    # So small that the gradient at the output is that of the targets, which the kernels have no part in.
    small = {"small": keras.initializers.RandomNormal(stddev=1e-4, seed=0)}
    run = compare_initializers(small, SIZES, "linear", samples=1000, epochs=1)["small"]
    last, before = (run.values("activation_gradient_std")[i] for i in (2, 1))
    x = sample(1.0, (1000, 90), derive_seed(0, "inputs0"), distribution="untruncated_normal")
    y = x @ sample(90**-0.5, (90, 20), derive_seed(0, "target"), distribution="untruncated_normal")
    assert last == pytest.approx(y.std(), rel=1e-3)
    # d = g W': mean d^2 is one over 50 units of w'Cw, C = g'g / n, each of relative variance 2 tr(C^2) / tr(C)^2.
    c = y.T @ y / 1000
    error = math.sqrt(2 * np.sum(c**2) / np.trace(c) ** 2 / 50)
    assert abs((before / (math.sqrt(20) * 1e-4 * last)) ** 2 - 1) < normal_bound() * error


@pytest.mark.parametrize(
    "initializer",
    [keras.initializers.HeNormal(seed=5), tf_keras.initializers.GlorotUniform(seed=5), SparseHeNormal(sparsity=0.5)],
)
def test_kernels_are_those_of_the_initializer_with_derived_seeds(initializer):
    run = compare_initializers({"it": initializer}, SIZES, samples=2, epochs=1, seed=3)["it"]
    for layer, shape in enumerate(_shapes(), 1):
        config = initializer.get_config() | {"seed": derive_seed(3, f"layer{layer}/kernel")}
        kernel = np.asarray(type(initializer)(**config)(shape))
        active = kernel[kernel != 0]
        assert run.values("kernel_std")[layer - 1] == float(active.std(dtype=np.float64))
        assert run.values("kernel_mean")[layer - 1] == float(active.mean(dtype=np.float64))


def test_initializers_that_have_no_seed_and_plain_functions_are_called_as_they_are():
    def halves(shape, dtype=None):
        return np.full(shape, 0.5, dtype)

    given = {"constant": keras.initializers.Constant(0.25), "function": halves}
    comparison = compare_initializers(given, (4, 3), samples=2, epochs=1)
    assert comparison["constant"].values("kernel_mean") == [0.25]
    assert comparison["function"].values("kernel_mean") == [0.5] and comparison["function"].values("kernel_std") == [0]


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_the_losses_are_those_of_keras_training_the_same_stack(sparsity):
    # Fresh inputs, no gradient left of the epoch before, the update of SGD, biases, and masks that are kept.
    sizes, rate, epochs = (12, 20, 9), 0.03, 6
    name = "he_normal" if sparsity is None else "sparse_he_normal"
    run = compare_initializers(sizes=sizes, samples=64, epochs=epochs, learning_rate=rate, sparsity=sparsity)[name]
    initializer = keras.initializers.HeNormal(0) if sparsity is None else SparseHeNormal(sparsity=sparsity, seed=0)
    kernels, kept = initial_kernels(name, initializer, sizes, seed=0)
    dense = [keras.layers.Dense(size, "relu") for size in sizes[1:]]
    wrapped = dense if sparsity is None else [Masked(d, m) for d, m in zip(dense, kept, strict=True)]
    model = keras.Sequential([keras.layers.Input((12,)), *wrapped])
    for layer, kernel in zip(dense, kernels, strict=True):
        layer.kernel.assign(kernel)
    model.compile(keras.optimizers.SGD(rate), lambda y, a: 0.5 * keras.ops.sum(keras.ops.square(y - a), axis=-1))
    target = sample(12**-0.5, (12, 9), derive_seed(0, "target"), distribution="untruncated_normal")
    losses = []
    for epoch in range(epochs):
        x = sample(1.0, (64, 12), derive_seed(0, f"inputs{epoch}"), distribution="untruncated_normal")
        losses.append(float(model.train_on_batch(x, np.maximum(x @ target, 0))))
    assert run.losses == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]


def test_sparse_he_keeps_the_signal_that_masked_he_loses(comparison):
    ours, masked, dense = (comparison[n] for n in ("sparse_he_normal", "masked_he_normal", "he_normal"))
    # With the same masks and seeds each unit's weights differ by the factor sqrt(fan_in / fan_in_j), 2 at 75%.
    assert ours.values("kernel_std")[0] == pytest.approx(2 * masked.values("kernel_std")[0], rel=0.05)
    assert ours.values("pre_activation_std")[0] == pytest.approx(dense.values("pre_activation_std")[0], rel=0.1)
    assert masked.values("pre_activation_std")[2] < 0.2 * ours.values("pre_activation_std")[2]
    assert ours.verdict().startswith("signal kept") and masked.verdict().startswith("signal shrinks")


def test_sparse_ones_know_the_slope_of_leaky_relu():
    one = compare_initializers(["zeros"], (200, 100), "leaky_relu", negative_slope=1.0, sparsity=0.5, epochs=1)
    relu = compare_initializers(["zeros"], (200, 100), "relu", negative_slope=1.0, sparsity=0.5, epochs=1)
    stds = [c["sparse_he_normal"].values("kernel_std")[0] for c in (one, relu)]
    assert stds[1] == pytest.approx(math.sqrt(2) * stds[0], rel=1e-6)


def test_numbers_depend_on_the_seed_alone(comparison):
    states = random.getstate(), np.random.get_state()[1].tolist()
    # Neither on which other initializers there are, nor on how many epochs follow.
    alone = compare_initializers(["he_normal"], SIZES, samples=500, epochs=2)["he_normal"]
    assert alone.rows == tuple(row for row in comparison["he_normal"].rows if row.epoch < 2)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    other = compare_initializers(["he_normal"], SIZES, samples=500, epochs=2, seed=1)["he_normal"]
    assert other.losses[0] != alone.losses[0]


def test_a_stack_that_overflows_says_so_and_warns_of_nothing():
    given = {"huge": keras.initializers.RandomNormal(stddev=1e15, seed=0), "he": keras.initializers.HeNormal(seed=0)}
    deep = compare_initializers(given, (10, 10, 10, 10), samples=20, epochs=2)
    assert deep["huge"].diverged_at == 0 and deep["huge"].verdict() == "overflows at initialization"
    assert deep["he"].diverged_at is None
    assert {histogram.initializer for histogram in deep.histograms} == {"he"}
    later = compare_initializers(["normal(1)"], (30, 30, 30, 30), "linear", samples=20, epochs=30, learning_rate=1.0)
    run = later["normal(1)"]
    assert 0 < run.diverged_at < 30 and f"diverges in epoch {run.diverged_at}" in run.verdict()
    assert len(run.losses) == run.diverged_at + 1 and not math.isfinite(run.losses[-1])
    assert {histogram.epoch for histogram in later.histograms} == {0}
    for comparison in (deep, later):
        assert "inf" in str(comparison)
        json.dumps(comparison.to_dict(), allow_nan=False)
    assert deep.plot("std") and deep.plot("mean") and deep.plot_histograms()


def test_verdicts_name_zeros_dead_units_and_a_stack_of_one_layer():
    assert compare_initializers(["zeros"], (5, 5), samples=5, epochs=1)["zeros"].verdict() == "no signal"
    assert compare_initializers(["he_normal"], (5, 5), samples=5, epochs=1)["he_normal"].verdict() == "one layer"
    # The first step takes the biases so far below 0 that no unit ever fires again.
    run = compare_initializers(["normal(1)"], (50, 50, 50, 50), samples=50, epochs=3)["normal(1)"]
    assert run.verdict().endswith("dead from epoch 1 on")
    assert run.values("activation_std", -1)[-1] == 0


def test_a_run_that_comes_back_to_life_is_not_dead():
    """One unit and three samples: by chance all are 0 in some epochs and not in later ones."""
    run = compare_initializers(["he_normal"], (10, 10, 1), samples=3, epochs=6, learning_rate=1e-3, seed=5)["he_normal"]
    alive = [row.activation_std > 0 for row in run.rows if row.layer == 2]
    assert not all(alive) and alive[-1] and "dead" not in run.verdict()


@pytest.mark.parametrize("value", [0.0, 0.25, -1e5, 1e17])
def test_a_histogram_of_one_number_has_room_around_it(value):
    given = {"constant": keras.initializers.Constant(value)}
    comparison = compare_initializers(given, (4, 3), "tanh", samples=2, epochs=1)
    (histogram,) = (h for h in comparison.histograms if h.quantity == "kernel")
    assert sum(histogram.counts) == max(histogram.counts) == 12
    assert list(histogram.edges) == sorted(set(histogram.edges))
    assert histogram.edges[0] < np.float32(value) < histogram.edges[-1]


def test_a_mask_without_any_weight_gives_zeros_and_no_warning():
    run = compare_initializers({"empty": SparseScaledInit(mask=np.zeros((4, 3)))}, (4, 3), samples=2, epochs=2)["empty"]
    assert run.values("kernel_std", 1) == [0] and run.values("kernel_gradient_std", 1) == [0]


def test_histograms_count_every_value(comparison):
    assert len(comparison.histograms) == 12 * 3 * len(QUANTITIES) * 2
    for histogram in comparison.histograms:
        inputs, units = _shapes()[histogram.layer - 1]
        values = 500 * units
        if histogram.quantity.startswith("kernel"):
            sparse = histogram.initializer in ("sparse_he_normal", "masked_he_normal")
            values = inputs * units - math.floor(0.75 * inputs * units) * sparse
        assert sum(histogram.counts) == values and len(histogram.edges) == len(histogram.counts) + 1
        assert histogram.epoch in (0, 2)


def test_the_table_has_a_line_for_each_initializer_and_the_numbers_of_its_first_layer(comparison):
    text = str(comparison)
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    for run in comparison.runs:
        assert f"{run.values('pre_activation_std')[0]:.3g}" in lines[run.name] and run.verdict() in lines[run.name]
    assert "90-120-50-20 units, relu, 500 samples" in text and "75.0% sparse" in text


def test_to_dict_and_to_pandas_have_every_row(comparison, monkeypatch):
    content = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert content["settings"]["sizes"] == list(SIZES) and content["settings"]["initializers"][-1] == "sparse_he_normal"
    assert [len(run["rows"]) for run in content["runs"]] == [9] * 12
    assert (
        content["runs"][8]["rows"][0]["pre_activation_std"] == comparison["he_normal"].values("pre_activation_std")[0]
    )
    frame = comparison.to_pandas()
    expected = pandas.DataFrame([dataclasses.asdict(row) for row in comparison.rows], columns=list(COLUMNS))
    pandas.testing.assert_frame_equal(frame, expected)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        comparison.to_pandas()


def test_plots_show_every_initializer_in_every_layer(comparison, monkeypatch):
    figure = comparison.plot()
    assert len(figure.axes) == 4 * 3 and all(len(axes.lines) == 12 for axes in figure.axes)
    line = figure.axes[0].lines[8]
    assert line.get_label() == "he_normal"
    assert line.get_ydata().tolist() == [comparison["he_normal"].values("pre_activation_std", e)[0] for e in range(3)]
    assert len(comparison.plot_histograms("kernel", epoch=-1).axes) == 12 * 3
    deep = compare_initializers(["zeros"], (4,) * 41, samples=2, epochs=2)
    assert len(deep.plot().axes) == 4 * 6
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        comparison.plot()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initializers": ["he"]}, "`initializers` must be one of 'zeros'.*initializers='he'"),
        ({"initializers": "he_normal"}, "must be a list of names or a dict.*initializers='he_normal'"),
        ({"initializers": []}, "must not be empty"),
        ({"initializers": ["zeros", "zeros"]}, "each once.*'zeros'"),
        ({"sizes": (100,)}, "`sizes` must be at least two positive ints"),
        ({"sizes": (100, 0)}, "`sizes` must be.*\\(100, 0\\)"),
        ({"sizes": 100}, "`sizes` must be"),
        ({"activation": "softmax"}, "`activation` must be one of.*'softmax'"),
        ({"negative_slope": math.inf}, "`negative_slope` must be a finite float"),
        ({"samples": 0}, "`samples` must be a positive int. Received: samples=0"),
        ({"epochs": 1.5}, "`epochs` must be a positive int. Received: epochs=1.5"),
        ({"epochs": True}, "`epochs` must be a positive int"),
        ({"learning_rate": -1}, "`learning_rate` must be a positive float"),
        ({"sparsity": 1.0}, "`sparsity` must be a float in \\[0, 1\\)"),
        ({"seed": -1}, "`seed` must be a non-negative int"),
        ({"initializers": {"wide": SparseScaledInit(mask=np.ones((3, 2)))}}, "'wide'.*\\(100, 100\\)"),
        ({"initializers": {"flat": lambda shape, dtype: np.zeros(3)}}, "\\(100, 100\\).*'flat'.*\\(3,\\)"),
        ({"initializers": {"sparse_he_normal": keras.initializers.Zeros()}, "sparsity": 0.5}, "'sparse_he_normal'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare_initializers(**arguments)


def test_what_is_no_initializer_is_named():
    for wrong in ("he_normal", keras.initializers.HeNormal, None):
        with pytest.raises(TypeError, match="`initializers` must have initializers as its values. Received: 'it'"):
            compare_initializers({"it": wrong})


def test_what_a_comparison_does_not_have_is_named(comparison):
    with pytest.raises(KeyError, match="No initializer 'he'. There are zeros"):
        comparison["he"]
    with pytest.raises(ValueError, match="`column` must be one of 'kernel_mean'"):
        comparison["zeros"].values("std")
    with pytest.raises(ValueError, match="`epoch` must be one of the 3 of 'zeros'.*epoch=3"):
        comparison["zeros"].values("kernel_std", 3)
    with pytest.raises(ValueError, match="`epoch` must be one with histograms, of \\[0, 2\\]. Received: epoch=1"):
        comparison.plot_histograms(epoch=1)
    with pytest.raises(ValueError, match="`statistic` must be one of 'std', 'mean'"):
        comparison.plot("var")
