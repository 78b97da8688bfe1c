"""What gin configs may name, and how they are read. This module and the command line are all that knows of gin.

Everything is registered from outside (`gin.external_configurable`): bindings reach what a config refers to and never a
plain call from Python.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gin

from keras_sparse_init.comparison.compare import compare_initializers
from keras_sparse_init.comparison.report import InitializerComparison
from keras_sparse_init.initializers import SparseScaledInit
from keras_sparse_init.orthogonal_initializers import ApproximateIsometryInit, ExactOrthogonalInit
from keras_sparse_init.training.configs import config_root, find_config
from keras_sparse_init.training.experiments import Dense, Lottery, Prune, Scratch
from keras_sparse_init.training.job import Job
from keras_sparse_init.training.networks import lenet5, mlp
from keras_sparse_init.training.signal_grid import SignalGrid
from keras_sparse_init.training.sparse_experiments import AtInit, Dynamic

_MODULE = "keras_sparse_init"

# What the configs call `train` is the making of the job: running it takes no configuration.
_train = gin.external_configurable(Job, name="train", module=_MODULE)
_signal = gin.external_configurable(SignalGrid, name="signal", module=_MODULE)
_compare = gin.external_configurable(compare_initializers, name="compare", module=_MODULE)
_COMMANDS = {_train: "train", _signal: "signal", _compare: "compare"}
gin.external_configurable(Dense, name="dense", module=_MODULE)
gin.external_configurable(Lottery, name="lottery", module=_MODULE)
gin.external_configurable(Prune, name="prune", module=_MODULE)
gin.external_configurable(Scratch, name="scratch", module=_MODULE)
gin.external_configurable(Dynamic, name="dynamic", module=_MODULE)
gin.external_configurable(AtInit, name="at_init", module=_MODULE)
gin.external_configurable(SparseScaledInit, module=_MODULE)
gin.external_configurable(ApproximateIsometryInit, module=_MODULE)
gin.external_configurable(ExactOrthogonalInit, module=_MODULE)
gin.external_configurable(lenet5, module=_MODULE)
gin.external_configurable(mlp, module=_MODULE)


# So that a user's config can say `include "lenet5/scratch.gin"`.
gin.add_config_file_search_path(str(config_root()))


def make_job(files: Sequence[str | Path], bindings: Sequence[str] = (), imports: Sequence[str] = ()) -> tuple[Job, str]:
    """Makes the job that gin files and bindings describe.

    Args:
        files: Config files; a later one overrides an earlier one.
        bindings: Single bindings such as "SPARSITY=0.9", which override the files.
        imports: Names of modules, looked for in the working directory too, whose functions and classes bindings name.

    Returns:
        The job, and the text of its operative configuration, which makes the same job again.

    Raises:
        ValueError: When a binding is unknown or its value is not valid. Messages are single lines.
        FileNotFoundError: When the data file is missing.
    """
    return _make(_train, files, bindings, imports)


def make_signal(
    files: Sequence[str | Path], bindings: Sequence[str] = (), imports: Sequence[str] = ()
) -> tuple[SignalGrid, str]:
    """Makes the signal-propagation experiment that gin files and bindings describe; all else is as in `make_job`."""
    return _make(_signal, files, bindings, imports)


def make_comparison(
    files: Sequence[str | Path], bindings: Sequence[str] = (), imports: Sequence[str] = ()
) -> tuple[InitializerComparison, str]:
    """Makes the comparison of initializers that gin files and bindings describe; all else is as in `make_job`."""
    return _make(_compare, files, bindings, imports)


def _make(
    configurable: Any, files: Sequence[str | Path], bindings: Sequence[str], imports: Sequence[str]
) -> tuple[Any, str]:
    gin.clear_config()
    try:
        for name in imports:
            _register_module(name)
        used_by_files = _parse(files, bindings)
        _check_macros(files, bindings, used_by_files)
        _check_command(configurable, files)
        return configurable(), gin.operative_config_str()
    except (ValueError, TypeError, OSError, ImportError, SyntaxError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(_one_line(error)) from error


def _check_command(configurable: Any, files: Sequence[str | Path]) -> None:
    """Refuses the configs of another command, of which everything would be ignored."""
    name = _COMMANDS[configurable]
    if not re.search(rf"^({_MODULE}\.)?{name}\.", gin.config_str(), flags=re.MULTILINE):
        raise ValueError(f"Nothing in {', '.join(map(str, files))} is for the command {name!r}")


def _register_module(name: str) -> None:
    """Imports a user's module and registers the public functions and classes that it defines."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # As `python -m` has it, which a console script has not.
    module = importlib.import_module(name)
    for public, value in vars(module).items():
        own = (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == module.__name__
        if own and not public.startswith("_"):
            with contextlib.suppress(ValueError):  # It is registered: by the module itself, or by a call before.
                gin.external_configurable(value, name=public, module=name)


def _parse(files: Sequence[str | Path], bindings: Sequence[str]) -> set[str]:
    """Parses them, and returns the macros that the files use, in what is overridden later too."""
    logging.disable(logging.ERROR)  # gin logs an error for each place where it looks for an included file in vain.
    try:
        used = {name for file in files for name in _macros_in(gin.parse_config_file(str(file)))}
        for binding in bindings:
            _parse_binding(binding)
        return used
    finally:
        logging.disable(logging.NOTSET)


def _parse_binding(binding: str) -> None:
    if "=" not in binding:
        raise ValueError(f"A gin binding must have the form NAME=value. Received: {binding!r}")
    try:
        gin.parse_config(binding)
    except SyntaxError as error:
        hint = "; text needs quotes" if re.fullmatch(r"[^=]*=\s*[A-Za-z_]\w*\s*", binding) else ""
        raise ValueError(f"The gin binding {binding!r} has a value that cannot be read{hint}") from error


def _check_macros(files: Sequence[str | Path], bindings: Sequence[str], used_by_files: set[str]) -> None:
    """Refuses macros that nothing uses (gin would silently ignore a misspelt one) and those that have no value."""
    text = gin.config_str()
    defined = set(re.findall(r"^(\w+) =", text, flags=re.MULTILINE))
    used = set(re.findall(r"%(\w+)", text))
    given = {match[1] for binding in bindings if (match := re.match(r"\s*(\w+)\s*=", binding))}
    # After `train.steps=4` nothing uses the files' STEPS: no fault, unless STEPS was given too.
    if unused := sorted(defined - used - (used_by_files - given)):
        raise ValueError(
            f"Unknown name {', '.join(map(repr, unused))}: nothing in {', '.join(map(str, files))} uses it. "
            f"The names that it uses are {', '.join(sorted(used)) or 'none'}"
        )
    if missing := sorted(used - defined):
        raise ValueError(f"No value is given for {', '.join(f'%{name}' for name in missing)}")


def _macros_in(parsed: Any) -> set[str]:
    """The macros that a file that gin has parsed uses, itself or in what it includes."""
    used = set(re.findall(r"%(\w+)", find_config(parsed.filename).read_text(encoding="utf-8")))
    return used.union(*map(_macros_in, parsed.includes))


def _one_line(error: Exception) -> str:
    # gin appends where a value came from, which is kept, and the enclosing calls, which say nothing more.
    message = re.sub(r"\s*In call to configurable '.*?' \(.*?>\)(?: in scope '.*?')?", "", str(error), flags=re.DOTALL)
    return re.sub(r"\s+", " ", message).strip()
