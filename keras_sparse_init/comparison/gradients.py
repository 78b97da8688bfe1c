"""Gradients of the loss of a model of either Keras, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_sparse_init import compat
from keras_sparse_init.masked_kernel import masked_kernels


def gradient_function(model: Any, loss: Callable[[Any, Any], Any]) -> Callable[[Any, Any], list[np.ndarray]]:
    """Makes a compiled function of (x, y) that gives the gradient of a loss for each trainable variable of a model.

    The model runs as at prediction: without dropout, batch normalization with its running statistics. Nothing of it
    changes, save that kernels in tfmot's wrappers are masked. Where a kernel has a mask the gradient is 0 off it.

    Args:
        model: A built model of either Keras.
        loss: A function of (y, outputs) that returns a scalar tensor, such as a Keras loss.

    Returns:
        The function. It returns arrays in the order and of the shapes of `model.trainable_variables`, as these were
        when it was made; 0 for a variable that the loss does not depend on.

    Raises:
        ValueError: When the model has no trainable variable.

    Example:
        >>> import numpy as np, tf_keras
        >>> from keras_sparse_init.comparison.gradients import gradient_function
        >>> dense = tf_keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        >>> model = tf_keras.Sequential([tf_keras.layers.Input((2,)), dense])
        >>> gradient_function(model, tf_keras.losses.MeanSquaredError())(np.array([[1.0, 2.0]]), np.array([[0.0]]))
        [array([[ 6.],
               [12.]], dtype=float32)]
    """
    variables = list(model.trainable_variables)
    if not variables:
        raise ValueError(f"`model` must have trainable variables. Received: the model {model.name!r} without any")
    gradients = _GRADIENTS[compat.backend_of(model)](model, loss, variables)
    masks = {id(kernel.kernel): kernel for kernel in masked_kernels(model)}

    def masked(x: Any, y: Any) -> list[np.ndarray]:
        result = []
        for variable, gradient in zip(variables, gradients(x, y), strict=True):
            array = np.zeros(variable.shape, np.float32) if gradient is None else compat.to_numpy("gradient", gradient)
            kernel = masks.get(id(variable))
            result.append(array if kernel is None else np.where(kernel.mask_value(), array, np.zeros((), array.dtype)))
        return result

    return masked


def gradient_norm(gradients: list[np.ndarray]) -> float:
    """The Euclidean norm over all of a list of gradients; its square is the gradient flow of Evci et al. 2020.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.comparison.gradients import gradient_norm
        >>> gradient_norm([np.array([3.0]), np.array([[0.0, 4.0]])])
        5.0

    Reference:
        Evci et al. 2020, Gradient flow in sparse neural networks and how lottery tickets win, arXiv:2010.03533.
    """
    return float(np.sqrt(sum(np.sum(np.square(g.astype(np.float64))) for g in gradients)))


def _of_tensorflow(model: Any, loss: Callable[[Any, Any], Any], variables: list[Any]) -> Callable[[Any, Any], Any]:
    import tensorflow as tf

    plain = [variable if isinstance(variable, tf.Variable) else variable.value for variable in variables]

    def of_replica(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=False))
        return [None if g is None else tf.convert_to_tensor(g) for g in tape.gradient(value, plain)]

    strategy = getattr(model, "distribute_strategy", None)
    several = strategy is not None and strategy.num_replicas_in_sync > 1

    @tf.function
    def gradients(x: Any, y: Any) -> Any:
        if not several:
            return of_replica(x, y)
        # Every replica has the same weights, and gets all of the data.
        reduction = tf.distribute.ReduceOp.SUM if compat.divides_by_replicas(loss) else tf.distribute.ReduceOp.MEAN
        found = strategy.run(of_replica, (x, y))
        return [None if g is None else strategy.reduce(reduction, g, axis=None) for g in found]

    return lambda x, y: gradients(tf.convert_to_tensor(x), tf.convert_to_tensor(y))


def _of_jax(model: Any, loss: Callable[[Any, Any], Any], variables: list[Any]) -> Callable[[Any, Any], Any]:
    import jax

    def value(trainable: Any, non_trainable: Any, x: Any, y: Any) -> Any:
        outputs, _ = model.stateless_call(trainable, non_trainable, x, training=False)
        return loss(y, outputs)

    gradients = jax.jit(jax.grad(value))

    def at(x: Any, y: Any) -> Any:
        return gradients([v.value for v in variables], [v.value for v in model.non_trainable_variables], x, y)

    return at


def _of_torch(model: Any, loss: Callable[[Any, Any], Any], variables: list[Any]) -> Callable[[Any, Any], Any]:
    import torch

    def gradients(x: Any, y: Any) -> Any:
        value = loss(y, model(x, training=False))
        return torch.autograd.grad(value, [v.value for v in variables], allow_unused=True)

    return gradients


_GRADIENTS = {"tensorflow": _of_tensorflow, "jax": _of_jax, "torch": _of_torch}
