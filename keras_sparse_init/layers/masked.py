"""`Masked`: a layer that runs on kernel * mask, for both Kerases and every backend of Keras 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_sparse_init import compat, fans, masks
from keras_sparse_init.arguments import check_seed
from keras_sparse_init.initializers import deserialize_rule, serialize_rule
from keras_sparse_init.layers.wrapper import KernelWrapper, Slot, classes_for_both, layout_of
from keras_sparse_init.matching import mask_aware
from keras_sparse_init.orthogonal_initializers import OrthogonalInit
from keras_sparse_init.packing import pack, unpack
from keras_sparse_init.sampling import derive_seed
from keras_sparse_init.traversal import KernelPlace, MaskWrapper, initializer_of, kernels_were_drawn


class Masked(KernelWrapper, MaskWrapper):
    """Wraps a layer so that it runs on kernel * mask: weights off the mask are 0, and stay 0 in training.

    The gradient of a kernel is masked with it, and weights off the mask start at 0, so that no update, momentum or
    weight decay ever moves them. The mask is a saved weight that no optimizer trains; `set_masks` changes it. Biases
    are not masked. All kernels of the layer and of the layers inside it are: `kernel`, `recurrent_kernel`,
    `depthwise_kernel`, `pointwise_kernel`, `embeddings`.

    What mixes the weights of a kernel moves them all the same: the Muon optimizer, an orthogonal regularizer, weights
    set from outside. The layer's output does not change by it; `apply_masks(model)` sets them to 0. Keras's Adafactor
    gives NaN for a kernel in which a row and a column have no gradient, which masks make likely.

    With `mask` or `sparsity`, the kernels of a layer that is not built yet are drawn for their masks: by the layer's
    own initializer when it takes masks, else by a `SparseScaledInit` with its settings. Without, the mask is what the
    kernel's zeros say (all ones for a kernel of zeros).

    `Masked(layer)` is an instance of a subclass for the Keras of the layer: it is a `keras.layers.Layer` around
    a `keras` layer, a `tf_keras.layers.Layer` around a `tf_keras` layer.

    Args:
        layer: A layer of either Keras, built or not.
        mask: None; a rule of `keras_sparse_init.masks` for all kernels; an array of 0 and 1 for the layer's only
            kernel; or a mapping from kernel names to arrays or rules, for those kernels.
        sparsity: Float in [0, 1), short for `mask=masks.Random(sparsity)`.
        seed: Non-negative int for masks and kernels; each kernel's seeds derive from it and the kernel's name.
        weight_names: Attribute names of the weights to mask, when not all kernels are meant or a layer of your own
            calls them otherwise.
        **kwargs: `name`, `dtype`, `trainable` as in every Keras layer. `dtype` is the wrapped layer's by default.

    Raises:
        TypeError: When `layer` is no Keras layer.
        ValueError: When both `mask` and `sparsity` are given; at build, when the layer has no kernel, a name is
            unknown, a mask does not fit or is given to a layer whose initializer makes its own (`ExactOrthogonalInit`),
            or LoRA is enabled on the layer (its kernel is not the one it uses).

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import Masked, SparseHeNormal
        >>> dense = keras.layers.Dense(10, kernel_initializer=SparseHeNormal())
        >>> model = keras.Sequential([keras.layers.Input((20,)), Masked(dense, sparsity=0.9, seed=0)])
        >>> model.compile("adam", "mse")
        >>> history = model.fit(np.ones((8, 20)), np.ones((8, 10)), verbose=0)
        >>> int(np.count_nonzero(dense.kernel))
        20
    """

    _done = "masked"
    _undone = "strip"

    def __init__(
        self,
        layer: Any,
        mask: Any = None,
        sparsity: float | None = None,
        seed: int | None = None,
        weight_names: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        if mask is not None and sparsity is not None:
            raise ValueError(
                f"Give either `mask` or `sparsity`, not both. Received: mask={mask!r}, sparsity={sparsity}"
            )
        if isinstance(mask, str | type):
            raise ValueError(f"`mask` must be a rule, an array or a mapping of them. Received: mask={mask!r}")
        if isinstance(layer, Masked):
            raise ValueError(f"`layer` is masked already: {layer.name!r}. Change its masks with `set_masks`")
        kwargs.setdefault("name", f"masked_{layer.name}")
        super().__init__(layer, weight_names, **kwargs)
        self.seed = None if seed is None else check_seed(seed)
        # A plain attribute, set past Keras's tracking, which would change the containers in it.
        object.__setattr__(self, "_given_mask", masks.Random(sparsity) if sparsity is not None else mask)
        # Of a copy (`from_config`) the mask is that of the original, whose weights it usually gets.
        self._fresh_mask = True

    def kernels_and_masks(self) -> list[tuple[Any, Any]]:
        """The masked kernels' variables, each with its mask's variable, in the order of the layer's kernels.

        Raises:
            ValueError: When the layer is not built.
        """
        compat.require_built(self)
        return [(slot.kernel, slot.partner) for slot in self._slots]

    def _build_slots(self, found: list[KernelPlace], fresh: bool) -> None:
        given = self._given_by_name(found)
        base = compat.fresh_seed() if self.seed is None else self.seed
        values = {
            place.name: self._mask_value(place, given[place.name], base) for place in found if place.name in given
        }
        drawn = []
        for place in found:
            kernel, value = place.kernel, values.get(place.name)
            if value is not None and not compat.is_restored(kernel):
                self._draw(place, value, base, fresh)
                drawn.append(kernel)
            mask = self._add_mask(place.name, kernel, value)
            holders = self._holders(kernel)
            self._slots.append(Slot(place.name, place.owner, place.attribute, kernel, holders, mask))
        if fresh:
            kernels_were_drawn(self.layer, drawn)

    def _add_mask(self, name: str, kernel: Any, value: np.ndarray | None) -> Any:
        dtype = compat.true_dtype(kernel)

        def initial(shape: Any, dtype: Any = None) -> Any:
            if value is not None:
                return compat.to_tensor(value.astype(compat.numpy_dtype(compat.float_dtype(dtype))), dtype)
            return compat.nonzero_pattern(kernel, dtype)

        name = f"{name.replace('/', '_')}_mask"
        mask = self.add_weight(name=name, shape=tuple(kernel.shape), initializer=initial, dtype=dtype, trainable=False)
        # Checkpoints of Keras 3 find a weight by the attribute that holds it.
        setattr(self, name, mask)
        return mask

    def _given_by_name(self, kernels: list[KernelPlace]) -> dict[str, Any]:
        given, names = self._given_mask, [kernel.name for kernel in kernels]
        if given is None:
            return {}
        if isinstance(given, Mapping):
            # Whoever gives a mask may name the kernel of a cell or projection with its path, or by its attribute alone.
            known = {key: [k.name for k in kernels if key in (k.name, k.path, k.path.split("/")[-1])] for key in given}
            unknown = [key for key, matches in known.items() if not matches]
            if unknown:
                raise ValueError(f"`mask` names unknown kernels {unknown}. Those of {self.layer.name!r} are {names}")
            return {name: given[key] for key, matches in known.items() for name in matches}
        if not callable(given) and len(names) > 1:
            raise ValueError(
                f"`mask` must be a rule or a mapping: the layer {self.layer.name!r} has several kernels {names}. "
                "Received: one array"
            )
        return dict.fromkeys(names, given)

    def _mask_value(self, place: KernelPlace, given: Any, base: int) -> np.ndarray:
        try:
            if callable(given):
                given = masks.draw(given, place.shape, derive_seed(base, f"{place.name}/mask"), layout_of(place))
            return fans.as_mask(compat.to_numpy("mask", given), place.shape)
        except (ValueError, TypeError) as error:
            message = f"The mask of {place.name!r} of the layer {self.layer.name!r} cannot be set: {error}"
            raise type(error)(message) from None

    def _draw(self, place: KernelPlace, mask: np.ndarray, base: int, fresh: bool) -> None:
        """Draws a kernel for its mask; a trained one only loses the weights off the mask."""
        initializer = initializer_of(place.owner, place.attribute)
        if fresh and self._fresh_mask and isinstance(initializer, OrthogonalInit):
            raise ValueError(
                f"`mask` and `sparsity` must be left out for {place.name!r} of the layer {self.layer.name!r}, whose "
                f"{type(initializer).__name__} makes its own zeros: under another mask it is no longer orthogonal"
            )
        try:
            initializer = mask_aware(initializer, place.name, mask.shape, layout_of(place))
        except ValueError:
            # No variance to scale: zeros, a constant, a function of the user's.
            fresh = False
        if not fresh:
            compat.mask_initial(place.kernel, mask)
            return
        own_seed = initializer.given_seed if self.seed is None else None
        seed = derive_seed(base if own_seed is None else own_seed, place.name)
        values = initializer.draw(mask.shape, compat.true_dtype(place.kernel), mask, layout_of(place), seed)
        compat.initialize(place.kernel, lambda shape, dtype: compat.to_tensor(values, dtype))

    def _effective(self, slot: Slot, kernel: Any) -> Any:
        return compat.own_value(kernel) * compat.own_value(slot.partner)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments; once built, with the masks as they are, so that a clone has the same."""
        config = super().get_config()
        config.update(mask=self._mask_config(), seed=self.seed, weight_names=self.weight_names)
        return config

    def _mask_config(self) -> Any:
        given = self._given_mask
        if self._slots and all(compat.has_value(slot.partner) for slot in self._slots):
            given = {slot.name: compat.to_numpy("mask", slot.partner) for slot in self._slots}
        if isinstance(given, Mapping):
            return {"masks": {name: _mask_to_config(value) for name, value in given.items()}}
        return None if given is None else _mask_to_config(given)

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Masked:
        """A new layer from what `get_config` returned."""
        config = dict(config)
        layer = cls.layer_from_config(config.pop("layer"), custom_objects)
        mask = config.pop("mask", None)
        if isinstance(mask, dict) and "masks" in mask:
            mask = {name: _mask_from_config(value) for name, value in mask["masks"].items()}
        elif mask is not None:
            mask = _mask_from_config(mask)
        made = cls(layer, mask=mask, **config)
        made._fresh_mask = False
        return made


def _mask_to_config(mask: Any) -> dict[str, Any]:
    if callable(mask):
        return serialize_rule(mask)
    return pack(fans.as_mask(compat.to_numpy("mask", mask)))


def _mask_from_config(config: dict[str, Any]) -> Any:
    return unpack(config) if "bits" in config else deserialize_rule(config)


CLASSES = classes_for_both(Masked)
