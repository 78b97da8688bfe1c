"""The figure of a signal report. matplotlib is needed for it alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from keras_sparse_init.figures import literal, new_figure


def figure_of(report: Any) -> Any:
    """Deviation of signals and of gradients, zeros and dead units, similarity of samples, layer by layer.

    Args:
        report: A `SignalReport`.

    Returns:
        A `matplotlib.figure.Figure`, not shown: a notebook shows it, `savefig` writes it.
    """
    layers = report.layers
    figure = new_figure(max(9.0, 0.45 * len(layers) + 4), 7)
    signal, gradient, zeros, cosine = figure.subplots(2, 2).flat
    _draw(signal, [layer.pre and layer.pre.std for layer in layers], "pre-activations", log=True)
    _draw(signal, [layer.post.std for layer in layers], "activations", log=True)
    signal.set_title("standard deviation")
    _draw(gradient, [layer.gradient_std for layer in layers], "activations", log=True)
    gradient.set_title(f"std of gradients of {report.gradient_of}")
    _draw(zeros, [layer.zero_fraction for layer in layers], "activations that are 0")
    dead = [None if layer.dead_units is None else layer.dead_units / layer.units for layer in layers]
    _draw(zeros, dead, "units that are always 0")
    zeros.set_title("share of zeros")
    zeros.set_ylim(-0.05, 1.05)
    _draw(cosine, [layer.cosine for layer in layers], "pre-activations")
    cosine.set_title("mean cosine between samples")
    for axes in (signal, gradient, zeros, cosine):
        names = [literal(layer.name) for layer in layers]
        axes.set_xticks(range(len(layers)), names, rotation=90, fontsize="small")
        axes.set_xlim(-0.5, len(layers) - 0.5)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small")
    return figure


def _draw(axes: Any, values: Sequence[float | None], label: str, log: bool = False) -> None:
    # A log axis has no place for 0.
    points = [(i, v) for i, v in enumerate(values) if v is not None and math.isfinite(v) and (v > 0 or not log)]
    if not points:
        return
    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    if log:
        axes.set_yscale("log")
