"""Gradient-norm regularization: training steps on the loss plus a multiple of its squared gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_sparse_init import compat
from keras_sparse_init.masked_kernel import masked_kernels


def penalized_step(model: Any, penalty: float) -> Callable[[Any], dict[str, Any]]:
    """A `train_step` for a compiled model, on L + penalty / 2 sum (m g)^2 with g the gradient of the loss L.

    The sum is over all trainable weights, m the masks of those that have one. What the step reports is L.

    Args:
        model: A compiled model of either Keras on TensorFlow.
        penalty: The coefficient.

    Reference:
        As `gradient_regularization` of the code of Evci et al. 2020, arXiv:2010.03533; the norm of the gradient as a
        regularizer: Barrett and Dherin 2021, arXiv:2009.11162, equation (7).
    """
    variables = [getattr(v, "_variable", v) for v in model.trainable_variables]
    sources = [v if isinstance(v, tf.Variable) else v.value for v in variables]
    masks = {id(getattr(k.kernel, "_variable", k.kernel)): k.mask for k in masked_kernels(model)}

    def step(data: Any) -> dict[str, Any]:
        x, y = data
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                outputs = model(x, training=True)
                loss = model.compute_loss(x=x, y=y, y_pred=outputs)
            squares = [
                tf.nn.l2_loss(gradient * tf.cast(masks[id(variable)], gradient.dtype))
                if id(variable) in masks
                else tf.nn.l2_loss(gradient)
                for variable, gradient in zip(variables, inner.gradient(loss, sources), strict=True)
                if gradient is not None
            ]
            penalized = loss + penalty * tf.add_n(squares)
        model.optimizer.apply_gradients(zip(outer.gradient(penalized, sources), model.trainable_variables, strict=True))
        if compat.library_of(model).__name__ == "keras":
            # What `compute_loss` of tf_keras does by itself.
            tracker = next(metric for metric in model.metrics if metric.name == "loss")
            tracker.update_state(loss, sample_weight=tf.shape(x)[0])
        return model.compute_metrics(x, y, outputs, sample_weight=None)

    return step
