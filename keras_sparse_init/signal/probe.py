"""One pass through a model of either Keras, forward and backward: the values of every layer, and their gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from keras_sparse_init import compat
from keras_sparse_init.watching import Watched, watch

Objective = Callable[[Any, Any], Any]


class Place(NamedTuple):
    """Where in the list of values of a pass pre-activations, if any, and activations of a layer's call are."""

    name: str
    layer: Any
    pre: int | None
    post: int


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """A tensor that came out of a layer in one call.

    Attributes:
        name: Path of the layer, with the number of the call when it is called several times: "dense (2)".
        layer: The layer.
        pre: What its activation was given, or None.
        post: What came out of the activation, or the layer's output.
        gradient: The gradient for `post`; None when nothing depends on it, or it is none of numbers.
    """

    name: str
    layer: Any
    pre: Any
    post: Any
    gradient: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """What a pass has shown: layers in the order of their calls, the gradients of the kernels, the outputs."""

    seen: list[Seen]
    kernel_gradients: list[Any]
    outputs: list[Any]


class Sums(Protocol):
    """Takes the place of what is seen, so that it need not leave the traced function."""

    def pack(self, count: int, places: list[Place], values: list[Any], gradients: list[Any], outputs: list[Any]) -> Any:
        """Tensors, for `values` of `count` samples, `gradients` for those at `places`, and `outputs`."""

    def unpack(self, packed: Any) -> tuple[list[Any], list[Any], list[Any]]:
        """What is made of these, for each value, gradient and output."""


class Probe:
    """A function of (x, target) that runs a model forward and backward and gives what is seen.

    Args:
        model: A built model.
        kernels: The variables whose gradients are wanted; they may be frozen.
        objective: A function of (outputs, target) that returns a scalar tensor. Gradients are those of it.
        training: Whether the model runs as in training.
        compiled: Whether the pass is traced once and then reused. On JAX it always is.
        sums: What is made of all that is seen, inside the traced function, in its place; TensorFlow only.
    """

    def __init__(
        self,
        model: Any,
        kernels: list[Any],
        objective: Objective,
        training: bool,
        compiled: bool,
        sums: Sums | None = None,
    ) -> None:
        self._places: list[Place] = []
        self._sums = sums
        # The ids of all layers that have been seen to be called.
        self.called: set[int] = set()
        # Names of the calls that no dense tensor came out of, with the reason why they are not seen.
        self.without_tensor: dict[str, str] = {}
        # Whether a pass changes variables: known when it is traced; on JAX it never does.
        self._writes = [False] if compat.backend_of(model) == "jax" else []
        self._run = _RUNS[compat.backend_of(model)](self, model, kernels, objective, training, compiled)

    @property
    def is_pure(self) -> bool:
        """Whether it is known that a pass changes no variable of the model."""
        return bool(self._writes) and not any(self._writes)

    def __call__(self, x: Any, target: Any) -> Pass:
        """Runs once on tensors or nests of them. What is one tensor is one array, which may share its memory."""
        *shown, kernel_gradients = self._run(x, target)
        values, gradients, outputs = map(_arrays, shown) if self._sums is None else self._sums.unpack(*shown)
        seen = [
            Seen(name, layer, None if pre is None else values[pre], values[post], gradient)
            for (name, layer, pre, post), gradient in zip(self._places, gradients, strict=True)
        ]
        return Pass(seen, _arrays(kernel_gradients), outputs)

    def shown(self, count: int, values: list[Any], gradients: list[Any], outputs: list[Any]) -> tuple[Any, ...]:
        """What the traced function returns of `values` of `count` samples, gradients for places, and outputs."""
        if self._sums is None:
            return values, gradients, outputs
        return (self._sums.pack(count, self._places, values, gradients, outputs),)

    def sort(self, items: list[Watched]) -> tuple[list[Any], list[Any]]:
        """Keeps what is where, and returns the different tensors that were watched, and all that came out of layers."""
        names = [item.name for item in items]
        self._places, posts = [], []
        values: dict[int, Any] = {}
        index: dict[int, int] = {}
        self.called = {id(item.layer) for item in items}
        for item in items:
            if _repeats(item, values):
                continue
            name = item.name if names.count(item.name) == 1 else f"{item.name} ({item.call + 1})"
            leaves = compat.tensors_of(item.post)
            if not leaves:
                self.without_tensor[name] = f"its output is no dense tensor: {type(item.post).__name__}"
            for i, post in enumerate(leaves):
                pre = item.pre if i == 0 else None
                for tensor in (pre, post):
                    if tensor is not None and id(tensor) not in values:
                        index[id(tensor)] = len(values)
                        values[id(tensor)] = tensor
                name_of_part = name if i == 0 else f"{name}[{i}]"
                self._places.append(Place(name_of_part, item.layer, index.get(id(pre)), index[id(post)]))
                posts.append(post)
        return list(values.values()), posts


