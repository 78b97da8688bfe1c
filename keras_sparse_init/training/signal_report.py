"""What the signal-propagation experiment found: a table, the same as CSV and JSON, and two plots."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keras_sparse_init.arguments import check_choice
from keras_sparse_init.training import plots, run_dir
from keras_sparse_init.training.report import format_table

Measure = Literal["output_std", "unit_std"]
_TITLES = {"output_std": "std(output)", "unit_std": "mean(std per unit)"}
_COLORS = {"dense": "C0", "unit": "C1", "layer": "C2", "effective": "C3"}

_LEGEND = """std(output): over inputs and units; std per unit: over inputs, mean over the units of the dense layers
both: median, quartiles and mean over the networks of a row; dead: networks whose outputs are all 0, which count as 0
init: weights scaled by the dense fan-in ("dense"), each unit's own ("unit"), by its live inputs ("effective"), or by
the layer's mean ("layer")"""

_MOST_TICKS = 6  # Sparsities for whose labels a panel has room.

CONFIG = "operative_config.gin"


@dataclasses.dataclass(frozen=True)
class Network:
    """What was measured of one network.

    Attributes:
        mask: The family of its masks.
        sparsity: The sparsity of every layer.
        init: What its kernels are scaled by.
        repeat: Its number among those that differ in the random numbers alone.
        output_std: Standard deviation of the outputs, over inputs and units.
        unit_std: Mean over the units of the three dense layers of their standard deviations over inputs.
        dead: Whether all outputs are 0 for all inputs.
    """

    mask: str
    sparsity: float
    init: str
    repeat: int
    output_std: float
    unit_std: float
    dead: bool


@dataclasses.dataclass(frozen=True)
class SignalResult:
    """The measured networks of a grid. `str(result)` is a table of their medians, quartiles and means.

    Attributes:
        settings: The grid's settings, as JSON can hold them.
        networks: What was measured of each network.
        seconds: How long it took.
    """

    settings: dict[str, Any]
    networks: list[Network]
    seconds: float

    def cells(self) -> list[dict[str, Any]]:
        """A row for all networks of one kind: masks, sparsity and init.

        Returns:
            Dicts with mask, sparsity, init, networks (how many), dead (the share whose outputs are all 0) and, of
            output_std and unit_std each, the mean, the median and the quartiles _q25 and _q75. Dead networks count,
            with the output_std 0.
        """
        kinds: dict[tuple[Any, ...], list[Network]] = {}
        for network in self.networks:
            kinds.setdefault((network.mask, network.sparsity, network.init), []).append(network)
        rows = []
        for (mask, sparsity, init), networks in kinds.items():
            row = {"mask": mask, "sparsity": sparsity, "init": init, "networks": len(networks)}
            row["dead"] = float(np.mean([network.dead for network in networks]))
            for name in _TITLES:
                values = [getattr(network, name) for network in networks]
                low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
                row |= {f"{name}_mean": float(np.mean(values)), f"{name}_median": median}
                row |= {f"{name}_q25": low, f"{name}_q75": high}
            rows.append(row)
        return rows

    def figure(self, measure: Measure) -> Any:
        """A matplotlib figure of "output_std" or "unit_std" over sparsity on a log axis, a panel for each mask family.

        Lines are medians, bands reach from quartile to quartile. Where most networks are dead the median is 0, for
        which a log axis has no place: the line ends there. Below are the shares of dead networks, of all inits.

        Args:
            measure: "output_std" or "unit_std".

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ImportError: When matplotlib is not installed.
            ValueError: When there is no such measure.
        """
        check_choice("measure", measure, tuple(_TITLES))
        cells, families = self.cells(), self.settings["masks"]
        figure = plots.new_figure(1 + 5 * len(families), 4)
        panels = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
        # The axis ends below the lowest median: quartiles may be 0.
        medians = [row[f"{measure}_median"] for row in cells]
        lowest = min((median for median in medians if median > 0), default=0.1) / 3
        for axes, family in zip(panels, families, strict=True):
            for init in self.settings["inits"]:
                rows = sorted((r for r in cells if r["mask"] == family and r["init"] == init), key=_sparsity)
                median, low, high = (
                    np.array([row[f"{measure}_{n}"] for row in rows]) for n in ("median", "q25", "q75")
                )
                sparsities = [row["sparsity"] for row in rows]
                style = {"color": _COLORS[init]}
                axes.plot(sparsities, np.where(median > 0, median, np.nan), marker=".", label=init, **style)
                axes.fill_between(sparsities, np.maximum(low, lowest), np.maximum(high, lowest), alpha=0.2, **style)
            axes.axhline(1, color="gray", linewidth=1, linestyle=":")  # That of the inputs.
            axes.set(xlabel="sparsity", title=f"{_TITLES[measure]}, {family} masks")
            axes.set_yscale("log")
            if len(self.settings["sparsities"]) <= _MOST_TICKS:
                dead = {s: self._dead(family, s) for s in self.settings["sparsities"]}
                axes.set_xticks(list(dead), [f"{s:.1%}\n{share:.0%} dead" for s, share in dead.items()])
        panels[0].set_ylim(bottom=lowest)
        plots.add_legend(figure)
        return figure

    def _dead(self, family: str, sparsity: float) -> float:
        """The share of dead networks among those of these masks."""
        return float(np.mean([n.dead for n in self.networks if (n.mask, n.sparsity) == (family, sparsity)]))

    def write(self, directory: str | os.PathLike[str], config: str | None = None) -> str | None:
        """Writes signal.csv, networks.csv, results.json, output_std.png and unit_std.png, and the config if given.

        Args:
            directory: A new or empty directory.
            config: The text of operative_config.gin.

        Returns:
            Why there are no plots, where matplotlib is not installed; None when there are.

        Raises:
            FileExistsError: When the directory holds anything.
        """
        directory, cells = run_dir.make_new_dir(directory), self.cells()
        _write_csv(directory / "signal.csv", cells)
        _write_csv(directory / "networks.csv", [dataclasses.asdict(network) for network in self.networks])
        if config is not None:
            (directory / CONFIG).write_text(config, encoding="utf-8")
        content = {"experiment": "signal", **self.settings, "seconds": round(self.seconds, 2), "cells": cells}
        run_dir.write_results(directory, content)
        try:
            for measure in _TITLES:
                self.figure(measure).savefig(directory / f"{measure}.png", dpi=120)
        except ImportError as error:
            return str(error)
        return None

    def __str__(self) -> str:
        header = ["masks", "sparsity", "init", "std(output)", "quartiles", "mean"]
        header += ["std per unit", "quartiles", "mean", "dead"]
        rows = []
        for row in self.cells():
            numbers = []
            for name in _TITLES:
                median, mean = row[f"{name}_median"], row[f"{name}_mean"]
                spread = f"{row[f'{name}_q25']:.2g} to {row[f'{name}_q75']:.2g}"
                numbers += [f"{median:.3g}", spread, f"{mean:.3g}"]
            rows.append([row["mask"], f"{row['sparsity']:.1%}", row["init"], *numbers, f"{row['dead']:.0%}"])
        return f"{format_table(header, rows)}\n{_LEGEND}"


def _sparsity(row: dict[str, Any]) -> float:
    return row["sparsity"]


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
