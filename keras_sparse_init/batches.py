"""Data in batches, as the inputs of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_sparse_init import compat


def batches(x: Any, batch_size: int | None) -> Iterator[tuple[int, Any]]:
    """The number of samples of each batch, and the batch as arrays.

    Args:
        x: An array; a list or dict of arrays for several inputs; or a `tf.data.Dataset` of batches `x`, `(x, y)` or
            `(x, y, weights)`.
        batch_size: Number of samples of each batch but the last. A dataset has its own.

    Raises:
        ValueError: When there are no samples, or not as many in all arrays, or a dataset never ends.
    """
    total = 0
    for inputs in _batches_of_dataset(x) if isinstance(x, tf.data.Dataset) else _batches_of_arrays(x, batch_size):
        size = _length(inputs)
        total += size
        if size:
            yield size, inputs
    if not total:
        raise ValueError("`x` must have samples. Received: none")


def _batches_of_dataset(dataset: tf.data.Dataset) -> Iterator[Any]:
    if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError("`x` must be a dataset that ends. Received: one that repeats forever; see its method `take`")
    for batch in dataset:
        yield _map(_array, batch[0] if isinstance(batch, tuple) else batch)


def _batches_of_arrays(x: Any, batch_size: int) -> Iterator[Any]:
    several = isinstance(x, dict) or (isinstance(x, list | tuple) and all(hasattr(part, "shape") for part in x))
    arrays = _map(_array, x) if several else _array(x)
    for start in range(0, _length(arrays), batch_size):
        yield _map(lambda values, start=start: values[start : start + batch_size], arrays)


def _array(values: Any) -> np.ndarray:
    return np.asarray(compat.to_numpy("x", values))


def _map(function: Callable[[Any], Any], inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {key: _map(function, value) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return [_map(function, value) for value in inputs]
    return function(inputs)


def _length(inputs: Any) -> int:
    """The number of samples of arrays, which must have the same."""
    sizes: list[Any] = []
    _map(lambda value: sizes.append(value.shape[0] if value.ndim else None), inputs)
    if len(set(sizes)) != 1 or sizes[0] is None:
        raise ValueError(f"`x` must be arrays with the same number of samples on the first axis. Received: {sizes}")
    return sizes[0]
