"""The networks of the training job: LeNet-5 and a multilayer perceptron, as plain Keras models with named layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from keras_sparse_init.arguments import check_choice

Library = Literal["tf_keras", "keras"]
LIBRARIES = ("tf_keras", "keras")
WeightNormalization = Literal["constraint", "reparam"] | None

_LENET5_SMALLEST = 16  # Two valid 5x5 convolutions, each followed by a 2x2 pooling, leave 1x1 of it.


def lenet5(
    input_shape: Sequence[int],
    classes: int,
    hidden_sizes: Sequence[int] = (6, 16, 120, 84),
    activation: str = "relu",
    batch_norm: bool = False,
    weight_norm: WeightNormalization = None,
    seed: int | None = None,
    keras: Library = "tf_keras",
) -> Any:
    """LeNet-5: two convolutions with 2x2 max pooling, two hidden dense layers, logits.

    The layers with kernels are called conv1, conv2, dense1, dense2 and logits. Convolutions are 5x5 without padding.
    Kernels are drawn by `SparseHeNormal`: the same in both Kerases.

    Args:
        input_shape: (height, width, channels) of one image, at least 16x16.
        classes: The number of logits.
        hidden_sizes: Filters of the two convolutions and units of the two dense layers.
        activation: The activation of the hidden layers.
        batch_norm: Whether each hidden layer is followed by batch normalization, before its activation; it has no
            bias then.
        weight_norm: "constraint": a `WeightNormConstraint` on every kernel, applied once at first (an experiment may
            draw kernels anew); "reparam": every layer in `WeightNorm`, w = g v / ||v||. None: neither.
        seed: Seed of the kernels; None draws them anew each time.
        keras: The Keras of the model: "tf_keras" or "keras".

    Returns:
        A built model from images to logits.

    Raises:
        ValueError: When the images are too small, or an argument is not what it must be.

    Example:
        >>> from keras_sparse_init.training.networks import lenet5
        >>> lenet5((28, 28, 1), classes=10).count_params()
        44426
    """
    shape = _sizes("input_shape", input_shape, 3)
    if min(shape[:2]) < _LENET5_SMALLEST:
        raise ValueError(
            f"lenet5 needs images of at least {_LENET5_SMALLEST}x{_LENET5_SMALLEST} pixels. "
            f"Received: input_shape={shape}"
        )
    conv1, conv2, dense1, dense2 = _sizes("hidden_sizes", hidden_sizes, 4)
    (classes,) = _sizes("classes", [classes], 1)
    make = _Maker(keras, activation, batch_norm, weight_norm, seed, 5)
    layers = make.layers
    return make.model(
        "lenet5",
        [
            layers.Input(shape),
            *make.hidden("conv1", layers.Conv2D, conv1, 5),
            layers.MaxPooling2D(name="pool1"),
            *make.hidden("conv2", layers.Conv2D, conv2, 5),
            layers.MaxPooling2D(name="pool2"),
            layers.Flatten(name="flatten"),
            *make.hidden("dense1", layers.Dense, dense1),
            *make.hidden("dense2", layers.Dense, dense2),
            make.logits(classes),
        ],
    )


def mlp(
    input_shape: Sequence[int],
    classes: int,
    hidden_sizes: Sequence[int] = (300, 100),
    activation: str = "relu",
    batch_norm: bool = False,
    weight_norm: WeightNormalization = None,
    seed: int | None = None,
    keras: Library = "tf_keras",
) -> Any:
    """A multilayer perceptron on flattened images: hidden dense layers, logits.

    The layers with kernels are called dense1, dense2, ... and logits. Kernels are drawn by `SparseHeNormal`: the same
    in both Kerases.

    Args:
        input_shape: The shape of one input, of any rank.
        classes: The number of logits.
        hidden_sizes: Units of the hidden layers, as many as there are sizes.
        activation: The activation of the hidden layers.
        batch_norm: Whether each hidden layer is followed by batch normalization, before its activation; it has no
            bias then.
        weight_norm: "constraint": a `WeightNormConstraint` on every kernel, applied once at first (an experiment may
            draw kernels anew); "reparam": every layer in `WeightNorm`, w = g v / ||v||. None: neither.
        seed: Seed of the kernels; None draws them anew each time.
        keras: The Keras of the model: "tf_keras" or "keras".

    Returns:
        A built model from inputs to logits.

    Raises:
        ValueError: When a size is not a positive integer, or another argument is not what it must be.

    Example:
        >>> from keras_sparse_init.training.networks import mlp
        >>> mlp((28, 28, 1), classes=10).count_params()
        266610
    """
    shape = _sizes("input_shape", input_shape)
    hidden_sizes = _sizes("hidden_sizes", hidden_sizes)
    (classes,) = _sizes("classes", [classes], 1)
    make = _Maker(keras, activation, batch_norm, weight_norm, seed, len(hidden_sizes) + 1)
    hidden = [make.hidden(f"dense{i}", make.layers.Dense, size) for i, size in enumerate(hidden_sizes, start=1)]
    return make.model(
        "mlp",
        [
            make.layers.Input(shape),
            make.layers.Flatten(name="flatten"),
            *(layer for part in hidden for layer in part),
            make.logits(classes),
        ],
    )


class _Maker:
    """Makes the layers of a network, with a seed of its own for each kernel: equal shapes must not start equal."""

    def __init__(
        self, keras: Any, activation: str, batch_norm: bool, weight_norm: Any, seed: int | None, kernels: int
    ) -> None:
        check_choice("keras", keras, LIBRARIES)
        if not isinstance(batch_norm, bool):
            raise ValueError(f"`batch_norm` must be a bool. Received: batch_norm={batch_norm!r}")
        if weight_norm is not None:
            check_choice("weight_norm", weight_norm, ("constraint", "reparam"))
        from keras_sparse_init import compat

        self._library, self._activation, self._batch_norm = compat.library(keras), activation, batch_norm
        self._weight_norm = weight_norm
        self.layers = self._library.layers
        sequence = np.random.SeedSequence(seed)
        self._seeds = iter([None] * kernels if seed is None else sequence.generate_state(kernels, np.uint32).tolist())

    def hidden(self, name: str, kind: Any, *sizes: int) -> list[Any]:
        """A layer with a kernel, its activation, and batch normalization between them."""
        if not self._batch_norm:
            return [self._with_kernel(kind, *sizes, activation=self._activation, name=name)]
        return [
            self._with_kernel(kind, *sizes, use_bias=False, name=name),
            self.layers.BatchNormalization(name=f"{name}_norm"),
            self.layers.Activation(self._activation, name=f"{name}_activation"),
        ]

    def logits(self, classes: int) -> Any:
        """The last layer."""
        return self._with_kernel(self.layers.Dense, classes, name="logits")

    def model(self, name: str, layers: list[Any]) -> Any:
        """The model of the layers."""
        from keras_sparse_init.constraints import apply_constraints

        model = self._library.Sequential(layers, name=name)
        apply_constraints(model)
        return model

    def _with_kernel(self, kind: Any, *sizes: int, **options: Any) -> Any:
        from keras_sparse_init.constraints import WeightNormConstraint
        from keras_sparse_init.initializers import SparseHeNormal
        from keras_sparse_init.layers import WeightNorm

        if self._weight_norm == "constraint":
            options["kernel_constraint"] = WeightNormConstraint()
        layer = kind(*sizes, kernel_initializer=SparseHeNormal(seed=next(self._seeds)), **options)
        return WeightNorm(layer) if self._weight_norm == "reparam" else layer


def _sizes(name: str, values: Any, length: int | None = None) -> tuple[int, ...]:
    values = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else (values,)
    integers = all(isinstance(v, int | np.integer) and not isinstance(v, bool) and v > 0 for v in values)
    if not values or not integers or (length is not None and len(values) != length):
        meaning = {None: "positive integers", 1: "a positive integer"}.get(length, f"{length} positive integers")
        raise ValueError(f"`{name}` must be {meaning}. Received: {name}={values[0] if length == 1 else values}")
    return tuple(int(v) for v in values)
