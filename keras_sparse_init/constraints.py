"""`WeightNormConstraint`: the weight vector of each unit is brought to a norm after every update, in both Kerases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_sparse_init import compat, fans, traversal
from keras_sparse_init.arguments import check_finite, check_positive, is_integer
from keras_sparse_init.masked_kernel import masked_kernels


@compat.register
class WeightNormConstraint(compat.Constraint):
    """Brings the weight vector of each unit to a norm: w := norm * w / (||w|| + epsilon), ||w||^2 the sum over `axis`.

    Used as `kernel_constraint=`, it projects the kernel after each update of the optimizer: at initialization the
    kernel is what its initializer drew, until `apply_constraints(model)` projects it at once. A vector of zeros stays
    0. Without `epsilon` the projection does not depend on the scale of w (Keras's `UnitNorm` does: its epsilon is added
    to the norm) and is idempotent. It is computed in float32 for half-precision weights. Zeros stay zeros: under
    `Masked` and static masks the norm is that of the active weights.

    What it gives is not weight normalization (the paper's w = g v / ||v||; see `WeightNorm`): the norm is fixed, there
    is no g to train, the gradient is that of w itself and not only its part across w, and nothing happens before the
    first update.

    Args:
        norm: The norm of each vector, a positive float.
        axis: The axis or axes that a norm is summed over, as in Keras's constraints. None: every axis but the last,
            which suits Dense, convolution and recurrent kernels. `for_layer` knows those of other layers.
        epsilon: A non-negative float that is added to the norm of w before the division.

    Raises:
        ValueError: When an argument is out of its range; in the call, when the weights have no such axis.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import WeightNormConstraint
        >>> dense = keras.layers.Dense(3, kernel_constraint=WeightNormConstraint())
        >>> model = keras.Sequential([keras.layers.Input((8,)), dense])
        >>> model.compile("sgd", "mse")
        >>> history = model.fit(np.ones((4, 8)), np.ones((4, 3)), verbose=0)
        >>> np.linalg.norm(dense.kernel, axis=0).round(5).tolist()
        [1.0, 1.0, 1.0]

    Reference:
        Salimans and Kingma 2016, Weight normalization, arXiv:1602.07868, for the reparameterization that this is not.
    """

    def __init__(self, norm: float = 1.0, axis: int | Sequence[int] | None = None, epsilon: float = 0.0) -> None:
        self.norm = check_positive("norm", norm)
        self.axis = _check_axis(axis)
        self.epsilon = check_finite("epsilon", epsilon)
        if self.epsilon < 0:
            raise ValueError(f"`epsilon` must not be negative. Received: epsilon={epsilon}")

    @classmethod
    def for_layer(
        cls, layer: Any, weight_name: str | None = None, norm: float = 1.0, epsilon: float = 0.0
    ) -> WeightNormConstraint:
        """The constraint that suits a kernel of a layer: not every unit lies along the last axis.

        Args:
            layer: A layer of either Keras, built or not.
            weight_name: Which of its kernels, such as "depthwise_kernel"; needed for separable convolutions.
            norm: As in the constructor.
            epsilon: As in the constructor.

        Returns:
            A `WeightNormConstraint` to be given to the layer, as its `kernel_constraint`, before it is built. In
            Embedding a unit is a row.

        Raises:
            ValueError: When the layer has no kernel, or several that differ in their axes.

        Example:
            >>> import keras
            >>> from keras_sparse_init import WeightNormConstraint
            >>> layer = keras.layers.Conv2DTranspose(8, 3)
            >>> layer.kernel_constraint = WeightNormConstraint.for_layer(layer)
            >>> layer.kernel_constraint.axis
            (0, 1, 3)
        """
        return cls(norm, unit_axes(layer, weight_name), epsilon)

    def __call__(self, w: Any) -> Any:
        """The weights, projected: a tensor of their shape and dtype."""
        rank = len(w.shape)
        axis = tuple(range(rank - 1)) if self.axis is None else self.axis
        if any(not -rank <= a < rank for a in axis):
            raise ValueError(f"`axis` must be axes of the weights, of shape {tuple(w.shape)}. Received: {self.axis}")
        ops, dtype = compat.ops_of(w), w.dtype
        wide = dtype if compat.float_dtype(dtype) == "float64" else "float32"
        w = ops.cast(w, wide)
        # Divided by the largest first: the square of 1e-30 would be 0. The result does not depend on that divisor.
        largest = ops.stop_gradient(ops.max(ops.abs(w), axis=axis, keepdims=True))
        alive = largest > 0
        largest = ops.where(alive, largest, ops.ones_like(largest))
        direction = w / largest
        squared = ops.sum(ops.square(direction), axis=axis, keepdims=True)
        # The root of 0 has no gradient, not even where its value is not taken.
        length = ops.sqrt(ops.where(alive, squared, ops.ones_like(squared)))
        factor = self.norm / (length + self.epsilon / largest)
        return ops.cast(direction * ops.where(alive, factor, ops.zeros_like(factor)), dtype)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as a JSON-serializable dict."""
        return {
            "norm": self.norm,
            "axis": None if self.axis is None else list(self.axis),
            "epsilon": self.epsilon,
        }


def apply_constraints(model: Any) -> None:
    """Applies the constraint of each weight of a model once, as the optimizer does after an update.

    For the beginning: constraints hold only after the first update, and never in frozen layers. Weights off a mask
    are 0 before and after.

    Args:
        model: A built model or layer of either Keras.

    Raises:
        ValueError: When it is not built.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import WeightNormConstraint, apply_constraints
        >>> dense = keras.layers.Dense(3, kernel_constraint=WeightNormConstraint(norm=2.0))
        >>> model = keras.Sequential([keras.layers.Input((8,)), dense])
        >>> apply_constraints(model)
        >>> np.linalg.norm(dense.kernel, axis=0).round(5).tolist()
        [2.0, 2.0, 2.0]
    """
    compat.library_of(model)
    compat.require_built(model, "weights")
    masks = {id(kernel.kernel): kernel for kernel in masked_kernels(model)}
    for variable in model.variables:
        constraint = getattr(variable, "constraint", None)
        if constraint is None:
            continue
        values = compat.to_numpy("weight", variable)
        if id(variable) in masks:
            values = np.where(masks[id(variable)].mask_value(), values, np.zeros((), values.dtype))
        compat.assign(variable, compat.to_numpy("weight", constraint(compat.own_tensor(variable, values))))


def unit_axes(layer: Any, weight_name: str | None = None) -> tuple[int, ...]:
    """The axes of a layer's kernel that the norm of a unit's weights is summed over.

    Args:
        layer: A layer of either Keras, built or not.
        weight_name: Which of its kernels; None for its only one.

    Returns:
        The axes, not negative.

    Raises:
        ValueError: When the layer has no kernel, or several that differ in their axes.
    """
    shapes = _kernel_shapes(layer)
    # The Kerases call the kernel of a depthwise convolution by one name or the other.
    if len(shapes) == 1 and {weight_name, *shapes} == {"kernel", "depthwise_kernel"}:
        weight_name = None
    if weight_name is not None and weight_name in shapes:
        shapes = {weight_name: shapes[weight_name]}
    elif weight_name is not None or not shapes:
        known = ", ".join(map(repr, shapes)) or "none"
        raise ValueError(
            f"`weight_name` must be that of a kernel of the layer {layer.name!r}: {known}. "
            f"Received: weight_name={weight_name!r}"
        )
    found = set()
    for name, shape in shapes.items():
        layout = fans.kernel_layout(layer, shape, weight_name=name)
        found.add((1,) if layout.one_hot else layout.fan_in_axes)
    if len(found) > 1:
        raise ValueError(
            f"`weight_name` must say which kernel of the layer {layer.name!r} is meant: {', '.join(map(repr, shapes))}"
        )
    return found.pop()


def _kernel_shapes(layer: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the kernels of a layer by their names; of one that is not built, of that rank at least."""
    compat.library_of(layer)
    built = {
        place.attribute.removeprefix("_"): place.shape for place in traversal.kernels_of(layer) if place.owner is layer
    }
    if built:
        return built
    classes = {c.__name__ for c in type(layer).__mro__}
    if "EinsumDense" in classes:
        return {"kernel": (1,) * len(layer.equation.split("->")[0].split(",")[1].strip())}
    if "Embedding" in classes:
        return {"embeddings": (1, 1)}
    if hasattr(layer, "cell") or hasattr(layer, "recurrent_initializer"):
        rank = getattr(getattr(layer, "cell", layer), "rank", 0) + 2
        return dict.fromkeys(("kernel", "recurrent_kernel"), (1,) * (rank - 1) + (12,))  # 12: of 1, 3 or 4 gates.
    if not hasattr(layer, "kernel_size"):
        return {"kernel": (1, 1)} if hasattr(layer, "kernel_constraint") else {}
    ones = (1,) * len(layer.kernel_size)
    if hasattr(layer, "pointwise_constraint"):
        return {"depthwise_kernel": (*ones, 1, 1), "pointwise_kernel": (*ones, 1, 1)}
    if hasattr(layer, "depthwise_constraint"):
        return {"depthwise_kernel": (*ones, 1, 1)}
    return {"kernel": (*ones, 1, getattr(layer, "groups", 1))}


def _check_axis(axis: Any) -> tuple[int, ...] | None:
    if axis is None:
        return None
    axes = (axis,) if is_integer(axis) else axis
    if not isinstance(axes, list | tuple) or not axes or not all(map(is_integer, axes)) or len(set(axes)) < len(axes):
        raise ValueError(f"`axis` must be an int, a list of different ints or None. Received: axis={axis!r}")
    return tuple(int(a) for a in axes)
