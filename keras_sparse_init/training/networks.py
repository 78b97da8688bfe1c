"""The networks of the training job: LeNet-5 and a multilayer perceptron, as plain tf_keras models with named layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_LENET5_SMALLEST = 16  # Two valid 5x5 convolutions, each followed by a 2x2 pooling, leave 1x1 of it.


def lenet5(
    input_shape: Sequence[int],
    classes: int,
    hidden_sizes: Sequence[int] = (6, 16, 120, 84),
    activation: str = "relu",
    seed: int | None = None,
) -> Any:
    """LeNet-5: two convolutions with 2x2 max pooling, two hidden dense layers, logits.

    The layers with kernels are called conv1, conv2, dense1, dense2 and logits. Convolutions are 5x5 without padding.

    Args:
        input_shape: (height, width, channels) of one image, at least 16x16.
        classes: The number of logits.
        hidden_sizes: Filters of the two convolutions and units of the two dense layers.
        activation: The activation of the hidden layers.
        seed: Seed of the (He normal) kernels; None draws them anew each time.

    Returns:
        A built tf_keras model from images to logits.

    Raises:
        ValueError: When the images are too small, or a size is not a positive integer.

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
    import tf_keras as keras

    layers, seeds = keras.layers, _seeds(seed, 5)
    he = keras.initializers.HeNormal
    return keras.Sequential(
        [
            layers.Input(shape),
            layers.Conv2D(conv1, 5, activation=activation, kernel_initializer=he(seeds[0]), name="conv1"),
            layers.MaxPooling2D(name="pool1"),
            layers.Conv2D(conv2, 5, activation=activation, kernel_initializer=he(seeds[1]), name="conv2"),
            layers.MaxPooling2D(name="pool2"),
            layers.Flatten(name="flatten"),
            layers.Dense(dense1, activation=activation, kernel_initializer=he(seeds[2]), name="dense1"),
            layers.Dense(dense2, activation=activation, kernel_initializer=he(seeds[3]), name="dense2"),
            layers.Dense(classes, kernel_initializer=he(seeds[4]), name="logits"),
        ],
        name="lenet5",
    )


def mlp(
    input_shape: Sequence[int],
    classes: int,
    hidden_sizes: Sequence[int] = (300, 100),
    activation: str = "relu",
    seed: int | None = None,
) -> Any:
    """A multilayer perceptron on flattened images: hidden dense layers, logits.

    The layers with kernels are called dense1, dense2, ... and logits.

    Args:
        input_shape: The shape of one input, of any rank.
        classes: The number of logits.
        hidden_sizes: Units of the hidden layers, as many as there are sizes.
        activation: The activation of the hidden layers.
        seed: Seed of the (He normal) kernels; None draws them anew each time.

    Returns:
        A built tf_keras model from inputs to logits.

    Raises:
        ValueError: When a size is not a positive integer.

    Example:
        >>> from keras_sparse_init.training.networks import mlp
        >>> mlp((28, 28, 1), classes=10).count_params()
        266610
    """
    shape = _sizes("input_shape", input_shape)
    hidden_sizes = _sizes("hidden_sizes", hidden_sizes)
    (classes,) = _sizes("classes", [classes], 1)
    import tf_keras as keras

    layers, seeds = keras.layers, _seeds(seed, len(hidden_sizes) + 1)
    he = keras.initializers.HeNormal
    return keras.Sequential(
        [
            layers.Input(shape),
            layers.Flatten(name="flatten"),
            *(
                layers.Dense(size, activation=activation, kernel_initializer=he(seeds[i]), name=f"dense{i + 1}")
                for i, size in enumerate(hidden_sizes)
            ),
            layers.Dense(classes, kernel_initializer=he(seeds[-1]), name="logits"),
        ],
        name="mlp",
    )


def _sizes(name: str, values: Any, length: int | None = None) -> tuple[int, ...]:
    values = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else (values,)
    integers = all(isinstance(v, int | np.integer) and not isinstance(v, bool) and v > 0 for v in values)
    if not values or not integers or (length is not None and len(values) != length):
        meaning = {None: "positive integers", 1: "a positive integer"}.get(length, f"{length} positive integers")
        raise ValueError(f"`{name}` must be {meaning}. Received: {name}={values[0] if length == 1 else values}")
    return tuple(int(v) for v in values)


def _seeds(seed: int | None, count: int) -> list[int | None]:
    """A seed for each kernel: layers of equal shape that shared one would start with equal kernels."""
    return [None] * count if seed is None else np.random.SeedSequence(seed).generate_state(count, np.uint32).tolist()
