"""What the layers of either Keras are as affine maps, and the slopes of their activations."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from keras_sparse_init import compat
from keras_sparse_init.arguments import check_all_finite

SUPPORTED = (
    "Dense, convolutions, BatchNormalization, average pooling, padding, cropping and up-sampling, Flatten, Reshape and "
    "Permute, Add, Subtract, Average and Concatenate, Dropout and noise, the activations relu, leaky_relu and linear "
    "as layers or of a layer, PReLU with slopes in [0, 1], models of these, in Masked, WeightNorm or tfmot's wrappers"
)

# So many numbers of a layer's matrix are computed at once.
_CHUNK = 2**22

# Layers that do nothing when a model predicts.
IDLE = (
    "InputLayer Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D GaussianNoise GaussianDropout AlphaDropout "
    "ActivityRegularization Identity"
).split()

# Layers whose output is linear in their input, but for a bias, and the arguments that say how.
_KERNELS = (
    "Conv1D Conv2D Conv3D Conv1DTranspose Conv2DTranspose Conv3DTranspose DepthwiseConv1D DepthwiseConv2D "
    "SeparableConv1D SeparableConv2D"
).split()
_WITHOUT_WEIGHTS = (
    "AveragePooling1D AveragePooling2D AveragePooling3D GlobalAveragePooling1D GlobalAveragePooling2D "
    "GlobalAveragePooling3D ZeroPadding1D ZeroPadding2D ZeroPadding3D Cropping1D Cropping2D Cropping3D UpSampling1D "
    "UpSampling2D UpSampling3D Flatten Reshape Permute RepeatVector"
).split()
_GEOMETRY = (
    "filters kernel_size strides padding dilation_rate groups depth_multiplier output_padding pool_size keepdims "
    "cropping size interpolation dims n target_shape"
).split()

MERGES = ("Add", "Subtract", "Average", "Concatenate")


def unsupported(layer: Any, detail: str = "") -> ValueError:
    """The error that names a layer that is no piecewise linear function, or not a known one."""
    message = f"The layer {layer.name!r} ({type(layer).__name__}{detail}) is not supported. Supported are {SUPPORTED}"
    if "softmax" in detail or "sigmoid" in detail or type(layer).__name__ == "Softmax":
        message += ". For the range of the logits give the model without its last activation"
    return ValueError(message)


def _dense(layer: Any, shape: tuple[int, ...]) -> Any:
    from scipy import sparse

    kernel = _float64(layer.kernel)
    weight = sparse.kron(sparse.eye_array(math.prod(shape[:-1])), sparse.csr_array(kernel.T), format="csr")
    return weight, _float64(layer.bias) if layer.use_bias else 0.0, (*shape[:-1], kernel.shape[1])


def _convolution(layer: Any, shape: tuple[int, ...]) -> Any:
    names = ("kernel", "depthwise_kernel", "pointwise_kernel")
    own = [name for name in names if getattr(layer, name, None) is not None]
    # Keras 3 calls the kernel of a depthwise convolution both.
    own = own[1:] if "depthwise_kernel" in own and "kernel" in own else own
    weight, shape = _by_basis(layer, shape, [_float64(getattr(layer, name)) for name in own])
    if not layer.use_bias:
        return weight, 0.0, shape
    bias = _float64(layer.bias)
    channels_first = layer.data_format == "channels_first"
    return weight, bias.reshape(-1, *(1,) * (len(shape) - 1)) if channels_first else bias, shape


def _without_weights(layer: Any, shape: tuple[int, ...]) -> Any:
    # TensorFlow averages volumes in float32 only: there, over how many numbers is what is exact.
    averages = type(layer).__name__.startswith("AveragePooling")
    weight, shape = _by_basis(layer, shape, [], "float32" if averages else "float64")
    if averages:
        weight.data = 1 / np.rint(1 / weight.data.astype(np.float64))
    return weight, 0.0, shape


def _by_basis(
    layer: Any, shape: tuple[int, ...], kernels: list[np.ndarray], dtype: str = "float64"
) -> tuple[Any, tuple[int, ...]]:
    """The matrix of a linear layer: what a twin of it makes of the unit vectors.

    The twin is of tf_keras, whatever the model's backend: JAX has no float64 by default. Strides, padding, dilation
    and groups are then what Keras makes of them. Processors want channels last.
    """
    from scipy import sparse

    config = layer.get_config()
    options = {name: config[name] for name in _GEOMETRY if config.get(name) is not None}
    channels_first = config.get("data_format") == "channels_first"
    if "data_format" in config:
        options["data_format"] = "channels_last"
    if kernels:
        options["use_bias"] = False
    if type(layer).__name__ == "Flatten":
        options["data_format"], channels_first = config["data_format"], False
    size, position = math.prod(shape), 0
    with compat.eager_scope(), tf.device("CPU"):
        twin = getattr(compat.tf_keras.layers, type(layer).__name__)(**options, dtype=dtype)
        blocks, step, shape_out = [], 1, ()
        while position < size:
            x = np.zeros((min(step, size - position), size), dtype)
            x[np.arange(len(x)), position + np.arange(len(x))] = 1.0
            x = x.reshape(len(x), *shape)
            y = tf.convert_to_tensor(np.moveaxis(x, 1, -1) if channels_first else x)
            if kernels and not twin.built:
                twin.build(y.shape)
                twin.set_weights(kernels)
            y = twin(y).numpy()
            y = np.moveaxis(y, -1, 1) if channels_first and y.ndim > 2 else y
            blocks.append(sparse.csr_array(y.reshape(len(y), -1)))
            position, shape_out = position + len(y), y.shape[1:]
            step = max(1, _CHUNK // max(size, math.prod(shape_out)))
    return sparse.csr_array(sparse.vstack(blocks).T), shape_out


def _batch_normalization(layer: Any, shape: tuple[int, ...]) -> Any:
    from scipy import sparse

    axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
    axes = [axis % (len(shape) + 1) - 1 for axis in axes]
    at = [shape[axis] if axis in axes else 1 for axis in range(len(shape))]
    factor = 1 / np.sqrt(_float64(layer.moving_variance) + layer.epsilon)
    factor = factor * _float64(layer.gamma) if layer.scale else factor
    offset = -_float64(layer.moving_mean) * factor + (_float64(layer.beta) if layer.center else 0.0)
    weight = sparse.diags_array(np.ravel(np.broadcast_to(factor.reshape(at), shape)), format="csr")
    return weight, offset.reshape(at), shape


def _rescaling(layer: Any, shape: tuple[int, ...]) -> Any:
    from scipy import sparse

    factor = np.ravel(np.broadcast_to(np.asarray(layer.scale, np.float64), shape))
    return sparse.diags_array(factor, format="csr"), np.asarray(layer.offset, np.float64), shape


def slope_of(layer: Any, activation: Any) -> float | None:
    """The negative slope of a layer's activation function, None for none."""
    functions = compat.library_of(layer).activations
    if isinstance(activation, compat.keras.layers.Layer | compat.tf_keras.layers.Layer):
        name = type(activation).__name__
        if name in ("ReLU", "LeakyReLU") and type(activation) is getattr(compat.library_of(activation).layers, name):
            return ACTIVATIONS[name](activation, ())
    elif activation is None or activation is functions.linear:
        return None
    elif activation in (functions.relu, tf.nn.relu):
        return 0.0
    elif activation in (functions.get("leaky_relu"), tf.nn.leaky_relu):
        parameters = inspect.signature(activation).parameters
        return float((parameters.get("negative_slope") or parameters["alpha"]).default)
    detail = getattr(activation, "__name__", None) or getattr(activation, "name", None) or str(activation)
    raise unsupported(layer, f" with the activation {detail}")


