"""Walking through models of either Keras, in model order and with names free of the session, and rebuilding them."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from keras_sparse_init import compat, tfmot_wrapper
from keras_sparse_init.initializers import SparseScaledInit
from keras_sparse_init.orthogonal_initializers import OrthogonalInit

Replace = Callable[[Any, Callable[[Any], Any]], Any]

# What Keras's layers call the weights that multiply their inputs; Keras 3 has some of them under a private name.
_KERNEL_NAMES = ("kernel", "recurrent_kernel", "depthwise_kernel", "pointwise_kernel", "embeddings")


class LayerWrapper:
    """Base of this package's layers around a layer, `layer`. They add no name to the paths of what is inside."""

    def after_drawing(self, kernels: list[Any]) -> None:
        """Called when kernels, of this layer or others, have been drawn anew."""


class MaskWrapper(LayerWrapper):
    """Base of this package's layers that hold the masks of the layer inside them."""

    def kernels_and_masks(self) -> list[tuple[Any, Any]]:
        """The variables of the masked kernels, each with its mask's."""
        raise NotImplementedError

    def wrap_like(self, layer: Any) -> Any:
        """Another wrapper of this kind around another layer, whose masks are its own."""
        new = type(self)(layer, name=self.name, weight_names=self.weight_names)
        if layer.built:
            new.build(None)
        return new


def is_mask_wrapper(layer: Any) -> bool:
    """Whether a layer holds the masks of the layer inside it."""
    return isinstance(layer, MaskWrapper) or tfmot_wrapper.is_wrapper(layer)


def is_layer_wrapper(layer: Any) -> bool:
    """Whether a layer is one of this package or of tfmot around the layer that it changes."""
    return isinstance(layer, LayerWrapper) or tfmot_wrapper.is_wrapper(layer)


def kernels_were_drawn(model: Any, kernels: list[Any]) -> None:
    """Tells the wrappers in a model or layer that these kernels have been drawn anew."""
    for layer in model._flatten_layers():
        if isinstance(layer, LayerWrapper):
            layer.after_drawing(kernels)


class KernelPlace(NamedTuple):
    """Where a kernel lies below a layer: attribute `attribute` of `owner`.

    `path` lists the layers down to it and its attribute's public name. `name` is the same with the numbers that Keras
    gave by itself counted anew, and unique.
    """

    path: str
    name: str
    owner: Any
    attribute: str

    @property
    def kernel(self) -> Any:
        """The variable there."""
        return vars(self.owner)[self.attribute]

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return tuple(self.kernel.shape)


def kernels_of(layer: Any, names: Sequence[str] | None = None) -> list[KernelPlace]:
    """The kernels of a layer and of the layers below it, in their order.

    Args:
        layer: A built layer.
        names: Attribute names that count as kernels, when not Keras's.

    Returns:
        The place of each.
    """
    found: list[KernelPlace] = []
    seen = set()
    for path, canonical, owner in _itself_and_below(layer):
        for attribute, value in vars(owner).items():
            public = attribute.removeprefix("_")
            if public in (names or _KERNEL_NAMES) and compat.is_variable(value) and id(value) not in seen:
                seen.add(id(value))
                name = unused("/".join((*canonical, public)), {other.name for other in found})
                found.append(KernelPlace("/".join((*path, public)), name, owner, attribute))
    return found


def unused(name: str, used: set[str]) -> str:
    """The name itself, or with a number where a subclassed model has given it to several layers."""
    return next(n for n in (name, *(f"{name}_{i}" for i in range(1, len(used) + 1))) if n not in used)


def initializer_of(layer: Any, attribute: str) -> Any:
    """The initializer that a layer has for the kernel of an attribute, or None."""
    attribute = attribute.removeprefix("_")
    names = (f"{attribute}_initializer", f"{attribute.removesuffix('_kernel')}_initializer", "depthwise_initializer")
    return next((getattr(layer, name) for name in names if getattr(layer, name, None) is not None), None)


def walk(layer: Any) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Any]]:
    """All layers below a model or layer, depth first in model order, each once; a wrapper itself comes first.

    Yields:
        (path, canonical path, layer). A path lists layer names; a wrapper (of masks, say) adds no name to the path of
        the layer inside it. In a canonical path, names that Keras numbered by itself (`dense_7`) are numbered anew
        among their siblings, so that it is the same whatever the process built before.
    """
    yield from _visit([layer] if is_layer_wrapper(layer) else _children(layer), (), (), set())


