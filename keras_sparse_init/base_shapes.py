"""The shapes that the variables of a model have in its base: what `SparseMuP` compares widths by."""

from __future__ import annotations

import math
from typing import Any

from keras_sparse_init import fans, traversal
from keras_sparse_init.arguments import is_integer
from keras_sparse_init.layers.wrapper import layout_of


def base_shapes(
    model: Any, variables: list[Any], places: dict[int, traversal.KernelPlace], base: Any
) -> list[tuple[int, ...]]:
    """The shape of each variable in the base.

    Args:
        model: A built model.
        variables: Its trainable variables.
        places: Its kernels, by the ids of their variables.
        base: A narrower model with the same layers; the width of one, an int; or None, for the model itself.

    Raises:
        ValueError: When the base has not the layers of the model, or is an int and hidden widths differ.
    """
    shapes = [tuple(variable.shape) for variable in variables]
    if base is None:
        return shapes
    if is_integer(base):
        return _narrowed(model, variables, places, int(base))
    found = [tuple(variable.shape) for variable in base.trainable_variables]
    if list(map(len, found)) != list(map(len, shapes)) or not all(
        _differ_in_units(shape, other, places.get(id(variable)))
        for shape, other, variable in zip(shapes, found, variables, strict=True)
    ):
        raise ValueError(
            f"`base` must have the layers of the model, narrower. Received: trainable variables of shapes {found} "
            f"for {shapes}"
        )
    return found


def _differ_in_units(shape: tuple[int, ...], base: tuple[int, ...], place: Any) -> bool:
    """Whether two shapes of a kernel have the same receptive field; of vectors it is always so."""
    if place is None:
        return True
    layout = layout_of(place)
    units = layout.input_axes + layout.output_axes
    return all(shape[axis] == base[axis] for axis in range(len(shape)) if axis not in units)


def _narrowed(model: Any, variables: list[Any], places: dict[int, Any], width: int) -> list[tuple[int, ...]]:
    """The shapes with the width of all hidden units replaced."""
    shapes = [tuple(variable.shape) for variable in variables]
    layouts = [layout_of(places[id(variable)]) if id(variable) in places else None for variable in variables]
    kernels = [(shape, layout) for shape, layout in zip(shapes, layouts, strict=True) if layout is not None]
    if len(kernels) < 2:
        raise ValueError("`base` as an int is for models of at least two kernels, inputs and outputs. Give a model")
    inner = {shape[axis] for shape, layout in kernels[1:] for axis in layout.input_axes}
    inner |= {_width_out(shape, layout) for shape, layout in kernels[:-1]}
    (first, layout), (last, last_layout) = kernels[0], kernels[-1]
    outer = {_width_out(last, last_layout)} | {first[axis] for axis in layout.input_axes}
    if len(inner) != 1 or outer & inner:
        raise ValueError(
            f"`base` as an int is for models whose hidden units are all of one width, other than inputs and outputs. "
            f"Received: hidden widths {sorted(inner)}, inputs and outputs {sorted(outer)}; give the base as a model"
        )
    (own,) = inner
    gates = {
        id(places[id(v)].owner): layout.blocks
        for v, layout in zip(variables, layouts, strict=True)
        if layout is not None
    }
    narrowed = []
    for variable, shape, layout in zip(variables, shapes, layouts, strict=True):
        if layout is None:
            # A vector has as many numbers as its layer has units, those of all gates; a PReLU's has places before them.
            inputs, outputs = (), (len(shape) - 1,)
            blocks = gates.get(id(traversal.owner_of(model, variable)[2]), 1)
        else:
            inputs, outputs, blocks = layout.input_axes, layout.output_axes, layout.blocks
        new = list(shape)
        for axes, count in ((inputs, 1), (outputs, blocks)):
            for axis in axes:
                new[axis] = count * width if shape[axis] == count * own else shape[axis]
        narrowed.append(tuple(new))
    return narrowed


def _width_out(shape: tuple[int, ...], layout: fans.KernelLayout) -> int:
    return math.prod(shape[axis] for axis in layout.output_axes) // layout.blocks
