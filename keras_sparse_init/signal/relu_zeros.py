"""Where the ReLUs of a model are 0 on a data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_sparse_init import compat
from keras_sparse_init.arguments import is_integer
from keras_sparse_init.batches import batches
from keras_sparse_init.signal.rectifiers import function_of, rectifiers
from keras_sparse_init.signal.zero_counts import ReluZeros, ZeroCounter
from keras_sparse_init.watching import Watched, left_as_it_is, watch

# What bounds a batch when its size is not given: outputs of all ReLUs, and samples.
_OUTPUTS, _SAMPLES = 2**24, 1024


def count_relu_zeros(model: Any, x: Any, batch_size: int | None = None) -> ReluZeros:
    """Counts the outputs of a model's ReLUs that are 0 on a data set, and the patterns that they form.

    zeros_j = #{(sample, position): max(z_j, 0) = 0}

    ReLUs are activations "relu" and "relu6" of layers, the functions of either Keras, TensorFlow, JAX and torch, `ReLU`
    layers without slope or threshold and `Activation` layers of these functions; `maximum(x, 0)` is not known as one.
    The model runs once on the data, as at prediction, batch after batch; it is left as it was, kernels in tfmot's
    wrappers too.

    Args:
        model: A built model or layer of either Keras.
        x: The samples: an array; a list or dict of arrays for several inputs; or a `tf.data.Dataset` of batches `x`,
            `(x, y)` or `(x, y, weights)`.
        batch_size: Samples at a time; None for as many as have about 2^24 outputs of ReLUs, but not above 1024. A
            dataset has its own batches. A model with a fixed batch size needs it here.

    Returns:
        A `ReluZeros`.

    Raises:
        TypeError: When `model` is no Keras model or layer.
        ValueError: When it is not built, has no ReLU that can be seen, or `x` has no samples or not the same number in
            all arrays.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import count_relu_zeros
        >>> dense = keras.layers.Dense(2, "relu", kernel_initializer="identity", name="hidden")
        >>> model = keras.Sequential([keras.layers.Input((2,)), dense, keras.layers.Dense(1, name="out")])
        >>> zeros = count_relu_zeros(model, np.array([[1, -1], [2, -2], [-3, -3]]))
        >>> zeros.total, zeros.per_layer, zeros.per_unit["hidden"].tolist(), zeros.patterns
        (4, {'hidden': 4}, [1, 3], 2)
        >>> print(zeros)
        layer   units  outputs  zeros  fraction  dead units  always on
        hidden      2        6      4    66.67%           1          0
        total       2        6      4    66.67%           1          0
        2 activation patterns of 3 samples

    Reference:
        Montufar et al. 2014, On the number of linear regions of deep neural networks, arXiv:1402.1869: patterns.
    """
    found, others = rectifiers(model)
    counter = ZeroCounter()
    for zeros in relu_zeros(model, x, batch_size):
        counter.add(zeros)
    seen = {name for name, _ in counter.counts}
    unseen = {name: "its ReLU is never called, or in a loop or branch" for name, _ in found if name not in seen}
    return counter.result(others | unseen)


def relu_zeros(model: Any, x: Any, batch_size: int | None = None) -> Iterator[dict[tuple[str, int], np.ndarray]]:
    """Runs a model and gives for each batch where its ReLUs are 0.

    Args:
        model: As for `count_relu_zeros`.
        x: As for `count_relu_zeros`.
        batch_size: As for `count_relu_zeros`.

    Yields:
        (layer name, number of the call) to a boolean array of shape (samples, positions, units), in the order of calls.

    Raises:
        TypeError: As `count_relu_zeros`.
        ValueError: As `count_relu_zeros`.
    """
    if batch_size is not None and (not is_integer(batch_size) or batch_size < 1):
        raise ValueError(f"`batch_size` must be a positive int or None. Received: batch_size={batch_size!r}")
    found, others = rectifiers(model)
    compat.require_built(model, "weights")
    if not found:
        seen = "".join(f"; {name} ({what})" for name, what in others.items())
        raise ValueError(f"`model` must have a ReLU that can be seen. Received: the model {model.name!r} without{seen}")
    layers = [layer for _, layer in found]
    if batch_size is None and not isinstance(x, tf.data.Dataset):
        with left_as_it_is(model):
            zeros = _run(model, layers, *next(batches(x, 1)))
        batch_size = min(max(_OUTPUTS // sum(values.size for values in zeros.values()), 1), _SAMPLES)
    with left_as_it_is(model):
        for samples, inputs in batches(x, batch_size):
            yield _run(model, layers, samples, inputs)


def _run(model: Any, layers: list[Any], samples: int, inputs: Any) -> dict[tuple[str, int], np.ndarray]:
    with watch(model, layers) as items:
        model(inputs, training=False)
    # A layer that has a ReLU and does not call it gives its output alone, as functions of TensorFlow do.
    items = [item for item in items if item.pre is not None or function_of(item.layer) is not None]
    if not items:
        names = ", ".join(layer.name for layer in layers)
        raise ValueError(f"The model {model.name!r} does not call its ReLUs where they can be seen: {names}")
    return {(item.name, item.call): _zeros(item, samples) for item in items}


def _zeros(item: Watched, samples: int) -> np.ndarray:
    zeros = compat.to_numpy(item.name, compat.ops_of(item.post).equal(item.post, 0))
    if getattr(item.layer, "data_format", None) == "channels_first":
        zeros = np.moveaxis(zeros, 1, -1)
    if not zeros.ndim or len(zeros) % samples:
        raise ValueError(
            f"{item.name!r} puts out an array of shape {zeros.shape} for {samples} samples: its first axis must be "
            "that of the samples"
        )
    # TimeDistributed of tf_keras puts the steps of a sample one after the other on the first axis.
    return zeros.reshape(samples, -1, zeros.shape[-1] if zeros.ndim > 1 else len(zeros) // samples)
