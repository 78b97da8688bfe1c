"""The figures of a comparison of initializers."""

from __future__ import annotations

import math
from typing import Any

from keras_sparse_init.figures import add_legend, literal, new_figure, style

# From left to right and top to bottom a reader sees at most so many layers of a deep stack, evenly spaced.
_MOST_LAYERS = 6

_OVER_EPOCHS = ("pre_activation", "activation", "activation_gradient", "kernel_gradient")


def figure_of_epochs(comparison: Any, statistic: str) -> Any:
    """Means or standard deviations over epochs: a row of panels for each quantity, a column for each layer.

    Args:
        comparison: An `InitializerComparison`.
        statistic: "mean" or "std".
    """
    layers = _shown_layers(comparison)
    figure = new_figure(3.2 * len(layers) + 1, 2.6 * len(_OVER_EPOCHS))
    panels = figure.subplots(len(_OVER_EPOCHS), len(layers), sharex=True, squeeze=False)
    for axes_of_row, quantity in zip(panels, _OVER_EPOCHS, strict=True):
        column = f"{quantity}_{statistic}"
        for axes, layer in zip(axes_of_row, layers, strict=True):
            largest = 0.0
            for i, run in enumerate(comparison.runs):
                rows = [row for row in run.rows if row.layer == layer]
                # A log axis has no place for 0, and none for what is not finite.
                points = [(row.epoch, getattr(row, column)) for row in rows if math.isfinite(getattr(row, column))]
                points = [point for point in points if statistic == "mean" or point[1] > 0]
                epochs, values = zip(*points, strict=True) if points else ((), ())
                marker = "." if len(points) == 1 else ""
                axes.plot(epochs, values, label=literal(run.name), **style(i), marker=marker)
                largest = max([largest, *map(abs, values)])
            if statistic == "std" and largest > 0:
                axes.set_yscale("log")
            elif largest > 0:
                axes.set_yscale("symlog", linthresh=_linear_below(comparison, quantity, layer))
            axes.minorticks_off()  # Over many decades drawing them takes most of the time.
            axes.set_title(f"{quantity.replace('_', ' ')}, layer {layer}", fontsize="small")
            axes.tick_params(labelsize="small")
        axes_of_row[0].set_ylabel(statistic)
    for axes in panels[-1]:
        axes.set_xlabel("epoch")
    add_legend(figure)
    return figure


def figure_of_histograms(comparison: Any, quantity: str, epoch: int) -> Any:
    """Histograms of a quantity in an epoch: a row of panels for each initializer, a column for each layer.

    Args:
        comparison: An `InitializerComparison`.
        quantity: One of `QUANTITIES`.
        epoch: The epoch; a negative one counts from the last.

    Raises:
        ValueError: When there are no histograms of that epoch.
    """
    number = epoch % comparison.settings["epochs"] if epoch < 0 else epoch
    found = {(h.initializer, h.layer): h for h in comparison.histograms if (h.quantity, h.epoch) == (quantity, number)}
    if not found:
        known = sorted({histogram.epoch for histogram in comparison.histograms})
        raise ValueError(f"`epoch` must be one with histograms, of {known}. Received: epoch={epoch}")
    layers = _shown_layers(comparison)
    figure = new_figure(2.6 * len(layers) + 1, 1.3 * len(comparison.runs) + 0.5)
    panels = figure.subplots(len(comparison.runs), len(layers), squeeze=False)
    for axes_of_row, run in zip(panels, comparison.runs, strict=True):
        for axes, layer in zip(axes_of_row, layers, strict=True):
            histogram = found.get((run.name, layer))
            if histogram is None:
                axes.text(0.5, 0.5, "not finite", ha="center", va="center", transform=axes.transAxes)
            else:
                axes.stairs(histogram.counts, histogram.edges, fill=True)
            axes.tick_params(labelsize="x-small")
            axes.locator_params(axis="x", nbins=4)
            axes.ticklabel_format(axis="x", scilimits=(-2, 3))
            axes.xaxis.get_offset_text().set_fontsize("x-small")
            axes.set_yticks([])
        axes_of_row[0].set_ylabel(literal(run.name), fontsize="x-small", rotation=0, ha="right")
    for axes, layer in zip(panels[0], layers, strict=True):
        axes.set_title(f"layer {layer}", fontsize="small")
    figure.suptitle(f"{quantity.replace('_', ' ')} in epoch {number}")
    return figure


def _shown_layers(comparison: Any) -> list[int]:
    last = len(comparison.settings["sizes"]) - 1
    if last <= _MOST_LAYERS:
        return list(range(1, last + 1))
    return [1 + round(i * (last - 1) / (_MOST_LAYERS - 1)) for i in range(_MOST_LAYERS)]


def _linear_below(comparison: Any, quantity: str, layer: int) -> float:
    """Where a symmetric log axis of means ends being linear: a tenth of the median standard deviation at the start."""
    sizes = sorted(run.values(f"{quantity}_std")[layer - 1] for run in comparison.runs)
    finite = [size for size in sizes if size > 0 and math.isfinite(size)]
    return finite[len(finite) // 2] / 10 if finite else 1.0
