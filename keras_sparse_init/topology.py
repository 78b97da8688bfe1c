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

from keras_sparse_init import compat, connectivity, fans, traversal
from keras_sparse_init.connectivity import KernelTopology
from keras_sparse_init.links import Concatenated, Kernel, Link, Permuted, Pooled, Reshaped, UnitByUnit, Unread
from keras_sparse_init.masked_kernel import MaskedKernel, masked_kernels

_UNIT_BY_UNIT = set(
    "InputLayer Activation ReLU LeakyReLU PReLU ELU ThresholdedReLU Softmax BatchNormalization LayerNormalization "
    "GroupNormalization UnitNormalization RMSNormalization Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D "
    "GaussianDropout GaussianNoise AlphaDropout ActivityRegularization Identity Masking Rescaling Normalization "
    "Add Subtract Multiply Average Maximum Minimum "
    # Operations of Keras 3.
    "Relu Relu6 LeakyRelu Elu Selu Gelu Silu Sigmoid Tanh Softplus Abs Negative".split()
)
_POOLED = set(
    "Pooling1D Pooling2D Pooling3D GlobalPooling1D GlobalPooling2D GlobalPooling3D BasePooling BaseGlobalPooling "
    "ZeroPadding1D ZeroPadding2D ZeroPadding3D Cropping1D Cropping2D Cropping3D UpSampling1D UpSampling2D "
    "UpSampling3D".split()
)
# Functions of TensorFlow in functional models of tf_keras.
_FUNCTIONS = {"__operators__.add", "math.add", "math.subtract", "math.multiply", "nn.relu", "math.tanh", "math.sigmoid"}


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
        >>> from keras_sparse_init.topology import topology
        >>> L = keras.layers
        >>> first = Masked(L.Dense(2, name="a"), mask=np.array([[1, 0], [1, 0]]))
        >>> second = Masked(L.Dense(1, name="b"), mask=np.array([[1], [1]]))
        >>> found = topology(keras.Sequential([L.Input((2,)), first, second]))
        >>> [kernel.effective_nonzeros for kernel in found.kernels], found.sparsity
        ([2, 1], 0.33333333333333337)
    """
    graph = _Graph(model, masks)
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
        >>> from keras_sparse_init.topology import live_inputs
        >>> L = keras.layers
        >>> first = Masked(L.Dense(2, name="a"), mask=np.array([[1, 0], [1, 0]]))
        >>> model = keras.Sequential([L.Input((2,)), first, Masked(L.Dense(1, name="b"))])
        >>> live_inputs(model)["b/kernel"].tolist()
        [[True], [False]]
    """
    graph = _Graph(model, masks)
    found = {}
    for kernel in graph.kernels:
        live = _any([use.live for use in graph.uses(kernel)])
        if live is not None:
            found[kernel.name] = connectivity.inputs_on_kernel(live, kernel.shape, kernel.layout)
    return found


def _any(arrays: list[np.ndarray]) -> np.ndarray | None:
    return np.logical_or.reduce(arrays) if arrays else None


