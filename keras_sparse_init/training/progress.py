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
        start: The number of steps that a resumed run has made. Rows of the file up to there are kept.
    """

    def __init__(
        self,
        path: Path,
        steps: int,
        log_every: int,
        evaluate: Callable[[], float],
        reset: Callable[[], None],
        start: int = 0,
    ) -> None:
        kept = [row for row in _read(path) if row["step"] <= start] if start else []
        self.first: dict[str, float] = kept[0] if kept else {}
        self.last: dict[str, float] = kept[-1] if kept else {}
        self.step = self._start = start
        self._steps, self._log_every = steps, log_every
        self._evaluate, self._reset = evaluate, reset
        self._file = path.open("w", newline="", encoding="utf-8")
        self._rows = csv.DictWriter(self._file, COLUMNS)
        self._rows.writeheader()
        self._rows.writerows(kept)
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
        self._task = self._bar.add_task("", total=steps, completed=start)

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
        # Several steps may run in one execution, and the step of a row may lie inside it: hence //, not %.
        if step // self._log_every > self.last.get("step", 0) // self._log_every or step == self._steps:
            self._log(step, logs)
            return True
        return False

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


def _read(path: Path) -> list[dict[str, float]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [{**row, "step": int(row["step"])} for row in rows]
