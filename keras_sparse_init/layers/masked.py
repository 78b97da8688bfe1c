"""`Masked`: a layer that runs on kernel * mask, for both Kerases and every backend of Keras 3."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_sparse_init import compat, fans, masks
from keras_sparse_init.arguments import check_seed
from keras_sparse_init.initializers import deserialize_rule, serialize_rule
from keras_sparse_init.layers.calls import Lock, all_but_first_by_name, call_with_arguments_of, positional_names
from keras_sparse_init.matching import mask_aware
from keras_sparse_init.packing import pack, unpack
from keras_sparse_init.sampling import derive_seed
from keras_sparse_init.traversal import KernelPlace, MaskWrapper, initializer_of, kernels_of


class _Slot(NamedTuple):
    """Where a masked kernel lies: attribute `attribute` of `owner`, its name below the wrapped layer, its mask.

    `holders` are all layers and attributes that hold the kernel, `owner`'s among them.
    """

    name: str
    owner: Any
    attribute: str
    kernel: Any
    mask: Any
    holders: list[tuple[Any, str]]


class Masked(MaskWrapper):
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
            unknown, a mask does not fit, or LoRA is enabled on the layer (its kernel is not the one it uses).

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

    _library: Any = None

    def __new__(cls, layer: Any = None, *args: Any, **kwargs: Any) -> Masked:
        """An instance of the class for the layer's Keras."""
        if cls is Masked:
            cls = CLASSES[compat.library_of(layer).__name__]
        return super().__new__(cls, layer, *args, **kwargs)

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
        if isinstance(weight_names, str):
            raise ValueError(f"`weight_names` must be a list of names. Received: weight_names={weight_names!r}")
        kwargs.setdefault("name", f"masked_{layer.name}")
        # Otherwise inputs would be cast to the global policy's dtype before the wrapped layer sees them.
        kwargs.setdefault("dtype", compat.dtype_policy(layer))
        # Both Kerases look at the arguments of `call`, before the end of `__init__`, for what to pass to it.
        object.__setattr__(self, "call", MethodType(call_with_arguments_of(layer), self))
        names = positional_names(layer.__call__) or positional_names(layer.call)
        object.__setattr__(self, "_argument_names", names)
        super().__init__(layer, **kwargs)
        self.supports_masking = layer.supports_masking
        self.stateful = getattr(layer, "stateful", False)
        self.seed = None if seed is None else check_seed(seed)
        self.weight_names = None if weight_names is None else list(weight_names)
        given = masks.Random(sparsity) if sparsity is not None else mask
        # Plain attributes, set past Keras's tracking: the layers they mention are tracked as `layer` already.
        object.__setattr__(self, "_given_mask", given)
        object.__setattr__(self, "_slots", [])
        object.__setattr__(self, "_call_shapes", {})
        object.__setattr__(self, "_built_with", None)
        object.__setattr__(self, "_rebuilt", False)
        object.__setattr__(self, "_one_thread", Lock())

    def kernels_and_masks(self) -> list[tuple[Any, Any]]:
        """The masked kernels' variables, each with its mask's variable, in the order of the layer's kernels.

        Raises:
            ValueError: When the layer is not built.
        """
        compat.require_built(self)
        return [(slot.kernel, slot.mask) for slot in self._slots]

    def build(self, input_shape: Any = None) -> None:
        """Builds the wrapped layer, then its masks."""
        if self.built:
            return
        # Also inside a traced function values are set once, now, and not by every call of the function.
        with compat.eager_scope():
            fresh = not self.layer.built
            if fresh:
                compat.build_layer(self.layer, input_shape, self._call_shapes)
                object.__setattr__(self, "_built_with", compat.plain_shape(input_shape))
            self._build_masks(fresh or self._rebuilt)
        self.built = True

    def _build_masks(self, fresh: bool) -> None:
        for part in self.layer._flatten_layers():
            if getattr(part, "lora_enabled", False):
                raise ValueError(_LORA.format(part.name))
            if getattr(part, "quantization_mode", None) is not None:
                raise ValueError(
                    f"The layer {part.name!r} is quantized ({part.quantization_mode}) and cannot be masked"
                )
        found = kernels_of(self.layer, self.weight_names)
        if not found:
            wanted = self.weight_names or "kernel, recurrent_kernel, depthwise_kernel, pointwise_kernel, embeddings"
            raise ValueError(f"`layer` must have a kernel to mask ({wanted}). Received: the layer {self.layer.name!r}")
        unknown = set(self.weight_names or ()) - {place.attribute.removeprefix("_") for place in found}
        if unknown:
            raise ValueError(
                f"`weight_names` names {sorted(unknown)}, which the layer {self.layer.name!r} does not have"
            )
        given = self._given_by_name(found)
        base = compat.fresh_seed() if self.seed is None else self.seed
        values = {
            place.name: self._mask_value(place, given[place.name], base) for place in found if place.name in given
        }
        for place in found:
            kernel, value = place.kernel, values.get(place.name)
            if value is not None and not compat.is_restored(kernel):
                self._draw(place, value, base, fresh)
            mask = self._add_mask(place.name, kernel, value)
            holders = [(part, a) for part in self.layer._flatten_layers() for a, v in vars(part).items() if v is kernel]
            self._slots.append(_Slot(place.name, place.owner, place.attribute, kernel, mask, holders))

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
                given = masks.draw(given, place.shape, derive_seed(base, f"{place.name}/mask"), _layout(place))
            return fans.as_mask(compat.to_numpy("mask", given), place.shape)
        except (ValueError, TypeError) as error:
            message = f"The mask of {place.name!r} of the layer {self.layer.name!r} cannot be set: {error}"
            raise type(error)(message) from None

    def _draw(self, place: KernelPlace, mask: np.ndarray, base: int, fresh: bool) -> None:
        """Draws a kernel for its mask; a trained one only loses the weights off the mask."""
        try:
            initializer = initializer_of(place.owner, place.attribute)
            initializer = mask_aware(initializer, place.name, mask.shape, _layout(place))
        except ValueError:
            # No variance to scale: zeros, a constant, a function of the user's.
            fresh = False
        if not fresh:
            compat.mask_initial(place.kernel, mask)
            return
        own_seed = initializer.given_seed if self.seed is None else None
        seed = derive_seed(base if own_seed is None else own_seed, place.name)
        values = initializer.draw(mask.shape, compat.true_dtype(place.kernel), mask, _layout(place), seed)
        compat.initialize(place.kernel, lambda shape, dtype: compat.to_tensor(values, dtype))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped layer on its inputs and whatever else it takes."""
        args, kwargs = all_but_first_by_name(self._argument_names, args, kwargs)
        if not self.built:
            given = {**dict(zip(self._argument_names, args, strict=False)), **kwargs}
            shapes = {name: compat.shape_of(value) for name, value in given.items() if compat.has_shape(value)}
            object.__setattr__(self, "_call_shapes", shapes)
        return super().__call__(*args, **kwargs)

    @contextlib.contextmanager
    def _masked_kernels(self) -> Iterator[None]:
        """The wrapped layer reads kernel * mask where its kernel variables are."""
        # One thread at a time, but for replicas: each waits for the others in the middle of its call.
        with contextlib.nullcontext() if tf.distribute.has_strategy() else self._one_thread:
            for slot in self._slots:
                self._require_unchanged(slot)
            try:
                for slot in self._slots:
                    # Past Keras's tracking: for it the attribute never changes.
                    product = compat.masked_kernel(slot.owner, slot.kernel, slot.mask)
                    for holder, attribute in slot.holders:
                        object.__setattr__(holder, attribute, product)
                yield
            finally:
                for slot in self._slots:
                    for holder, attribute in slot.holders:
                        object.__setattr__(holder, attribute, slot.kernel)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """The wrapped layer's timestep mask."""
        return self.layer.compute_mask(inputs, mask)

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped layer's output shape."""
        return self.layer.compute_output_shape(*args, **kwargs)

    def reset_states(self) -> None:
        """Resets the state of a stateful recurrent layer."""
        reset = getattr(self.layer, "reset_states", None) or self.layer.reset_state
        reset()

    def get_build_config(self) -> dict[str, Any] | None:
        """The shapes that the wrapped layer was built with; None when it is not built."""
        if not self.built:
            return None
        if self._built_with is None:
            # It was built before it was wrapped.
            return {"layer": self.layer.get_build_config()}
        return {"input_shape": self._built_with, "call_shapes": self._call_shapes}

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds the wrapped layer with the shapes that `get_build_config` returned, then the masks."""
        if config.get("layer") is not None:
            object.__setattr__(self, "_rebuilt", not self.layer.built)
            self.layer.build_from_config(config["layer"])
        object.__setattr__(self, "_call_shapes", dict(config.get("call_shapes", {})))
        self.build(config.get("input_shape"))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments; once built, with the masks as they are, so that a clone has the same."""
        config = super().get_config()
        config.update(mask=self._mask_config(), seed=self.seed, weight_names=self.weight_names)
        return config

    def _mask_config(self) -> Any:
        given = self._given_mask
        if self._slots and all(compat.has_value(slot.mask) for slot in self._slots):
            given = {slot.name: compat.to_numpy("mask", slot.mask) for slot in self._slots}
        if isinstance(given, Mapping):
            return {"masks": {name: _mask_to_config(value) for name, value in given.items()}}
        return None if given is None else _mask_to_config(given)

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Masked:
        """A new layer from what `get_config` returned."""
        config = dict(config)
        # The layer is built with this one, so that its kernels are drawn for the masks.
        layer_config = {key: value for key, value in config.pop("layer").items() if key != "build_config"}
        layer = cls._library.layers.deserialize(layer_config, custom_objects=custom_objects)
        mask = config.pop("mask", None)
        if isinstance(mask, dict) and "masks" in mask:
            mask = {name: _mask_from_config(value) for name, value in mask["masks"].items()}
        elif mask is not None:
            mask = _mask_from_config(mask)
        return cls(layer, mask=mask, **config)

    def _require_unchanged(self, slot: _Slot) -> None:
        if getattr(slot.owner, "lora_enabled", False):
            raise ValueError(_LORA.format(slot.owner.name))
        current = vars(slot.owner).get(slot.attribute)
        # Another replica's product may stand there.
        if current is None or (compat.is_variable(current) and current is not slot.kernel):
            raise ValueError(
                f"The layer {slot.owner.name!r} no longer has the kernel {slot.name!r} that is masked. To quantize "
                "or convert a layer, take it out of `Masked` with `strip` first"
            )


_LORA = (
    "LoRA is enabled on {!r}: the layer adds to its kernel what no mask reaches. Merge it first, by saving and loading "
    "the layer's weights"
)


def _layout(place: KernelPlace) -> fans.KernelLayout:
    return fans.kernel_layout(place.owner, place.shape, weight_name=place.attribute)


def _mask_to_config(mask: Any) -> dict[str, Any]:
    if callable(mask):
        return serialize_rule(mask)
    return pack(fans.as_mask(compat.to_numpy("mask", mask)))


def _mask_from_config(config: dict[str, Any]) -> Any:
    return unpack(config) if "bits" in config else deserialize_rule(config)


def _class_for(library: Any) -> type:
    """The class of one Keras; a symbolic call is traced, whatever the number of the wrapped layer's inputs."""
    members = {"_library": library, "__module__": __name__, "__doc__": Masked.__doc__, "__qualname__": "Masked"}
    if library is compat.keras:
        members["compute_output_spec"] = lambda self, *args, **kwargs: library.Operation.compute_output_spec(
            self, *args, **kwargs
        )
    return compat.register_in(library, type("Masked", (Masked, library.layers.Wrapper), members))


CLASSES = {library.__name__: _class_for(library) for library in (compat.keras, compat.tf_keras)}
