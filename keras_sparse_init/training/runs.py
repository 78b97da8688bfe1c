"""Finished runs, read from their directories and grouped: those that differ in the seed alone belong together."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from keras_sparse_init.training.run_dir import RESULTS, SUMMARY, read_summary

METRICS = "metrics.csv"
# Those of every version; newer ones have "gradient_norm" as well.
_COLUMNS = ("step", "loss", "train_accuracy", "test_accuracy")

# What tells groups apart. A run of an older version may lack some of these, not the first seven.
_NEEDED = ("network", "data", "experiment", "init", "method", "sparsity", "steps")
_REPORTED = ("seed", "test_images", "early", "test_accuracy", "loss", "seconds", "table")
_NESTED = {"early": ("step", "test_accuracy"), "table": ("rows",)}
_OF_LAYERS = ("name", "shape", "sparsity", "fan_in_min", "fan_in_mean", "fan_in_max", "dead_units")
_OPTIONAL = (
    *("batch", "optimizer", "learning_rate", "momentum", "weight_decay", "clip_norm", "keras", "backend"),
    *("gradient_penalty", "init_noise"),
    *("weight_norm", "parameters", "architecture"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: Its directory.
        summary: The content of its summary.json.
    """

    path: Path
    summary: dict[str, Any]

    def settings(self) -> dict[str, Any]:
        """All that the run's numbers depend on but the seed, by name."""
        summary = self.summary
        found = {name: summary[name] for name in _NEEDED} | {name: summary.get(name) for name in _OPTIONAL}
        found["sparsity"] = round(found["sparsity"], 4)  # Masks of another seed may differ by a weight or two.
        nested = {"prune": "pruning", "init": "initializer", "updates": "updates", "scores": "scores"}
        for prefix, known in nested.items():
            values = summary.get(known) or {}
            found |= {f"{prefix}.{name}": value for name, value in values.items() if name != "sparsity"}
        return found

    def rows(self) -> list[dict[str, float]]:
        """The rows of its metrics.csv, NaN for what it has not.

        Raises:
            FileNotFoundError: When the file is missing.
            ValueError: When it has no rows, lacks a column, has cells that are no numbers, or steps that do not rise.
        """
        path = self.path / METRICS
        if not path.is_file():
            raise FileNotFoundError(f"The run {str(self.path)!r} has no {METRICS}")
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]
            rows = [row | {"step": int(row["step"])} for row in rows]
        except (KeyError, TypeError, ValueError, OverflowError, csv.Error) as error:
            raise ValueError(f"{str(path)!r} is damaged: {error}") from error
        if not rows:
            raise ValueError(f"{str(path)!r} is damaged: it has no rows")
        if lacking := [name for name in _COLUMNS if name not in rows[0]]:
            raise ValueError(f"{str(path)!r} is damaged: it has no column {', '.join(map(repr, lacking))}")
        for before, row in itertools.pairwise(rows):
            if row["step"] <= before["step"]:
                raise ValueError(f"{str(path)!r} is damaged: step {row['step']} comes after step {before['step']}")
        return rows


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone.

    Attributes:
        settings: What they have in common, by name.
        runs: The runs, each of another seed, in the order given.
    """

    settings: dict[str, Any]
    runs: list[Run]

    def values(self, *names: str) -> list[float]:
        """A number of each run's summary, given by the names down to it; NaN where a run lacks it."""
        found = []
        for run in self.runs:
            value: Any = run.summary
            for name in names:
                value = value.get(name) if isinstance(value, dict) else None
            found.append(math.nan if value is None else float(value))
        return found


def read_runs(directories: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Reads finished runs.

    Args:
        directories: Directories of runs, or directories that hold such directories.

    Returns:
        The runs in the order given; one that is named twice counts once.

    Raises:
        FileNotFoundError: When a directory neither is nor holds a finished run.
        ValueError: When a summary cannot be read or lacks something, or no directory is given.
    """
    paths = {path.resolve(): path for directory in directories for path in _paths(Path(directory))}
    if not paths:
        raise ValueError("At least one directory of a finished run must be given")
    runs = [Run(path, read_summary(path)) for path in paths.values()]
    for run in runs:
        if lacking := _lacking(run.summary):
            names = ", ".join(map(repr, lacking))
            raise ValueError(f"The summary of {str(run.path)!r} lacks {names}: was it written by another version?")
    return runs


def group_runs(runs: Iterable[Run]) -> tuple[list[Group], list[tuple[Run, Run]]]:
    """Puts runs together that differ in the seed alone.

    Returns:
        The groups, in the order of their first runs; and the runs that are in none because one of the same settings and
        seed is, each with that one: they are no further evidence.
    """
    groups: list[Group] = []
    repeated = []
    for run in runs:
        settings = run.settings()
        group = next((group for group in groups if group.settings == settings), None)
        if group is None:
            groups.append(Group(settings, [run]))
        elif same := [other for other in group.runs if other.summary["seed"] == run.summary["seed"]]:
            repeated.append((run, same[0]))
        else:
            group.runs.append(run)
    return groups, repeated


def differing(groups: Sequence[Group]) -> list[str]:
    """The names of the settings in which groups differ."""
    known = dict.fromkeys(name for group in groups for name in group.settings)
    names = [name for name in known if any(g.settings.get(name) != groups[0].settings.get(name) for g in groups)]
    # Only where nothing else tells two groups apart: what some groups have alike and others not at all, the settings of
    # an experiment for instance; that of the architecture, which says nothing to a reader.
    others = [name for name in names if name != "architecture"]
    alike = [name for name in others if len({str(g.settings.get(name)) for g in groups} - {"None"}) == 1]
    for found in ([name for name in others if name not in alike], others):
        if len({tuple(str(group.settings.get(name)) for name in found) for group in groups}) == len(groups):
            return found
    return names


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """The mean and its standard error s / sqrt(n), s^2 = sum (x - mean)^2 / (n - 1), without the values that are NaN.

    Returns:
        (mean, standard error); NaN where there are too few values: none for a mean, one for an error.

    Example:
        >>> from keras_sparse_init.training.runs import mean_and_error
        >>> mean_and_error([1.0, 3.0])
        (2.0, 1.0)
    """
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return math.nan, math.nan
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1)
    return mean, math.sqrt(variance / len(known))


def _lacking(summary: Any) -> list[str]:
    """What a report needs and the summary does not have."""
    if not isinstance(summary, dict):
        return [*_NEEDED, *_REPORTED]
    lacking = [name for name in (*_NEEDED, *_REPORTED) if name not in summary]
    for name, parts in _NESTED.items():
        within = summary.get(name) if isinstance(summary.get(name), dict) else {}
        lacking += [f"{name}.{part}" for part in parts if name in summary and part not in within]
    if lacking:
        return lacking
    rows = summary["table"]["rows"]
    return [f"table.rows.{name}" for name in _OF_LAYERS if any(name not in row for row in rows)]


def _paths(directory: Path) -> list[Path]:
    """The directory itself when it is a run's (or nothing at all: reading it says what is wrong), or the runs in it.

    Experiments without training write beside them, under runs/ too: they are no runs.
    """
    if (directory / RESULTS).is_file():
        return []
    if (directory / SUMMARY).is_file() or not directory.is_dir():
        return [directory]
    return sorted(path.parent for path in directory.glob(f"*/{SUMMARY}")) or [directory]
