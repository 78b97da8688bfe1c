"""The directory of a run: never one that holds anything else, the job it is of, the summary when it is finished."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keras_sparse_init._version import __version__

SUMMARY = "summary.json"
JOB = "job.json"
MASKS = "masks.npz"
RESULTS = "results.json"


def check_output_dir(path: str | os.PathLike[str]) -> Path:
    """Refuses a directory that a run must not write to.

    Args:
        path: Where the results are to lie. Nothing is created yet.

    Returns:
        The path.

    Raises:
        FileExistsError: When there is a file, a finished run, or a directory that holds anything but an unfinished run:
            results are never overwritten.

    Example:
        >>> from keras_sparse_init.training.run_dir import check_output_dir
        >>> check_output_dir("runs/a-new-one").name
        'a-new-one'
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"The output directory {str(path)!r} is a file")
    if (path / SUMMARY).is_file():
        raise FileExistsError(f"The output directory {str(path)!r} holds a finished run; results are never overwritten")
    begun = (path / JOB).with_suffix(".tmp")  # All that is left of a run that was killed at once.
    if path.is_dir() and any(file != begun for file in path.iterdir()) and not (path / JOB).is_file():
        raise FileExistsError(f"The output directory {str(path)!r} is not empty; results are never overwritten")
    return path


def make_new_dir(path: str | os.PathLike[str]) -> Path:
    """Makes a directory for results that are written at once, or takes one that is empty.

    Raises:
        FileExistsError: As `check_new_dir`.
    """
    path = check_new_dir(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_new_dir(path: str | os.PathLike[str]) -> Path:
    """Refuses what is neither a new nor an empty directory. Nothing is created yet.

    Raises:
        FileExistsError: When there is a file, or a directory that holds anything: results are never overwritten.
        NotADirectoryError: When it would lie in a file.
        PermissionError: When it may not be made or written to.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"The output directory {str(path)!r} is a file")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"The output directory {str(path)!r} is not empty; results are never overwritten")
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"The output directory {str(path)!r} would lie in the file {str(there)!r}")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"The output directory {str(path)!r} cannot be written: no permission for {str(there)!r}")
    return path


def claim(path: str | os.PathLike[str], job: dict[str, Any]) -> Path:
    """Makes the directory of a run, or finds that of the same job, which was interrupted.

    Args:
        path: The run's directory.
        job: What the run's numbers depend on, as JSON can hold it. Kept as job.json.

    Returns:
        The path.

    Raises:
        FileExistsError: When the directory holds anything but an unfinished run of the same job.
    """
    path = check_output_dir(path)
    job = json.loads(json.dumps(job))
    if (path / JOB).is_file():
        try:
            started = dict(json.loads((path / JOB).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise FileExistsError(f"The output directory {str(path)!r} has a {JOB} that is none: {error}") from error
        if differ := sorted(name for name in started.keys() | job.keys() if started.get(name) != job.get(name)):
            name = differ[0]
            raise FileExistsError(
                f"The output directory {str(path)!r} holds an unfinished run of another configuration; choose another "
                f"directory. They differ in {', '.join(differ)}: {started.get(name)!r} there, {job.get(name)!r} now"
            )
        return path
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / JOB, job)
    return path


@contextlib.contextmanager
def sole_use(directory: Path) -> Iterator[None]:
    """Keeps other processes from running in the same directory meanwhile.

    The lock is the system's: it ends with the process, however that ends, and leaves nothing behind.

    Raises:
        FileExistsError: When another process runs there.
    """
    with (directory / JOB).open("rb") as file:
        try:
            import fcntl
        except ImportError:  # Windows has none.
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"Another process is running in the output directory {str(directory)!r}") from error
        yield


def default_output_dir(*parts: str) -> Path:
    """A directory under runs/ whose name says by these parts what the run is, and when it began."""
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / "-".join([*parts, time])


def write_summary(directory: Path, summary: dict[str, Any]) -> None:
    """Writes a run's summary. It is written last and in one piece: a directory that has one is a finished run."""
    write_json(directory / SUMMARY, summary)


def write_results(directory: Path, results: dict[str, Any]) -> None:
    """Writes what an experiment without training found, with the versions of what it was found with, as results.json.

    A report on runs passes over a directory that has one.
    """
    write_json(directory / RESULTS, results | {"versions": versions()})


def versions() -> dict[str, str]:
    """The versions that numbers depend on."""
    import tensorflow as tf

    packages = {"tf_keras": "tf-keras", "keras": "keras", "tfmot": "tensorflow-model-optimization", "numpy": "numpy"}
    return {
        "keras_sparse_init": __version__,
        "python": platform.python_version(),
        "tensorflow": tf.__version__,  # Its distribution may be called tensorflow or tensorflow-cpu.
        **{name: importlib.metadata.version(package) for name, package in packages.items()},
    }


def read_summary(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the summary of a finished run.

    Args:
        directory: The run's output directory.

    Returns:
        The summary, as `write_summary` got it.

    Raises:
        FileNotFoundError: When the directory does not exist or holds no finished run.
        ValueError: When the summary is not JSON.
    """
    path = Path(directory) / SUMMARY
    if not path.is_file():
        reason = "it has no summary.json" if path.parent.is_dir() else "there is no such directory"
        raise FileNotFoundError(f"{str(directory)!r} is not the directory of a finished run: {reason}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not a run's summary: {error}") from error


def read_masks(directory: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The masks of a finished run, by the names of the kernels.

    Raises:
        FileNotFoundError: When the directory holds none.
        ValueError: When the network of the run was dense, or the file is damaged.
    """
    path = Path(directory) / MASKS
    if not path.is_file():
        raise FileNotFoundError(f"{str(directory)!r} is not the directory of a finished run: it has no {MASKS}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            masks = dict(archive)
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    if not masks:
        raise ValueError(f"The network of the run in {str(directory)!r} is dense: it has no masks")
    return masks


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file in one piece: it is there whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
