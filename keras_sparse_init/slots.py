"""What an optimizer remembers of a variable: momenta, second moments, averages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from keras_sparse_init import compat


def slots_of(optimizer: Any, variable: Any) -> Iterator[tuple[Any, float]]:
    """The slots of a variable in an optimizer of either Keras, each with its initial value.

    Only slots of the variable's shape are given; the others (Adafactor's row and column sums) belong to no single
    weight. Slots of wrapped optimizers (loss scaling, Keras 3's `MultiOptimizer`) and averages and accumulated
    gradients are found too.

    Args:
        optimizer: The optimizer, or None.
        variable: A variable that it trains; there is nothing to give for others, or before the first update.

    Yields:
        `(slot, initial value)`, a variable and a float.

    Example:
        >>> import keras
        >>> from keras_sparse_init.slots import slots_of
        >>> kernel = keras.Variable([[1.0, 2.0]])
        >>> optimizer = keras.optimizers.Adam()
        >>> optimizer.build([kernel])
        >>> [(tuple(slot.shape), initial) for slot, initial in slots_of(optimizer, kernel)]
        [((1, 2), 0.0), ((1, 2), 0.0)]
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    wrapped = getattr(optimizer, "_inner_optimizers", ()) if inner is None else (inner,)
    for part in wrapped:
        yield from slots_of(part, variable)
    if wrapped:
        return
    if hasattr(optimizer, "get_slot_names"):
        found = _legacy_slots(optimizer, variable)
    elif hasattr(optimizer, "_var_key"):
        found = _slots(optimizer, variable)
    else:
        return
    for name, slot in found:
        if compat.is_variable(slot) and tuple(slot.shape) == tuple(variable.shape):
            yield slot, _initial_value(optimizer, name)


# Lists of an optimizer that hold other variables: those it trains, and all of its own.
_NOT_SLOTS = ("_trainable_variables", "_variables")


def _slots(optimizer: Any, variable: Any) -> Iterator[tuple[str, Any]]:
    """Those of an optimizer that has a list for each kind of slot, in the order of its variables."""
    indices = getattr(optimizer, "_trainable_variables_indices", getattr(optimizer, "_index_dict", {}))
    index = indices.get(optimizer._var_key(variable))
    for name, values in vars(optimizer).items():
        if index is not None and isinstance(values, list | tuple) and name not in _NOT_SLOTS and index < len(values):
            yield name, values[index]


def _legacy_slots(optimizer: Any, variable: Any) -> Iterator[tuple[str, Any]]:
    """Those of one of `tf_keras.optimizers.legacy`."""
    for name in optimizer.get_slot_names():
        with contextlib.suppress(KeyError):
            yield name, optimizer.get_slot(variable, name)


def _initial_value(optimizer: Any, name: str) -> float:
    """Adagrad's and Ftrl's accumulators alone do not start at 0; Ftrl would divide by it."""
    if name.strip("_") not in ("accumulator", "accumulators"):
        return 0.0
    names = ("initial_accumulator_value", "_initial_accumulator_value")
    return float(next((getattr(optimizer, n) for n in names if hasattr(optimizer, n)), 0.0))
