"""`measure_signal`: what an initialization does to signals and gradients on their way through a model."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from keras_sparse_init import compat, traversal
from keras_sparse_init.arguments import check_seed, is_integer
from keras_sparse_init.masked_kernel import masked_kernels
from keras_sparse_init.samples import Samples
from keras_sparse_init.signal.graph_sums import GraphSums, UnfitError
from keras_sparse_init.signal.jacobian import singular_values
from keras_sparse_init.signal.kernel_scale import effective_values, expected_scales, scale_of
from keras_sparse_init.signal.layer_sums import LayerSums, NotSeenError, moments_of, real
from keras_sparse_init.signal.moments import Moments
from keras_sparse_init.signal.objective import Objective
from keras_sparse_init.signal.probe import Probe
from keras_sparse_init.signal.report import KernelSignal, SignalReport
from keras_sparse_init.topology.paths import Topology, topology
from keras_sparse_init.watching import left_as_it_is


def measure_signal(
    model: Any,
    x: Any,
    y: Any = None,
    loss: Any = None,
    training: bool = False,
    *,
    batch_size: int = 1024,
    seed: int = 0,
    jacobian: bool = False,
) -> SignalReport:
    """What goes through a model, forward and backward, layer by layer, and what its masks connect.

    The model is left as it is, bit for bit.

    Args:
        model: A built model of either Keras.
        x: Inputs as the model takes them: an array, or a list, tuple or dict of arrays, whose first axis is that of
            the samples.
        y: Targets, whose first axis is that of the samples too. With `loss` only.
        loss: A Keras loss, its name, or a function of (y, outputs) that returns the mean over samples, or a number for
            each. Gradients are those of its mean over all samples. None: those of sum(g * outputs), g drawn from
            N(0, 1).
        training: Whether the model runs as in training: with dropout, and with batch normalization by the statistics of
            each batch. (The dropout of tf_keras draws from TensorFlow's global generator; that of Keras 3 is put back.)
            At initialization batch normalization does nothing in prediction: it has not seen data yet.
        batch_size: How many samples run at a time. The result does not depend on it, save as batch normalization in
            training does.
        seed: Non-negative int from which the random output gradients are drawn.
        jacobian: Whether to find the singular values of each sample's input-output Jacobian: for a model with one
            input and one output, at the cost of a backward pass for each output. Give few samples.

    Returns:
        A `SignalReport`.

    Raises:
        TypeError: When `model` is no Keras model.
        ValueError: When it is not built, there are no samples, or `y` and `loss` are not given together.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import SparseHeNormal, measure_signal
        >>> L = keras.layers
        >>> dense = [L.Dense(100, "relu", kernel_initializer=SparseHeNormal(seed=i), name=f"d{i}") for i in range(3)]
        >>> model = keras.Sequential([L.Input((100,)), *dense])
        >>> report = measure_signal(model, np.random.default_rng(0).normal(size=(500, 100)))
        >>> round(report["d2"].pre.std, 1), report["d2"].dead_units, report.diagnose()
        (1.4, 0, [])

    Reference:
        Evci et al. 2020, arXiv:2010.03533: gradient flow, and what a mask-blind initialization does to the signal.
    """
    signals = Signals(model, x, y, loss, training, batch_size=batch_size, seed=seed, jacobian=jacobian, compiled=False)
    return signals.measure()


class Signals:
    """Measures the same samples in a model again and again. Arguments as in `measure_signal`.

    `compiled` says whether the pass is traced, once for all measurements.
    """

    def __init__(
        self,
        model: Any,
        x: Any,
        y: Any = None,
        loss: Any = None,
        training: bool = False,
        *,
        batch_size: int,
        seed: int,
        jacobian: bool = False,
        compiled: bool = False,
    ) -> None:
        compat.library_of(model)
        walked = [((), model), *((path, layer) for path, _, layer in traversal.walk(model))]
        _check_built(model, [layer for _, layer in walked])
        for name, value in (("training", training), ("jacobian", jacobian)):
            if not isinstance(value, bool):
                raise ValueError(f"`{name}` must be a bool. Received: {name}={value!r}")
        if not is_integer(batch_size) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a positive int. Received: batch_size={batch_size!r}")
        self._model, self._training, self._jacobian = model, training, jacobian
        samples = Samples(model, x, y, loss, int(batch_size))
        self._count = samples.count
        self._objective = Objective(model, samples, loss, check_seed(seed))
        batches = (
            (compat.tensors_for(model, x), compat.tensors_for(model, target), count)
            for x, target, count in self._objective.batches()
        )
        # Kept for the next measurement.
        self._batches = list(batches) if compiled else batches
        self._places = traversal.kernels_of(model)
        # An embedding looks its rows up: how large they are says nothing of a layer before.
        self._owners = {id(place.owner) for place in self._places if "embeddings" not in place.attribute}
        self._expected_calls = _expected_calls(walked[1:])
        kernels = [place.kernel for place in self._places]
        # One that sums inside TensorFlow is used as long as it can.
        in_graph = compiled and not jacobian and compat.backend_of(model) == "tensorflow"
        options = [{"sums": GraphSums()}, {}] if in_graph else [{}]
        self._probes = [Probe(model, kernels, self._objective, training, compiled, **option) for option in options]
        # What the masks connect, and the scales expected for them, are found anew only when masks have changed.
        self._masked = masked_kernels(model)
        self._masks: list[np.ndarray] | None = None
        self._topology = Topology((), {})
        self._expected: list[tuple[float | None, float | None]] = []

    def measure(self) -> SignalReport:
        """Measures the model as it is now."""
        try:
            return self._report(self._probes[0])
        except UnfitError:
            del self._probes[0]
            return self._report(self._probes[0])

    def _report(self, probe: Probe) -> SignalReport:
        layers: dict[str, LayerSums] = {}
        not_seen: dict[str, str] = {}
        gradients: list[np.ndarray | None] = [None] * len(self._places)
        outputs: list[Moments] = []
        values: list[np.ndarray] = []
        factor = self._objective.factor
        with contextlib.nullcontext() if probe.is_pure else left_as_it_is(self._model):
            for x, target, count in self._batches:
                result = probe(x, target)
                cache: dict[int, Any] = {}
                for seen in result.seen:
                    try:
                        sums = LayerSums.of(seen, count, factor, cache)
                        layers[seen.name] = layers[seen.name].merged(sums) if seen.name in layers else sums
                    except NotSeenError as error:
                        not_seen[seen.name] = str(error)
                for i, gradient in enumerate(result.kernel_gradients):
                    if gradient is not None:
                        gradients[i] = real(gradient) if gradients[i] is None else gradients[i] + real(gradient)
                if self._jacobian:
                    values.append(singular_values(self._model, x, self._training))
                found = moments_of(result.outputs, count)
                outputs = [a.merged(b) for a, b in zip(outputs, found, strict=True)] if outputs else found
        # What only looked like values of samples for some batch: of one sample, say.
        layers = {name: sums for name, sums in layers.items() if name not in not_seen}
        # Each output counts by its entries.
        whole = Moments(
            self._count,
            np.concatenate([output.mean for output in outputs]),
            np.concatenate([output.squares for output in outputs]),
        )
        kernels = self._kernels(gradients)
        return SignalReport(
            model=self._model.name,
            samples=self._count,
            training=self._training,
            gradient_of=self._objective.name,
            layers=tuple(sums.signal(name, id(sums.layer) in self._owners) for name, sums in layers.items()),
            kernels=kernels,
            outputs=tuple(output.spread() for output in outputs),
            output_std=whole.spread().std,
            output_is_constant=whole.is_constant(),
            effective_sparsity=self._topology.effective_sparsity if self._topology.kernels else None,
            not_seen={**not_seen, **probe.without_tensor, **self._not_called(probe)},
            not_read=self._topology.not_read,
            singular_values=tuple(map(tuple, np.concatenate(values).tolist())) if values else None,
        )

    def _kernels(self, gradients: list[np.ndarray | None]) -> tuple[KernelSignal, ...]:
        masked, factor = self._masked, self._objective.factor
        masks = [kernel.mask_value() for kernel in masked]
        if self._masks is None or not all(map(np.array_equal, masks, self._masks)):
            # Copies: on a CPU they may share the memory of the variables.
            self._masks = [mask.copy() for mask in masks]
            self._topology = topology(self._model)
            self._expected = [expected_scales(kernel, mask) for kernel, mask in zip(masked, masks, strict=True)]
        values = effective_values(self._model, masked) if masked else []
        entries = {
            id(_raw(kernel.kernel)): (kernel, mask, scale_of(value, mask, kernel.layout), expected, connected)
            for kernel, mask, value, expected, connected in zip(
                masked, masks, values, self._expected, self._topology.kernels, strict=True
            )
        }
        found = []
        for place, gradient in zip(self._places, gradients, strict=True):
            kernel, mask, scale, expected, connected = entries.get(
                id(_raw(place.kernel)), (None, None, None, (None, None), None)
            )
            mean = std = flow = None
            if gradient is not None:
                active = gradient if mask is None else gradient[mask]
                moments = Moments.of_all(active).divided(factor)
                flow = float(moments.squares[0] + active.size * moments.mean[0] ** 2)
                if active.size:
                    mean, std = float(moments.mean[0]), float(np.sqrt(moments.squares[0] / active.size))
            found.append(
                KernelSignal(
                    name=place.path if kernel is None else kernel.name,
                    layer=place.path.rpartition("/")[0],
                    shape=place.shape,
                    gradient_mean=mean,
                    gradient_std=std,
                    gradient_flow=flow,
                    scale=scale,
                    scale_for_mask=expected[0],
                    scale_as_dense=expected[1],
                    topology=connected,
                )
            )
        return tuple(found)

    def _not_called(self, probe: Probe) -> dict[str, str]:
        """The layers that have not been seen to be called, with the reason."""
        called = probe.called
        return {name: why for name, layer, why in self._expected_calls if id(layer) not in called}


def _expected_calls(walked: list[tuple[tuple[str, ...], Any]]) -> list[tuple[str, Any, str]]:
    """(name, layer, why it is not seen when it is not) for each layer that is made of no others."""
    found, loops = [], {}
    for path, layer in walked:
        name = "/".join(path)
        inside = list(layer._flatten_layers(include_self=False))
        if compat.runs_loop(layer):
            loops.update({id(below): name for below in inside})
        if id(layer) in loops:
            found.append((name, layer, f"inside the loop over time of {loops[id(layer)]!r}"))
        elif not inside and not compat.is_input(layer):
            found.append((name, layer, "not called, or inside a function of its own"))
    return found


def _check_built(model: Any, layers: list[Any]) -> None:
    for layer in layers:
        if not layer.built and (layer is model or traversal.is_layer_wrapper(layer)):
            raise ValueError(
                f"`model` must be built. Received: {layer.name!r} without weights yet. Call the model on data, or give "
                "its first layer an input shape"
            )


def _raw(variable: Any) -> Any:
    return getattr(variable, "_variable", variable)
