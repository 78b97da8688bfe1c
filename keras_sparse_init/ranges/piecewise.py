"""Piecewise linear networks: affine layers with ReLU or leaky ReLU between them, in NumPy and float64.

A network is a list of `Affine` layers, the last of them without activation. Nothing here knows of Keras.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Affine:
    """A layer y = max(z, slope z), z = W x + b.

    Attributes:
        weight: W, an array or scipy sparse array of shape (units, inputs).
        bias: b, of shape (units,).
        slope: Of the negative side, in [0, 1], of shape (units,): 0 is ReLU, 1 no activation.
    """

    weight: Any
    bias: np.ndarray
    slope: np.ndarray

    @classmethod
    def of(cls, weight: Any, bias: Any = 0.0, slope: Any = 1.0) -> Affine:
        """A layer in float64 with bias and slope broadcast over units; the matrix dense or sparse as it is cheaper.

        Raises:
            ValueError: When a number is not finite or a slope is not in [0, 1].
        """
        weight = compact(weight)
        units = weight.shape[0]
        bias = np.array(np.broadcast_to(np.asarray(bias, np.float64), (units,)))
        slope = np.array(np.broadcast_to(np.asarray(slope, np.float64), (units,)))
        if not (np.isfinite(_entries(weight)).all() and np.isfinite(bias).all()):
            raise ValueError("weights and biases must be finite")
        if not ((slope >= 0) & (slope <= 1)).all():
            raise ValueError(f"slopes must be in [0, 1]. Received: {slope[~((slope >= 0) & (slope <= 1))][0]}")
        return cls(weight, bias, slope)

    @property
    def linear(self) -> bool:
        """Whether no unit has an activation."""
        return bool(np.all(self.slope == 1))

    def pre_activation(self, x: np.ndarray) -> np.ndarray:
        """The z of inputs of shape (samples, inputs)."""
        return (self.weight @ x.T).T + self.bias

    def activation(self, z: np.ndarray) -> np.ndarray:
        """The y of some z."""
        return np.where(z < 0, self.slope * z, z)


def chain(layers: Iterable[Affine]) -> list[Affine]:
    """The same function with consecutive affine layers folded, and the last layer without activation.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.ranges.piecewise import Affine, chain
        >>> folded = chain([Affine.of([[2.0]], 1.0), Affine.of([[3.0]], 0.0, slope=0.0)])
        >>> [(layer.weight.item(), layer.bias.item()) for layer in folded]
        [(6.0, 3.0), (1.0, 0.0)]
    """
    folded: list[Affine] = []
    for layer in layers:
        if folded and folded[-1].linear:
            before = folded.pop()
            bias = layer.weight @ before.bias + layer.bias
            layer = Affine.of(layer.weight @ before.weight, bias, layer.slope)
        folded.append(layer)
    if not folded:
        raise ValueError("a network must have a layer")
    if not folded[-1].linear:
        folded.append(Affine.of(_identity(folded[-1].bias.size)))
    return folded


def forward(network: list[Affine], x: np.ndarray) -> np.ndarray:
    """Outputs of shape (samples, outputs) of inputs of shape (samples, inputs)."""
    for layer in network:
        x = layer.activation(layer.pre_activation(x))
    return x


def _entries(weight: Any) -> np.ndarray:
    return weight if isinstance(weight, np.ndarray) else weight.data


def _identity(size: int) -> Any:
    from scipy import sparse

    return sparse.eye_array(size, format="csr")


def compact(weight: Any) -> Any:
    """The matrix as a sparse array when at most one entry in ten is not 0, else as a dense one."""
    from scipy import sparse

    size, entries = np.prod(np.shape(weight)), weight.nnz if sparse.issparse(weight) else np.count_nonzero(weight)
    if 10 * entries <= size and size >= 1000:
        return sparse.csr_array(weight, dtype=np.float64)
    return np.array(weight.toarray() if sparse.issparse(weight) else weight, dtype=np.float64, ndmin=2)
