"""The curves of runs over their steps, as numbers and as figures. matplotlib is needed for the figures alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from keras_sparse_init.figures import add_legend, literal, new_figure, style
from keras_sparse_init.training.runs import Group, differing, mean_and_error

MEASURES = ("loss", "train_accuracy", "test_accuracy", "gradient_norm")
CURVE_COLUMNS = ("group", "step", "n", *itertools.chain(*((name, f"{name}_error") for name in MEASURES)))


def labels(groups: Sequence[Group]) -> list[str]:
    """A short name for each group: the settings in which it differs from others."""
    names = differing(groups) or ["network", "experiment"]
    return [_label(group, names) for group in groups]


def curves(groups: Sequence[Group]) -> list[list[dict[str, Any]]]:
    """The means over seeds at each step, for each group.

    Returns:
        For each group its rows in the order of their steps, by `CURVE_COLUMNS`: n is the number of runs that have a row
        of that step, `_error` a standard error; NaN where there is no value.

    Raises:
        FileNotFoundError: When a run has no metrics.csv.
        ValueError: When one is damaged.
    """
    result = []
    for group, label in zip(groups, labels(groups), strict=True):
        at_step: dict[int, list[dict[str, float]]] = {}
        for run in group.runs:
            for row in run.rows():
                at_step.setdefault(int(row["step"]), []).append(row)
        rows = []
        for step, found in sorted(at_step.items()):
            row: dict[str, Any] = {"group": label, "step": step, "n": len(found)}
            for name in MEASURES:
                row[name], row[f"{name}_error"] = mean_and_error(other.get(name, math.nan) for other in found)
            rows.append(row)
        result.append(rows)
    return result


def figure_of_curves(groups: Sequence[Group]) -> Any:
    """Test accuracy, loss and gradient norm over the steps: a line for each group, a band of one standard error."""
    figure = new_figure(14, 4)
    panels = (("test_accuracy", "test accuracy"), ("loss", "loss"), ("gradient_norm", "norm of the gradient"))
    lines = curves(groups)
    for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        log = name != "test_accuracy"
        for i, rows in enumerate(lines):
            # A log axis has no place for the 0 of a network through which no gradient passes.
            rows = [row for row in rows if math.isfinite(row[name]) and (row[name] > 0 or not log)]
            if not rows:
                continue
            steps, means = [row["step"] for row in rows], [row[name] for row in rows]
            axes.plot(steps, means, label=literal(rows[0]["group"]), **style(i), marker="." if len(rows) == 1 else "")
            low, high = zip(*(_band(row[name], row[f"{name}_error"]) for row in rows), strict=True)
            axes.fill_between(steps, low, high, color=style(i)["color"], alpha=0.2, linewidth=0)
            if log:
                axes.set_yscale("log")
        axes.set(xlabel="step", title=title)
    add_legend(figure)
    return figure


def figure_of_accuracies(groups: Sequence[Group]) -> Any:
    """Test accuracy over sparsity, with standard errors: a series for all groups that differ in the sparsity alone."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    names = [name for name in differing(groups) if name != "sparsity"] or ["network", "experiment"]
    series: dict[str, list[tuple[float, float, float]]] = {}
    for group in groups:
        # The error of a single run is NaN, which draws no bar: one of length 0 would say that it is known.
        point = (group.settings["sparsity"], *mean_and_error(group.values("test_accuracy")))
        series.setdefault(_label(group, names), []).append(point)
    for i, (label, points) in enumerate(series.items()):
        sparsities, means, errors = zip(*sorted(points), strict=True)
        axes.errorbar(sparsities, means, errors, marker="o", capsize=3, label=literal(label), **style(i))
    axes.set(xlabel="sparsity", title="test accuracy")
    add_legend(figure)
    return figure


def _band(mean: float, error: float) -> tuple[float, float]:
    return (mean, mean) if math.isnan(error) else (mean - error, mean + error)


def _label(group: Group, names: Sequence[str]) -> str:
    """The group's values of these settings; those that it has not only when there is nothing else to say."""
    known = [name for name in names if group.settings.get(name) is not None]
    return ", ".join(_said(name, group.settings.get(name)) for name in known or names)


def _said(name: str, value: Any) -> str:
    if name == "sparsity":
        return f"{value:.2%} sparse"
    return str(value) if name in ("network", "experiment") else f"{name} {value}"
