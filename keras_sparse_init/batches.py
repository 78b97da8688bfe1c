"""Data in batches, as the inputs of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

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
    if isinstance(x, tf.data.Dataset):
        if x.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise ValueError("`x` must be a dataset that ends. Received: one that repeats forever; see `take`")
        total = 0
        for batch in x:
            inputs = _map(lambda value: compat.to_numpy("x", value), batch[0] if isinstance(batch, tuple) else batch)
            total += _length(inputs)
            yield _length(inputs), inputs
    else:
        several = isinstance(x, dict) or (isinstance(x, list | tuple) and all(hasattr(part, "shape") for part in x))
        arrays = _map(lambda value: np.asarray(compat.to_numpy("x", value)), x) if several else compat.to_numpy("x", x)
        total = _length(arrays)
        for start in range(0, total, batch_size):
            yield (
                min(batch_size, total - start),
                _map(lambda value, start=start: value[start : start + batch_size], arrays),
            )
    if not total:
        raise ValueError("`x` must have samples. Received: none")


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
