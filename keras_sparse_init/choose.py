"""Exactly k of n entries, uniformly at random, in many columns at once: what every mask is made of.

The work falls into fixed blocks with a random generator each, so that the result depends on the seed alone, not on
how many threads there are. NumPy draws and computes without the interpreter's lock.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from keras_sparse_init.arguments import check_seed
from keras_sparse_init.blocks import map_blocks

_BLOCK = 2**20
# The longest column that is filled entry by entry, vectorised over the columns; counts must fit in 8 bits.
_SHORT = 255
# Keeps a mask's random numbers apart from those of a kernel that is drawn from the same seed.
_SPAWN_KEY = (0x6D61736B,)


def choose(n: int, columns: int, k: int, seed: Any) -> np.ndarray:
    """A 0/1 array with exactly k ones in every column, every choice of k of the n entries equally likely.

    Args:
        n: Entries of a column.
        columns: Number of columns; they are independent.
        k: Ones of a column, 0 <= k <= n.
        seed: Non-negative int.

    Returns:
        A uint8 array of shape (n, columns).

    Raises:
        TypeError: When the seed is not an int.
        ValueError: When the seed is negative.

    Example:
        >>> from keras_sparse_init.choose import choose
        >>> choose(10, 4, 3, seed=0).sum(axis=0).tolist()
        [3, 3, 3, 3]
    """
    if 2 * k > n:
        mask = choose(n, columns, n - k, seed)
        return np.bitwise_xor(mask, 1, out=mask)
    mask = np.empty((n, columns), np.uint8)
    if n <= _SHORT:
        _select(mask, k, seed)
    else:
        _draw_and_top_up(mask, k, seed)
    return mask


def choose_largest(limits: np.ndarray, n: int, k: int, seed: Any) -> np.ndarray:
    """A 0/1 array with ones where the k largest of all values are, those of a column uniform between 0 and its limit.

    Args:
        limits: The limit of each column, positive floats.
        n: Entries of a column.
        k: Ones of the whole array, 1 <= k <= n * columns.
        seed: Non-negative int.

    Returns:
        A uint8 array of shape (n, columns).

    Raises:
        TypeError: When the seed is not an int.
        ValueError: When the seed is negative.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.choose import choose_largest
        >>> choose_largest(np.array([1.0, 1e9]), 4, 4, seed=0).tolist()
        [[0, 1], [0, 1], [0, 1], [0, 1]]
    """
    values = np.empty((n, limits.size))

    def draw(part: slice, rng: np.random.Generator) -> None:
        rng.random(out=values[part])
        values[part] *= limits

    parts = _parts(n, limits.size)
    map_blocks(draw, parts, _generators(seed, len(parts)))
    mask = np.zeros(values.shape, np.uint8)
    mask.reshape(-1)[np.argpartition(values.reshape(-1), values.size - k)[values.size - k :]] = 1
    return mask


def _select(mask: np.ndarray, k: int, seed: Any) -> None:
    """Selection sampling: an entry is taken with probability (ones still needed) / (entries left)."""
    n, columns = mask.shape
    left = np.arange(n, 0, -1, dtype=np.uint32)[:, np.newaxis]

    def fill(part: slice, rng: np.random.Generator) -> None:
        rows = mask[:, part]
        # floor(left * u) with u uniform on 24 bits, which in 32 bits does not overflow.
        words = _random_bytes(rng, 4 * rows.size).view(np.uint32).reshape(rows.shape)
        words >>= 8
        words *= left
        words >>= 24
        needed = np.full(rows.shape[1], k, np.uint8)
        for row, drawn in zip(rows, words.astype(np.uint8), strict=True):
            np.less(drawn, needed, out=row.view(np.bool_))
            needed -= row

    parts = _parts(columns, n)
    map_blocks(fill, parts, _generators(seed, len(parts)))


def _draw_and_top_up(mask: np.ndarray, k: int, seed: Any) -> None:
    """Independent entries at a slightly lower density first, then single ones until every column has k.

    What happens next depends on counts alone, never on places, so that by symmetry all choices stay equally likely.
    """
    n, columns = mask.shape
    # The margin balances the entries that every column lacks at first against columns that have too many and start
    # again. A random byte decides an entry.
    margin = math.sqrt(k * (1 - k / n) * math.log(k + 1))
    threshold = max(0, math.floor(256 * (k - margin) / n))

    def draw(part: slice, rng: np.random.Generator) -> np.ndarray:
        rows = mask[part]
        np.less(_random_bytes(rng, rows.size).reshape(rows.shape), threshold, out=rows.view(np.bool_))
        return rows.sum(axis=0, dtype=np.int64)

    def top_up(part: slice, rng: np.random.Generator) -> None:
        missing = lacking[part]
        excess = np.flatnonzero(missing < 0)
        mask[:, part.start + excess] = 0
        missing[excess] = k
        while (short := np.flatnonzero(missing)).size:
            column = np.repeat(short, missing[short])
            drawn = rng.integers(n, size=column.size) * columns + (part.start + column)
            drawn = np.sort(drawn[entries[drawn] == 0])
            drawn = drawn[np.flatnonzero(np.diff(drawn, prepend=-1))]
            entries[drawn] = 1
            missing -= np.bincount(drawn % columns - part.start, minlength=missing.size)

    row_parts, column_parts = _parts(n, columns), _parts(columns, n)
    generators = _generators(seed, len(row_parts) + len(column_parts))
    lacking = k - sum(map_blocks(draw, row_parts, generators[: len(row_parts)]))
    entries = mask.reshape(-1)
    map_blocks(top_up, column_parts, generators[len(row_parts) :])


def _parts(length: int, width: int) -> list[slice]:
    """Slices of `length` lines of `width` entries each, of about `_BLOCK` entries."""
    step = max(1, _BLOCK // width)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _random_bytes(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.integers(2**64, size=-(-size // 8), dtype=np.uint64).view(np.uint8)[:size]


def _generators(seed: Any, count: int) -> list[np.random.Generator]:
    root = np.random.SeedSequence(check_seed(seed), spawn_key=_SPAWN_KEY)
    return [np.random.Generator(np.random.SFC64(child)) for child in root.spawn(count)]
