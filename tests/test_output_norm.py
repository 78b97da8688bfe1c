"""The variance of the squared norm of what a sparse ReLU layer puts out, against the closed forms for three masks.

z = relu(x W) with x uniform on the unit sphere of R^n, n units of on average k inputs, active weights N(0, 2 / k).
The mean of ||z||^2 is 1 for all; the variance tells masks apart. Lasby et al. 2024, arXiv:2305.02299, section 3.1.
"""

import numpy as np
import pytest

from keras_sparse_init import SparseScaledInit, masks

N, K = 16, 2
NETWORKS = 20000


def bernoulli(random):
    """Every weight is on with probability k / n. All networks side by side in one kernel."""
    mask = random.random((N, N * NETWORKS)) < K / N
    init = SparseScaledInit(2.0 * N / K, distribution="untruncated_normal", granularity="dense", seed=1)
    return init.draw(mask.shape, "float32", mask, None, 1)


def constant_fan_in(random):
    """Every unit has k inputs: as `masks.ConstantFanIn` draws them and the initializer scales them."""
    init = SparseScaledInit(2.0, distribution="untruncated_normal", seed=1)
    return init.draw((N, N * NETWORKS), "float32", masks.ConstantFanIn(1 - K / N), None, 1)


def constant_per_layer(random):
    """Every network has n k weights, anywhere: as `masks.Random` draws them."""
    rule = masks.Random(1 - K / N)
    mask = np.concatenate([rule((N, N), seed) for seed in range(NETWORKS)], axis=1)
    init = SparseScaledInit(2.0, distribution="untruncated_normal", granularity="layer", seed=1)
    return init.draw(mask.shape, "float32", mask, None, 1)


C = (N - 1 / K) / (N - 1 / N)


@pytest.mark.parametrize(
    ("draw", "numerator"),
    [
        (bernoulli, 5 * N - 8 + 18 * N / K),
        (constant_fan_in, 5 * N - 2 + 12 * N / K),
        (constant_per_layer, (N**2 + 7 * N - 8) * C + 18 * N / K - N**2 - 2 * N),
    ],
)
def test_the_variance_of_the_output_norm_is_that_of_the_closed_form(draw, numerator):
    random = np.random.default_rng(0)
    kernels = np.asarray(draw(random), np.float64).reshape(N, NETWORKS, N)
    x = random.normal(size=(NETWORKS, N))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    norms = np.square(np.maximum(np.einsum("bi,ibj->bj", x, kernels), 0)).sum(axis=1)
    deviations = np.square(norms - 1)
    # Five standard errors: of the mean, and of the variance about the known mean.
    assert abs(norms.mean() - 1) < 5 * norms.std() / np.sqrt(NETWORKS)
    assert abs(deviations.mean() - numerator / (N * (N + 2))) < 5 * deviations.std() / np.sqrt(NETWORKS)