def _itself_and_below(layer: Any) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Any]]:
    """As `walk` yields them; the path of the layer itself, and of one that it wraps, is empty."""
    wrapped = _wrapped(layer)
    yield from (((), (), part) for part in wrapped)
    yield from _visit(_children(wrapped[-1]), (), (), {id(part) for part in wrapped})


def _wrapped(layer: Any) -> list[Any]:
    """A layer and, when it is a wrapper, the layer inside it, and so on."""
    return [layer, *_wrapped(layer.layer)] if is_layer_wrapper(layer) else [layer]


def _visit(
    siblings: list[Any], path: tuple[str, ...], canonical: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Any]]:
    counts: dict[str, int] = {}
    for layer in siblings:
        if id(layer) in seen:
            continue
        wrapped = _wrapped(layer)
        named = wrapped[-1]
        layer_path = (*path, named.name)
        layer_canonical = (*canonical, _canonical_name(named, counts))
        for part in wrapped:
            seen.add(id(part))
            yield layer_path, layer_canonical, part
        yield from _visit(_children(named), layer_path, layer_canonical, seen)


def _children(layer: Any) -> list[Any]:
    return list(layer._flatten_layers(recursive=False, include_self=False))


def _canonical_name(layer: Any, counts: dict[str, int]) -> str:
    # `Bidirectional` puts a prefix to the names of its two layers.
    prefix, name = re.fullmatch(r"((?:forward_|backward_)*)(.*)", layer.name).groups()
    stem = re.sub(r"_\d+$", "", name)
    kind = type(layer).__name__
    automatic = {kind.lower().replace("_", ""), {"Functional": "model", "InputLayer": "input"}.get(kind, "")}
    if stem.replace("_", "").removeprefix("private" if kind.startswith("_") else "") not in automatic:
        return layer.name
    stem = prefix + stem
    counts[stem] = counts.get(stem, -1) + 1
    return f"{stem}_{counts[stem]}"


def owner_of(layer: Any, variable: Any) -> tuple[tuple[str, ...], tuple[str, ...], Any, str]:
    """The layer, among this one and those below it, that has a variable as its attribute.

    Returns:
        (path below `layer`, canonical path, owner, attribute name). A weight that no attribute holds (one of a list,
        say) belongs to `layer` itself under the variable's own name.
    """
    for path, canonical, candidate in _itself_and_below(layer):
        for attribute, value in vars(candidate).items():
            if value is variable:
                return path, canonical, candidate, attribute.removeprefix("_")
    return (), (), layer, variable.name.split("/")[-1].split(":")[0]


def rebuild(model: Any, replace: Replace) -> Any:
    """A model in which some layers are replaced; all others keep their weights.

    Sequential and functional models, nested ones too, are made anew and leave the original alone, as do the layers and
    subclassed models inside them that can be made from their config. A subclassed model cannot be made anew from its
    layers: those that its attributes, lists and dicts hold are replaced in place, and the model itself is returned.

    Args:
        model: A built model.
        replace: Called as `replace(layer, copy)` with each layer that is no model. Returns a new layer made of
            `copy(layer)` or of `copy(layer.layer)`; `copy(layer)` itself to keep the layer with all inside it; or None
            to keep it and go on with the layers inside it. What `copy` returns is a new layer that gets the same
            weights, or the layer itself where the model is changed in place.

    Returns:
        The model with the replacements. It is not compiled, unless it was changed in place.
    """
    return _rebuild(model, replace, {})


