"""Kernel layouts and fans: how many connections each weight's units really have.

A layout says which axes of a kernel index input units, output units, or neither (the receptive field), and into
how many blocks the last axis falls (convolution groups, recurrent gates). From a mask and a layout follow the
fan-in and fan-out of every weight. Everything here is NumPy; no Keras is imported.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np

from keras_sparse_init.blocks import map_blocks, row_blocks

LAYOUT_NAMES = ("dense", "conv", "conv_transpose", "depthwise", "simple_rnn", "gru", "lstm", "embedding")

_GATES = {"simple_rnn": 1, "gru": 3, "lstm": 4}

# The Keras classes that fix a kernel's layout, looked up along a layer's class hierarchy so that a user's subclass is
# recognised; the first match wins. A layer of any other class follows Keras's convention for its rank.
_LAYOUT_OF_CLASS = {
    "Dense": "dense",
    "DepthwiseConv1D": "depthwise",
    "DepthwiseConv2D": "depthwise",
    "BaseDepthwiseConv": "depthwise",
    "DepthwiseConv": "depthwise",
    "SeparableConv1D": "separable",
    "SeparableConv2D": "separable",
    "BaseSeparableConv": "separable",
    "SeparableConv": "separable",
    "Conv1DTranspose": "conv_transpose",
    "Conv2DTranspose": "conv_transpose",
    "Conv3DTranspose": "conv_transpose",
    "BaseConvTranspose": "conv_transpose",
    "ConvLSTMCell": "lstm",
    "ConvLSTM": "lstm",
    "BaseConv": "conv",
    "Conv": "conv",
    "LSTMCell": "lstm",
    "LSTM": "lstm",
    "GRUCell": "gru",
    "GRU": "gru",
    "SimpleRNNCell": "simple_rnn",
    "SimpleRNN": "simple_rnn",
    "Embedding": "embedding",
    "EinsumDense": "einsum",
    "LocallyConnected1D": "locally_connected",
    "LocallyConnected2D": "locally_connected",
}


@dataclasses.dataclass(frozen=True)
class KernelLayout:
    """Which axes of a kernel are summed over to count a unit's connections.

    Attributes:
        name: What the layout is called in messages and configs.
        rank: The number of axes of the kernel.
        fan_in_axes: Axes over which the mask is summed to count the inputs of a weight's output unit: all but
            those that index output units.
        fan_out_axes: Axes over which the mask is summed to count the outputs of a weight's input unit.
        input_axes: Axes that index input units alone (not the receptive field): "the input axis" of N:M masks.
        blocks: Into how many equal blocks the last axis falls that share no output: the groups of a
            grouped convolution, the gates of a recurrent kernel. The fan-out is counted within a block.
        one_hot: True for embeddings: one input is active at a time, so that the fan-in is 1.

    Example:
        >>> from keras_sparse_init.fans import kernel_layout
        >>> kernel_layout("conv", (3, 3, 16, 32)).fan_in_axes
        (0, 1, 2)
    """

    name: str
    rank: int
    fan_in_axes: tuple[int, ...]
    fan_out_axes: tuple[int, ...]
    input_axes: tuple[int, ...] = ()
    blocks: int = 1
    one_hot: bool = False

    @property
    def output_axes(self) -> tuple[int, ...]:
        """The axes that index output units: those not summed over for the fan-in."""
        return tuple(axis for axis in range(self.rank) if axis not in self.fan_in_axes)

    def get_config(self) -> dict[str, Any]:
        """The fields as a JSON-serializable dict."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> KernelLayout:
        """The layout of a dict that `get_config` returned."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in config.items()})


def check_shape(shape: Any) -> tuple[int, ...]:
    """A kernel's shape as a tuple of positive integers.

    Args:
        shape: Anything that lists dimensions (tuple, list, `tf.TensorShape`), or an int for rank 1.

    Returns:
        The dimensions as Python ints.

    Raises:
        ValueError: When a dimension is unknown, zero or negative: such a kernel has no fan.
    """
    try:
        dims = [shape] if isinstance(shape, int | np.integer) else list(shape)
    except (TypeError, ValueError):  # Not iterable; a `tf.TensorShape` of unknown rank.
        raise ValueError(f"`shape` must be a sequence of positive ints. Received: shape={shape}") from None
    if not all(isinstance(d, int | np.integer) and not isinstance(d, bool) and d > 0 for d in dims):
        raise ValueError(f"`shape` must have positive integer dimensions. Received: shape={tuple(dims)}")
    return tuple(int(d) for d in dims)


def kernel_layout(layer_or_name: Any, shape: Any, *, weight_name: str | None = None, groups: int = 1) -> KernelLayout:
    """The layout of a kernel, from the layer that owns it or from a name.

    Args:
        layer_or_name: A layer of either Keras (built or not), a layout name (`"dense"`, `"conv"`,
            `"conv_transpose"`, `"depthwise"`, `"simple_rnn"`, `"gru"`, `"lstm"`, `"embedding"`), an einsum equation
            such as `"abc,cd->abd"`, a `KernelLayout` (returned as it is), or None for Keras's convention: (in, out) at
            rank 2, (receptive field..., in, out) above.
        shape: The kernel's shape.
        weight_name: The kernel's name in its layer. Needed only for a separable convolution whose two
            kernels have the same shape, and for layers with weights that are not kernels.
        groups: The groups of a convolution given by name; a layer knows its own.

    Returns:
        A `KernelLayout` for kernels of this rank.

    Raises:
        ValueError: When the name is unknown, the shape has not the layout's rank, or the blocks do not divide
            the last axis.

    Example:
        >>> from keras_sparse_init.fans import fans, kernel_layout
        >>> import numpy as np
        >>> fan_in, fan_out = fans(np.ones((3, 3, 256, 1)), kernel_layout("depthwise", (3, 3, 256, 1)))
        >>> int(fan_in.max()), int(fan_out.max())
        (9, 9)
    """
    shape = check_shape(shape)
    rank = len(shape)
    if isinstance(layer_or_name, KernelLayout):
        if layer_or_name.rank != rank:
            raise ValueError(
                f"`kernel_layout` must be a layout for kernels of rank {rank}. "
                f"Received: {layer_or_name} for shape={shape}"
            )
        return layer_or_name
    if layer_or_name is None:
        return _by_rank(shape, groups)
    if isinstance(layer_or_name, str):
        return _by_name(layer_or_name, shape, groups)
    return _of_layer(layer_or_name, shape, weight_name)


def fans(mask: Any, layout: KernelLayout | str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Fan-in and fan-out of every weight of a masked kernel.

    fan_in_j = nonzeros into output unit j, fan_out_i = nonzeros out of input unit i, both summed over the
    receptive field and counted within their group or gate. Embeddings have fan-in 1.

    Args:
        mask: Array of the kernel's shape; a weight counts where the mask is not 0.
        layout: A `KernelLayout`, a layout name, or None for Keras's convention.

    Returns:
        Two float64 arrays that broadcast to the kernel's shape. A unit without connections has fan 0.

    Raises:
        ValueError: When the layout does not fit the mask's shape.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.fans import fans
        >>> fan_in, fan_out = fans(np.array([[1, 0], [1, 1], [0, 0]]))
        >>> fan_in.tolist(), fan_out.tolist()
        ([[2.0, 1.0]], [[1.0], [2.0], [0.0]])

    Reference:
        Evci et al. 2020, Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win, arXiv:2010.03533,
        section 3.1.
    """
    return fan_in(mask, layout), fan_out(mask, layout)


