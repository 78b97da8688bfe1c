"""Bounds that a right program exceeds with probability 1e-6, from the laws of the statistics; none is tuned."""

from __future__ import annotations

import math

import numpy as np
from scipy import special

FALSE_ALARM = 1e-6

_INSIDE = 1 - 2 * special.ndtr(-2.0)
_DENSITY = math.exp(-2) / math.sqrt(2 * math.pi)
TRUNCATED_VARIANCE = 1 - 4 * _DENSITY / _INSIDE
_TRUNCATED_4TH = 3 * TRUNCATED_VARIANCE - 16 * _DENSITY / _INSIDE

# E[x^4] / E[x^2]^2
KURTOSIS = {
    "truncated_normal": _TRUNCATED_4TH / TRUNCATED_VARIANCE**2,
    "untruncated_normal": 3.0,
    "uniform": 9 / 5,
}

# The largest absolute value at variance 1.
LIMIT = {
    "truncated_normal": 2 / math.sqrt(TRUNCATED_VARIANCE),
    "untruncated_normal": math.inf,
    "uniform": math.sqrt(3),
}

CDF = {
    "truncated_normal": lambda x: (special.ndtr(x * math.sqrt(TRUNCATED_VARIANCE)) - special.ndtr(-2.0)) / _INSIDE,
    "untruncated_normal": special.ndtr,
    "uniform": lambda x: (x / math.sqrt(3) + 1) / 2,
}


def normal_bound(comparisons=1):
    """The |z| that one of so many standard normal statistics exceeds with probability 1e-6 (Bonferroni)."""
    return -special.ndtri(FALSE_ALARM / (2 * comparisons))


def assert_mean_0_and_variance_1(values, distribution):
    """By the normal law of the mean of x and of x^2, whose variances are 1 / n and (kurtosis - 1) / n."""
    values = np.asarray(values, np.float64).ravel()
    assert values.size > 10_000, "too few values for the normal law"
    assert abs(values.mean()) * math.sqrt(values.size) < normal_bound()
    z = (np.square(values).mean() - 1) * math.sqrt(values.size / (KURTOSIS[distribution] - 1))
    assert abs(z) < normal_bound(), f"the variance is {np.square(values).mean():.4f} times what it should be"


def assert_distribution(values, distribution):
    """Mean, variance, limits and (by the inequality of Dvoretzky, Kiefer and Wolfowitz) the whole distribution."""
    values = np.sort(np.asarray(values, np.float64).ravel())
    assert_mean_0_and_variance_1(values, distribution)
    limit = LIMIT[distribution] * (1 + 1e-6)
    assert -limit <= values[0] and values[-1] <= limit
    expected = CDF[distribution](values)
    above = np.arange(1, values.size + 1) / values.size - expected
    distance = max(above.max(), (1 / values.size - above).max())
    assert distance < math.sqrt(math.log(2 / FALSE_ALARM) / (2 * values.size))


def assert_uncorrelated(first, second):
    """Of values with mean 0 and variance 1: the mean product is normal with variance 1 / n."""
    first, second = (np.asarray(values, np.float64).ravel() for values in (first, second))
    assert abs((first * second).mean()) * math.sqrt(first.size) < normal_bound()
