"""Gains, scale and mode: from fans to the standard deviation of every weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from keras_sparse_init.arguments import check_choice, check_finite, check_positive
from keras_sparse_init.fans import KernelLayout, as_mask, check_shape, dense_fans, fan_in, fan_out

Mode = Literal["fan_in", "fan_out", "fan_avg"]
Granularity = Literal["unit", "effective", "layer", "dense"]
MODES = ("fan_in", "fan_out", "fan_avg")
GRANULARITIES = ("unit", "effective", "layer", "dense")

_FIXED_GAINS = {
    "linear": 1.0,
    "identity": 1.0,
    "sigmoid": 1.0,
    "hard_sigmoid": 1.0,
    "softmax": 1.0,
    "tanh": 5.0 / 3.0,
    "relu": math.sqrt(2.0),
    "selu": 3.0 / 4.0,
}


def _silu(z: np.ndarray) -> np.ndarray:
    return z / (1.0 + np.exp(-z))


def _gelu(z: np.ndarray) -> np.ndarray:
    return z * 0.5 * (1.0 + np.array([math.erf(x / math.sqrt(2.0)) for x in z]))


def _elu(z: np.ndarray) -> np.ndarray:
    return np.where(z > 0, z, np.expm1(np.minimum(z, 0.0)))


_INTEGRATED_GAINS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": _silu,
    "swish": _silu,
    "gelu": _gelu,
    "elu": _elu,
}


def gain(activation: str | Callable[..., Any] | None, negative_slope: float | None = None) -> float:
    """How much larger weights must be so that an activation keeps the signal's variance.

    relu: sqrt(2). leaky_relu: sqrt(2 / (1 + negative_slope^2)). linear, sigmoid, softmax: 1. tanh: 5/3. selu: 3/4.
    silu, gelu, elu: 1 / sqrt(E[f(z)^2]) with z ~ N(0, 1). Use it as `scale=gain(...)**2`.

    Args:
        activation: Name of a Keras activation, the Keras function itself, or None for linear.
        negative_slope: Slope of `leaky_relu` for negative inputs; 0.2 when not given, as in Keras 3.

    Returns:
        The gain, a positive float.

    Raises:
        ValueError: When the activation is unknown, or `negative_slope` is not finite or given for another activation.

    Example:
        >>> from keras_sparse_init import gain
        >>> round(gain("leaky_relu", 0.2), 7), round(gain("gelu"), 4)
        (1.3867505, 1.5335)

    Reference:
        He et al. 2015, Delving Deep into Rectifiers, arXiv:1502.01852, eq. (15). The values of tanh and selu are
        the customary ones of `torch.nn.init.calculate_gain`.
    """
    name = "linear" if activation is None else getattr(activation, "__name__", activation)
    name = name if isinstance(name, str) else None  # Which no table has.
    if name == "leaky_relu":
        slope = 0.2 if negative_slope is None else negative_slope
        return math.sqrt(2.0 / (1.0 + check_finite("negative_slope", slope) ** 2))
    if negative_slope is not None:
        raise ValueError(
            f"`negative_slope` belongs to the activation 'leaky_relu'. "
            f"Received: activation={name!r}, negative_slope={negative_slope}"
        )
    if name in _FIXED_GAINS:
        return _FIXED_GAINS[name]
    if name in _INTEGRATED_GAINS:
        return _integrated_gain(name)
    allowed = sorted([*_FIXED_GAINS, *_INTEGRATED_GAINS, "leaky_relu"])
    raise ValueError(f"`activation` must be one of {', '.join(allowed)}. Received: activation={activation!r}")


@functools.cache
def _integrated_gain(name: str) -> float:
    # Gauss-Legendre on either side of 0, where elu has its kink; beyond 12 the density is below 1e-31.
    nodes, weights = np.polynomial.legendre.leggauss(100)
    z = 6.0 * (nodes + 1.0)
    density = 6.0 * weights * np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)
    f = _INTEGRATED_GAINS[name]
    return 1.0 / math.sqrt(float(density @ f(z) ** 2 + density @ f(-z) ** 2))


def weight_std(
    shape: Any,
    mask: Any = None,
    layout: KernelLayout | str | None = None,
    scale: float = 1.0,
    mode: Mode = "fan_in",
    granularity: Granularity = "unit",
    live_inputs: Any = None,
    live_outputs: Any = None,
) -> np.ndarray:
    """Standard deviation of every weight of a kernel: sqrt(scale / fan).

    unit: the fan of the very units that a weight connects (fan_in_j, fan_out_i, or their mean). effective: the same,
    but fan_in_j counts live inputs only, and fan_out_i live outputs. layer: the dense fan times the layer's density.
    dense: the dense fan. Fans below 1 count as 1.

    Args:
        shape: The kernel's shape.
        mask: Array of that shape with entries 0 and 1, or None for a dense kernel.
        layout: A `KernelLayout`, a layout name, or None for Keras's convention.
        scale: Positive float, the squared gain.
        mode: "fan_in", "fan_out" or "fan_avg".
        granularity: "unit", "effective", "layer" or "dense".
        live_inputs: Of "effective", a boolean array that broadcasts to `shape`: whether a weight's input gets a signal.
            None: all do.
        live_outputs: The same for outputs that pass a signal on.

    Returns:
        A float64 array that broadcasts to `shape`.

    Raises:
        ValueError: When an argument is not one of those allowed, or the mask has another shape.

    Example:
        >>> from keras_sparse_init.variance import weight_std
        >>> weight_std((4, 2), mask=[[1, 1], [1, 0], [1, 0], [1, 0]], scale=1.0).tolist()
        [[0.5, 1.0]]

    Reference:
        unit: Evci et al. 2020, arXiv:2010.03533, section 3.1. layer: Liu et al. 2018, arXiv:1810.05270.
    """
    check_positive("scale", scale)
    check_choice("mode", mode, MODES)
    check_choice("granularity", granularity, GRANULARITIES)
    shape = check_shape(shape)
    if mask is not None:
        mask = as_mask(mask, shape)
    if mask is None or granularity in ("layer", "dense"):
        density = np.count_nonzero(mask) / mask.size if mask is not None and granularity == "layer" else 1.0
        dense_in, dense_out = dense_fans(shape, layout)
        fan = {"fan_in": dense_in, "fan_out": dense_out, "fan_avg": (dense_in + dense_out) / 2.0}[mode] * density
    else:
        counted_in = counted_out = mask
        if granularity == "effective":
            counted_in = mask if live_inputs is None else mask & live_inputs
            counted_out = mask if live_outputs is None else mask & live_outputs
        if mode == "fan_avg":
            fan = (fan_in(counted_in, layout) + fan_out(counted_out, layout)) / 2.0
        else:
            fan = fan_in(counted_in, layout) if mode == "fan_in" else fan_out(counted_out, layout)
    return np.sqrt(scale / np.maximum(fan, 1.0))
