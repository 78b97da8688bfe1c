"""The directory of a comparison of initializers: its numbers as CSV and JSON, its plots."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from keras_sparse_init.comparison.report import COLUMNS, STATISTICS, Histogram, InitializerComparison
from keras_sparse_init.training import run_dir

_HISTOGRAMS = ("pre_activation", "activation", "activation_gradient", "kernel_gradient")


def write_comparison(comparison: InitializerComparison, directory: Path, config: str | None = None) -> str | None:
    """Writes a comparison into a directory.

    comparison.csv has a row for each initializer, epoch and layer, results.json the settings and the same numbers,
    histograms.csv a row for each bar; std.png and mean.png show the epochs, histograms_<quantity>.png the
    initialization.

    Args:
        comparison: What `compare_initializers` returned.
        directory: A directory that holds none of these.
        config: The text of operative_config.gin. None writes no such file.

    Returns:
        Why there are no plots, where matplotlib is not installed; None when there are.

    Example:
        >>> import pathlib, tempfile
        >>> from keras_sparse_init import compare_initializers
        >>> from keras_sparse_init.training.comparison_files import write_comparison
        >>> comparison = compare_initializers(["he_normal"], (10, 10), samples=10, epochs=1)
        >>> directory = pathlib.Path(tempfile.mkdtemp())
        >>> write_comparison(comparison, directory)
        >>> (directory / "comparison.csv").read_text().split(",")[:3]
        ['initializer', 'epoch', 'layer']
    """
    if config is not None:
        (directory / "operative_config.gin").write_text(config, encoding="utf-8")
    _write_csv(directory / "comparison.csv", COLUMNS, map(dataclasses.asdict, comparison.rows))
    bars = (bar for histogram in comparison.histograms for bar in _bars(histogram))
    _write_csv(directory / "histograms.csv", _BAR_COLUMNS, bars)
    run_dir.write_results(directory, {"experiment": "compare", **comparison.to_dict()})
    try:
        for statistic in STATISTICS:
            comparison.plot(statistic).savefig(directory / f"{statistic}.png", dpi=80)
        # There are none when every run overflows at once.
        for quantity in _HISTOGRAMS if comparison.histograms else ():
            comparison.plot_histograms(quantity).savefig(directory / f"histograms_{quantity}.png", dpi=80)
    except ImportError as error:
        return str(error)
    return None


_BAR_COLUMNS = ("initializer", "epoch", "layer", "quantity", "from", "to", "count")


def _bars(histogram: Histogram) -> Iterable[dict[str, Any]]:
    of = {name: getattr(histogram, name) for name in _BAR_COLUMNS[:4]}
    for start, end, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        yield {**of, "from": start, "to": end, "count": count}


def _write_csv(path: Path, columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)
