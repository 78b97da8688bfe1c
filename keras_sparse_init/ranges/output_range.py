"""`output_range`: between which values the outputs of a model can be, for all inputs of a box."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Literal

import numpy as np

from keras_sparse_init import compat
from keras_sparse_init.arguments import check_choice, check_positive
from keras_sparse_init.ranges.affine_chain import affine_chain, check_against
from keras_sparse_init.ranges.bounds import LinearBounds, crown_bounds, interval_bounds
from keras_sparse_init.ranges.exact_range import solve
from keras_sparse_init.ranges.extremes import attained, close_rounding

Method = Literal["auto", "ibp", "crown", "exact"]

# Without a time limit "auto" solves programs with so many binaries and so many of them at most: minutes on one core.
_UNSTABLE, _PROGRAMS = 32, 64

_ROWS = 20


@dataclasses.dataclass(frozen=True, eq=False)
class OutputRange:
    """What `output_range` returns: between `lower` and `upper` is every output of every input of the box.

    The range itself reaches from between `lower` and `attained_lower` to between `attained_upper` and `upper`. Arrays
    have the shape of the model's output, without the batch; `str()` is a table.

    Attributes:
        lower: Guaranteed lower bounds.
        upper: Guaranteed upper bounds.
        attained_lower: The lowest values that were found: the model's at `x_lower`, computed in float64.
        attained_upper: The highest, at `x_upper`.
        x_lower: The inputs that attain `attained_lower`, one for each output: shape (*output shape, *input shape).
        x_upper: Those that attain `attained_upper`.
        exact: Whether bounds and attained values are the same at both ends: then they are the range.
        method: "ibp", "crown" or "exact": what was done.
        unstable: How many units have an activation that is open: it may change its slope inside the box.
        seconds: How long it took.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init import OutputRange
        >>> one, x = np.ones(1), np.ones((1, 1))
        >>> print(OutputRange(0 * one, 2 * one, 0 * one, 2 * one, 0 * x, x, one > 0, "exact", 2, 0.1))
        output  lower  attained from    to  upper  exact
        0           0              0     2      2    yes
        by method exact, 2 open activations, 0.1 s
    """

    lower: np.ndarray
    upper: np.ndarray
    attained_lower: np.ndarray
    attained_upper: np.ndarray
    x_lower: np.ndarray
    x_upper: np.ndarray
    exact: np.ndarray
    method: str
    unstable: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """All attributes, arrays as nested lists: JSON-serializable."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in values.items()}

    def __str__(self) -> str:
        lines = [("output", "lower", "attained from", "to", "upper", "exact")]
        for index in list(np.ndindex(self.lower.shape))[:_ROWS]:
            ends = (self.lower, self.attained_lower, self.attained_upper, self.upper)
            numbers = [f"{array[index]:.6g}" for array in ends]
            lines.append((",".join(map(str, index)), *numbers, "yes" if self.exact[index] else "no"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        widths[3] = max(widths[3], 4)
        text = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        ]
        if self.lower.size > _ROWS:
            exact = int(self.exact.sum())
            text.append(f"... and {self.lower.size - _ROWS} more; {exact} of {self.lower.size} outputs are exact")
        text.append(f"by method {self.method}, {self.unstable:,} open activations, {self.seconds:.1f} s")
        return "\n".join(text)


def output_range(
    model: Any, lower: Any, upper: Any, method: Method = "auto", time_limit: float | None = None
) -> OutputRange:
    """Guaranteed bounds of every output of a model over a box of inputs, and the exact range where it can be found.

        lower <= min f(x) <= attained_lower,    attained_upper <= max f(x) <= upper,    over lower <= x <= upper

    The model is one of affine layers and (leaky) ReLU, dense or sparse: Dense, convolutions, batch normalization,
    average pooling, sums of branches, in `Masked`, `WeightNorm` or tfmot's wrappers. f is its function at prediction in
    real numbers, of the weights as they are; what a model computes in float32 differs from it by rounding.

    "ibp" (interval bounds) and "crown" (linear bounds, at least as tight) are sound to the last digit: their own
    rounding is counted in. A bound that an attained value meets to 1e-12 of its size is set to this value. "exact" goes
    on with a mixed-integer program for each end of each output, with a binary for each activation that is open over the
    box. Where HiGHS proves its optimum and this meets the attained value to 1e-5 of the output's size, the attained
    value is the end of the range; that tolerance covers the solver's, 1e-6, which is relative to each unit's size here.
    Sparse networks have programs that are often solved in seconds, where those of dense ones of the same size run to
    the end of any patience: give a time limit.

    Args:
        model: A built Sequential or functional model of either Keras with one input and one output. It is not changed.
        lower: The box's lower corner, a number or an array that broadcasts to the input's shape without the batch.
        upper: The upper corner, likewise.
        method: "ibp", "crown", "exact", or "auto": "exact" when there is a time limit or at most 32 activations are
            open and 64 programs to solve, else "crown".
        time_limit: Seconds for the whole call, or None. When they are over, what is certified and attained by then is
            returned. The reading of the model is not interrupted; the solver looks at its clock now and then.

    Returns:
        An `OutputRange`. `exact` says for each output whether both ends are found.

    Raises:
        TypeError: When `model` is no Keras model.
        ValueError: When the model has a layer that is not supported (it is named) or a `call` of its own, or the box,
            the method or the time limit is not valid.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import output_range
        >>> layers = keras.layers
        >>> parts = [layers.Dense(2, activation="relu", use_bias=False), layers.Dense(1, use_bias=False)]
        >>> model = keras.Sequential([layers.Input((1,)), *parts])
        >>> model.set_weights([np.array([[1.0, -1.0]]), np.array([[1.0], [-0.5]])])
        >>> found = output_range(model, -1, 1)
        >>> found.lower.tolist(), found.upper.tolist(), found.x_upper.tolist(), bool(found.exact.all())
        ([-0.5], [1.0], [[1.0]], True)

    Reference:
        Zhang et al. 2018, arXiv:1811.00866 (linear bounds); Tjeng et al. 2019, Evaluating Robustness of Neural Networks
        with Mixed Integer Programming, arXiv:1711.07356 (the program).
    """
    start = time.monotonic()
    compat.library_of(model)
    check_choice("method", method, ("auto", "ibp", "crown", "exact"))
    deadline = None if time_limit is None else start + check_positive("time_limit", time_limit)
    network, input_shape, output_shape = affine_chain(model)
    box = _corner("lower", lower, input_shape), _corner("upper", upper, input_shape)
    if np.any(box[0] > box[1]):
        index = np.unravel_index(np.argmax(box[0] > box[1]), input_shape)
        at = f"{box[0][index]} > {box[1][index]} at {tuple(map(int, index))}"
        raise ValueError(f"`lower` must not be above `upper`. Received: {at}")
    random = np.random.default_rng(0)
    check_against(model, network, random.uniform(*box, (8, *input_shape)))
    flat = box[0].ravel(), box[1].ravel()
    if method == "ibp":
        linear = LinearBounds(interval_bounds(network, *flat), None)
    else:
        linear = crown_bounds(network, *flat, deadline)
    unstable = sum(int(open_.sum()) for open_ in linear.unstable(network))
    found = attained(network, flat, linear.bounds[-1], linear.slopes, deadline)
    close_rounding(found)
    if method == "auto":
        programs = np.sum(found.lower < found.attained_lower) + np.sum(found.attained_upper < found.upper)
        small = unstable <= _UNSTABLE and programs <= _PROGRAMS
        method = "exact" if small or time_limit is not None else "crown"
    if method == "exact":
        solve(network, flat, linear, found, deadline)
    ends = (found.lower, found.upper, found.attained_lower, found.attained_upper)
    exact = (found.lower == found.attained_lower) & (found.upper == found.attained_upper)
    return OutputRange(
        *(end.reshape(output_shape) for end in ends),
        *(x.reshape(*output_shape, *input_shape) for x in (found.x_lower, found.x_upper)),
        exact.reshape(output_shape),
        method,
        unstable,
        time.monotonic() - start,
    )


def _corner(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A corner of the box as an array of the input's shape."""
    array = compat.to_numpy(name, value) if hasattr(value, "shape") else np.asarray(value)
    if array.dtype.kind not in "iuf" and array.dtype.name != "bfloat16":
        raise ValueError(f"`{name}` must be a number or an array of numbers. Received: {name}={value!r}")
    array = array.astype(np.float64)
    try:
        array = np.array(np.broadcast_to(array, shape))
    except ValueError:
        raise ValueError(
            f"`{name}` must broadcast to the input's shape {shape}. Received: an array of shape {array.shape}"
        ) from None
    if not np.isfinite(array).all():
        raise ValueError(f"`{name}` must be finite. Received: {array[~np.isfinite(array)][0]}")
    return array