def _relu_slope(layer: Any, shape: tuple[int, ...]) -> float:
    if layer.max_value is not None or layer.threshold:
        raise unsupported(layer, f" with max_value={layer.max_value}, threshold={layer.threshold}")
    return float(layer.negative_slope)


def _prelu_slope(layer: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.ravel(np.broadcast_to(_float64(layer.alpha), shape))


def _float64(variable: Any) -> np.ndarray:
    values = compat.to_numpy("weight", variable).astype(np.float64)
    check_all_finite(f"The weights {getattr(variable, 'path', variable.name)!r}", values)
    return values


ACTIVATIONS: dict[str, Callable[[Any, tuple[int, ...]], Any]] = {
    "Activation": lambda layer, shape: slope_of(layer, layer.activation),
    "ReLU": _relu_slope,
    "LeakyReLU": lambda layer, shape: float(layer.alpha if hasattr(layer, "alpha") else layer.negative_slope),
    "PReLU": _prelu_slope,
}

AFFINE: dict[str, Callable[[Any, tuple[int, ...]], Any]] = {
    "Dense": _dense,
    "BatchNormalization": _batch_normalization,
    "Rescaling": _rescaling,
    **dict.fromkeys(_KERNELS, _convolution),
    **dict.fromkeys(_WITHOUT_WEIGHTS, _without_weights),
}
