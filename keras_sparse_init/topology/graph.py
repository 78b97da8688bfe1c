"""How the layers of a Sequential or functional model follow each other, read as links of `links`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_sparse_init import compat, fans, traversal
from keras_sparse_init.masked_kernel import MaskedKernel, masked_kernels
from keras_sparse_init.topology import connectivity
from keras_sparse_init.topology.links import Concatenated, Kernel, Link, Permuted, Pooled, Reshaped, UnitByUnit, Unread

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


class Graph:
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
        self._unread: list[tuple[str, Unread]] = []
        if self.kernels and (ends := self._read(model, None)):
            _follow(self._links, ends)

    def uses(self, kernel: MaskedKernel) -> list[Kernel]:
        """The links of a kernel: one for each call of its layer."""
        return [link for link in self._links if isinstance(link, Kernel) and link.name == kernel.name]

    def mixing(self) -> set[str]:
        """The names of the layers that cannot be read and get, or pass on, live units beside dead ones."""
        return {name for name, link in self._unread if link.mixes}

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
        graph = _graph_of(layer)
        if graph is not None and len(_flat(graph.inputs)) == len(inputs):
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
            self._unread.append((layer.name, links[0]))
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
        # In the order in which they are used: a separable convolution has two.
        places = sorted(traversal.kernels_of(layer), key=lambda place: "pointwise" in place.attribute)
        if not places or not _is_known_kernel_layer(layer) or any(place.owner is not layer for place in places):
            return None
        layouts = [fans.kernel_layout(p.owner, p.shape, weight_name=p.attribute) for p in places]
        if not all(map(connectivity.known, layouts)):
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
