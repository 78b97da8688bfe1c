"""What is seen and kept of a run while it trains: metrics.csv, a progress bar, and the stop when the loss is lost.

A row has the loss and accuracy of training since the row before (of step 0: at initialization), the test accuracy, and
the norm of the gradient, as they are at its step.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.progress

# In `logs`: the first step of an execution at which the loss was not finite, or -1.
LOST = "lost"
COLUMNS = ("step", "loss", "train_accuracy", "test_accuracy", "gradient_norm")


class Progress:
    """Follows the training steps; a context manager, so that the bar and the file are closed whatever happens.

    On a terminal it shows a bar; elsewhere it prints a line whenever it writes a row of metrics.csv.

    Args:
        path: The CSV file to write.
        steps: The number of steps of the whole run.
        log_every: Steps between two rows. The last step always gets one.
        measure: Gives the test accuracy and the norm of the gradient as they are now.
        reset: Starts the running means of loss and accuracy anew, so that a row's are those since the row before.
        log: Where rows are also written to and closed: an `EventLog`.
        step: The number of steps that a resumed run has made.
        rows: The rows up to there: that of step 0, and what a resumed run has written. They are written again, so that
            the file is whole whatever became of it.
        pending: Steps since the last of these rows, and the means of loss and accuracy over them.
        quiet: Whether nothing is shown.
    """

    def __init__(
        self,
        path: Path,
        steps: int,
        log_every: int,
        measure: Callable[[], tuple[float, float]],
        reset: Callable[[], None],
        log: Any,
        rows: Sequence[Sequence[float]],
        step: int = 0,
        pending: Sequence[float] = (0, 0.0, 0.0),
        quiet: bool = False,
    ) -> None:
        self.rows = [(int(row[0]), *map(float, row[1:])) for row in rows]
        self.step = step
        self.pending = self._carried = (int(pending[0]), float(pending[1]), float(pending[2]))
        self._steps, self._log_every, self._quiet = steps, log_every, quiet
        self._measure, self._reset, self._log = measure, reset, log
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *self.rows])
        temporary.replace(path)
        for row in self.rows_by_name():
            log.write(row)
        self._file = path.open("a", newline="", encoding="utf-8")
        console = rich.console.Console(file=sys.stderr)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("training"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.description}"),
            console=console,
            disable=quiet or not console.is_interactive,
        )
        self._task = self._bar.add_task("", total=steps, completed=step)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
        self._file.close()
        self._log.close()

    def on_step(self, step: int, logs: dict[str, float]) -> bool:
        """Called after each execution of one or more steps, with the number of steps made and the running means.

        With `LOST` in `logs` the step is named at which the loss was lost, else the last of the execution.

        Returns:
            Whether a row was written.

        Raises:
            FloatingPointError: When the loss is NaN or infinite.
        """
        if not math.isfinite(logs["loss"]):
            lost = int(logs.get(LOST, step))
            raise FloatingPointError(f"The loss is {logs['loss']} at step {lost}: a smaller learning rate may help")
        self.step = step
        self._bar.update(self._task, completed=step)
        carried, *means = self._carried
        made = step - self.rows[-1][0]
        loss, accuracy = (
            (carried * before + (made - carried) * logs[name]) / made
            for name, before in zip(("loss", "accuracy"), means, strict=True)
        )
        self.pending = made, loss, accuracy
        # Several steps may run in one execution, and the step of a row may lie inside it: hence //, not %.
        if step // self._log_every > (step - made) // self._log_every or step == self._steps:
            self._write(step, loss, accuracy)
            return True
        return False

    def rows_by_name(self) -> list[dict[str, float]]:
        """All rows, by the names of their columns."""
        return [dict(zip(COLUMNS, row, strict=True)) for row in self.rows]

    def _write(self, step: int, loss: float, accuracy: float) -> None:
        self.rows.append((step, loss, accuracy, *self._measure()))
        self._reset()
        self.pending = self._carried = (0, 0.0, 0.0)
        csv.writer(self._file).writerow(self.rows[-1])
        self._file.flush()
        row = self.rows_by_name()[-1]
        self._log.write(row)
        text = "loss {loss:.4f}  train {train_accuracy:.2%}  test {test_accuracy:.2%}".format(**row)
        self._bar.update(self._task, description=text)
        if self._bar.disable and not self._quiet:
            print(f"step {step}/{self._steps}  {text}", file=sys.stderr, flush=True)
