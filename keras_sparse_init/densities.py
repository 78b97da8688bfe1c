"""How sparse each layer is when a whole network is to have a given sparsity.

A method gives every layer a density that grows with one unknown; the unknown is solved for so that the network keeps
its budget of nonzeros. Public as `masks.layer_sparsities`. Pure Python: no arrays are needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from keras_sparse_init.arguments import check_sparsity
from keras_sparse_init.fans import check_shape

SparsityMethod = Literal["erk", "er", "uniform", "uniform_plus", "igq"]

# The sparsest that Gale et al. let the last dense layer be.
_LAST_DENSE_SPARSITY = 0.8


def layer_sparsities(
    shapes: Mapping[str, Any],
    sparsity: float,
    method: SparsityMethod = "erk",
    fixed: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Sparsity of every layer of a network whose kernels together keep a fraction 1 - sparsity of their weights.

    density_l = min(1, x * q_l), with x such that sum_l density_l * size_l = (1 - sparsity) * sum_l size_l, and

    - `"erk"`: q_l = sum(shape_l) / prod(shape_l) (Erdos-Renyi kernel);
    - `"er"`: q_l = (n_in + n_out) / (n_in * n_out), the channels only: the last two axes (a vector has n_in = 1);
    - `"uniform"`: q_l = 1;
    - `"uniform_plus"`: as uniform, but the first convolution (rank 3 or more) is dense and the last dense kernel
      (rank 2) is at most 80% sparse. A network without convolutions has only the second exception, one without
      dense kernels only the first; a layer that `fixed` names is left to `fixed`;
    - `"igq"`: density_l = 1 / (F * size_l + 1) with F in the place of x (Ideal Gas Quotas).

    A layer that would need a density above 1 is dense, and the others share what it could not use.

    Args:
        shapes: The kernels' shapes by name, in the order of the model.
        sparsity: Fraction of all weights that are zero, in [0, 1).
        method: How the nonzeros are shared out.
        fixed: Sparsities of layers that are not to be solved for. Their nonzeros count in the budget.

    Returns:
        The sparsity of every layer, in the order of `shapes`. A layer then has size - floor(sparsity_l * size)
        nonzeros, and their sum is within one weight per layer of the budget.

    Raises:
        ValueError: When a sparsity is not in [0, 1), the method is unknown, `fixed` names an unknown layer, or no
            choice for the layers that are free meets the budget.

    Example:
        >>> from keras_sparse_init import masks
        >>> shapes = {"hidden": (784, 300), "output": (300, 10)}
        >>> {name: round(s, 4) for name, s in masks.layer_sparsities(shapes, 0.9).items()}
        {'hidden': 0.9115, 'output': 0.0}

    Reference:
        ERK: Evci et al. 2020, Rigging the Lottery, arXiv:1911.11134. ER: Mocanu et al. 2018, Scalable training of
        artificial neural networks with adaptive sparse connectivity, arXiv:1707.04780. Uniform+: Gale et al. 2019, The
        State of Sparsity in Deep Neural Networks, arXiv:1902.09574. IGQ: Vysogorets and Kempe 2021, Connectivity
        Matters, arXiv:2107.02306.
    """
    sparsity = check_sparsity(sparsity)
    if method not in get_args(SparsityMethod):
        allowed = ", ".join(map(repr, get_args(SparsityMethod)))
        raise ValueError(f"`method` must be one of {allowed}. Received: method={method!r}")
    if not isinstance(shapes, Mapping):
        raise TypeError(f"`shapes` must map names to shapes. Received: shapes={shapes!r}")
    shapes = {name: check_shape(shape) for name, shape in shapes.items()}
    if unknown := [name for name in fixed or {} if name not in shapes]:
        raise ValueError(f"`fixed` must name layers among {list(shapes)}. Received: {unknown}")
    given = {name: check_sparsity(value, f"fixed[{name!r}]") for name, value in (fixed or {}).items()}
    if method == "uniform_plus":
        return _uniform_plus(shapes, sparsity, given)
    if method == "uniform":
        return _uniform(shapes, sparsity, given)
    return _solve(shapes, sparsity, method, given)


