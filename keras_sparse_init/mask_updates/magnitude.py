"""Masks that keep the largest weights: of a kernel, of several together, or in a pattern. Pure NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_sparse_init import fans
from keras_sparse_init.masks import NM, Block, ConstantFanIn, check_sparsity, nm_axis

# Up to here the entries of an N:M group are ranked by comparing all pairs, which is faster than a partition of each.
_SMALL_GROUP = 16

_RULES = (NM, Block, ConstantFanIn)


def kept(size: int, sparsity: float) -> int:
    """How many of `size` weights stay at a sparsity: max(round(size * (1 - sparsity)), 1) in float32, as in tfmot."""
    count = np.rint(np.float32(size) * (np.float32(1) - np.float32(sparsity)))
    return min(max(int(count), 1), size)


def check_rule(rule: Any) -> None:
    """A TypeError unless the rule is a pattern that magnitudes can fill."""
    if rule is not None and not isinstance(rule, _RULES):
        raise TypeError(
            "`rule` must be None or an instance of masks.NM, masks.Block or masks.ConstantFanIn. "
            f"Received: rule={rule!r}"
        )


def check_pattern(rule: Any, shape: tuple[int, ...], kernel_layout: Any = None) -> None:
    """A ValueError unless a kernel of this shape can have the rule's pattern."""
    if isinstance(rule, NM):
        nm_axis(shape, rule.m, rule.axis, kernel_layout)
    if isinstance(rule, Block) and len(rule.block_size) > len(shape):
        raise ValueError(
            f"`block_size` must not have more axes than the kernel. Received: block_size={rule.block_size} "
            f"for shape={shape}"
        )


