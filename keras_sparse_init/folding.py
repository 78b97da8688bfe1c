"""Whole models: taking weight normalization off, with the same outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras_sparse_init import compat, traversal
from keras_sparse_init.layers import WeightNorm
from keras_sparse_init.layers.weight_norm import put_folded_values
from keras_sparse_init.matching import unaware


def fold_weight_norm(model: Any) -> Any:
    """The plain model of one with `WeightNorm` layers: the same outputs, w = g v / ||v|| in the place of v.

    Args:
        model: A built model. Sequential and functional models are left alone and a new one is returned; a
            subclassed model is changed in place.

    Returns:
        The plain model, not compiled. It saves and loads without this package: initializers of this package, wherever
        they are in the model, become Keras's `VarianceScaling` of the same scale, mode and distribution.

    Raises:
        ValueError: When a `WeightNorm` layer is inside a wrapper that holds its masks; `strip` comes first.
        TypeError: When `model` is no Keras model or layer.

    Example:
        >>> import keras
        >>> from keras_sparse_init import WeightNorm, fold_weight_norm
        >>> dense = keras.layers.Dense(4, name="out")
        >>> model = keras.Sequential([keras.layers.Input((8,)), WeightNorm(dense)])
        >>> [weight.name for weight in fold_weight_norm(model).layers[0].weights]
        ['kernel', 'bias']
    """
    compat.library_of(model)
    for _, _, layer in traversal.walk(model):
        inside = layer._flatten_layers(include_self=False) if traversal.is_mask_wrapper(layer) else ()
        if any(isinstance(part, WeightNorm) for part in inside):
            raise ValueError(
                f"The masks of {layer.name!r} are those of v. Take them off first: `fold_weight_norm(strip(model))`"
            )
    folded = []

    def fold(layer: Any, copy: Callable[[Any], Any]) -> Any:
        if not isinstance(layer, WeightNorm):
            return None
        values = layer.folded_values() if layer.built else None
        folded.append((copy(layer.layer), values))
        return folded[-1][0]

    plain = traversal.rebuild(model, fold)
    for layer, values in folded:
        if values is not None:
            put_folded_values(layer, values)
    traversal.replace_initializers(plain, unaware)
    return plain
