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

from keras_sparse_init.topology import connectivity
from keras_sparse_init.topology.connectivity import KernelTopology
from keras_sparse_init.topology.graph import Graph


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
        >>> from keras_sparse_init.topology.paths import topology
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


def live_ends(model: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each masked kernel which of its input units get a signal, and which of its output units pass one on.

    An input unit is live when a path of unmasked weights leads to it from an input of the model, an output unit when
    one leads from it to an output of the model; of a layer that is called several times when it is so in any call.

    Args:
        model: A built model of either Keras.

    Returns:
        By the names of `masked_kernels` two boolean arrays that broadcast to the kernel.

    Raises:
        ValueError: When the place of a masked kernel in the model cannot be read, or units of which some are dead pass
            a layer that cannot be read: what comes out of it would not be known.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import Masked
        >>> from keras_sparse_init.topology.paths import live_ends
        >>> L = keras.layers
        >>> first = Masked(L.Dense(2, name="a"), mask=np.array([[1, 0], [1, 0]]))
        >>> model = keras.Sequential([L.Input((2,)), first, Masked(L.Dense(1, name="b"))])
        >>> live_ends(model)["b/kernel"][0].tolist()
        [[True], [False]]
    """
    graph = Graph(model, None)
    unplaced = [kernel.name for kernel in graph.kernels if not graph.uses(kernel)]
    mixing = graph.mixing()
    if unplaced or mixing:
        why = {name: kind for name, kind in graph.not_read.items() if unplaced or name in mixing}
        raise ValueError(
            "What the masks connect must be readable: of Sequential and functional models of layers that are known "
            f"(dense, convolution, embedding, pooling, merging, ...). Received: the model {model.name!r}, of which "
            f"cannot be read: {', '.join(f'{name} ({kind})' for name, kind in why.items())}"
        )
    ends = {}
    for kernel in graph.kernels:
        live, needed = (_any([getattr(use, name) for use in graph.uses(kernel)]) for name in ("live", "needed"))
        ends[kernel.name] = (
            connectivity.inputs_on_kernel(live, kernel.shape, kernel.layout),
            connectivity.outputs_on_kernel(needed, kernel.shape, kernel.layout),
        )
    return ends


def _any(arrays: list[np.ndarray]) -> np.ndarray | None:
    return np.logical_or.reduce(arrays) if arrays else None
