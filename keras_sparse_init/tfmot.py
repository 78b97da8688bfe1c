"""tfmot's `PruneLowMagnitude`: finding it and its masks, making it static, exact in mixed precision, well stepped.

tfmot itself is imported only where a wrapper is made: see `tfmot_static`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import tensorflow as tf
import tf_keras

from keras_sparse_init import compat, registration
from keras_sparse_init.tfmot_wrapper import is_static, is_wrapper

if TYPE_CHECKING:
    from keras_sparse_init.tfmot_static import StaticPruneLowMagnitude

registration.register("tf_keras")


def __getattr__(name: str) -> Any:
    if name == "StaticPruneLowMagnitude":
        from keras_sparse_init.tfmot_static import StaticPruneLowMagnitude

        return StaticPruneLowMagnitude
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def wrappers(model: tf_keras.layers.Layer) -> list[Any]:
    """All `PruneLowMagnitude` wrappers of a model or layer in model order, also inside other layers; each once."""
    found = {id(layer): layer for layer in model._flatten_layers() if is_wrapper(layer)}
    return list(found.values())


def can_wrap(layer: tf_keras.layers.Layer) -> bool:
    """Whether `static_wrapper` takes this built layer and finds a kernel in it to mask."""
    from keras_sparse_init import tfmot_static

    return tfmot_static.can_wrap(layer)


def static_wrapper(layer: tf_keras.layers.Layer) -> StaticPruneLowMagnitude:
    """The layer in a `PruneLowMagnitude` that keeps its mask: no callback and no schedule is needed to train it.

    The mask starts as `kernel != 0`, so that `kernel_initializer=SparseScaledInit(sparsity=0.95)` inside makes a
    sparse layer by itself, and stays until `set_masks` changes it. Weights off the mask are exactly 0 after every
    step of an optimizer. Under mixed precision the float32 kernel is masked as it is; tfmot's own wrapper rounds it
    to half precision at every forward pass.

    Args:
        layer: A tf_keras layer that tfmot can prune, or a `Bidirectional` of one.

    Returns:
        A `StaticPruneLowMagnitude`, a subclass of tfmot's `PruneLowMagnitude`.

    Raises:
        ValueError: When tfmot cannot prune the layer.

    Example:
        >>> import numpy as np, tf_keras
        >>> from keras_sparse_init import SparseHeNormal
        >>> from keras_sparse_init import static_wrapper
        >>> dense = tf_keras.layers.Dense(10, kernel_initializer=SparseHeNormal(sparsity=0.9, seed=0))
        >>> wrapper = static_wrapper(dense)
        >>> wrapper.build((None, 20))
        >>> int(np.sum(wrapper.pruning_vars[0][1].numpy()))
        20
    """
    from keras_sparse_init.tfmot_static import StaticPruneLowMagnitude

    return StaticPruneLowMagnitude(layer)


def pruned_by(layer: tf_keras.layers.Layer, schedule: Any) -> Any:
    """The layer in tfmot's own `PruneLowMagnitude`, which prunes it in training with an `UpdatePruningStep` callback.

    Args:
        layer: A built tf_keras layer that `can_wrap` says tfmot can prune.
        schedule: A `PolynomialDecay` or `ConstantSparsity` of this package, or a schedule of tfmot.
    """
    from keras_sparse_init import tfmot_static

    return tfmot_static.pruned_by(layer, schedule)


def release(layer: tf_keras.layers.Layer) -> None:
    """Takes from a layer what a wrapper around it has added to it, so that it can go on without."""
    from keras_sparse_init import tfmot_static

    vars(layer).pop("get_prunable_weights", None)
    tfmot_static.release(layer)


def fix_precision(model: tf_keras.layers.Layer) -> None:
    """Stops tfmot from rounding the kernels of a mixed-precision model at every forward pass.

    tfmot computes kernel := kernel * mask inside the layer's call, where a mixed policy reads the float32 kernel as
    half precision: what an optimizer adds below that precision is lost. After this call the product is computed in
    float32. Needed once for each model that tfmot itself wrapped or that was loaded or cloned; not for the wrappers of
    this package, nor for a `fit` with this package's `UpdatePruningStep`. Without mixed precision it changes nothing.

    Args:
        model: A built tf_keras model or layer.

    Raises:
        ValueError: When a wrapper is not built.

    Example:
        >>> import tf_keras
        >>> from tensorflow_model_optimization.sparsity.keras import prune_low_magnitude
        >>> from keras_sparse_init import fix_precision
        >>> dense = tf_keras.layers.Dense(10, dtype=tf_keras.mixed_precision.Policy("mixed_bfloat16"))
        >>> model = prune_low_magnitude(tf_keras.Sequential([tf_keras.layers.Input((20,)), dense]))
        >>> fix_precision(model)
    """
    found = wrappers(model)
    for wrapper in found:
        compat.require_built(wrapper)
    for wrapper in found:
        _fix_precision(wrapper)
    if isinstance(model, tf_keras.Model):
        # What Keras traced with the old variables must not be called again.
        model.train_function = model.test_function = model.predict_function = None


class UpdatePruningStep(tf_keras.callbacks.Callback):
    """Callback for models that tfmot prunes during `fit`, in place of tfmot's callback of the same name.

    It finds the wrappers inside other layers too and works on models that are not built yet. A step is one batch:
    a layer that is called several times in a batch (shared, or inside a loop) counts it once. After each batch weights
    off the masks are exactly 0, so that whatever a callback saves or exports is sparse, wherever this one stands in the
    list. Under mixed precision kernels are not rounded (see `fix_precision`). Static masks need no callback.

    In a training loop of one's own call `set_model`, `on_train_begin`, and `on_epoch_end` before saving: kernels are
    then masked at those points, and steps counted as tfmot counts them.

    Example:
        >>> import numpy as np, tf_keras
        >>> from tensorflow_model_optimization.sparsity import keras as sparsity
        >>> from keras_sparse_init import UpdatePruningStep
        >>> schedule = sparsity.PolynomialDecay(0.0, 0.9, begin_step=0, end_step=4, frequency=1)
        >>> model = sparsity.prune_low_magnitude(tf_keras.Sequential([tf_keras.layers.Dense(10)]), schedule)
        >>> model.compile("sgd", "mse")
        >>> history = model.fit(np.ones((40, 20)), np.ones((40, 10)), batch_size=10, verbose=0,
        ...     callbacks=[UpdatePruningStep()])
        >>> int(np.count_nonzero(model.layers[0].layer.kernel))
        20
    """

    def __init__(self) -> None:
        super().__init__()
        self._steps: dict[int, tf.Tensor] = {}
        self._builds = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts the steps of a new model at 0 and prepares its train function."""
        found = self._wrappers()
        # Decided here, not where the first replica has built the layers when the others are traced.
        self._builds = not all(wrapper.built for wrapper in found)
        for wrapper in found:
            if wrapper.built and int(tf.convert_to_tensor(wrapper.pruning_step)) < 0:
                wrapper.pruning_step.assign(0)
        model = self.model
        # One that a `fit` broken off by an exception has left behind.
        if _counts_steps(model.train_step):
            del model.train_step
        model.train_step = self._counting(model.train_step)
        if getattr(model, "train_function", None) is not None and not _counts_steps(model.train_function):
            _mark(model.make_train_function(force=True))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Sets weights off the masks to 0."""
        for wrapper in self._wrappers():
            if wrapper.built:
                wrapper.pruning_obj.weight_mask_op()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Sets weights off the masks to 0 and restores the model's own `train_step`."""
        self.on_epoch_end(0)
        if _counts_steps(self.model.train_step):
            del self.model.train_step

    def _wrappers(self) -> list[Any]:
        return [wrapper for wrapper in wrappers(self.model) if not is_static(wrapper)]

    def _step_of(self, wrapper: Any) -> tf.Tensor:
        return self._steps.get(id(wrapper), wrapper.pruning_step)

    def _counting(self, train_step: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def counting(data: Any) -> Any:
            if self._builds and not (tf.executing_eagerly() and all(wrapper.built for wrapper in self._wrappers())):
                self.model(tf_keras.utils.unpack_x_y_sample_weight(data)[0], training=False)
            found = [wrapper for wrapper in self._wrappers() if wrapper.built]
            steps = {}
            for wrapper in found:
                _fix_precision(wrapper)
                before = tf.maximum(wrapper.pruning_step, tf.constant(0, tf.int64))
                wrapper.pruning_step.assign(before)
                wrapper.pruning_obj._step_fn = functools.partial(self._step_of, wrapper)
                steps[id(wrapper)] = before + 1
            self._steps = steps
            try:
                result = train_step(data)
                for wrapper in found:
                    wrapper.pruning_obj.weight_mask_op()
                    # The optimizer's own call of them has seen weights off the mask, which no norm should count.
                    _apply_constraints(wrapper)
                    # The wrapper has counted its calls, which may be none or many.
                    wrapper.pruning_step.assign(steps[id(wrapper)])
            finally:
                self._steps = {}
            return result

        return _mark(counting)


def _apply_constraints(wrapper: Any) -> None:
    kernels = [kernel for kernel, _, _ in wrapper.pruning_obj._pruning_vars if kernel.constraint is not None]

    def update(strategy: Any, *kernels: Any) -> None:
        for kernel in kernels:
            strategy.extended.update(
                kernel, lambda variable, kernel=kernel: variable.assign(kernel.constraint(variable))
            )

    if kernels:
        tf.distribute.get_replica_context().merge_call(update, args=kernels)


def _mark(function: Any) -> Any:
    function.counts_pruning_steps = True
    return function


def _counts_steps(function: Any) -> bool:
    return getattr(function, "counts_pruning_steps", False)


def _fix_precision(wrapper: Any) -> None:
    from keras_sparse_init.tfmot_static import raw_variables

    wrapper.pruning_obj._pruning_vars = raw_variables(wrapper.pruning_vars)
