"""What the masks of a model connect, over its whole graph: paths from its inputs to its outputs.

A unit is a channel: all positions of an image or sequence together. Layers that act unit by unit (activations,
normalization, dropout) pass connections through, as do pooling, flattening, concatenation and the like. A bias is
no connection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_sparse_init.signal import connectivity
from keras_sparse_init.signal.connectivity import KernelTopology
from keras_sparse_init.signal.graph import Graph


@dataclasses.dataclass(frozen=True)
class Topology:
    """The masks of a model in numbers.

    Attributes:
        kernels: One entry for each masked kernel, in model order.
        not_read: Names of the layers whose connections cannot be read, with the reason. Paths through them are
            taken to connect everything with everything.
    """

    kernels: tuple[KernelTopology, ...]
    not_read: dict[str, str]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all masks; 0 when nothing is masked."""
        size = sum(int(np.prod(kernel.shape)) for kernel in self.kernels)
        return 1.0 - sum(kernel.nonzeros for kernel in self.kernels) / size if size else 0.0

    @property
    def effective_sparsity(self) -> float | None:
        """Fraction of masked weights that lie on no path from input to output; None when a kernel's is not known."""
        if any(kernel.effective_nonzeros is None for kernel in self.kernels):
            return None
        size = sum(int(np.prod(kernel.shape)) for kernel in self.kernels)
        return 1.0 - sum(kernel.effective_nonzeros or 0 for kernel in self.kernels) / size if size else 0.0


def topology(model: Any, masks: Mapping[str, np.ndarray] | None = None) -> Topology:
    """What the masks of a model connect.

    Read are Sequential and functional models, nested ones too, of dense, convolution, embedding, pooling, flattening,
    normalization, dropout, activation and merging layers. What else there is stands in `not_read`.

    Args:
        model: A built model of either Keras.
        masks: Masks to take in place of the model's own, by the names of `masked_kernels`.

    Returns:
        A `Topology`, without kernels when nothing is masked.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import Masked
        >>> from keras_sparse_init.signal.topology import topology
        >>> L = keras.layers
        >>> first = Masked(L.Dense(2, name="a"), mask=np.array([[1, 0], [1, 0]]))
        >>> second = Masked(L.Dense(1, name="b"), mask=np.array([[1], [1]]))
        >>> found = topology(keras.Sequential([L.Input((2,)), first, second]))
        >>> [kernel.effective_nonzeros for kernel in found.kernels], found.sparsity
        ([2, 1], 0.33333333333333337)
    """
    graph = Graph(model, masks)
    kernels = []
    for kernel in graph.kernels:
        mask, uses = graph.masks[kernel.name], graph.uses(kernel)
        effective = None
        if uses:
            connected = np.zeros(mask.shape, bool)
            for use in uses:
                connected |= use.effective()
            effective = int(np.count_nonzero(connected))
        reached, needed = (_any([getattr(use, name) for use in uses]) for name in ("reached", "needed"))
        kernels.append(KernelTopology.of(kernel.name, mask, kernel.layout, reached, needed, effective))
    return Topology(tuple(kernels), graph.not_read)


def live_inputs(model: Any, masks: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """For each masked kernel whose place in the model can be read, which of its input units are alive.

    An input unit is alive when a path of unmasked weights leads to it from an input of the model. In several calls of
    a layer it is when it is in one of them.

    Args:
        model: A built model of either Keras.
        masks: Masks to take in place of the model's own, by the names of `masked_kernels`.

    Returns:
        For names of `masked_kernels` a boolean array that broadcasts to the kernel: `mask & live` has the weights that
        get a signal.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import Masked
        >>> from keras_sparse_init.signal.topology import live_inputs
        >>> L = keras.layers
        >>> first = Masked(L.Dense(2, name="a"), mask=np.array([[1, 0], [1, 0]]))
        >>> model = keras.Sequential([L.Input((2,)), first, Masked(L.Dense(1, name="b"))])
        >>> live_inputs(model)["b/kernel"].tolist()
        [[True], [False]]
    """
    graph = Graph(model, masks)
    found = {}
    for kernel in graph.kernels:
        live = _any([use.live for use in graph.uses(kernel)])
        if live is not None:
            found[kernel.name] = connectivity.inputs_on_kernel(live, kernel.shape, kernel.layout)
    return found


def _any(arrays: list[np.ndarray]) -> np.ndarray | None:
    return np.logical_or.reduce(arrays) if arrays else None
