"""The links of a network's graph: how it is known of a tensor's units whether paths lead to them, and from them.

A tensor is known by an array of booleans that broadcasts to a sample of it and has its rank: True where a path from an
input of the model ends (forward) or one to an output begins (backward). Pure NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from keras_sparse_init.fans import KernelLayout
from keras_sparse_init.topology import connectivity

Shape = tuple[int | None, ...]


class Link:
    """From some tensors to others. A subclass says what becomes of the booleans of the ones in the others.

    Args:
        inputs: Keys of the tensors that go in.
        outputs: Keys of the tensors that come out.
        shapes: The shapes of a sample of each that goes in, then of each that comes out.
    """

    def __init__(self, inputs: Sequence[Hashable], outputs: Sequence[Hashable], shapes: Sequence[Shape]) -> None:
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.shapes = list(shapes)

    def forward(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """The arrays of the outputs from those of the inputs."""
        raise NotImplementedError

    def backward(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """The arrays of the inputs from those of the outputs."""
        raise NotImplementedError


class Unread(Link):
    """Everything with everything; a model's input when nothing goes in.

    After `forward` and `backward`, `mixes` says whether that has hidden which units are connected and which are not.
    """

    mixes = False

    def forward(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """True everywhere if anything that goes in is."""
        alive = not values or any(value.any() for value in values)
        self.mixes |= _differ(values)
        return [np.full((1,) * len(shape), alive) for shape in self.shapes[len(self.inputs) :]]

    def backward(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """True everywhere if anything that comes out is."""
        needed = any(value.any() for value in values)
        self.mixes |= bool(self.inputs) and _differ(values)
        return [np.full((1,) * len(shape), needed) for shape in self.shapes[: len(self.inputs)]]


class UnitByUnit(Link):
    """A unit to the same unit, of one tensor or of several that are added, say; they may be broadcast."""

    def forward(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Reached from any."""
        return [np.logical_or.reduce(np.broadcast_arrays(*values))]

    def backward(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Needed of all."""
        return [_any_where_one(values[0], shape) for shape in self.shapes[:-1]]


class Pooled(Link):
    """A unit to the same unit at other positions, all positions together: pooling, padding, cropping, upsampling.

    `axis` is that of the units; an output of rank 1 has nothing else.
    """

    def __init__(self, inputs: Sequence[Hashable], outputs: Sequence[Hashable], shapes: Sequence[Shape], axis: int):
        super().__init__(inputs, outputs, shapes)
        self.axis = axis

    def forward(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Reached from any position."""
        return [_units_along(_units(values[0], self.axis), len(self.shapes[1]), self.axis)]

    def backward(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Needed for any position."""
        axis = self.axis if len(self.shapes[1]) > 1 else 0
        return [_units_along(_units(values[0], axis), len(self.shapes[0]), self.axis)]


class Reshaped(Link):
    """The entries of a sample in the same order, in another shape; all sizes are known."""

    def forward(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Each entry."""
        return [np.broadcast_to(values[0], self.shapes[0]).reshape(self.shapes[1])]

    def backward(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Each entry."""
        return [np.broadcast_to(values[0], self.shapes[1]).reshape(self.shapes[0])]

    @staticmethod
    def fits(shapes: Sequence[Shape]) -> bool:
        """Whether all sizes are known and agree."""
        sizes = [None if None in shape else math.prod(shape) for shape in shapes]
        return sizes[0] is not None and sizes[0] == sizes[1]


class Permuted(Link):
    """Axes in another order: axis i of the output is axis `order[i]` of the input."""

    def __init__(
        self, inputs: Sequence[Hashable], outputs: Sequence[Hashable], shapes: Sequence[Shape], order: Sequence[int]
    ):
        super().__init__(inputs, outputs, shapes)
        self.order = list(order)

    def forward(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Each entry."""
        return [values[0].transpose(self.order)]

    def backward(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Each entry."""
        return [values[0].transpose(np.argsort(self.order))]


class Concatenated(Link):
    """Tensors one after the other along an axis, of which the sizes are known."""

    def __init__(self, inputs: Sequence[Hashable], outputs: Sequence[Hashable], shapes: Sequence[Shape], axis: int):
        super().__init__(inputs, outputs, shapes)
        self.axis = axis

    def forward(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Each entry."""
        others = np.broadcast_shapes(*[_with(value.shape, self.axis, 1) for value in values])
        sizes = [shape[self.axis] for shape in self.shapes[:-1]]
        parts = [np.broadcast_to(v, _with(others, self.axis, size)) for v, size in zip(values, sizes, strict=True)]
        return [np.concatenate(parts, axis=self.axis)]

    def backward(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Each entry."""
        whole = np.broadcast_to(values[0], _with(values[0].shape, self.axis, self.shapes[-1][self.axis]))
        ends = np.cumsum([shape[self.axis] for shape in self.shapes[:-1]])[:-1]
        return list(np.split(whole, ends, axis=self.axis))


class Kernel(Link):
    """A kernel: units to those it has weights to. All positions of a sample count together.

    After `forward` and `backward`, `live` says of each input unit, `reached` of each output unit whether a path from
    the model's inputs leads there; `needed` of each output unit whether one leads on to the model's outputs.

    `name` is that of the masked kernel, None of one without a mask; `axis` is that of the units in a sample.
    """

    def __init__(
        self,
        inputs: Sequence[Hashable],
        outputs: Sequence[Hashable],
        shapes: Sequence[Shape],
        axis: int,
        name: str | None,
        mask: np.ndarray,
        layout: KernelLayout,
    ) -> None:
        super().__init__(inputs, outputs, shapes)
        self.axis, self.name, self.mask, self.layout = axis, name, mask, layout
        self.live = self.reached = self.needed = np.zeros(0, bool)

    def forward(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """By the weights of live units."""
        size = connectivity.number_of_inputs(self.mask.shape, self.layout)
        if self.layout.name == "embedding":
            self.live = np.full(size, values[0].any())  # What goes in is tokens, not units.
        else:
            self.live = np.array(np.broadcast_to(_units(values[0], self.axis), (size,)))
        self.reached = connectivity.reached_outputs(self.mask, self.layout, self.live)
        return [_units_along(self.reached, len(self.shapes[1]), self.axis)]

    def backward(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """By the weights of needed units."""
        self.needed = np.array(np.broadcast_to(_units(values[0], self.axis), self.reached.shape))
        used = connectivity.used_inputs(self.mask, self.layout, self.needed)
        if self.layout.name == "embedding":
            return [np.full((1,) * len(self.shapes[0]), used.any())]
        return [_units_along(used, len(self.shapes[0]), self.axis)]

    def effective(self) -> np.ndarray:
        """Which weights lie on a path from the model's inputs to its outputs, as a mask."""
        shape = self.mask.shape
        live = connectivity.inputs_on_kernel(self.live, shape, self.layout)
        return self.mask & live & connectivity.outputs_on_kernel(self.needed, shape, self.layout)


def _differ(values: list[np.ndarray]) -> bool:
    """Whether some of the booleans are True and others not."""
    return any(value.any() for value in values) and not all(value.all() for value in values)


def _units(value: np.ndarray, axis: int) -> np.ndarray:
    """The units along an axis, True where any position is."""
    moved = np.moveaxis(value, axis, -1)
    return moved.reshape(-1, moved.shape[-1]).any(axis=0)


def _units_along(units: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """The array of a tensor of this rank whose units lie along an axis; with rank 1 there is no other."""
    return units.reshape([-1 if i == axis % rank else 1 for i in range(rank)] if rank > 1 else -1)


def _any_where_one(value: np.ndarray, shape: Shape) -> np.ndarray:
    axes = tuple(i for i, size in enumerate(shape) if size == 1 and value.shape[i] > 1)
    return value.any(axis=axes, keepdims=True)


def _with(shape: Shape, axis: int, size: int | None) -> tuple[int, ...]:
    shape = list(shape)
    shape[axis] = size
    return tuple(shape)
