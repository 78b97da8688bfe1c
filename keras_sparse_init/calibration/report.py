"""What a calibration did: zeros, patterns, and how far from affine a network is. Pure NumPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_sparse_init.signal.zero_counts import ZeroCounter
from keras_sparse_init.table import laid_out

# (layer name, number of the call) to where outputs are 0, of shape (samples, positions, units).
Zeros = Mapping[tuple[str, int], np.ndarray]

# A network whose outputs have less of their variance beyond the best affine fit is affine, as far as data can tell.
AFFINE = 0.01


@dataclasses.dataclass(frozen=True)
class LayerCalibration:
    """What a calibration did to the ReLUs of one layer, or of all.

    Attributes:
        name: The name of the layer with the ReLUs, "total" for all.
        zeros_before: Fraction of the outputs that were 0.
        zeros: Fraction of the outputs that are 0.
        patterns_before: Number of distinct activation patterns that the samples had.
        patterns: Number that they have.
        flip_rate: Fraction of the outputs that were 0 and are not any more, or the other way round.
        units: Number of units.
        calibrated: The name of the layer that was calibrated for it: itself, or the layer with the kernel before a
            ReLU layer. None when none was.
        without_inputs: Units that cannot be revived: their pre-activation is the same on all samples, as they have no
            inputs, or none that changes. 0 for a layer that was not calibrated.
        scale: What kernel and bias were multiplied by to keep the scale; None for a layer that was not calibrated.
        gap: Largest gap of the units' linear programs, in units of their margin; None when there were none.
        iterations: Iterations of the solver; None when there was none.
    """

    name: str
    zeros_before: float
    zeros: float
    patterns_before: int
    patterns: int
    flip_rate: float
    units: int
    calibrated: str | None = None
    without_inputs: int = 0
    scale: float | None = None
    gap: float | None = None
    iterations: int | None = None

    @classmethod
    def of(cls, name: str, before: Zeros, after: Zeros, **known: Any) -> LayerCalibration:
        """From where outputs are 0 before and after, of the layer's calls or of all layers'."""
        flips = sum(int((before[key] != after[key]).sum()) for key in before)
        outputs = sum(zeros.size for zeros in before.values())
        return cls(
            name=name,
            zeros_before=sum(int(zeros.sum()) for zeros in before.values()) / outputs,
            zeros=sum(int(zeros.sum()) for zeros in after.values()) / outputs,
            patterns_before=_patterns(before),
            patterns=_patterns(after),
            flip_rate=flips / outputs,
            units=sum({name: zeros.shape[-1] for (name, _), zeros in before.items()}.values()),
            **known,
        )


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate_init` did; `str()` lays it out for reading.

    Attributes:
        method: "bias", "lp" or "none".
        samples: Number of samples.
        layers: A `LayerCalibration` for each layer with ReLUs, in the order of their calls.
        total: The same of all of them.
        non_linearity_before: 1 - R^2 of the best affine fit of the model's outputs on its inputs, before. None when
            there were too few samples for as many inputs, or the outputs were constant.
        non_linearity: The same, after.
        skipped: Layer name to why it was not calibrated, for the layers with a kernel that were not.
    """

    method: str
    samples: int
    layers: list[LayerCalibration]
    total: LayerCalibration
    non_linearity_before: float | None
    non_linearity: float | None
    skipped: dict[str, str]

    @property
    def is_affine(self) -> bool:
        """Whether the model is affine on the data, or nearly: one pattern, or a non-linearity below 0.01."""
        return self.total.patterns == 1 or (self.non_linearity is not None and self.non_linearity < AFFINE)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-serializable values."""
        return dataclasses.asdict(self) | {"is_affine": self.is_affine}

    def __str__(self) -> str:
        table = [("layer", "zeros before", "after", "patterns before", "after", "flips", "no inputs", "scale", "gap")]
        for row in [*self.layers, self.total]:
            table.append(
                (
                    row.name,
                    f"{row.zeros_before:.2%}",
                    f"{row.zeros:.2%}",
                    f"{row.patterns_before:,}",
                    f"{row.patterns:,}",
                    f"{row.flip_rate:.2%}",
                    f"{row.without_inputs} of {row.units}",
                    "" if row.scale is None else f"{row.scale:.3f}",
                    "" if row.gap is None else f"{row.gap:.1e}",
                )
            )
        before, after = _shown(self.non_linearity_before), _shown(self.non_linearity)
        lines = [laid_out(table), f"{self.samples:,} samples; non-linearity {before} before, {after} after"]
        lines.append(
            "patterns: different ones of zeros; flips: activations that are on before or after only; no inputs: units "
            "that no weight revives; scale: of kernel and bias; gap: of the linear programs, in margins; "
            "non-linearity: the part of the outputs' variance that the best affine function leaves"
        )
        lines += [f"not calibrated: {name} ({why})" for name, why in self.skipped.items()]
        return "\n".join(lines)


class AffineFit:
    """The best affine functions of inputs.

    Args:
        inputs: An array of shape (samples, ...).

    Example:
        >>> import numpy as np
        >>> from keras_sparse_init.calibration.report import AffineFit
        >>> x = np.linspace(-1, 1, 100)[:, None]
        >>> fit = AffineFit(x)
        >>> round(fit.non_linearity(3 * x - 1), 6), round(fit.non_linearity(np.maximum(x, 0)), 2)
        (0.0, 0.2)
    """

    def __init__(self, inputs: np.ndarray):
        x = inputs.reshape(len(inputs), -1).astype(np.float64)
        left, values, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
        rank = int((values > values.max(initial=0.0) * max(x.shape) * np.finfo(np.float32).eps).sum())
        # Of what affine functions can be, but for constants.
        self._basis = left[:, :rank]

    def non_linearity(self, outputs: np.ndarray) -> float | None:
        """How much of the outputs' variance the best affine function of the inputs does not explain: 1 - R^2.

        Both sums of squares are divided by their degrees of freedom (R^2 is "adjusted"): a fit explains a part of
        anything, and with as many coefficients as samples all of it.

        Args:
            outputs: An array of shape (samples, ...).

        Returns:
            A float, 0 for an affine function; above 1 when a constant does better. None with fewer than 1.5 samples for
            each free coefficient, and for constant outputs.
        """
        y = outputs.reshape(len(outputs), -1).astype(np.float64)
        size, y = float((y**2).sum()), y - y.mean(axis=0)
        total, (samples, rank) = float((y**2).sum()), self._basis.shape
        if samples < 1.5 * (rank + 1) or samples < 3 or total <= 1e-12 * size:
            return None
        residual = float(((y - self._basis @ (self._basis.T @ y)) ** 2).sum())
        return residual / (samples - 1 - rank) / (total / (samples - 1))


def _patterns(zeros: Zeros) -> int:
    counter = ZeroCounter()
    counter.add(zeros)
    return counter.result({}).patterns


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"
