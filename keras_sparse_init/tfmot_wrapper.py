"""Reading tfmot's `PruneLowMagnitude` layers, without importing tfmot: whoever has such a layer has imported it."""

from __future__ import annotations

from typing import Any

from keras_sparse_init import compat


def is_wrapper(layer: Any) -> bool:
    """Whether a layer is tfmot's `PruneLowMagnitude` or a subclass of it."""
    return any(
        c.__name__ == "PruneLowMagnitude" and c.__module__.startswith("tensorflow_model_optimization")
        for c in type(layer).__mro__
    )


def is_static(layer: Any) -> bool:
    """Whether a layer is a `StaticPruneLowMagnitude`."""
    return any(c.__name__ == "StaticPruneLowMagnitude" for c in type(layer).__mro__)


def kernels_and_masks(wrapper: Any) -> list[tuple[Any, Any]]:
    """The prunable weights of a wrapper, each with its mask.

    Raises:
        ValueError: When the wrapper is not built: it has no masks yet.
    """
    compat.require_built(wrapper)
    # `layer.weights[2]` would be the threshold, not the mask, in a layer without a bias.
    return [(kernel, mask) for kernel, mask, _ in wrapper.pruning_vars]


def wrap_like(wrapper: Any, layer: Any) -> Any:
    """Another wrapper of the same kind and settings around another layer, whose weights and masks are its own."""
    if is_static(wrapper):
        new = type(wrapper)(layer)
    else:
        new = type(wrapper)(
            layer,
            pruning_schedule=wrapper.pruning_schedule,
            block_size=wrapper.block_size,
            block_pooling_type=wrapper.block_pooling_type,
            sparsity_m_by_n=wrapper.sparsity_m_by_n,
        )
    if layer.built:
        new.build(None)
    return new
