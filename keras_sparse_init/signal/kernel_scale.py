"""How large the weights of a kernel are, against what its initializer gives to a sparse and to a dense kernel."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_sparse_init import compat, fans
from keras_sparse_init.isometry import matrices
from keras_sparse_init.layers import WeightNorm
from keras_sparse_init.masked_kernel import MaskedKernel
from keras_sparse_init.matching import mask_aware
from keras_sparse_init.orthogonal_initializers import ApproximateIsometryInit
from keras_sparse_init.traversal import walk
from keras_sparse_init.variance import weight_std


def effective_values(model: Any, kernels: list[MaskedKernel]) -> list[np.ndarray]:
    """The masked kernels as their layers use them but for masks: of a `WeightNorm` layer w, not v."""
    effective = {}
    for layer in [model, *(layer for _, _, layer in walk(model))]:
        if isinstance(layer, WeightNorm):
            for slot, w in zip(layer._slots, layer.effective_weights(), strict=True):
                effective[id(slot.kernel)] = w
    return [compat.view(effective.get(id(kernel.kernel), compat.kept_value(kernel.kernel))) for kernel in kernels]


def scale_of(values: np.ndarray, mask: np.ndarray, layout: fans.KernelLayout) -> float | None:
    """The sum of the squares of the weights into a unit, mean over the units that have any weights.

    Args:
        values: The kernel.
        mask: Its boolean mask.
        layout: Its layout; an embedding, which puts out one row at a time, has no such scale.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.fans import kernel_layout
        >>> from keras_sparse_init.signal.kernel_scale import scale_of
        >>> scale_of(np.full((4, 2), 0.5), np.array([[1, 0]] * 4, bool), kernel_layout("dense", (4, 2)))
        1.0
    """
    units = int(np.count_nonzero(fans.fan_in(mask, layout)))
    if layout.one_hot or not units:
        return None
    active = values[mask].astype(np.float64)
    return float(active @ active) / units


def expected_scales(kernel: MaskedKernel, mask: np.ndarray) -> tuple[float | None, float | None]:
    """What `scale_of` is on average for its mask, and as if it were dense, when the layer's own initializer draws it.

    Returns:
        Two floats, or two None when the initializer has no variance.
    """
    units = int(np.count_nonzero(fans.fan_in(mask, kernel.layout)))
    if kernel.layout.one_hot or not units:
        return None, None
    try:
        own = mask_aware(kernel.initializer, kernel.name, kernel.shape, kernel.layout)
    except (AttributeError, TypeError, ValueError):
        return None, None
    if isinstance(own, ApproximateIsometryInit):
        # Each unit, or each input of a kernel that has fewer of them, has the norm `gain`, if it has any weight.
        total = own.gain**2 * float(np.count_nonzero(matrices(mask, kernel.layout).any(axis=1)))
        return total / units, total * float(mask.mean()) / units
    scales = []
    for granularity in ("unit", "dense"):
        std = weight_std(kernel.shape, mask, kernel.layout, own.scale, own.mode, granularity)
        scales.append(float((mask * np.square(std)).sum() / units))
    return scales[0], scales[1]