def _of_tensorflow(
    probe: Probe, model: Any, kernels: list[Any], objective: Objective, training: bool, compiled: bool
) -> Any:
    import tensorflow as tf

    sources = [getattr(kernel, "_variable", kernel) for kernel in kernels]
    sources = [kernel if isinstance(kernel, tf.Variable) else kernel.value for kernel in sources]

    def run(x: Any, target: Any) -> Any:
        with tf.GradientTape() as tape:
            # Frozen layers are recorded by what goes in; tokens have no gradient.
            tape.watch([value for value in tf.nest.flatten(x) if value.dtype.is_floating] + sources)
            with watch(model) as items:
                outputs = model(x, training=training)
            value = objective(outputs, target)
        values, posts = probe.sort(items)
        wanted = [post for post in posts if post.dtype.is_floating]
        found = tape.gradient(value, wanted + sources)
        found = [None if g is None else tf.convert_to_tensor(g) for g in found]
        gradients = dict(zip(map(id, wanted), found, strict=False))
        if compiled:
            probe._writes.append(_has_writes(compat.current_trace()))
        count = tf.nest.flatten(x)[0].shape[0]
        shown = probe.shown(count, values, [gradients.get(id(post)) for post in posts], tf.nest.flatten(outputs))
        return *shown, found[len(wanted) :]

    return tf.function(run, autograph=False) if compiled else run


def _has_writes(graph: Any) -> bool:
    """Whether a graph of TensorFlow has an operation that may change a variable."""
    definition = graph.as_graph_def()
    names = {
        node.op for nodes in (definition.node, *(f.node_def for f in definition.library.function)) for node in nodes
    }
    names -= {"ReadVariableOp", "ResourceGather", "ResourceGatherNd"}
    return any(name.startswith(("Assign", "Resource", "Rng", "Scatter")) for name in names)


def _of_jax(probe: Probe, model: Any, kernels: list[Any], objective: Objective, training: bool, compiled: bool) -> Any:
    import jax
    import jax.numpy as jnp

    tree = jax.tree_util
    trainable, others = list(model.trainable_variables), list(model.non_trainable_variables)
    ids = [id(variable) for variable in trainable + others]
    wanted = [ids.index(id(kernel)) for kernel in kernels]
    # For each tensor that came out of a layer, which of the zeros was added to it.
    order: list[int | None] = []

    def run(zeros: Any, sources: Any, values: Any, x: Any, target: Any) -> Any:
        values = list(values)
        for index, source in zip(wanted, sources, strict=True):
            values[index] = source
        made: list[Any] = []

        def add_zero(value: Any) -> Any:
            # What an outer layer puts out may be what an inner one has.
            if not jnp.issubdtype(value.dtype, jnp.floating) or any(value is other for other in made):
                return value
            made.append(value if zeros is None else value + zeros[len(made)])
            return made[-1]

        def replace(name: str, call: int, kind: str, value: Any) -> Any:
            return tree.tree_map(add_zero, value) if kind == "post" else value

        with watch(model, replace=replace) as items:
            outputs, _ = model.stateless_call(values[: len(trainable)], values[len(trainable) :], x, training=training)
        found, posts = probe.sort(items)
        order[:] = [next((i for i, value in enumerate(made) if value is post), None) for post in posts]
        return objective(outputs, target), (found, tree.tree_leaves(outputs), made)

    @jax.jit
    def backward(sources: Any, values: Any, x: Any, target: Any) -> Any:
        # Gradients for what flows inside are those for zeros that are added to it.
        _, (_, _, shapes) = jax.eval_shape(lambda *args: run(None, *args), sources, values, x, target)
        zeros = [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]
        gradient = jax.grad(run, argnums=(0, 1), has_aux=True)
        (gradients, of_kernels), (found, outputs, _) = gradient(zeros, sources, values, x, target)
        return found, gradients, of_kernels, outputs

    def at(x: Any, target: Any) -> Any:
        values = [variable.value for variable in trainable + others]
        found, gradients, of_kernels, outputs = backward([values[index] for index in wanted], values, x, target)
        return found, [None if index is None else gradients[index] for index in order], outputs, of_kernels

    return at


def _of_torch(
    probe: Probe, model: Any, kernels: list[Any], objective: Objective, training: bool, compiled: bool
) -> Any:
    import keras
    import torch

    sources = [kernel.value for kernel in kernels]

    def run(x: Any, target: Any) -> Any:
        for value in keras.tree.flatten(x):
            if value.is_floating_point():
                value.requires_grad_()
        with watch(model) as items:
            outputs = model(x, training=training)
        values, posts = probe.sort(items)
        wanted = [value for value in posts + sources if value.requires_grad]
        found = torch.autograd.grad(objective(outputs, target), wanted, allow_unused=True)
        gradients = dict(zip(map(id, wanted), found, strict=True))
        return (
            values,
            [gradients.get(id(post)) for post in posts],
            keras.tree.flatten(outputs),
            [gradients.get(id(kernel)) for kernel in sources],
        )

    return run


def _arrays(items: list[Any]) -> list[Any]:
    return [None if item is None else compat.view(item) for item in items]


def _repeats(item: Watched, values: dict[int, Any]) -> bool:
    """Whether a layer that is made of layers puts out what one of them has put out: a nested model, say."""
    inside = any(True for _ in item.layer._flatten_layers(include_self=False))
    return inside and item.pre is None and all(id(tensor) in values for tensor in compat.tensors_of(item.post))


_RUNS = {"tensorflow": _of_tensorflow, "jax": _of_jax, "torch": _of_torch}
