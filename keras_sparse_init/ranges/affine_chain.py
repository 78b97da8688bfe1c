"""Reading a model of either Keras as a piecewise linear network: affine maps with (leaky) ReLU between them."""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy as np

from keras_sparse_init import compat, traversal
from keras_sparse_init.folding import fold_weight_norm
from keras_sparse_init.ranges.affine_layers import ACTIVATIONS, AFFINE, IDLE, MERGES, SUPPORTED, slope_of, unsupported
from keras_sparse_init.ranges.piecewise import Affine, chain, compact
from keras_sparse_init.sparse_model import strip
from keras_sparse_init.watching import left_as_it_is


def affine_chain(model: Any) -> tuple[list[Affine], tuple[int, ...], tuple[int, ...]]:
    """A model's function as a network of `bounds`, in float64 of the weights that the model runs on.

    Args:
        model: A built Sequential or functional model of either Keras with one input and one output. It is not changed.

    Returns:
        (network, input shape, output shape); the shapes are without the batch.

    Raises:
        TypeError: When `model` is no Keras model.
        ValueError: When it is no built Sequential or functional model, or has a layer that is not piecewise linear or
            not known; the error names it.

    Example:
        >>> import keras
        >>> from keras_sparse_init.ranges.affine_chain import affine_chain
        >>> dense = keras.layers.Dense(3, activation="relu")
        >>> network, *shapes = affine_chain(keras.Sequential([keras.layers.Input((2,)), dense]))
        >>> [layer.weight.shape for layer in network], shapes
        ([(3, 2), (3, 3)], [(2,), (3,)])
    """
    from scipy import sparse

    library = compat.library_of(model)
    if not isinstance(model, library.Model):
        raise TypeError(f"`model` must be a Keras model. Received: the layer {model.name!r}")
    if not model.built:
        raise ValueError(f"`model` must be built. Received: the model {model.name!r}, which has no weights yet")
    plain = _plain(model)
    shape = _shape_of_input(model, _graph(plain)[0])
    tracer = _Tracer(math.prod(shape))
    output = _trace(plain, [_Value(tracer, compact(sparse.eye_array(tracer.inputs)), 0.0, shape)])
    if len(output) != 1:
        raise ValueError(f"`model` must have one output. Received: the model {model.name!r} with {len(output)}")
    return chain([*tracer.layers, Affine.of(output[0].weight, output[0].bias)]), shape, output[0].shape


def check_against(model: Any, network: list[Affine], x: np.ndarray) -> None:
    """Compares a network with what its model puts out, at inputs of shape (samples, *input shape).

    The model is left as it is, bit for bit: tfmot's wrappers mask their kernels as they run.

    Raises:
        ValueError: When they differ by more than rounding: a layer does something else than its class says.
    """
    x = x.astype(np.float32)
    with left_as_it_is(model):
        outputs = compat.to_numpy("outputs", model(x, training=False)).astype(np.float64).reshape(len(x), -1)
    y, square = x.reshape(len(x), -1).astype(np.float64), 0.0
    for layer in network:
        # The squared size of what is added up, here and before: rounding grows like a random walk.
        terms = (abs(layer.weight) @ np.abs(y).T).T + np.abs(layer.bias)
        square = np.square(terms) + (layer.weight**2 @ np.broadcast_to(square, y.shape).T).T
        y = layer.activation(layer.pre_activation(y))
    half = any(getattr(layer, "compute_dtype", None) in ("float16", "bfloat16") for layer in model._flatten_layers())
    tolerance = (0.05 if half else 1e-4) * np.sqrt(square) + 1e-30
    if y.shape != outputs.shape or not np.all(np.abs(outputs - y) <= tolerance):
        raise ValueError(
            f"The model {model.name!r} puts out something else than its layers say: a layer or the model itself has a "
            f"`call` of its own, say. Supported are {SUPPORTED}"
        )


class _Tracer:
    """The layers with activations so far, and the values that are still needed.

    Values are affine functions of the state, which is what the last of the layers puts out, or the input.
    """

    def __init__(self, inputs: int):
        self.inputs = inputs
        self.layers: list[Affine] = []
        self.live: list[_Value] = []

    def activate(self, value: _Value, slope: Any) -> _Value:
        """The activation of a value. All other values that are still needed pass through the new layer."""
        from scipy import sparse

        others = list({id(other): other for other in self.live}.values())
        weight = sparse.vstack([sparse.csr_array(v.weight) for v in (value, *others)], format="csr")
        slopes = [np.broadcast_to(slope, value.bias.shape), *(np.ones(other.bias.size) for other in others)]
        bias = np.concatenate([v.bias for v in (value, *others)])
        self.layers.append(Affine.of(weight, bias, np.concatenate(slopes)))
        places = sparse.eye_array(bias.size, format="csr")
        start = value.bias.size
        for other in others:
            other.weight, other.bias = places[start : start + other.bias.size], np.zeros(other.bias.size)
            start += other.bias.size
        return _Value(self, places[: value.bias.size], 0.0, value.shape)


