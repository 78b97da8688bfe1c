"""Finding the masked kernels of a model: what everything that works on whole models goes through."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from keras_sparse_init import compat, fans, tfmot_wrapper, traversal


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedKernel:
    """A kernel of a model with its mask.

    Attributes:
        name: Path in the model: names of the layers down to the one that owns the kernel, and the kernel's own.
        layer: The layer that owns the kernel (the cell of an RNN layer, a projection of an attention layer).
        kernel: The kernel's variable.
        mask: The mask's variable, 0 and 1 in the kernel's shape and dtype.
        layout: The kernel's `KernelLayout`, from the layer.
        initializer: The layer's initializer of this kernel, or None when it has none.
        seed_name: What seeds are derived from: `name`, with the numbers that Keras gave by itself counted anew.
    """

    name: str
    layer: Any
    kernel: Any
    mask: Any
    layout: fans.KernelLayout
    initializer: Any
    seed_name: str

    def __repr__(self) -> str:
        return f"MaskedKernel({self.name!r}, shape={self.shape}, layout={self.layout.name!r})"

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return tuple(self.kernel.shape)

    def mask_value(self) -> np.ndarray:
        """The mask as a boolean array.

        Raises:
            ValueError: When an entry is neither 0 nor 1.
        """
        try:
            return fans.as_mask(compat.to_numpy("mask", self.mask))
        except ValueError as error:
            raise ValueError(f"The mask of {self.name!r} is not a mask: {error}") from None


def masked_kernels(model: Any) -> list[MaskedKernel]:
    """Every masked kernel of a model, in model order.

    Found are the kernels of `Masked` layers and the prunable weights of tfmot's `PruneLowMagnitude` wrappers, wherever
    they are: in nested and subclassed models, inside other layers, several in a layer. A shared layer is listed once.

    Args:
        model: A built model or layer.

    Returns:
        A list of `MaskedKernel`, empty when nothing is masked.

    Raises:
        ValueError: When a wrapper is not built and so has no mask.
        TypeError: When `model` is no Keras model or layer.

    Example:
        >>> import tf_keras
        >>> from keras_sparse_init import masked_kernels, sparsify
        >>> dense = tf_keras.Sequential([tf_keras.layers.Input((8,)), tf_keras.layers.Dense(4, name="out")])
        >>> [kernel.name for kernel in masked_kernels(sparsify(dense, 0.5, seed=0))]
        ['out/kernel']
    """
    compat.library_of(model)
    found = []
    for path, canonical, wrapper in traversal.walk(model):
        if not traversal.is_mask_wrapper(wrapper):
            continue
        pairs = (
            tfmot_wrapper.kernels_and_masks(wrapper)
            if tfmot_wrapper.is_wrapper(wrapper)
            else wrapper.kernels_and_masks()
        )
        for kernel, mask in pairs:
            below, canonical_below, owner, attribute = traversal.owner_of(wrapper.layer, kernel)
            found.append(
                MaskedKernel(
                    name=traversal.unused("/".join((*path, *below, attribute)), {other.name for other in found}),
                    layer=owner,
                    kernel=kernel,
                    mask=mask,
                    layout=fans.kernel_layout(owner, tuple(kernel.shape), weight_name=attribute),
                    initializer=traversal.initializer_of(owner, attribute),
                    seed_name=traversal.unused(
                        "/".join((*canonical, *canonical_below, attribute)), {other.seed_name for other in found}
                    ),
                )
            )
    return found


def trainable_kernels(model: Any, kernels: list[MaskedKernel] | None = None) -> list[MaskedKernel]:
    """Those masked kernels of a model that are trained: the masks of frozen layers stay as they are with them.

    Args:
        model: A built model with masked kernels.
        kernels: Its masked kernels, where they are known already.

    Raises:
        ValueError: When there are none.
    """
    trained = {id(variable) for variable in model.trainable_variables}
    found = [kernel for kernel in kernels or masked_kernels(model) if id(kernel.kernel) in trained]
    if not found:
        raise ValueError(
            f"`model` must have masked kernels that are trainable. Received: the model {model.name!r} without any; "
            "wrap its layers in `Masked`, or see `sparsify`"
        )
    return found
