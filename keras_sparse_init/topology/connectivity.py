"""What a mask connects: which output units are reached from live inputs, which inputs the needed outputs use.

Units are numbered as in the layer's inputs and outputs: channels of images, over all groups of a convolution. Pure
NumPy; how the layers of a model follow each other is read in `topology`.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from keras_sparse_init import fans
from keras_sparse_init.fans import KernelLayout


def known(layout: KernelLayout) -> bool:
    """Whether the units of a layout are understood here; those of gates and of einsum equations are not."""
    return layout.name in ("dense", "conv", "conv_transpose", "depthwise", "embedding") and layout.rank >= 2


def inputs_on_kernel(inputs: np.ndarray, shape: tuple[int, ...], layout: KernelLayout) -> np.ndarray:
    """A value for each input unit, as an array that broadcasts to the kernel.

    Args:
        inputs: Of shape (input units,).
        shape: The kernel's shape.
        layout: Its layout.

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.topology.connectivity import inputs_on_kernel
        >>> from keras_sparse_init.fans import kernel_layout
        >>> inputs_on_kernel(np.array([True, False]), (2, 3), kernel_layout("dense", (2, 3))).tolist()
        [[True], [False]]
    """
    axis = _input_axis(layout)
    if layout.blocks > 1:
        # The inputs of a weight of a grouped convolution depend on the group of its output.
        blocked = inputs.reshape(layout.blocks, shape[axis]).T
        return np.repeat(blocked, shape[-1] // layout.blocks, axis=1).reshape((1,) * (layout.rank - 2) + shape[axis:])
    return inputs.reshape([-1 if i == axis else 1 for i in range(layout.rank)])


def outputs_on_kernel(outputs: np.ndarray, shape: tuple[int, ...], layout: KernelLayout) -> np.ndarray:
    """A value for each output unit, of shape (output units,), as an array that broadcasts to the kernel."""
    return outputs.reshape([shape[i] if i in layout.output_axes else 1 for i in range(layout.rank)])


def reached_outputs(mask: np.ndarray, layout: KernelLayout, inputs: np.ndarray) -> np.ndarray:
    """Which output units have a connection from an input unit of which `inputs`, of shape (input units,), is True."""
    return (mask & inputs_on_kernel(inputs, mask.shape, layout)).any(axis=layout.fan_in_axes).reshape(-1)


def used_inputs(mask: np.ndarray, layout: KernelLayout, outputs: np.ndarray) -> np.ndarray:
    """Which input units have a connection to an output unit of which `outputs`, of shape (output units,), is True."""
    used = mask & outputs_on_kernel(outputs, mask.shape, layout)
    axis = _input_axis(layout)
    if layout.blocks == 1:
        return used.any(axis=tuple(i for i in range(layout.rank) if i != axis))
    used = used.any(axis=tuple(range(layout.rank - 2)))
    return used.reshape(len(used), layout.blocks, -1).any(axis=2).T.reshape(-1)


def number_of_inputs(shape: tuple[int, ...], layout: KernelLayout) -> int:
    """How many input units a kernel has."""
    return shape[_input_axis(layout)] * layout.blocks


def _input_axis(layout: KernelLayout) -> int:
    return layout.rank - 1 if layout.name == "conv_transpose" else layout.rank - 2


@dataclasses.dataclass(frozen=True)
class KernelTopology:
    """The mask of one kernel in numbers; counts of units are None where they cannot be read.

    Attributes:
        name: The kernel's path in the model.
        shape: The kernel's shape.
        nonzeros: Number of weights whose mask is 1.
        sparsity: Fraction of weights whose mask is 0.
        fan_in: Minimum, first quartile, median, third quartile and maximum over units of the number of inputs.
        units: Number of output units (of a recurrent kernel: units of all gates).
        without_input: Output units without any input.
        inputs: Number of input units.
        without_output: Input units without any output.
        off_input: Output units that no path connects to an input of the model; those without input are among them.
        off_output: Output units that no path connects to an output of the model.
        effective_nonzeros: Weights that lie on a path from an input to an output of the model.
        effective_sparsity: Fraction of weights that do not.
    """

    name: str
    shape: tuple[int, ...]
    nonzeros: int
    sparsity: float
    fan_in: tuple[float, float, float, float, float]
    units: int
    without_input: int
    inputs: int
    without_output: int
    off_input: int | None = None
    off_output: int | None = None
    effective_nonzeros: int | None = None
    effective_sparsity: float | None = None

    @classmethod
    def of(
        cls,
        name: str,
        mask: np.ndarray,
        layout: KernelLayout,
        reached: np.ndarray | None = None,
        needed: np.ndarray | None = None,
        effective: int | None = None,
    ) -> KernelTopology:
        """The numbers of a boolean mask.

        Args:
            name: The kernel's name.
            mask: Its mask.
            layout: Its layout.
            reached: Of shape (output units,), whether a path from the model's input ends there. None: unknown.
            needed: The same for paths to the model's output.
            effective: The number of weights on a path from input to output.
        """
        # Of an embedding, whose fan-in is 1 whatever the mask, the tokens that have a weight in each dimension.
        fan_in = fans.fan_in(mask, dataclasses.replace(layout, one_hot=False))
        used = _with_output(mask, layout)
        nonzeros = int(np.count_nonzero(mask))
        return cls(
            name=name,
            shape=tuple(mask.shape),
            nonzeros=nonzeros,
            sparsity=1.0 - nonzeros / mask.size,
            fan_in=tuple(float(q) for q in np.quantile(fan_in, [0, 0.25, 0.5, 0.75, 1])),
            units=fan_in.size,
            without_input=int(np.count_nonzero(fan_in == 0)),
            inputs=used.size,
            without_output=int(np.count_nonzero(~used)),
            off_input=None if reached is None else int(np.count_nonzero(~reached)),
            off_output=None if needed is None else int(np.count_nonzero(~needed)),
            effective_nonzeros=effective,
            effective_sparsity=None if effective is None else 1.0 - effective / mask.size,
        )


def _with_output(mask: np.ndarray, layout: KernelLayout) -> np.ndarray:
    if known(layout):
        # The units of the outputs, by shape: what indexes them is all but what is summed over.
        outputs = np.ones([mask.shape[axis] for axis in layout.output_axes], bool)
        return used_inputs(mask, layout, outputs)
    return mask.any(axis=tuple(axis for axis in range(mask.ndim) if axis not in layout.input_axes))
