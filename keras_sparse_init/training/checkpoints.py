"""Checkpoints of a run: all that the next step depends on, in one .npz file of plain arrays for either Keras."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

_FOLDER = "checkpoints"


def save(directory: Path, step: int, seconds: float, model: Any) -> Path:
    """Writes a checkpoint in one piece, so that a run that is killed meanwhile keeps the one before.

    Kept are the checkpoint of step 0, from which lottery tickets start, and the newest one.

    Args:
        directory: The run's directory.
        step: How many steps were made.
        seconds: How long they took.
        model: The compiled model, its optimizer built.

    Returns:
        The file's path.
    """
    from keras_sparse_init import compat

    folder = directory / _FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:09d}.npz"
    temporary = path.with_suffix(".tmp")
    arrays = {name: compat.to_numpy(name, variable) for name, variable in _variables(model).items()}
    with temporary.open("wb") as file:
        np.savez(file, step=step, seconds=seconds, **arrays)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    for old in _steps(directory):
        if old not in (folder / f"step-{0:09d}.npz", path):
            old.unlink()
    return path


def last(directory: Path) -> Path | None:
    """The newest checkpoint of a run, or None when there is none."""
    return max(_steps(directory), default=None)


def restore(path: Path, model: Any) -> tuple[int, float]:
    """Gives a compiled model and its optimizer the values of a checkpoint.

    Returns:
        How many steps were made, and how many seconds they took.

    Raises:
        ValueError: When the checkpoint is of another model or optimizer.
    """
    from keras_sparse_init import compat

    variables = _variables(model)
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    step, seconds = int(arrays.pop("step")), float(arrays.pop("seconds"))
    found = {name: array.shape for name, array in arrays.items()}
    expected = {name: tuple(variable.shape) for name, variable in variables.items()}
    if found != expected:
        raise ValueError(f"The checkpoint {str(path)!r} is of another model or optimizer")
    for name, variable in variables.items():
        compat.assign(variable, arrays[name])
    return step, seconds


def _steps(directory: Path) -> list[Path]:
    return sorted((directory / _FOLDER).glob("step-*.npz"))


def _variables(model: Any) -> dict[str, Any]:
    """By number, since names differ between the Kerases and need not be unique."""
    return {
        **{f"model/{number}": variable for number, variable in enumerate(model.variables)},
        **{f"optimizer/{number}": variable for number, variable in enumerate(model.optimizer.variables)},
    }
