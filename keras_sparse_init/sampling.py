"""From standard deviations and a seed to values: NumPy only, the same bits in every process and on every replica."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import mmap
import statistics
from typing import Any, Literal

import numpy as np

from keras_sparse_init.blocks import map_blocks, row_blocks

Distribution = Literal["truncated_normal", "untruncated_normal", "uniform"]
DISTRIBUTIONS = ("truncated_normal", "untruncated_normal", "uniform")

# Standard deviation of N(0, 1) truncated at 2 sigma: sqrt(1 - 4 pdf(2) / (2 cdf(2) - 1)).
TRUNCATED_STD = 0.87962566103423978

# Above this share of nonzeros in a block, drawing all of it is faster than drawing the nonzeros alone.
_DENSE_FROM = 0.75

# With more groups of eight entries than this that have a nonzero, reading them one by one is faster.
_MANY_WORDS = 0.65

# DLPack tensors must start at a multiple of 64 bytes.
_ALIGNMENT = 64

_HUGE_PAGE = 2**21

# Two tables of this many float32 fit the smallest cache.
_CELLS = 2**12
_BITS_WITHIN = 20

# Values drawn at once, with what is needed meanwhile, stay in the next one.
_IN_CACHE = 2**16


def sample(
    std: Any,
    shape: tuple[int, ...],
    seed: int,
    mask: np.ndarray | None = None,
    distribution: Distribution = "truncated_normal",
    dtype: Any = np.float32,
) -> np.ndarray:
    """Random values of mean 0 and the given standard deviations, exactly 0 where the mask is 0.

    truncated_normal: N(0, 1) between -2 and 2 sigma, divided by 0.87962566, so that the variance is exact; float64 by
    drawing again beyond 2 sigma, float32 by the quantile function, to 6e-6 of a standard deviation. uniform: between
    -sqrt(3) std and sqrt(3) std. Half-precision types are drawn in float32 and cast. A weight whose mask is 1 is never
    exactly 0, so that `kernel != 0` recovers the mask.

    Args:
        std: Array that broadcasts to `shape`.
        shape: The kernel's shape, positive ints.
        seed: Non-negative int.
        mask: Boolean array of `shape`, or None to draw everything.
        distribution: "truncated_normal", "untruncated_normal" or "uniform".
        dtype: A floating NumPy dtype (ml_dtypes' bfloat16 included).

    Returns:
        A new array of `shape` and `dtype`, aligned to 64 bytes.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.sampling import sample
        >>> values = sample(0.1, (2, 3), seed=0, mask=np.array([[True, False, True], [False, True, False]]))
        >>> (values != 0).astype(int).tolist()
        [[1, 0, 1], [0, 1, 0]]
    """
    dtype = np.dtype(dtype)
    drawn_as = dtype if dtype in (np.float32, np.float64) else np.dtype(np.float32)
    width = shape[-1] if shape else 1
    out = aligned_zeros(shape, dtype)
    out_rows = out.reshape(-1, width)
    std_rows = _by_rows(np.asarray(std, drawn_as), shape, width)
    mask_rows = None if mask is None else mask.reshape(-1, width)
    blocks = row_blocks(out_rows.shape[0], width)
    same_rows = std_rows.shape[0] == 1
    smallest = smallest_normal(dtype)

    def fill(rows: slice, child: np.random.SeedSequence) -> None:
        rng = np.random.Generator(np.random.SFC64(child))
        block = out_rows[rows]
        factor = std_rows if same_rows else std_rows[rows]
        active = None if mask_rows is None else nonzeros(mask_rows[rows].reshape(-1))
        if active is None or active.size > _DENSE_FROM * block.size:
            values = block if dtype == drawn_as else np.empty(block.shape, drawn_as)
            _draw(rng, values.reshape(-1), distribution)
            values *= factor
            block[...] = values
            block[block == 0] = smallest
            if active is not None:
                block[~mask_rows[rows]] = 0
        elif active.size:
            values = np.empty(active.size, drawn_as)
            _draw(rng, values, distribution)
            values *= _factor_at(factor, active, width)
            values = values.astype(dtype, copy=False)
            values[values == 0] = smallest
            block.reshape(-1).put(active, values, mode="wrap")  # The mode that does not check every index: 2x faster.

    map_blocks(fill, blocks, np.random.SeedSequence(seed).spawn(len(blocks)))
    return out


def derive_seed(seed: int, name: str) -> int:
    """A seed of its own for each name (a kernel's path, "mask"), the same in every process.

    Args:
        seed: Non-negative int, the seed of the whole.
        name: What the new seed is for.

    Returns:
        An int in [0, 2^31).

    Example:
        >>> from keras_sparse_init.sampling import derive_seed
        >>> derive_seed(0, "conv1/kernel") == derive_seed(0, "conv2/kernel")
        False
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def nonzeros(mask: np.ndarray) -> np.ndarray:
    """`np.flatnonzero` of a boolean vector, twice as fast where most groups of eight entries have no nonzero."""
    if mask.size % 8 or not mask.flags.c_contiguous:
        return np.flatnonzero(mask)
    words = mask.view(np.uint64)
    at = np.flatnonzero(words != 0)
    if at.size > _MANY_WORDS * words.size:
        return np.flatnonzero(mask)
    within = np.flatnonzero(words.take(at).view(np.bool_))
    at <<= 3
    positions = at.take(within >> 3)
    within &= 7
    positions += within
    return positions


def _factor_at(factor: np.ndarray, positions: np.ndarray, width: int) -> np.ndarray:
    """The entries of a factor that broadcasts to (rows, width), at flat positions of such a block."""
    if factor.size == 1:
        return factor.reshape(())
    if factor.shape[0] > 1:
        return np.broadcast_to(factor, (factor.shape[0], width)).reshape(-1).take(positions)
    # Dividing is several times faster than a remainder, and 32 bits than 64.
    small = np.uint32 if positions[-1] < 2**32 else np.uint64
    columns = positions.astype(small)
    columns -= columns // small(width) * small(width)
    return factor[0].take(columns)


def _draw(rng: np.random.Generator, out: np.ndarray, distribution: str) -> None:
    """Fills a vector with values of mean 0 and variance 1."""
    if distribution == "uniform":
        rng.random(out=out, dtype=out.dtype)
        out -= 0.5
        out *= out.dtype.type(np.sqrt(12.0))
    elif distribution == "untruncated_normal":
        rng.standard_normal(out=out, dtype=out.dtype)
    elif out.dtype == np.float32:
        for start in range(0, out.size, _IN_CACHE):
            _draw_by_quantiles(rng, out[start : start + _IN_CACHE])
    else:
        rng.standard_normal(out=out, dtype=out.dtype)
        beyond = np.flatnonzero(np.abs(out) > 2)
        while beyond.size:
            redrawn = rng.standard_normal(beyond.size, dtype=out.dtype)
            out[beyond] = redrawn
            beyond = beyond[np.abs(redrawn) > 2]
        out /= TRUNCATED_STD


def _draw_by_quantiles(rng: np.random.Generator, out: np.ndarray) -> None:
    """Truncated normal values in float32: 32 random bits each, through the quantile function.

    The function is a straight line within each of `_CELLS` cells, so a value is off by less than 6e-6 of a standard
    deviation. Drawing normal values and those beyond 2 sigma again takes four times as long.
    """
    starts, slopes = _quantiles()
    bits = rng.integers(0, 2**64, (out.size + 1) // 2, dtype=np.uint64).view(np.uint32)[: out.size]
    cells = bits >> np.uint32(_BITS_WITHIN)
    bits &= np.uint32(2**_BITS_WITHIN - 1)
    out[...] = bits
    out *= slopes.take(cells, mode="wrap")
    out += starts.take(cells, mode="wrap")


@functools.cache
def _quantiles() -> tuple[np.ndarray, np.ndarray]:
    """Where each cell of the truncated normal's quantile function starts, and its slope, for a variance of 1."""
    normal = statistics.NormalDist()
    low, high = normal.cdf(-2.0), normal.cdf(2.0)
    upper = [normal.inv_cdf(0.5 + (high - low) * cell / _CELLS) for cell in range(_CELLS // 2 + 1)]
    # Symmetric to the last bit.
    ends = np.concatenate([np.negative(upper[:0:-1]), upper]) / TRUNCATED_STD
    return ends[:-1].astype(np.float32), (np.diff(ends) / 2**_BITS_WITHIN).astype(np.float32)


def _by_rows(std: np.ndarray, shape: tuple[int, ...], width: int) -> np.ndarray:
    """The std of a kernel seen as (rows, width): one row when all are alike, one column likewise."""
    std = std.reshape((1,) * (max(len(shape), 1) - std.ndim) + std.shape)
    if std.size == std.shape[-1]:
        return std.reshape(1, -1)
    return np.broadcast_to(std, (*shape[:-1], std.shape[-1])).reshape(-1, std.shape[-1])


def smallest_normal(dtype: np.dtype) -> np.ndarray:
    """The smallest positive number of a floating dtype that no processor takes for 0."""
    if dtype.kind == "f":
        return np.finfo(dtype).smallest_normal
    import ml_dtypes

    return ml_dtypes.finfo(dtype).smallest_normal


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros whose memory TensorFlow can share."""
    size = math.prod(shape) * dtype.itemsize
    if size >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        # A page fault every 4 kB costs as much as all the rest of drawing a sparse kernel.
        buffer = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # A kernel built without huge pages.
            buffer.madvise(mmap.MADV_HUGEPAGE)
        whole, alignment = np.frombuffer(buffer, np.uint8), _HUGE_PAGE
    else:
        whole, alignment = np.zeros(size + _ALIGNMENT, np.uint8), _ALIGNMENT
    start = -whole.ctypes.data % alignment
    return whole[start : start + size].view(dtype).reshape(shape)
