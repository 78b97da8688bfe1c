"""Walking through models of either Keras, in model order and with names free of the session, and rebuilding them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from keras_sparse_init import compat, tfmot

# What Keras's layers call the weights that multiply their inputs; Keras 3 has some of them under a private name.
_KERNEL_NAMES = ("kernel", "recurrent_kernel", "depthwise_kernel", "pointwise_kernel", "embeddings")


class MaskWrapper:
    """Base of this package's layers that hold the masks of the layer inside them, `layer`."""

    def kernels_and_masks(self) -> list[tuple[Any, Any]]:
        """The variables of the masked kernels, each with its mask's."""
        raise NotImplementedError


def is_mask_wrapper(layer: Any) -> bool:
    """Whether a layer holds the masks of the layer inside it."""
    return isinstance(layer, MaskWrapper) or tfmot.is_wrapper(layer)


def kernels_of(layer: Any, names: Sequence[str] | None = None) -> list[tuple[str, Any, str]]:
    """The kernels of a layer and of the layers below it, in their order.

    Args:
        layer: A built layer.
        names: Attribute names that count as kernels, when not Keras's.

    Returns:
        (name, owner, attribute) for each: the path below `layer` with the attribute's public name, the layer that
        has it, and the attribute that holds the variable.
    """
    found, seen = [], set()
    for path, owner in [((), layer), *((path, below) for path, _, below in walk(layer))]:
        for attribute, value in vars(owner).items():
            public = attribute.removeprefix("_")
            if public in (names or _KERNEL_NAMES) and compat.is_variable(value) and id(value) not in seen:
                seen.add(id(value))
                found.append(("/".join((*path, public)), owner, attribute))
    return found


def initializer_of(layer: Any, attribute: str) -> Any:
    """The initializer that a layer has for the kernel of an attribute, or None."""
    attribute = attribute.removeprefix("_")
    names = (f"{attribute}_initializer", f"{attribute.removesuffix('_kernel')}_initializer", "depthwise_initializer")
    return next((getattr(layer, name) for name in names if getattr(layer, name, None) is not None), None)


def walk(layer: Any) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Any]]:
    """All layers below a model or layer, depth first in model order, each once.

    Yields:
        (path, canonical path, layer). A path lists layer names; a mask wrapper adds no name to the path of the layer
        inside it. In a canonical path, names that Keras numbered by itself (`dense_7`) are numbered anew among their
        siblings, so that it is the same whatever the process built before.
    """
    yield from _walk(layer, (), (), set())


def _walk(
    parent: Any, path: tuple[str, ...], canonical: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Any]]:
    counts: dict[str, int] = {}
    for child in parent._flatten_layers(recursive=False, include_self=False):
        if id(child) in seen:
            continue
        seen.add(id(child))
        named = child.layer if is_mask_wrapper(child) else child
        child_path = (*path, named.name)
        child_canonical = (*canonical, _canonical_name(named, counts))
        yield child_path, child_canonical, child
        if named is not child:
            seen.add(id(named))
            yield child_path, child_canonical, named
        yield from _walk(named, child_path, child_canonical, seen)


def _canonical_name(layer: Any, counts: dict[str, int]) -> str:
    stem = re.sub(r"_\d+$", "", layer.name)
    if stem.replace("_", "") != type(layer).__name__.lower():
        return layer.name
    counts[stem] = counts.get(stem, -1) + 1
    return f"{stem}_{counts[stem]}"


def owner_of(layer: Any, variable: Any) -> tuple[str, Any, str]:
    """The layer, among this one and those below it, that has a variable as its attribute.

    Returns:
        (path below `layer`, owner, attribute name). A weight that no attribute holds (one of a list, say) belongs to
        `layer` itself under the variable's own name.
    """
    for path, candidate in [((), layer), *((path, below) for path, _, below in walk(layer))]:
        for attribute, value in vars(candidate).items():
            if value is variable:
                return "/".join(path), candidate, attribute.removeprefix("_")
    return "", layer, variable.name.split("/")[-1].split(":")[0]


def rebuild(model: Any, replace: Callable[[Any, Callable[[Any], Any]], Any]) -> Any:
    """A model in which some layers are replaced; all others keep their weights.

    Sequential and functional models, nested ones too, are made anew and leave the original alone. A subclassed
    model cannot be made anew from its layers: those that its attributes, lists and dicts hold are replaced in place,
    and the model itself is returned.

    Args:
        model: A built model.
        replace: Called as `replace(layer, copy)` with each layer that is no model. Returns a new layer made of
            `copy(layer)` or of `copy(layer.layer)`, or None to keep the layer. `copy` gives the layer itself
            where the model is changed in place, else a new layer that gets the same weights.

    Returns:
        The model with the replacements. It is not compiled, unless it was changed in place.
    """
    library = compat.library_of(model)
    if not _is_graph_network(model, library):
        _replace_attributes(model, replace, {})
        for function in ("train_function", "test_function", "predict_function"):
            # What Keras traced of the old layers must not be called again.
            setattr(model, function, None)
        return model

    copies: list[tuple[Any, Any]] = []

    def copy(layer: Any) -> Any:
        new = type(layer).from_config(layer.get_config())
        copies.append((layer, new))
        return new

    def clone(layer: Any) -> Any:
        if isinstance(layer, library.Model):
            return rebuild(layer, replace)
        new = replace(layer, copy)
        return copy(layer) if new is None else new

    rebuilt = library.models.clone_model(model, clone_function=clone)
    if model.built and not rebuilt.built:
        rebuilt.build(model.input_shape)
    for old, new in copies:
        new.set_weights(old.get_weights())
    return rebuilt


def _is_graph_network(model: Any, library: Any) -> bool:
    return (
        isinstance(model, library.Sequential)
        or type(model).__name__ == "Functional"
        or (isinstance(model, library.Model) and getattr(model, "_is_graph_network", False))
    )


def _replace_attributes(parent: Any, replace: Callable[[Any, Callable[[Any], Any]], Any], done: dict[int, Any]) -> None:
    """Replaces layers in the attributes of an object that is no graph network, and of the layers below it."""
    library = compat.library_of(parent)

    def replaced(value: Any) -> Any:
        """The value with its layers replaced; the very same object where there is nothing to replace."""
        if isinstance(value, library.layers.Layer):
            if id(value) not in done:
                if isinstance(value, library.Model):
                    done[id(value)] = rebuild(value, replace)
                else:
                    new = replace(value, lambda layer: layer)
                    done[id(value)] = value if new is None else new
                    if new is None:
                        _replace_attributes(value, replace, done)
            return done[id(value)]
        if isinstance(value, list | tuple):
            items = [replaced(item) for item in value]
            changed = any(new is not old for new, old in zip(items, value, strict=True))
            return type(items)(items) if changed else value
        if isinstance(value, dict):
            entries = {key: replaced(item) for key, item in value.items()}
            return entries if any(entries[key] is not value[key] for key in entries) else value
        return value

    for name, value in list(vars(parent).items()):
        # Keras's own lists of what it tracks follow from the attributes.
        if name.startswith("_self_") or name in ("_layers", "_obj_reference_counts_dict"):
            continue
        new = replaced(value)
        if new is not value:
            delattr(parent, name)
            setattr(parent, name, new)
