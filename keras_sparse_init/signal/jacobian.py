"""Singular values of the Jacobian of a model's output with respect to its input, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_sparse_init import compat


def singular_values(model: Any, x: Any, training: bool) -> np.ndarray:
    """Of the Jacobian of each sample, largest first.

    It takes a backward pass for each output of a sample, and memory for samples * outputs * inputs numbers.

    Args:
        model: A built model.
        x: A batch of inputs, as a tensor.
        training: Whether the model runs as in training. A sample's Jacobian then includes what it does to others.

    Returns:
        An array of shape (samples, min(inputs, outputs)).

    Raises:
        ValueError: When the model has several inputs or outputs, or not of floating numbers.
    """
    inputs = compat.tensors_of(x)
    if len(inputs) != 1 or not compat.is_floating(inputs[0]):
        raise ValueError("`jacobian` needs a model with one input, of floating numbers")
    jacobian = _JACOBIANS[compat.backend_of(model)](model, x, inputs[0], training)
    jacobian = np.stack([compat.view(part).astype(np.float64) for part in jacobian], axis=1)
    jacobian = jacobian.reshape(*jacobian.shape[:2], -1)
    # What is not finite has no singular values.
    finite = np.isfinite(jacobian).all(axis=(1, 2))
    values = np.full((len(jacobian), min(jacobian.shape[1:])), np.nan)
    values[finite] = np.linalg.svd(jacobian[finite], compute_uv=False)
    return values


def _columns(outputs: Any, reshape: Callable[[Any, Any], Any]) -> Any:
    """The only output as a tensor of shape (samples, outputs)."""
    found = compat.tensors_of(outputs)
    if len(found) != 1 or not compat.is_floating(found[0]):
        raise ValueError("`jacobian` needs a model with one output, of floating numbers")
    return reshape(found[0], (found[0].shape[0], -1))


def _of_tensorflow(model: Any, x: Any, value: Any, training: bool) -> list[Any]:
    import tensorflow as tf

    with tf.GradientTape(persistent=True) as tape:
        tape.watch(value)
        columns = tf.unstack(_columns(model(x, training=training), tf.reshape), axis=1)
    return [tape.gradient(column, value, unconnected_gradients="zero") for column in columns]


def _of_jax(model: Any, x: Any, value: Any, training: bool) -> list[Any]:
    import jax
    import jax.numpy as jnp

    trainable = [variable.value for variable in model.trainable_variables]
    others = [variable.value for variable in model.non_trainable_variables]

    @jax.jit
    def jacobian(x: Any) -> Any:
        def columns(x: Any) -> Any:
            return _columns(model.stateless_call(trainable, others, x, training=training)[0], jnp.reshape)

        outputs, back = jax.vjp(columns, x)
        units = jnp.eye(outputs.shape[1], dtype=outputs.dtype)
        return jax.lax.map(lambda unit: back(jnp.broadcast_to(unit, outputs.shape))[0], units)

    return list(jax.tree_util.tree_leaves(jacobian(x))[0])


def _of_torch(model: Any, x: Any, value: Any, training: bool) -> list[Any]:
    import torch

    value.requires_grad_()
    columns = _columns(model(x, training=training), torch.reshape)
    return [torch.autograd.grad(columns[:, i].sum(), value, retain_graph=True)[0] for i in range(columns.shape[1])]


_JACOBIANS = {"tensorflow": _of_tensorflow, "jax": _of_jax, "torch": _of_torch}
