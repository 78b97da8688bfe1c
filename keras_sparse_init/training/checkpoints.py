"""Checkpoints of a run: all that the next step depends on, in one .npz file of plain arrays for either Keras."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

_FOLDER = "checkpoints"


def save(directory: Path, model: Any, step: int, **progress: Any) -> Path:
    """Writes a checkpoint in one piece, so that a run that is killed meanwhile keeps the one before.

    Kept are the checkpoint of step 0, the initialization, and the newest two.

    Args:
        directory: The run's directory.
        model: The compiled model, its optimizer built.
        step: How many steps were made.
        **progress: Numbers and arrays that `restore` gives back by these names.

    Returns:
        The file's path.

    Raises:
        FloatingPointError: When a weight is NaN or infinite: what is kept are weights to go on from.
        OSError: When the file cannot be written: the disk is full, say. The checkpoints before are as they were.
    """
    from keras_sparse_init import compat

    folder = directory / _FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:09d}.npz"
    temporary = path.with_suffix(".tmp")
    arrays = {name: _storable(compat.to_numpy(name, variable)) for name, variable in _variables(model).items()}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise FloatingPointError(f"Weights are not finite after step {step}: a smaller learning rate may help")
    arrays["names"] = np.array(_names(model, plain_variables(model)))
    arrays["mask_names"] = np.array(_mask_names(model))
    try:
        with temporary.open("wb") as file:
            np.savez(
                file, **{f"progress/{name}": value for name, value in {"step": step, **progress}.items()}, **arrays
            )
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)  # It would take room from the next try.
        raise OSError(
            f"The checkpoint {str(path)!r} cannot be written ({error}). The run goes on from the one before as soon as "
            "there is room"
        ) from error
    for old in [*_steps(directory)[1:-2], *folder.glob("*.tmp")]:  # One that is left of a killed run, too.
        old.unlink()
    return path


def first(directory: Path) -> Path:
    """The checkpoint of step 0 of a run: its initialization.

    Raises:
        FileNotFoundError: When there is none.
    """
    path = directory / _FOLDER / f"step-{0:09d}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{str(directory)!r} has no checkpoint of its beginning: {path} is missing")
    return path


def of_step(directory: Path, step: int) -> Path:
    """The checkpoint of a step of a run.

    Raises:
        FileNotFoundError: When there is none.
    """
    path = directory / _FOLDER / f"step-{step:09d}.npz"
    if not path.is_file():
        known = ", ".join(str(step_of(found)) for found in _steps(directory)) or "none"
        raise FileNotFoundError(
            f"{str(directory)!r} has no checkpoint of step {step}. There are those of steps {known}"
        )
    return path


def last(directory: Path) -> Path | None:
    """The newest checkpoint of a run, or None when there is none."""
    return max(_steps(directory), default=None)


def step_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.stem.removeprefix("step-"))


def restore(path: Path, model: Any) -> dict[str, np.ndarray]:
    """Gives a compiled model and its optimizer the values of a checkpoint.

    Returns:
        The step and whatever else `save` was given, by name.

    Raises:
        ValueError: When the checkpoint is damaged, or of another model or optimizer.
    """
    from keras_sparse_init import compat

    variables = _variables(model)
    arrays = _read(path, "; without it the run goes on from the one before")
    for name in ("names", "mask_names"):
        arrays.pop(name, None)
    progress = {name: arrays.pop(f"progress/{name}") for name in _progress_names(arrays)}
    found = {name: array.shape for name, array in arrays.items()}
    expected = {name: tuple(variable.shape) for name, variable in variables.items()}
    if found != expected:
        raise ValueError(f"The checkpoint {str(path)!r} is of another model or optimizer")
    for name, variable in variables.items():
        compat.assign(variable, arrays[name])
    return progress


def _storable(array: np.ndarray) -> np.ndarray:
    """An array of the same values in a dtype of NumPy's own: its files know no bfloat16, whose values float32 has."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _read(path: Path, remedy: str = "") -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"The checkpoint {str(path)!r} is damaged ({error}){remedy}") from error


def _progress_names(arrays: dict[str, np.ndarray]) -> list[str]:
    return [name.removeprefix("progress/") for name in arrays if name.startswith("progress/")]


