"""Data-dependent initialization of weight-normalized layers: unit pre-activations on a batch of data."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from keras_sparse_init import compat, fans, traversal
from keras_sparse_init.layers import WeightNorm
from keras_sparse_init.watching import watch


def data_dependent_init(model: Any, x: Any) -> None:
    """Sets g and bias of each `WeightNorm` layer: its pre-activations on a batch get mean 0 and a given deviation.

    With mu and sigma the mean and standard deviation of a unit's pre-activations over the batch (and over positions):
    g := g * init_scale / sigma, b := (b - mu) * init_scale / sigma. Layer after layer in the order of their calls, each
    on what the layers before put out by then. A layer without bias gets the standard deviation alone; one that is
    called on its own output gets both approximately.

    Nothing is initialized inside a call: this is done once, when it is asked for, in one process on one batch; in a
    `tf.distribute` strategy all replicas get the same values.

    Args:
        model: A built model of either Keras with `WeightNorm` layers around Dense, convolution, transposed or depthwise
            convolution layers. It runs as at prediction.
        x: A batch of the model's inputs, as the model takes them: an array or a nest of arrays. A few hundred samples.

    Raises:
        TypeError: When `model` is no Keras model or layer.
        ValueError: When there is no such layer, one has no g (`use_scale=False`), is of another type, or is not called;
            when `x` has no samples or gives pre-activations that are not finite.

    Warns:
        UserWarning: When a unit's pre-activations are constant on the batch: its g stays as it is.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import WeightNorm, data_dependent_init
        >>> layer = WeightNorm(keras.layers.Dense(3))
        >>> model = keras.Sequential([keras.layers.Input((8,)), layer])
        >>> x = np.random.default_rng(0).normal(5, 2, size=(200, 8)).astype("float32")
        >>> data_dependent_init(model, x)
        >>> bool(np.allclose(model.predict(x, verbose=0).std(axis=0), 1, atol=1e-3))
        True

    Reference:
        Salimans and Kingma 2016, Weight normalization, arXiv:1602.07868, section 3.
    """
    compat.library_of(model)
    wrappers = [layer for _, _, layer in traversal.walk(model) if isinstance(layer, WeightNorm)]
    if isinstance(model, WeightNorm):
        wrappers.insert(0, model)
    if not wrappers:
        raise ValueError(f"`model` must have WeightNorm layers. Received: the model {model.name!r} without any")
    plain = {id(wrapper): _plain_layer(wrapper) for wrapper in wrappers}
    values = _pre_activations(model, x, list(plain.values()))
    order = list(values)
    if missing := [layer.name for layer in plain.values() if id(layer) not in order]:
        raise ValueError(f"The model {model.name!r} does not call these layers: {', '.join(missing)}")
    for layer in plain.values():
        found = values[id(layer)]
        if not found.size or not np.isfinite(found).all():
            raise ValueError(
                "`x` must have samples, and finite ones. Received: x on which the pre-activations of "
                f"{layer.name!r} are {'not all finite' if found.size else 'none'}"
            )
    for wrapper in sorted(wrappers, key=lambda wrapper: order.index(id(plain[id(wrapper)]))):
        layer = plain[id(wrapper)]
        _initialize(wrapper, layer, _pre_activations(model, x, [layer])[id(layer)])


def _initialize(wrapper: WeightNorm, layer: Any, values: np.ndarray) -> None:
    """From pre-activations of shape (samples and positions, units)."""
    mean, std = values.mean(axis=0), values.std(axis=0)
    # What rounding leaves of a constant is no deviation.
    constant = std <= 1e-6 * np.abs(values).max(axis=0)
    if constant.any():
        warnings.warn(
            f"{int(constant.sum())} of {constant.size} units of {layer.name!r} have constant pre-activations on this "
            "batch: their g stays as it is. Give more samples.",
            stacklevel=3,
        )
    factor = np.where(constant, 1.0, wrapper.init_scale / np.where(constant, 1.0, std))
    (slot,) = wrapper._slots
    scale = compat.to_numpy("g", slot.partner).astype(np.float64)
    compat.assign(slot.partner, scale * factor.reshape(scale.shape))
    # A layer of the user's own need not have `use_bias`.
    if getattr(layer, "bias", None) is not None:
        bias = compat.to_numpy("bias", layer.bias).astype(np.float64)
        compat.assign(layer.bias, (bias - mean) * factor)


def _plain_layer(wrapper: WeightNorm) -> Any:
    """The layer whose activation sees the pre-activations of a wrapper's units."""
    layer = wrapper.layer
    while isinstance(layer, traversal.MaskWrapper):
        layer = layer.layer
    name = f"The layer {layer.name!r}"
    compat.require_built(wrapper, "weights")
    if not wrapper.use_scale:
        raise ValueError(f"{name} has no g (use_scale=False), which the data would determine")
    layouts = {"dense", "conv", "conv_transpose", "depthwise"}
    if len(wrapper._slots) != 1 or wrapper._slots[0].owner is not layer or not hasattr(layer, "activation"):
        raise ValueError(f"{name} has no units whose pre-activations are known. Known are Dense and convolutions")
    slot = wrapper._slots[0]
    layout = fans.kernel_layout(layer, tuple(slot.kernel.shape), weight_name=slot.attribute)
    if layout.name not in layouts or slot.axes != layout.output_axes:
        raise ValueError(f"{name} has no units whose pre-activations are known. Known are Dense and convolutions")
    return layer


def _pre_activations(model: Any, x: Any, layers: list[Any]) -> dict[int, np.ndarray]:
    """What the activations of some layers are given when a model runs, by id in the order of their first calls.

    Arrays of shape (samples and positions, units), in float64; those of several calls of a layer together.
    """
    found: dict[int, list[np.ndarray]] = {}
    with watch(model, layers) as items:
        model(x, training=False)
    for item in (item for item in items if item.pre is not None):
        axis = 1 if getattr(item.layer, "data_format", None) == "channels_first" else -1
        values = np.moveaxis(compat.to_numpy("outputs", item.pre).astype(np.float64), axis, -1)
        found.setdefault(id(item.layer), []).append(values.reshape(math.prod(values.shape[:-1]), values.shape[-1]))
    return {key: np.concatenate(values) for key, values in found.items()}
