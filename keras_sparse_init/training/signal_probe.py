"""The signal in many LeNet-5 networks at once: functions compiled once, reused by giving them other kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

INPUT_SHAPE = (28, 28, 3)
# The kernels of LeNet-5 on images of that shape.
SHAPES = {
    "conv1": (5, 5, 3, 6),
    "conv2": (5, 5, 6, 16),
    "dense1": (256, 120),
    "dense2": (120, 84),
    "logits": (84, 10),
}

_BLOCK = 64  # Images that pass the convolutions at once: more of them leave the cache and take twice as long.


class SignalProbe:
    """Standard deviations of the activations of LeNet-5 networks without biases, relu after every layer.

    The filters of the first convolution of all networks are stacked as its output channels; the second is one grouped
    convolution, with a group for each network; the dense layers are batched over the networks.

    Args:
        inputs: Float array of shape (images, 28, 28, 3).

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

        inputs = np.asarray(inputs, np.float32)
        self._blocks = [tf.constant(inputs[start : start + _BLOCK]) for start in range(0, len(inputs), _BLOCK)]

    def __call__(self, kernels: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Measures networks.

        Args:
            kernels: For each layer of `SHAPES` an array of shape (networks, *shape).

        Returns:
            Three arrays of shape (networks,): the standard deviation of the outputs over images and units, the mean
            over the units of dense1, dense2 and logits of their standard deviations over images, and whether all
            outputs are 0 for all images.
        """
        import tensorflow as tf

        convolve, measure = _compiled()
        conv1, conv2, *dense = (tf.constant(kernel, tf.float32) for kernel in kernels)
        hidden = tf.concat([convolve(block, conv1, conv2) for block in self._blocks], axis=1)
        return tuple(value.numpy() for value in measure(hidden, *dense))


@functools.cache
def _compiled() -> tuple[Any, Any]:
    """The two halves of the network for any number of images and networks: each is traced once in a process."""
    import tensorflow as tf

    conv1, conv2, *dense = (tf.TensorSpec((None, *shape)) for shape in SHAPES.values())
    images, hidden = tf.TensorSpec((None, *INPUT_SHAPE)), tf.TensorSpec((None, None, SHAPES["dense1"][0]))
    convolve = tf.function(_convolve, input_signature=(images, conv1, conv2))
    return convolve, tf.function(_measure, input_signature=(hidden, *dense))


def _convolve(images: Any, conv1: Any, conv2: Any) -> Any:
    """What the dense layers get, of shape (networks, images, 256)."""
    import tensorflow as tf

    networks, hidden = tf.shape(conv2)[0], images
    for kernels in (conv1, conv2):
        # (5, 5, inputs of one network, networks * filters): all networks read the same images, then each its own.
        stacked = tf.transpose(kernels, (1, 2, 3, 0, 4))
        hidden = tf.nn.conv2d(hidden, tf.reshape(stacked, (*kernels.shape[1:4], -1)), strides=1, padding="VALID")
        hidden = tf.nn.relu(tf.nn.max_pool2d(hidden, ksize=2, strides=2, padding="VALID"))  # As the other way round.
    hidden = tf.transpose(tf.reshape(hidden, (-1, 16, networks, 16)), (2, 0, 1, 3))
    return tf.reshape(hidden, (networks, -1, 256))


def _measure(hidden: Any, *dense: Any) -> Any:
    """The standard deviation of the outputs, the mean over units of their standard deviations, and who is dead."""
    import tensorflow as tf

    stds = []
    for kernels in dense:
        hidden = tf.nn.relu(tf.matmul(hidden, kernels))
        stds.append(tf.math.reduce_std(hidden, axis=1))
    output_std = tf.math.reduce_std(hidden, axis=(1, 2))
    return output_std, tf.reduce_mean(tf.concat(stds, axis=1), axis=1), tf.reduce_all(hidden == 0, axis=(1, 2))
