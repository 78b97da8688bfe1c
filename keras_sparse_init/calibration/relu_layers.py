"""The layers of a model that end in ReLUs and have a kernel and a bias: what their units see, what they are given."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_sparse_init import compat, fans, traversal
from keras_sparse_init.calibration.patches import patches
from keras_sparse_init.masked_kernel import MaskedKernel, masked_kernels
from keras_sparse_init.signal.rectifiers import rectifiers
from keras_sparse_init.watching import Watched, operations, places, watch

LAYOUTS = ("dense", "conv", "conv_transpose", "depthwise")
# Whose units' inputs are known.
WITH_FEATURES = ("dense", "conv")


@dataclasses.dataclass(frozen=True, eq=False)
class Units:
    """What the units of a layer see on samples.

    Attributes:
        z: Pre-activations without bias, of shape (samples, units); positions of a convolution count as samples.
        features: Their inputs, of shape (samples, inputs); None when they were not asked for.
        kernel: Their weights, of shape (inputs, units), 0 off the mask, so that z = features @ kernel; None likewise.
        mask: Booleans of that shape; None likewise.
    """

    z: np.ndarray
    features: np.ndarray | None = None
    kernel: np.ndarray | None = None
    mask: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ReluLayer:
    """A layer with one kernel, a bias and a ReLU after it.

    Attributes:
        name: Its path in the model.
        layer: The layer.
        relus: Names of the layers that have the ReLU: its own, or those of the layers that come right after it.
        kernel: The kernel's variable.
        layout: The kernel's layout.
        masked: The `MaskedKernel`, or None.
    """

    name: str
    layer: Any
    relus: tuple[str, ...]
    kernel: Any
    layout: fans.KernelLayout
    masked: MaskedKernel | None

    def units(self, model: Any, samples: Any, with_features: bool, most: int, seed: int) -> Units | None:
        """What the units see when the model runs on samples.

        Args:
            model: The model.
            samples: Its inputs.
            with_features: Whether features and kernel are wanted too.
            most: How many positions of a convolution at most, or of other layers that have several for each sample.
            seed: For which of them.

        Returns:
            The units; None when what the layer puts out is not its kernel times its inputs.
        """
        random = np.random.default_rng(seed)
        bias = compat.to_numpy("bias", self.layer.bias).astype(np.float64)
        with watch(model, [self.layer]) as items, _inputs_of(self.layer) as inputs:
            model(samples, training=False)
        found: list[tuple[np.ndarray, np.ndarray | None]] = []
        for item, given in zip(items, inputs, strict=True):
            z = self._channels_last(item.pre).reshape(-1, bias.size) - bias
            rows = None
            if len(z) > max(most // len(items), len(item.pre)):
                rows = np.sort(random.choice(len(z), max(most // len(items), 1), replace=False))
                z = z[rows]
            found.append((z, self._features(self._channels_last(given), rows) if with_features else None))
        z = np.concatenate([part for part, _ in found])
        if not with_features:
            return Units(z)
        features = np.concatenate([part for _, part in found])
        kernel, mask = (self._matrix(array) for array in (self._value(), self._mask()))
        same = np.abs(features @ kernel - z).max() <= 0.02 * max(np.abs(z).max(), np.abs(bias).max(initial=0.0), 1e-30)
        return Units(z, features, kernel, mask) if same else None

    def assign(self, matrix: np.ndarray | None, bias: np.ndarray, scale: float) -> None:
        """Sets kernel and bias, both times a scale.

        Args:
            matrix: The weights of shape (inputs, units); None for those that the layer has.
            bias: One for each unit.
            scale: A float.
        """
        kernel = self._value() if matrix is None else self._from_matrix(matrix)
        compat.assign(self.kernel, scale * kernel)
        compat.assign(self.layer.bias, scale * bias)

    def _mask(self) -> np.ndarray:
        return np.ones(self.kernel.shape, bool) if self.masked is None else self.masked.mask_value()

    def _value(self) -> np.ndarray:
        return np.where(self._mask(), compat.to_numpy("kernel", self.kernel).astype(np.float64), 0.0)

    def _channels_last(self, tensor: Any) -> np.ndarray:
        axis = 1 if getattr(self.layer, "data_format", None) == "channels_first" else -1
        return np.moveaxis(compat.to_numpy("outputs", tensor).astype(np.float64), axis, -1)

    def _features(self, inputs: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
        layer = self.layer
        if self.layout.name == "dense":
            inputs = inputs.reshape(-1, inputs.shape[-1])
            return inputs if rows is None else inputs[rows]
        return patches(inputs, layer.kernel_size, layer.strides, layer.padding, layer.dilation_rate, rows)

    def _in_group(self) -> np.ndarray:
        """Which input channels the units of a convolution in groups see, of shape (groups, channels of one, units)."""
        channels, units = self.kernel.shape[-2:]
        group = np.arange(units) // (units // self.layout.blocks)
        seen = np.arange(self.layout.blocks)[:, None] == group
        return np.broadcast_to(seen[:, None], (self.layout.blocks, channels, units))

    def _matrix(self, array: np.ndarray) -> np.ndarray:
        """A kernel, or its mask, of shape (inputs of all groups, units); 0 for inputs of other groups."""
        array = np.where(self._in_group(), array[..., None, :, :], np.zeros((), array.dtype))
        return array.reshape(-1, array.shape[-1])

    def _from_matrix(self, matrix: np.ndarray) -> np.ndarray:
        shape = tuple(self.kernel.shape)
        return matrix.reshape(*shape[:-2], self.layout.blocks, *shape[-2:]).sum(axis=-3)


def relu_layers(model: Any, samples: Any, layouts: tuple[str, ...]) -> tuple[list[ReluLayer], dict[str, str]]:
    """The layers with a kernel, a bias and a ReLU after it, in the order of their first calls.

    Args:
        model: A built model.
        samples: Its inputs, on which it runs once: which layers follow one another is seen from what flows.
        layouts: The kernel layouts of the layers that are wanted.

    Returns:
        `(found, others)`: and the name of each other layer with a kernel, with why it is not among them: frozen
        ones, too.
    """
    relus = {id(layer): name for name, layer in rectifiers(model)[0]}
    wrapped = _in_other_wrappers(model)
    others: dict[str, str] = {}
    masked = {id(kernel.kernel): kernel for kernel in masked_kernels(model)}
    candidates: list[tuple[str, Any, traversal.KernelPlace, fans.KernelLayout]] = []
    for name, layer in places(model):
        kernels = [place for place in traversal.kernels_of(layer) if place.owner is layer]
        if not kernels:
            continue
        layout = fans.kernel_layout(layer, kernels[0].shape, weight_name=kernels[0].attribute)
        if id(layer) in wrapped:
            others[name] = f"{type(layer).__name__}, {wrapped[id(layer)]}"
        elif len(kernels) > 1 or layout.name not in layouts or not hasattr(layer, "activation"):
            others[name] = f"{type(layer).__name__}, not of the layers that are calibrated: {', '.join(layouts)}"
        elif getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None) is not None:
            others[name] = f"{type(layer).__name__}, with LoRA or quantized"
        elif not layer.trainable:
            others[name] = f"{type(layer).__name__}, frozen (not trainable)"
        elif layer.bias is None:
            others[name] = f"{type(layer).__name__}, no bias"
        else:
            candidates.append((name, layer, kernels[0], layout))
    wanted = {id(layer) for _, layer, *_ in candidates} | set(relus)
    with watch(model, [layer for _, layer in places(model) + operations(model) if id(layer) in wanted]) as items:
        model(samples, training=False)
    found = []
    for name, layer, place, layout in candidates:
        own = [index for index, item in enumerate(items) if item.layer is layer and item.pre is not None]
        after = [_relus_after(items[index], items, relus) for index in own]
        if not all(after) or not own:
            why = "no ReLU after it" if own else "never called, or in a loop or branch"
            others[name] = f"{type(layer).__name__}, {why}"
            continue
        names = tuple(dict.fromkeys(relu for names in after for relu in names))
        found.append((own[0], ReluLayer(name, layer, names, place.kernel, layout, masked.get(id(place.kernel)))))
    return [layer for _, layer in sorted(found, key=lambda pair: pair[0])], others


def _relus_after(call: Watched, items: list[Watched], relus: dict[int, str]) -> list[str]:
    """The layers whose ReLUs a layer's pre-activations go into: itself, or those that are given its very output."""
    if id(call.layer) in relus:
        return [relus[id(call.layer)]]
    if call.post is not call.pre:
        return []
    return [relus[id(item.layer)] for item in items if id(item.layer) in relus and item.pre is call.post]


def _in_other_wrappers(model: Any) -> dict[int, str]:
    """Ids of the layers in wrappers that run them on another kernel than their variable, masked or not."""
    found: dict[int, str] = {}
    for layer in [model, *(layer for _, _, layer in traversal.walk(model))]:
        if isinstance(layer, traversal.LayerWrapper) and not isinstance(layer, traversal.MaskWrapper):
            why = f"in {type(layer).__name__}, see `data_dependent_init`"
            found |= {id(part): why for part in layer.layer._flatten_layers()}
    return found


@contextlib.contextmanager
def _inputs_of(layer: Any) -> Iterator[list[Any]]:
    """Lists the inputs of each call of a layer; it is left as it was."""
    inputs: list[Any] = []
    had, call = "call" in vars(layer), layer.call

    def recorded(*args: Any, **kwargs: Any) -> Any:
        inputs.append(args[0] if args else next(iter(kwargs.values())))
        return call(*args, **kwargs)

    object.__setattr__(layer, "call", recorded)
    try:
        yield inputs
    finally:
        if had:
            object.__setattr__(layer, "call", call)
        else:
            object.__delattr__(layer, "call")
