"""Whole models: finding their masked kernels, setting masks, re-initializing, making models sparse and plain again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import numpy as np

from keras_sparse_init import compat, fans, masks, traversal
from keras_sparse_init.arguments import check_choice, check_seed, check_sparsity
from keras_sparse_init.blocks import map_blocks
from keras_sparse_init.masked_kernel import MaskedKernel, masked_kernels
from keras_sparse_init.matching import mask_aware, unaware
from keras_sparse_init.orthogonal_initializers import ExactOrthogonalInit
from keras_sparse_init.sampling import derive_seed
from keras_sparse_init.slots import slots_of
from keras_sparse_init.table import SparsityRow, SparsityTable
from keras_sparse_init.topology.paths import live_ends
from keras_sparse_init.wrapping import Wrapper, check_wrapper, unwrap_kernels, wrap_kernels


def set_masks(model: Any, masks_or_rule: Any, seed: int | None = None) -> None:
    """Sets the masks of a model's masked kernels; weights off the new masks become 0.

    What the model's optimizer remembers of these weights (momenta, moments, averages) is forgotten, so that it does not
    move them any more. Masks may be set at any moment, in a callback too.

    Args:
        model: A built model with masked kernels.
        masks_or_rule: A rule of `keras_sparse_init.masks` for all kernels; a list of masks (or rules) in the
            order of `masked_kernels`; or a mapping from names to masks or rules, for some kernels only.
        seed: Non-negative int from which each rule's seed is derived, with the kernel's name. Drawn when None.

    Raises:
        ValueError: When a name is unknown, the number of masks differs, or a mask does not fit its kernel or is not
            of 0 and 1. No mask has been changed then.

    Example:
        >>> import tf_keras
        >>> from keras_sparse_init import masks, set_masks, sparsify, sparsity_table
        >>> dense = tf_keras.Sequential([tf_keras.layers.Input((8,)), tf_keras.layers.Dense(4, name="out")])
        >>> model = sparsify(dense, 0.5, seed=0)
        >>> set_masks(model, {"out/kernel": masks.ConstantFanIn(0.75)}, seed=1)
        >>> sparsity_table(model).total.sparsity
        0.75
    """
    kernels = _require_masked(model)
    base = _base_seed(seed)
    assigned = []
    for kernel, mask in _pair(kernels, masks_or_rule):
        try:
            if isinstance(mask, type):
                raise TypeError(f"a rule must be an object such as masks.Random(0.9). Received: {mask!r}")
            if callable(mask):
                mask = masks.draw(mask, kernel.shape, derive_seed(base, f"{kernel.seed_name}/mask"), kernel.layout)
            assigned.append((kernel, fans.as_mask(compat.to_numpy("mask", mask), kernel.shape)))
        except (ValueError, TypeError) as error:
            raise type(error)(f"The mask of {kernel.name!r} cannot be set: {error}") from None
    optimizer = getattr(model, "optimizer", None)
    for kernel, mask in assigned:
        compat.assign(kernel.mask, mask)
        compat.assign(kernel.kernel, np.where(mask, compat.to_numpy("kernel", kernel.kernel), 0))
        for slot, initial in slots_of(optimizer, kernel.kernel):
            compat.assign(slot, np.where(mask, compat.to_numpy("slot", slot), initial))


def apply_masks(model: Any) -> None:
    """Sets the weights off the masks to exactly 0.

    tfmot's wrapper masks its kernel at each forward pass, so that after the last step of an optimizer weights off the
    mask are not 0 until the next. Call this before saving or reading kernels.

    Args:
        model: A built model with masked kernels, or without any.

    Example:
        >>> import numpy as np, tf_keras
        >>> from keras_sparse_init import masked_kernels, sparsify
        >>> from keras_sparse_init.sparse_model import apply_masks
        >>> dense = tf_keras.Sequential([tf_keras.layers.Input((8,)), tf_keras.layers.Dense(4)])
        >>> model = sparsify(dense, 0.5, seed=0)
        >>> kernel = masked_kernels(model)[0].kernel
        >>> kernel.assign_add(np.ones((8, 4)))  # doctest: +ELLIPSIS
        <tf.Variable ...
        >>> apply_masks(model)
        >>> int(np.count_nonzero(kernel))
        16
    """
    for kernel in masked_kernels(model):
        compat.assign(kernel.kernel, np.where(kernel.mask_value(), compat.to_numpy("kernel", kernel.kernel), 0))


def reinitialize(model: Any, initializer: Any = None, seed: int | None = None) -> None:
    """Draws every masked kernel anew, scaled for its mask. Masks, biases and other weights stay.

    Args:
        model: A built model with masked kernels.
        initializer: A `SparseScaledInit` (or one of the named ones), or a Keras initializer or its name, whose scale,
            mode and distribution are then taken. With `granularity="effective"` it counts, for the masks that all
            layers have now, only inputs that get a signal and outputs that pass one on. None: each layer's own
            initializer, in the same way. Of an initializer with a fixed variance (`RandomNormal`, `Orthogonal`, ...)
            the variance is kept at density 1 and grows as the fan-in shrinks.
        seed: Non-negative int. Each kernel's seed is derived from it and the kernel's name. When None, the
            initializer's own seed takes its place, or a new one is drawn.

    Raises:
        ValueError: When the model has no masked kernel, an initializer has no variance to go by (`Zeros`, a constant, a
            function), or it is "effective" and what the masks connect cannot be read: in a subclassed model, say. No
            kernel has been changed then.

    Example:
        >>> import tf_keras
        >>> from keras_sparse_init import SparseHeNormal, reinitialize, sparsify
        >>> dense = tf_keras.Sequential([tf_keras.layers.Input((8,)), tf_keras.layers.Dense(4)])
        >>> model = sparsify(dense, 0.5, seed=0)
        >>> reinitialize(model, SparseHeNormal(), seed=1)

    Reference:
        Evci et al. 2020, arXiv:2010.03533, section 3.1: networks pruned at initialization need an initialization
        that takes their masks into account.
    """
    kernels = _require_masked(model)
    drawn_seed = _base_seed(None) if seed is None else check_seed(seed)
    scaled = [
        mask_aware(kernel.initializer if initializer is None else initializer, kernel.name, kernel.shape, kernel.layout)
        for kernel in kernels
    ]

    live = _live_ends(model, scaled)

    def draw(kernel: MaskedKernel, initializer: Any, mask: np.ndarray) -> np.ndarray:
        own_seed = initializer.given_seed if seed is None else None
        kernel_seed = derive_seed(drawn_seed if own_seed is None else own_seed, kernel.seed_name)
        dtype = compat.true_dtype(kernel.kernel)
        return initializer.draw(kernel.shape, dtype, mask, kernel.layout, kernel_seed, *live.get(kernel.name, ()))

    values = map_blocks(draw, kernels, scaled, [kernel.mask_value() for kernel in kernels])
    for kernel, value in zip(kernels, values, strict=True):
        compat.assign(kernel.kernel, value)
    traversal.kernels_were_drawn(model, [kernel.kernel for kernel in kernels])


def sparsify(
    model: Any,
    sparsity: float,
    method: masks.SparsityMethod = "erk",
    rule: Any = masks.Random,
    initializer: Any = None,
    wrapper: Wrapper | None = None,
    skip: Iterable[str] | Callable[[Any], bool] | None = None,
    seed: int | None = None,
) -> Any:
    """A sparse version of a dense model: layers wrapped, static masks set, kernels initialized for them.

    Biases, normalization layers and skipped layers keep their weights. No callback is needed to train the result.

    Args:
        model: A built model of either Keras: Sequential or functional (a new model is returned), or subclassed (changed
            in place and returned).
        sparsity: Fraction of zeros over all wrapped kernels together, in [0, 1).
        method: How it is spread over layers, as in `layer_sparsities`: "erk", "er", "uniform", "uniform_plus", "igq".
        rule: A class of `keras_sparse_init.masks` (called with each layer's sparsity), or a rule, of which
            `rule.with_sparsity` makes the one of each layer.
        initializer: As in `reinitialize`; or an `ExactOrthogonalInit`, which makes the masks too, of the sparsity that
            each layer is to have: there is no `rule` then.
        wrapper: "masked" wraps layers in `Masked`; "tfmot" in `PruneLowMagnitude` with a mask that never changes by
            itself, for tf_keras only. None: tfmot for a tf_keras model, `Masked` for a Keras 3 model.
        skip: Names of layers that stay dense with all inside them, or a function of the layer that is True for them.
        seed: Non-negative int from which all masks and kernels derive. Drawn when None.

    Returns:
        The sparse model, not compiled.

    Raises:
        ValueError: When the sparsity, method or wrapper is not allowed, the budget cannot be met, a name to skip is
            unknown, or no layer has a kernel to mask.
        TypeError: When `model` is no Keras model, or of Keras 3 with `wrapper="tfmot"`, which takes tf_keras only.

    Warns:
        UserWarning: When layers with kernels stay dense because tfmot cannot wrap them (`DepthwiseConv2D`, say)
            and `skip` does not name them.

    Example:
        >>> import tf_keras
        >>> from keras_sparse_init import SparseHeNormal, sparsify, sparsity_table
        >>> layers = tf_keras.layers
        >>> dense = tf_keras.Sequential([layers.Input((784,)), layers.Dense(300, "relu"), layers.Dense(10)])
        >>> model = sparsify(dense, 0.95, initializer=SparseHeNormal(), skip=[dense.layers[-1].name], seed=0)
        >>> sparsity_table(model).total.nonzeros
        11760
    """
    check_sparsity(sparsity)
    wrapper = check_wrapper(model, wrapper)
    base = _base_seed(seed)
    check_choice("method", method, get_args(masks.SparsityMethod))
    if not isinstance(rule, type) and not hasattr(rule, "with_sparsity"):
        raise TypeError(f"`rule` must be a class of masks or a rule that has `with_sparsity`. Received: {rule!r}")
    if isinstance(initializer, type) and issubclass(initializer, ExactOrthogonalInit):
        initializer = initializer(seed=0)  # That of the model takes its place.
    if isinstance(initializer, ExactOrthogonalInit):
        if rule is not masks.Random:
            raise ValueError(
                f"`rule` must be left out with ExactOrthogonalInit, which makes the masks. Received: {rule!r}"
            )
    elif initializer is not None:
        mask_aware(initializer, "initializer", (1, 1), fans.kernel_layout("dense", (1, 1)))
    sparse = wrap_kernels(model, wrapper, skip)
    try:
        _mask_and_draw(sparse, sparsity, method, rule, initializer, base)
    except (TypeError, ValueError):
        if sparse is model:  # A subclassed model was changed in place.
            unwrap_kernels(sparse)
        raise
    return sparse


def _mask_and_draw(sparse: Any, sparsity: float, method: Any, rule: Any, initializer: Any, seed: int) -> None:
    kernels = masked_kernels(sparse)
    if isinstance(initializer, ExactOrthogonalInit):
        _draw_orthogonal(sparse, kernels, sparsity, method, initializer, seed)
        return
    # Before a kernel is changed, so that a model keeps its weights when an initializer does not fit.
    drawers = [
        mask_aware(kernel.initializer if initializer is None else initializer, kernel.name, kernel.shape, kernel.layout)
        for kernel in kernels
    ]
    _live_ends(sparse, drawers)
    levels = masks.layer_sparsities({kernel.name: kernel.shape for kernel in kernels}, sparsity, method)
    rules = {
        name: rule(sparsity=level) if isinstance(rule, type) else rule.with_sparsity(level)
        for name, level in levels.items()
    }
    set_masks(sparse, rules, seed=seed)
    reinitialize(sparse, initializer, seed=seed)


def _draw_orthogonal(
    sparse: Any, kernels: list[MaskedKernel], sparsity: float, method: Any, initializer: ExactOrthogonalInit, seed: int
) -> None:
    levels = masks.layer_sparsities({kernel.name: kernel.shape for kernel in kernels}, sparsity, method)
    drawn = []
    for kernel in kernels:
        try:
            if kernel.layout.name not in ("dense", "conv") or kernel.layout.blocks > 1:
                raise ValueError(
                    f"it is none of a dense layer or a convolution in one group, but {kernel.layout.name!r}"
                )
            dtype, level = compat.true_dtype(kernel.kernel), levels[kernel.name]
            drawn.append(initializer.draw_with_mask(kernel.shape, dtype, derive_seed(seed, kernel.seed_name), level))
        except ValueError as error:
            raise ValueError(f"The kernel {kernel.name!r} cannot be orthogonal: {error}") from None
    set_masks(sparse, [mask for _, mask in drawn])
    for kernel, (value, _) in zip(kernels, drawn, strict=True):
        compat.assign(kernel.kernel, value)
    traversal.kernels_were_drawn(sparse, [kernel.kernel for kernel in kernels])


def sparsity_table(model: Any) -> SparsityTable:
    """Sparsity, fan-in and dead units of every masked kernel.

    Args:
        model: A built model.

    Returns:
        A `SparsityTable`; `str()` of it is a table to read. It has no rows when nothing is masked.

    Example:
        >>> import tf_keras
        >>> from keras_sparse_init import sparsify, sparsity_table
        >>> dense = tf_keras.Sequential([tf_keras.layers.Input((8,)), tf_keras.layers.Dense(4, name="out")])
        >>> table = sparsity_table(sparsify(dense, 0.5, seed=0))
        >>> table.rows[0].name, table.rows[0].nonzeros, table.rows[0].fan_in_mean
        ('out/kernel', 16, 4.0)
    """
    return SparsityTable([SparsityRow.of(k.name, k.mask_value(), k.layout) for k in masked_kernels(model)])


def strip(model: Any) -> Any:
    """The plain model of a masked one: no wrappers and masks, zeros in their place in the kernels.

    Args:
        model: A built model. Sequential and functional models are left alone and a new one is returned; a
            subclassed model is changed in place.

    Returns:
        The plain model, not compiled. It saves and loads without this package: initializers of this package, wherever
        they are in the model, become Keras's `VarianceScaling` of the same scale, mode and distribution.

    Example:
        >>> import numpy as np, tf_keras
        >>> from keras_sparse_init import sparsify, strip
        >>> dense = tf_keras.Sequential([tf_keras.layers.Input((8,)), tf_keras.layers.Dense(4, name="out")])
        >>> plain = strip(sparsify(dense, 0.5, seed=0))
        >>> plain.layers[0].name, int(np.count_nonzero(plain.layers[0].kernel))
        ('out', 16)
    """
    apply_masks(model)
    plain = unwrap_kernels(model)
    traversal.replace_initializers(plain, unaware)
    return plain


def _live_ends(model: Any, initializers: Iterable[Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Which ends of the masked kernels are live, where one of the initializers asks for it."""
    return live_ends(model) if any(drawer.granularity == "effective" for drawer in initializers) else {}


def _require_masked(model: Any) -> list[MaskedKernel]:
    kernels = masked_kernels(model)
    if not kernels:
        raise ValueError(
            f"`model` must have masked kernels. Received: the model {model.name!r} without any; see `sparsify`"
        )
    return kernels


def _base_seed(seed: int | None) -> int:
    return compat.fresh_seed() if seed is None else check_seed(seed)


def _pair(kernels: list[MaskedKernel], masks_or_rule: Any) -> list[tuple[MaskedKernel, Any]]:
    if isinstance(masks_or_rule, Mapping):
        by_name = {kernel.name: kernel for kernel in kernels}
        unknown = sorted(set(masks_or_rule) - set(by_name), key=str)
        if unknown:
            raise ValueError(f"`masks_or_rule` names unknown kernels {unknown}. The model's are {sorted(by_name)}")
        return [(by_name[name], mask) for name, mask in masks_or_rule.items()]
    if callable(masks_or_rule) and not isinstance(masks_or_rule, type):
        return [(kernel, masks_or_rule) for kernel in kernels]
    if isinstance(masks_or_rule, list | tuple):
        if len(masks_or_rule) != len(kernels):
            raise ValueError(
                f"`masks_or_rule` must list a mask for each of the {len(kernels)} masked kernels. "
                f"Received: {len(masks_or_rule)}"
            )
        return list(zip(kernels, masks_or_rule, strict=True))
    raise TypeError(
        "`masks_or_rule` must be a rule such as masks.Random(0.9), a list of masks or a mapping from names to masks. "
        f"Received: {masks_or_rule!r}"
    )
