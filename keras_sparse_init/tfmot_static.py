"""A `PruneLowMagnitude` of tfmot whose mask is static. The one module that imports tfmot: import it inside functions.

Importing tfmot takes seconds, and turns `tf.keras` into tf_keras for the process.
"""

from __future__ import annotations

import inspect
from typing import Any

import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.python.core.sparsity.keras.prune_registry import PruneRegistry
from tensorflow_model_optimization.python.core.sparsity.keras.pruning_schedule import PruningSchedule
from tensorflow_model_optimization.python.core.sparsity.keras.pruning_wrapper import PruneLowMagnitude


class Never(PruningSchedule):
    """The schedule of a static mask: no step updates it."""

    def __call__(self, step: Any) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.constant(False), tf.constant(0.0)

    def get_config(self) -> dict[str, Any]:
        """The schedule's name alone: it has no settings."""
        return {"class_name": "Never", "config": {}}


@tf_keras.saving.register_keras_serializable("keras_sparse_init")
class StaticPruneLowMagnitude(PruneLowMagnitude):
    """`PruneLowMagnitude` whose mask is what the kernel's zeros say at its creation, until `set_masks` changes it.

    Nothing is needed to train it: no callback, no schedule, no steps. Beyond what tfmot's own wrapper does:

    - The kernel is masked after each step of the optimizer too, so that whatever is saved is sparse.
    - Under mixed precision the float32 kernel is masked as it is, not rounded to half precision.
    - The layer's dtype, activity regularizer, state, sequence masks and further positional inputs keep their meaning.
    - `Bidirectional` can be wrapped.

    Args:
        layer: A tf_keras layer that tfmot can prune, or a `Bidirectional` of one; built or not.
        **kwargs: Arguments of `tf_keras.layers.Layer`.

    Raises:
        ValueError: When tfmot cannot prune the layer.
    """

    def __init__(self, layer: tf_keras.layers.Layer, **kwargs: Any):
        extend_registry(layer)
        # Otherwise the wrapper has the global policy, and imposes it on a layer that was given another.
        kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(layer, pruning_schedule=Never(), **kwargs)
        self.supports_masking = layer.supports_masking

    def build(self, input_shape: Any) -> None:
        """Builds the layer, then the mask of each of its kernels."""
        if hasattr(self.layer, "_build_from_signature"):
            _build_attention(self.layer, input_shape)
        super().build(input_shape)
        self.pruning_obj._pruning_vars = raw_variables(self.pruning_vars)
        if not isinstance(self.layer, tf_keras.layers.Embedding):
            for kernel, mask, _ in self.pruning_obj._pruning_vars:
                _constrain(kernel, mask)

    def add_weight(self, name: str, *args: Any, **kwargs: Any) -> tf.Variable:
        """Adds a mask, threshold or step, with the initial value and the name that tfmot should have given it."""
        kernel = len(self._non_trainable_weights) // 2
        if name == "mask":
            weight = self.prunable_weights[kernel]
            kwargs["initializer"] = lambda shape, dtype: tf.cast(tf.not_equal(weight, 0), dtype)
        elif name == "pruning_step":
            kwargs["initializer"] = "zeros"
        if name != "pruning_step" and kernel:
            # Two masks of the same name cannot be saved as h5, and in a checkpoint the second replaces the first.
            name = f"{name}_{kernel}"
        return super().add_weight(name, *args, **kwargs)

    def call(self, inputs: Any, *args: Any, training: Any = None, mask: Any = None, **kwargs: Any) -> Any:
        """Masks the kernels and calls the layer with those of the arguments that it takes."""
        self.pruning_obj.weight_mask_op()
        accepted = inspect.signature(self.layer.call).parameters
        kwargs.update({k: v for k, v in {"training": training, "mask": mask}.items() if k in accepted})
        outputs = self.layer(inputs, *args, **kwargs)
        if isinstance(self.layer, tf_keras.layers.Embedding) and isinstance(outputs, tf.Tensor):
            # Its gradient must be masked instead: some optimizers allow no constraint where gradients are sparse.
            rows = tf.gather(self.pruning_obj._pruning_vars[0][1], tf.cast(inputs, tf.int32))
            outputs *= tf.cast(rows, outputs.dtype)
        return outputs

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """The layer's own sequence mask, which tfmot drops."""
        return self.layer.compute_mask(inputs, mask)

    def reset_states(self) -> None:
        """Resets the state of a stateful recurrent layer."""
        self.layer.reset_states()

    def get_config(self) -> dict[str, Any]:
        """The layer's config and the wrapper's own settings."""
        config = super().get_config()
        return {key: config[key] for key in ("name", "trainable", "dtype", "layer") if key in config}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> StaticPruneLowMagnitude:
        """A new wrapper, whose name follows from the layer's."""
        config = {key: value for key, value in config.items() if key != "name"}
        return cls(tf_keras.layers.deserialize(config.pop("layer")), **config)


def extend_registry(layer: tf_keras.layers.Layer) -> None:
    """Makes tfmot accept a `Bidirectional` layer: the kernels of both directions, forward first."""
    if type(layer) is not tf_keras.layers.Bidirectional or hasattr(layer, "get_prunable_weights"):
        return
    directions = [layer.forward_layer, layer.backward_layer]
    if all(PruneRegistry.supports(direction) for direction in directions):
        directions = [PruneRegistry.make_prunable(direction) for direction in directions]
        layer.get_prunable_weights = lambda: [w for direction in directions for w in direction.get_prunable_weights()]


def can_wrap(layer: tf_keras.layers.Layer) -> bool:
    """Whether the wrapper takes this built layer and finds a kernel in it."""
    own = hasattr(layer, "get_prunable_weights")
    extend_registry(layer)
    if not hasattr(layer, "get_prunable_weights"):
        if not PruneRegistry.supports(layer):
            return False
        PruneRegistry.make_prunable(layer)
    found = bool(layer.get_prunable_weights())
    if not own:
        del layer.get_prunable_weights
    return found


def raw_variables(pruning_vars: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The variables without the cast of mixed precision, which reads them as half precision inside a layer's call."""
    return [tuple(getattr(variable, "_variable", variable) for variable in entry) for entry in pruning_vars]


def _constrain(kernel: tf.Variable, mask: tf.Variable) -> None:
    """Adds masking to what optimizers do to a kernel after each update."""
    own = kernel.constraint

    def constraint(value: Any) -> tf.Tensor:
        return (tf.convert_to_tensor(value) if own is None else own(value)) * mask

    for variable in (kernel, *getattr(kernel, "values", ())):
        variable._constraint = constraint


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
