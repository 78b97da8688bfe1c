"""The signal in many LeNet-5 networks at once: one compiled function, reused by giving it other kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# The kernels of LeNet-5 on images of 28x28x3, in order, and the units over which the mean of the deviations is taken.
INPUT_SHAPE = (28, 28, 3)
SHAPES = {
    "conv1": (5, 5, 3, 6),
    "conv2": (5, 5, 6, 16),
    "dense1": (256, 120),
    "dense2": (120, 84),
    "logits": (84, 10),
}

_BLOCK = 32  # Images whose convolutions are computed at once: what they need meanwhile stays in the cache.


class SignalProbe:
    """Standard deviations of the activations of LeNet-5 networks without biases, relu after every layer.

    Each convolution is a matrix product that gives the four places of each pooling window as four blocks of columns
    or rows, so that pooling is the largest of four arrays. The first one stacks the filters of all networks as its
    output channels; the later layers are batched over the networks.

    Args:
        inputs: Images of shape (inputs, 28, 28, 3).

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.training.signal_probe import SHAPES, SignalProbe
        >>> probe = SignalProbe(np.ones((4, 28, 28, 3)))
        >>> output_std, unit_std, dead = probe([np.zeros((2, *shape)) for shape in SHAPES.values()])
        >>> output_std.tolist(), dead.tolist()
        ([0.0, 0.0], [True, True])
    """

    def __init__(self, inputs: np.ndarray) -> None:
        import tensorflow as tf

        count = len(inputs)
        windows = np.lib.stride_tricks.sliding_window_view(inputs.astype(np.float32), (5, 5), axis=(1, 2))
        # (images, 12, 2, 12, 2, 5, 5, 3): place in the pooled image, place in the pooling window, receptive field.
        windows = windows.reshape(count, 12, 2, 12, 2, 3, 5, 5).transpose(2, 4, 0, 1, 3, 6, 7, 5)
        self._patches = tf.constant(windows.reshape(4, count * 144, 75))
        self._measure = tf.function(self._trace)

    def __call__(self, kernels: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Measures networks.

        Args:
            kernels: For each layer of `SHAPES` an array of shape (networks, *shape). Calls with as many networks reuse
                the compiled function.

        Returns:
            Three arrays of shape (networks,): the standard deviation of the outputs over images and units, the mean of
            the standard deviations over images of the units of dense1, dense2 and logits, and whether all outputs are 0
            for all images.
        """
        conv1, conv2, *dense = (np.asarray(kernel, np.float32) for kernel in kernels)
        conv1 = np.moveaxis(conv1, 0, -2).reshape(75, -1)
        measured = self._measure(conv1, _row_operator(conv2), *dense)
        return tuple(value.numpy() for value in measured)

    def _trace(self, conv1: Any, conv2: Any, *dense: Any) -> Any:
        import tensorflow as tf

        networks, images = conv2.shape[0], self._patches.shape[1] // 144
        parts = []
        for start in range(0, images, _BLOCK):
            patches = self._patches[:, start * 144 : (start + _BLOCK) * 144]
            hidden = tf.nn.relu(tf.reduce_max(tf.matmul(patches, conv1), axis=0))
            hidden = tf.transpose(tf.reshape(hidden, (-1, 144, networks, 6)), (2, 0, 1, 3))
            hidden = tf.reshape(hidden, (networks, -1, 12 * 72))
            block = hidden.shape[1]
            rows = tf.stack([hidden[:, :, 72 * row : 72 * (row + 5)] for row in range(8)], axis=1)
            hidden = tf.matmul(tf.reshape(rows, (networks, 8 * block, 360)), conv2)
            hidden = tf.reduce_max(tf.reshape(hidden, (networks, 4, 2, block, 2, 64)), axis=(2, 4))
            parts.append(tf.reshape(tf.transpose(tf.nn.relu(hidden), (0, 2, 1, 3)), (networks, block, 256)))
        hidden, stds = tf.concat(parts, axis=1), []
        for kernel in dense:
            hidden = tf.nn.relu(tf.matmul(hidden, kernel))
            stds.append(tf.math.reduce_std(hidden, axis=1))
        dead = tf.reduce_all(hidden == 0, axis=(1, 2))
        return tf.math.reduce_std(hidden, axis=(1, 2)), tf.reduce_mean(tf.concat(stds, axis=1), axis=1), dead


def _row_operator(kernels: np.ndarray) -> np.ndarray:
    """The matrices from five rows of 12x6 values to the row of 8x16 that a convolution makes of them.

    The columns are ordered by (place in the pooling window, pooled column, filter).
    """
    networks = len(kernels)
    operator = np.zeros((networks, 5, 12, 6, 8, 16), np.float32)
    for column in range(8):
        operator[:, :, column : column + 5, :, column] = kernels
    return operator.reshape(networks, 360, 4, 2, 16).swapaxes(2, 3).reshape(networks, 360, 128)