def _rebuild(model: Any, replace: Replace, done: dict[int, Any]) -> Any:
    library = compat.library_of(model)
    if not _is_graph_network(model, library):
        _replace_inside(model, model, replace, done)
        for function in ("train_function", "test_function", "predict_function"):
            # What Keras traced of the old layers must not be called again.
            setattr(model, function, None)
        return model

    copies: list[tuple[Any, Any]] = []
    kept: list[tuple[Any, Any]] = []

    def copy(layer: Any) -> Any:
        # A wrapper's config names the classes of the layers inside it, which may be the user's own.
        own = {type(part).__name__: type(part) for part in layer._flatten_layers()}
        with library.utils.custom_object_scope(own):
            new = type(layer).from_config(layer.get_config())
        # The config of a subclassed model has no name. A functional model must know it from the start.
        _rename(new, layer)
        copies.append((layer, new))
        return new

    def clone(layer: Any) -> Any:
        # A layer may be shared by several models that are nested in one.
        if id(layer) not in done:
            done[id(layer)] = _clone(layer)
        return done[id(layer)]

    def _clone(layer: Any) -> Any:
        if not isinstance(layer, library.layers.Layer):
            # An operation of Keras 3, such as the sum of two tensors.
            return type(layer).from_config(layer.get_config())
        if hasattr(layer, "adapt") or isinstance(layer, library.layers.Lambda):
            # What preprocessing layers have learned is not in their config, nor can every function be in one's.
            return layer
        if isinstance(layer, library.Model):
            if _is_graph_network(layer, library):
                return _rebuild(layer, replace, done)
            try:
                new = copy(layer)
            except (NotImplementedError, TypeError):
                return _rebuild(layer, replace, done)
        else:
            new = replace(layer, copy)
            if new is not None:
                return new
            new = copy(layer)
        kept.append((layer, new))
        return new

    with _as_if_not_compiled(model):
        rebuilt = library.models.clone_model(model, clone_function=clone)
    if type(rebuilt) is not type(model):
        warnings.warn(
            f"The new model is a {type(rebuilt).__name__}: what {type(model).__name__} defines itself, such as a "
            "`train_step`, is not in it",
            stacklevel=4,
        )
    if model.built and not rebuilt.built:
        rebuilt.build(model.input_shape)
    for old, new in copies:
        if any(is_mask_wrapper(layer) for layer in old._flatten_layers(include_self=False)):
            _wrap_inside(old, new)
        copy_state(old, new)
    for old, new in kept:
        if not is_mask_wrapper(old):
            _replace_inside(old, new, replace, done)
    return rebuilt


@contextlib.contextmanager
def _as_if_not_compiled(model: Any) -> Iterator[None]:
    """Keras 3 would compile the copy by a config, in which it does not find losses and metrics of the user's own."""
    compiled = vars(model).get("compiled")
    if compiled:
        object.__setattr__(model, "compiled", False)
    try:
        yield
    finally:
        if compiled:
            object.__setattr__(model, "compiled", compiled)


def _is_graph_network(model: Any, library: Any) -> bool:
    return (
        isinstance(model, library.Sequential)
        # In Keras 3, also a subclass of `Model` that is made of inputs and outputs.
        or any(c.__name__ == "Functional" and c.__module__.startswith("keras.") for c in type(model).__mro__)
        or (isinstance(model, library.Model) and getattr(model, "_is_graph_network", False))
    )


def copy_state(old: Any, new: Any) -> None:
    """Gives a layer the weights of another of the same structure, its names, and what is frozen in it."""
    for source, target in zip(old._flatten_layers(), new._flatten_layers(), strict=True):
        _rename(target, source)
        if source.trainable != target.trainable:
            target.trainable = source.trainable
    for source, target in zip(variables(old), variables(new), strict=True):
        compat.assign(target, compat.to_numpy("weight", source))


def _rename(layer: Any, other: Any) -> None:
    if layer.name != other.name:
        setattr(layer, "_name" if compat.library_of(layer) is compat.tf_keras else "name", other.name)


def variables(layer: Any) -> list[Any]:
    """All variables of a layer in an order that does not depend on which of them are frozen."""
    if compat.library_of(layer) is not compat.tf_keras:
        return layer.variables
    found = {id(variable): variable for part in layer._flatten_layers() for variable in own_variables(part)}
    return list(found.values())


def own_variables(layer: Any) -> list[Any]:
    """The variables of a tf_keras layer without those of the layers inside it."""
    return layer._trainable_weights + layer._non_trainable_weights


def replace_initializers(layer: Any, replacement: Callable[[Any, Any], Any]) -> None:
    """Replaces this package's initializers in a layer and all layers that it holds, also those it does not track.

    Args:
        layer: A layer or model.
        replacement: Called as `replacement(initializer, library)`; returns an initializer of that Keras.
    """
    library, waiting, seen = compat.library_of(layer), [layer], set()
    while waiting:
        holder = waiting.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        waiting += _children(holder)
        for name, value in list(vars(holder).items()):
            if isinstance(value, SparseScaledInit | OrthogonalInit):
                object.__setattr__(holder, name, replacement(value, library))
            elif isinstance(value, library.layers.Layer):
                waiting.append(value)


def _wrap_inside(old: Any, new: Any) -> None:
    """Wraps the layers inside a copy that are wrapped in the original: a config may not tell of what is inside."""
    library = compat.library_of(old)

    def wrap(old_layer: Any, new_layer: Any) -> tuple[Any, bool]:
        if isinstance(old_layer, library.Model) and _is_graph_network(old_layer, library):
            return _rebuild(old_layer, lambda layer, copy: copy(layer), {}), False
        if is_mask_wrapper(old_layer) and not is_mask_wrapper(new_layer):
            if tfmot_wrapper.is_wrapper(old_layer):
                return tfmot_wrapper.wrap_like(old_layer, new_layer), False
            return old_layer.wrap_like(new_layer), False
        return new_layer, not is_mask_wrapper(old_layer)

    _map_inside(old, new, wrap, {})


