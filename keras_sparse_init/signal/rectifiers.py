"""Which layers of a model are ReLUs, and why others are not."""

from __future__ import annotations

import sys
from typing import Any

from keras_sparse_init import compat, watching

# The packages whose layers do nothing that their attributes do not say.
_KNOWN = ("keras", "tf_keras", "keras_sparse_init", "tensorflow_model_optimization")
_RELUS = (compat.keras.layers.ReLU, compat.tf_keras.layers.ReLU, *compat.RELU_OPERATIONS)
_LAMBDAS = (compat.keras.layers.Lambda, compat.tf_keras.layers.Lambda)


def rectifiers(model: Any) -> tuple[list[tuple[str, Any]], dict[str, str]]:
    """The layers of a model that end in a ReLU, max(x, 0), also when it is capped (ReLU6).

    Args:
        model: A model or layer of either Keras.

    Returns:
        `(found, others)`: name and layer of each that `watching.watch` can see; and what is not counted, by its name:
        other activations, recurrent layers, code of the user's own, in which functions cannot be seen.
    """
    found, others = [], {}
    if isinstance(model, compat.library_of(model).Model) and _has_own_code(model):
        others[model.name] = _own_code(model)
    for name, layer in watching.places(model) + watching.operations(model):
        if _is_relu(layer):
            found.append((name, layer))
        elif (why := _why_not(layer)) is not None:
            others[name] = why
    return found, others


def _is_relu(layer: Any) -> bool:
    if hasattr(layer, "state_size"):
        return False
    if isinstance(layer, _RELUS):
        # Neither a slope below 0 nor a threshold other than 0.
        return not any(float(getattr(layer, name, None) or 0) for name in ("negative_slope", "threshold"))
    return _is_relu_function(vars(layer).get("activation")) or _is_relu_function(function_of(layer))


def _is_relu_function(function: Any) -> bool:
    keras, tf_keras = compat.keras, compat.tf_keras
    known = [
        keras.activations.relu,
        keras.activations.relu6,
        keras.ops.relu,
        keras.ops.relu6,
        tf_keras.activations.relu,
    ]
    places = (("tensorflow", "nn"), ("jax", "nn"), ("torch.nn", "functional"))
    for module, attribute in places:
        # Whoever uses such a function has imported it.
        functions = getattr(sys.modules.get(module), attribute, None)
        known += [getattr(functions, name) for name in ("relu", "relu6") if hasattr(functions, name)]
    return any(function is relu for relu in known)


def function_of(layer: Any) -> Any:
    """The function of TensorFlow that a functional model of tf_keras calls in a layer made for that, or None."""
    return vars(layer).get("function") if hasattr(layer, "symbol") else None


def _why_not(layer: Any) -> str | None:
    """What a layer is that is no ReLU; None when it has no activation."""
    kind, is_layer = type(layer).__name__, isinstance(layer, compat.LAYERS)
    if is_layer and (compat.runs_loop(layer) or hasattr(layer, "state_size")):
        return f"{kind}, activations of gates"
    activation = vars(layer).get("activation")
    if callable(activation) and not compat.is_linear(activation):
        # A layer in the place of a function is one of the layers below.
        named = getattr(activation, "__name__", type(activation).__name__)
        return None if isinstance(activation, compat.LAYERS) else f"{kind}, {named}"
    if isinstance(layer, _RELUS):
        return f"{kind} with a slope or a threshold"
    if activation is None and isinstance(layer, compat.ACTIVATION_LAYERS):
        return kind
    if function_of(layer) is not None:
        return f"function {layer.symbol}" if str(layer.symbol).startswith("nn.") else None
    if not is_layer:
        return f"function {kind}" if type(layer).__module__ == compat.Relu.__module__ else None
    return _own_code(layer) if _has_own_code(layer) else None


def _has_own_code(layer: Any) -> bool:
    """Whether what a layer computes is code of the user's."""
    module = getattr(type(layer).call, "__module__", None) or ""
    return isinstance(layer, _LAMBDAS) or module.split(".")[0] not in _KNOWN


def _own_code(layer: Any) -> str:
    return f"{type(layer).__name__}, activation functions in its own code are not seen"
