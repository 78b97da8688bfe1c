"""Magnitude pruning during `fit`, without tfmot: for both Kerases and every backend of Keras 3."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np

from keras_sparse_init import compat
from keras_sparse_init.mask_updates.base_callback import MaskCallback, require_masked
from keras_sparse_init.mask_updates.magnitude import (
    check_pattern,
    check_rule,
    global_magnitude_masks,
    lamp_masks,
    magnitude_mask,
)
from keras_sparse_init.masked_kernel import MaskedKernel
from keras_sparse_init.schedules import ConstantSparsity, PolynomialDecay, PruningSchedule
from keras_sparse_init.slots import slots_of
from keras_sparse_init.variance import check_choice

__all__ = ["ConstantSparsity", "MagnitudePruning", "PolynomialDecay", "PruningSchedule", "magnitude_prune"]

Scope = Literal["layer", "global", "lamp"]


def magnitude_prune(model: Any, sparsity: float, scope: Scope = "layer", rule: Any = None) -> None:
    """Prunes the masked kernels of a model once: their masks keep the largest weights, all other weights become 0.

    What the model's optimizer remembers of pruned weights is forgotten, so that no momentum moves them.

    Args:
        model: A built model with masked kernels.
        sparsity: Fraction of zeros, in [0, 1).
        scope: As in `MagnitudePruning`.
        rule: As in `MagnitudePruning`.

    Raises:
        ValueError: When the model has no masked kernel, the sparsity or scope is not allowed, or the pattern does not
            fit a kernel. Nothing has been changed then.
        TypeError: When the rule has no magnitude version.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import Masked, sparsity_table
        >>> from keras_sparse_init import magnitude_prune
        >>> layers = keras.layers
        >>> model = keras.Sequential([layers.Input((8,)), Masked(layers.Dense(4)), Masked(layers.Dense(2))])
        >>> magnitude_prune(model, 0.75)
        >>> sparsity_table(model).total.nonzeros
        10
    """
    _check_arguments(scope, rule)
    kernels = require_masked(model)
    weights = [compat.to_numpy("kernel", kernel.kernel) for kernel in kernels]
    if scope != "layer":
        new = (lamp_masks if scope == "lamp" else global_magnitude_masks)(weights, sparsity)
        _warn_of_collapse(kernels, new)
    else:
        new = [
            _named(kernel, magnitude_mask, weight, sparsity, rule, kernel.layout)
            for kernel, weight in zip(kernels, weights, strict=True)
        ]
    optimizer = getattr(model, "optimizer", None)
    for kernel, weight, mask in zip(kernels, weights, new, strict=True):
        compat.assign(kernel.mask, mask)
        compat.assign(kernel.kernel, _where(mask, weight, 0))
        for slot, initial in slots_of(optimizer, kernel.kernel):
            compat.assign(slot, _where(mask, compat.to_numpy("slot", slot), initial))


class MagnitudePruning(MaskCallback):
    """Callback that prunes the smallest weights during `fit`, in both Kerases and on every backend of Keras 3.

    It updates the masks of all masked kernels of the model (`Masked` layers, and the static tfmot wrappers that
    `sparsify` makes) at the steps that the schedule says; `strip` then gives the plain model. Start from a model with
    masks of ones, such as `Masked(layer)` has, or from a sparse one.

    Step s is the s-th update of the optimizer, as in tfmot: masks are updated right before it, from the weights after
    s - 1 updates. The step is the optimizer's, so that a run continued with its optimizer continues the schedule. With
    `steps_per_execution` above 1 an update that is due inside an execution follows it: none is left out, none is early.

    Weights off the masks are exactly 0 at all times, whatever is saved or exported when, and wherever the callback
    stands in the list: at an update the optimizer's memory of the pruned weights (momenta, moments, averages) is set
    to its initial value, and their gradients are 0. Where something moves them nevertheless (Muon, or a regularizer
    that mixes weights), the callback sets them to 0 after each batch. Other callbacks and the history find the
    fraction of zeros of the masks in `logs["sparsity"]` at the end of each epoch.

    Differences to tfmot: there a pruned weight may return, if one update of the optimizer alone makes it larger than
    the threshold; here its gradient is 0. A weight at 0 returns only when the schedule asks for fewer zeros than there
    are: with scope "layer" all of them then, being equal.

    Args:
        schedule: `PolynomialDecay`, `ConstantSparsity`, or another function of the step that returns
            `(should_prune, sparsity)`; tfmot's schedules will do.
        scope: "layer": every kernel has the schedule's sparsity, and the mask that tfmot would give it. "global": all
            kernels together, by one threshold and to the exact number. Each kernel then keeps at least its largest
            weight, with a warning when that is all it keeps. "lamp": the same with the scores of LAMP in place of
            magnitudes: w^2 / (sum of the squares of the weights of the kernel that are no smaller), which spreads the
            zeros over the layers without a hyperparameter.
        rule: None; or a rule of `keras_sparse_init.masks` whose pattern the masks shall have, filled by magnitude with
            the schedule's sparsity: `ConstantFanIn`, `Block`, or `NM`, whose n also limits the sparsity. See
            `magnitude.magnitude_mask`. With scope "layer" only.

    Raises:
        ValueError: When `scope` is unknown or does not go with `rule`; in `fit`, when the model has no masked kernel,
            a kernel cannot have the pattern, or tfmot prunes the model by itself.
        TypeError: When `schedule` is not callable or `rule` has no magnitude version.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import Masked, strip
        >>> from keras_sparse_init import MagnitudePruning, PolynomialDecay
        >>> model = keras.Sequential([keras.layers.Input((20,)), Masked(keras.layers.Dense(10))])
        >>> model.compile("adam", "mse")
        >>> pruning = MagnitudePruning(PolynomialDecay(0.0, 0.9, begin_step=1, end_step=9, frequency=2))
        >>> history = model.fit(np.ones((80, 20)), np.ones((80, 10)), batch_size=8, verbose=0, callbacks=[pruning])
        >>> int(np.count_nonzero(model.layers[0].layer.kernel)), history.history["sparsity"]
        (20, [0.9])

    Reference:
        Zhu and Gupta 2017, To prune, or not to prune: exploring the efficacy of pruning for model compression,
        arXiv:1710.01878. LAMP: Lee et al. 2021, arXiv:2010.07611, equation (4).
    """

    def __init__(self, schedule: Callable[[int], tuple[Any, Any]], scope: Scope = "layer", rule: Any = None) -> None:
        super().__init__()
        if not callable(schedule) or isinstance(schedule, type):
            raise TypeError(
                "`schedule` must be a PolynomialDecay, a ConstantSparsity or another function of the step. "
                f"Received: schedule={schedule!r}"
            )
        _check_arguments(scope, rule)
        self.schedule = schedule
        self.scope = scope
        self.rule = rule

    def check(self) -> None:
        """Checks that every kernel can have the pattern."""
        for kernel in require_masked(self.model):
            _named(kernel, check_pattern, self.rule, kernel.shape, kernel.layout)

    def due(self, step: int) -> float | None:
        """The sparsity of a step at which masks are updated."""
        due, sparsity = self.schedule(step)
        return float(sparsity) if due else None

    def change_masks(self, step: int, due: float) -> None:
        """Prunes to a sparsity."""
        magnitude_prune(self.model, due, self.scope, self.rule)


def _check_arguments(scope: Any, rule: Any) -> None:
    check_choice("scope", scope, get_args(Scope))
    check_rule(rule)
    if scope != "layer" and rule is not None:
        raise ValueError(f"`rule` needs `scope='layer'`: a pattern is one of each kernel. Received: rule={rule}")


def _named(kernel: MaskedKernel, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"The kernel {kernel.name!r} cannot be pruned: {error}") from None


def _warn_of_collapse(kernels: list[MaskedKernel], new: list[np.ndarray]) -> None:
    left = [kernel.name for kernel, mask in zip(kernels, new, strict=True) if mask.sum() == 1 < mask.size]
    if left:
        warnings.warn(
            f"Global pruning leaves a single weight to each of these kernels: {', '.join(left)}. Their other weights "
            "are smaller than the threshold of all kernels together. Prune less, or with `scope='layer'`.",
            stacklevel=3,
        )


def _where(mask: np.ndarray, values: np.ndarray, other: float) -> np.ndarray:
    return np.where(mask, values, np.asarray(other, values.dtype))
