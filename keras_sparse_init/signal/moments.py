"""Means, deviations, zeros and directions of arrays of samples, summed up batch by batch. NumPy alone.

Everything is kept for each position of a sample (an entry of a flattened sample) and folded into units at the end, so
that the numbers are those of all samples at once, up to rounding.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

# Values beyond these are summed in float64: float32 would lose their squares.
TINY, HUGE = 1e-12, 1e12
# A variance as a difference of sums is right to float32 as long as the squared mean is not this many times as large.
_OUTWEIGHED = 100.0


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
            # Without arrays of this size in between: new memory costs more than all else. BLAS sums columns fastest.
            mean = (np.ones(count, values.dtype) @ values).astype(np.float64) / count
            squares = np.einsum("ij,ij->j", values, values).astype(np.float64) - count * mean**2
            _centre(values, mean, squares)
            if _is_extreme(values, mean, squares / count):
                return cls.of(values.astype(np.float64))
            return cls(count, mean, squares)

    @classmethod
    def of_all(cls, values: np.ndarray) -> Moments:
        """The moments of all entries of an array together: one position, of which the entries are samples."""
        flat = values.reshape(-1)
        with np.errstate(all="ignore"):
            mean = float(flat.sum()) / max(flat.size, 1)
            squares = float(flat @ flat) - flat.size * mean**2
            if not is_kept(squares, flat.size, mean):
                centred = flat - flat.dtype.type(mean)
                squares = float(centred @ centred)
            mean, squares = np.array([mean]), np.array([squares])
            if _is_extreme(flat, mean, squares / max(flat.size, 1)):
                return cls.of_all(flat.astype(np.float64))
            return cls(flat.size, mean, squares)

    def divided(self, factor: float) -> Moments:
        """The moments of the same values divided by a number."""
        return self if factor == 1 else Moments(self.count, self.mean / factor, self.squares / factor**2)

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
            if len(shape) > 1 and shape[axis] < mean.size:
                mean, variance = _by_unit(mean, shape, axis), _by_unit(variance, shape, axis)
                positions = len(mean)
                unit_mean = mean.sum(axis=0) / positions
                variance = (variance.sum(axis=0) + np.square(mean - unit_mean).sum(axis=0)) / positions
                mean = unit_mean
            unit_std = np.sqrt(variance)
            units = mean.size
            total = mean.sum() / units
            between = mean - total
            std = np.sqrt((variance.sum() + between @ between) / units)
            return Spread(
                float(total), float(std), float(unit_std.sum() / units), float(unit_std.min()), float(unit_std.max())
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
            if values.dtype != np.float64 and not (lengths.min() > TINY and lengths.max() < HUGE):
                if values.any():
                    return cls.of(values.astype(np.float64))
            # The length of what has NaN is NaN, and so is the sum then.
            alive = lengths != 0
            inverse = np.divide(1, lengths, out=np.zeros_like(lengths), where=alive)
            return cls(int(np.count_nonzero(alive)), (inverse @ values).astype(np.float64))

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


def is_kept(squares: Any, count: Any, mean: Any) -> Any:
    """Whether sums of squared differences from a mean are right, as what is left of sums of squares in float32."""
    return np.logical_not(squares * _OUTWEIGHED < count * mean**2)


def _centre(values: np.ndarray, mean: np.ndarray, squares: np.ndarray) -> None:
    """Sums of squared differences anew, in place, for columns of which the mean outweighs the deviation by far."""
    lost = ~is_kept(squares, len(values), mean)
    if not lost.any():
        return
    if 8 * np.count_nonzero(lost) > lost.size:
        lost = slice(None)  # To pick columns takes longer than to go through all.
    centred = values[:, lost] - mean[lost].astype(values.dtype)
    squares[lost] = np.ones(len(values), values.dtype) @ np.square(centred, out=centred)


def _is_extreme(values: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> bool:
    """Whether float32 has not room for the squares of these values; NaN and infinity it has."""
    if values.dtype == np.float64:
        return False
    size = math.sqrt((mean * mean + variance).max(initial=0.0))
    return not TINY < size < HUGE and (size != 0 or bool(values.any())) and bool(np.isfinite(values).all())
