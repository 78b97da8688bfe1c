"""Finished runs, read from their directories and grouped: those that differ in the seed alone belong together."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from keras_sparse_init.training.run_dir import SUMMARY, read_summary

METRICS = "metrics.csv"

# What tells groups apart. A run of an older version may lack some of these, not the first seven.
_NEEDED = ("network", "data", "experiment", "init", "method", "sparsity", "steps")
_REPORTED = ("seed", "test_images", "early", "test_accuracy", "loss", "seconds", "table")
_OPTIONAL = ("batch", "optimizer", "learning_rate", "momentum", "weight_decay", "clip_norm", "keras", "backend")


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
        return found | {f"prune.{name}": value for name, value in summary.get("pruning", {}).items()}

    def rows(self) -> list[dict[str, float]]:
        """The rows of its metrics.csv, NaN for what it has not.

        Raises:
            FileNotFoundError: When the file is missing.
            ValueError: When it is not one of numbers with a column "step".
        """
        path = self.path / METRICS
        if not path.is_file():
            raise FileNotFoundError(f"The run {str(self.path)!r} has no {METRICS}")
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]
            return [row | {"step": int(row["step"])} for row in rows]
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"{str(path)!r} is damaged: {error}") from error


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
        if lacking := [name for name in (*_NEEDED, *_REPORTED) if name not in run.summary]:
            names = ", ".join(map(repr, lacking))
            raise ValueError(f"The summary of {str(run.path)!r} lacks {names}: was it written by another version?")
    return runs


def group_runs(runs: Iterable[Run]) -> tuple[list[Group], list[Run]]:
    """Puts runs together that differ in the seed alone.

    Returns:
        The groups, in the order of their first runs; and the runs that are in none because an equal one of the same
        seed is: they are no further evidence.
    """
    groups: list[Group] = []
    repeated = []
    for run in runs:
        settings = run.settings()
        group = next((group for group in groups if group.settings == settings), None)
        if group is None:
            groups.append(Group(settings, [run]))
        elif any(other.summary["seed"] == run.summary["seed"] for other in group.runs):
            repeated.append(run)
        else:
            group.runs.append(run)
    return groups, repeated


def differing(groups: Sequence[Group]) -> list[str]:
    """The names of the settings in which groups differ."""
    names = dict.fromkeys(name for group in groups for name in group.settings)
    return [name for name in names if any(g.settings.get(name) != groups[0].settings.get(name) for g in groups)]


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """The mean and its standard error s / sqrt(n), s^2 = sum (x - mean)^2 / (n - 1), without the values that are NaN.

    Returns:
        (mean, standard error); NaN where there are too few values: none for a mean, one for an error.

    Example:
        >>> from keras_sparse_init.training.runs import mean_and_error
        >>> mean_and_error([1.0, 2.0, 3.0])
        (2.0, 0.5773502691896258)
    """
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return math.nan, math.nan
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1)
    return mean, math.sqrt(variance / len(known))


def _paths(directory: Path) -> list[Path]:
    """The directory itself when it is a run's (or nothing at all: reading it says what is wrong), or the runs in it."""
    if (directory / SUMMARY).is_file() or not directory.is_dir():
        return [directory]
    return sorted(path.parent for path in directory.glob(f"*/{SUMMARY}")) or [directory]
