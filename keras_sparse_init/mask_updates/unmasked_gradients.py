"""Gradients for masked kernels as if they had no masks: where a connection would help that is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_sparse_init import compat
from keras_sparse_init.masked_kernel import trainable_kernels
from keras_sparse_init.samples import arrays
from keras_sparse_init.watching import unchanged, variables_of


def dense_gradients(
    model: Any, x: Any, y: Any = None, loss: Callable[..., Any] | None = None, sample_weight: Any = None
) -> list[np.ndarray]:
    """The gradient of the loss of a batch for all weights of each masked kernel, inactive ones (at 0) too.

    g = dL / d(kernel * mask). The model runs as in training, on the weights that it has; afterwards its state
    (statistics of batch normalization, seeds, metrics) is as before. In a loop of many updates `DenseGradients` saves
    tracing the model every time.

    Args:
        model: A built model of either Keras with masked kernels.
        x: A batch of inputs, an array or a list, tuple or dict of arrays.
        y: Its targets.
        loss: A function of (y, outputs) that returns the mean over the batch, as Keras's losses do. None: the loss the
            model is compiled with, regularization included.
        sample_weight: Weights of the samples, the third argument of the loss.

    Returns:
        An array for each of `masked_kernels(model)` that is trainable, in their order.

    Raises:
        ValueError: When the model has no trainable masked kernel, or neither a loss nor a compiled one.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import Masked, dense_gradients
        >>> dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        >>> model = keras.Sequential([keras.layers.Input((2,)), Masked(dense, mask=np.array([[1], [0]]))])
        >>> loss = keras.losses.MeanSquaredError()
        >>> gradients = dense_gradients(model, np.array([[2.0, 3.0]]), np.array([[0.0]]), loss)
        >>> gradients[0].tolist()
        [[8.0], [12.0]]
    """
    return DenseGradients(model, loss)(x, y, sample_weight)


class DenseGradients:
    """`dense_gradients` as a compiled function of batches, for many updates of one model.

    Args:
        model: As in `dense_gradients`.
        loss: As in `dense_gradients`.

    Raises:
        ValueError: When the model has no trainable masked kernel, or neither a loss nor a compiled one.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import Masked
        >>> from keras_sparse_init.mask_updates.unmasked_gradients import DenseGradients
        >>> model = keras.Sequential([keras.layers.Input((8,)), Masked(keras.layers.Dense(4), sparsity=0.5)])
        >>> model.compile("sgd", "mse")
        >>> gradients = DenseGradients(model)
        >>> [gradient.shape for gradient in gradients(np.ones((2, 8)), np.ones((2, 4)))]
        [(8, 4)]
    """

    def __init__(self, model: Any, loss: Callable[..., Any] | None = None) -> None:
        if loss is None and getattr(model, "optimizer", None) is None:
            raise ValueError(f"`loss` must be given, or the model compiled. Received: loss=None, {model.name!r}")
        if loss is not None and (not callable(loss) or isinstance(loss, type)):
            raise ValueError(
                "`loss` must be a function of (y, outputs) that returns a mean, such as "
                f"keras.losses.MeanSquaredError(). Received: loss={loss!r}"
            )
        self._model = model
        self._kernels = trainable_kernels(model)
        trained = {id(variable) for variable in model.trainable_variables}
        self._state = [variable for variable in variables_of(model) if id(variable) not in trained]
        self._run = _RUNS[compat.backend_of(model)](model, [kernel.kernel for kernel in self._kernels], loss)

    def __call__(self, x: Any, y: Any = None, sample_weight: Any = None) -> list[np.ndarray]:
        """The gradients of a batch; they may share TensorFlow's memory and must not be written to."""
        return self._of_batch(None, x, y, sample_weight)

    def hessian_products(
        self, vectors: list[np.ndarray], x: Any, y: Any = None, sample_weight: Any = None
    ) -> list[np.ndarray]:
        """The product of the loss's Hessian in the kernels with an array for each of them, as such arrays."""
        own = [compat.own_tensor(k.kernel, v) for k, v in zip(self._kernels, vectors, strict=True)]
        return self._of_batch(own, x, y, sample_weight)

    def _of_batch(self, vectors: list[Any] | None, *batch: Any) -> list[np.ndarray]:
        model = self._model
        floatx = compat.library_of(model).backend.floatx()
        batch = [
            None if part is None else compat.tensors_for(model, arrays(name, part, floatx))
            for name, part in zip(("x", "y", "sample_weight"), batch, strict=True)
        ]
        # Half precision holds small gradients when they are scaled as in training.
        scale = compat.loss_scale(model)
        kernels = [kernel.kernel for kernel in self._kernels]
        with unchanged([*self._state, *kernels, *compat.metric_variables(model)]):
            # Masks of ones let gradients through; what is off the masks is 0 in the kernels then. Values are what a
            # model goes by that has been traced before.
            for kernel in self._kernels:
                weights, mask = compat.kept_value(kernel.kernel), compat.kept_value(kernel.mask)
                compat.put_back(kernel.kernel, weights * mask)
                compat.put_back(kernel.mask, compat.ops_of(mask).ones_like(mask))
            found = [compat.view(array) for array in self._run(*batch, np.float32(scale), vectors)]
        return found if scale == 1 else [array / np.asarray(scale, array.dtype) for array in found]


