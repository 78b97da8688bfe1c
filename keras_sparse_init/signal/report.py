"""What `measure_signal` found, to read, to compute with, and to plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_sparse_init.arguments import check_choice
from keras_sparse_init.signal.diagnosis import diagnose
from keras_sparse_init.signal.moments import Spread
from keras_sparse_init.signal.plot import figure_of
from keras_sparse_init.table import laid_out
from keras_sparse_init.topology.connectivity import KernelTopology


@dataclasses.dataclass(frozen=True)
class LayerSignal:
    """What went through a layer in one of its calls.

    Attributes:
        name: The layer's path in the model; of a layer that is called several times with the number of the call.
        kind: The layer's class.
        has_kernel: Whether the layer itself multiplies its input with a kernel.
        units: Number of units: the size of the last axis, or of that of the channels.
        size: Number of values of a sample: units times positions.
        pre: Of the pre-activations: what the layer's activation was given; None for a layer without one.
        post: Of the activations: what came out of it; of a layer without an activation, its output.
        zero_fraction: Fraction of activations that are exactly 0; this and the next two are None for a layer without
            an activation, or with a linear one.
        dead_units: Units that are 0 for every sample, everywhere.
        always_on_units: Units that are 0 for no sample, nowhere.
        cosine: Mean cosine of the angle between the pre-activations (else outputs) of two samples.
        gradient_mean: Mean of the gradient for the activations; None where nothing depends on them. (Keras's
            cross-entropies take the logits from behind a softmax or sigmoid: nothing depends on that.)
        gradient_std: Standard deviation of it.
    """

    name: str
    kind: str
    has_kernel: bool
    units: int
    size: int
    pre: Spread | None
    post: Spread
    zero_fraction: float | None
    dead_units: int | None
    always_on_units: int | None
    cosine: float | None
    gradient_mean: float | None
    gradient_std: float | None

    def row(self) -> dict[str, Any]:
        """The numbers under names of one level: `pre_std` for that of the pre-activations, `std` of activations."""
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        names = [field.name for field in dataclasses.fields(Spread)]
        pre, post = row.pop("pre"), row.pop("post")
        spreads = {f"pre_{name}": None if pre is None else getattr(pre, name) for name in names}
        spreads.update({name: getattr(post, name) for name in names})
        first = {name: row.pop(name) for name in ("name", "kind", "has_kernel", "units", "size")}
        return {**first, **spreads, **row}


@dataclasses.dataclass(frozen=True)
class KernelSignal:
    """The gradient of a kernel, its scale, and what its mask connects.

    Attributes:
        name: The kernel's path in the model.
        layer: The path of its layer.
        shape: Its shape.
        gradient_mean: Mean of its gradient, over the weights on the mask; None where nothing depends on it.
        gradient_std: Standard deviation of it.
        gradient_flow: sum (g m)^2 over its weights, g the gradient and m the mask (1 without a mask).
        scale: Sum of the squares of the weights into a unit, mean over the units that have any; He: 2. None without
            mask.
        scale_for_mask: What `scale` would be on average, had the layer's initializer drawn the kernel for its mask.
        scale_as_dense: What it would be, had it drawn the kernel as if it were dense. Both None where the initializer
            has no variance.
        topology: What the mask connects; None without a mask.
    """

    name: str
    layer: str
    shape: tuple[int, ...]
    gradient_mean: float | None
    gradient_std: float | None
    gradient_flow: float | None
    scale: float | None
    scale_for_mask: float | None
    scale_as_dense: float | None
    topology: KernelTopology | None

    def row(self) -> dict[str, Any]:
        """The numbers under names of one level."""
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        topology = row.pop("topology")
        fields = [f.name for f in dataclasses.fields(KernelTopology) if f.name not in ("name", "shape")]
        found = {name: None if topology is None else getattr(topology, name) for name in fields}
        quartiles = found.pop("fan_in") or (None,) * 5
        names = ("fan_in_min", "fan_in_first_quartile", "fan_in_median", "fan_in_third_quartile", "fan_in_max")
        return {**row, **found, **dict(zip(names, quartiles, strict=True))}


@dataclasses.dataclass(frozen=True)
class SignalReport:
    """What `measure_signal` found in a model; `str()` lays it out for reading.

    Attributes:
        model: The model's name.
        samples: Number of samples.
        training: Whether the model ran as in training.
        gradient_of: What the gradients are of: "the loss", or "a random sum of the outputs".
        layers: What went through each layer, in the order of their calls.
        kernels: All kernels, in model order.
        outputs: The model's outputs, each over everything and by unit.
        output_std: Standard deviation over all outputs and samples.
        output_is_constant: Whether no output differs between samples by more than rounding.
        effective_sparsity: Fraction of masked weights on no path from input to output; None where it is not known.
        not_seen: Names of layers of which nothing is seen, or not all, with the reason.
        not_read: Names of layers through which the masks' connections cannot be read, with the reason.
        singular_values: Of the input-output Jacobian of each sample, largest first; None when not asked for.

    Example:
        >>> import keras, numpy as np
        >>> from keras_sparse_init import measure_signal
        >>> dense = keras.layers.Dense(2, "relu", kernel_initializer="ones", name="dense")
        >>> model = keras.Sequential([keras.layers.Input((3,)), dense], name="small")
        >>> report = measure_signal(model, np.array([[1.0, 2.0, 3.0], [-3.0, -2.0, 1.0]]))
        >>> report["dense"].pre.mean, report["dense"].zero_fraction
        (1.0, 0.5)
        >>> print(report)  # doctest: +ELLIPSIS
        small: 2 samples, as in prediction, gradients of a random sum of the outputs
        layer  units  pre std  std  unit std  zeros  dead  cosine  gradient std
        dense      2        5    3         3  50.0%     0  -1.000  ...
    """

    model: str
    samples: int
    training: bool
    gradient_of: str
    layers: tuple[LayerSignal, ...]
    kernels: tuple[KernelSignal, ...]
    outputs: tuple[Spread, ...]
    output_std: float
    output_is_constant: bool
    effective_sparsity: float | None
    not_seen: dict[str, str]
    not_read: dict[str, str]
    singular_values: tuple[tuple[float, ...], ...] | None = None

    def __getitem__(self, name: str) -> LayerSignal:
        found = {layer.name: layer for layer in self.layers}
        if name not in found:
            raise KeyError(f"No layer {name!r} has been seen. Seen are {', '.join(map(repr, found))}")
        return found[name]

    def to_dict(self) -> dict[str, Any]:
        """Everything as a JSON-serializable dict."""
        return dataclasses.asdict(self)

    def to_pandas(self, part: str = "layers") -> Any:
        """The layers, or the kernels, as a pandas DataFrame with a row for each.

        Args:
            part: "layers" or "kernels".
        """
        check_choice("part", part, ("layers", "kernels"))
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Data frames need pandas: pip install pandas") from error
        return pandas.DataFrame([entry.row() for entry in getattr(self, part)])

    def diagnose(self) -> list[str]:
        """What is wrong with the signal, the gradients or the masks, in words; empty when nothing is seen to be."""
        return diagnose(self)

    def plot(self) -> Any:
        """A matplotlib figure: signal, gradient, zeros and similarity of samples, layer by layer."""
        return figure_of(self)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(report: SignalReport) -> Iterator[str]:
    yield (
        f"{report.model}: {report.samples:,} samples, as in {'training' if report.training else 'prediction'}, "
        f"gradients of {report.gradient_of}"
    )
    header = ("layer", "units", "pre std", "std", "unit std", "zeros", "dead", "cosine", "gradient std")
    rows = [
        (
            layer.name,
            f"{layer.units:,}",
            "" if layer.pre is None else number(layer.pre.std),
            number(layer.post.std),
            number(layer.post.unit_std_mean),
            "" if layer.zero_fraction is None else f"{layer.zero_fraction:.1%}",
            "" if layer.dead_units is None else f"{layer.dead_units:,}",
            "" if layer.cosine is None else f"{layer.cosine:z.3f}",
            number(layer.gradient_std),
        )
        for layer in report.layers
    ]
    yield laid_out([header, *rows])
    yield (
        "std is over everything, unit std that of a unit over samples (mean over units); pre: before the activation; "
        "cosine: of two samples, mean"
    )
    constant = ", the same for all samples" if report.output_is_constant else ""
    yield f"output std {number(report.output_std)}{constant}"
    if report.kernels:
        yield ""
        yield from _lines_of_kernels(report)
    if report.singular_values is not None:
        values = np.array(report.singular_values)
        quartiles = ", ".join(number(q) for q in np.quantile(values, [0, 0.25, 0.5, 0.75, 1]))
        yield f"singular values of the Jacobian, minimum, quartiles and maximum: {quartiles}"
    for title, entries in (("not seen", report.not_seen), ("masks not followed through", report.not_read)):
        if entries:
            yield f"{title}: " + "; ".join(f"{name} ({why})" for name, why in entries.items())


def _lines_of_kernels(report: SignalReport) -> Iterator[str]:
    header = ["kernel", "shape", "gradient std", "gradient flow"]
    masked = any(kernel.topology is not None for kernel in report.kernels)
    if masked:
        header += [
            "sparsity",
            "effective",
            "fan-in min",
            "median",
            "max",
            "no input",
            "no output",
            "off input",
            "off output",
        ]
    rows = []
    for kernel in report.kernels:
        row = [kernel.name, "x".join(map(str, kernel.shape))]
        row += [number(kernel.gradient_std), number(kernel.gradient_flow)]
        topology = kernel.topology
        if masked and topology is None:
            row += [""] * 9
        elif masked:
            effective = topology.effective_sparsity
            row += [
                f"{topology.sparsity:.2%}",
                "?" if effective is None else f"{effective:.2%}",
                *(f"{topology.fan_in[i]:g}" for i in (0, 2, 4)),
                f"{topology.without_input:,} of {topology.units:,}",
                f"{topology.without_output:,} of {topology.inputs:,}",
                *("?" if off is None else f"{off:,}" for off in (topology.off_input, topology.off_output)),
            ]
        rows.append(row)
    yield laid_out([header, *rows], left=2)
    if masked:
        yield (
            "effective sparsity counts connections on a path from input to output; no input: units without any; no "
            "output: inputs that no unit uses; off: units on no path from an input, or to an output"
        )
    if masked and report.effective_sparsity is not None:
        yield f"effective sparsity of the masked kernels together: {report.effective_sparsity:.2%}"


def number(value: float | None) -> str:
    """Three digits, of a very small or large number with its exponent."""
    return "" if value is None else f"{value:.3g}"
