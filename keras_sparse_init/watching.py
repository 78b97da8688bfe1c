"""What goes through a model of either Keras as it runs: pre-activations and activations, layer by layer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from keras_sparse_init import compat, traversal

Replace = Callable[[str, int, str, Any], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Watched:
    """One call of a layer.

    Attributes:
        name: Path of the layer in the model.
        layer: The layer; of a wrapper, the layer inside it.
        call: How many calls of this layer are in the list before this one: a shared layer has several.
        pre: What the layer's activation was given, or what an activation layer was given. None for a layer that has no
            activation of its own.
        post: What came out of that activation; of a layer that has none, its output, a tensor or a nest.
    """

    name: str
    layer: Any
    call: int
    pre: Any
    post: Any


@contextlib.contextmanager
def watch(model: Any, layers: Sequence[Any] | None = None, replace: Replace | None = None) -> Iterator[list[Watched]]:
    """Lists what goes through the layers below a model when the model is called inside this context.

    An activation that is part of a layer (`Dense(8, "relu")`) is told apart from what it is given; a linear one gives
    its input, `pre is post`. Activation layers (Activation, ReLU, LeakyReLU, PReLU, ELU, Softmax, and subclasses) have
    `pre` too. Seen are the layers inside nested models, attention, TimeDistributed (one call for each time step in
    Keras 3; one call, of samples times time steps, in tf_keras) and wrappers. Recurrent layers and cells give their
    outputs alone: their activations are those of gates. What a loop or branch computes in a graph of its own (the cell
    of a recurrent layer, say) and what a layer does inside its `call` with functions (`tf.nn.relu`) is not seen.

    The values are the very tensors that flow, so that gradients go through them, also inside `tf.function` and
    `jax.grad`. For that the model must be called where the context was entered, as `model(x)`; `model.predict` runs in
    a function of its own and is not seen. Afterwards, every attribute of every layer is as before.

    Args:
        model: A built model or layer of either Keras.
        layers: The layers to watch, and operations of functional models in Keras 3; None for all layers.
        replace: A function of (name, call, "pre" or "post", value) that returns what goes on in the place of a value,
            and into the list.

    Yields:
        A list, to which each call of a layer adds a `Watched` when it is done.

    Raises:
        TypeError: When `model` is no Keras model or layer.
        ValueError: When one of `layers` is not below the model.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init.watching import watch
        >>> dense = keras.layers.Dense(2, "relu", kernel_initializer="ones", name="dense")
        >>> model = keras.Sequential([keras.layers.Input((3,)), dense])
        >>> with watch(model) as items:
        ...     outputs = model(-np.ones((1, 3)))
        >>> [(item.name, float(item.pre[0, 0]), float(item.post[0, 0])) for item in items]
        [('dense', -3.0, 0.0)]
    """
    found = places(model)
    if layers is not None:
        wanted = {id(layer) for layer in layers}
        found = [(name, layer) for name, layer in found + operations(model) if id(layer) in wanted]
        if missing := [layer.name for layer in layers if id(layer) not in {id(layer) for _, layer in found}]:
            raise ValueError(f"`layers` must be layers below the model {model.name!r}. Not there: {', '.join(missing)}")
    items: list[Watched] = []
    swapped: list[tuple[Any, str, bool, Any]] = []

    def swap(layer: Any, attribute: str, value: Any) -> None:
        # Past Keras's tracking: for it the layer never changes.
        swapped.append((layer, attribute, attribute in vars(layer), vars(layer).get(attribute)))
        object.__setattr__(layer, attribute, value)

    here = _Here()
    try:
        for layer in model, *(layer for _, _, layer in traversal.walk(model)):
            if compat.loops_only_for_safety(layer):
                swap(layer, "_always_use_reshape", True)
                # For the mask it runs a model inside it a second time.
                swap(layer, "compute_mask", here.unseen(layer.compute_mask))
        for name, layer in found:
            seen = _Seen(name, layer, items, here, replace)
            method = "call" if getattr(layer, "quantization_mode", None) is None else "quantized_call"
            swap(layer, method, _watched_call(getattr(layer, method), seen))
            if seen.has_activation:
                swap(layer, "activation", _watched_activation(layer.activation, seen))
        yield items
    finally:
        for layer, attribute, had, value in reversed(swapped):
            if had:
                object.__setattr__(layer, attribute, value)
            else:
                object.__delattr__(layer, attribute)


@contextlib.contextmanager
def left_as_it_is(model: Any) -> Iterator[None]:
    """Puts every variable of a model back at the end, bit for bit.

    A forward pass alone changes some: tfmot's wrappers mask their kernels in place, stateful layers go on.
    """
    with unchanged(variables_of(model)):
        yield


def variables_of(model: Any) -> list[Any]:
    """Every variable of a model, once, with what its layers hold besides their weights."""
    # The state of a stateful recurrent layer is none of its weights.
    held = [variable for layer in model._flatten_layers() for variable in _variables_in(list(vars(layer).values()))]
    return list({id(variable): variable for variable in [*traversal.variables(model), *held]}.values())


@contextlib.contextmanager
def unchanged(variables: Sequence[Any]) -> Iterator[None]:
    """Puts variables back at the end, bit for bit."""
    before = [pair for variable in variables if compat.has_value(variable) for pair in compat.kept_values(variable)]
    try:
        yield
    finally:
        for variable, value in before:
            compat.put_back(variable, value)


def _variables_in(nest: Any) -> Iterator[Any]:
    if isinstance(nest, dict):
        nest = list(nest.values())
    if isinstance(nest, list | tuple):
        for item in nest:
            yield from _variables_in(item)
    elif compat.is_variable(nest):
        yield nest


def places(model: Any) -> list[tuple[str, Any]]:
    """The layers that `watch` can see, with unique names: those below a model; a bare layer and those below it."""
    walked = isinstance(model, compat.library_of(model).Model) or traversal.is_layer_wrapper(model)
    found: list[tuple[str, Any]] = []
    hidden: set[int] = set()
    for path, _, layer in [*([] if walked else [((model.name,), (), model)]), *traversal.walk(model)]:
        if compat.runs_loop(layer):
            hidden.update(id(part) for part in layer._flatten_layers(include_self=False))
        if id(layer) not in hidden and not traversal.is_layer_wrapper(layer):
            found.append((traversal.unused("/".join(path), {name for name, _ in found}), layer))
    return found


def operations(model: Any) -> list[tuple[str, Any]]:
    """The operations of functional models of Keras 3 that are no layers (`keras.ops.relu`), with their names."""
    found: list[tuple[str, Any]] = []
    for path, _, part in [((), (), model), *traversal.walk(model)]:
        is_functional = isinstance(part, compat.keras.Model) and hasattr(part, "operations")
        for operation in part.operations if is_functional else ():
            if not isinstance(operation, compat.keras.layers.Layer):
                name = "/".join((*path, operation.name))
                found.append((traversal.unused(name, {name for name, _ in found}), operation))
    return found


class _Here:
    """Whether what runs now is to be seen: in the graph in which it began, and not for the sake of a mask."""

    def __init__(self) -> None:
        self.trace, self.masking = compat.current_trace(), False

    def __bool__(self) -> bool:
        # A tensor of the body of a loop has no value outside it.
        return not self.masking and compat.current_trace() is self.trace

    def unseen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def compute_mask(*args: Any, **kwargs: Any) -> Any:
            before, self.masking = self.masking, True
            try:
                return function(*args, **kwargs)
            finally:
                self.masking = before

        return compute_mask


class _Seen:
    """Where what is seen of one layer goes."""

    def __init__(self, name: str, layer: Any, items: list[Watched], here: _Here, replace: Replace | None):
        self.name, self.layer, self.items, self.here, self.replace = name, layer, items, here, replace
        self.is_activation = isinstance(layer, compat.ACTIVATION_LAYERS + compat.RELU_OPERATIONS)
        activation = vars(layer).get("activation", "")
        # The activations of cells are those of gates; in a layer of the user's it may be a name.
        ends_in_one = not self.is_activation and not hasattr(layer, "state_size")
        self.has_activation = ends_in_one and (activation is None or callable(activation))
        self.activated = 0

    @property
    def calls(self) -> int:
        return sum(item.layer is self.layer for item in self.items)

    def value(self, kind: str, value: Any) -> Any:
        if self.replace is None or not self.here:
            return value
        return self.replace(self.name, self.calls, kind, value)

    def add(self, pre: Any, post: Any) -> bool:
        here = bool(self.here)
        if here:
            self.items.append(Watched(self.name, self.layer, self.calls, pre, post))
        return here


# The functions that take the place of a layer's own are as short as can be: inside a `tf.function`, TensorFlow rewrites
# their Python so that it can rewrite that of the layer, as it would without them.


def _watched_call(function: Callable[..., Any], seen: _Seen) -> Callable[..., Any]:
    @compat.not_rewritten
    def begin(args: Any, kwargs: Any) -> Any:
        state = args, kwargs, seen.activated
        if seen.is_activation:
            first = next(iter(kwargs)) if not args else None
            pre = seen.value("pre", args[0] if args else kwargs[first])
            state = ((pre, *args[1:]) if args else args), (kwargs if args else {**kwargs, first: pre}), pre
        return state

    @compat.not_rewritten
    def end(state: Any, outputs: Any) -> Any:
        if seen.is_activation:
            outputs = seen.value("post", outputs)
            seen.add(state[2], outputs)
        elif seen.activated == state[2]:
            outputs = seen.value("post", outputs)
            seen.add(None, outputs)
        return outputs

    def call(*args, **kwargs):
        state = begin(args, kwargs)
        outputs = function(*state[0], **state[1])
        return end(state, outputs)

    # Wrappers ask a layer's `call` for the names of its arguments.
    with contextlib.suppress(TypeError, ValueError):
        call.__signature__ = inspect.signature(function)
    return call


def _watched_activation(function: Callable[..., Any] | None, seen: _Seen) -> Callable[..., Any]:
    @compat.not_rewritten
    def begin(value: Any) -> Any:
        return seen.value("pre", value)

    @compat.not_rewritten
    def end(pre: Any, post: Any) -> Any:
        post = seen.value("post", post)
        seen.activated += seen.add(pre, post)
        return post

    if function is None or compat.is_linear(function):
        return lambda value: end(value := begin(value), value)

    def activation(value, *args, **kwargs):
        pre = begin(value)
        post = function(pre, *args, **kwargs)
        return end(pre, post)

    return activation