def _loss_value(model: Any, loss: Callable[..., Any] | None, x: Any, y: Any, weight: Any) -> Any:
    outputs = model(x, training=True)
    if loss is None:
        return model.compute_loss(x, y, outputs, weight)
    return loss(y, outputs) if weight is None else loss(y, outputs, weight)


# Each makes a function of (x, y, weight, scale, vectors), whose results are gradients, or products with `vectors`.


def _of_tensorflow(model: Any, kernels: list[Any], loss: Any) -> Any:
    import tensorflow as tf

    sources = [getattr(kernel, "_variable", kernel) for kernel in kernels]
    sources = [kernel if isinstance(kernel, tf.Variable) else kernel.value for kernel in sources]

    @tf.function(reduce_retracing=True)
    def run(x: Any, y: Any, weight: Any, scale: Any, vectors: Any) -> Any:
        with tf.GradientTape() as outer:
            with tf.GradientTape() as tape:
                value = _loss_value(model, loss, x, y, weight)
                value *= tf.cast(scale, value.dtype)
            found = tape.gradient(value, sources, unconnected_gradients="zero")
            found = [tf.convert_to_tensor(gradient) for gradient in found]
            if vectors is not None:
                product = tf.add_n([tf.reduce_sum(g * v) for g, v in zip(found, vectors, strict=True)])
        if vectors is not None:
            found = outer.gradient(product, sources, unconnected_gradients="zero")
        return [tf.convert_to_tensor(gradient) for gradient in found]

    strategy = getattr(model, "distribute_strategy", None)
    if strategy is None or strategy.num_replicas_in_sync == 1:
        return run
    # The loss of `compile` is divided by the number of replicas.
    divided = loss is None or compat.divides_by_replicas(loss)
    reduction = tf.distribute.ReduceOp.SUM if divided else tf.distribute.ReduceOp.MEAN

    def reduced(*batch: Any) -> Any:
        return [strategy.reduce(reduction, array, axis=None) for array in strategy.run(run, batch)]

    return reduced


def _of_jax(model: Any, kernels: list[Any], loss: Any) -> Any:
    import jax
    import keras

    variables = variables_of(model)
    ids = [id(variable) for variable in variables]
    wanted = [ids.index(id(kernel)) for kernel in kernels]

    def value(sources: Any, values: Any, x: Any, y: Any, weight: Any, scale: Any) -> Any:
        values = list(values)
        for index, source in zip(wanted, sources, strict=True):
            values[index] = source
        mapping = list(zip(variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True):
            return _loss_value(model, loss, x, y, weight) * scale

    gradient = jax.grad(value)

    @jax.jit
    def run(sources: Any, values: Any, x: Any, y: Any, weight: Any, scale: Any, vectors: Any) -> Any:
        def at(sources: Any) -> Any:
            return gradient(sources, values, x, y, weight, scale)

        return at(sources) if vectors is None else jax.jvp(at, (sources,), (vectors,))[1]

    def with_values(*batch: Any) -> Any:
        values = [variable.value for variable in variables]
        return run([values[index] for index in wanted], values, *batch)

    return with_values


def _of_torch(model: Any, kernels: list[Any], loss: Any) -> Any:
    import torch

    sources = [kernel.value for kernel in kernels]

    def differentiate(value: Any, again: bool) -> list[Any]:
        found = torch.autograd.grad(value, sources, allow_unused=True, create_graph=again)
        return [torch.zeros_like(s) if g is None else g for s, g in zip(sources, found, strict=True)]

    def run(x: Any, y: Any, weight: Any, scale: Any, vectors: Any) -> Any:
        value = _loss_value(model, loss, x, y, weight) * float(scale)
        found = differentiate(value, vectors is not None)
        if vectors is None:
            return found
        return differentiate(sum((g * v).sum() for g, v in zip(found, vectors, strict=True)), False)

    return run


_RUNS = {"tensorflow": _of_tensorflow, "jax": _of_jax, "torch": _of_torch}
