"""tfmot's `PruneLowMagnitude`: reading its masks, and a wrapper of it whose mask is static. tfmot is imported lazily:
it takes seconds, and turns `tf.keras` into tf_keras for the process.
"""

from __future__ import annotations

import functools
from typing import Any

import tensorflow as tf
import tf_keras


def is_wrapper(layer: Any) -> bool:
    """Whether a layer is tfmot's `PruneLowMagnitude` or a subclass of it."""
    return any(
        c.__name__ == "PruneLowMagnitude" and c.__module__.startswith("tensorflow_model_optimization")
        for c in type(layer).__mro__
    )


def kernels_and_masks(wrapper: Any) -> list[tuple[tf.Variable, tf.Variable]]:
    """The prunable weights of a wrapper, each with its mask.

    Raises:
        ValueError: When the wrapper is not built: it has no masks yet.
    """
    if not wrapper.built:
        raise ValueError(
            f"The layer {wrapper.name!r} has no mask yet because it is not built. Build the model first: call it on "
            "data, call `model.build(input_shape)`, or give the first layer an input shape."
        )
    # `layer.weights[2]` would be the threshold, not the mask, in a layer without a bias.
    return [(kernel, mask) for kernel, mask, _ in wrapper.pruning_vars]


def can_wrap(layer: tf_keras.layers.Layer) -> bool:
    """Whether tfmot can wrap this built layer and finds a kernel in it to prune."""
    from tensorflow_model_optimization.python.core.sparsity.keras import prune_registry

    registry = prune_registry.PruneRegistry
    if not hasattr(layer, "get_prunable_weights"):
        if not registry.supports(layer):
            return False
        layer = registry.make_prunable(layer)
    return bool(layer.get_prunable_weights())


def static_wrapper(layer: tf_keras.layers.Layer) -> tf_keras.layers.Layer:
    """The layer in a `PruneLowMagnitude` that keeps its mask: no callback and no schedule is needed to train it.

    The mask starts as `kernel != 0`, so that `kernel_initializer=SparseScaledInit(sparsity=0.95)` inside makes a
    sparse layer by itself, and stays until `set_masks` changes it. Under mixed precision the float32 kernel is masked
    as it is; tfmot's own wrapper rounds it to half precision at every forward pass.

    Example:
        >>> import numpy as np, tf_keras
        >>> from keras_sparse_init import SparseHeNormal
        >>> from keras_sparse_init.tfmot import static_wrapper
        >>> dense = tf_keras.layers.Dense(10, kernel_initializer=SparseHeNormal(sparsity=0.9, seed=0))
        >>> wrapper = static_wrapper(dense)
        >>> wrapper.build((None, 20))
        >>> int(np.sum(wrapper.pruning_vars[0][1].numpy()))
        20
    """
    return _static_wrapper_class()(layer)


@functools.cache
def _static_wrapper_class() -> type:
    from tensorflow_model_optimization.python.core.sparsity.keras import pruning_schedule, pruning_wrapper

    class Never(pruning_schedule.PruningSchedule):
        """The schedule of a static mask: no step updates it."""

        def __call__(self, step: Any) -> tuple[tf.Tensor, tf.Tensor]:
            return tf.constant(False), tf.constant(0.0)

        def get_config(self) -> dict[str, Any]:
            return {"class_name": "Never", "config": {}}

    @tf_keras.saving.register_keras_serializable("keras_sparse_init")
    class StaticPruneLowMagnitude(pruning_wrapper.PruneLowMagnitude):
        """`PruneLowMagnitude` whose mask is what the kernel's zeros say at its creation."""

        def __init__(self, layer: tf_keras.layers.Layer, **kwargs: Any):
            super().__init__(layer, pruning_schedule=Never(), **kwargs)

        def build(self, input_shape: Any) -> None:
            if hasattr(self.layer, "_build_from_signature"):
                _build_attention(self.layer, input_shape)
            super().build(input_shape)
            # Masking through the variable itself: an autocast variable reads as half precision under a mixed policy,
            # and the product that tfmot assigns would round the float32 kernel.
            self.pruning_obj._pruning_vars = [
                (getattr(kernel, "_variable", kernel), mask, threshold) for kernel, mask, threshold in self.pruning_vars
            ]

        def add_weight(self, name: str, *args: Any, **kwargs: Any) -> tf.Variable:
            if name == "mask":
                masks = sum(w.name.split("/")[-1].startswith("mask:") for w in self._non_trainable_weights)
                kernel = self.prunable_weights[masks]
                kwargs["initializer"] = lambda shape, dtype: tf.cast(tf.not_equal(kernel, 0), dtype)
            if name == "pruning_step":
                # tfmot asserts in training that a callback has moved the step on from -1.
                kwargs["initializer"] = "zeros"
            return super().add_weight(name, *args, **kwargs)

        def get_config(self) -> dict[str, Any]:
            config = super().get_config()
            return {key: config[key] for key in ("name", "trainable", "dtype", "layer") if key in config}

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> StaticPruneLowMagnitude:
            config = {key: value for key, value in config.items() if key != "name"}
            return cls(tf_keras.layers.deserialize(config.pop("layer")), **config)

    return StaticPruneLowMagnitude


def _build_attention(layer: Any, input_shape: Any) -> None:
    """Creates the kernels of a `MultiHeadAttention`, which otherwise appear at its first call, after the masks."""
    if layer._query_shape is None:
        # Nothing has been seen of the values: attention of the inputs on themselves.
        layer._build_from_signature(input_shape, input_shape)
    query, key, value = layer._query_shape, layer._key_shape, layer._value_shape
    for dense, shape in (
        (layer._query_dense, query),
        (layer._key_dense, key),
        (layer._value_dense, value),
        (layer._output_dense, query[:-1] + [layer._num_heads, layer._value_dim]),
    ):
        if not dense.built:
            dense.build(shape)
            dense.built = True
