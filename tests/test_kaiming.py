"""Kaiming's initialization on convolutions: what `colabs/kaiming_and_gain.ipynb` says, within bounds of chance."""

import math

import keras
import numpy as np
import pytest
from statistical import KURTOSIS, normal_bound

from keras_sparse_init import SparseHeNormal, gain

_CHANNELS, _FILTERS, _SIZE = 8, 48, 5
_FAN_IN = _SIZE * _SIZE * _CHANNELS
_PATCHES = 4 * 30 * 30


def _convolved(initializer):
    """Outputs for N(0, 1) images, (patches, filters), and the kernel. The patches do not overlap: independent."""
    images = np.random.default_rng(0).normal(size=(4, 150, 150, _CHANNELS)).astype("float32")
    conv = keras.layers.Conv2D(_FILTERS, _SIZE, strides=_SIZE, use_bias=False, kernel_initializer=initializer)
    outputs = keras.ops.convert_to_numpy(conv(images)).reshape(_PATCHES, _FILTERS)
    return outputs.astype(np.float64), keras.ops.convert_to_numpy(conv.kernel).reshape(-1, _FILTERS).astype(np.float64)


@pytest.mark.parametrize("sparsity", [None, 0.9])
@pytest.mark.parametrize("slope", [1.0, 0.0, 0.1, math.sqrt(5)])
def test_a_convolutions_output_has_the_std_of_the_gain_and_relu_its_mean(slope, sparsity):
    z, kernel = _convolved(SparseHeNormal(negative_slope=slope, sparsity=sparsity, seed=1))
    # The relative variance of mean z^2: by the weights, and over n patches, 2 tr(G^2) / tr(G)^2 / n with G = W'W.
    gram = kernel.T @ kernel
    error = (KURTOSIS["truncated_normal"] - 1) / np.count_nonzero(kernel)
    error += 2 * np.sum(gram**2) / np.trace(gram) ** 2 / _PATCHES
    g = gain("leaky_relu", slope)
    assert abs(np.mean(z**2) / g**2 - 1) < normal_bound(8) * math.sqrt(error)
    # f(z) of z ~ N(0, ||w||^2) has the mean (1 - slope) ||w|| / sqrt(2 pi); the means of patches are independent.
    activation = np.where(z > 0, z, slope * z).mean(axis=1)
    norms = np.linalg.norm(kernel, axis=0)
    expected = (1 - slope) * norms.mean() / math.sqrt(2 * math.pi)
    assert abs(activation.mean() - expected) < normal_bound(8) * activation.std() / math.sqrt(_PATCHES)
    # With many weights to a filter that is the gain / sqrt(2 pi): by the delta method for a norm, and its curvature.
    weights = np.count_nonzero(kernel) / _FILTERS
    spread = (KURTOSIS["truncated_normal"] - 1) / weights
    theory = g * (1 - spread / 8)
    assert abs(norms.mean() / theory - 1) < normal_bound(8) * math.sqrt(spread / 4 / _FILTERS) + spread**2


def test_a_mask_that_is_ignored_costs_the_root_of_the_density():
    dense, sparse = (
        _convolved(SparseHeNormal(granularity=granularity, sparsity=0.9, seed=1))[0].std()
        for granularity in ("dense", "unit")
    )
    assert dense / sparse == pytest.approx(math.sqrt(0.1), rel=0.05)


def test_keras_has_the_gain_of_relu_whatever_follows():
    kernel = np.asarray(keras.initializers.HeNormal(seed=0)((_SIZE, _SIZE, _CHANNELS, 200)))
    error = math.sqrt((KURTOSIS["truncated_normal"] - 1) / kernel.size)
    assert abs(kernel.var() * _FAN_IN / 2 - 1) < normal_bound() * error
    # Which for a slope of sqrt 5 is six times the variance that it needs.
    assert gain("leaky_relu", math.sqrt(5)) ** 2 == pytest.approx(1 / 3)