def _uniform(shapes: dict[str, tuple[int, ...]], sparsity: float, given: dict[str, float]) -> dict[str, float]:
    # 1 - (1 - s) is not always s in floating point, and floor(s * size) would show it.
    return _solve(shapes, sparsity, "uniform", given) if given else dict.fromkeys(shapes, sparsity)


def _uniform_plus(shapes: dict[str, tuple[int, ...]], sparsity: float, given: dict[str, float]) -> dict[str, float]:
    first_conv = next((name for name, shape in shapes.items() if len(shape) > 2), None)
    last_dense = next((name for name, shape in reversed(shapes.items()) if len(shape) == 2), None)
    if first_conv is not None:
        given = {first_conv: 0.0, **given}
    solved = _uniform(shapes, sparsity, given)
    if last_dense is None or last_dense in given or solved[last_dense] <= _LAST_DENSE_SPARSITY:
        return solved
    return _uniform(shapes, sparsity, {**given, last_dense: _LAST_DENSE_SPARSITY})


def _solve(
    shapes: dict[str, tuple[int, ...]], sparsity: float, method: str, given: dict[str, float]
) -> dict[str, float]:
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    budget = (1 - sparsity) * sum(sizes.values())
    budget -= sum(sizes[name] - math.floor(value * sizes[name]) for name, value in given.items())
    free = {name: size for name, size in sizes.items() if name not in given}
    capacity = sum(free.values())
    # Every given layer's count is rounded by less than one weight, and the budget is met up to that.
    slack = len(given)
    if budget > capacity + slack or budget < -slack or (free and budget <= 0):
        raise ValueError(
            f"`sparsity` cannot be met: the layers {list(free)} with {capacity} weights would have to keep {budget:g}. "
            f"Received: sparsity={sparsity}, with the sparsities {given} fixed by the arguments or the method"
        )
    if budget >= capacity:
        densities = dict.fromkeys(free, 1.0)
    elif method == "igq":
        densities = _ideal_gas_quotas(free, budget)
    else:
        densities = _proportional(free, budget, {name: _score(shapes[name], method) for name in free})
    # A density below half an ulp of 1 would round to the sparsity 1, which no layer has.
    solved = {name: min(1 - density, math.nextafter(1, 0)) for name, density in densities.items()}
    return {name: given[name] if name in given else solved[name] for name in shapes}


def _score(shape: tuple[int, ...], method: str) -> float:
    """What the density is proportional to."""
    if method == "uniform":
        return 1.0
    if method == "er":
        shape = (1, 1, *shape)[-2:]
    return sum(shape) / math.prod(shape) if shape else 1.0


def _proportional(sizes: dict[str, int], budget: float, scores: dict[str, float]) -> dict[str, float]:
    """Densities min(1, scale * score), by making dense what exceeds 1 until nothing does."""
    open_layers, scale = dict(sizes), 0.0
    while open_layers:
        # The scale can only grow as layers become dense; the maximum keeps rounding errors from undoing that.
        scale = max(scale, budget / sum(scores[name] * size for name, size in open_layers.items()))
        dense = [name for name in open_layers if scale * scores[name] >= 1]
        if not dense:
            break
        budget -= sum(open_layers.pop(name) for name in dense)
    return {name: scale * scores[name] if name in open_layers else 1.0 for name in sizes}


def _ideal_gas_quotas(sizes: dict[str, int], budget: float) -> dict[str, float]:
    """Densities 1 / (F * size + 1), by bisection: the nonzeros fall from all to none as F grows."""

    def nonzeros(factor: float) -> float:
        return sum(size / (factor * size + 1) for size in sizes.values())

    # Each layer keeps less than 1 / F.
    low, high = 0.0, len(sizes) / budget
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if nonzeros(middle) > budget else (low, middle)
    return {name: 1 / (high * size + 1) for name, size in sizes.items()}
