"""Finished runs side by side: a table of text, the same as CSV, and plots."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from keras_sparse_init.table import format_table
from keras_sparse_init.training import plots
from keras_sparse_init.training.runs import Group, Run, differing, group_runs, mean_and_error, read_runs

FILES = ("report.csv", "curves.csv", "curves.png", "accuracy.png")

# Always in the table; other settings where runs differ in them.
_SHOWN = ("network", "experiment", "init", "sparsity")
# The numbers of the table: names in the CSV, and where they are in a summary.
_NUMBERS = {
    "early_test_accuracy": ("early", "test_accuracy"),
    "test_accuracy": ("test_accuracy",),
    "loss": ("loss",),
    "gradient_norm_initial": ("gradient_norm", "initial"),
    "gradient_norm_mean": ("gradient_norm", "mean"),
    "distance_from_init": ("distance_from_init", "relative"),
    "mask_churn": ("mask_churn",),
    "seconds": ("seconds",),
}


def report(directories: Iterable[str | os.PathLike[str]], output_dir: str | os.PathLike[str] | None = None) -> str:
    """Compares finished runs: those that differ in the seed alone are one row, with means and standard errors.

    A standard error is s / sqrt(n) over n seeds; a single run has none. The gradient norm is that of the loss over all
    weights that are not masked, at the start and as the mean over the rows of metrics.csv after it; its square is the
    gradient flow of Evci et al. 2020, arXiv:2010.03533. Below are the layers of each row's lowest seed; rows with
    the same layers (same masks) share a table.

    Args:
        directories: Directories of runs, or directories that hold such directories.
        output_dir: Where to write report.csv (the table), curves.csv (means over seeds at each step), curves.png and
            accuracy.png (over sparsity). None writes nothing.

    Returns:
        The tables.

    Raises:
        FileNotFoundError: When a directory neither is nor holds a finished run.
        ValueError: When what a run has written cannot be read, or no directory is given.
        FileExistsError: When one of the files is there already. Nothing is written then.
        ImportError: When files are to be written and matplotlib is not installed. Nothing is written then.

    Example:
        >>> import tempfile
        >>> from keras_sparse_init.training import Dense, mlp, train
        >>> from keras_sparse_init.training.report import report
        >>> runs = [train(mlp, "digits", Dense(), steps=1, seed=s, output_dir=tempfile.mkdtemp()) for s in (0, 1)]
        >>> "2 runs" in report([run.directory for run in runs])
        True
    """
    groups, repeated = group_runs(read_runs(directories))
    unsaid = {*differing(groups), *_SHOWN, "architecture"}
    settings = groups[0].settings.items()
    common = {name: v for name, v in settings if name not in unsaid and all(g.settings.get(name) == v for g in groups)}
    parts = [f"all with {_said(common)}", _table_of_groups(groups)]
    parts += [_left_out(run, same) for run, same in repeated]
    images = sorted({run.summary["test_images"] for group in groups for run in group.runs})
    grain = ", ".join(f"{count} test images (one is {1 / count:.2%})" for count in images)
    several = any(len(group.runs) > 1 for group in groups)
    parts.append(
        f"accuracy is of {grain}; the early one shows how training starts\n"
        "gradient norm is that of the loss on training images over all weights that are not masked: at initialization "
        "it is small where the signal dies, later it falls as the network learns\n"
        "distance from init: how far training has moved all weights, relative to their norm at the beginning; mask "
        "churn: the part of the connections of the end that were not there at the beginning"
    )
    if several:
        parts[-1] += "\n± is the standard error over seeds"
    first = [min(group.runs, key=lambda run: run.summary["seed"]) for group in groups]
    for layers, paths in _same_layers(first):
        title = "layers" if len(paths) == len(first) == 1 else "layers of " + ", ".join(map(str, paths))
        title += " (the lowest seed of each row)" if several else ""
        parts.append(f"{title}\n{_table_of_layers(layers)}")
    if output_dir is not None:
        _write(groups, Path(output_dir))
    return "\n\n".join(parts)


def _table_of_groups(groups: Sequence[Group]) -> str:
    others = [name for name in differing(groups) if name not in _SHOWN]
    header = [*_SHOWN, *others, "seed", "early test accuracy", "test accuracy", "loss"]
    header += ["gradient norm at init", "in training", "distance from init", "mask churn", "seconds", "run"]
    rows = []
    for group in groups:
        s, runs = group.settings, group.runs
        early = _early_step(group)
        rows.append(
            [
                s["network"],
                s["experiment"],
                s["init"],
                f"{s['sparsity']:.2%}",
                *(str(s.get(name, "-")) for name in others),
                _seeds(runs),
                "-" if early is None else f"{_with_error(group, 'early_test_accuracy', '.2%')} @{early}",
                _with_error(group, "test_accuracy", ".2%"),
                _with_error(group, "loss", ".4f"),
                _with_error(group, "gradient_norm_initial", ".3g"),
                _with_error(group, "gradient_norm_mean", ".3g"),
                _with_error(group, "distance_from_init", ".3g"),
                _with_error(group, "mask_churn", ".1%"),
                f"{mean_and_error(group.values('seconds'))[0]:.1f}",
                str(runs[0].path) if len(runs) == 1 else f"{len(runs)} runs",
            ]
        )
    return format_table(header, rows)


def _said(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def _seeds(runs: Sequence[Run]) -> str:
    return ",".join(map(str, sorted(run.summary["seed"] for run in runs)))


def _early_step(group: Group) -> int | None:
    """The step of the early accuracies; None when they are of different steps and have no mean."""
    steps = {run.summary["early"]["step"] for run in group.runs}
    return steps.pop() if len(steps) == 1 else None


def _left_out(run: Run, same: Run) -> str:
    text = f"{run.path} is left out: it has the settings and the seed of {same.path}"
    if any(run.summary[name] != same.summary[name] for name in ("test_accuracy", "loss")):
        text += ", though not its numbers; they differ in something that is not compared here"
    return text


def _with_error(group: Group, name: str, form: str) -> str:
    mean, error = mean_and_error(group.values(*_NUMBERS[name]))
    if math.isnan(mean):
        return "-"
    return f"{mean:{form}}" if math.isnan(error) else f"{mean:{form}} ± {error:{form}}"


def _write(groups: Sequence[Group], directory: Path) -> None:
    for name in FILES:
        if (directory / name).exists():
            raise FileExistsError(f"The report {str(directory / name)!r} is there already; it is not overwritten")
    lines, accuracies = plots.figure_of_curves(groups), plots.figure_of_accuracies(groups)
    rows = [row for rows in plots.curves(groups) for row in rows]
    directory.mkdir(parents=True, exist_ok=True)
    named = zip(plots.labels(groups), groups, strict=True)
    _write_csv(directory / "report.csv", [_raw_row(label, group) for label, group in named])
    _write_csv(directory / "curves.csv", rows)
    lines.savefig(directory / "curves.png", dpi=120)
    accuracies.savefig(directory / "accuracy.png", dpi=120)


def _raw_row(label: str, group: Group) -> dict[str, Any]:
    row: dict[str, Any] = {"group": label, **group.settings, "runs": len(group.runs), "seeds": _seeds(group.runs)}
    row["early_step"] = _early_step(group)
    for name, place in _NUMBERS.items():
        row[name], row[f"{name}_error"] = mean_and_error(group.values(*place))
    if row["early_step"] is None:
        row["early_test_accuracy"] = row["early_test_accuracy_error"] = None
    return row


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """An empty cell is a number that there is none of."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            missing = (name for name, value in row.items() if isinstance(value, float) and math.isnan(value))
            writer.writerow(row | dict.fromkeys(missing, ""))


def _same_layers(runs: Sequence[Run]) -> list[tuple[list[dict[str, Any]], list[Path]]]:
    groups: list[tuple[list[dict[str, Any]], list[Path]]] = []
    for run in runs:
        layers = run.summary["table"]["rows"]
        same = next((paths for others, paths in groups if others == layers), None)
        if same is None:
            groups.append((layers, [run.path]))
        else:
            same.append(run.path)
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
