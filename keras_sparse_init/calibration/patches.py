"""What the units of a convolution are given: patches of its input. Pure NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def patches(
    inputs: np.ndarray,
    kernel_size: Sequence[int],
    strides: Sequence[int],
    padding: str,
    dilation: Sequence[int],
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Patches of an input, one for each position of a convolution's output.

    Args:
        inputs: An array of shape (samples, positions..., channels), with as many axes of positions as `kernel_size`.
        kernel_size: The kernel's size on these axes.
        strides: The strides on these axes.
        padding: "valid"; "same", as many positions as without padding at a stride of 1, more zeros at the end than at
            the beginning when their number is odd; or "causal", zeros at the beginning alone.
        dilation: The steps from weight to weight on these axes.
        rows: Numbers of the patches that are wanted, counted over samples and then positions; None for all.

    Returns:
        An array of shape (patches, kernel size x channels), in the order of a kernel of shape (kernel_size...,
        channels, units): `patches(...) @ kernel.reshape(-1, units)` is the convolution.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.calibration.patches import patches
        >>> patches(np.arange(4.0).reshape(1, 4, 1), (2,), (1,), "same", (1,)).tolist()
        [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0], [3.0, 0.0]]
    """
    rank = len(kernel_size)
    reach = [step * (size - 1) + 1 for size, step in zip(kernel_size, dilation, strict=True)]
    widths = [
        _padding(length, size, stride, padding)
        for length, size, stride in zip(inputs.shape[1:-1], reach, strides, strict=True)
    ]
    padded = np.pad(inputs, [(0, 0), *widths, (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(1, rank + 1)))
    # (samples, positions..., channels, window...): strided, dilated, and channels last.
    starts = tuple(slice(None, None, stride) for stride in strides)
    steps = tuple(slice(None, None, step) for step in dilation)
    windows = np.moveaxis(windows[(slice(None), *starts, slice(None), *steps)], rank + 1, -1)
    shape = windows.shape[: rank + 1]
    places = np.unravel_index(np.arange(math.prod(shape)) if rows is None else rows, shape)
    return windows[places].reshape(len(places[0]), -1)


def _padding(length: int, reach: int, stride: int, padding: str) -> tuple[int, int]:
    if padding == "causal":
        return reach - 1, 0
    if padding == "valid":
        return 0, 0
    total = max((math.ceil(length / stride) - 1) * stride + reach - length, 0)
    return total // 2, total - total // 2
