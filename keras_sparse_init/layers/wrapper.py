"""What layers around layers share: they run the layer inside on other values than those of its kernel variables."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import tensorflow as tf

from keras_sparse_init import compat, fans
from keras_sparse_init.layers.calls import Lock, all_but_first_by_name, call_with_arguments_of, positional_names
from keras_sparse_init.traversal import KernelPlace, LayerWrapper, kernels_of


class _MadeOutside(threading.local):
    """What wrappers around this one have made of a kernel in this call, by its id. Replicas have a thread each."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}


_made_outside = _MadeOutside()


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """Where a wrapped kernel lies: attribute `attribute` of `owner`; its name below the wrapped layer.

    `holders` are all layers and attributes that hold the kernel, `owner`'s among them. `partner` is the wrapper's own
    variable for it, if any.
    """

    name: str
    owner: Any
    attribute: str
    kernel: Any
    holders: list[tuple[Any, str]]
    partner: Any = None


class KernelWrapper(LayerWrapper):
    """Base of layers that run the layer inside them on effective kernels, which they compute from its own.

    A subclass says what is made of a kernel, in `_effective`, and what it needs for that, in `_build_slots`.
    """

    _library: Any = None
    # What is done with the kernels, for messages, and how to undo it.
    _done = ""
    _undone = ""

    def __new__(cls, layer: Any = None, *args: Any, **kwargs: Any) -> Any:
        """An instance of the class for the layer's Keras."""
        if "_classes" in vars(cls):
            cls = cls._classes[compat.library_of(layer).__name__]
        return super().__new__(cls, layer, *args, **kwargs)

    def __init__(self, layer: Any, weight_names: Sequence[str] | None, **kwargs: Any):
        if isinstance(weight_names, str):
            raise ValueError(f"`weight_names` must be a list of names. Received: weight_names={weight_names!r}")
        # Otherwise inputs would be cast to the global policy's dtype before the wrapped layer sees them.
        kwargs.setdefault("dtype", compat.dtype_policy(layer))
        # Both Kerases look at the arguments of `call`, before the end of `__init__`, for what to pass to it.
        object.__setattr__(self, "call", MethodType(call_with_arguments_of(layer), self))
        # The order of a layer's positional arguments is that of its `__call__`, where that names them.
        names = layer._argument_names if isinstance(layer, KernelWrapper) else []
        names = names or positional_names(layer.__call__) or positional_names(layer.call)
        object.__setattr__(self, "_argument_names", names)
        super().__init__(layer, **kwargs)
        if not self.trainable:
            layer.trainable = False  # A model of Keras 3 asks the variables, not the layers around them.
        self.supports_masking = layer.supports_masking
        self.stateful = getattr(layer, "stateful", False)
        self.weight_names = None if weight_names is None else list(weight_names)
        # Plain attributes, set past Keras's tracking: the layers they mention are tracked as `layer` already.
        object.__setattr__(self, "_slots", [])
        object.__setattr__(self, "_call_shapes", {})
        object.__setattr__(self, "_built_with", None)
        object.__setattr__(self, "_rebuilt", False)
        object.__setattr__(self, "_one_thread", Lock())

    def build(self, input_shape: Any = None) -> None:
        """Builds the wrapped layer, then what this one adds to it."""
        if self.built:
            return
        # Also inside a traced function values are set once, now, and not by every call of the function.
        with compat.eager_scope():
            fresh = not self.layer.built
            if fresh:
                self._build_like_layer(self.layer, input_shape)
                object.__setattr__(self, "_built_with", compat.plain_shape(input_shape))
            self._build_slots(self._places(), fresh or self._rebuilt)
        self.built = True

    def _build_like_layer(self, layer: Any, input_shape: Any) -> None:
        """Builds the wrapped layer, or a copy of it, with the shapes of the call."""
        if isinstance(layer, KernelWrapper):
            object.__setattr__(layer, "_call_shapes", self._call_shapes)
        compat.build_layer(layer, input_shape, self._call_shapes)

    def _build_slots(self, places: list[KernelPlace], fresh: bool) -> None:
        """Makes `_slots`, one for each place; `fresh` says whether the kernels are new, too."""
        raise NotImplementedError

    def _effective(self, slot: Slot, kernel: Any) -> Any:
        """What the wrapped layer is to read: a tensor of the dtype of `kernel`, which is a variable or a tensor."""
        raise NotImplementedError

    def _places(self) -> list[KernelPlace]:
        for part in self.layer._flatten_layers():
            if getattr(part, "lora_enabled", False):
                raise ValueError(self._lora_message(part))
            if getattr(part, "quantization_mode", None) is not None:
                raise ValueError(
                    f"The layer {part.name!r} is quantized ({part.quantization_mode}) and cannot be {self._done}"
                )
        found = kernels_of(self.layer, self.weight_names)
        if not found:
            wanted = self.weight_names or "kernel, recurrent_kernel, depthwise_kernel, pointwise_kernel, embeddings"
            raise ValueError(
                f"`layer` must have a kernel to be {self._done} ({wanted}). Received: the layer {self.layer.name!r}"
            )
        unknown = set(self.weight_names or ()) - {place.attribute.removeprefix("_") for place in found}
        if unknown:
            raise ValueError(
                f"`weight_names` names {sorted(unknown)}, which the layer {self.layer.name!r} does not have"
            )
        return found

    def _holders(self, kernel: Any) -> list[tuple[Any, str]]:
        return [(part, a) for part in self.layer._flatten_layers() for a, v in vars(part).items() if v is kernel]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped layer on its inputs and whatever else it takes."""
        args, kwargs = all_but_first_by_name(self._argument_names, args, kwargs)
        if not self.built:
            given = {**dict(zip(self._argument_names, args, strict=False)), **kwargs}
            shapes = {name: compat.shape_of(value) for name, value in given.items() if compat.has_shape(value)}
            object.__setattr__(self, "_call_shapes", shapes)
        return super().__call__(*args, **kwargs)

    @contextlib.contextmanager
    def _effective_kernels(self) -> Iterator[None]:
        """The wrapped layer reads effective kernels where its kernel variables are."""
        made = _made_outside.values
        # One thread at a time, but for replicas: each waits for the others in the middle of its call.
        with contextlib.nullcontext() if tf.distribute.has_strategy() else self._one_thread:
            for slot in self._slots:
                self._require_unchanged(slot)
            # What stands in the place of each kernel: the variable, or what a wrapper around this one has put there.
            before = [
                (slot, made[id(slot.kernel)], vars(slot.owner)[slot.attribute])
                if id(slot.kernel) in made
                else (slot, None, slot.kernel)
                for slot in self._slots
            ]
            try:
                for slot, outside, _ in before:
                    kernel = self._effective(slot, slot.kernel if outside is None else outside)
                    made[id(slot.kernel)] = kernel
                    _put(slot, compat.as_read_by(slot.owner, slot.kernel, kernel))
                yield
            finally:
                for slot, outside, standing in before:
                    _put(slot, standing)
                    if outside is None:
                        made.pop(id(slot.kernel), None)
                    else:
                        made[id(slot.kernel)] = outside

    def _require_unchanged(self, slot: Slot) -> None:
        if getattr(slot.owner, "lora_enabled", False):
            raise ValueError(self._lora_message(slot.owner))
        current = vars(slot.owner).get(slot.attribute)
        # The tensor of another replica or wrapper may stand there.
        if current is None or (compat.is_variable(current) and current is not slot.kernel):
            raise ValueError(
                f"The layer {slot.owner.name!r} no longer has the kernel {slot.name!r} that is {self._done}. To "
                f"quantize or convert a layer, take it out of `{type(self).__name__}` with `{self._undone}` first"
            )

    def _lora_message(self, layer: Any) -> str:
        return (
            f"LoRA is enabled on {layer.name!r}: the layer adds to its kernel what is not {self._done}. Merge it "
            "first, by saving and loading the layer's weights"
        )

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
        """Builds the wrapped layer with the shapes that `get_build_config` returned, then what this one adds."""
        if config.get("layer") is not None:
            object.__setattr__(self, "_rebuilt", not self.layer.built)
            self.layer.build_from_config(config["layer"])
        object.__setattr__(self, "_call_shapes", dict(config.get("call_shapes", {})))
        self.build(config.get("input_shape"))

    @classmethod
    def layer_from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """The wrapped layer of a config; not built, so that it is built with the wrapper."""
        config = {key: value for key, value in config.items() if key != "build_config"}
        return cls._library.layers.deserialize(config, custom_objects=custom_objects)


def layout_of(place: KernelPlace) -> fans.KernelLayout:
    """The layout of the kernel at a place."""
    return fans.kernel_layout(place.owner, place.shape, weight_name=place.attribute)


def classes_for_both(cls: type) -> dict[str, type]:
    """The class of a wrapper for each Keras, by its name; the wrapper itself makes instances of these."""
    cls._classes = {library.__name__: _class_for(cls, library) for library in (compat.keras, compat.tf_keras)}
    return cls._classes


def _class_for(cls: type, library: Any) -> type:
    """The class of one Keras; a symbolic call is traced, whatever the number of the wrapped layer's inputs."""
    members = {
        "_library": library,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "__qualname__": cls.__qualname__,
    }
    if library is compat.keras:
        members["compute_output_spec"] = lambda self, *args, **kwargs: library.Operation.compute_output_spec(
            self, *args, **kwargs
        )
    return compat.register_in(library, type(cls.__name__, (cls, library.layers.Wrapper), members))


def _put(slot: Slot, value: Any) -> None:
    for holder, attribute in slot.holders:
        # Past Keras's tracking: for it the attribute never changes.
        object.__setattr__(holder, attribute, value)
