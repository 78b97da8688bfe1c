"""A `PruneLowMagnitude` of tfmot whose mask is static. The one module that imports tfmot: import it inside functions.

Importing tfmot takes seconds, and turns `tf.keras` into tf_keras for the process.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.python.core.sparsity.keras import pruning_schedule
from tensorflow_model_optimization.python.core.sparsity.keras.prune_registry import PruneRegistry
from tensorflow_model_optimization.python.core.sparsity.keras.pruning_wrapper import PruneLowMagnitude

from keras_sparse_init import compat, fans, schedules, traversal
from keras_sparse_init.matching import mask_aware
from keras_sparse_init.packing import pack, unpack
from keras_sparse_init.sampling import derive_seed


class Never(pruning_schedule.PruningSchedule):
    """The schedule of a static mask: no step updates it."""

    def __call__(self, step: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Whether to update the masks at a step, and to what sparsity."""
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
        masks: None, or an array of 0 and 1 for each kernel. A layer that is not built yet gets kernels drawn for them.
        **kwargs: Arguments of `tf_keras.layers.Layer`.

    Raises:
        ValueError: When tfmot cannot prune the layer, or at build, when the masks do not fit its kernels.
    """

    def __init__(self, layer: tf_keras.layers.Layer, masks: Sequence[Any] | None = None, **kwargs: Any):
        extend_registry(layer)
        # Otherwise the wrapper has the global policy, and imposes it on a layer that was given another.
        kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(layer, pruning_schedule=Never(), **kwargs)
        self.supports_masking = layer.supports_masking
        # Plain attributes, set past Keras's tracking.
        object.__setattr__(self, "_given_masks", None if masks is None else [np.asarray(mask) for mask in masks])
        object.__setattr__(self, "_call_shapes", {})
        object.__setattr__(self, "_is_masked", False)

    def build(self, input_shape: Any) -> None:
        """Builds the layer, then the mask of each of its kernels."""
        fresh = not self.layer.built
        if fresh and hasattr(self.layer, "_build_from_signature"):
            compat.build_attention(self.layer, input_shape, self._call_shapes)
        super().build(input_shape)
        self.pruning_obj._pruning_vars = raw_variables(self.pruning_vars)
        if self._given_masks is not None and fresh:
            with compat.eager_scope():
                self._draw_for_masks_given()
        if not isinstance(self.layer, tf_keras.layers.Embedding):
            for kernel, mask, _ in self.pruning_obj._pruning_vars:
                _constrain(kernel, mask)

    def add_weight(self, name: str, *args: Any, **kwargs: Any) -> tf.Variable:
        """Adds a mask, threshold or step, with the initial value and the name that tfmot should have given it."""
        index = len(self._non_trainable_weights) // 2
        if name == "mask":
            kernel = self.prunable_weights[index]
            given = None if self._given_masks is None else self._mask_given(index)
            kwargs["initializer"] = lambda shape, dtype: (
                compat.nonzero_pattern(kernel, dtype) if given is None else tf.cast(given, dtype)
            )
        elif name == "pruning_step":
            kwargs["initializer"] = "zeros"
        if name != "pruning_step" and index:
            # Two masks of the same name cannot be saved as h5, and in a checkpoint the second replaces the first.
            name = f"{name}_{index}"
        return super().add_weight(name, *args, **kwargs)

    def _mask_given(self, index: int) -> np.ndarray:
        masks, kernels = self._given_masks, self.prunable_weights
        if len(masks) != len(kernels):
            raise ValueError(
                f"`masks` must have a mask for each of the {len(kernels)} kernels of {self.layer.name!r}. "
                f"Received: {len(masks)}"
            )
        try:
            return fans.as_mask(masks[index], tuple(kernels[index].shape))
        except (ValueError, TypeError) as error:
            raise type(error)(f"A mask of the layer {self.layer.name!r} cannot be set: {error}") from None

    def _draw_for_masks_given(self) -> None:
        base = compat.fresh_seed()
        for index, kernel in enumerate(self.prunable_weights):
            if compat.is_restored(kernel):
                continue
            _, below, owner, attribute = traversal.owner_of(self.layer, kernel)
            name, mask = "/".join((*below, attribute)), self._mask_given(index)
            layout = fans.kernel_layout(owner, mask.shape, weight_name=attribute)
            try:
                initializer = mask_aware(traversal.initializer_of(owner, attribute), name, mask.shape, layout)
            except ValueError:
                # No variance to scale: the values that the layer has got.
                compat.assign(kernel, np.where(mask, compat.to_numpy("kernel", kernel), 0))
                continue
            seed = derive_seed(base if initializer.given_seed is None else initializer.given_seed, name)
            compat.assign(kernel, initializer.draw(mask.shape, compat.true_dtype(kernel), mask, layout, seed))
        traversal.kernels_were_drawn(self.layer, self.prunable_weights)

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped layer on `inputs` and whatever else it takes."""
        # Keras keeps track of tensors that are passed by name.
        kwargs.update(zip(list(inspect.signature(self.layer.call).parameters)[1:], args, strict=False))
        if not self.built:
            # What `MultiHeadAttention` attends to decides on the shapes of its kernels.
            found = {name: kwargs[name] for name in ("value", "key") if hasattr(kwargs.get(name), "shape")}
            object.__setattr__(self, "_call_shapes", compat.shape_of(found))
        return super().__call__(inputs, **kwargs)

    def call(self, inputs: Any, training: Any = None, mask: Any = None, **kwargs: Any) -> Any:
        """Masks the kernels and calls the layer with those of the arguments that it takes."""
        if not self._is_masked:
            self.pruning_obj.weight_mask_op()
        accepted = inspect.signature(self.layer.call).parameters
        kwargs.update({k: v for k, v in {"training": training, "mask": mask}.items() if k in accepted})
        outputs = self.layer(inputs, **kwargs)
        if isinstance(self.layer, tf_keras.layers.Embedding) and isinstance(outputs, tf.Tensor):
            # Its gradient must be masked instead: some optimizers allow no constraint where gradients are sparse.
            rows = tf.gather(self.pruning_obj._pruning_vars[0][1], tf.cast(inputs, tf.int32))
            outputs *= tf.cast(rows, outputs.dtype)
        return outputs

    @contextlib.contextmanager
    def masked_once(self) -> Iterator[None]:
        """Masks the kernels now, and not in the calls inside, between which an optimizer alone may change them."""
        self.pruning_obj.weight_mask_op()
        object.__setattr__(self, "_is_masked", True)
        try:
            yield
        finally:
            object.__setattr__(self, "_is_masked", False)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """The layer's own sequence mask, which tfmot drops."""
        return self.layer.compute_mask(inputs, mask)

    def reset_states(self) -> None:
        """Resets the state of a stateful recurrent layer."""
        self.layer.reset_states()

    def get_config(self) -> dict[str, Any]:
        """The layer's config; once built, with the masks as they are, so that a clone has the same."""
        config = super().get_config()
        masks = self._given_masks
        if self.built:
            masks = [compat.to_numpy("mask", mask) for _, mask, _ in self.pruning_vars]
        own = {key: config[key] for key in ("name", "trainable", "dtype", "layer") if key in config}
        return {**own, "masks": None if masks is None else [pack(fans.as_mask(mask)) for mask in masks]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> StaticPruneLowMagnitude:
        """A new wrapper, whose name follows from the layer's."""
        config = {key: value for key, value in config.items() if key != "name"}
        masks = config.pop("masks", None)
        masks = None if masks is None else [unpack(mask) for mask in masks]
        return cls(tf_keras.layers.deserialize(config.pop("layer")), masks, **config)


def pruned_by(layer: tf_keras.layers.Layer, schedule: Any) -> PruneLowMagnitude:
    """The layer in tfmot's own wrapper, which prunes it as a schedule of this package or of tfmot says."""
    if isinstance(schedule, schedules.PruningSchedule):
        schedule = getattr(pruning_schedule, type(schedule).__name__)(**schedule.get_config())
    extend_registry(layer)
    if getattr(layer, "_query_shape", None) is not None:
        # The kernels of attention would appear at its first call, after tfmot has looked for them.
        compat.build_attention(layer, None, {})
    # Otherwise the wrapper has the global policy, and imposes it on a layer that was given another.
    return PruneLowMagnitude(layer, pruning_schedule=schedule, dtype=layer.dtype_policy)


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
        masked = tf.convert_to_tensor(value) * mask  # First: a norm is that of the active weights.
        return masked if own is None else own(masked) * mask

    constraint.own = own
    _set_constraint(kernel, constraint)


def release(layer: tf_keras.layers.Layer) -> None:
    """Takes the masking from the kernels of a layer that was wrapped."""
    for variable in layer.weights:
        variable = getattr(variable, "_variable", variable)
        if hasattr(variable.constraint, "own"):
            _set_constraint(variable, variable.constraint.own)


def _set_constraint(variable: tf.Variable, constraint: Any) -> None:
    for part in (variable, *getattr(variable, "values", ())):
        part._constraint = constraint
