"""Data-dependent initialization of ReLU layers: which samples their units are on for, by a bias or a linear program."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from keras_sparse_init import compat, traversal
from keras_sparse_init.arguments import (
    check_all_finite,
    check_choice,
    check_finite,
    check_positive,
    check_seed,
    is_integer,
)
from keras_sparse_init.batches import batches
from keras_sparse_init.calibration.norms import NormReport, lsuv, metainit
from keras_sparse_init.calibration.relu_layers import LAYOUTS, WITH_FEATURES, relu_layers
from keras_sparse_init.calibration.report import AffineFit, CalibrationReport, LayerCalibration, Zeros
from keras_sparse_init.calibration.unit_programs import (
    OBJECTIVES,
    Objective,
    UnitPrograms,
    quantile_bias,
    varies,
    wanted_signs,
)
from keras_sparse_init.calibration.unit_solvers import SOLVERS, Solver, solve
from keras_sparse_init.sampling import derive_seed
from keras_sparse_init.signal.rectifiers import rectifiers
from keras_sparse_init.signal.relu_zeros import relu_zeros
from keras_sparse_init.watching import watch

Method = Literal["bias", "lp", "none", "lsuv", "metainit"]
METHODS = ("bias", "lp", "none", "lsuv", "metainit")

# What moving a weight by s0 costs, in units of the margin, spread over the unit's weights.
_STAY = 0.01
# The most positions of a convolution that count, of all samples together: of linear programs, of biases and scales.
_PATCHES = {"lp": 1024, "bias": 4096, "none": 4096}
# The most samples for the best affine fit, of which it needs more than there are inputs.
_FIT, _BATCH = 4096, 1024


def calibrate_init(
    model: Any,
    x: Any,
    method: Method = "bias",
    on_fraction: float = 0.75,
    objective: Objective = "fraction",
    radius: float = 0.25,
    margin: float = 0.5,
    bias_radius: float = 1.0,
    n_samples: int = 512,
    calibrate_scale: bool = True,
    solver: Solver = "pdhg",
    seed: int = 0,
    *,
    y: Any = None,
    loss: Any = None,
) -> CalibrationReport | NormReport:
    """Initializes the layers of a model on data: ReLUs that are on for a part of the samples, or norms of kernels.

    lsuv: each kernel is scaled so that its layer's pre-activations have a standard deviation of 1 +- 0.1 over samples
    and units, layer after layer. metainit: norms of kernels move so that the gradient quotient of the loss becomes
    small. Both scale whole kernels under their masks, and change nothing else; layers of all kinds, with or without
    ReLU. See `calibration.norms` for the formulas. What follows is on the other three.

    bias: b_j = -quantile_{1-p}(z_j), p = on_fraction. lp, for each unit, from its weights w0 on its mask S:

        minimize    mean_i xi_i + lambda / (|S| s0) sum_k |w_k - w0_k|
        subject to  sign_i (w.h_i + b) + xi_i >= m,  xi_i >= 0,
                    |w_k - w0_k| <= radius s0,  <w, w0> = <w0, w0>,  |b| <= bias_radius std(z)

    with h the layer's inputs, z = w0.h, s0 = rms(w0), m = margin s0 rms||h_S|| and lambda = 0.01 m. Layer after layer
    in the order of calls, each on what those before put out by then. Calibrated are dense layers and convolutions
    (for "bias" transposed and depthwise ones too) with a bias and a ReLU: as their activation, or in the layer right
    after. Frozen layers (`trainable=False`) stay as they are; weights off a mask are no variables and stay exactly 0.
    Draw the kernels first, see `reinitialize`. All calls of a shared layer count together, on the inputs that they have
    before.

    All units on is a trap, not a goal: such a network has the fewest zeros and is affine.

    Args:
        model: A built model of either Keras. It runs as at prediction.
        x: Samples: an array; a list or dict of arrays for several inputs; or a `tf.data.Dataset` of batches.
        method: "bias" sets biases, "lp" weights and biases; "none" neither, only scales. "lsuv" and "metainit" scale
            kernels; of the other arguments they take `n_samples`, `seed` and, "metainit", `y` and `loss`.
        on_fraction: p, for which part of the samples a unit is to be on, in (0, 1).
        objective: Of "lp", the signs: "fraction", on for the part `on_fraction` of the samples with the largest z;
            "zeros", on for all, which has the fewest zeros; "margin", as z is, with fewer samples near 0.
        radius: How far a weight may move, in s0.
        margin: How far from 0 pre-activations are to be, in s0 rms||h_S||, about the rms of z.
        bias_radius: Largest bias, in standard deviations of z.
        n_samples: How many samples, drawn from `x`; of a dataset the first. The positions of a convolution count as
            samples, 1024 of them for "lp" and 4096 for the others.
        calibrate_scale: Whether each layer's kernel and bias are then multiplied by a number with which the mean square
            of its outputs is half that of z: what ReLUs of symmetric weights give, so that the scale of the draw stays
            (in a deep network units that are on more often make it grow from layer to layer). Signs stay.
        solver: "pdhg", all units of a layer at once to a proven gap of 0.001 m; "highs", exact, one by one, by SciPy.
        seed: Non-negative int, for what is drawn from samples and positions.
        y: Of "metainit", the targets, an array.
        loss: Of "metainit", a function of (y, outputs), a Keras loss or its name; None is that of `compile`.

    Returns:
        A `CalibrationReport`, of "lsuv" and "metainit" a `NormReport`; `str()` of it is a table to read.

    Raises:
        TypeError: When `model` is no Keras model or layer.
        ValueError: When an argument is not one of those allowed, the model is not built, has no ReLU that can be seen
            or no layer to calibrate, or a sample or an output is not finite. Nothing has been changed then, as on any
            other error.
        ImportError: When SciPy is not installed, for "highs".

    Warns:
        UserWarning: When the model is an affine function on the data, or nearly: its non-linearity is below 0.01.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import calibrate_init
        >>> layers = [keras.layers.Dense(8, "relu", name="hidden"), keras.layers.Dense(1, name="out")]
        >>> model = keras.Sequential([keras.layers.Input((3,)), *layers])
        >>> x = np.random.default_rng(0).normal(size=(400, 3)).astype("float32")
        >>> report = calibrate_init(model, x, on_fraction=0.75, n_samples=200)
        >>> report.layers[0].name, report.layers[0].zeros, report.skipped
        ('hidden', 0.25, {'out': 'Dense, no ReLU after it'})

    Reference:
        He et al. 2015, arXiv:1502.01852, section 2.2: half of the mean square. The solver: Chambolle and Pock 2011.
    """
    check_choice("method", method, METHODS)
    check_choice("objective", objective, OBJECTIVES)
    check_choice("solver", solver, SOLVERS)
    if not 0.0 < check_finite("on_fraction", on_fraction) < 1.0:
        raise ValueError(f"`on_fraction` must be a float in (0, 1). Received: on_fraction={on_fraction}")
    for name, value in (("radius", radius), ("bias_radius", bias_radius)):
        if check_finite(name, value) < 0:
            raise ValueError(f"`{name}` must be a float of at least 0. Received: {name}={value}")
    check_positive("margin", margin)
    if not is_integer(n_samples) or n_samples < 2:
        raise ValueError(f"`n_samples` must be an int of at least 2. Received: n_samples={n_samples!r}")
    if not isinstance(calibrate_scale, bool | np.bool_):
        raise ValueError(f"`calibrate_scale` must be a bool. Received: calibrate_scale={calibrate_scale!r}")
    check_seed(seed)
    compat.library_of(model)
    compat.require_built(model, "weights")
    if (method == "metainit") != (y is not None) or (loss is not None and y is None):
        raise ValueError(f"`y` (and `loss`) must be given with method='metainit', and only then. Received: {method=}")
    if method in ("lsuv", "metainit"):
        return _norms(model, x, y, loss, method, n_samples, seed)

    with _all_or_nothing(model) as changed:
        samples, more = _samples(x, n_samples, seed)
        layers, skipped = relu_layers(model, samples, WITH_FEATURES if method == "lp" else LAYOUTS)
        fit = AffineFit(_flat(more))
        before, linear_before = _measured(model, samples, more, fit)
        done: dict[str, dict[str, Any]] = {}
        for number, layer in enumerate(layers):
            units = layer.units(model, samples, method == "lp", _PATCHES[method], derive_seed(seed, f"layer {number}"))
            if units is None:
                skipped[layer.name] = f"{type(layer.layer).__name__}, its outputs are not its kernel times its inputs"
                continue
            known: dict[str, Any] = {"calibrated": layer.name, "without_inputs": int((~varies(units.z)).sum())}
            kernel, z, bias = None, units.z, compat.to_numpy("bias", layer.layer.bias).astype(np.float64)
            if method == "bias":
                bias = quantile_bias(z, on_fraction)
            elif method == "lp":
                signs = wanted_signs(z, objective, on_fraction)
                programs = UnitPrograms.of(
                    units.features, units.kernel, units.mask, signs, radius, margin, bias_radius, _STAY
                )
                solution = solve(programs, solver)
                kernel, bias = programs.weights_and_bias(solution.u, solution.v)
                z = units.features @ kernel
                known |= {"gap": solution.gap, "iterations": solution.iterations}
            known["scale"] = _scale(units.z, z + bias) if calibrate_scale else 1.0
            layer.assign(kernel, bias, known["scale"])
            changed += [layer.kernel, layer.layer.bias]
            done |= dict.fromkeys(layer.relus, known)
        if not done:
            listed = "; ".join(f"{name} ({why})" for name, why in skipped.items())
            raise ValueError(f"`model` must have a layer with a kernel, a bias and a ReLU. Received: {listed}")
        after, linear = _measured(model, samples, more, fit)
    rows = {
        name: LayerCalibration.of(name, _of_layer(before, name), _of_layer(after, name), **done.get(name, {}))
        for name, _ in before
    }
    lost = sum(row.without_inputs for row in rows.values())
    total = LayerCalibration.of("total", before, after, without_inputs=lost)
    count = len(next(iter(before.values())))
    report = CalibrationReport(method, count, [*rows.values()], total, linear_before, linear, skipped)
    if report.is_affine:
        nearly = "" if total.patterns == 1 else "nearly "
        known = "unknown" if linear is None else f"{linear:.2g}"
        warnings.warn(
            f"The model {model.name!r} is {nearly}an affine function on the data after calibration: "
            f"{total.zeros:.2%} zeros, {total.patterns} activation patterns, non-linearity {known}. Units that are on "
            "for all samples are linear; see `on_fraction` and `objective`",
            stacklevel=2,
        )
    return report


def _norms(model: Any, x: Any, y: Any, loss: Any, method: str, n_samples: int, seed: int) -> NormReport:
    if method == "lsuv":
        with _all_or_nothing(model) as changed:
            report = lsuv(model, _samples(x, n_samples, seed)[0])
            changed += [place.kernel for place in traversal.kernels_of(model)]
        return report
    if loss is None and getattr(model, "optimizer", None) is None:
        raise ValueError("`loss` must be given with method='metainit', or the model compiled. Received: loss=None")
    if isinstance(x, tf.data.Dataset):
        raise TypeError("`x` must be an array with method='metainit', or a list or dict of them. Received: a dataset")
    samples, targets = _samples({"x": x, "y": np.asarray(y)}, n_samples, seed)[0].values()
    return metainit(model, samples, targets, loss)


def _scale(z: np.ndarray, new: np.ndarray) -> float:
    """What `new` is multiplied by so that the mean square of its ReLUs is half that of z; 1 when one of them is 0."""
    wanted, found = 0.5 * np.mean(z**2), np.mean(np.maximum(new, 0.0) ** 2)
    return float(np.sqrt(wanted / found)) if wanted > 0 and found > 0 else 1.0


def _of_layer(zeros: Zeros, name: str) -> Zeros:
    return {key: value for key, value in zeros.items() if key[0] == name}


def _measured(model: Any, samples: Any, more: Any, fit: AffineFit) -> tuple[Zeros, float | None]:
    """Where ReLUs are 0 on samples, and the non-linearity on these or more."""
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    for batch in relu_zeros(model, samples):
        for key, zeros in batch.items():
            found.setdefault(key, []).append(zeros)
    outputs = np.concatenate([_outputs(model, inputs) for _, inputs in batches(more, _BATCH)])
    return {key: np.concatenate(zeros) for key, zeros in found.items()}, fit.non_linearity(outputs)


def _outputs(model: Any, inputs: Any) -> np.ndarray:
    """What the model puts out, (samples, ...), before a last activation that is no ReLU."""
    relus = {id(layer) for _, layer in rectifiers(model)[0]}
    with watch(model) as items:
        outputs = model(inputs, training=False)
    last = [item for item in items if item.post is outputs and item.pre is not None and id(item.layer) not in relus]
    values = last[0].pre if last else outputs
    values = _flat(_mapped(lambda part: compat.to_numpy("outputs", part), values))
    check_all_finite(f"What the model {model.name!r} puts out for `x`", values)
    return values


def _samples(x: Any, number: int, seed: int) -> tuple[Any, Any]:
    """Some samples of x, and as many as the best affine fit needs: more than there are inputs."""
    given_order = isinstance(x, tf.data.Dataset)
    if given_order:
        _, x = next(batches(x.unbatch().batch(max(number, _FIT)), None))
    total, x = next(batches(x, sys.maxsize))
    random = np.random.default_rng(derive_seed(seed, "samples"))
    rows = np.arange(total) if given_order else random.permutation(total)
    if total < 2:
        raise ValueError(f"`x` must have at least 2 samples. Received: {total}")
    _mapped(lambda part: check_all_finite("`x`", part), x)
    inputs = _flat(_mapped(lambda part: part[:1], x)).shape[1]
    most = max(number, min(2 * (inputs + 1), _FIT))
    return tuple(_mapped(lambda part, end=end: part[np.sort(rows[:end])], x) for end in (number, most))


def _mapped(function: Callable[[Any], Any], nest: Any) -> Any:
    if isinstance(nest, dict):
        return {key: _mapped(function, part) for key, part in nest.items()}
    return [_mapped(function, part) for part in nest] if isinstance(nest, list | tuple) else function(nest)


def _flat(nest: Any) -> np.ndarray:
    """The arrays of a nest side by side, of shape (samples, numbers)."""
    parts: list[np.ndarray] = []
    _mapped(lambda part: parts.append(part.reshape(len(part), -1).astype(np.float64)), nest)
    return np.concatenate(parts, axis=1)


@contextlib.contextmanager
def _all_or_nothing(model: Any) -> Iterator[list[Any]]:
    """Puts all variables of a model back at the end, but those listed by then; those too on an error."""
    before = [(variable, np.array(compat.to_numpy("weight", variable))) for variable in traversal.variables(model)]
    changed: list[Any] = []
    try:
        yield changed
    except BaseException:
        changed.clear()
        raise
    finally:
        kept = {id(variable) for variable in changed}
        for variable, value in before:
            if id(variable) not in kept:
                compat.assign(variable, value)
