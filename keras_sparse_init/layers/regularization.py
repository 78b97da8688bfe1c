"""Regularizers of kernels that act on the effective kernel of a wrapper, not on the variable."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from keras_sparse_init import compat
from keras_sparse_init.layers.wrapper import KernelWrapper, Slot


class _OfEffective:
    """Stands in the place of a kernel's regularizer, and calls it with the effective kernel."""

    def __init__(self, wrapper: KernelWrapper, slot: Slot, regularizer: Callable[[Any], Any]):
        self.wrapper, self.slot, self.regularizer = wrapper, slot, regularizer

    def __call__(self, kernel: Any = None) -> Any:
        return self.regularizer(self.wrapper._effective(self.slot, self.slot.kernel if kernel is None else kernel))


def regularize_effective(wrapper: KernelWrapper, slot: Slot) -> None:
    """Makes the regularizer of a kernel, if any, act on what a wrapper makes of it. Configs keep the layer's own."""
    if compat.library_of(slot.owner) is compat.keras:
        if slot.kernel.regularizer is not None:
            slot.kernel.regularizer = _OfEffective(wrapper, slot, slot.kernel.regularizer)
        return
    for losses, index, loss in _losses(wrapper.layer):
        # tf_keras has bound the regularizer to the variable: partial(tag, partial(regularizer, variable)).
        bound = loss.args[0]
        if isinstance(bound, functools.partial) and bound.args and bound.args[0] is slot.kernel:
            losses[index] = functools.partial(loss.func, _OfEffective(wrapper, slot, bound.func))


def release_regularizers(layer: Any) -> None:
    """Gives the kernels of a layer that was wrapped their own regularizers again."""
    if compat.library_of(layer) is compat.keras:
        for variable in layer.variables:
            if isinstance(getattr(variable, "regularizer", None), _OfEffective):
                variable.regularizer = variable.regularizer.regularizer
        return
    for losses, index, loss in _losses(layer):
        if isinstance(loss.args[0], _OfEffective):
            bound = functools.partial(loss.args[0].regularizer, loss.args[0].slot.kernel)
            losses[index] = functools.partial(loss.func, bound)


def _losses(layer: Any) -> list[tuple[list[Any], int, Any]]:
    """The losses that the layers of tf_keras compute from their weights: each with the list it is in, and where."""
    return [
        (part._callable_losses, index, loss)
        for part in layer._flatten_layers()
        for index, loss in enumerate(part._callable_losses)
        if isinstance(loss, functools.partial) and loss.args
    ]