def _replace_inside(old: Any, new: Any, replace: Replace, done: dict[int, Any]) -> None:
    """Replaces layers inside `new`, which is `old` itself or a copy of it, by what `replace` says of those of `old`."""
    library = compat.library_of(old)

    def replaced(old_layer: Any, new_layer: Any) -> tuple[Any, bool]:
        if isinstance(old_layer, library.Model):
            return _rebuild(old_layer, replace, done), False
        result = replace(old_layer, lambda layer: new_layer if layer is old_layer else new_layer.layer)
        return (new_layer, not is_mask_wrapper(old_layer)) if result is None else (result, False)

    _map_inside(old, new, replaced, done)


def _map_inside(old: Any, new: Any, function: Callable[[Any, Any], tuple[Any, bool]], done: dict[int, Any]) -> None:
    """Replaces the layers in the attributes, lists and dicts of `new`, a layer of the same structure as `old`.

    Args:
        old: The layer that tells what is where.
        new: The layer to change; may be `old`.
        function: Called as `function(old_layer, new_layer)`. Returns the layer to put in the place of `new_layer`, and
            whether to go on with the layers inside.
        done: The result for each layer of `old` so far, by id.
    """
    layer_class = compat.library_of(old).layers.Layer

    def mapped(old_value: Any, new_value: Any) -> Any:
        """The new value with its layers replaced; the very same object where there is nothing to replace."""
        if isinstance(old_value, layer_class):
            if id(old_value) not in done:
                done[id(old_value)], inside = function(old_value, new_value)
                if inside:
                    _map_inside(old_value, new_value, function, done)
            return done[id(old_value)]
        if isinstance(old_value, list | tuple) and len(old_value) == len(new_value):
            items = [mapped(*pair) for pair in zip(old_value, new_value, strict=True)]
            changed = any(after is not before for after, before in zip(items, new_value, strict=True))
            return (tuple(items) if isinstance(new_value, tuple) else items) if changed else new_value
        if isinstance(old_value, dict) and old_value.keys() == new_value.keys():
            entries = {key: mapped(old_value[key], new_value[key]) for key in old_value}
            return entries if any(entries[key] is not new_value[key] for key in entries) else new_value
        return new_value

    for name, old_value in list(vars(old).items()):
        # Keras's own lists of what it tracks follow from the attributes.
        if name.startswith("_self_") or name in ("_layers", "_obj_reference_counts_dict") or name not in vars(new):
            continue
        before = vars(new)[name]
        after = mapped(old_value, before)
        if after is not before:
            if compat.library_of(new) is compat.tf_keras:
                _set_in_tf_keras(new, name, before, after)
            else:
                _set_in_keras(new, name, before, after)


def _set_in_tf_keras(holder: Any, name: str, before: Any, after: Any) -> None:
    tracked = getattr(holder, "_self_tracked_trackables", [])
    position = next((i for i, value in enumerate(tracked) if value is before), None)
    delattr(holder, name)
    setattr(holder, name, after)
    tracked = getattr(holder, "_self_tracked_trackables", [])
    if position is not None and tracked[-1] is vars(holder)[name]:
        # The order of the layers is the order of tracking.
        tracked.insert(position, tracked.pop())


def _set_in_keras(holder: Any, name: str, before: Any, after: Any) -> None:
    # Keras 3 keeps the layers of a holder in one list, in the order in which they came, and locks it at build.
    tracker = holder._tracker
    layers, ids = tracker.config["layers"][1], tracker.stored_ids["layers"]
    for old, new in _layer_pairs(before, after):
        if old is not new and id(old) in ids:
            layers[next(i for i, layer in enumerate(layers) if layer is old)] = new
            ids.remove(id(old))
            ids.add(id(new))
    locked = tracker.locked
    tracker.unlock()
    try:
        setattr(holder, name, after)
    finally:
        if locked:
            tracker.lock()


def _layer_pairs(before: Any, after: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(before, dict):
        before, after = list(before.values()), list(after.values())
    if isinstance(before, list | tuple):
        for pair in zip(before, after, strict=True):
            yield from _layer_pairs(*pair)
    elif isinstance(before, compat.keras.layers.Layer):
        yield before, after
