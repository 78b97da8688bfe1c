"""Dropping and growing connections: a mask's smallest weights go, as many others come. Pure NumPy."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from keras_sparse_init.blocks import map_blocks, row_blocks
from keras_sparse_init.mask_updates.magnitude import magnitudes_of
from keras_sparse_init.sampling import nonzeros

Growth = Literal["random", "largest", "smallest"]

# From here on, most entries are ruled out by a threshold that a sample of them suggests.
_LARGE = 2**14
_SAMPLE = 2**12
# What is computed of so many entries at a time stays in a cache.
_IN_CACHE = 2**16
# Random places are tried one after the other as long as at least this share of all is free.
_FREE = 0.25


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """What becomes of a mask.

    Attributes:
        mask: The new mask, a boolean array in the kernel's shape.
        dropped: Flat positions of the connections that the new mask lacks, in any order.
        grown: Flat positions of those that it has in their place, as many, in any order.
    """

    mask: np.ndarray
    dropped: np.ndarray
    grown: np.ndarray


def number_dropped(active: int, fraction: float) -> int:
    """How many of the active connections are dropped: active * fraction in float32, rounded down."""
    return min(int(np.float32(active) * np.float32(fraction)), active)


def drop_and_grow(
    weights: Any, mask: np.ndarray, fraction: float, growth: Growth, gradient: Any = None, seed: int = 0
) -> Exchange:
    """Drops the smallest active weights of a kernel and grows as many connections among all that are then inactive.

    A connection that has just been dropped may be grown again; it is then neither dropped nor grown in the result. Of
    weights or gradients that are equally large, seeded random ones are chosen: a kernel of zeros or a gradient of
    zeros favours no unit. A weight that is NaN counts as infinitely large; where a gradient is NaN nothing is grown,
    as long as there is another place. The number of connections stays as it is, exactly.

    Args:
        weights: The kernel, an array of floats.
        mask: Its mask, a boolean array of the same shape.
        fraction: Which part of the active connections is dropped, in [0, 1]: `number_dropped` of them.
        growth: Where connections are grown: "random", or where |gradient| is "largest" or "smallest".
        gradient: The gradient for all weights, inactive ones too; not for random growth.
        seed: Non-negative int.

    Returns:
        An `Exchange`.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.mask_updates.drop_grow import drop_and_grow
        >>> weights, gradient = np.array([3.0, -1.0, 2.0, 0.0, 0.0, 0.0]), np.array([0.0, 0.1, 0.0, 0.1, -0.5, 0.2])
        >>> exchange = drop_and_grow(weights, weights != 0, 0.4, "largest", gradient)
        >>> exchange.mask.astype(int).tolist(), exchange.dropped.tolist(), exchange.grown.tolist()
        ([1, 0, 1, 0, 1, 0], [1], [4])

    Reference:
        SET: Mocanu et al. 2018, arXiv:1707.04780. RigL: Evci et al. 2019, arXiv:1911.11134, algorithm 1.
    """
    old = np.ascontiguousarray(mask).reshape(-1)
    active = nonzeros(old)
    count = number_dropped(active.size, fraction)
    if count == 0 or active.size == old.size:
        return Exchange(mask, active[:0], active[:0])
    rng = np.random.Generator(np.random.SFC64(seed))
    drop = largest(-magnitudes_of(np.asarray(weights).reshape(-1).take(active)), count, rng)
    kept = np.ones(active.size, np.bool_)
    kept[drop] = False
    new = np.zeros(old.size, np.bool_)
    new[active[kept]] = True
    if growth == "random":
        chosen = _random_free(new, count, rng)
    else:
        chosen = _best_free(np.asarray(gradient).reshape(-1), new, count, growth, rng)
    new[chosen] = True
    assert np.count_nonzero(new) == active.size, "the number of connections must stay the same"
    dropped = active[drop]
    return Exchange(new.reshape(mask.shape), dropped[~new[dropped]], chosen[~old[chosen]])


def _best_free(
    gradient: np.ndarray, taken: np.ndarray, count: int, growth: Growth, rng: np.random.Generator
) -> np.ndarray:
    """Positions of `count` entries that are not taken and whose |gradient| is the largest or the smallest."""
    free = _beyond_a_threshold(gradient, taken, count, growth)
    if free is None:
        free = np.flatnonzero(~taken)
    return free[largest(_scores(gradient.take(free), growth), count, rng)]


def _scores(gradient: np.ndarray, growth: Growth) -> np.ndarray:
    """Where these are largest, connections are grown; where the gradient is NaN they are lowest."""
    scores = np.abs(gradient if gradient.dtype == np.float64 else gradient.astype(np.float32, copy=False))
    if growth == "smallest":
        np.negative(scores, out=scores)
    scores[np.isnan(scores)] = -np.inf
    return scores


def _beyond_a_threshold(gradient: np.ndarray, taken: np.ndarray, count: int, growth: Growth) -> np.ndarray | None:
    """Free positions that hold the best scores and not many others; None when that would save nothing.

    All free ones beyond some threshold, which a sample suggests: whatever it is, when there are enough of them they
    are the best. The rest is never sorted, nor are its positions listed.
    """
    if gradient.size < _LARGE:
        return None
    step = gradient.size // _SAMPLE
    sample = _scores(gradient[::step][~taken[::step]], growth)
    # Five standard deviations more than needed.
    wanted = count / step
    rank = sample.size - 1 - int(wanted + 5 * math.sqrt(wanted) + 5)
    if rank < sample.size // 2:
        return None
    threshold = abs(np.partition(sample, rank)[rank])
    compare = np.greater if growth == "largest" else np.less

    def beyond(part: slice) -> np.ndarray:
        found = []
        for start in range(part.start, part.stop, _IN_CACHE):
            these = slice(start, min(start + _IN_CACHE, part.stop))
            flags = compare(np.abs(gradient[these]), threshold)
            # Of booleans: those that are true here and false there.
            np.greater(flags, taken[these], out=flags)
            found.append(nonzeros(flags) + start)
        return np.concatenate(found)

    found = np.concatenate(map_blocks(beyond, row_blocks(gradient.size, 1)))
    return found if count <= found.size else None


def largest(scores: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of the `count` largest of a vector of scores, of equal ones random ones. Scores are no NaN.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.mask_updates.drop_grow import largest
        >>> largest(np.array([3.0, 1.0, 4.0, 1.0]), 2, np.random.default_rng(0)).tolist()
        [2, 0]
    """
    smallest = scores.size - count
    threshold = np.partition(scores, smallest)[smallest]
    above = np.flatnonzero(scores > threshold)
    equal = np.flatnonzero(scores == threshold)
    room = count - above.size
    if room < equal.size:
        equal = rng.permutation(equal)[:room]
    return np.concatenate([above, equal])


def _random_free(taken: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of `count` entries that are not taken, all choices equally likely."""
    free = taken.size - np.count_nonzero(taken)
    if free < _FREE * taken.size:
        return rng.choice(np.flatnonzero(~taken), count, replace=False, shuffle=False)
    # What is tried next depends on counts alone, so that by symmetry all choices are equally likely.
    taken, found, missing = taken.copy(), [], count
    while missing:
        tried = rng.integers(taken.size, size=missing)
        tried = np.sort(tried[~taken[tried]])
        tried = tried[np.flatnonzero(np.diff(tried, prepend=-1))]
        taken[tried] = True
        found.append(tried)
        missing -= tried.size
    return np.concatenate(found)
