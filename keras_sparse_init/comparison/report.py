"""What a comparison of initializers found: numbers per layer and epoch, histograms, a table, plots."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from keras_sparse_init.arguments import check_choice
from keras_sparse_init.table import format_table

Statistic = Literal["mean", "std"]
Quantity = Literal["kernel", "pre_activation", "activation", "activation_gradient", "kernel_gradient"]
STATISTICS = ("std", "mean")
QUANTITIES = ("kernel", "pre_activation", "activation", "activation_gradient", "kernel_gradient")

# A signal whose standard deviation changes by less than this factor over the stack counts as kept.
_KEPT = 1.5

_BINS = 40


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """One layer in one epoch, before the epoch's update; of kernels what the mask leaves. NaN or inf where diverged.

    Attributes:
        initializer: The initializer's name in the comparison.
        epoch: From 0, which is the initialization.
        layer: From 1.
        kernel_mean: Mean of the weights.
        kernel_std: Standard deviation of the weights.
        pre_activation_mean: Mean of the affine map's outputs over samples and units.
        pre_activation_std: Standard deviation of the same.
        activation_mean: Mean of the activation function's outputs.
        activation_std: Standard deviation of the same.
        activation_gradient_mean: Mean of the gradient of each sample's loss by the layer's activations.
        activation_gradient_std: Standard deviation of the same.
        kernel_gradient_mean: Mean of the gradient of the mean loss by the weights.
        kernel_gradient_std: Standard deviation of the same.
    """

    initializer: str
    epoch: int
    layer: int
    kernel_mean: float
    kernel_std: float
    pre_activation_mean: float
    pre_activation_std: float
    activation_mean: float
    activation_std: float
    activation_gradient_mean: float
    activation_gradient_std: float
    kernel_gradient_mean: float
    kernel_gradient_std: float

    @classmethod
    def of(cls, initializer: str, epoch: int, layer: int, values: dict[str, np.ndarray]) -> LayerStatistics:
        """The statistics of an array for each of `QUANTITIES`; 0 of an empty one, which a mask of zeros leaves."""
        numbers = {}
        for name in QUANTITIES:
            array = values[name] if values[name].size else np.zeros(1)
            numbers[f"{name}_mean"] = float(array.mean(dtype=np.float64))
            numbers[f"{name}_std"] = float(array.std(dtype=np.float64))
        return cls(initializer, epoch, layer, **numbers)

    def is_finite(self) -> bool:
        """Whether every number is finite."""
        return all(math.isfinite(value) for value in dataclasses.astuple(self)[3:])


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How often a layer's values lie between edges: `counts[i]` of them from `edges[i]` to `edges[i + 1]`."""

    initializer: str
    epoch: int
    layer: int
    quantity: str
    counts: tuple[int, ...]
    edges: tuple[float, ...]

    @classmethod
    def of(cls, initializer: str, epoch: int, layer: int, quantity: str, values: np.ndarray) -> Histogram:
        """The histogram of an array of finite values."""
        values = values.astype(np.float64)
        # A mask may leave no weight.
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
        if low == high:
            # NumPy's own way, 1/2 to both sides, leaves no room for edges around a large number.
            width = max(0.5, abs(low) / 2)
            low, high = low - width, high + width
        counts, edges = np.histogram(values, _BINS, (low, high))
        return cls(initializer, epoch, layer, quantity, tuple(counts.tolist()), tuple(edges.tolist()))


@dataclasses.dataclass(frozen=True)
class InitializerRun:
    """One initializer's part of a comparison.

    Attributes:
        name: The initializer's name in the comparison.
        losses: The mean loss in each epoch, before its update; the last one is not finite when the run diverged.
        rows: A `LayerStatistics` for each epoch and layer.
        diverged_at: The epoch in which numbers ceased to be finite, the run's last; None when they did not.
    """

    name: str
    losses: tuple[float, ...]
    rows: tuple[LayerStatistics, ...]
    diverged_at: int | None

    def values(self, column: str, epoch: int = 0) -> list[float]:
        """A number of each layer in an epoch, such as "activation_std"; a negative epoch counts from the last.

        Raises:
            ValueError: When there is no such column, or no such epoch in this run.
        """
        check_choice("column", column, COLUMNS[3:])
        if not -len(self.losses) <= epoch < len(self.losses):
            raise ValueError(
                f"`epoch` must be one of the {len(self.losses)} of {self.name!r}, from 0. Received: epoch={epoch}"
            )
        return [getattr(row, column) for row in self.rows if row.epoch == epoch % len(self.losses)]

    def verdict(self) -> str:
        """What happens to signal and gradient, in words."""
        if self.diverged_at == 0:
            return "overflows at initialization"
        forward, backward = self.values("pre_activation_std"), self.values("activation_gradient_std")
        if forward[-1] == 0:
            said = "no signal"
        elif len(forward) == 1:
            said = "one layer"
        else:
            said = f"signal {_change(forward[0], forward[-1])}, gradient {_change(backward[-1], backward[0])}"
        if self.diverged_at is not None:
            return f"{said}; diverges in epoch {self.diverged_at}"
        # With few units and samples an epoch may be without signal and the next one not.
        alive = [r.epoch for r in self.rows if r.layer == len(forward) and r.activation_std > 0]
        died = max(alive, default=-1) + 1
        return said if died in (0, len(self.losses)) else f"{said}; dead from epoch {died} on"

    def to_dict(self) -> dict[str, Any]:
        """The run as a JSON-serializable dict; None stands for what is not finite."""
        return {
            "name": self.name,
            "verdict": self.verdict(),
            "diverged_at": self.diverged_at,
            "losses": [_or_none(loss) for loss in self.losses],
            "rows": [{name: _or_none(value) for name, value in dataclasses.asdict(row).items()} for row in self.rows],
        }


