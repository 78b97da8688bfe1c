"""Samples for a model, as arrays, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from keras_sparse_init import compat


class Samples:
    """Inputs, and targets where there are any.

    Args:
        model: The model that takes them.
        x: An array, or a list, tuple or dict of arrays.
        y: Targets, or None.
        loss: The loss that they are for, or None.
        batch_size: The size of a batch.

    Raises:
        ValueError: When there are no samples, arrays differ in their number, or y and loss are not given together.
    """

    def __init__(self, model: Any, x: Any, y: Any, loss: Any, batch_size: int) -> None:
        if (y is None) != (loss is None):
            missing = "`y` without `loss`" if loss is None else "`loss` without `y`"
            raise ValueError(f"`y` and `loss` must be given together. Received: {missing}")
        floatx = compat.library_of(model).backend.floatx()
        self.x = arrays("x", x, floatx)
        self.count = _count("x", self.x)
        self.y = None if y is None else arrays("y", y, floatx)
        if self.y is not None and (count := _count("y", self.y)) != self.count:
            raise ValueError(f"`y` must have as many samples as `x`. Received: {count} and {self.count}")
        self._batch_size = batch_size

    def batches(self) -> Iterator[tuple[Any, Any, int]]:
        """(x, y, number of samples) of each batch; y is None without targets."""
        for start in range(0, self.count, self._batch_size):
            stop = min(start + self._batch_size, self.count)
            yield _part(self.x, start, stop), None if self.y is None else _part(self.y, start, stop), stop - start

    def at(self, rows: np.ndarray) -> tuple[Any, Any]:
        """(x, y) of the samples with these numbers; y is None without targets."""
        return tuple(None if nest is None else _map(lambda array: array[rows], nest) for nest in (self.x, self.y))


def _part(nest: Any, start: int, stop: int) -> Any:
    return _map(lambda array: array[start:stop], nest)


def _map(function: Callable[[Any], Any], nest: Any) -> Any:
    if isinstance(nest, dict):
        return {key: _map(function, item) for key, item in nest.items()}
    if isinstance(nest, list | tuple):
        return type(nest)([_map(function, item) for item in nest])
    return function(nest)


def leaves(nest: Any) -> list[Any]:
    """The arrays of a nest."""
    found: list[Any] = []
    _map(found.append, nest)
    return found


def arrays(name: str, nest: Any, floatx: str) -> Any:
    """A nest of samples as NumPy arrays, those of float64 in Keras's float type, as `fit` does."""
    if isinstance(nest, dict):
        return {key: arrays(name, item, floatx) for key, item in nest.items()}
    if isinstance(nest, list | tuple) and nest and all(compat.has_shape(item) for item in nest):
        return type(nest)([arrays(name, item, floatx) for item in nest])
    array = compat.to_numpy(name, nest)
    if array.dtype == object:
        raise ValueError(f"`{name}` must be an array of numbers, or a nest of such. Received: {nest!r}")
    return array.astype(floatx) if array.dtype == np.float64 else array


def _count(name: str, nest: Any) -> int:
    shapes = [array.shape for array in leaves(nest)]
    if not shapes or not all(shape and shape[0] for shape in shapes):
        raise ValueError(f"`{name}` must have samples along its first axis. Received: arrays of shapes {shapes}")
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"The arrays of `{name}` must have as many samples each. Received: shapes {shapes}")
    return shapes[0][0]
