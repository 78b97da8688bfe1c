"""Checks of arguments that several modules take. Every error names the argument, the value and what is allowed."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np


def is_integer(value: Any) -> bool:
    """Whether a value is an integer of Python or NumPy; booleans are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool | np.bool_)


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """`value` when it is one of `allowed`; a ValueError that names the argument when not."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}. Received: {name}={value!r}")
    return value


def check_finite(name: str, value: Any) -> float:
    """`value` as a float when it is a finite real number; a ValueError that names the argument when not."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite float. Received: {name}={value!r}")
    return float(value)


def check_positive(name: str, value: Any) -> float:
    """`value` as a float when it is finite and above 0; a ValueError that names the argument when not."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        raise ValueError(f"`{name}` must be a positive float. Received: {name}={value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be a positive float. Received: {name}={value}")
    return float(value)


def check_all_finite(what: str, values: np.ndarray) -> None:
    """A ValueError that says what was not finite when an array of numbers has a NaN or an infinity."""
    is_number = values.dtype.kind in "biuf" or values.dtype.name == "bfloat16"
    if is_number and not np.isfinite(values).all():
        raise ValueError(f"{what} must be finite. Received: {values[~np.isfinite(values)][0]}")


def check_seed(seed: Any) -> int:
    """`seed` as an int when it is a non-negative integer; an error that names it when not."""
    if isinstance(seed, bool | np.bool_) or not isinstance(seed, int | np.integer):
        raise TypeError(f"`seed` must be a non-negative int. Received: seed={seed!r} of type {type(seed).__name__}")
    if seed < 0:
        raise ValueError(f"`seed` must be a non-negative int. Received: seed={seed}")
    return int(seed)


def check_sparsity(sparsity: Any, name: str = "sparsity") -> float:
    """The sparsity as a Python float, or a ValueError that names it.

    Args:
        sparsity: A real number in [0, 1).
        name: What the error calls it.

    Returns:
        The same number as a float.

    Raises:
        ValueError: When it is not a number in [0, 1) (NaN and booleans are not).
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real) or not 0 <= sparsity < 1:
        raise ValueError(f"`{name}` must be a float in [0, 1). Received: {name}={sparsity!r}")
    return float(sparsity)