COLUMNS = tuple(field.name for field in dataclasses.fields(LayerStatistics))


@dataclasses.dataclass(frozen=True)
class InitializerComparison:
    """Initializers side by side; `str()` is a table of how they start and where SGD takes them.

    Attributes:
        settings: The arguments of the comparison.
        runs: An `InitializerRun` for each initializer.
        histograms: A `Histogram` for each initializer, layer and quantity, at initialization and in the last epoch of
            runs that did not diverge.
    """

    settings: dict[str, Any]
    runs: tuple[InitializerRun, ...]
    histograms: tuple[Histogram, ...] = dataclasses.field(repr=False)

    def __getitem__(self, name: str) -> InitializerRun:
        """The run of an initializer by its name."""
        for run in self.runs:
            if run.name == name:
                return run
        raise KeyError(f"No initializer {name!r}. There are {', '.join(run.name for run in self.runs)}")

    @property
    def rows(self) -> list[LayerStatistics]:
        """The rows of all runs, one after the other."""
        return [row for run in self.runs for row in run.rows]

    def to_dict(self) -> dict[str, Any]:
        """Settings and runs as a JSON-serializable dict; None stands for what is not finite."""
        return {"settings": self.settings, "runs": [run.to_dict() for run in self.runs]}

    def to_pandas(self) -> Any:
        """A data frame with a row for each initializer, epoch and layer.

        Raises:
            ImportError: When pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("Data frames need pandas: pip install pandas") from error
        return pd.DataFrame([dataclasses.asdict(row) for row in self.rows], columns=list(COLUMNS))

    def plot(self, statistic: Statistic = "std") -> Any:
        """A figure of means or standard deviations over the epochs, a panel for each layer and quantity.

        Raises:
            ImportError: When matplotlib is not installed.
            ValueError: When `statistic` is not "std" or "mean".
        """
        from keras_sparse_init.comparison.plots import figure_of_epochs

        return figure_of_epochs(self, check_choice("statistic", statistic, STATISTICS))

    def plot_histograms(self, quantity: Quantity = "activation", epoch: int = 0) -> Any:
        """A figure of histograms, a row for each initializer and a column for each layer.

        Raises:
            ImportError: When matplotlib is not installed.
            ValueError: When there is no such quantity, or no histogram of that epoch.
        """
        from keras_sparse_init.comparison.plots import figure_of_histograms

        return figure_of_histograms(self, check_choice("quantity", quantity, QUANTITIES), epoch)

    def __str__(self) -> str:
        s = self.settings
        sparse = "" if s["sparsity"] is None else f", sparse ones {s['sparsity']:.1%} sparse"
        title = (
            f"{'-'.join(map(str, s['sizes']))} units, {s['activation']}, {s['samples']} samples of N(0, 1){sparse}; "
            f"{s['epochs']} epochs of SGD({s['learning_rate']:g}), seed {s['seed']}"
        )
        ends = sorted({1, len(s["sizes"]) - 1})
        header = ["initializer", "weights", *(f"signal {layer}" for layer in ends)]
        header += [*(f"gradient {layer}" for layer in reversed(ends)), "loss", "last loss", "what happens"]
        rows = []
        for run in self.runs:
            signal, gradient = run.values("pre_activation_std"), run.values("activation_gradient_std")
            numbers = [run.values("kernel_std")[0], *(signal[layer - 1] for layer in ends)]
            numbers += [*(gradient[layer - 1] for layer in reversed(ends)), run.losses[0]]
            numbers.append(math.inf if run.diverged_at is not None else run.losses[-1])
            rows.append([run.name, *map(_said, numbers), run.verdict()])
        legend = (
            "standard deviations at initialization: of the weights of layer 1; signal: of the pre-activations of a "
            "layer;\ngradient: of the gradients of a sample's loss by the activations of a layer"
        )
        return f"{title}\n\n{format_table(header, rows)}\n\n{legend}"


def _change(start: float, end: float) -> str:
    if start == 0 or end == 0:
        return "vanishes"
    factor = end / start
    if 1 / _KEPT < factor < _KEPT:
        return "kept"
    return f"grows {_said(factor)}x" if factor > 1 else f"shrinks {_said(1 / factor)}x"


def _said(value: float) -> str:
    """Three digits, without an exponent as long as that is short."""
    if not math.isfinite(value):
        return "inf"
    return f"{value:.3g}" if abs(value) < 1e3 else f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.1e}"


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
