"""From standard deviations and a seed to values: NumPy only, the same bits in every process and on every replica."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np

from keras_sparse_init.blocks import map_blocks, row_blocks

Distribution = Literal["truncated_normal", "untruncated_normal", "uniform"]
DISTRIBUTIONS = ("truncated_normal", "untruncated_normal", "uniform")

# Standard deviation of N(0, 1) truncated at 2 sigma: sqrt(1 - 4 pdf(2) / (2 cdf(2) - 1)).
TRUNCATED_STD = 0.87962566103423978

# Above this share of nonzeros in a block, drawing all of it is faster than drawing the nonzeros alone.
_DENSE_FROM = 0.75

# DLPack tensors must start at a multiple of 64 bytes.
_ALIGNMENT = 64


def sample(
    std: Any,
    shape: tuple[int, ...],
    seed: int,
    mask: np.ndarray | None = None,
    distribution: Distribution = "truncated_normal",
    dtype: Any = np.float32,
) -> np.ndarray:
    """Random values of mean 0 and the given standard deviations, exactly 0 where the mask is 0.

    truncated_normal: N(0, 1) redrawn beyond 2 sigma and divided by 0.87962566, so that the variance is exact.
    uniform: between -sqrt(3) std and sqrt(3) std. Half-precision types are drawn in float32 and cast. A weight
    whose mask is 1 is never exactly 0, so that `kernel != 0` recovers the mask.

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
    out = _aligned_zeros(shape, dtype)
    out_rows = out.reshape(-1, width)
    std_rows = _by_rows(np.asarray(std, drawn_as), shape, width)
    mask_rows = None if mask is None else mask.reshape(-1, width)
    blocks = row_blocks(out_rows.shape[0], width)
    same_rows = std_rows.shape[0] == 1
    # A factor that is the same for every row is laid out once for a block, so that it can be gathered by flat index.
    tile = np.tile(std_rows[0], blocks[0].stop) if mask is not None and same_rows and std_rows.size > 1 else None
    smallest = _smallest_normal(dtype)

    def fill(rows: slice, child: np.random.SeedSequence) -> None:
        rng = np.random.Generator(np.random.SFC64(child))
        block = out_rows[rows]
        factor = std_rows if same_rows else std_rows[rows]
        active = None if mask_rows is None else np.flatnonzero(mask_rows[rows])
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
            if std_rows.size == 1:
                values *= std_rows.item()
            else:
                values *= (np.broadcast_to(factor, block.shape).reshape(-1) if tile is None else tile).take(active)
            values = values.astype(dtype, copy=False)
            values[values == 0] = smallest
            block.reshape(-1)[active] = values

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


def _draw(rng: np.random.Generator, out: np.ndarray, distribution: str) -> None:
    """Fills a vector with values of mean 0 and variance 1."""
    if distribution == "uniform":
        rng.random(out=out, dtype=out.dtype)
        out -= 0.5
        out *= out.dtype.type(np.sqrt(12.0))
        return
    rng.standard_normal(out=out, dtype=out.dtype)
    if distribution == "truncated_normal":
        beyond = np.flatnonzero(np.abs(out) > 2)
        while beyond.size:
            redrawn = rng.standard_normal(beyond.size, dtype=out.dtype)
            out[beyond] = redrawn
            beyond = beyond[np.abs(redrawn) > 2]
        out /= out.dtype.type(TRUNCATED_STD)


def _by_rows(std: np.ndarray, shape: tuple[int, ...], width: int) -> np.ndarray:
    """The std of a kernel seen as (rows, width): one row when all are alike, one column likewise."""
    std = std.reshape((1,) * (max(len(shape), 1) - std.ndim) + std.shape)
    if std.size == std.shape[-1]:
        return std.reshape(1, -1)
    return np.broadcast_to(std, (*shape[:-1], std.shape[-1])).reshape(-1, std.shape[-1])


def _smallest_normal(dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "f":
        return np.finfo(dtype).smallest_normal
    import ml_dtypes

    return ml_dtypes.finfo(dtype).smallest_normal


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)