def fan_in(mask: Any, layout: KernelLayout | str | None = None) -> np.ndarray:
    """The first of the two arrays of `fans`, without the cost of the second."""
    active = as_mask(mask)
    layout = kernel_layout(layout, active.shape)
    if layout.one_hot:
        return np.ones((1,) * layout.rank)
    return _count(active, layout.fan_in_axes)


def fan_out(mask: Any, layout: KernelLayout | str | None = None) -> np.ndarray:
    """The second of the two arrays of `fans`, without the cost of the first."""
    active = as_mask(mask)
    layout = kernel_layout(layout, active.shape)
    if layout.blocks == 1:
        return _count(active, layout.fan_out_axes)
    width = active.shape[-1] // layout.blocks
    # The blocks become an axis of their own, which is not summed over; the last axis (within a block) is.
    blocked = active.reshape(*active.shape[:-1], layout.blocks, width)
    axes = tuple(layout.rank if axis == layout.rank - 1 else axis for axis in layout.fan_out_axes)
    return np.repeat(_count(blocked, axes)[..., 0], width, axis=-1)


def dense_fans(shape: Any, layout: KernelLayout | str | None = None) -> tuple[float, float]:
    """Fan-in and fan-out of a kernel without a mask.

    Args:
        shape: The kernel's shape.
        layout: A `KernelLayout`, a layout name, or None for Keras's convention.

    Returns:
        The two fans, which are the same for every weight of a dense kernel.

    Raises:
        ValueError: When the layout does not fit the shape.

    Example:
        >>> from keras_sparse_init.fans import dense_fans
        >>> dense_fans((5, 5, 6, 16)), dense_fans((3, 3, 16, 6), "conv_transpose")
        ((150.0, 400.0), (54.0, 144.0))
    """
    shape = check_shape(shape)
    layout = kernel_layout(layout, shape)
    fan_in = 1 if layout.one_hot else math.prod(shape[axis] for axis in layout.fan_in_axes)
    return float(fan_in), math.prod(shape[axis] for axis in layout.fan_out_axes) / layout.blocks


