"""A stack of affine layers and their activations in NumPy: one pass forward and one backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Function = Callable[[np.ndarray], np.ndarray]

# Those of Klambauer et al. 2017, arXiv:1706.02515.
_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def activation_functions(name: str, negative_slope: float = 0.2) -> tuple[Function, Function]:
    """An activation and its derivative, both of pre-activations; the derivative of relu at 0 is 0.

    Args:
        name: One of `ACTIVATIONS`.
        negative_slope: Slope of "leaky_relu" for negative inputs.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.comparison.affine_stack import activation_functions
        >>> function, derivative = activation_functions("leaky_relu", 0.5)
        >>> function(np.array([-2.0, 2.0])).tolist(), derivative(np.array([-2.0, 2.0])).tolist()
        ([-1.0, 2.0], [0.5, 1.0])
    """
    if name == "leaky_relu":
        slope = np.float32(negative_slope)
        return lambda z: np.where(z > 0, z, slope * z), lambda z: np.where(z > 0, np.float32(1), slope)
    return _FUNCTIONS[name]


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * z))  # Without an exponential that overflows.


def _elu(z: np.ndarray) -> np.ndarray:
    return np.where(z > 0, z, np.expm1(np.minimum(z, 0.0)))


def _elu_slope(z: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(z, 0.0))


_FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "linear": (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0.0), lambda z: (z > 0).astype(z.dtype)),
    "tanh": (np.tanh, lambda z: 1.0 - np.tanh(z) ** 2),
    "sigmoid": (_sigmoid, lambda z: _sigmoid(z) * (1.0 - _sigmoid(z))),
    "elu": (_elu, _elu_slope),
    "selu": (
        lambda z: _SELU_SCALE * np.where(z > 0, z, _SELU_ALPHA * _elu(z)),
        lambda z: _SELU_SCALE * np.where(z >= 0, np.float32(1), _SELU_ALPHA * _elu_slope(z)),
    ),
    "silu": (lambda z: z * _sigmoid(z), lambda z: _sigmoid(z) * (1.0 + z * (1.0 - _sigmoid(z)))),
}
ACTIVATIONS = (*_FUNCTIONS, "leaky_relu")


def pass_through(
    kernels: Sequence[np.ndarray],
    biases: Sequence[np.ndarray],
    x: np.ndarray,
    y: np.ndarray,
    function: Function,
    derivative: Function,
) -> tuple[float, list[dict[str, np.ndarray]]]:
    """The loss of a stack, mean over samples of 1/2 ||a_L - y||^2, with what each layer sees in both directions.

    Args:
        kernels: An array of shape (inputs, units) for each layer.
        biases: An array of shape (units,) for each layer.
        x: Inputs of shape (samples, inputs).
        y: Targets of shape (samples, units of the last layer).
        function: The activation of each layer.
        derivative: Its derivative, of pre-activations.

    Returns:
        The loss, and for each layer a dict of new arrays: "pre_activation", "activation", "activation_gradient" (of
        each sample's loss, not divided by the number of samples), "kernel", "kernel_gradient" and "bias_gradient" (of
        the loss).

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.comparison.affine_stack import activation_functions, pass_through
        >>> kernels, biases = [np.array([[2.0], [1.0]])], [np.zeros(1)]
        >>> x, y = np.array([[1.0, 1.0]]), np.array([[1.0]])
        >>> loss, (layer,) = pass_through(kernels, biases, x, y, *activation_functions("relu"))
        >>> loss, layer["activation"].tolist(), layer["kernel_gradient"].tolist()
        (2.0, [[3.0]], [[2.0], [2.0]])
    """
    layers: list[dict[str, np.ndarray]] = []
    activation = x
    for kernel, bias in zip(kernels, biases, strict=True):
        pre_activation = activation @ kernel + bias
        activation = function(pre_activation)
        layers.append({"kernel": kernel, "pre_activation": pre_activation, "activation": activation})
    gradient = activation - y
    loss = 0.5 * float(np.square(gradient, dtype=np.float64).sum()) / len(x)
    for i in reversed(range(len(layers))):
        layers[i]["activation_gradient"] = gradient
        gradient = gradient * derivative(layers[i]["pre_activation"])
        inputs = layers[i - 1]["activation"] if i else x
        layers[i]["kernel_gradient"] = inputs.T @ gradient / len(x)
        layers[i]["bias_gradient"] = gradient.mean(axis=0)
        gradient = gradient @ kernels[i].T
    return loss, layers
