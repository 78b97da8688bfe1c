"""What is seen and kept of a run while it trains: metrics.csv, a progress bar, and the stop when the loss is lost."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable
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
    """

    def __init__(
        self, path: Path, steps: int, log_every: int, evaluate: Callable[[], float], reset: Callable[[], None]
    ) -> None:
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._steps, self._log_every = steps, log_every
        self._evaluate, self._reset = evaluate, reset
        self._file = path.open("w", newline="", encoding="utf-8")
        self._rows = csv.DictWriter(self._file, COLUMNS)
        self._rows.writeheader()
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
        self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
        self._file.close()

    def on_batch_end(self, batch: int, logs: dict[str, Any]) -> None:
        """Called after each execution of one or more steps, with the index of its last step and the running means.

        Raises:
            FloatingPointError: When the loss is NaN or infinite.
        """
        step = batch + 1
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(f"The loss is {logs['loss']} at step {step}: a smaller learning rate may help")
        self._bar.update(self._task, completed=step)
        # Several steps may run in one execution, and the step of a row may lie inside it: hence //, not %.
        if step // self._log_every > self.last.get("step", 0) // self._log_every or step == self._steps:
            self._log(step, logs)

    def _log(self, step: int, logs: dict[str, Any]) -> None:
        row = dict(zip(COLUMNS, (step, float(logs["loss"]), float(logs["accuracy"]), self._evaluate()), strict=True))
        self._reset()
        self._rows.writerow(row)
        self._file.flush()
        self.first = self.first or row
        self.last = row
        text = "loss {loss:.4f}  train {train_accuracy:.2%}  test {test_accuracy:.2%}".format(**row)
        self._bar.update(self._task, description=text)
        if self._bar.disable:
            print(f"step {step}/{self._steps}  {text}", file=sys.stderr, flush=True)
