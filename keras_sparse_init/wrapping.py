"""Wrapping the layers of a model that have kernels, so that these can be masked, and taking the wrappers off."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

from keras_sparse_init import compat, tfmot, tfmot_wrapper, traversal
from keras_sparse_init.arguments import check_choice
from keras_sparse_init.layers import Masked
from keras_sparse_init.masked_kernel import masked_kernels

Wrapper = Literal["tfmot", "masked"]


def check_wrapper(model: Any, wrapper: Wrapper | None) -> Wrapper:
    """The wrapper itself, or the one that suits the model's Keras when it is None.

    Raises:
        ValueError: When the wrapper is unknown or the model is not built.
        TypeError: When `model` is no Keras model, or of Keras 3 with the wrapper of tfmot, which takes tf_keras only.
    """
    of_tf_keras = compat.library_of(model) is compat.tf_keras
    if wrapper is None:
        wrapper = "tfmot" if of_tf_keras else "masked"
    check_choice("wrapper", wrapper, ("tfmot", "masked"))
    if wrapper == "tfmot" and not of_tf_keras:
        raise TypeError(
            "`wrapper='tfmot'` needs a tf_keras model; a Keras 3 model takes 'masked'. "
            f"Received: {type(model).__name__} of Keras 3"
        )
    if not model.built:
        raise ValueError(f"`model` must be built. Received: the model {model.name!r}, which has no weights yet")
    return wrapper


def wrap_kernels(
    model: Any,
    wrapper: Wrapper | None = None,
    skip: Iterable[str] | Callable[[Any], bool] | None = None,
    schedule: Any = None,
) -> Any:
    """A model whose kernels have masks: all weights as they were, the masks those of the kernels' zeros.

    Args:
        model: A built model of either Keras: Sequential or functional (a new model is returned), or subclassed (changed
            in place and returned).
        wrapper: "masked" wraps layers in `Masked`; "tfmot" in `PruneLowMagnitude`. None: what suits the model's Keras.
        skip: Names of layers that stay dense with all inside them, or a function of the layer that is True for them.
        schedule: A `PolynomialDecay` or `ConstantSparsity` by which tfmot prunes its wrappers. None: their masks are
            static. `Masked` layers take none: what prunes them is a callback.

    Returns:
        The model with wrappers, not compiled.

    Raises:
        ValueError: When the wrapper is not allowed, a name to skip is unknown, or no layer has a kernel to mask.
        TypeError: When `model` is no Keras model, or of Keras 3 with the wrapper of tfmot.

    Warns:
        UserWarning: When layers with kernels stay dense because tfmot cannot wrap them and `skip` does not name them.

    Example:
        >>> import tf_keras
        >>> from keras_sparse_init.wrapping import wrap_kernels
        >>> dense = tf_keras.Sequential([tf_keras.layers.Input((8,)), tf_keras.layers.Dense(4)])
        >>> type(wrap_kernels(dense).layers[0]).__name__
        'StaticPruneLowMagnitude'
    """
    wrapper = check_wrapper(model, wrapper)
    skipped = _skipped_layers(model, skip)
    left_dense: list[str] = []

    def wrap_in_tfmot(layer: Any, copy: Callable[[Any], Any]) -> Any:
        if tfmot.can_wrap(layer):
            return tfmot.static_wrapper(copy(layer)) if schedule is None else tfmot.pruned_by(copy(layer), schedule)
        if any(len(weight.shape) > 1 for weight in traversal.own_variables(layer)):
            left_dense.append(layer.name)
        return None

    def wrap_in_masked(layer: Any, copy: Callable[[Any], Any]) -> Any:
        inside = [below for _, _, below in traversal.walk(layer)]
        if any(id(below) in skipped or traversal.is_mask_wrapper(below) for below in inside):
            return None
        return Masked(copy(layer)) if traversal.kernels_of(layer) else None

    def wrap(layer: Any, copy: Callable[[Any], Any]) -> Any:
        if id(layer) in skipped or traversal.is_mask_wrapper(layer):
            return copy(layer)
        wrapped = (wrap_in_tfmot if wrapper == "tfmot" else wrap_in_masked)(layer, copy)
        if wrapped is not None and wrapped.layer.built:
            wrapped.build(None)
        return wrapped

    wrapped = traversal.rebuild(model, wrap)
    if not masked_kernels(wrapped):
        raise ValueError(f"`model` must have a layer with a kernel to mask. Received: the model {model.name!r}")
    if left_dense:
        warnings.warn(
            f"tfmot cannot wrap these layers, which stay dense: {', '.join(left_dense)}. "
            "Name them in `skip` if that is meant. `Masked` layers mask them: `wrapper='masked'` in `sparsify`, "
            "a Keras 3 model in a training job.",
            stacklevel=3,
        )
    return wrapped


def unwrap_kernels(model: Any) -> Any:
    """The model without wrappers and masks, its weights as they are; a subclassed model is changed in place."""
    return traversal.rebuild(model, _unwrap)


def _unwrap(layer: Any, copy: Callable[[Any], Any]) -> Any:
    if not traversal.is_mask_wrapper(layer):
        return None
    plain = copy(layer.layer)
    if tfmot_wrapper.is_wrapper(layer):
        tfmot.release(plain)
    return plain


def _skipped_layers(model: Any, skip: Any) -> set[int]:
    """The ids of the layers to skip and of all layers inside them."""
    if skip is None:
        return set()
    below = [layer for _, _, layer in traversal.walk(model)]
    if not callable(skip):
        names = {skip} if isinstance(skip, str) else set(skip)
        unknown = sorted(names - {layer.name for layer in below})
        if unknown:
            raise ValueError(f"`skip` names unknown layers {unknown}")
    chosen = [layer for layer in below if (skip(layer) if callable(skip) else layer.name in names)]
    return {id(inner) for layer in chosen for inner in layer._flatten_layers()}
