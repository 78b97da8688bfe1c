"""Many runs of one config: every combination of values and seeds, each in a directory and a process of its own."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from keras_sparse_init.training import run_dir

SWEEP = "sweep.json"
LOGS = "logs"
_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        bindings: What it binds besides what all runs do.
        directory: Where its results go; its name says the bindings.
        log: The file that what it prints is added to.
        arguments: Those of the command `train`.
    """

    bindings: tuple[str, ...]
    directory: Path
    log: Path
    arguments: tuple[str, ...]

    @property
    def is_finished(self) -> bool:
        """Whether its directory holds a finished run."""
        return (self.directory / run_dir.SUMMARY).is_file()

    @property
    def command(self) -> str:
        """A shell command that does this run, and goes on with it when it has been stopped."""
        return shlex.join(["keras-sparse-init", *self.arguments])

    @property
    def test_accuracy(self) -> float:
        """That of a finished run."""
        return run_dir.read_summary(self.directory)["test_accuracy"]


class Sweep:
    """Every combination of the values of a grid, and of seeds, as runs of the command `train`.

    Args:
        output_dir: The directory of the directories of the runs. One that holds this sweep, or a part of it, goes on;
            more values and seeds may have come to it since.
        grid: "NAME=[VALUE, ...]" for each name to vary, values as Python literals: `SPARSITY=[0.8, 0.9]`.
        seeds: Values of SEED; None leaves it to the config.
        files: Config files, as `train` takes them.
        bindings: What all runs bind.
        imports: Modules that all runs import.

    Raises:
        ValueError: When a part of `grid` is not of that form, or a name is bound twice.
        FileExistsError: When `output_dir` holds anything else.

    Example:
        >>> import tempfile
        >>> from keras_sparse_init.training.sweep import Sweep
        >>> sweep = Sweep(tempfile.mkdtemp(), ["SPARSITY=[0.8, 0.9]", "INIT=['unit']"], seeds=[0, 1])
        >>> [run.directory.name for run in sweep.runs][:3]
        ['SPARSITY=0.8,INIT=unit,SEED=0', 'SPARSITY=0.8,INIT=unit,SEED=1', 'SPARSITY=0.9,INIT=unit,SEED=0']
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        grid: Sequence[str] = (),
        seeds: Sequence[int] | None = None,
        files: Sequence[str] = (),
        bindings: Sequence[str] = (),
        imports: Sequence[str] = (),
    ) -> None:
        self.output_dir = Path(output_dir)
        axes = [_axis(text) for text in grid]
        if seeds is not None:
            axes.append(("SEED", _different("seeds", list(seeds))))
        names = [name for name, _ in axes] + [text.partition("=")[0].strip() for text in bindings]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} is bound twice: each name by `grid`, `seeds` or `bindings`, once")
        # What all runs have in common. The names of their directories do not say it.
        self._common = {"gin_files": list(files), "gin_bindings": list(bindings), "imports": list(imports)}
        options = {"--gin_file": files, "--gin_bindings": bindings, "--import": imports}
        common = [part for option, values in options.items() for value in values for part in (option, value)]
        self.runs = []
        for values in itertools.product(*(values for _, values in axes)):
            chosen = [(name, value) for (name, _), value in zip(axes, values, strict=True)]
            own = tuple(f"{name}={value!r}" for name, value in chosen)
            directory = self.output_dir / _directory_name(chosen)
            arguments = [part for binding in own for part in ("--gin_bindings", binding)]
            arguments = ("train", *common, *arguments, "--output_dir", str(directory))
            self.runs.append(SweepRun(own, directory, self.output_dir / LOGS / f"{directory.name}.log", arguments))
        self._check_output_dir()

    def run(self, jobs: int = 1) -> list[SweepRun]:
        """Does the runs that are not finished, and shows on the terminal how far they are.

        A run that fails does not stop the others. Ctrl-C stops those that run as it does `train`: they go on from
        their checkpoints when the sweep is run again.

        Args:
            jobs: How many run at a time, each in a process of its own.

        Returns:
            The runs that failed.

        Raises:
            ValueError: When `jobs` is not positive.
        """
        if jobs < 1:
            raise ValueError(f"`jobs` must be a positive int. Received: jobs={jobs!r}")
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / LOGS).mkdir(exist_ok=True)
        if not (self.output_dir / SWEEP).exists():
            run_dir.write_json(self.output_dir / SWEEP, self._common)
        states = {run: "finished before" if run.is_finished else "waiting" for run in self.runs}
        waiting = [run for run in self.runs if not run.is_finished]
        running: dict[SweepRun, subprocess.Popen[bytes]] = {}
        failed: list[SweepRun] = []
        with _shown(states) as show:
            try:
                while waiting or running:
                    while waiting and len(running) < jobs:
                        run = waiting.pop(0)
                        running[run], states[run] = _start(run), "running"
                        show(run)
                    time.sleep(_POLL_SECONDS)
                    for run, process in list(running.items()):
                        if process.poll() is None:
                            continue
                        del running[run]
                        states[run] = "finished" if process.returncode == 0 else f"failed, see {run.log}"
                        failed += [run] if process.returncode else []
                        show(run)
                    show(None)
            finally:
                for process in running.values():
                    process.send_signal(signal.SIGINT)
                for process in running.values():
                    process.wait()
        return failed

    def _check_output_dir(self) -> None:
        path = self.output_dir
        if not (path / SWEEP).is_file():
            run_dir.check_new_dir(path)
            return
        try:
            begun = dict(json.loads((path / SWEEP).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise FileExistsError(f"The output directory {str(path)!r} has a {SWEEP} that is none: {error}") from error
        if differ := [name for name, value in self._common.items() if begun.get(name) != value]:
            raise FileExistsError(
                f"The output directory {str(path)!r} holds a sweep with other {', '.join(differ)}; choose another "
                f"directory: {begun.get(differ[0])!r} there, {self._common[differ[0]]!r} now"
            )


def _axis(text: str) -> tuple[str, list[Any]]:
    """The name and the values of "NAME=[VALUE, ...]"."""
    name, _, values = text.partition("=")
    name = name.strip()
    try:
        values = ast.literal_eval(values.strip())
    except (ValueError, SyntaxError):
        values = None
    if not re.fullmatch(r"[A-Za-z_][\w./]*", name) or not isinstance(values, list) or not values:
        raise ValueError(f"`grid` must be of the form NAME=[VALUE, ...], values Python literals. Received: {text!r}")
    return name, _different(name, values)


def _different(name: str, values: list[Any]) -> list[Any]:
    if len({repr(value) for value in values}) < len(values):
        raise ValueError(f"The values of {name} must be different. Received: {values}")
    return values


def _directory_name(chosen: Sequence[tuple[str, Any]]) -> str:
    """Says the bindings; where a file system would not hold that, a part of it and a digest."""
    exact = ",".join(f"{name}={value!r}" for name, value in chosen) or "run"
    name = ",".join(f"{name}={value}" for name, value in chosen) or "run"
    kept = re.sub(r"[^\w.,=+-]", "_", name, flags=re.ASCII)[:120]
    strings = all(not isinstance(value, str) or not _is_literal(value) for _, value in chosen)
    return kept if kept == name and strings else f"{kept}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def _is_literal(text: str) -> bool:
    """Whether a string looks like another value: '1' must not share a directory with 1."""
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False
    return True


def _start(run: SweepRun) -> subprocess.Popen[bytes]:
    with run.log.open("ab") as log:
        # In a session of its own: the terminal's Ctrl-C reaches the sweep alone, which passes it on once.
        return subprocess.Popen(
            [*_program(), *run.arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _program() -> list[str]:
    # SIGINT is ignored by what was started in the background; a run must stop on it.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    return [sys.executable, "-c", code + "from keras_sparse_init.cli import main; sys.exit(main(sys.argv[1:]))"]


@contextlib.contextmanager
def _shown(states: dict[SweepRun, str]) -> Iterator[Any]:
    """Gives a function that shows the states: as a table that is kept up to date, or a line where one has changed."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        yield lambda run: None if run is None else print(_line(run, states[run]), flush=True)
        return
    from rich.live import Live

    with Live(_table(states), console=console, auto_refresh=False) as live:
        yield lambda run: live.update(_table(states), refresh=True)


def _line(run: SweepRun, state: str) -> str:
    name = run.directory.name
    return f"{name}: {state}, test accuracy {run.test_accuracy:.2%}" if state == "finished" else f"{name}: {state}"


def _table(states: dict[SweepRun, str]) -> Any:
    from rich.table import Table

    done = sum(state.startswith("finished") for state in states.values())
    table = Table("run", "state", "step", "test accuracy", title=f"{done} of {len(states)} runs finished")
    for run, state in states.items():
        accuracy = f"{run.test_accuracy:.2%}" if state.startswith("finished") else ""
        table.add_row(run.directory.name, state, "" if state == "waiting" else _last_step(run), accuracy)
    return table


def _last_step(run: SweepRun) -> str:
    try:
        with (run.directory / "metrics.csv").open("rb") as file:
            return _last_line(file).partition(b",")[0].decode()
    except OSError:
        return ""


def _last_line(file: IO[bytes]) -> bytes:
    file.seek(max(os.fstat(file.fileno()).st_size - 4096, 0))
    return (file.read().splitlines() or [b""])[-1]
