"""Data-dependent norms of kernels, under masks: LSUV and MetaInit. Directions and zeros stay as they were drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from keras_sparse_init import compat, traversal
from keras_sparse_init.layers import WeightNorm
from keras_sparse_init.masked_kernel import masked_kernels
from keras_sparse_init.table import laid_out
from keras_sparse_init.watching import left_as_it_is, watch

# LSUV: how near 1 a standard deviation is to be, and how often a layer is measured for that.
_TOLERANCE, _TRIALS = 0.1, 50
# MetaInit: a step changes each norm by this part of its first value, with momentum; eps of the quotient.
_STEPS, _RATE, _MOMENTUM, _EPS = 100, 0.01, 0.9, 1e-5


@dataclasses.dataclass(frozen=True)
class KernelNorm:
    """What became of a kernel.

    Attributes:
        name: Its path in the model.
        scale: What it was multiplied by.
        std_before: Of "lsuv", the standard deviation of its layer's pre-activations over samples and units.
        std: The same, after.
    """

    name: str
    scale: float
    std_before: float | None = None
    std: float | None = None


@dataclasses.dataclass(frozen=True)
class NormReport:
    """What `calibrate_init` did to norms; `str()` lays it out for reading.

    Attributes:
        method: "lsuv" or "metainit".
        kernels: A `KernelNorm` for each kernel that was scaled, in the order of calls ("lsuv") or of the model.
        quotient_before: Of "metainit", the gradient quotient before.
        quotient: The same, after.
        skipped: Names of kernels that were not scaled, with the reason.
    """

    method: str
    kernels: list[KernelNorm]
    quotient_before: float | None
    quotient: float | None
    skipped: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-serializable values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lsuv = self.method == "lsuv"
        table = [("kernel", "scale", *(("pre std before", "after") if lsuv else ()))]
        for row in self.kernels:
            table.append((row.name, f"{row.scale:.4g}", *((f"{row.std_before:.4g}", f"{row.std:.4g}") if lsuv else ())))
        lines = [laid_out(table)]
        if not lsuv:
            lines.append(f"gradient quotient {self.quotient_before:.4g} before, {self.quotient:.4g} after")
        return "\n".join([*lines, *(f"not scaled: {name} ({why})" for name, why in self.skipped.items())])


def lsuv(model: Any, x: Any) -> NormReport:
    """Scales each kernel so that the pre-activations of its layer have the standard deviation 1 +- 0.1 on samples.

    Layer after layer in the order of calls, as in Mishkin and Matas 2015, arXiv:1511.06422, algorithm 1, of which the
    orthonormal draw before is left to the user. A kernel that no scale brings there, as its biases alone spread more,
    keeps its values and is named with what was not scaled.
    """
    x = compat.tensors_for(model, x)
    normalized = {
        id(below)
        for _, _, layer in traversal.walk(model)
        if isinstance(layer, WeightNorm)
        for below in layer._flatten_layers()
    }
    # The last kernel of a layer that has several: their product counts.
    places = {id(place.owner): place for place in traversal.kernels_of(model) if "embeddings" not in place.attribute}
    skipped = {
        place.path: "its layer is not seen to be called, or is an embedding" for place in traversal.kernels_of(model)
    }
    trained = _trained(model)
    rows = []
    for owner in _in_order_of_calls(model, x, places):
        place = places[id(owner)]
        if id(owner) in normalized or id(place.kernel) not in trained:
            skipped[place.path] = "its norm does not count: WeightNorm" if id(owner) in normalized else "frozen"
            continue
        before = std = _std(model, x, owner)
        scale, first = 1.0, compat.to_numpy("kernel", place.kernel).copy()
        for _ in range(_TRIALS):
            if not (math.isfinite(std) and std > 0) or abs(std - 1) <= _TOLERANCE:
                break
            value = compat.to_numpy("kernel", place.kernel)
            compat.assign(place.kernel, (value / std).astype(value.dtype))
            scale /= std
            std = _std(model, x, owner)
        if not (math.isfinite(std) and std > 0):
            skipped[place.path] = "its pre-activations are constant"
        elif abs(std - 1) > _TOLERANCE:
            skipped[place.path] = (
                f"no scale brings its standard deviation from {before:.4g} to 1; do biases spread more?"
            )
        if not abs(std - 1) <= _TOLERANCE:
            compat.assign(place.kernel, first)
            continue
        del skipped[place.path]
        rows.append(KernelNorm(place.path, scale, before, std))
    return NormReport("lsuv", rows, None, None, skipped)


def _trained(model: Any) -> set[int]:
    """Which variables are trained: a kernel of tf_keras does not know that its layer is frozen."""
    return {id(variable) for variable in model.trainable_variables}


def _in_order_of_calls(model: Any, x: Any, owners: dict[int, Any]) -> list[Any]:
    with watch(model) as items:
        model(x, training=False)
    return list({id(item.layer): item.layer for item in items if id(item.layer) in owners}.values())


def _std(model: Any, x: Any, owner: Any) -> float:
    """The standard deviation of what a layer puts out before its activation, over all its calls."""
    with watch(model, [owner]) as items:
        model(x, training=False)
    values = [compat.to_numpy("outputs", item.post if item.pre is None else item.pre).ravel() for item in items]
    return float(np.concatenate(values).astype(np.float64).std())


def metainit(model: Any, x: Any, y: Any, loss: Callable[..., Any] | None) -> NormReport:
    """Changes the norms of the kernels so that the gradient quotient on a batch becomes small.

    GQ = 1/N sum_i | (g_i - (H g)_i) / (g_i + eps s_i) - 1 |, with g the gradient of the loss in the N trainable weights
    that are not masked, H its Hessian, s_i = -1 where g_i < 0 and else 1, eps = 1e-5: how much a step along the
    gradient changes it. Norms move by signed descent with momentum; those with the smallest quotient met are kept.

    Reference:
        Dauphin and Schoenholz 2019, MetaInit: Initializing learning by learning to initialize, NeurIPS, algorithm 1.
    """
    if compat.backend_of(model) != "tensorflow":
        raise ValueError(
            "`method='metainit'` needs derivatives of derivatives on TensorFlow. "
            f"Received: a model on {compat.backend_of(model)}"
        )
    if isinstance(loss, str):
        loss = compat.library_of(model).losses.get(loss)
    x, y = compat.tensors_for(model, x), compat.tensors_for(model, y)
    trained = _trained(model)
    places = [place for place in traversal.kernels_of(model) if id(place.kernel) in trained]
    skipped = {place.path: "frozen" for place in traversal.kernels_of(model) if id(place.kernel) not in trained}
    if not places:
        raise ValueError(f"`model` must have kernels that are trained. Received: {model.name!r} without any")
    variables = [_variable(v) for v in model.trainable_variables]
    masks = {id(_variable(kernel.kernel)): kernel.mask_value() for kernel in masked_kernels(model)}
    ones = [tf.constant(masks.get(id(v), np.ones(v.shape)), tf.float32) for v in variables]
    count = float(sum(int(np.sum(mask)) for mask in map(np.asarray, ones)))
    kernels = [_variable(place.kernel) for place in places]

    def quotient_and_signs() -> tuple[Any, Any]:
        with tf.GradientTape() as third:
            with tf.GradientTape() as second:
                with tf.GradientTape() as first:
                    outputs = model(x, training=True)
                    value = model.compute_loss(x, y, outputs) if loss is None else tf.reduce_mean(loss(y, outputs))
                found = first.gradient(value, variables, unconnected_gradients="zero")
                g = [tf.convert_to_tensor(a) * m for a, m in zip(found, ones, strict=True)]
                half = tf.add_n([tf.nn.l2_loss(a) for a in g])
            products = second.gradient(half, variables, unconnected_gradients="zero")
            parts = [
                tf.reduce_sum(m * tf.abs((a - tf.convert_to_tensor(h)) / (a + _EPS * _sign(a)) - 1.0))
                for a, h, m in zip(g, products, ones, strict=True)
            ]
            quotient = tf.add_n(parts) / count
        slopes = third.gradient(quotient, kernels, unconnected_gradients="zero")
        signs = [tf.sign(tf.reduce_sum(tf.convert_to_tensor(s) * k)) for s, k in zip(slopes, kernels, strict=True)]
        return quotient, signs

    # TensorFlow's graph of the third derivative of a maximum pooling has a cycle.
    pooled = any("MaxPool" in type(layer).__name__ for _, _, layer in traversal.walk(model))
    measure = quotient_and_signs if pooled else tf.function(quotient_and_signs, autograph=False)
    first = [compat.to_numpy("kernel", place.kernel).copy() for place in places]
    scales = best = np.ones(len(places))
    speed, quotients = np.zeros(len(places)), []
    # Batch normalization moves its statistics; what stays is put in its place below.
    with left_as_it_is(model):
        for _ in range(_STEPS):
            for place, value, scale in zip(places, first, scales, strict=True):
                compat.assign(place.kernel, (value * scale).astype(value.dtype))
            quotient, signs = measure()
            quotients.append(float(quotient))
            if not quotients[1:] or quotients[-1] < min(quotients[:-1]):
                best = scales
            speed = _MOMENTUM * speed - _RATE * np.array([float(sign) for sign in signs])
            scales = np.maximum(scales + speed, _RATE * scales)
    for place, value, scale in zip(places, first, best, strict=True):
        compat.assign(place.kernel, (value * scale).astype(value.dtype))
    finite = [q for q in quotients if math.isfinite(q)]
    rows = [KernelNorm(place.path, float(scale)) for place, scale in zip(places, best, strict=True)]
    return NormReport("metainit", rows, quotients[0], min(finite, default=quotients[0]), skipped)


def _sign(values: Any) -> Any:
    return tf.stop_gradient(tf.where(values < 0, -1.0, 1.0))


def _variable(variable: Any) -> Any:
    """The TensorFlow variable of one of either Keras."""
    variable = getattr(variable, "_variable", variable)
    return variable if isinstance(variable, tf.Variable) else variable.value
