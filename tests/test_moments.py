"""Sums over batches against NumPy on all samples at once, in float64."""

import numpy as np
import pytest

from keras_sparse_init.signal.moments import Directions, Moments, Zeros

_RANDOM = np.random.default_rng(0)


def _in_batches(cls, values, sizes):
    parts = np.split(values, np.cumsum(sizes)[:-1])
    total = cls.of(parts[0])
    for part in parts[1:]:
        total = total.merged(cls.of(part))
    return total


@pytest.mark.parametrize("sizes", [[60], [1, 1, 58], [20, 40]])
@pytest.mark.parametrize("shift", [0.0, 3.0, 1e3])
def test_moments_are_those_of_all_samples_also_where_the_mean_outweighs_the_deviation(sizes, shift):
    values = (_RANDOM.normal(size=(60, 12)) + shift).astype(np.float32)
    exact = values.astype(np.float64)
    spread = _in_batches(Moments, values, sizes).spread()
    expected = exact.mean(), exact.std(), *(f(exact.std(axis=0)) for f in (np.mean, np.min, np.max))
    found = spread.mean, spread.std, spread.unit_std_mean, spread.unit_std_min, spread.unit_std_max
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize("axis", [-1, 0, -3])
def test_units_are_taken_over_their_positions(axis):
    values = _RANDOM.normal(size=(10, 3, 4, 5)).astype(np.float32) * np.arange(1, 6)
    by_unit = np.moveaxis(values.astype(np.float64), axis + 1 if axis >= 0 else axis, -1)
    expected = by_unit.std(axis=(0, 1, 2))
    spread = Moments.of(values.reshape(10, -1)).spread((3, 4, 5), axis)
    found = spread.unit_std_mean, spread.unit_std_min, spread.unit_std_max
    np.testing.assert_allclose(found, (expected.mean(), expected.min(), expected.max()), rtol=1e-5)
    assert spread.std == pytest.approx(values.std(), rel=1e-5)
    rectified = np.maximum(values, 0) * (np.arange(5) > 0)
    zeros = Zeros.of(rectified.reshape(10, -1))
    by_unit = np.moveaxis(rectified, axis + 1 if axis >= 0 else axis, -1) == 0
    expected = by_unit.all(axis=(0, 1, 2)).sum(), (~by_unit).all(axis=(0, 1, 2)).sum()
    assert zeros.dead_and_always_on((3, 4, 5), axis) == expected
    assert zeros.fraction() == pytest.approx((rectified == 0).mean())


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e25])
def test_what_float32_cannot_square_is_measured_all_the_same(size):
    values = (_RANDOM.normal(size=(50, 4)) * size).astype(np.float32)
    exact = values.astype(np.float64)
    assert Moments.of(values).spread().std == pytest.approx(exact.std(), rel=1e-5)
    assert Moments.of_all(values).spread().std == pytest.approx(exact.std(), rel=1e-5)
    assert Directions.of(values).cosine() == pytest.approx(Directions.of(exact).cosine(), abs=1e-6)


def test_more_rows_than_a_byte_can_count_are_counted():
    values = np.zeros((1000, 2), np.float32)
    values[:7, 1] = 1
    np.testing.assert_array_equal(Zeros.of(values).zeros, [1000, 993])


def test_the_cosine_is_the_mean_over_pairs_and_samples_of_zeros_are_left_out():
    values = _RANDOM.normal(1, 1, size=(30, 8)).astype(np.float32)
    units = values / np.linalg.norm(values, axis=1, keepdims=True)
    expected = (units @ units.T)[~np.eye(30, dtype=bool)].mean()
    assert _in_batches(Directions, values, [11, 19]).cosine() == pytest.approx(expected, abs=1e-6)
    with_zeros = np.concatenate([values, np.zeros((5, 8), np.float32)])
    assert Directions.of(with_zeros).cosine() == pytest.approx(expected, abs=1e-6)
    assert Directions.of(values[:1]).cosine() is None
    assert Directions.of(np.zeros((4, 3), np.float32)).cosine() is None


def test_constants_are_told_from_what_differs():
    values = np.repeat(_RANDOM.normal(5, 1, size=(1, 6)).astype(np.float32), 40, axis=0)
    assert Moments.of(values).is_constant()
    values[3, 2] += 1e-3
    assert not Moments.of(values).is_constant()
    assert Moments.of(np.zeros((3, 2), np.float32)).is_constant()


def test_what_is_not_finite_is_not_hidden():
    values = _RANDOM.normal(size=(20, 3)).astype(np.float32)
    for bad in (np.nan, np.inf):
        values[4, 1] = bad
        assert not np.isfinite(Moments.of(values).spread().std)
        assert not np.isfinite(Moments.of_all(values).spread().std)