def as_mask(mask: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A mask as a boolean array.

    Args:
        mask: Array-like of numbers that are all 0 or 1, or of booleans.
        shape: The kernel's shape that the mask must have, when given.

    Returns:
        A boolean array; a view of the argument where its dtype allows it.

    Raises:
        ValueError: When an entry is neither 0 nor 1 (NaN included), or the shape differs.
        TypeError: When the entries are not numbers.

    Example:
        >>> from keras_sparse_init.fans import as_mask
        >>> as_mask([[0.0, 1.0]]).tolist()
        [[False, True]]
    """
    mask = np.asarray(mask)
    if shape is not None and mask.shape != shape:
        raise ValueError(f"`mask` must have the kernel's shape {shape}. Received: a mask of shape {mask.shape}")
    if mask.dtype == np.bool_:
        return mask
    if mask.dtype == np.uint8:
        if mask.size and mask.max() > 1:
            raise ValueError(f"`mask` must consist of 0 and 1. Received: {int(mask.max())} among its entries")
        return mask.view(np.bool_)
    if mask.dtype.kind in "OUSMm":
        raise TypeError(f"`mask` must be an array of numbers. Received: dtype={mask.dtype}")
    active = np.empty(mask.shape, np.bool_)
    flat, flat_active = mask.reshape(-1), active.reshape(-1)

    def convert(part: slice) -> bool:
        np.not_equal(flat[part], 0, out=flat_active[part])
        return np.array_equal(flat[part] == 1, flat_active[part])

    if not all(map_blocks(convert, row_blocks(mask.size, 1))):
        wrong = flat[(flat != 0) & (flat != 1)][0]
        raise ValueError(f"`mask` must consist of 0 and 1. Received: {wrong} among its entries")
    return active


def _count(active: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Number of True entries over some axes, which are kept with length 1, as float64."""
    if axes != tuple(range(len(axes))) or active.ndim < 2 or not active.flags.c_contiguous:
        return active.sum(axis=axes, keepdims=True, dtype=np.float64)
    # Over leading axes, bytes add up without overflow in runs of 255 rows: 10 times faster than a sum of booleans.
    rest = active.shape[len(axes) :]
    rows = active.view(np.uint8).reshape(-1, int(np.prod(rest)))
    whole = rows.shape[0] // 255 * 255
    runs = np.add.reduce(rows[:whole].reshape(-1, 255, rows.shape[1]), axis=1, dtype=np.uint8)
    counts = runs.sum(axis=0, dtype=np.float64) + np.add.reduce(rows[whole:], axis=0, dtype=np.uint8)
    return counts.reshape((1,) * len(axes) + rest)


def _layout(name: str, rank: int, inputs: tuple[int, ...], outputs: tuple[int, ...], **kwargs: Any) -> KernelLayout:
    """A layout from its input and output axes (negative ones allowed); an axis in both is a unit's own channel."""
    inputs = tuple(axis % rank for axis in inputs)
    outputs = tuple(axis % rank for axis in outputs)
    return KernelLayout(
        name,
        rank,
        fan_in_axes=tuple(axis for axis in range(rank) if axis not in outputs),
        fan_out_axes=tuple(axis for axis in range(rank) if axis not in inputs),
        input_axes=tuple(axis for axis in inputs if axis not in outputs),
        **kwargs,
    )


def _by_rank(shape: tuple[int, ...], groups: int = 1) -> KernelLayout:
    rank = len(shape)
    if rank < 2:
        # Keras: a vector's fans are both its length, a scalar's 1: every entry meets every other.
        return KernelLayout("vector", rank, tuple(range(rank)), tuple(range(rank)))
    return _by_name("dense" if rank == 2 else "conv", shape, groups)


def _by_name(name: str, shape: tuple[int, ...], groups: int = 1) -> KernelLayout:
    rank = len(shape)
    if "->" in name:
        return _einsum(name, rank)
    if name not in LAYOUT_NAMES:
        raise ValueError(
            f"`kernel_layout` must be one of {', '.join(map(repr, LAYOUT_NAMES))}, an einsum equation, a layer or "
            f"a KernelLayout. Received: kernel_layout={name!r}"
        )
    least_rank = 3 if name in ("conv", "conv_transpose", "depthwise") else 2
    if rank < least_rank or (name in ("dense", "embedding") and rank > 2):
        raise ValueError(f"`shape` does not fit the kernel layout {name!r}. Received: shape={shape}")
    if name == "conv_transpose":
        return _layout(name, rank, inputs=(-1,), outputs=(-2,))
    if name == "depthwise":
        return _layout(name, rank, inputs=(-2,), outputs=(-2, -1))
    blocks = _GATES.get(name, groups if name == "conv" else 1)
    if not isinstance(blocks, int) or blocks < 1 or shape[-1] % blocks:
        raise ValueError(
            f"The last axis of a {name!r} kernel must be divisible by its {blocks} groups or gates. "
            f"Received: shape={shape}"
        )
    return _layout(name, rank, inputs=(-2,), outputs=(-1,), blocks=blocks, one_hot=name == "embedding")


def _einsum(equation: str, rank: int) -> KernelLayout:
    """The kernel shares input axes with the inputs of `inputs,kernel->outputs`, and output axes with the outputs."""
    match = re.fullmatch(r"([\w.]+),(\w+)->([\w.]+)", equation.replace(" ", ""))
    if not match or len(match[2]) != rank:
        raise ValueError(
            f"An einsum equation must have the form 'inputs,kernel->outputs' with a kernel of rank {rank}. "
            f"Received: kernel_layout={equation!r}"
        )
    inputs, kernel, outputs = match.groups()
    return _layout(
        equation,
        rank,
        inputs=tuple(i for i, axis in enumerate(kernel) if axis in inputs),
        outputs=tuple(i for i, axis in enumerate(kernel) if axis in outputs),
    )


def _of_layer(layer: Any, shape: tuple[int, ...], weight_name: str | None) -> KernelLayout:
    rank = len(shape)
    if not hasattr(type(layer), "call"):
        raise ValueError(
            "`layer_or_name` must be a Keras layer, a layout name, a KernelLayout or None. "
            f"Received: {layer!r} of type {type(layer).__name__}"
        )
    classes = [c.__name__ for c in type(layer).__mro__ if c.__module__.split(".")[0] in ("keras", "tf_keras")]
    name = next((_LAYOUT_OF_CLASS[c] for c in classes if c in _LAYOUT_OF_CLASS), None)
    if name is None or rank < 2:
        return _by_rank(shape)
    if name == "einsum":
        return _einsum(layer.equation, rank)
    if name == "separable":
        return _by_name(_separable_part(layer, shape, weight_name), shape)
    if name == "locally_connected":
        if layer.implementation != 1:
            raise ValueError(
                f"The kernel layout of locally connected layers is known for implementation=1 only. "
                f"Received: layer {layer.name!r} with implementation={layer.implementation}"
            )
        # (positions, inputs of the window, filters): every position has units of its own.
        return _layout("locally_connected", rank, inputs=(0, 1), outputs=(0, 2))
    if name == "conv" or (name == "lstm" and rank > 2):
        return _by_name("conv", shape, groups=_GATES["lstm"] if name == "lstm" else getattr(layer, "groups", 1))
    return _by_name(name, shape)


def _separable_part(layer: Any, shape: tuple[int, ...], weight_name: str | None) -> str:
    if weight_name is not None:
        return "depthwise" if "depthwise" in weight_name else "conv"
    kernel_size = tuple(layer.kernel_size)
    if shape[:-2] != kernel_size:
        return "conv"
    if math.prod(kernel_size) > 1:
        return "depthwise"
    raise ValueError(
        f"The kernels of the separable convolution {layer.name!r} cannot be told apart by shape={shape}: "
        "give `weight_name`, 'depthwise_kernel' or 'pointwise_kernel'"
    )