def magnitude_mask(weights: Any, sparsity: float, rule: Any = None, kernel_layout: Any = None) -> np.ndarray:
    """The mask that keeps a kernel's largest weights.

    With k(n) = max(round(n * (1 - sparsity)), 1) in float32 arithmetic:

    - no rule: |w| >= the k(size)-th largest |w|. Weights as large as that are all kept, as in tfmot: a kernel of zeros
      keeps everything, and so does one that is sparser than `sparsity` already;
    - `masks.ConstantFanIn`: the k(inputs) largest of every output unit;
    - `masks.NM(n, m)`: the max(k(m), n) largest of every m, never fewer than n of them;
    - `masks.Block`: the blocks whose mean |w| is at least the k(blocks)-th largest. At the end of an axis that the
      block does not divide, the mean is that of the part of the block inside the kernel.

    The pattern is the rule's, the sparsity the argument's: a rule's own sparsity counts for N:M only, as a limit. Of
    equal weights in a unit or an N:M group the first are kept. NaN counts as infinitely large: it is not hidden.

    Args:
        weights: The kernel, an array of floats.
        sparsity: Fraction of zeros, in [0, 1).
        rule: None, `masks.NM`, `masks.Block` or `masks.ConstantFanIn`.
        kernel_layout: A `KernelLayout`, a layout name or a layer; None for Keras's convention by rank.

    Returns:
        A uint8 array of 0 and 1 in the kernel's shape.

    Raises:
        ValueError: When the sparsity is out of range or the pattern does not fit the shape.
        TypeError: When the rule is none of those.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init import masks
        >>> from keras_sparse_init.mask_updates.magnitude import magnitude_mask
        >>> kernel = np.array([[0.1, -4.0], [0.2, 3.0], [-0.3, 2.0], [0.4, 1.0]])
        >>> magnitude_mask(kernel, 0.5).T.tolist()
        [[0, 0, 0, 0], [1, 1, 1, 1]]
        >>> magnitude_mask(kernel, 0.5, masks.ConstantFanIn(0.5)).T.tolist()
        [[0, 0, 1, 1], [1, 1, 0, 0]]

    Reference:
        Zhu and Gupta 2017, arXiv:1710.01878. N:M: Mishra et al. 2021, Accelerating Sparse Deep Neural Networks,
        arXiv:2104.08378. Blocks: Narang et al. 2017, Block-Sparse Recurrent Neural Networks, arXiv:1711.02782.
    """
    sparsity = check_sparsity(sparsity)
    check_rule(rule)
    magnitudes = magnitudes_of(weights)
    shape = magnitudes.shape
    check_pattern(rule, shape, kernel_layout)
    if not magnitudes.size:
        return np.ones(shape, np.uint8)
    if isinstance(rule, NM):
        axis = nm_axis(shape, rule.m, rule.axis, kernel_layout)
        groups = magnitudes.reshape(math.prod(shape[:axis]), shape[axis] // rule.m, rule.m, -1)
        mask = _largest(groups, max(kept(rule.m, sparsity), rule.n), axis=2)
    elif isinstance(rule, ConstantFanIn):
        mask = _constant_fan_in(magnitudes, sparsity, kernel_layout)
    elif isinstance(rule, Block):
        mask = _block(magnitudes, sparsity, rule.block_size)
    else:
        mask = _from_threshold(magnitudes, sparsity)
    return np.ascontiguousarray(mask).reshape(shape).view(np.uint8)


def global_magnitude_masks(weights: Sequence[Any], sparsity: float) -> list[np.ndarray]:
    """The masks that keep the largest weights of several kernels together, by one threshold for all of them.

    Exactly max(round(total * (1 - sparsity)), kernels) weights are kept, the first ones of those as large as the
    threshold. Every kernel keeps at least its largest weight, which counts in that number.

    Args:
        weights: The kernels.
        sparsity: Fraction of zeros over all kernels together, in [0, 1).

    Returns:
        A uint8 array of 0 and 1 for every kernel.

    Raises:
        ValueError: When the sparsity is out of range.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.mask_updates.magnitude import global_magnitude_masks
        >>> global_magnitude_masks([np.array([5.0, 4.0, 3.0]), np.array([2.0, 0.1, 0.1])], 0.5)
        [array([1, 1, 0], dtype=uint8), array([1, 0, 0], dtype=uint8)]

    Reference:
        Blalock et al. 2020, What is the State of Neural Network Pruning?, arXiv:2003.03033 (global magnitude pruning).
    """
    return _masks_of_the_largest([magnitudes_of(array) for array in weights], check_sparsity(sparsity))


def lamp_masks(weights: Sequence[Any], sparsity: float) -> list[np.ndarray]:
    """The masks that keep the weights with the largest LAMP scores of several kernels together.

    score(w_u) = w_u^2 / sum_v w_v^2, the sum over the weights v of the same kernel that are no smaller than w_u. In a
    kernel the order is that of magnitudes; between kernels their scales do not count, so that none collapses because
    its weights are small. As many weights are kept as by `global_magnitude_masks`.

    Args:
        weights: The kernels.
        sparsity: Fraction of zeros over all kernels together, in [0, 1).

    Returns:
        A uint8 array of 0 and 1 for every kernel.

    Raises:
        ValueError: When the sparsity is out of range.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.mask_updates.magnitude import lamp_masks
        >>> lamp_masks([np.array([5.0, 4.0, 3.0]), np.array([0.2, 0.1, 0.1])], 0.5)
        [array([1, 1, 0], dtype=uint8), array([1, 0, 0], dtype=uint8)]

    Reference:
        Lee et al. 2021, Layer-adaptive Sparsity for the Magnitude-based Pruning, arXiv:2010.07611, equation (4).
    """
    return _masks_of_the_largest([lamp_scores(array) for array in weights], check_sparsity(sparsity))


def lamp_scores(weights: Any) -> np.ndarray:
    """The LAMP scores of a kernel, see `lamp_masks`: a float64 array of its shape; NaN counts as infinitely large."""
    magnitudes = magnitudes_of(weights).astype(np.float64).reshape(-1)
    largest = magnitudes.max(initial=0.0, where=np.isfinite(magnitudes))
    # Scores do not depend on the scale, but squares of tiny weights would underflow.
    squares = np.square(magnitudes / largest if largest else magnitudes)
    order = np.argsort(-magnitudes, kind="stable")
    sums = np.cumsum(np.where(np.isfinite(squares), squares, 0.0)[order])
    scores = np.empty_like(squares)
    scores[order] = np.divide(squares[order], sums, out=squares[order].copy(), where=sums > 0)
    return scores.reshape(np.shape(weights))


def _masks_of_the_largest(scores: list[np.ndarray], sparsity: float) -> list[np.ndarray]:
    """Masks of the largest scores, together; every kernel keeps its largest."""
    filled = [array for array in scores if array.size]
    if not filled:
        return [np.ones(array.shape, np.uint8) for array in scores]
    together = np.concatenate([array.ravel() for array in filled])
    starts = np.cumsum([0, *(array.size for array in filled[:-1])])
    largest = starts + [array.argmax() for array in filled]
    # Chosen before all others.
    together[largest] = np.inf
    mask = _largest(together, max(kept(together.size, sparsity), len(filled)), axis=0).view(np.uint8)
    parts = np.split(mask, np.cumsum([array.size for array in scores])[:-1])
    return [part.reshape(array.shape) for part, array in zip(parts, scores, strict=True)]


def magnitudes_of(weights: Any) -> np.ndarray:
    """|w| as a new array of float32 or float64; NaN counts as infinitely large."""
    weights = np.asarray(weights)
    if weights.dtype != np.float64:
        # Half types are exact in float32.
        weights = weights.astype(np.float32, copy=False)
    magnitudes = np.abs(weights)
    missing = np.isnan(magnitudes)
    if missing.any():
        magnitudes[missing] = np.inf
    return magnitudes


def _from_threshold(magnitudes: np.ndarray, sparsity: float) -> np.ndarray:
    """All entries as large as the k-th largest."""
    dropped = magnitudes.size - kept(magnitudes.size, sparsity)
    return magnitudes >= np.partition(magnitudes, dropped, axis=None)[dropped]


def _largest(magnitudes: np.ndarray, k: int, axis: int) -> np.ndarray:
    """Exactly the k largest along an axis, the first ones among equals, whatever the order of a partition is."""
    n = magnitudes.shape[axis]
    if n <= _SMALL_GROUP:
        lines = np.moveaxis(magnitudes, axis, 0)
        rank = np.zeros(lines.shape, np.uint8)
        for i in range(n):
            for j in range(i):
                first_wins = lines[j] >= lines[i]
                rank[i] += first_wins
                rank[j] += ~first_wins
        return np.moveaxis(rank < k, 0, axis)
    threshold = np.take(np.partition(magnitudes, n - k, axis=axis), [n - k], axis=axis)
    above = magnitudes > threshold
    equal = magnitudes == threshold
    room = k - above.sum(axis=axis, keepdims=True, dtype=np.int64)
    if (equal.sum(axis=axis, keepdims=True, dtype=np.int64) > room).any():
        equal &= equal.cumsum(axis=axis, dtype=np.int64) <= room
    return above | equal


def _constant_fan_in(magnitudes: np.ndarray, sparsity: float, kernel_layout: Any) -> np.ndarray:
    layout = fans.kernel_layout(kernel_layout, magnitudes.shape)
    axes = layout.output_axes + layout.fan_in_axes
    inputs = math.prod(magnitudes.shape[axis] for axis in layout.fan_in_axes)
    units = magnitudes.transpose(axes)
    mask = _largest(units.reshape(-1, inputs), kept(inputs, sparsity), axis=1)
    return mask.reshape(units.shape).transpose(np.argsort(axes))


def _block(magnitudes: np.ndarray, sparsity: float, block_size: tuple[int, ...]) -> np.ndarray:
    shape = magnitudes.shape
    block = (1,) * (len(shape) - len(block_size)) + block_size
    means = magnitudes
    for axis, (length, extent) in enumerate(zip(shape, block, strict=True)):
        if extent > 1:
            starts = np.arange(0, length, extent)
            counts = np.diff(starts, append=length).astype(means.dtype)
            counts = counts.reshape([-1 if i == axis else 1 for i in range(len(shape))])
            means = np.add.reduceat(means, starts, axis=axis) / counts
    mask = _from_threshold(means, sparsity)
    for axis in reversed(range(len(shape))):
        if block[axis] > 1:
            mask = mask.repeat(block[axis], axis)
    return mask[tuple(slice(length) for length in shape)]
