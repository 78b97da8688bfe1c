"""Sparsity masks: which weights of a kernel exist.

A rule is a small serializable object that is called as `rule(shape, seed)` and returns a uint8 array of zeros and
ones; the functions do the same without an object. They arrange what `choose` picks: exactly k of n entries, uniformly
but for `heterogeneous_mask`. `layer_sparsities` says how sparse each layer of a network is to be. Everything is NumPy;
no Keras is imported.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any, Literal, Self

import numpy as np

from keras_sparse_init.arguments import check_sparsity
from keras_sparse_init.choose import choose, choose_largest
from keras_sparse_init.densities import SparsityMethod, layer_sparsities
from keras_sparse_init.fans import check_shape, kernel_layout

__all__ = [
    "Block",
    "ConstantFanIn",
    "Heterogeneous",
    "MaskRule",
    "NM",
    "Random",
    "SparsityMethod",
    "block_mask",
    "constant_fan_in_mask",
    "deserialize",
    "draw",
    "heterogeneous_mask",
    "layer_sparsities",
    "nm_mask",
    "random_mask",
    "serialize",
]


def random_mask(shape: Any, sparsity: float, seed: int) -> np.ndarray:
    """A mask with exactly floor(sparsity * size) zeros, all placements equally likely.

    Args:
        shape: The kernel's shape.
        sparsity: Fraction of zeros, in [0, 1).
        seed: Non-negative int. The same seed gives the same mask, in any process.

    Returns:
        A uint8 array of 0 and 1.

    Raises:
        TypeError: When the seed is not an int.
        ValueError: When the sparsity, the shape or the seed is out of range.

    Example:
        >>> from keras_sparse_init import masks
        >>> mask = masks.random_mask((784, 300), 0.9, seed=0)
        >>> mask.shape, int(mask.sum())
        ((784, 300), 23520)
    """
    shape, sparsity = check_shape(shape), check_sparsity(sparsity)
    size = math.prod(shape)
    return choose(size, 1, size - math.floor(sparsity * size), seed).reshape(shape)


def constant_fan_in_mask(shape: Any, sparsity: float, seed: int, kernel_layout: Any = None) -> np.ndarray:
    """A mask that gives every output unit the same number of inputs, fan_in - floor(sparsity * fan_in).

    The inputs of a unit are chosen uniformly and independently of other units. Inputs and units are what the layout
    says: a unit of a depthwise kernel is a pair (channel, multiplier), a unit of an embedding is a dimension, and its
    inputs are the tokens. (For n nonzeros in each token's row there is `nm_mask(shape, n, dim, seed, axis=-1)`.)

    Args:
        shape: The kernel's shape.
        sparsity: Fraction of zeros of every unit, in [0, 1).
        seed: Non-negative int.
        kernel_layout: A `KernelLayout`, a layout name or a layer; None for Keras's convention by rank.

    Returns:
        A uint8 array of 0 and 1.

    Raises:
        TypeError: When the seed is not an int.
        ValueError: When the sparsity, the shape or the seed is out of range, or the layout does not fit the shape.

    Example:
        >>> from keras_sparse_init import masks
        >>> mask = masks.constant_fan_in_mask((3, 3, 16, 4), 0.9, seed=0)
        >>> mask.sum(axis=(0, 1, 2)).tolist()
        [15, 15, 15, 15]

    Reference:
        Lasby et al. 2024, Dynamic Sparse Training with Structured Sparsity, arXiv:2305.02299.
    """
    shape, sparsity = check_shape(shape), check_sparsity(sparsity)
    layout = _kernel_layout(kernel_layout, shape)
    axes = layout.fan_in_axes + layout.output_axes
    inputs = math.prod(shape[axis] for axis in layout.fan_in_axes)
    mask = choose(inputs, math.prod(shape) // inputs, inputs - math.floor(sparsity * inputs), seed)
    mask = mask.reshape([shape[axis] for axis in axes]).transpose(np.argsort(axes))
    return np.ascontiguousarray(mask).reshape(shape)


def nm_mask(
    shape: Any, n: int, m: int, seed: int, axis: int | Literal["input"] = "input", kernel_layout: Any = None
) -> np.ndarray:
    """A mask with exactly n nonzeros in every m consecutive entries along an axis; sparsity = 1 - n / m.

    Args:
        shape: The kernel's shape.
        n: Nonzeros of every group, 1 <= n <= m.
        m: Entries of a group. It divides the axis's length.
        seed: Non-negative int.
        axis: The axis along which the groups lie, or `"input"` for the layout's input axis (the last one, if an
            einsum's kernel has several).
        kernel_layout: A `KernelLayout`, a layout name or a layer; None for Keras's convention by rank. It only says
            where the input axis is.

    Returns:
        A uint8 array of 0 and 1.

    Raises:
        TypeError: When the seed is not an int.
        ValueError: When n, m, the axis or the seed is out of range, m does not divide the axis's length, or the kernel
            has no input axis apart from its units (depthwise kernels, vectors).

    Example:
        >>> from keras_sparse_init import masks
        >>> mask = masks.nm_mask((8, 3), 2, 4, seed=0)
        >>> mask.reshape(2, 4, 3).sum(axis=1).tolist()
        [[2, 2, 2], [2, 2, 2]]

    Reference:
        Zhou et al. 2021, Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, arXiv:2102.04010.
    """
    shape = check_shape(shape)
    _check_nm(n, m, axis)
    axis = nm_axis(shape, m, axis, kernel_layout)
    before, after = math.prod(shape[:axis]) * shape[axis] // m, math.prod(shape[axis + 1 :])
    groups = choose(m, before * after, n, seed).reshape(m, before, after)
    return np.ascontiguousarray(groups.swapaxes(0, 1)).reshape(shape)


def nm_axis(shape: tuple[int, ...], m: int, axis: int | Literal["input"], kernel_layout: Any = None) -> int:
    """The axis along which the groups of an N:M mask lie.

    Args:
        shape: The kernel's shape.
        m: Entries of a group.
        axis: An axis, or `"input"` for the layout's input axis.
        kernel_layout: A `KernelLayout`, a layout name or a layer; None for Keras's convention by rank.

    Returns:
        The axis as a non-negative int.

    Raises:
        ValueError: As in `nm_mask`.
    """
    if axis == "input":
        layout = _kernel_layout(kernel_layout, shape)
        if not layout.input_axes:
            raise ValueError(
                f"A kernel of layout {layout.name!r} has no input axis apart from its units: give `axis` as an int. "
                f"Received: axis='input' for shape={shape}"
            )
        axis = layout.input_axes[-1]
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"`axis` must be an axis of the kernel. Received: axis={axis} for shape={shape}")
    axis = int(axis) % len(shape)
    if shape[axis] % m:
        raise ValueError(
            f"`m` must divide the length of the axis. Received: m={m} for axis {axis}, of length {shape[axis]}, "
            f"of shape={shape}"
        )
    return axis


def block_mask(shape: Any, sparsity: float, block_size: int | tuple[int, ...], seed: int) -> np.ndarray:
    """A mask of whole blocks, exactly floor(sparsity * blocks) of them zero, all placements equally likely.

    Args:
        shape: The kernel's shape.
        sparsity: Fraction of zero blocks, in [0, 1).
        block_size: The block's extents along the last axes; an int b is (b, b). They divide the shape.
        seed: Non-negative int.

    Returns:
        A uint8 array of 0 and 1.

    Raises:
        TypeError: When the seed is not an int.
        ValueError: When an argument is out of range or the blocks do not divide the shape.

    Example:
        >>> from keras_sparse_init import masks
        >>> masks.block_mask((4, 4), 0.5, (2, 4), seed=0).sum(axis=1).tolist()
        [4, 4, 0, 0]

    Reference:
        Gray et al. 2017, GPU Kernels for Block-Sparse Weights (OpenAI).
    """
    shape, sparsity, block_size = check_shape(shape), check_sparsity(sparsity), _check_block_size(block_size)
    block = (1,) * (len(shape) - len(block_size)) + block_size
    if len(block) != len(shape) or any(length % extent for length, extent in zip(shape, block, strict=True)):
        raise ValueError(f"`block_size` must divide the last axes. Received: block_size={block_size} for shape={shape}")
    grid = [length // extent for length, extent in zip(shape, block, strict=True)]
    blocks = math.prod(grid)
    mask = choose(blocks, 1, blocks - math.floor(sparsity * blocks), seed).reshape(grid)
    for axis in reversed(range(len(shape))):
        if block[axis] > 1:
            mask = mask.repeat(block[axis], axis)
    return mask


def heterogeneous_mask(shape: Any, sparsity: float, seed: int, kernel_layout: Any = None) -> np.ndarray:
    """A mask whose units differ much in their number of inputs, with exactly floor(sparsity * size) zeros.

    Each weight gets a value, those of unit j = 0, 1, ... uniform between 0 and j + 1, and the largest are kept. With
    many units and inputs the first of them, a fraction r with 1 - r + r ln(r) = 1 - sparsity, have no input at all (44%
    at sparsity 0.8, 81% at 0.98), and the fan-in of the others rises to a fraction 1 - r of all inputs. A hard case for
    initializations, not a mask to train with.

    Args:
        shape: The kernel's shape.
        sparsity: Fraction of zeros of the whole kernel, in [0, 1).
        seed: Non-negative int.
        kernel_layout: A `KernelLayout`, a layout name or a layer; None for Keras's convention by rank. It says what a
            unit is, as in `constant_fan_in_mask`.

    Returns:
        A uint8 array of 0 and 1.

    Raises:
        TypeError: When the seed is not an int.
        ValueError: When the sparsity, the shape or the seed is out of range, or the layout does not fit the shape.

    Example:
        >>> from keras_sparse_init import masks
        >>> masks.heterogeneous_mask((100, 8), 0.8, seed=0).sum(axis=0).tolist()
        [0, 0, 0, 5, 25, 36, 43, 51]

    Reference:
        The masks of the signal propagation notebook of Evci et al. 2020, Gradient Flow in Sparse Neural Networks and
        How Lottery Tickets Win, arXiv:2010.03533, which keeps one weight less.
    """
    shape, sparsity = check_shape(shape), check_sparsity(sparsity)
    layout = _kernel_layout(kernel_layout, shape)
    axes = layout.fan_in_axes + layout.output_axes
    inputs, size = math.prod(shape[axis] for axis in layout.fan_in_axes), math.prod(shape)
    limits = np.arange(1.0, size // inputs + 1)
    mask = choose_largest(limits, inputs, size - math.floor(sparsity * size), seed)
    mask = mask.reshape([shape[axis] for axis in axes]).transpose(np.argsort(axes))
    return np.ascontiguousarray(mask).reshape(shape)


@dataclasses.dataclass(frozen=True)
class MaskRule:
    """What the mask rules have in common: an immutable, comparable, serializable function of shape and seed.

    Call: `rule(shape, seed, kernel_layout=None)` gives a uint8 array of 0 and 1; `kernel_layout` is a `KernelLayout`,
    a layout name or a layer, and None means Keras's convention by rank. A subclass is a frozen dataclass with a
    `__call__` and, as a field or a property, a `sparsity`.

    Example:
        >>> from keras_sparse_init import masks
        >>> rule = masks.Random(0.9)
        >>> rule, int(rule((20, 10), seed=1).sum())
        (Random(sparsity=0.9), 20)
        >>> rule.with_sparsity(0.5)
        Random(sparsity=0.5)
    """

    def __call__(self, shape: Any, seed: int, kernel_layout: Any = None) -> np.ndarray:
        """The mask of a kernel of this shape."""
        raise NotImplementedError

    def with_sparsity(self, sparsity: float) -> Self:
        """The same rule at another sparsity."""
        return dataclasses.replace(self, sparsity=sparsity)

    def get_config(self) -> dict[str, Any]:
        """The fields as a JSON-serializable dict."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The rule of a dict that `get_config` returned."""
        return cls(**config)

    def _set(self, **fields: Any) -> None:
        """Stores checked fields while the object is being made; afterwards it is frozen."""
        for key, value in fields.items():
            object.__setattr__(self, key, value)


@dataclasses.dataclass(frozen=True)
class Random(MaskRule):
    """Exactly floor(sparsity * size) zeros anywhere; see `random_mask`.

    Args:
        sparsity: Fraction of zeros, in [0, 1).

    Raises:
        ValueError: When the sparsity is not in [0, 1).

    Example:
        >>> from keras_sparse_init import masks
        >>> int(masks.Random(0.9)((784, 300), seed=0).sum())
        23520
    """

    sparsity: float

    def __post_init__(self) -> None:
        self._set(sparsity=check_sparsity(self.sparsity))

    def __call__(self, shape: Any, seed: int, kernel_layout: Any = None) -> np.ndarray:
        """The mask of a kernel of this shape."""
        return random_mask(shape, self.sparsity, seed)


@dataclasses.dataclass(frozen=True)
class ConstantFanIn(MaskRule):
    """The same number of inputs for every output unit; see `constant_fan_in_mask`.

    Args:
        sparsity: Fraction of zeros of every unit, in [0, 1).

    Raises:
        ValueError: When the sparsity is not in [0, 1).

    Example:
        >>> from keras_sparse_init import masks
        >>> masks.ConstantFanIn(0.9)((3, 3, 8, 2), seed=0, kernel_layout="conv_transpose").sum(axis=(0, 1, 3)).tolist()
        [2, 2, 2, 2, 2, 2, 2, 2]

    Reference:
        Lasby et al. 2024, Dynamic Sparse Training with Structured Sparsity, arXiv:2305.02299.
    """

    sparsity: float

    def __post_init__(self) -> None:
        self._set(sparsity=check_sparsity(self.sparsity))

    def __call__(self, shape: Any, seed: int, kernel_layout: Any = None) -> np.ndarray:
        """The mask of a kernel of this shape."""
        return constant_fan_in_mask(shape, self.sparsity, seed, kernel_layout)


@dataclasses.dataclass(frozen=True)
class NM(MaskRule):
    """n nonzeros in every m consecutive entries along an axis; see `nm_mask`. Its sparsity is 1 - n / m.

    Args:
        n: Nonzeros of every group, 1 <= n <= m.
        m: Entries of a group. It divides the axis's length.
        axis: The axis along which the groups lie, or `"input"` for the layout's input axis.

    Raises:
        ValueError: When n, m or the axis is out of range.

    Example:
        >>> from keras_sparse_init import masks
        >>> rule = masks.NM(2, 4)
        >>> rule.sparsity, rule((8, 3), seed=0).sum(axis=0).tolist(), rule.with_sparsity(0.75)
        (0.5, [4, 4, 4], NM(n=1, m=4, axis='input'))

    Reference:
        Zhou et al. 2021, Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, arXiv:2102.04010.
    """

    n: int
    m: int
    axis: int | Literal["input"] = "input"

    def __post_init__(self) -> None:
        _check_nm(self.n, self.m, self.axis)
        self._set(n=int(self.n), m=int(self.m), axis=self.axis if self.axis == "input" else int(self.axis))

    @property
    def sparsity(self) -> float:
        """1 - n / m."""
        return 1 - self.n / self.m

    def __call__(self, shape: Any, seed: int, kernel_layout: Any = None) -> np.ndarray:
        """The mask of a kernel of this shape."""
        return nm_mask(shape, self.n, self.m, seed, self.axis, kernel_layout)

    def with_sparsity(self, sparsity: float) -> Self:
        """The same m with floor(sparsity * m) zeros in every group."""
        # Rounded first, so that the sparsity 1 - n / m leads back to n whatever its last bit.
        return dataclasses.replace(self, n=self.m - math.floor(round(check_sparsity(sparsity) * self.m, 9)))


@dataclasses.dataclass(frozen=True)
class Block(MaskRule):
    """Whole blocks, floor(sparsity * blocks) of them zero; see `block_mask`.

    Args:
        sparsity: Fraction of zero blocks, in [0, 1).
        block_size: The block's extents along the last axes; an int b is (b, b).

    Raises:
        ValueError: When an argument is out of range.

    Example:
        >>> from keras_sparse_init import masks
        >>> masks.Block(0.75, 4)
        Block(sparsity=0.75, block_size=(4, 4))
    """

    sparsity: float
    block_size: int | tuple[int, ...]

    def __post_init__(self) -> None:
        self._set(sparsity=check_sparsity(self.sparsity), block_size=_check_block_size(self.block_size))

    def __call__(self, shape: Any, seed: int, kernel_layout: Any = None) -> np.ndarray:
        """The mask of a kernel of this shape."""
        return block_mask(shape, self.sparsity, self.block_size, seed)


@dataclasses.dataclass(frozen=True)
class Heterogeneous(MaskRule):
    """Units that differ much in their number of inputs, many without any; see `heterogeneous_mask`.

    Args:
        sparsity: Fraction of zeros of the whole kernel, in [0, 1).

    Raises:
        ValueError: When the sparsity is not in [0, 1).

    Example:
        >>> from keras_sparse_init import masks
        >>> mask = masks.Heterogeneous(0.8)((256, 120), seed=0)
        >>> int(mask.sum()), int((mask.sum(axis=0) == 0).sum())
        (6144, 53)
    """

    sparsity: float

    def __post_init__(self) -> None:
        self._set(sparsity=check_sparsity(self.sparsity))

    def __call__(self, shape: Any, seed: int, kernel_layout: Any = None) -> np.ndarray:
        """The mask of a kernel of this shape."""
        return heterogeneous_mask(shape, self.sparsity, seed, kernel_layout)


_RULES = {rule.__name__: rule for rule in (Random, ConstantFanIn, NM, Block, Heterogeneous)}


def draw(rule: Any, shape: tuple[int, ...], seed: int, kernel_layout: Any) -> Any:
    """The mask of a rule, or of any function of (shape, seed); it gets the layout too when it takes a third argument.

    Args:
        rule: Called as `rule(shape, seed)` or `rule(shape, seed, kernel_layout)`.
        shape: The kernel's shape.
        seed: Non-negative int.
        kernel_layout: The kernel's layout.

    Returns:
        What the rule returns.
    """
    if isinstance(rule, MaskRule):
        return rule(shape, seed, kernel_layout)
    try:
        inspect.signature(rule).bind(shape, seed, kernel_layout)
    except TypeError:
        return rule(shape, seed)
    return rule(shape, seed, kernel_layout)


def serialize(rule: MaskRule) -> dict[str, Any]:
    """The rule as a JSON-serializable dict.

    Args:
        rule: One of this module's rules.

    Returns:
        `{"class_name": ..., "config": ...}`.

    Raises:
        ValueError: When the rule is not one of this module's.

    Example:
        >>> from keras_sparse_init import masks
        >>> masks.serialize(masks.NM(2, 4))
        {'class_name': 'NM', 'config': {'n': 2, 'm': 4, 'axis': 'input'}}
    """
    if type(rule) not in _RULES.values():
        raise ValueError(f"`rule` must be an instance of one of {', '.join(_RULES)}. Received: {rule!r}")
    return {"class_name": type(rule).__name__, "config": rule.get_config()}


def deserialize(config: dict[str, Any]) -> MaskRule:
    """The rule of a dict that `serialize` returned.

    Args:
        config: `{"class_name": ..., "config": ...}`.

    Returns:
        A rule equal to the one serialized.

    Raises:
        ValueError: When the class name is unknown or a field is out of range.

    Example:
        >>> from keras_sparse_init import masks
        >>> masks.deserialize({"class_name": "Block", "config": {"sparsity": 0.9, "block_size": [4, 4]}})
        Block(sparsity=0.9, block_size=(4, 4))
    """
    name = config.get("class_name") if isinstance(config, dict) else None
    if name not in _RULES:
        raise ValueError(f"`class_name` must be one of {', '.join(_RULES)}. Received: config={config!r}")
    return _RULES[name].from_config(config["config"])


# `constant_fan_in_mask` and `nm_mask` have a parameter of the function's name.
_kernel_layout = kernel_layout


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_nm(n: Any, m: Any, axis: Any) -> None:
    if not (_is_int(n) and _is_int(m) and 1 <= n <= m):
        raise ValueError(f"`n` and `m` must be ints with 1 <= n <= m. Received: n={n!r}, m={m!r}")
    if not (_is_int(axis) or (isinstance(axis, str) and axis == "input")):
        raise ValueError(f"`axis` must be 'input' or an int. Received: axis={axis!r}")


def _check_block_size(block_size: Any) -> tuple[int, ...]:
    extents = (block_size,) * 2 if _is_int(block_size) else block_size
    if not isinstance(extents, tuple | list) or not extents or not all(_is_int(b) and b > 0 for b in extents):
        raise ValueError(f"`block_size` must be a positive int or a tuple of them. Received: block_size={block_size!r}")
    return tuple(int(extent) for extent in extents)