class _Graph:
    """The links of a model, with what is reached through them from its inputs and needed by its outputs."""

    def __init__(self, model: Any, masks: Mapping[str, np.ndarray] | None) -> None:
        compat.library_of(model)
        self.kernels = masked_kernels(model)
        self.masks = {kernel.name: kernel.mask_value() for kernel in self.kernels}
        for name, mask in (masks or {}).items():
            if name not in self.masks:
                raise ValueError(f"`masks` names the unknown kernel {name!r}. The model's are {sorted(self.masks)}")
            self.masks[name] = fans.as_mask(mask, self.masks[name].shape)
        self._names = {id(_raw(kernel.kernel)): kernel.name for kernel in self.kernels}
        self._links: list[Link] = []
        self.not_read: dict[str, str] = {}
        if self.kernels and (ends := self._read(model, None)):
            _follow(self._links, ends)

    def uses(self, kernel: MaskedKernel) -> list[Kernel]:
        """The links of a kernel: one for each call of its layer."""
        return [link for link in self._links if isinstance(link, Kernel) and link.name == kernel.name]

    def _read(self, model: Any, starts: list[Any] | None) -> list[Any]:
        """Adds the links of a call of a model; returns the keys of its outputs, none if it has no graph.

        `starts` are the keys of what it is called on; None for the model that is read, whose inputs are what they are.
        """
        graph = _graph_of(model)
        if graph is None:
            self.not_read[model.name] = f"{type(model).__name__}: its layers follow each other as its `call` says"
            return []
        # Another call of the same model has other keys.
        call = len(self._links)
        inputs = _flat(graph.inputs)
        for i, tensor in enumerate(inputs):
            keys, shape = ([], []) if starts is None else ([starts[i]], [_shape(tensor)])
            self._links.append(
                (Unread if starts is None else UnitByUnit)(keys, [(call, id(tensor))], [*shape, _shape(tensor)])
            )
        known = {id(tensor) for tensor in inputs}
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                layer = getattr(node, "operation", None) or node.layer
                given = list(node.input_tensors if hasattr(node, "operation") else node.keras_inputs)
                made = _flat(node.outputs)
                if all(id(tensor) in known for tensor in made):
                    continue
                self._read_layer(layer, [(call, id(t)) for t in given], [(call, id(t)) for t in made], given + made)
        return [(call, id(tensor)) for tensor in _flat(graph.outputs)]

    def _read_layer(self, layer: Any, inputs: list[Any], outputs: list[Any], tensors: list[Any]) -> None:
        shapes = [_shape(tensor) for tensor in tensors]
        while traversal.is_layer_wrapper(layer):
            layer = layer.layer
        if _graph_of(layer) is not None:
            ends = self._read(layer, inputs)
            self._links += [
                UnitByUnit([end], [key], [shape, shape])
                for end, key, shape in zip(ends, outputs, shapes[len(inputs) :], strict=True)
            ]
            return
        links = self._links_of(layer, inputs, outputs, shapes)
        if links is None:
            self.not_read[layer.name] = type(layer).__name__
            links = [Unread(inputs, outputs, shapes)]
        self._links += links

    def _links_of(self, layer: Any, inputs: list[Any], outputs: list[Any], shapes: list[Any]) -> list[Link] | None:
        """The links of a layer, None when it is not known."""
        kinds = {c.__name__ for c in type(layer).__mro__ if c.__module__.split(".")[0] in ("keras", "tf_keras")}
        if len(outputs) != 1 or not inputs:
            return None
        if kinds & _UNIT_BY_UNIT or getattr(layer, "symbol", None) in _FUNCTIONS:
            fits = all(len(shape) == len(shapes[-1]) for shape in shapes)
            return [UnitByUnit(inputs, outputs, shapes)] if fits else None
        if "Concatenate" in kinds:
            axis = layer.axis - 1 if layer.axis > 0 else layer.axis
            sizes_known = layer.axis != 0 and all(shape[axis] is not None for shape in shapes)
            return [Concatenated(inputs, outputs, shapes, axis)] if sizes_known else None
        if len(inputs) != 1:
            return None
        rank = len(shapes[0])
        channels_first = getattr(layer, "data_format", None) == "channels_first"
        axis = 0 if channels_first else -1
        if kinds & _POOLED:
            return [Pooled(inputs, outputs, shapes, axis)] if rank > 1 else None
        if "Permute" in kinds:
            return [Permuted(inputs, outputs, shapes, [dim - 1 for dim in layer.dims])]
        if kinds & {"Flatten", "Reshape"} and Reshaped.fits(shapes):
            if "Flatten" in kinds and channels_first and rank > 1:
                # Both Kerases put the channels last before they flatten.
                order, key = [*range(1, rank), 0], object()
                moved = tuple(shapes[0][i] for i in order)
                return [
                    Permuted(inputs, [key], [shapes[0], moved], order),
                    Reshaped([key], outputs, [moved, shapes[1]]),
                ]
            return [Reshaped(inputs, outputs, shapes)]
        return self._kernel_links(layer, inputs, outputs, shapes, axis)

    def _kernel_links(
        self, layer: Any, inputs: list[Any], outputs: list[Any], shapes: list[Any], axis: int
    ) -> list[Link] | None:
        places = traversal.kernels_of(layer)
        # In the order in which they are used: a separable convolution has two.
        places.sort(key=lambda place: "pointwise" in place.attribute)
        layouts = [fans.kernel_layout(p.owner, p.shape, weight_name=p.attribute) for p in places]
        known = {"dense", "conv", "conv_transpose", "depthwise", "embedding"}
        if not places or any(place.owner is not layer for place in places):
            return None
        if not _is_known_kernel_layer(layer) or any(layout.name not in known for layout in layouts):
            return None
        between = [*inputs, *(object() for _ in places[1:]), *outputs]
        ranks = [shapes[0], *([shapes[1]] * len(places))]
        links: list[Link] = []
        for i, (place, layout) in enumerate(zip(places, layouts, strict=True)):
            name = self._names.get(id(_raw(place.kernel)))
            mask = np.broadcast_to(True, place.shape) if name is None else self.masks[name]
            links.append(Kernel([between[i]], [between[i + 1]], [ranks[i], ranks[i + 1]], axis, name, mask, layout))
        return links


def _follow(links: list[Link], ends: list[Any]) -> None:
    values: dict[Any, np.ndarray] = {}
    for link in links:
        values.update(zip(link.outputs, link.forward([values[key] for key in link.inputs]), strict=True))
    needed: dict[Any, np.ndarray] = {key: np.ones_like(values[key]) for key in ends}
    for link in reversed(links):
        given = [needed.get(key, np.zeros_like(values[key])) for key in link.outputs]
        for key, value in zip(link.inputs, link.backward(given), strict=True):
            needed[key] = needed[key] | value if key in needed else value


def _is_known_kernel_layer(layer: Any) -> bool:
    return any(
        c.__name__ in ("Dense", "Embedding", "BaseConv", "Conv", "BaseDepthwiseConv", "BaseSeparableConv")
        or c.__name__.endswith(("Conv2DTranspose", "BaseConvTranspose"))
        for c in type(layer).__mro__
        if c.__module__.split(".")[0] in ("keras", "tf_keras")
    )


def _graph_of(model: Any) -> Any:
    """What has the nodes of a Sequential or functional model, or None."""
    graph = getattr(model, "_functional", None) or model
    return graph if getattr(graph, "_nodes_by_depth", None) else None


def _flat(nest: Any) -> list[Any]:
    if isinstance(nest, dict):
        nest = [nest[key] for key in sorted(nest)]
    return [tensor for item in nest for tensor in _flat(item)] if isinstance(nest, list | tuple) else [nest]


def _shape(tensor: Any) -> tuple[int | None, ...]:
    """Of one sample."""
    return tuple(compat.plain_shape(tensor.shape))[1:]


def _raw(variable: Any) -> Any:
    return getattr(variable, "_variable", variable)
