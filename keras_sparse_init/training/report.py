"""Finished runs side by side."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from keras_sparse_init.training.run_dir import SUMMARY, read_summary


def report(directories: Iterable[str | os.PathLike[str]]) -> str:
    """Compares finished runs in tables of text: one of the runs, one of their layers.

    Runs with the same layers (same masks) share a table of layers.

    Args:
        directories: Directories of runs, or directories that hold such directories.

    Returns:
        The tables.

    Raises:
        FileNotFoundError: When a directory neither is nor holds a finished run.
        ValueError: When a summary cannot be read, or no directory is given.

    Example:
        >>> from keras_sparse_init.training.report import report
        >>> print(report(["runs/a", "runs/b"]))  # doctest: +SKIP
    """
    runs = [(path, read_summary(path)) for directory in directories for path in _runs(Path(directory))]
    if not runs:
        raise ValueError("At least one directory of a finished run must be given")
    try:
        images = sorted({summary["test_images"] for _, summary in runs})
        grain = ", ".join(f"{count} test images (one is {1 / count:.2%})" for count in images)
        parts = [f"{_table_of_runs(runs)}\n\naccuracy is of {grain}; the early one shows how training starts"]
        for layers, paths in _same_layers(runs):
            title = "layers" if len(paths) == len(runs) else "layers of " + ", ".join(map(str, paths))
            parts.append(f"{title}\n{_table_of_layers(layers)}")
    except KeyError as error:
        raise ValueError(f"A summary lacks {error}: was it written by another version?") from error
    return "\n\n".join(parts)


def format_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of text: columns as wide as they need, numbers to the right, text to the left.

    Args:
        header: The names of the columns.
        rows: The cells, as many in each row.

    Returns:
        The lines, without a newline at the end.

    Example:
        >>> from keras_sparse_init.training.report import format_table
        >>> print(format_table(["layer", "size"], [["conv1", 150], ["logits", 840]]))
        layer   size
        ------  ----
        conv1    150
        logits   840
    """
    rows = [list(row) for row in rows]
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    text = [any(isinstance(row[i], str) and not row[i][:1].isdigit() for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        aligned = (c.ljust(w) if left else c.rjust(w) for c, w, left in zip(row, widths, text, strict=True))
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, cells)])


def _runs(directory: Path) -> list[Path]:
    """The directory itself when it is a run's (or nothing at all: reading it says what is wrong), or the runs in it."""
    if (directory / SUMMARY).is_file() or not directory.is_dir():
        return [directory]
    return sorted(path.parent for path in directory.glob(f"*/{SUMMARY}")) or [directory]


def _table_of_runs(runs: list[tuple[Path, dict[str, Any]]]) -> str:
    header = ["network", "data", "experiment", "init", "sparsity", "method", "seed", "steps"]
    header += ["early test accuracy", "test accuracy", "loss", "seconds", "run"]
    return format_table(
        header,
        (
            [
                s["network"],
                Path(s["data"]).name,
                s["experiment"],
                s["init"],
                f"{s['sparsity']:.2%}",
                s["method"],
                s["seed"],
                s["steps"],
                f"{s['early']['test_accuracy']:.2%} @{s['early']['step']}",
                f"{s['test_accuracy']:.2%}",
                f"{s['loss']:.4f}",
                f"{s['seconds']:.1f}",
                str(path),
            ]
            for path, s in runs
        ),
    )


def _same_layers(runs: list[tuple[Path, dict[str, Any]]]) -> list[tuple[list[dict[str, Any]], list[Path]]]:
    groups: list[tuple[list[dict[str, Any]], list[Path]]] = []
    for path, summary in runs:
        layers = summary["table"]["rows"]
        same = next((paths for others, paths in groups if others == layers), None)
        if same is None:
            groups.append((layers, [path]))
        else:
            same.append(path)
    return groups


def _table_of_layers(layers: list[dict[str, Any]]) -> str:
    return format_table(
        ["layer", "shape", "sparsity", "fan-in min", "mean", "max", "dead units"],
        (
            [
                row["name"],
                "x".join(map(str, row["shape"])),
                f"{row['sparsity']:.2%}",
                f"{row['fan_in_min']:g}",
                f"{row['fan_in_mean']:.1f}",
                f"{row['fan_in_max']:g}",
                row["dead_units"],
            ]
            for row in layers
        ),
    )
