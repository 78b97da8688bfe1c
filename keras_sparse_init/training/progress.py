"""What is seen and kept of a run while it trains: metrics.csv, a progress bar, and the stop when the loss is lost."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.progress

COLUMNS = ("step", "loss", "train_accuracy", "test_accuracy")


class Progress:
    """Follows the training steps; a context manager, so that the bar and the file are closed whatever happens.

    On a terminal it shows a bar; elsewhere it prints a line whenever it writes a row of metrics.csv.

    Args:
        path: The CSV file to write.
        steps: The number of steps of the whole run.
        log_every: Steps between two rows. The last step always gets one.
        evaluate: Gives the test accuracy as it is now.
        reset: Starts the running means of loss and accuracy anew, so that a row's are those since the row before.
        step: The number of steps that a resumed run has made.
        rows: The rows that it has written: they are written again, so that the file is whole whatever became of it.
        pending: Steps since the last of these rows, and the means of loss and accuracy over them.
    """

    def __init__(
        self,
        path: Path,
        steps: int,
        log_every: int,
        evaluate: Callable[[], float],
        reset: Callable[[], None],
        step: int = 0,
        rows: Sequence[Sequence[float]] = (),
        pending: Sequence[float] = (0, 0.0, 0.0),
    ) -> None:
        self.rows = [(int(row[0]), *map(float, row[1:])) for row in rows]
        self.step = self._start = step
        self.pending = self._carried = (int(pending[0]), float(pending[1]), float(pending[2]))
        self._steps, self._log_every = steps, log_every
        self._evaluate, self._reset = evaluate, reset
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *self.rows])
        temporary.replace(path)
        self._file = path.open("a", newline="", encoding="utf-8")
        console = rich.console.Console(file=sys.stderr)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("training"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.description}"),
            console=console,
            disable=not console.is_interactive,
        )
        self._task = self._bar.add_task("", total=steps, completed=step)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
        self._file.close()

    def on_batch_end(self, batch: int, logs: dict[str, Any]) -> bool:
        """Called after each execution of one or more steps, with the index of its last step and the running means.

        Returns:
            Whether a row was written.

        Raises:
            FloatingPointError: When the loss is NaN or infinite.
        """
        step = self._start + batch + 1
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(f"The loss is {logs['loss']} at step {step}: a smaller learning rate may help")
        self.step = step
        self._bar.update(self._task, completed=step)
        carried, *means = self._carried
        made = step - (self.rows[-1][0] if self.rows else 0)
        loss, accuracy = (
            (carried * before + (made - carried) * logs[name]) / made
            for name, before in zip(("loss", "accuracy"), means, strict=True)
        )
        self.pending = made, loss, accuracy
        # Several steps may run in one execution, and the step of a row may lie inside it: hence //, not %.
        if step // self._log_every > (step - made) // self._log_every or step == self._steps:
            self._log(step, loss, accuracy)
            return True
        return False

    def row(self, number: int) -> dict[str, float]:
        """A row by the names of its columns."""
        return dict(zip(COLUMNS, self.rows[number], strict=True))

    def _log(self, step: int, loss: float, accuracy: float) -> None:
        self.rows.append((step, loss, accuracy, self._evaluate()))
        self._reset()
        self.pending = self._carried = (0, 0.0, 0.0)
        csv.writer(self._file).writerow(self.rows[-1])
        self._file.flush()
        text = "loss {loss:.4f}  train {train_accuracy:.2%}  test {test_accuracy:.2%}".format(**self.row(-1))
        self._bar.update(self._task, description=text)
        if self._bar.disable:
            print(f"step {step}/{self._steps}  {text}", file=sys.stderr, flush=True)