class _Value:
    """What a layer puts out for one sample: W state + b, of a shape."""

    def __init__(self, tracer: _Tracer, weight: Any, bias: Any, shape: tuple[int, ...]):
        self.tracer, self.weight, self.shape = tracer, weight, shape
        self.bias = np.array(np.broadcast_to(bias, (weight.shape[0],)), np.float64)

    def mapped(self, weight: Any, bias: Any, shape: tuple[int, ...]) -> _Value:
        """An affine function of it."""
        bias = np.ravel(np.broadcast_to(bias, shape)) + weight @ self.bias
        return _Value(self.tracer, compact(weight @ self.weight), bias, tuple(shape))


def _plain(model: Any) -> Any:
    """The model itself, or a copy of it in which no layer is in a wrapper of this package or of tfmot."""
    if not any(traversal.is_layer_wrapper(layer) for layer in model._flatten_layers()):
        return model
    _graph(model)  # A subclassed model could not be copied.
    return fold_weight_norm(strip(traversal.rebuild(model, lambda layer, copy: copy(layer))))


def _graph(model: Any) -> Any:
    graph = compat.graph_of(model)
    if graph is None:
        raise ValueError(
            f"`model` must be made of layers in a Sequential or functional model. Received: the model {model.name!r} "
            f"of type {type(model).__name__}, which has a `call` of its own"
        )
    return graph


def _shape_of_input(model: Any, inputs: list[Any]) -> tuple[int, ...]:
    if len(inputs) != 1:
        raise ValueError(f"`model` must have one input. Received: the model {model.name!r} with {len(inputs)}")
    shape = tuple(model.inputs[0].shape)
    if any(size is None for size in shape[1:]):
        raise ValueError(f"`model` must have an input of known shape. Received: the model {model.name!r} with {shape}")
    return shape[1:]


def _trace(model: Any, inputs: list[_Value]) -> list[_Value]:
    """The outputs of a model. Values are dropped after their last use, so that none is passed on in vain."""
    input_keys, output_keys, calls = _graph(model)
    values = dict(zip(input_keys, inputs, strict=True))
    left = collections.Counter([*output_keys, *(key for _, keys, _ in calls for key in keys)])
    live = inputs[0].tracer.live
    outside = list(live)
    for layer, keys, results in calls:
        arguments = [values[key] for key in keys]
        left.subtract(keys)
        values = {key: value for key, value in values.items() if left[key]}
        live[:] = [*outside, *values.values()]
        values.update(zip(results, _apply(layer, arguments), strict=True))
    live[:] = outside
    return [values[key] for key in output_keys]


def _apply(layer: Any, inputs: list[_Value]) -> list[_Value]:
    """What a layer or nested model makes of its inputs."""
    if isinstance(layer, compat.keras.Model | compat.tf_keras.Model):
        return _trace(layer, inputs)
    name = type(layer).__name__
    is_layer = isinstance(layer, compat.keras.layers.Layer | compat.tf_keras.layers.Layer)
    if not is_layer or name.endswith("OpLambda"):
        # What `a + b` makes is called Add, as the layer is that does the same and is supported.
        raise unsupported(layer, ", an operation on tensors, which is no layer")
    if type(layer) is not getattr(compat.library_of(layer).layers, name, None):
        raise unsupported(layer, " of a class of its own")
    if name in MERGES:
        return [_merged(layer, inputs)]
    if name not in (*IDLE, *ACTIVATIONS, *AFFINE):
        raise unsupported(layer)
    (value,), slope = inputs, None
    if name in ACTIVATIONS:
        slope = ACTIVATIONS[name](layer, value.shape)
    elif name in AFFINE:
        value = value.mapped(*AFFINE[name](layer, value.shape))
        slope = slope_of(layer, getattr(layer, "activation", None))
    if slope is None:
        return [value]
    if not np.all((np.asarray(slope) >= 0) & (np.asarray(slope) <= 1)):
        raise unsupported(layer, " with a negative slope outside [0, 1]")
    return [value.tracer.activate(value, slope)]


def _merged(layer: Any, inputs: list[_Value]) -> _Value:
    from scipy import sparse

    kind, shapes = type(layer).__name__, [value.shape for value in inputs]
    weights = [sparse.csr_array(value.weight) for value in inputs]
    if kind == "Concatenate":
        axis = layer.axis - (1 if layer.axis > 0 else 0)
        places = np.split(np.arange(sum(map(math.prod, shapes))), np.cumsum([math.prod(s) for s in shapes])[:-1])
        places = np.concatenate([p.reshape(s) for p, s in zip(places, shapes, strict=True)], axis=axis)
        weight = sparse.vstack(weights, format="csr")[places.ravel()]
        bias = np.concatenate([value.bias for value in inputs])[places.ravel()]
        return _Value(inputs[0].tracer, compact(weight), bias, places.shape)
    if len(set(shapes)) > 1:
        raise unsupported(layer, f" of unequal shapes {shapes}")
    factors = {"Add": (1.0, 1.0), "Subtract": (1.0, -1.0), "Average": (1 / len(inputs), 1 / len(inputs))}[kind]
    factors = (factors[0], *(factors[1],) * (len(inputs) - 1))
    weight = sum(factor * weight for factor, weight in zip(factors, weights, strict=True))
    bias = sum(factor * value.bias for factor, value in zip(factors, inputs, strict=True))
    return _Value(inputs[0].tracer, compact(weight), bias, shapes[0])