def _steps(directory: Path) -> list[Path]:
    return sorted((directory / _FOLDER).glob("step-*.npz"))


def weights(path: Path, model: Any) -> list[np.ndarray]:
    """The weights of a checkpoint for a model of the same network, whatever masks either of them has.

    Args:
        path: The checkpoint.
        model: A built model of either Keras, with masks or without.

    Returns:
        An array for each of `plain_variables(model)`: that of its name.

    Raises:
        ValueError: When the checkpoint is damaged, of another network, or of one with `WeightNorm` layers, which the
            model has not.
    """
    arrays = _read(path)
    try:
        found = {str(name): arrays[f"model/{number}"] for number, name in enumerate(arrays["names"])}
    except KeyError as error:
        raise ValueError(f"The checkpoint {str(path)!r} is damaged (it lacks {error})") from error
    variables = plain_variables(model)
    names = _names(model, variables)
    expected = {name: tuple(variable.shape) for name, variable in zip(names, variables, strict=True)}
    shapes = {name: array.shape for name, array in found.items()}
    if any(name.endswith("_g") for name in shapes.keys() - expected.keys()):
        raise ValueError(
            f"The checkpoint {str(path)!r} holds the norms and directions of `WeightNorm` layers, not their kernels, "
            "which the model has: of such a run only the end is to be had"
        )
    if shapes != expected:
        raise ValueError(
            f"The checkpoint {str(path)!r} is of another network: of {shapes}, where the model has {expected}"
        )
    return [found[name] for name in names]


def names(model: Any) -> dict[int, str]:
    """The names of the variables of a plain model, as checkpoints and masks.npz have them, by their ids."""
    variables = plain_variables(model)
    return dict(zip(map(id, variables), _names(model, variables), strict=True))


def masks(path: Path) -> dict[str, np.ndarray]:
    """The masks of a checkpoint, boolean arrays by the names of the kernels.

    Raises:
        ValueError: When the checkpoint is damaged.
    """
    arrays = _read(path)
    try:
        named = enumerate(map(str, arrays["mask_names"]))
        return {name: arrays[f"masks/{number}"].astype(bool) for number, name in named if name}
    except KeyError as error:
        raise ValueError(f"The checkpoint {str(path)!r} is damaged (it lacks {error})") from error


def _mask_names(model: Any) -> list[str]:
    """For each variable that a plain model has not the name of the kernel whose mask it is, or an empty one."""
    from keras_sparse_init.sparse_model import masked_kernels

    known = {id(kernel.mask): kernel.seed_name for kernel in masked_kernels(model)}
    return [known.get(id(variable), "") for variable in _own_variables(model)]


def _names(model: Any, variables: list[Any]) -> list[str]:
    """A name for each variable that depends neither on the Keras nor on what the process has made before."""
    from keras_sparse_init import traversal

    names: list[str] = []
    for variable in variables:
        _, canonical, _, attribute = traversal.owner_of(model, variable)
        names.append(traversal.unused("/".join((*canonical, attribute)), set(names)))
    return names


def plain_variables(model: Any) -> list[Any]:
    """The variables of a model without the masks, thresholds and steps of its wrappers, in the order of a plain one."""
    from keras_sparse_init import traversal

    own = set()
    for _, _, layer in traversal.walk(model):
        if traversal.is_mask_wrapper(layer):
            own |= {id(v) for v in layer.variables} - {id(v) for v in layer.layer.variables}
    return [variable for variable in model.variables if id(variable) not in own]


def _own_variables(model: Any) -> list[Any]:
    """The variables of a model that a plain one has not: the masks, thresholds and steps of its wrappers."""
    plain = {id(variable) for variable in plain_variables(model)}
    return [variable for variable in model.variables if id(variable) not in plain]


def _variables(model: Any) -> dict[str, Any]:
    """By number, since names differ between the Kerases and need not be unique."""
    return {
        **{f"model/{number}": variable for number, variable in enumerate(plain_variables(model))},
        **{f"masks/{number}": variable for number, variable in enumerate(_own_variables(model))},
        **{f"optimizer/{number}": variable for number, variable in enumerate(model.optimizer.variables)},
    }
