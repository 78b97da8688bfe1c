"""Means, deviations, zeros and directions of arrays of samples, summed up batch by batch. NumPy alone.

Everything is kept for each position of a sample (an entry of a flattened sample) and folded into units at the end, so
that the numbers are those of all samples at once, up to rounding.
"""

from __future__ import annotations

import dataclasses

import numpy as np

# Where squares in float32 would lose what is so small, sums are made in float64.
_SMALL = 1e-12


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and deviation of the values of a layer: over everything, and over what each unit has.

    Attributes:
        mean: Mean over samples, positions and units.
        std: Standard deviation over the same.
        unit_std_mean: Mean over the units of the standard deviation of each over samples and positions.
        unit_std_min: The smallest of those.
        unit_std_max: The largest.
    """

    mean: float
    std: float
    unit_std_mean: float
    unit_std_min: float
    unit_std_max: float

    @property
    def rms(self) -> float:
        """The root of the mean square."""
        return float(np.hypot(self.mean, self.std))


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Of `count` samples: for each position the mean, and the sum of squared differences from it, in float64."""

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """The moments of an array of shape (samples, positions)."""
        with np.errstate(all="ignore"):
            count = len(values)
            # By BLAS, which sums columns three times as fast as `mean`.
            mean = (np.ones(count, values.dtype) @ values) / values.dtype.type(count)
            centred = values - mean
            squares = np.einsum("ij,ij->j", centred, centred)
            if values.dtype != np.float64:
                size = np.abs(mean).max(initial=0.0) + np.sqrt(squares.max(initial=0.0) / count)
                if not _SMALL < size < 1 / _SMALL and (size > 0 or values.any()):
                    return cls.of(values.astype(np.float64))
            return cls(count, mean.astype(np.float64), squares.astype(np.float64))

    @classmethod
    def of_all(cls, values: np.ndarray, factor: float = 1.0) -> Moments:
        """The moments of all entries of an array together, divided by `factor`: one position, the entries as samples."""
        flat = values.reshape(-1)
        with np.errstate(all="ignore"):
            mean = flat.mean()
            # In parts that stay in the processor's cache.
            squares = 0.0
            for start in range(0, flat.size, 2**15):
                centred = flat[start : start + 2**15] - mean
                squares += float(centred @ centred)
            size = abs(float(mean)) + np.sqrt(squares / flat.size)
            if flat.dtype != np.float64 and not _SMALL < size < 1 / _SMALL and (size > 0 or flat.any()):
                return cls.of_all(flat.astype(np.float64), factor)
            factor = float(factor)
            return cls(flat.size, np.array([float(mean) / factor]), np.array([squares / factor**2]))

    def merged(self, other: Moments) -> Moments:
        """The moments of the samples of both.

        Reference:
            Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance, equation (2.1).
        """
        with np.errstate(all="ignore"):
            count = self.count + other.count
            gap = other.mean - self.mean
            mean = self.mean + gap * (other.count / count)
            squares = self.squares + other.squares + gap**2 * (self.count * other.count / count)
        return Moments(count, mean, squares)

    def spread(self, shape: tuple[int, ...] = (), axis: int = -1) -> Spread:
        """The numbers over everything and by unit.

        Args:
            shape: The shape of a sample; its positions are those of the moments. Empty: each position is a unit.
            axis: The axis of it that is that of the units.
        """
        with np.errstate(all="ignore"):
            mean, variance = self.mean, self.squares / self.count
            if len(shape) > 1:
                mean, variance = _by_unit(mean, shape, axis), _by_unit(variance, shape, axis)
                unit_mean = mean.mean(axis=0)
                variance = variance.mean(axis=0) + np.square(mean - unit_mean).mean(axis=0)
                mean = unit_mean
            unit_std = np.sqrt(variance)
            total = np.sqrt(variance.mean() + np.square(mean - mean.mean()).mean())
            return Spread(
                float(mean.mean()), float(total), float(unit_std.mean()), float(unit_std.min()), float(unit_std.max())
            )

    def is_constant(self) -> bool:
        """Whether no position differs between samples by more than rounding."""
        with np.errstate(all="ignore"):
            return bool(np.all(np.sqrt(self.squares / self.count) <= 1e-6 * np.abs(self.mean)))


@dataclasses.dataclass(frozen=True, eq=False)
class Directions:
    """The sum of samples divided by their lengths, and how many have a length."""

    count: int
    total: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Directions:
        """Those of an array of shape (samples, positions)."""
        with np.errstate(all="ignore"):
            lengths = np.sqrt(np.einsum("ij,ij->i", values, values))
            small = not np.all((lengths > _SMALL) & (lengths < 1 / _SMALL))
            if small and values.dtype != np.float64 and values.any():
                return cls.of(values.astype(np.float64))
            alive = lengths > 0
            inverse = np.where(alive, 1 / np.where(alive, lengths, 1), 0).astype(values.dtype)
            # NaN is no length; it is for the mean to be NaN then, too.
            inverse[np.isnan(lengths)] = np.nan
            return cls(int(np.count_nonzero(lengths != 0)), (inverse @ values).astype(np.float64))

    def merged(self, other: Directions) -> Directions:
        """Those of the samples of both."""
        return Directions(self.count + other.count, self.total + other.total)

    def cosine(self) -> float | None:
        """The mean over all pairs of different samples of the cosine of the angle between them.

        (||sum_i u_i||^2 - n) / (n (n - 1)), where u_i are the n samples divided by their lengths; samples of zeros have
        no direction and are left out. None for fewer than two.
        """
        n = self.count
        return None if n < 2 else float((self.total @ self.total - n) / (n * (n - 1)))


@dataclasses.dataclass(frozen=True, eq=False)
class Zeros:
    """For each position the number of samples, of `count`, that are 0 there."""

    count: int
    zeros: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Zeros:
        """Those of an array of shape (samples, positions)."""
        zeros = np.zeros(values.shape[1], np.int64)
        # Bytes add up without overflow in runs of 255 rows, ten times as fast as a sum of booleans.
        for start in range(0, len(values), 255):
            equal = (values[start : start + 255] == 0).view(np.uint8)
            zeros += np.add.reduce(equal, axis=0, dtype=np.uint8)
        return cls(len(values), zeros)

    def merged(self, other: Zeros) -> Zeros:
        """Those of the samples of both."""
        return Zeros(self.count + other.count, self.zeros + other.zeros)

    def fraction(self) -> float:
        """The share of zeros."""
        return float(self.zeros.mean() / self.count)

    def dead_and_always_on(self, shape: tuple[int, ...], axis: int = -1) -> tuple[int, int]:
        """How many units are always 0, and how many never; arguments as in `Moments.spread`."""
        zeros, times = self.zeros, self.count
        if len(shape) > 1:
            by_unit = _by_unit(zeros, shape, axis)
            zeros, times = by_unit.sum(axis=0), times * len(by_unit)
        return int(np.count_nonzero(zeros == times)), int(np.count_nonzero(zeros == 0))


def _by_unit(values: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """An array of shape (positions of a unit, units)."""
    return np.moveaxis(values.reshape(shape), axis, -1).reshape(-1, shape[axis])
